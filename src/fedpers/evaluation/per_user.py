"""The users table of a run and what it says: means with intervals, paired comparisons, a plain reading."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedpers.errors import DataError, RunDirectoryError
from fedpers.evaluation.statistics import (
    MINIMUM_RECORDS,
    Comparison,
    Floats,
    Integers,
    compare,
    mean_interval,
    worst_decile,
)

KINDS = ("own", "global", "local", "zero_shot", "swap")
METRICS = ("accuracy", "mrr", "loss")
LEVEL = 0.05

NAMES = {  # each kind in a sentence
    "own": "the personal model",
    "global": "the shared model",
    "local": "training at home alone",
    "zero_shot": "no training at all",
    "swap": "another user's personal state",
}
_IF_NOT_BEATEN = {
    "swap": "the gain is not personal, as far as these users can show",
    "local": "federation did not help beyond training at home, as far as these users can show",
}


@dataclass(frozen=True)
class Pair:
    """Own and another model on the users that have both; arrays are `(seeds, users)`, `users` is `(users,)`.

    `only_own` and `only_other` are None where they do not explain the metric (it is not a mean of right and wrong).
    """

    users: Integers
    own: Floats
    other: Floats
    test_records: Integers
    only_own: Integers | None
    only_other: Integers | None


def users_table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str] = METRICS) -> pa.Table:
    """Build users.parquet's table: one row per (seed, user, kind), in that order whatever the order of `rows`.

    Columns: seed, user, kind, test_records, train_records, the `metrics` (mean over the user's test records), only_own
    and only_other (records right under own but wrong under this kind, and the reverse). Raises DataError if a row lacks
    a column, has an unknown one or kind, or appears twice.
    """
    integers = ("seed", "user", "test_records", "train_records", "only_own", "only_other")
    columns = ("seed", "user", "kind", "test_records", "train_records", *metrics, "only_own", "only_other")
    for row in rows:
        wrong = [name for name in columns if row.get(name) is None] + sorted(set(row) - set(columns))
        if wrong:
            raise DataError(f"A row of the users table lacks, or has in excess: {', '.join(wrong)}.")
        if row["kind"] not in KINDS:
            raise DataError(f"Unknown model kind {row['kind']!r} in the users table: use one of {', '.join(KINDS)}.")
    ordered = sorted(rows, key=_place)
    for before, after in pairwise(ordered):
        if _place(before) == _place(after):
            raise DataError(f"User {after['user']} has two rows of kind {after['kind']!r} under seed {after['seed']}.")
    types = {"kind": pa.string()} | dict.fromkeys(integers, pa.int64())
    schema = pa.schema([pa.field(name, types.get(name, pa.float64()), nullable=False) for name in columns])
    return pa.Table.from_pylist([dict(row) for row in ordered], schema=schema)


def write_table(table: pa.Table, path: Path) -> Path:
    """Write a parquet file that has the same bytes for the same table, and is never seen half written.

    zstd, no schema metadata (pandas, timestamps). Raises RunDirectoryError if the place cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata(None), part, compression="zstd")
        os.replace(part, path)
    except OSError as error:
        raise RunDirectoryError(f"Cannot write {path}: {error.strerror or error}.") from error
    return path


def pair(table: pa.Table, other: str, metric: str = "accuracy", *, higher_is_better: bool = True) -> Pair | None:
    """Align own with the model kind `other`; None if either kind is absent or no user has both.

    The table is that of a run, or the rows of runs of a sweep that differ in their seed alone. Raises DataError if the
    metric is missing, a user lacks a seed, or record counts contradict the accuracy.
    """
    own_rows, other_rows = _rows(table, "own", metric), _rows(table, other, metric)
    if own_rows is None or other_rows is None:
        return None
    if not np.array_equal(own_rows["seed"][:, 0], other_rows["seed"][:, 0]):
        raise DataError(f"Kinds 'own' and {other!r} were evaluated under different seeds: evaluate both under each.")
    users, mine, theirs = np.intersect1d(own_rows["user"][0], other_rows["user"][0], return_indices=True)
    if users.size == 0:
        return None
    own, second = own_rows[metric][:, mine], other_rows[metric][:, theirs]
    records = other_rows["test_records"][:, theirs]
    if not np.array_equal(own_rows["test_records"][:, mine], records):
        raise DataError(f"Kinds 'own' and {other!r} were evaluated on different test records of the same users.")
    only_own, only_other = other_rows["only_own"][:, theirs], other_rows["only_other"][:, theirs]
    explained = np.allclose((own - second) * records, only_own - only_other, rtol=0, atol=1e-3)
    known = np.isfinite(only_own).all()  # null in the tables of a sweep, whose baseline is a run of its own
    if metric == "accuracy" and known and not explained:
        raise DataError(f"only_own and only_other do not add up to the gain in accuracy of own over {other!r}.")
    counted = explained and higher_is_better
    return Pair(users, own, second, records, only_own if counted else None, only_other if counted else None)


def summarize(
    table: pa.Table, metric: str = "accuracy", seed: int = 0, *, higher_is_better: bool = True
) -> dict[str, Any]:
    """Summarize a users table into plain numbers and sentences, ready for JSON.

    `metrics` holds per kind mean, ci95, worst_decile (users with at least 10 test records; None if none) and n_users;
    `comparisons` holds own against each other kind (`statistics.Comparison`); helped, tied, harmed and p_value repeat
    the one against global (None without it); `reading` says in words what may be concluded and what may not. Bootstrap
    and permutations of each part draw from a fresh `np.random.default_rng(seed)`. Raises DataError as `pair` and
    `statistics.compare` do.
    """
    metrics: dict[str, dict[str, Any]] = {}
    comparisons: dict[str, Comparison] = {}
    for kind in KINDS:
        rows = _rows(table, kind, metric)
        if rows is None:
            continue
        values, eligible = rows[metric], (rows["test_records"] >= MINIMUM_RECORDS).all(axis=0)
        mean, low, high = mean_interval(values, np.random.default_rng(seed))
        worst = worst_decile(values[:, eligible], higher_is_better=higher_is_better) if eligible.any() else None
        metrics[kind] = {"mean": mean, "ci95": [low, high], "worst_decile": worst, "n_users": values.shape[1]}
    for kind in KINDS[1:]:
        both = pair(table, kind, metric, higher_is_better=higher_is_better)
        if both is not None:
            comparisons[kind] = compare(
                both.own,
                both.other,
                both.test_records,
                both.only_own,
                both.only_other,
                np.random.default_rng(seed),  # afresh: the figure of this comparison shows the same numbers
                higher_is_better=higher_is_better,
            )
    against = comparisons.get("global")
    seeds = len(table["seed"].unique())
    return {
        "metric": metric,
        "higher_is_better": higher_is_better,
        "n_seeds": seeds,
        "metrics": metrics,
        "comparisons": {kind: asdict(found) | {"ci95": list(found.ci95)} for kind, found in comparisons.items()},
        "helped": against.helped if against else None,
        "tied": against.tied if against else None,
        "harmed": against.harmed if against else None,
        "p_value": against.p_value if against else None,
        "reading": _reading(metrics, comparisons, metric, seeds, higher_is_better),
    }


def _reading(
    metrics: Mapping[str, Mapping[str, Any]],
    comparisons: Mapping[str, Comparison],
    metric: str,
    seeds: int,
    higher_is_better: bool,
) -> str:
    if not comparisons:
        return "There is no personal model together with another one on the same users, so nothing can be compared."
    sentences = [
        _verdict(kind, comparisons[kind], metric)
        for kind in ("zero_shot", "global", "local", "swap")
        if kind in comparisons
    ]
    if "global" in metrics and "zero_shot" in metrics:
        shared, untrained = metrics["global"]["mean"], metrics["zero_shot"]["mean"]
        if (shared < untrained) if higher_is_better else (shared > untrained):
            sentences.append(
                "The shared model is on average worse than no training at all (noise or over-fitting), so beating it "
                f"proves nothing (mean {metric} {shared:.3f} against {untrained:.3f})."
            )
    if "global" in comparisons:
        sentences.append(_counts_sentence(comparisons["global"]))
    sentences.append(_sensitivity(comparisons))
    if seeds == 1:
        sentences.append("One seed: the intervals cover the choice of users, not another run of the training.")
    return " ".join(sentences)


def _verdict(kind: str, found: Comparison, metric: str) -> str:
    low, high = found.ci95
    numbers = f"({metric} {found.mean_gain:+.3f}, 95% interval {low:+.3f} to {high:+.3f}, {_p(found.p_value)})"
    significant = found.p_value < LEVEL
    if significant and found.mean_gain > 0:
        caveat = ", though the interval of the mean includes 0" if low <= 0 else ""
        return f"The personal model beats {NAMES[kind]} {numbers}{caveat}."
    worse = significant and found.mean_gain < 0
    caveat = ", though the interval of the mean includes 0" if worse and high >= 0 else ""
    consequence = f": {_IF_NOT_BEATEN[kind]}" if kind in _IF_NOT_BEATEN else ""
    verb = "is worse than" if worse else "does not beat"
    return f"The personal model {verb} {NAMES[kind]} {numbers}{caveat}{consequence}."


def _counts_sentence(found: Comparison) -> str:
    if not found.n_eligible:
        return f"Nobody has {found.minimum_records} test records, so nobody is counted as helped or harmed."
    sentence = (
        f"Against the shared model {found.helped:g} of the {found.n_eligible} users with at least "
        f"{found.minimum_records} test records are helped, {found.tied:g} tied and {found.harmed:g} harmed"
    )
    if found.null_helped is None or found.null_harmed is None:
        return f"{sentence}; no chance range is known for this metric."
    helped, harmed = found.null_helped, found.null_harmed
    return (
        f"{sentence}; coin flips alone would help {helped.low:g} to {helped.high:g} and harm {harmed.low:g} to "
        f"{harmed.high:g}."
    )


def _sensitivity(comparisons: Mapping[str, Comparison]) -> str:
    known = [
        f"{found.minimum_detectable_effect:.3f} over {NAMES[kind]} ({found.n_users} users)"
        for kind, found in comparisons.items()
        if found.minimum_detectable_effect is not None
    ]
    if not known:
        return "With fewer than two users, or no spread between them, the smallest detectable gain is unknown."
    return f"Smallest mean gain that would be seen with 80% power: {', '.join(known)}."


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _place(row: Mapping[str, Any]) -> tuple[int, int, int]:
    return row["seed"], row["user"], KINDS.index(row["kind"])


def _rows(table: pa.Table, kind: str, metric: str) -> dict[str, Any] | None:
    """Columns of one model kind as `(seeds, users)` arrays, or None if the kind is absent."""
    names = ("seed", "user", "test_records", "only_own", "only_other", metric)
    missing = [name for name in (*names, "kind") if name not in table.column_names]
    if missing:
        raise DataError(f"The users table has no column {', '.join(missing)}; it has {', '.join(table.column_names)}.")
    chosen = table["kind"].to_numpy() == kind
    if not chosen.any():
        return None
    columns = {name: table[name].to_numpy()[chosen] for name in names}
    order = np.lexsort((columns["user"], columns["seed"]))
    shape = (len(np.unique(columns["seed"])), len(np.unique(columns["user"])))
    if order.size != shape[0] * shape[1]:
        raise DataError(f"Kind {kind!r}: every user needs exactly one row per seed; evaluate the same users each time.")
    grids = {name: column[order].reshape(shape) for name, column in columns.items()}
    if (grids["user"] != grids["user"][0]).any():
        raise DataError(f"Kind {kind!r}: the users differ between seeds; evaluate the same users under each seed.")
    return grids
