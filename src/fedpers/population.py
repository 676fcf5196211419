"""Federations too large to hold: records that are made when they are asked for, and the users who are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fedpers.privacy.randomness import generator

T = TypeVar("T")


class OnDemand(Sequence[T]):
    """A sequence whose values are made when they are read, and not kept; no slices, no negative places."""

    def __init__(self, size: int, make: Callable[[int], T]) -> None:
        self._size, self._make = size, make

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: Any) -> Any:
        """Return the value at a place. Raises IndexError for a place that there is not."""
        if not 0 <= place < self._size:
            raise IndexError(place)
        return self._make(int(place))


def sample(users: int, number: int | None, key: bytes) -> Sequence[int]:
    """Return the positions of `number` users, ascending, drawn by a public key; all of them by default.

    The draw looks at nothing but the size of the federation, so no data decide who is measured.
    """
    if number is None or number >= users:
        return range(users)
    drawn = generator(key, "measured").choice(users, number, replace=False, shuffle=False)
    return sorted(int(user) for user in drawn)
