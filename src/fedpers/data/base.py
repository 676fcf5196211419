"""What a data source yields, and the checks that hold for every source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fedpers.config import Config, DataConfig
from fedpers.errors import DataError
from fedpers.privacy.randomness import derive, seed_key
from fedpers.registry import find

_ROLES = seed_key(0)


@dataclass(frozen=True, slots=True)
class Record:
    """One training example of one user. `id` names it for good; coins and candidates are drawn by it."""

    id: str
    conversation: str
    input: str
    target: str


@dataclass(frozen=True, slots=True)
class PublicText:
    """A text by a person outside the federation."""

    id: str
    conversation: str
    text: str


@dataclass(frozen=True)
class Federation:
    """Users and their records, in a fixed order of users; `train[u]` and `test[u]` belong to `users[u]`."""

    source: str
    users: tuple[str, ...]
    train: tuple[tuple[Record, ...], ...]
    test: tuple[tuple[Record, ...], ...]
    pool: tuple[PublicText, ...]
    pool_authors: frozenset[str]
    partners: tuple[frozenset[int], ...]  # positions of the users that share a conversation with users[u]
    counts: dict[str, int] = field(default_factory=dict)  # skipped and capped, for the simulator's eyes
    facts: tuple[str, ...] = ()  # what a claim about this federation has to leave out, with numbers
    swap: tuple[frozenset[int], ...] | None = None  # whose personal state users[u] may try; by default anybody's

    def check(self) -> Federation:
        """Return self if train and test are disjoint by record and by conversation, and the pool is from outside.

        Raises:
            DataError: an overlap, a repeated record, or no users at all.
        """
        if not self.users:
            raise DataError(
                f"data {self.source}: no user has enough records (all {self.counts.get('people', 0)} people have "
                "fewer than data.min_train for training or data.min_test for testing); lower data.min_train or "
                "data.min_test."
            )
        if len(set(self.users)) != len(self.users) or not all(type(user) is str for user in self.users):
            raise DataError(
                f"data {self.source}: user ids must be distinct strings; noise and sampling are drawn by user id, so "
                "two users with one id would get the same noise."
            )
        ids = [r.id for part in (self.train, self.test) for records in part for r in records]
        if len(set(ids)) != len(ids):
            raise DataError(f"data {self.source}: a record appears twice (in train and test, or for two users).")
        conversations = [{r.conversation for records in part for r in records} for part in (self.train, self.test)]
        if shared := conversations[0] & conversations[1]:
            raise DataError(f"data {self.source}: {len(shared)} conversations are in train and in test of some user.")
        if inside := self.pool_authors & set(self.users):
            raise DataError(
                f"data {self.source}: {len(inside)} members of the federation are authors in the public pool; their "
                "private texts would shape other clients' releases and make every epsilon false."
            )
        return self


class Source(ABC):
    """A data source: one file in `fedpers/data`, found by its name."""

    about: ClassVar[str] = ""  # in one line, what it is
    licence: ClassVar[str] = ""
    citation: ClassVar[str] = ""  # authors, title, venue and year
    split: ClassVar[str] = ""  # in one line, how training and test records are told apart
    tasks: ClassVar[tuple[str, ...]] = ()  # what can be learnt from it; the first is what is usually meant

    @abstractmethod
    def load(self, config: DataConfig, key: bytes) -> Federation:
        """Return the federation; `key` is the public seed's. Raises DataError or AssetError."""


def load(config: Config, key: bytes) -> Federation:
    """Load the configured federation and check it."""
    return find("data", config.data.name, Source)().load(config.data, key).check()  # type: ignore[type-abstract]


def role(user: str, pool_share: float = 0.08, development_share: float = 0.12) -> str:
    """Return "pool", "development" or "federation" for a person.

    It depends on the id alone: no data decide who is where, and no seed either, so that what was tuned on development
    users has met no member of any federation.
    """
    point = int.from_bytes(derive(_ROLES, "role", user)[:8], "little") / 2**64
    if point < pool_share:
        return "pool"
    return "development" if point < pool_share + development_share else "federation"


def choose_users(users: Sequence[str], limit: int | None, key: bytes) -> list[str]:
    """Return at most `limit` users, chosen and ordered by a public hash of their ids."""
    ordered = sorted(users, key=lambda user: derive(key, "user", user))
    return sorted(ordered[:limit])
