"""Statistics over users: intervals, a paired comparison, and what coin flips alone would show.

The unit of every number here is the user: each user counts once, whatever the number of test records. Arrays are
`(users,)`, or `(seeds, users)` when the same users were evaluated under several seeds.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from fedpers.errors import DataError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

RESAMPLES = 2000
PERMUTATIONS = 2000
MINIMUM_RECORDS = 10  # below this the accuracy of a single user is mostly chance
_EXACT = 13  # users up to whom all choices of signs are counted
_CHUNK = 4_000_000  # random numbers held at once: bounds memory, not results of interest


class Interval(NamedTuple):
    """A mean with its 95% interval, in the unit of the values."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class NullRange:
    """Mean and central 95% range of a quantity under the permutation null, for one seed."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Own personal model against another model of the same users; a positive gain favours own.

    `helped`, `tied` and `harmed` count users with at least `minimum_records` test records (mean over seeds). The null
    fields are None where no record-level counts exist or no user is eligible; `minimum_detectable_effect` is None where
    the spread of the gains cannot be estimated.
    """

    n_users: int
    mean_gain: float
    ci95: tuple[float, float]
    p_value: float
    minimum_detectable_effect: float | None
    minimum_records: int
    n_eligible: int
    helped: float
    tied: float
    harmed: float
    worst_decile_gain: float | None
    null_helped: NullRange | None
    null_harmed: NullRange | None
    null_worst_decile_gain: NullRange | None


def mean_interval(values: ArrayLike, rng: np.random.Generator) -> Interval:
    """Unweighted mean over users with a 95% percentile bootstrap interval.

    `values` is `(users,)` or `(seeds, users)`; users and seeds are crossed factors and are resampled independently
    (the pigeonhole bootstrap: Owen, Annals of Applied Statistics 1(2), 2007, slightly conservative). With one seed the
    interval covers the choice of users only; with one user or very few seeds it is too narrow, as is any bootstrap.
    Raises DataError if there is no value or one is not finite.
    """
    grid = _grid(values)
    seeds, users = grid.shape
    seed_weights = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=RESAMPLES) / seeds
    means = np.empty(RESAMPLES)
    step = max(1, _CHUNK // users)
    for start in range(0, RESAMPLES, step):
        rows = seed_weights[start : start + step] @ grid
        chosen = rng.integers(users, size=rows.shape)
        means[start : start + step] = np.take_along_axis(rows, chosen, axis=1).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(grid.mean()), float(low), float(high))


def worst_decile(values: ArrayLike, *, higher_is_better: bool = True) -> float:
    """Mean of the worst 10% of users (rounded down, at least one user), per seed and then averaged over seeds.

    Raises DataError if there is no value or one is not finite.
    """
    grid = _grid(values)
    worst = _lowest_tenth(grid if higher_is_better else -grid).mean()
    return float(worst if higher_is_better else -worst)


def minimum_detectable_effect(gains: ArrayLike, *, power: float = 0.8, level: float = 0.05) -> float | None:
    """Smallest true mean gain that this many users show with `power` in a two-sided paired test at `level`.

    (z[1 - level/2] + z[power]) * sd / sqrt(users), the normal approximation (Cohen, Statistical Power Analysis, 1988),
    from the sd of the users' gains (averaged over seeds). Returns None for fewer than two users or for gains that are
    all equal: zero spread would claim unlimited sensitivity. Raises DataError as `mean_interval` does.
    """
    per_user = without_dust(_grid(gains).mean(axis=0))
    if per_user.size < 2 or np.ptp(per_user) == 0:
        return None
    quantiles = stats.norm.ppf(1 - level / 2) + stats.norm.ppf(power)
    return float(quantiles * per_user.std(ddof=1) / math.sqrt(per_user.size))


def compare(
    own: ArrayLike,
    other: ArrayLike,
    test_records: ArrayLike,
    only_own: ArrayLike | None,
    only_other: ArrayLike | None,
    rng: np.random.Generator,
    minimum_records: int = MINIMUM_RECORDS,
    *,
    higher_is_better: bool = True,
) -> Comparison:
    """Compare two models of the same users: paired interval, paired test, and users helped and harmed against chance.

    All arrays share one shape, `(users,)` or `(seeds, users)`. `own` and `other` hold a metric; `only_own` and
    `only_other` count the records that are right under one model only, and are None for a metric that is not 0/1.
    The p-value is a two-sided Wilcoxon signed-rank test over all users (averaged over seeds) that keeps zeros in the
    ranking (Pratt, JASA 54, 1959). The null says that own and other are exchangeable on every record: each discordant
    record flips its sign with probability 1/2, so a user's gain is (2 Binomial(d, 1/2) - d) / test_records. It takes
    the records of a user as independent of each other. A user is eligible with `minimum_records` test records under
    every seed. Raises DataError if shapes differ, a value is not finite or a count is impossible.
    """
    own_grid, other_grid, records = _grid(own), _grid(other), _counts(test_records, "test_records")
    if not own_grid.shape == other_grid.shape == records.shape:
        raise DataError(
            f"own {own_grid.shape}, other {other_grid.shape} and test_records {records.shape} must have one shape "
            "(seeds, users): give both models the same users in the same order."
        )
    gains = without_dust(own_grid - other_grid if higher_is_better else other_grid - own_grid)
    interval = mean_interval(gains, rng)
    eligible = (records >= minimum_records).all(axis=0)
    judged = gains[:, eligible]
    seeds = gains.shape[0]
    null = None
    if (only_own is None) != (only_other is None):
        raise DataError("only_own and only_other are counted together: give both or neither.")
    if only_own is not None and only_other is not None:
        discordant = _counts(only_own, "only_own") + _counts(only_other, "only_other")
        _check_discordant(discordant, records)
        if eligible.any():
            null = _null_ranges(records[:, eligible], discordant[:, eligible], rng)
    return Comparison(
        n_users=gains.shape[1],
        mean_gain=interval.mean,
        ci95=(interval.low, interval.high),
        p_value=signed_rank(gains.mean(axis=0)),
        minimum_detectable_effect=minimum_detectable_effect(gains),
        minimum_records=minimum_records,
        n_eligible=int(eligible.sum()),
        helped=float((judged > 0).sum() / seeds),
        tied=float((judged == 0).sum() / seeds),
        harmed=float((judged < 0).sum() / seeds),
        worst_decile_gain=worst_decile(judged) if eligible.any() else None,
        null_helped=null[0] if null else None,
        null_harmed=null[1] if null else None,
        null_worst_decile_gain=null[2] if null else None,
    )


def null_band(test_records: ArrayLike, discordant: ArrayLike, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Band of the sorted per-user gains under the permutation null of `compare`.

    `test_records` and `discordant` are `(users,)`; returns `low, high`, both `(users,)` and ascending: the central 95%
    of the k-th smallest gain over permutations (pointwise, not simultaneous over k). Fewer permutations are drawn above
    10000 users, where one curve already averages much. Raises DataError for impossible counts.
    """
    records, flips = _counts(test_records, "test_records"), _counts(discordant, "discordant")
    _check_discordant(flips, records)
    permutations = _permutations(records.size)
    return _pointwise(_null_gains(records.ravel(), flips.ravel(), rng, permutations))


def sign_flip_band(gains: ArrayLike, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Band of the sorted per-user gains if each user's gain might as well have had the other sign.

    The null of a paired test by sign flips (Fisher, The Design of Experiments, 1935), for metrics that are not counted
    record by record. `gains` is `(users,)`; returns what `null_band` does, from as many permutations. Raises DataError
    as `mean_interval` does.
    """
    values = _grid(gains).ravel()
    return _pointwise(_flipped(values, rng, _permutations(values.size)))


def _permutations(users: int) -> int:
    return min(PERMUTATIONS, max(200, 20_000_000 // users))


def _pointwise(curves: Iterable[Floats]) -> tuple[Floats, Floats]:
    """Central 95% at each rank of curves that come in chunks `(permutations, users)`, unsorted."""
    ordered = np.concatenate([np.sort(chunk, axis=1).astype(np.float32) for chunk in curves])
    low, high = np.quantile(ordered, [0.025, 0.975], axis=0)
    return low.astype(np.float64), high.astype(np.float64)


def _flipped(gains: Floats, rng: np.random.Generator, number: int) -> Iterator[Floats]:
    """Draw `number` times other signs for the gains of `(users,)`, in chunks `(permutations, users)`."""
    step = max(1, _CHUNK // gains.size)
    for start in range(0, number, step):
        kept = rng.random((min(step, number - start), gains.size)) < 0.5
        yield np.where(kept, gains, -gains)


def _null_gains(records: Integers, discordant: Integers, rng: np.random.Generator, number: int) -> Iterator[Floats]:
    """Draw `number` permutations of the gains of `(users,)`, in chunks `(permutations, users)`."""
    step = max(1, _CHUNK // records.size)
    for start in range(0, number, step):
        wins = rng.binomial(discordant, 0.5, size=(min(step, number - start), records.size))
        yield (2 * wins - discordant) / records


def _null_ranges(
    records: Integers, discordant: Integers, rng: np.random.Generator
) -> tuple[NullRange, NullRange, NullRange]:
    """Null of users helped, users harmed and worst-decile gain; seeds are pooled, never averaged.

    A record tends to be wrong under many seeds alike, so an average over seeds varies about as much as one seed does:
    the range of one seed is the careful one.
    """
    helped, harmed, worst = [], [], []
    for row_records, row_discordant in zip(records, discordant, strict=True):
        for gains in _null_gains(row_records, row_discordant, rng, PERMUTATIONS):
            helped.append((gains > 0).sum(axis=1))
            harmed.append((gains < 0).sum(axis=1))
            worst.append(_lowest_tenth(gains))
    return _range(np.concatenate(helped)), _range(np.concatenate(harmed)), _range(np.concatenate(worst))


def _range(draws: NDArray[np.int64] | Floats) -> NullRange:
    # Counts are discrete: interpolating between two of them would make the range too narrow.
    low = np.quantile(draws, 0.025, method="lower")
    high = np.quantile(draws, 0.975, method="higher")
    return NullRange(float(draws.mean()), float(low), float(high))


def _lowest_tenth(grid: Floats) -> Floats:
    """Mean of the lowest tenth along the last axis of `(rows, users)`."""
    number = max(1, grid.shape[1] // 10)
    tenth: Floats = np.partition(grid, number - 1, axis=1)[:, :number].mean(axis=1)
    return tenth


def signed_rank(gains: Floats) -> float:
    """Return p of the two-sided Wilcoxon signed-rank test, zeros by Pratt, of gains `(users,)`; 1 if all are zero."""
    gains = without_dust(gains)
    if not gains.any():
        return 1.0
    if gains.size <= _EXACT:  # what scipy does one by one, which takes seconds
        ranks = stats.rankdata(np.abs(gains)) * (gains != 0)
        sums = (np.arange(2**gains.size)[:, None] >> np.arange(gains.size) & 1) @ ranks  # of all ways to choose signs
        seen = ranks[gains > 0].sum()
        return float(min(1.0, 2 * min((sums <= seen).mean(), (sums >= seen).mean())))
    return float(stats.wilcoxon(gains, zero_method="pratt", alternative="two-sided").pvalue)


def without_dust(gains: Floats) -> Floats:
    """Round to 12 digits: 0.3 - 0.2 and 0.2 - 0.1 are the same gain and must tie, or cancel to zero, as one."""
    rounded: Floats = np.round(gains, 12)
    return rounded


def _grid(values: ArrayLike) -> Floats:
    grid = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if grid.ndim != 2 or grid.size == 0:
        raise DataError(f"values of shape {np.shape(values)} have no users: need (users,) or (seeds, users).")
    if not np.isfinite(grid).all():
        raise DataError(
            f"{int((~np.isfinite(grid)).sum())} of {grid.size} values are not finite: leave out users without test "
            "records, and check that training did not diverge."
        )
    return grid


def _counts(values: ArrayLike, name: str) -> Integers:
    counts = _grid(values)
    if (counts < 0).any() or (counts != np.floor(counts)).any():
        raise DataError(f"{name} must be whole numbers of records, not negative.")
    return counts.astype(np.int64)


def _check_discordant(discordant: Integers, records: Integers) -> None:
    if discordant.shape != records.shape or (discordant > records).any() or (records == 0).any():
        raise DataError("A user needs test records, and cannot have more discordant records than test records.")
