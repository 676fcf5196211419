"""Layers whose weights belong to clients: each record passes through the weights of the client who owns it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn

from fedpers.cohort.norm import CohortLayerNorm

_NOBODY = torch.zeros(0, dtype=torch.long)


class Owners:
    """Who owns each record of the current forward pass; one object for all layers of a model and its copies.

    Every thread sees what it has set itself, so that threads can make passes of their own.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Owners:
        """Return itself."""
        return self

    @property
    def index(self) -> Tensor:
        """Positions in the cohort, (records,)."""
        found: Tensor = getattr(self._of_thread, "index", _NOBODY)
        return found

    def set(self, index: Tensor) -> None:
        """Set the owners of the coming forward pass, shape (records,)."""
        self._of_thread.index = index


class _Hooked(torch.autograd.Function):
    """Lets hooks on a layer see gradients without one being made for its weight."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, weight: Tensor) -> Tensor:
        """Return `found`, which needs a gradient as `weight` does."""
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        """Pass on the gradient of `found`."""
        return outer[0], None


class CohortLinear(nn.Module):
    """A bias-free linear layer for each client of a cohort; weight has shape (clients, out, in).

    With `per_record`, gradients in the weight are made by Opacus's hooks alone, record by record. Autograd's own sum
    over a client's records would cost as much, and nothing may read it.
    """

    per_record = False

    def __init__(self, in_features: int, out_features: int, owners: Owners) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.owners = owners
        self.weight = nn.Parameter(torch.zeros(1, out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (records, ..., in) to (records, ..., out)."""
        if self.per_record:
            found: Tensor = _Hooked.apply(self._times(x, self.weight.detach()), self.weight)  # type: ignore[no-untyped-call]
            return found
        return self._times(x, self.weight)

    def _times(self, x: Tensor, weights: Tensor) -> Tensor:
        # index_select, not weights[owners]: the latter's backward is not deterministic on a CPU.
        weight = weights.index_select(0, self.owners.index)
        if len(weight) != len(x):  # which a product would spread over all of them
            raise RuntimeError(f"{len(x)} records and the owners of {len(weight)}")
        if x.dim() == 2 and self.out_features == 1:  # a fifth of the time of as many products of two vectors
            return (weight.squeeze(1) * x).sum(dim=1, keepdim=True)
        flat = x.reshape(len(x), -1, self.in_features)
        # The weight on the left: this way round the backward's small products take a third to a half of the time.
        found = torch.bmm(weight, flat.transpose(1, 2)).transpose(1, 2)
        return found.reshape(*x.shape[:-1], self.out_features)


@register_grad_sampler(CohortLinear)  # type: ignore[untyped-decorator]
def per_record_gradient(
    layer: CohortLinear, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Give Opacus each record's gradient in its owner's weight, shape (records, out, in)."""
    if not layer.weight.requires_grad:
        return {}
    records = len(backprops)
    inputs = activations[0].reshape(records, -1, layer.in_features)
    outputs = backprops.reshape(records, -1, layer.out_features)
    if inputs.shape[1] == 1:
        return {layer.weight: outputs.transpose(1, 2) * inputs}
    return {layer.weight: torch.bmm(outputs.transpose(1, 2), inputs)}


Layer = CohortLinear | CohortLayerNorm


def to_cohort(module: nn.Module, owners: Owners) -> dict[str, Layer]:
    """Replace every trainable nn.Linear and nn.LayerNorm below `module` by one for cohorts; returns them by name.

    Raises:
        TypeError: a trainable linear with a bias, a normalisation without scale or shift, or another module that holds
            trainable parameters directly.
    """
    replaced: dict[str, Layer] = {}
    for name, child in list(module.named_modules()):
        if not any(p.requires_grad for p in child.parameters(recurse=False)):
            continue
        parent_name, _, attribute = name.rpartition(".")
        parent = module.get_submodule(parent_name)
        layer = _owned(name, child, owners)
        if isinstance(parent, nn.ModuleDict):
            parent[attribute] = layer
        else:
            setattr(parent, attribute, layer)
        replaced[name] = layer
    return replaced


def _owned(name: str, module: nn.Module, owners: Owners) -> Layer:
    """Return the layer for one client that computes what `module` does."""
    layer: Layer
    trainable = {key for key, p in module.named_parameters() if p.requires_grad}
    if isinstance(module, nn.Linear) and dict(module.named_parameters()).keys() == {"weight"}:
        layer = CohortLinear(module.in_features, module.out_features, owners)
        layer.weight = nn.Parameter(module.weight.detach().unsqueeze(0).clone())
        return layer
    # The exact class: what inherits from it may compute something else.
    if type(module) is nn.LayerNorm and trainable == {"weight", "bias"} and len(module.normalized_shape) == 1:
        layer = CohortLayerNorm(module.normalized_shape[0], module.eps, owners)
        layer.weight = nn.Parameter(torch.stack([module.weight.detach(), module.bias.detach()]).unsqueeze(0))
        return layer
    raise TypeError(
        f"{name}: only bias-free linear layers, and layer norms with scale and shift, can be trained in cohorts, found "
        f"{type(module).__name__}"
    )
