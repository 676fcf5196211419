"""What several data sources share: lines of a file, and who takes part with which records.

It is no module of `fedpers.data`, where each module is a source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedpers.config import DataConfig
from fedpers.data.base import Federation, Record, role
from fedpers.errors import DataError

Parts = tuple[list[Record], list[Record]]  # one person's records for training and for testing, each in order of time

FROM_RAW_DATA = (
    "who takes part, the split into training and test, the caps on records (leaving one out of a capped client's makes "
    "room for another) and the counts in this list come from the raw data"
)


def text_lines(content: bytes, file: str, asset: str) -> list[str]:
    """Return the lines of a UTF-8 file of an asset.

    Raises:
        DataError: a byte that is no UTF-8, with file and line.
    """
    try:
        return content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise broken(file, line, "not UTF-8", asset) from None


def read_lines(path: Path, asset: str) -> list[str]:
    """Return the lines of a UTF-8 file in the cache; raises DataError as `text_lines`, or if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path.name}: cannot be read ({error.strerror}); run `fedpers assets fetch {asset} --force`."
        ) from error
    return text_lines(content, path.name, asset)


def broken(file: str, line: int, fault: str, asset: str) -> DataError:
    """Return the error for a line of a fetched file; it quotes nothing, for a line may be somebody's text."""
    return DataError(f"{file}, line {line}: {fault}; run `fedpers assets fetch {asset} --force`.")


def is_among(people: str, group: str) -> bool:
    """Whether the people of a group (one person, a batch, a play) are among the configured `people`.

    For sources without a public pool: nobody is set aside for one, and 12% are development users.
    """
    return role(group, pool_share=0.0) == people


def assemble(
    source: str,
    held: Mapping[str, Parts],
    config: DataConfig,
    choose: Callable[[Sequence[str], int | None], list[str]],
    counts: Mapping[str, int],
) -> Federation:
    """Return the federation of those who have enough records, capped, without pool, partners and facts.

    The latest training records and the earliest test records are kept: closest in time to each other.

    Args:
        source: its name.
        held: the records of the configured people.
        config: limits.
        choose: from those with enough records and `config.users` to the users.
        counts: what was skipped before.
    """
    enough = [u for u in sorted(held) if len(held[u][0]) >= config.min_train and len(held[u][1]) >= config.min_test]
    users = choose(enough, config.users)
    return Federation(
        source=source,
        users=tuple(users),
        train=tuple(tuple(held[user][0][-config.max_train :]) for user in users),
        test=tuple(tuple(held[user][1][: config.max_test]) for user in users),
        pool=(),
        pool_authors=frozenset(),
        partners=tuple(frozenset() for _ in users),
        counts={
            "people": len(held),
            "skipped_too_few_records": len(held) - len(enough),
            "not_chosen": len(enough) - len(users),
            "train_records_capped": sum(max(0, len(held[user][0]) - config.max_train) for user in users),
            "test_records_capped": sum(max(0, len(held[user][1]) - config.max_test) for user in users),
            **counts,
        },
    )
