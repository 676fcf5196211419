"""The token-span test: which vocabulary entries lie in the span of the rows of a client's lora_A update?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpers.cohort.model import CohortModel
from fedpers.errors import ConfigError
from fedpers.models.backbone import Backbone

CHUNK = 2048  # vocabulary entries embedded at once


@dataclass(frozen=True)
class RowSpace:
    """Directions in which the updates of the first layer respond, and how far each is above the noise."""

    directions: Tensor  # (records, rows, width), orthonormal rows
    shrink: Tensor  # (records, rows): 1 for a direction that is certainly in the span, 0 for one that is noise

    def distance(self, inputs: Tensor) -> Tensor:
        """Return the squared distance of inputs (records, tokens, width) to the span over their squared length."""
        along = torch.einsum("rkd,rtd->rtk", self.directions, inputs) * self.shrink[:, None]
        # The difference of vectors, not of squares: in float32 the latter would drown distances below 1e-3.
        rest = inputs - torch.einsum("rtk,rkd->rtd", along, self.directions)
        return rest.square().sum(dim=-1) / inputs.square().sum(dim=-1)


class Nearest:
    """The vocabulary entry with the smallest distance so far, for each record and position."""

    def __init__(self, records: int, positions: int) -> None:
        self.distance = torch.full((records, positions), math.inf)
        self.ids = torch.full((records, positions), -1)

    def see(self, record: int, ids: Tensor, distance: Tensor) -> None:
        """Take in distances (words, positions) of a part of the vocabulary."""
        smallest, place = distance.min(dim=0)
        closer = smallest < self.distance[record]
        self.distance[record][closer] = smallest[closer]
        self.ids[record][closer] = ids[place][closer]

    def hits(self, pairs: Sequence[set[tuple[int, int]]]) -> int:
        """Count true pairs (token, position) that are the nearest."""
        return sum(int(self.ids[record, place]) == token for record, true in enumerate(pairs) for token, place in true)


def row_space(gradients: Mapping[str, Tensor], deviation: Mapping[str, float], names: Sequence[str]) -> RowSpace:
    """Return the singular directions of the stacked dA of layers that read the same inputs.

    Each is weighed against the largest singular value that noise alone would have.

    Args:
        gradients: (records, rank, width) for each name, float64.
        deviation: standard deviation of what hides each entry; positive.
        names: the lora_A arrays to stack.
    """
    stacked = torch.cat([gradients[name] / deviation[name] for name in names], dim=1)
    _, values, directions = torch.linalg.svd(stacked, full_matrices=False)
    edge = math.sqrt(stacked.shape[1]) + math.sqrt(stacked.shape[2])  # of a matrix of standard normals
    floor = edge**2 + (1e-6 * values[:, :1]) ** 2  # the backward pass itself is float32
    squares = values.square()
    # x loses `shrink` of its part along a direction: what is left is that of x (I + dA^T dA / floor)^-1 x.
    return RowSpace(directions.float(), (1 - (floor / (floor + squares)).sqrt()).float())


def first_arrays(model: CohortModel) -> list[str]:
    """Return the names of the lora_A that read what the first block reads, found by a forward pass of no one's text.

    Raises ConfigError when there are none.
    """
    mask = torch.ones(1, 4, dtype=torch.long)
    hidden = model.backbone.below(torch.zeros_like(mask), mask, 0)
    found: list[str] = []
    handles = []
    for name, layer in model.layers.items():
        if ".lora_A." in name:

            def note(_module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                if torch.equal(args[0], hidden):
                    found.append(name)

            handles.append(layer.register_forward_pre_hook(note))
    model.load(model.broadcast(1))
    model.owners.set(torch.zeros(1, dtype=torch.long))
    try:
        with torch.no_grad():
            model.backbone.above(hidden, mask, 0)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ConfigError("model.adapter.targets: none reads the first block's input, where inversion looks for "
                          "tokens; add query or value.")  # fmt: skip
    return found


@torch.no_grad()
def vocabulary(backbone: Backbone, positions: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the vocabulary's ids (words,) but for special tokens, and each one's input at each position."""
    special = set(backbone.tokenizer.all_special_ids)
    size = backbone.model.get_input_embeddings().num_embeddings
    for start in range(0, size, CHUNK):
        ids = torch.tensor([one for one in range(start, min(start + CHUNK, size)) if one not in special])
        if len(ids):  # below the first block tokens do not meet, so a row of one word holds its input at each place
            repeated = ids[:, None].expand(-1, positions)
            yield ids, backbone.below(repeated, torch.ones_like(repeated), 0)
