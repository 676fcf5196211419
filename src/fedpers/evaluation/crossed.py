"""Means over seeds and people where both are crossed: the same people meet several seeds, and each seed many people.

Runs that differ in the seed alone give a value per seed and person. Two such values are alike for sharing the person
and for sharing the seed, so neither a bootstrap over people nor one over runs tells how far their mean could be off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from fedpers.errors import DataError
from fedpers.evaluation.comparison import LEVEL, Versus, holm, verdict
from fedpers.evaluation.statistics import (
    RESAMPLES,
    Floats,
    Integers,
    Interval,
    minimum_detectable_effect,
    signed_rank,
    without_dust,
)
from fedpers.privacy.randomness import generator, seed_key

_KEY = seed_key(0)
_CHUNK = 4_000_000  # weights held at once
_DRAWN = 200_000_000  # weights drawn in all; above 100,000 people fewer resamples do


@dataclass(frozen=True)
class Crossed:
    """A metric under several seeds.

    Attributes:
        seeds: (seeds,), ascending.
        people: (people,), ascending: whoever was measured under any seed.
        values: (seeds, people), in the unit of the metric; NaN where a person was not measured under a seed.
    """

    seeds: Integers
    people: Integers
    values: Floats

    @property
    def mean(self) -> float:
        """Mean over all that was measured."""
        return float(np.nanmean(self.values))

    @property
    def by_person(self) -> Floats:
        """(people,) each person's mean over their seeds."""
        found: Floats = np.nanmean(self.values, axis=0)
        return found

    @property
    def by_seed(self) -> Floats:
        """(seeds,) each seed's mean over its people."""
        found: Floats = np.nanmean(self.values, axis=1)
        return found


def crossed(seed: ArrayLike, person: ArrayLike, value: ArrayLike) -> Crossed:
    """Arrange values, (rows,) each, by seed and person.

    Raises:
        DataError: no row, a value that is not finite, or two values of one person under one seed.
    """
    seeds, row = np.unique(np.asarray(seed, dtype=np.int64), return_inverse=True)
    people, column = np.unique(np.asarray(person, dtype=np.int64), return_inverse=True)
    found = np.asarray(value, dtype=np.float64)
    if not found.size or not np.isfinite(found).all():
        raise DataError("means over seeds and people: there is no value, or one is not finite; see which run diverged.")
    if np.unique(row * people.size + column).size < found.size:
        raise DataError("means over seeds and people: somebody was measured twice under one seed; keep the runs apart.")
    values = np.full((seeds.size, people.size), np.nan)
    values[row, column] = found
    return Crossed(seeds, people, values)


def intervals(many: Sequence[Crossed]) -> list[Interval]:
    """Return each mean over seeds and people with a 95% interval, by a bootstrap in which the two are crossed.

    Seeds and people are drawn independently with replacement; a value counts as often as its seed times its person was
    drawn (the pigeonhole bootstrap: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1(2), 2007, 386-411,
    doi 10.1214/07-AOAS122; no bootstrap is exact here, this one errs to the wide side). With one seed that is a
    bootstrap over people, and the interval covers their choice alone. A handful of seeds shows less spread than it was
    drawn from, so the percentiles are moved away from the mean by `_stretch`; of two seeds they are still too near.

    The draws hang on the numbers of seeds and people alone: equal tables have equal intervals, and whatever was
    measured on as many is drawn alike.
    """
    found: dict[int, Interval] = {}
    alike: dict[tuple[tuple[int, ...], bytes], list[int]] = {}
    for place, one in enumerate(many):
        alike.setdefault((one.values.shape, np.isfinite(one.values).tobytes()), []).append(place)
    for places in alike.values():
        for place, drawn in zip(places, _resampled([many[place].values for place in places]), strict=True):
            mean, wider = many[place].mean, _stretch(many[place])
            low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])
            found[place] = Interval(mean, mean + wider * (float(low) - mean), mean + wider * (float(high) - mean))
    return [found[place] for place in range(len(many))]


def gain(own: Crossed, other: Crossed, *, higher_is_better: bool = True) -> Crossed:
    """Subtract, person by person under each seed; positive favours `own`.

    Raises:
        DataError: the two were not measured on the same people under the same seeds.
    """
    alike = own.values.shape == other.values.shape and np.array_equal(np.isnan(own.values), np.isnan(other.values))
    if not alike or (own.seeds != other.seeds).any() or (own.people != other.people).any():
        raise DataError("a paired comparison needs the same people under the same seeds; run what is missing.")
    difference = own.values - other.values if higher_is_better else other.values - own.values
    return Crossed(own.seeds, own.people, without_dust(difference))


def against(gains: Mapping[str, Crossed], level: float = LEVEL) -> dict[str, Versus]:
    """Judge gains over one reference, corrected for their number by Holm.

    As `comparison.against`, but with crossed intervals: p is of a signed-rank test over people, each averaged over
    their seeds, and a verdict needs the sign of every seed.
    """
    found = dict(zip(gains, intervals(list(gains.values())), strict=True))
    p_values = [signed_rank(one.by_person) for one in gains.values()]
    result = {}
    for (name, one), p, corrected in zip(gains.items(), p_values, holm(p_values), strict=True):
        mean, low, high = found[name]
        seed_gains = tuple(map(float, without_dust(one.by_seed)))
        result[name] = Versus(
            gain=mean, ci95=(low, high), seed_gains=seed_gains, p_value=p, p_corrected=corrected,
            detectable=minimum_detectable_effect(one.by_person, level=level / len(gains)),
            verdict=verdict(corrected, (mean, *seed_gains), level),
        )  # fmt: skip
    return result


def _resampled(many: Sequence[Floats]) -> Floats:
    """Means under resampling, (tables, draws), of tables with the same places empty; NaN for a draw without values."""
    seeds, people = many[0].shape
    draws = min(RESAMPLES, max(200, _DRAWN // people))
    rng = generator(_KEY, "pigeonhole bootstrap", seeds, people)
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws).astype(np.float64)  # (draws, seeds)
    measured = np.isfinite(many[0])
    rows = np.concatenate([*many, measured])  # (tables and one more, by seeds; people)
    rows[np.isnan(rows)] = 0.0
    sums = np.empty((draws, len(many) + 1))
    step = max(1, _CHUNK // people)
    for start in range(0, draws, step):
        part = by_seed[start : start + step]
        chosen = rng.integers(people, size=(len(part), people)) + people * np.arange(len(part))[:, None]
        by_person = np.bincount(chosen.ravel(), minlength=chosen.size).reshape(chosen.shape).astype(np.float64)
        sums[start : start + step] = np.einsum("ds,dts->dt", part, (by_person @ rows.T).reshape(len(part), -1, seeds))
    with np.errstate(invalid="ignore"):  # nobody drawn was measured under the seeds drawn
        means: Floats = (sums[:, :-1] / sums[:, -1:]).T
    return means


def _stretch(one: Crossed) -> float:
    """How much wider the truth is than the percentiles: variances over n - 1, and Student's t for a normal's quantile.

    Its degrees of freedom are Satterthwaite's (Biometrics Bulletin 2, 1946) for the variance of the mean over seeds
    plus that over people: 1.02 for a hundred people under one seed, 2.7 for three seeds where only they matter.
    """
    parts = [  # plug-in variance of the mean, and its degrees of freedom
        (float(means.var()) / means.size, means.size - 1)
        for means in (without_dust(one.by_seed), without_dust(one.by_person))
        if means.size > 1
    ]
    plain = sum(variance for variance, _ in parts)
    if plain == 0:
        return 1.0
    unbiased = [(variance * (free + 1) / free, free) for variance, free in parts]
    total = sum(variance for variance, _ in unbiased)
    freedom = total**2 / sum(variance**2 / free for variance, free in unbiased)
    student, normal = stats.t.ppf(0.975, freedom), stats.norm.ppf(0.975)
    return float(math.sqrt(total / plain) * student / normal)
