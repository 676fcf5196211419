"""What a data source yields, and the checks that hold for every source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedpers.config import Config, DataConfig
from fedpers.drift import changed
from fedpers.errors import ConfigError, DataError
from fedpers.population import OnDemand
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
    place: str = field(default="", compare=False)  # file and line, for messages alone; nothing is drawn or named by it


@dataclass(frozen=True, slots=True)
class PublicText:
    """A text by a person outside the federation."""

    id: str
    conversation: str
    text: str


@dataclass(frozen=True)
class Federation:
    """Users and their records, in a fixed order of users; `train[u]` and `test[u]` belong to `users[u]`.

    Where `lazy` is set a user's records are made when they are read; `of` makes those of some users.
    """

    source: str
    users: Sequence[str]
    train: Sequence[tuple[Record, ...]]
    test: Sequence[tuple[Record, ...]]
    pool: tuple[PublicText, ...]
    pool_authors: frozenset[str]
    partners: Sequence[frozenset[int]]  # positions of the users that share a conversation with users[u]
    counts: dict[str, int] = field(default_factory=dict)  # skipped and capped, for the simulator's eyes
    facts: tuple[str, ...] = ()  # what a claim about this federation has to leave out, with numbers
    swap: tuple[frozenset[int], ...] | None = None  # whose personal state users[u] may try; by default anybody's
    donors: tuple[str, ...] = ()  # people outside whose records a change of preference brought in, by member
    lazy: str = ""  # of records made when they are read: all that they hang on besides configuration and seed
    present: tuple[int, ...] | None = None  # whose records are here, by position; by default everybody's

    @property
    def people(self) -> Sequence[int]:
        """The positions of the users whose records are here."""
        return range(len(self.users)) if self.present is None else self.present

    def of(self, users: Sequence[int]) -> Federation:
        """Return this federation with the records of some users, by position, made and checked."""
        made = {user: (self.train[user], self.test[user]) for user in users}
        train = OnDemand(len(self.users), lambda user: made[user][0])
        test = OnDemand(len(self.users), lambda user: made[user][1])
        return replace(self, train=train, test=test, present=tuple(users)).check()

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
        if self.lazy and self.present is None:
            return self  # `of` checks the users whose records it makes
        names = [self.users[user] for user in self.people]
        if len(set(names)) != len(names) or not all(type(user) is str for user in names):
            raise DataError(
                f"data {self.source}: user ids must be distinct strings; noise and batches are drawn by user id, so "
                "two users with one id would get the same noise."
            )
        parts = [[part[user] for user in self.people] for part in (self.train, self.test)]
        ids = [r.id for part in parts for records in part for r in records]
        if len(set(ids)) != len(ids):
            raise DataError(f"data {self.source}: a record appears twice (in train and test, or for two users).")
        conversations = [{r.conversation for records in part for r in records} for part in parts]
        if shared := conversations[0] & conversations[1]:
            raise DataError(f"data {self.source}: {len(shared)} conversations are in train and in test of some user.")
        if inside := self.pool_authors & {*names, *self.donors}:
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
    lazy: ClassVar[bool] = False  # whether it heeds `data.lazy`

    @abstractmethod
    def load(self, config: DataConfig, key: bytes) -> Federation:
        """Return the federation; `key` is the public seed's. Raises DataError or AssetError."""


def load(config: Config, key: bytes) -> Federation:
    """Load the configured federation, with people held out and a change of preference where asked, and check it."""
    data = config.data
    federation = _without_held_out(data, key) if data.held_out else _read(data, key, data.users)
    if data.drift is not None:
        # The people whom the source would choose next are the donors; one more, for a source that fills whole groups.
        everyone = _read(data, key, 2 * len(federation.users) + 1)
        federation = changed(federation, everyone, data.drift, key)
    return federation.check()


def everybody(data: DataConfig, key: bytes) -> Federation:
    """Return all people with enough records, members and others, each with their own records.

    A source that makes people up has as many as it is asked for: those of `data.users` and `data.held_out`.
    """
    found = _read(data, key, None)
    asked = data.users + data.held_out if data.users is not None else 0
    return found if len(found.users) >= asked else _read(data, key, asked)


def _without_held_out(data: DataConfig, key: bytes) -> Federation:
    """Let the source choose so few users that `data.held_out` people with enough records are left outside."""
    people = len(everybody(data, key).users)
    most = people - data.held_out
    if most < 1:
        raise DataError(
            f"data.held_out = {data.held_out}: {people} people have enough records, so nobody would be left to take "
            "part; lower it."
        )
    federation = _read(data, key, min(most, data.users or most))
    if len(federation.users) > most:
        raise DataError(f"data {federation.source}: it does not heed data.users, so nobody can be held out.")
    counts = federation.counts | {"held_out": data.held_out}
    if "not_chosen" in counts:
        counts["not_chosen"] -= data.held_out
    return replace(federation, counts=counts)


def _read(data: DataConfig, key: bytes, users: int | None) -> Federation:
    source = find("data", data.name, Source)()  # type: ignore[type-abstract]
    if data.lazy and not source.lazy:
        raise ConfigError(f"data.lazy: {data.name} reads the records of all users at once; leave data.lazy out.")
    return source.load(data.model_copy(update={"users": users}), key)


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
