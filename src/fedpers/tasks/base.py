"""What a task is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpers.config import TaskConfig
from fedpers.data.base import Federation, Record
from fedpers.models.backbone import Backbone, Tokens, pool
from fedpers.population import OnDemand

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Examples:
    """Records as one table; a row is a record. `train[u]` and `test[u]` are the rows of user u, if u is present."""

    users: Sequence[str]
    ids: tuple[str, ...]  # (rows,)
    inputs: tuple[str, ...]  # (rows,)
    train: Sequence[Rows]
    test: Sequence[Rows]
    texts: tuple[str, ...] = ()  # what `candidates` points into; embedded once by the frozen backbone
    # (rows, candidates), column 0 is the truth; of a task without candidates (0, 0)
    candidates: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    # (rows,) the number to predict: a rating, the place of a label; of a task without one (0,)
    targets: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    continuations: tuple[str, ...] = ()  # (rows,) texts to be predicted after `inputs`; of a language model alone
    present: tuple[int, ...] | None = None  # positions of the users whose records these are; by default all

    @property
    def people(self) -> Sequence[int]:
        """The positions of the users whose records these are."""
        return range(len(self.users)) if self.present is None else self.present


@dataclass(frozen=True)
class Batch:
    """What a task's scores depend on besides contexts and head, for some rows; a field is made when it is read.

    Attributes:
        candidates: embeddings (rows, candidates, width) of the candidates.
        next_tokens: (rows, tokens) the token that follows each position, -1 where none is to be predicted.
        vocabulary: the backbone's output embeddings, (vocabulary, width).
    """

    _candidates: Callable[[], Tensor]
    _next_tokens: Callable[[], Tensor]
    _vocabulary: Callable[[], Tensor]

    @property
    def candidates(self) -> Tensor:
        """Of a task that ranks."""
        return self._candidates()

    @property
    def next_tokens(self) -> Tensor:
        """Of a causal task."""
        return self._next_tokens()

    @property
    def vocabulary(self) -> Tensor:
        """Of a causal task."""
        return self._vocabulary()


class Task(ABC):
    """Base of all tasks. A record's loss must not depend on other records of the batch, or clipping bounds nothing."""

    metric: ClassVar[str]  # the headline metric, one of `columns`
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]]  # what `of_user` gives
    default_scale: ClassVar[float] = 1.0  # of `task.scale`, what the head multiplies its products by
    reads: ClassVar[str] = "mean over tokens, then unit length"  # what `context` makes of last hidden states
    causal: ClassVar[bool] = False  # whether it reads each token's hidden state by a causal language model

    def __init__(self, config: TaskConfig) -> None:
        self.config = config
        self.scale = config.scale or self.default_scale

    @abstractmethod
    def prepare(self, federation: Federation, key: bytes) -> Examples:
        """Turn records into examples. Everything besides a user's own records comes from outside the federation."""

    @abstractmethod
    def head(self, width: int) -> nn.Module:
        """Return the output layer for pooled contexts of this width, at its public initial value."""

    @abstractmethod
    def scores(self, head: nn.Module, contexts: Tensor, batch: Batch) -> Tensor:
        """Apply the head; scores (rows, ...) of contexts (rows, width), or (rows, tokens, width) of a causal task."""

    @abstractmethod
    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the loss per record, shape (rows,), of scores (rows, ...) and targets (rows,)."""

    @abstractmethod
    def metrics(self, scores: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Return what is measured on each record, each of shape (rows,); "loss" among it."""

    def public(self) -> dict[str, object]:
        """Return what else one has to know to apply a head, for the JSON beside it."""
        return {}

    def of_user(self, records: Mapping[str, Floats]) -> dict[str, float]:
        """Return one user's `columns` from what `metrics` gave for the user's records; by default the means."""
        return {name: float(records[name].mean()) for name in self.columns}

    def tokenize(self, backbone: Backbone, examples: Examples, max_tokens: int) -> Tokens:
        """Return what the backbone reads of each row."""
        return backbone.tokenize(examples.inputs, max_tokens)

    def context(self, hidden: Tensor, mask: Tensor, width: int) -> Tensor:
        """Make a row's context of last hidden states (rows, tokens, width); `width`: tokens of the longest row."""
        return pool(hidden, mask)


def table(federation: Federation) -> tuple[list[Record], Sequence[Rows], Sequence[Rows]]:
    """Lay all records out as rows; returns (records, train rows per user, test rows per user)."""
    records: list[Record] = []
    train: dict[int, Rows] = {}
    test: dict[int, Rows] = {}
    for user in federation.people:
        for rows, held in ((train, federation.train[user]), (test, federation.test[user])):
            rows[user] = np.arange(len(records), len(records) + len(held), dtype=np.int64)
            records.extend(held)
    if federation.present is None:
        return records, tuple(train.values()), tuple(test.values())
    size = len(federation.users)
    return records, OnDemand(size, train.__getitem__), OnDemand(size, test.__getitem__)


def examples_of(federation: Federation) -> tuple[list[Record], Examples]:
    """Lay all records out as rows; returns them, and examples with their inputs, to which a task adds its targets."""
    records, train, test = table(federation)
    ids, inputs = tuple(record.id for record in records), tuple(record.input for record in records)
    return records, Examples(federation.users, ids, inputs, train, test, present=federation.present)


def where(records: Sequence[Record], row: int) -> str:
    """Say which record a message is about: by its place in the user's files, else by its number among all records."""
    return f"the record at {records[row].place}" if records[row].place else f"record {row + 1}"


class LinearHead(nn.Module):
    """Gives output k as `scale * <w_k, x> + b_k`."""

    def __init__(self, width: int, outputs: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.direction = nn.Linear(width, outputs, bias=False)  # w, public initial value 0
        self.offset = nn.Linear(1, outputs, bias=False)  # b, public initial value 0
        nn.init.zeros_(self.direction.weight)
        nn.init.zeros_(self.offset.weight)

    def forward(self, context: Tensor) -> Tensor:
        """Return outputs (rows, outputs) for contexts (rows, width)."""
        found: Tensor = self.scale * self.direction(context) + self.offset(torch.ones_like(context[:, :1]))
        return found


def gather(embedded: Tensor, candidates: NDArray[np.int64]) -> Tensor:
    """Return the embeddings (rows, candidates, width) that the candidates point to."""
    # index_select copies whole rows, which indexing does number by number.
    rows = embedded.index_select(0, torch.from_numpy(candidates.reshape(-1)).to(embedded.device))
    return rows.reshape(*candidates.shape, embedded.shape[-1])
