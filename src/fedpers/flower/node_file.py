"""What a node has of its own: its owner's file with the limits, the user's records, the public list of people.

Everything here is JSON or YAML that is checked key by key; a path in the owner's file is relative to that file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import Field, ValidationError

from fedpers.config import Config, Epsilon, load_config, read_tree
from fedpers.config.base import Positive, Section
from fedpers.data.base import Federation, PublicText, Record
from fedpers.errors import ConfigError, DataError
from fedpers.population import OnDemand

S = TypeVar("S", bound=Section)
Parts = tuple[tuple[Record, ...], tuple[Record, ...]]  # for training, for testing


class Limits(Section):
    """What a node's owner allows, whatever a server asks. A limit that is not given does not limit."""

    epsilon: Epsilon = math.inf  # by the node's own ledger, at the run's delta
    min_noise: Positive | None = None  # deviation over clip, of the noise that this node adds itself
    max_clip: Positive | None = None
    max_steps: int | None = Field(None, ge=1)  # noised steps in one round
    max_rounds: int | None = Field(None, ge=1)  # that are answered
    unprotected: bool = False  # send what this node has not put noise on, for a server that is trusted
    metrics: bool = False  # answer evaluation messages with this user's raw metrics, where this node adds no noise

    def sentence(self) -> str:
        """Say them, for the node's claim."""
        said = [
            f"{words} {value:g}"
            for words, value in (
                ("epsilon at most", None if math.isinf(self.epsilon) else self.epsilon),
                ("noise multiplier at least", self.min_noise),
                ("clip at most", self.max_clip),
                ("noised steps in a round at most", self.max_steps),
                ("answered rounds at most", self.max_rounds),
            )
            if value is not None
        ]
        said.append(f"what has no noise of this node's {'may' if self.unprotected else 'must not'} be sent")
        said.append(f"raw metrics {'may, where this node adds no noise,' if self.metrics else 'must not'} be sent")
        return f"Limits that the node's owner has set and the node keeps, whatever it is asked: {'; '.join(said)}."


class OwnerFile(Section):
    """The file of a node's owner (YAML); the paths are relative to it."""

    config: str  # the owner's own copy of the run's configuration
    people: str  # the public list of people
    records: str  # the user's records
    state: str  # a directory that is made when it is needed: secret, ledger, claim, personal state
    limits: Limits = Limits()


class Row(Section):
    """A record."""

    id: str
    conversation: str
    input: str
    target: str


class Text(Section):
    """A text by a person outside the federation."""

    id: str
    conversation: str
    text: str


class People(Section):
    """What everybody knows, the server included: who is registered, and texts from outside."""

    source: str
    users: tuple[str, ...] = Field(min_length=1)  # pseudonyms will do; a user's place on the list is its position
    keys: tuple[str, ...] = ()  # their nodes' public keys (OpenSSH), in the same order; without, nodes are believed
    pool: tuple[Text, ...] = ()
    pool_authors: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()

    def federation(self, own: UserFile | None = None) -> Federation:
        """Return the federation as a node knows it, with its own user's records; or as a server does, with nobody's.

        Raises:
            DataError: the user is not on the list, or the records cannot be used.
        """
        held: dict[int, Parts] = {}
        if own is not None:
            held[position_of(self, own)] = (_records(own.train), _records(own.test))
        size = len(self.users)
        return Federation(
            source=self.source,
            users=self.users,
            train=OnDemand(size, lambda user: held[user][0]),
            test=OnDemand(size, lambda user: held[user][1]),
            pool=tuple(PublicText(one.id, one.conversation, one.text) for one in self.pool),
            pool_authors=frozenset(self.pool_authors),
            partners=OnDemand(size, lambda _: frozenset()),
            facts=self.facts,
            present=tuple(held),
        ).check()


class UserFile(Section):
    """One user's records; never sent."""

    user: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]


@dataclass(frozen=True)
class Place:
    """A node's own: configuration, records of its one user, where its state lies, and its owner's limits."""

    config: Config
    federation: Federation
    position: int
    state: Path
    limits: Limits


def read(kind: type[S], path: Path) -> S:
    """Read one of these files; raises ConfigError or DataError, which quote nothing of it."""
    try:
        if kind is OwnerFile:
            return kind.model_validate(read_tree(path))
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        places = sorted({".".join(str(part) for part in item["loc"]) or "the whole" for item in error.errors()[:3]})
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that no file can have
        raise DataError(f"{path}: cannot be read; name a file made by `write_nodes`, or like one.") from error
    wrong = ConfigError if kind is OwnerFile else DataError
    raise wrong(f"{path}: not a {kind.__name__}, in {', '.join(places)}; mend it there.")


def position_of(people: People, own: UserFile) -> int:
    """Return the user's place on the public list; raises DataError for somebody who is not on it."""
    if own.user not in people.users:
        raise DataError("the user of this node's records is not on the public list of people; take the right list.")
    return people.users.index(own.user)


def owned(path: Path) -> tuple[OwnerFile, Path, int]:
    """Read an owner's file; returns it, the folder that its paths start from, and the user's position."""
    owner, folder = read(OwnerFile, path), path.parent
    return owner, folder, position_of(read(People, folder / owner.people), read(UserFile, folder / owner.records))


def place_of(path: Path) -> Place:
    """Return what the node with this owner's file has of its own."""
    owner, folder, position = owned(path)
    federation = read(People, folder / owner.people).federation(read(UserFile, folder / owner.records))
    return Place(load_config(folder / owner.config), federation, position, folder / owner.state, owner.limits)


def write_nodes(
    federation: Federation, config: Path, folder: Path, limits: Limits, users: Sequence[int], keys: Sequence[str] = ()
) -> list[Path]:
    """Write the public list, and for each of these users a folder of a node's own; returns the owners' files.

    It stands in for what in real life each user's machine has by itself. The nodes keep their state in `state`.
    """
    people = People(
        source=federation.source,
        users=tuple(federation.users[user] for user in users),
        keys=tuple(keys),
        pool=tuple(Text(id=one.id, conversation=one.conversation, text=one.text) for one in federation.pool),
        pool_authors=tuple(sorted(federation.pool_authors)),
        facts=federation.facts,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "people.json").write_text(people.model_dump_json(), encoding="utf-8")
    files = []
    for place, user in enumerate(users):
        own = folder / f"node{place:04d}"
        own.mkdir(mode=0o700)
        held = UserFile(
            user=federation.users[user], train=_rows(federation.train[user]), test=_rows(federation.test[user])
        )
        (own / "records.json").write_text(held.model_dump_json(), encoding="utf-8")
        (own / "records.json").chmod(0o600)
        (own / "config.yaml").write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
        owner = OwnerFile(
            config="config.yaml", people="../people.json", records="records.json", state="state", limits=limits
        )
        files.append(own / "node.yaml")
        files[-1].write_text(yaml.safe_dump(json.loads(owner.model_dump_json()), sort_keys=False), encoding="utf-8")
    return files


def _records(rows: Sequence[Row]) -> tuple[Record, ...]:
    return tuple(Record(one.id, one.conversation, one.input, one.target) for one in rows)


def _rows(records: Sequence[Record]) -> tuple[Row, ...]:
    return tuple(Row(id=r.id, conversation=r.conversation, input=r.input, target=r.target) for r in records)
