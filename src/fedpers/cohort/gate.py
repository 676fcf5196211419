"""The gate, which weighs two adapters against each other for each record.

A record's output of the first adapter is scaled by 1 - g and that of the second by g, where g = link(gate . [features,
1]) is the same in all layers. Without a gate, two adapters add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedpers.cohort.linear import CohortLinear
from fedpers.method_table import Link
from fedpers.models.array_names import SECOND

LINKS: dict[Link, Callable[[Tensor], Tensor]] = {"linear": lambda x: x, "sigmoid": torch.sigmoid}


def weights(gate: CohortLinear, features: Tensor, link: Link) -> Tensor:
    """Return the weight g of the second adapter, (records, 1, 1), over tokens and outputs.

    Args:
        gate: its last input is 1; the owners of the records are set.
        features: what it reads, (records, width).
        link: makes g of its output.
    """
    return LINKS[link](gate(functional.pad(features, (0, 1), value=1.0))).unsqueeze(-1)


@contextmanager
def mixed(layers: Sequence[Any], scaling: float, second: Tensor) -> Iterator[None]:
    """Scale the outputs of both adapters in PEFT's layers by these weights of the second, on top of their scaling."""

    def scale(one: Tensor | float, other: Tensor | float) -> None:
        for layer in layers:
            layer.scaling.update({"default": one, SECOND: other})

    try:
        # PEFT multiplies each adapter's output by its scaling, after lora_B.
        scale(scaling * (1.0 - second), scaling * second)
        yield
    finally:
        scale(scaling, scaling)
