"""Layer normalisation whose scale and shift belong to clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from fedpers.cohort.linear import Owners


class CohortLayerNorm(nn.Module):
    """Layer normalisation (Ba, Kiros, Hinton 2016, section 3) for each client of a cohort.

    weight has shape (clients, 2, width): row 0 is a client's scale, row 1 the shift.
    """

    def __init__(self, width: int, eps: float, owners: Owners) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.owners = owners
        self.weight = nn.Parameter(torch.stack([torch.ones(width), torch.zeros(width)]).unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (records, ..., width) over its last dimension, then apply the owner's scale and shift."""
        weight = self.weight.index_select(0, self.owners.index)  # as in CohortLinear: deterministic backward
        shape = (len(x), *(1,) * (x.dim() - 2), self.width)
        scale, shift = (row.reshape(shape) for row in weight.unbind(dim=1))
        return functional.layer_norm(x, (self.width,), eps=self.eps) * scale + shift


@register_grad_sampler(CohortLayerNorm)  # type: ignore[untyped-decorator]
def per_record_gradient(
    layer: CohortLayerNorm, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Give Opacus each record's gradient in its owner's scale and shift, shape (records, 2, width)."""
    if not layer.weight.requires_grad:
        return {}
    records = len(backprops)
    normal = functional.layer_norm(activations[0], (layer.width,), eps=layer.eps)
    rows = [(normal * backprops).reshape(records, -1, layer.width), backprops.reshape(records, -1, layer.width)]
    return {layer.weight: torch.stack([row.sum(dim=1) for row in rows], dim=1)}
