"""Products with frozen weights in bfloat16, where a run asks for them.

Weights, inputs and gradients are rounded to 8 bits of mantissa before each product, and its result after; everything
between products stays in fp32. A record's own product is rounded by what the record itself holds, so that clipping
bounds what it did before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def supported(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware, which is taken for granted of all but CPUs; elsewhere such
    products are right, but slower than fp32.
    """
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def times(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (rows, in) times a frozen weight (in, out) in the weight's precision, as fp32; no gradients."""
    return x @ weight if weight.dtype == x.dtype else (x.to(weight.dtype) @ weight).to(x.dtype)


class _Product(torch.autograd.Function):
    """x (..., in) times the transpose of a frozen bfloat16 weight (out, in), in and out in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Return (..., out)."""
        ctx.weight = weight  # frozen, so it is no part of the graph
        return times(x, weight.T)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        """Return the gradient in x; the weight has none."""
        return times(outer[0], ctx.weight), None


class RoundedLinear(nn.Module):
    """A frozen linear layer with its weight in bfloat16, its bias in fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight16: Tensor
        self.register_buffer("weight16", weight.detach().bfloat16().contiguous(), persistent=False)  # (out, in)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        found: Tensor = _Product.apply(x, self.weight16)  # type: ignore[no-untyped-call]
        return found if self.bias is None else found + self.bias


def round_linears(blocks: Iterable[nn.Module]) -> int:
    """Replace every frozen linear layer below these modules by its rounded form; returns how many there were."""
    from transformers.pytorch_utils import Conv1D

    replaced = 0
    for block in blocks:
        for name, child in list(block.named_modules()):
            if not isinstance(child, nn.Linear | Conv1D) or any(p.requires_grad for p in child.parameters()):
                continue
            parent, _, attribute = name.rpartition(".")
            weight = child.weight if isinstance(child, nn.Linear) else child.weight.T  # Conv1D's lies the other way
            setattr(block.get_submodule(parent), attribute, RoundedLinear(weight, child.bias))
            replaced += 1
    return replaced
