"""The worst off, and groups of users: numbers of a part of the users, with intervals over users and seeds.

Arrays are (seeds, people), NaN where a person was not measured under a seed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedpers.evaluation.statistics import Floats, Integers, Interval, worst_decile

DRAWS = 400  # fewer for very many people, whose intervals are narrow
FEW, MANY = -1, 1
Statistic = Callable[[Floats, Integers], float]


def resampled(statistic: Statistic, values: Floats, marks: Integers, rng: np.random.Generator) -> Interval:
    """Return a statistic of values and marks with a 95% percentile bootstrap interval.

    People and seeds are crossed factors and resampled independently (Owen, Annals of Applied Statistics 1(2), 2007),
    with few seeds to too narrow an interval. Draws in which the statistic is NaN are left out.
    """
    seeds, people = values.shape
    found = []
    for _ in range(min(DRAWS, max(100, 20_000_000 // values.size))):
        chosen = np.ix_(rng.integers(seeds, size=seeds), rng.integers(people, size=people))
        found.append(statistic(values[chosen], marks[chosen]))
    low, high = np.quantile([one for one in found if np.isfinite(one)], [0.025, 0.975])
    return Interval(statistic(values, marks), float(low), float(high))


def decile(values: Floats, *, higher_is_better: bool = True) -> float:
    """`statistics.worst_decile` under each seed, averaged; NaN if nobody was measured."""
    rows = [row[np.isfinite(row)] for row in values]
    found = [worst_decile(row, higher_is_better=higher_is_better) for row in rows if row.size]
    return float(np.mean(found)) if found else float("nan")


def decile_of_equals(accuracy: float, test_records: Floats, rng: np.random.Generator) -> float:
    """Worst decile of users who are all alike, so that chance alone sets them apart.

    Each user's accuracy is Binomial(test_records, accuracy) / test_records; the mean over draws. A worst decile near it
    says nothing about who is badly served: the worst tenth of noisy measurements is low even among equals.
    """
    found = []
    for row in test_records:
        records = row[np.isfinite(row)].astype(np.int64)
        wins = rng.binomial(records, np.clip(accuracy, 0, 1), size=(max(4, 100 // len(test_records)), records.size))
        found.append(worst_decile(wins / records))
    return float(np.mean(found))


def thirds(train_records: Floats) -> Integers:
    """Mark the third of the users with fewest training records `FEW`, that with most `MANY`, the rest 0.

    Users with equally many are never set apart, so the groups may be larger or smaller than a third; all are 0 where
    everybody has the same number.
    """
    low, high = np.nanquantile(train_records, [1 / 3, 2 / 3])
    if low < high:
        few, many = train_records <= low, train_records >= high
    elif (train_records < low).any():  # a third and more have this number, often the most that is read of anybody
        few, many = train_records < low, train_records >= low
    else:
        few, many = train_records <= low, train_records > low
    if not few.any() or not many.any():
        return np.zeros(train_records.shape, dtype=np.int64)
    return np.where(few, FEW, np.where(many, MANY, 0)).astype(np.int64)


def gap(values: Floats, marks: Integers, *, higher_is_better: bool = True) -> float:
    """How much better the users marked `MANY` are off in the mean than those marked `FEW`; NaN if either is nobody."""
    measured = np.isfinite(values)
    few, many = values[measured & (marks == FEW)], values[measured & (marks == MANY)]
    if not few.size or not many.size:
        return float("nan")
    difference = float(many.mean() - few.mean())
    return difference if higher_is_better else -difference
