"""Which records a client's step sees, and how the records of a step are cut into forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpers.privacy.randomness import Part, uniforms
from fedpers.tasks.base import Examples

Index = NDArray[np.int64]

ALIKE = 0.9  # of the longest record's tokens
SMALL_PASS = 512  # padded tokens


@dataclass(frozen=True)
class Step:
    """One optimizer step of a cohort: records of all clients, mixed."""

    rows: Index  # (records,) rows of the examples
    owners: Index  # (records,) positions in the cohort
    active: NDArray[np.bool_]  # (clients,) who steps; a Poisson batch may be empty and its client still steps

    @property
    def weights(self) -> NDArray[np.float32]:
        """One over the number of the owner's records in this step, shape (records,)."""
        counts = np.bincount(self.owners, minlength=len(self.active))
        return (1.0 / counts[self.owners]).astype(np.float32)


def epochs(
    examples: Examples, users: Sequence[int], count: int, batch_size: int, key: bytes, address: Sequence[Part]
) -> list[Step]:
    """Shuffled passes over each client's training records; a client without further batches rests.

    The order is drawn by user, record id and epoch, so removing a record leaves the order of the others.
    """
    batches: list[list[Index]] = []
    for user in users:
        rows = examples.train[user]
        names = [examples.ids[row] for row in rows]
        own: list[Index] = []
        for drawn in uniforms(key, (*address, "order", examples.users[user]), names, count).T:
            shuffled = rows[np.argsort(drawn, kind="stable")]
            own.extend(shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size))
        batches.append(own)
    return [
        _step([own[t] if t < len(own) else None for own in batches]) for t in range(max(map(len, batches), default=0))
    ]


def poisson(
    examples: Examples, users: Sequence[int], count: int, rate: float, key: bytes, address: Sequence[Part]
) -> list[Step]:
    """`count` steps in which each record takes part with probability `rate`, independently.

    Every coin is drawn by user, record id and step, so removing a record changes no other coin. A client whose batch
    came out empty still steps (on noise alone): leaving the step out would tell that it was empty.
    """
    chosen: list[NDArray[np.bool_]] = []
    for user in users:
        names = [examples.ids[row] for row in examples.train[user]]
        chosen.append(uniforms(key, (*address, "batch", examples.users[user]), names, count) < rate)
    return [
        _step([examples.train[user][coins[:, t]] for user, coins in zip(users, chosen, strict=True)])
        for t in range(count)
    ]


def _step(batches: Sequence[Index | None]) -> Step:
    present = [(owner, rows) for owner, rows in enumerate(batches) if rows is not None]
    return Step(
        rows=np.concatenate([rows for _, rows in present] or [np.zeros(0, np.int64)]),
        owners=np.concatenate([np.full(len(rows), owner) for owner, rows in present] or [np.zeros(0, np.int64)]),
        active=np.array([rows is not None for rows in batches]),
    )


def microbatches(lengths: Index, token_budget: int) -> Iterator[Index]:
    """Cut records, sorted by length, into passes of at most `token_budget` padded tokens; yields positions.

    A pass that has SMALL_PASS tokens also ends where records get shorter than ALIKE of its longest: from there on
    padding costs more than another pass.
    """
    positions = np.argsort(-lengths, kind="stable")
    descending = lengths[positions]
    start = 0
    while start < len(positions):
        longest = max(1, int(descending[start]))
        alike = int(np.searchsorted(-descending, -ALIKE * longest, side="right")) - start
        size = max(1, min(token_budget // longest, max(alike, -(-SMALL_PASS // longest))))
        yield positions[start : start + size]
        start += size
