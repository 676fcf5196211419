"""The user's own records: JSONL, CSV, Parquet or Arrow files with a column for the user, an input and a target."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fedpers.config import DataConfig
from fedpers.data.base import Federation, PublicText, Record, Source, choose_users, role
from fedpers.errors import DataError
from fedpers.formats.split import late, partners
from fedpers.formats.tables import HUB, Bad, Skips, as_text, as_time, find_files, hub_rows, rows
from fedpers.privacy.randomness import derive, seed_key

POOL_CAP = 40  # texts per person in the public pool, so that no one author fills it
_IDS = seed_key(0)


@dataclass(frozen=True, slots=True)
class _Row:
    user: str
    time: float
    record: Record


class Files(Source):
    """Each row of the files that `data.path` names is a record of the user in it.

    So are those of a data set on the Hugging Face hub, `hub:owner/name` or `hub:owner/name:split`, by its library.
    Unusable rows are refused with file and line, or counted where `data.skip_bad` is set. A user's training record that
    repeats one of the same user's test records word for word is left out and counted: it would hold the answer. The
    labels of a task, its scale and the names of the columns are the configuration's, so they are public.

    Coins and candidates are drawn by record id, so an id must not hang on other records: without a column for it, it is
    a hash of what the row says and, among a user's identical rows, their number. Given ids are distinct within a user.
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
        people = [user for user in sorted(held) if _part(user, config) == config.people]
        enough = [
            user for user in people if len(train[user]) >= config.min_train and len(test[user]) >= config.min_test
        ]
        users = choose_users(enough, config.users, key)
        pool, authors = _pool(held) if config.pool else ((), frozenset())
        groups: dict[str, set[str]] = defaultdict(set)
        for user, conversations in history.items():
            for conversation in conversations:
                groups[conversation].add(user)
        chosen = tuple(tuple(train[user][-config.max_train :]) for user in users)
        left_out = sum(repeated[user] for user in users)
        return Federation(
            source="files",
            users=tuple(users),
            train=chosen,  # the latest training and the earliest test records: closest in time to each other
            test=tuple(tuple(test[user][: config.max_test]) for user in users),
            pool=pool,
            pool_authors=authors,
            partners=partners(users, {name: frozenset(group) for name, group in groups.items()}),
            counts={
                "people": len(people),
                "skipped_too_few_records": len(people) - len(enough),
                "not_chosen": len(enough) - len(users),
                "train_records_capped": sum(max(0, len(train[user]) - config.max_train) for user in users),
                "test_records_capped": sum(max(0, len(test[user]) - config.max_test) for user in users),
                "skipped_repeats_of_test_records": left_out,
                **skips.counts,
            },
            facts=(
                *_facts(config, users, chosen, groups, authors),
                *_left_out(config, left_out, sum(skips.counts.values())),
            ),
        )


def _part(user: str, config: DataConfig) -> str:
    part = role(user)
    return "federation" if part == "pool" and not config.pool else part


def _read(config: DataConfig, skips: Skips) -> dict[str, list[_Row]]:
    """Return every user's rows in order of time; rows of one time, or without one, are in the order of the files.

    Raises DataError: nothing to read, a row that cannot be used and may not be left out, or times of both kinds.
    """
    if config.path is None:
        raise DataError(
            "data.path is not set; name your file, a folder of files or a pattern such as folder/*.parquet."
        )
    names = config.columns
    columns = [n for n in (names.user, names.input, names.target, names.time, names.id, names.conversation) if n]
    held: dict[str, list[_Row]] = defaultdict(list)
    seen: Counter[str] = Counter()
    kinds: set[str] = set()
    hub = config.path.startswith(HUB)
    for place, row in hub_rows(config.path, columns) if hub else rows(find_files(config.path), columns, skips):
        try:
            user = as_text(row[names.user], "user")
            text = "" if names.input is None else as_text(row[names.input], "input")
            target = as_text(row[names.target], "target")
            kind, time = ("none", 0.0) if names.time is None else as_time(row[names.time])
            together = None if names.conversation is None else as_text(row[names.conversation], "conversation")
            own = _said(user, time, together, text, target) if names.id is None else as_text(row[names.id], "id")
            identifier = f"{_escaped(user)}/{own}"
            if names.id is not None and seen[identifier]:
                raise Bad("duplicate_id", "the id of this record is that of an earlier one of the same user")
        except Bad as bad:
            skips.add(bad, place)
            continue
        kinds.add(kind)
        if len(kinds) > 1:  # leaving one kind out would let one person's row decide which rows of others count
            raise DataError(
                f"{place}: the time is a number where those before are dates, or the other way round; write all times "
                "of the column as numbers, or all as dates (data.skip_bad leaves no such row out)."
            )
        seen[identifier] += 1
        if names.id is None:
            identifier = f"{identifier}-{seen[identifier]}"
        held[user].append(_Row(user, time, Record(identifier, together or identifier, text, target)))
    found = {user: sorted(own, key=lambda row: row.time) for user, own in held.items() if own}
    if not found:
        raise DataError(f"data.path: no usable record in the files ({sum(skips.counts.values())} were left out).")
    return found


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
    order = "time" if config.columns.time else "the order in the files, since no column holds the time"
    facts = [
        "who is a member is decided by user id alone, and a person with two ids counts as two members",
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
    facts.append(
        "who takes part, the split into training and test, the caps on records (leaving one out of a capped client's "
        "makes room for another) and the counts in this list come from the raw data"
    )
    return tuple(facts)


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
