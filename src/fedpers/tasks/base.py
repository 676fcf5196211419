"""What a task is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpers.config import TaskConfig
from fedpers.data.base import Federation, Record

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """All users' records as one table; a row is a record. `train[u]` and `test[u]` are the rows of user u."""

    users: tuple[str, ...]
    ids: tuple[str, ...]  # (rows,)
    inputs: tuple[str, ...]  # (rows,)
    train: tuple[Rows, ...]
    test: tuple[Rows, ...]
    texts: tuple[str, ...]  # what `candidates` points into; embedded once by the frozen backbone
    candidates: NDArray[np.int64]  # (rows, candidates); column 0 is the truth


class Task(ABC):
    """Base of all tasks. The per-record loss must not depend on other records of the batch (privacy.md, S5)."""

    metric: ClassVar[str]  # the headline metric

    def __init__(self, config: TaskConfig) -> None:
        self.config = config

    @abstractmethod
    def prepare(self, federation: Federation, key: bytes) -> Examples:
        """Turn records into examples. Everything besides a user's own records comes from outside the federation."""

    @abstractmethod
    def head(self, width: int) -> nn.Module:
        """Return the output layer for pooled contexts of this width, at its public initial value."""

    @abstractmethod
    def loss(self, scores: Tensor) -> Tensor:
        """Return the loss per record, shape (rows,), of scores (rows, candidates)."""

    @abstractmethod
    def metrics(self, scores: Tensor) -> Mapping[str, Tensor]:
        """Return the metrics per record, each of shape (rows,)."""


def table(federation: Federation) -> tuple[list[Record], tuple[Rows, ...], tuple[Rows, ...]]:
    """Lay all records out as rows; returns (records, train rows per user, test rows per user)."""
    records: list[Record] = []
    rows: dict[str, list[Rows]] = {"train": [], "test": []}
    for user in range(len(federation.users)):
        for part, held in (("train", federation.train[user]), ("test", federation.test[user])):
            rows[part].append(np.arange(len(records), len(records) + len(held), dtype=np.int64))
            records.extend(held)
    return records, tuple(rows["train"]), tuple(rows["test"])


def gather(embedded: Tensor, candidates: NDArray[np.int64]) -> Tensor:
    """Return the embeddings (rows, candidates, width) that the candidates point to."""
    return embedded[torch.from_numpy(candidates)]
