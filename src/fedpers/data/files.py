"""The user's own records: JSONL, CSV, Parquet or Arrow files with a column for the user, an input and a target."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedpers.config import ColumnsConfig, DataConfig
from fedpers.data.base import Federation, PublicText, Record, Source, choose_users, role
from fedpers.errors import DataError
from fedpers.formats.partition import dealer, described
from fedpers.formats.split import late, partners
from fedpers.formats.tables import HUB, Bad, Skips, as_text, as_time, find_files, hub_rows, rows
from fedpers.privacy.randomness import derive, seed_key
from fedpers.sources import FROM_RAW_DATA, assemble

POOL_CAP = 40  # texts per person in the public pool, so that no one author fills it
_IDS = seed_key(0)
DUPLICATE = "duplicate_id"


@dataclass(frozen=True, slots=True)
class _Row:
    user: str
    kind: str  # of the time
    time: float
    said: str  # its id, without the number that tells it from identical rows
    record: Record


class Files(Source):
    """Each row of the files that `data.path` names is a record of the user in it.

    So are those of a data set on the Hugging Face hub, `hub:owner/name` or `hub:owner/name:split`, by its library.
    Unusable rows are refused with file and line, or counted where `data.skip_bad` is set. A user's training record that
    repeats one of the same user's test records word for word is left out and counted: it would hold the answer. The
    labels of a task, its scale and the names of the columns are the configuration's, so they are public.

    Coins and candidates are drawn by record id, so an id must not hang on other records: without a column for it, it is
    a hash of what the row says and, among a user's identical rows, their number. Given ids are distinct within a user.
    Where no column holds users, `data.partition` makes them up: then identical rows are numbered, and given ids are
    distinct, in the whole of the files.
    """

    about = "your own JSONL, CSV, Parquet or Arrow files"
    licence = "whatever yours is"
    citation = "none"
    split = "records, or whole conversations by their mean position in their users' histories; the last are for testing"
    tasks = ("reply-ranking", "rating", "classification", "language-model")

    def load(self, config: DataConfig, key: bytes) -> Federation:
        """Read the files and build the federation of the configured people. Raises DataError."""
        skips = Skips(config.skip_bad)
        held = _read(config, skips)
        history = {user: list(dict.fromkeys(row.record.conversation for row in own)) for user, own in held.items()}
        tested = late(history, 1 - config.test_share)
        train, test, repeated = _split(held, tested)
        people = {user: (train[user], test[user]) for user in held if _part(user, config) == config.people}
        found = assemble("files", people, config, lambda users, limit: choose_users(users, limit, key), {})
        pool, authors = _pool(held) if config.pool else ((), frozenset())
        groups: dict[str, set[str]] = defaultdict(set)
        for user, conversations in history.items():
            for conversation in conversations:
                groups[conversation].add(user)
        left_out = sum(repeated[user] for user in found.users)
        return replace(
            found,
            pool=pool,
            pool_authors=authors,
            partners=partners(found.users, {name: frozenset(group) for name, group in groups.items()}),
            counts={**found.counts, "skipped_repeats_of_test_records": left_out, **skips.counts},
            facts=(
                *_facts(config, found.users, found.train, groups, authors),
                *_left_out(config, left_out, sum(skips.counts.values())),
            ),
        )


def _part(user: str, config: DataConfig) -> str:
    part = role(user)
    return "federation" if part == "pool" and not config.pool else part


def _read(config: DataConfig, skips: Skips) -> dict[str, list[_Row]]:
    """Return every user's rows in order of time; rows of one time, or without one, are in the order of the files.

    Rows without a time that a partition deals are in the order of their coins.

    Raises DataError: nothing to read, a row that cannot be used and may not be left out, or times of both kinds.
    """
    if config.path is None:
        raise DataError(
            "data.path is not set; name your file, a folder of files or a pattern such as folder/*.parquet."
        )
    columns = {key: name for key, name in config.columns.model_dump().items() if name is not None}
    deal = None if config.partition is None else dealer(config.partition)
    held: dict[str, list[_Row]] = defaultdict(list)
    seen: Counter[str] = Counter()
    kinds: set[str] = set()
    hub = config.path.startswith(HUB)
    for place, cells in hub_rows(config.path, columns) if hub else rows(find_files(config.path), columns, skips):
        try:
            row = _row(place, cells, config.columns, seen, deal)
        except Bad as bad:
            if deal is not None and bad.kind == DUPLICATE:  # dropping it would let one user's row decide on another's
                raise DataError(f"{place}: {bad.said}; mend it (data.skip_bad leaves no such row out).") from None
            skips.add(bad, place)
            continue
        kinds.add(row.kind)
        if len(kinds) > 1:  # leaving one kind out would let one person's row decide which rows of others count
            raise DataError(
                f"{place}: the time is a number where those before are dates, or the other way round; write all times "
                "of the column as numbers, or all as dates (data.skip_bad leaves no such row out)."
            )
        seen[row.said] += 1
        held[row.user].append(row)
    found = {user: sorted(own, key=lambda row: row.time) for user, own in held.items() if own}
    if not found:
        raise DataError(f"data.path: no usable record in the files ({sum(skips.counts.values())} were left out).")
    return found


def _row(
    place: str,
    cells: Mapping[str, Any],
    names: ColumnsConfig,
    seen: Counter[str],
    deal: Callable[[str, str], tuple[str, float]] | None,
) -> _Row:
    """Read the cells of one row; `seen`: how many rows before had one id or said one thing. Raises Bad."""
    user = "" if names.user is None else as_text(cells[names.user], "user")
    text = "" if names.input is None else as_text(cells[names.input], "input")
    target = as_text(cells[names.target], "target")
    kind, time = ("none", 0.0) if names.time is None else as_time(cells[names.time])
    together = None if names.conversation is None else as_text(cells[names.conversation], "conversation")
    said = _said(user, time, together, text, target) if names.id is None else as_text(cells[names.id], "id")
    if names.user is not None:
        said = f"{_escaped(user)}/{said}"
    if names.id is not None and seen[said]:
        whose = "" if names.user is None else " of the same user"
        raise Bad(DUPLICATE, f"the id of this record is that of an earlier one{whose}")
    identifier = f"{said}-{seen[said] + 1}" if names.id is None else said
    if deal is not None:
        user, coin = deal(identifier, target)
        time = coin if names.time is None else time
    return _Row(user, kind, time, said, Record(identifier, together or identifier, text, target, place))


def _said(user: str, time: float, conversation: str | None, text: str, target: str) -> str:
    """Return a hash of what a row says, the same wherever it stands and whatever else is in the files."""
    return derive(_IDS, "record", user, repr(time), conversation or "", text, target).hex()[:32]


def _escaped(user: str) -> str:
    return user.replace("~", "~0").replace("/", "~1")  # else user a with id b/c and user a/b with id c would meet


def _split(
    held: dict[str, list[_Row]], tested: set[str]
) -> tuple[dict[str, list[Record]], dict[str, list[Record]], Counter[str]]:
    """Return training and test records, and how many of a user's records repeat one of the user's test records."""
    train, test = {}, {}
    repeated: Counter[str] = Counter()
    for user, own in held.items():
        test[user] = [row.record for row in own if row.record.conversation in tested]
        answers = {_words(record) for record in test[user]}
        early = [row.record for row in own if row.record.conversation not in tested]
        train[user] = [record for record in early if _words(record) not in answers]
        repeated[user] = len(early) - len(train[user])
    return train, test, repeated


def _words(record: Record) -> tuple[str, str]:
    return " ".join(record.input.casefold().split()), " ".join(record.target.casefold().split())


def _pool(held: dict[str, list[_Row]]) -> tuple[tuple[PublicText, ...], frozenset[str]]:
    """Return targets of the people whose id puts them outside the federation."""
    authors = [user for user in sorted(held) if role(user) == "pool"]
    taken = [row.record for user in authors for row in held[user][:POOL_CAP]]
    return tuple(PublicText(one.id, one.conversation, one.target) for one in taken), frozenset(authors)


def _facts(
    config: DataConfig,
    users: Sequence[str],
    train: Sequence[tuple[Record, ...]],
    groups: dict[str, set[str]],
    authors: frozenset[str],
) -> tuple[str, ...]:
    """Say in numbers where a member's words may stand outside what the member's own client holds."""
    members = set(users)
    owners: dict[tuple[str, str], set[str]] = defaultdict(set)
    for user, own in zip(users, train, strict=True):
        for record in own:
            owners[_words(record)].add(user)
    total = sum(len(own) for own in train)
    twice = sum(len(owners[_words(record)]) > 1 for own in train for record in own)
    order = "the order in the files" if config.partition is None else "a coin for each record"
    order = "time" if config.columns.time else f"{order}, since no column holds the time"
    facts = [
        "who is a member is decided by user id alone, and a person with two ids counts as two members",
        *([] if config.partition is None else [described(config.partition)]),
        f"{twice} of {total} training records stand word for word with another member too, and what another client "
        "holds is protected as that client's",
        f"training and test are told apart by {order}",
    ]
    if config.columns.conversation is None:
        facts.append(
            "no column says which records belong together, so a record that quotes another member is not known as such"
        )
    else:
        shared = sum(
            bool(members & groups[record.conversation] - {user})
            for user, own in zip(users, train, strict=True)
            for record in own
        )
        facts.append(
            f"{shared} of {total} training records belong to a conversation in which another member takes part, whose "
            "words they may quote"
        )
    if authors:
        with_member = sum(bool(group & authors) and bool(group & members) for group in groups.values())
        facts.append(
            f"the public pool holds the targets of {len(authors)} people outside, of whose conversations {with_member} "
            "had a member in them"
        )
    return (*facts, FROM_RAW_DATA)


def _left_out(config: DataConfig, repeats: int, skipped: int) -> tuple[str, ...]:
    """Say in numbers which records were left out because of other records or of what they hold."""
    facts = [
        f"{repeats} training records were left out because they repeat one of the same user's test records, so whether "
        "a record is trained on hangs on its user's test records too"
    ]
    if config.skip_bad:
        facts.append(
            f"{skipped} rows of the files could not be used and were left out, by what they hold and, of rows of one "
            "user with the same id, all but the first (leaving that one out makes room for the next)"
        )
    return tuple(facts)
