"""Tables of single users, to be sorted and searched in the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fedpers.evaluation.per_user import KINDS
from fedpers.evaluation.statistics import MINIMUM_RECORDS, without_dust

FEW = "few records"  # nobody is called helped or harmed on less than MINIMUM_RECORDS
Rows = Mapping[str, Mapping[int, Mapping[str, Any]]]  # kind -> user -> row of users.parquet


@dataclass(frozen=True)
class Column:
    """A column: its head, and how many digits its numbers have; None for texts, which are searched."""

    head: str
    digits: int | None = 0


@dataclass(frozen=True)
class UserTable:
    """A row per user; None where a user has no value."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]


def by_kind(table: pa.Table) -> Rows:
    """Return a run's rows of users.parquet by kind and user; a run has one seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in KINDS}
    for row in table.to_pylist():
        found[row["kind"]][row["user"]] = row
    return {kind: rows for kind, rows in found.items() if rows}


def user_table(table: pa.Table, metric: str, *, higher_is_better: bool) -> UserTable:
    """Every user's metric under each model, and the gain of the own one over the shared one."""
    rows = by_kind(table)
    versus = "global" in rows
    columns = [Column("user"), Column("test records"), Column("training records")]
    columns += [Column(f"{kind.replace('_', '-')} {metric}", 3) for kind in rows]
    columns += [Column("gain over global", 3), Column("outcome", None)] if versus else []
    found = []
    for user, own in sorted(rows["own"].items()):
        values = [rows[kind].get(user, {}).get(metric) for kind in rows]
        cells = [user, own["test_records"], own["train_records"], *values]
        if versus:
            shared = rows["global"].get(user)
            change = None if shared is None else gain(own[metric], shared[metric], higher_is_better)
            cells += [change, outcome(change, own["test_records"])]
        found.append(cells)
    return UserTable(columns, found)


def gain(own: float, other: float, higher_is_better: bool) -> float:
    """How much better `own` is; what differs by rounding alone is no difference."""
    difference = own - other if higher_is_better else other - own
    return float(without_dust(np.array(difference)))


def outcome(change: float | None, records: int) -> str | None:
    """Say in a word what the own model is to a user, as the headline counts it."""
    if change is None:
        return None
    if records < MINIMUM_RECORDS:
        return FEW
    return "helped" if change > 0 else "harmed" if change < 0 else "tied"
