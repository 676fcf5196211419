"""Means over seeds and people: intervals that hold what they say, and gains that are judged with care."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpers.errors import DataError
from fedpers.evaluation import comparison
from fedpers.evaluation.comparison import Score, holm
from fedpers.evaluation.crossed import Crossed, against, crossed, gain, intervals
from fedpers.evaluation.statistics import mean_interval


def table(values: NDArray[np.float64]) -> Crossed:
    """Values (seeds, people); NaN is left out."""
    seed, person = np.nonzero(np.isfinite(values))
    return crossed(seed, person, values[seed, person])


def drawn(rng: np.random.Generator, seeds: int, people: int, of_seed: float, of_person: float) -> NDArray[np.float64]:
    """Draw a table whose true mean is 0."""
    effects = of_seed * rng.standard_normal((seeds, 1)) + of_person * rng.standard_normal((1, people))
    return effects + 0.3 * rng.standard_normal((seeds, people))


def covered(tables: list[NDArray[np.float64]], *, crossing: bool) -> float:
    """How often the intervals hold 0: crossed, or over people alone."""
    rows = tables if crossing else [values.mean(axis=0, keepdims=True) for values in tables]
    return float(np.mean([one.low <= 0 <= one.high for one in intervals([table(values) for values in rows])]))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("of_seed", "of_person"), [(0.3, 0.5), (0.3, 0.0), (0.0, 1.0)])
def test_intervals_hold_the_true_mean_as_often_as_they_say(seeds: int, of_seed: float, of_person: float) -> None:
    rng = np.random.default_rng(1)
    tables = [drawn(rng, seeds, 60, of_seed, of_person) for _ in range(400)]
    assert 0.92 <= covered(tables, crossing=True) <= 1.0  # 3 standard errors below 95%
    if of_seed:
        assert covered(tables, crossing=False) < 0.85  # people alone do not tell how far a seed can throw it


def test_people_who_differ_by_seed_are_covered_too() -> None:
    rng = np.random.default_rng(2)
    tables = []
    for _ in range(300):
        values = drawn(rng, 4, 80, 0.2, 1.0)
        values[rng.random(values.shape) < 0.4] = np.nan  # of each seed's people, some take part under others
        tables.append(values[:, np.isfinite(values).any(axis=0)])
    assert 0.92 <= covered(tables, crossing=True) <= 1.0


def test_one_seed_is_a_bootstrap_over_people() -> None:
    values = np.random.default_rng(3).exponential(size=(1, 500))
    ((mean, low, high),) = intervals([table(values)])
    plain = mean_interval(values, np.random.default_rng(0))
    width = plain.high - plain.low
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((plain.low, plain.high), abs=0.06 * width)


def test_many_seeds_and_people_are_the_plain_pigeonhole_bootstrap() -> None:
    rng = np.random.default_rng(4)
    values = drawn(rng, 40, 90, 0.5, 1.0)
    means = [values[np.ix_(rng.integers(40, size=40), rng.integers(90, size=90))].mean() for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    (found,) = intervals([table(values)])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_what_was_not_measured_counts_nowhere() -> None:
    values = np.array([[1.0, 2.0, np.nan], [3.0, np.nan, 9.0]])
    found = table(values)
    assert found.mean == 15 / 4
    assert found.by_person.tolist() == [2, 2, 9]
    assert found.by_seed.tolist() == [1.5, 6]
    (apart,) = intervals([table(np.array([[1.0, 1.0, np.nan, np.nan], [np.nan, np.nan, 1.0, 1.0]]))])
    assert apart == (1, 1, 1)  # draws that hold nobody are left out


def test_the_order_of_rows_and_of_tables_changes_nothing() -> None:
    rng = np.random.default_rng(5)
    tables = [table(drawn(rng, 3, people, 0.2, 1.0)) for people in (20, 30, 20)]
    together = intervals(tables)
    assert together == [intervals([one])[0] for one in tables]
    assert intervals(tables[::-1]) == together[::-1]
    seed, person = np.indices((3, 20)).reshape(2, -1)
    shuffled = rng.permutation(60)
    again = crossed(seed[shuffled], person[shuffled], tables[0].values.ravel()[shuffled])
    assert intervals([again]) == together[:1]
    assert intervals([]) == []
    large = [table(drawn(rng, 2, 3000, 0.2, 1.0))]  # more than are drawn at once
    assert intervals(large) == intervals(large)


@pytest.mark.parametrize(
    ("seed", "person", "value", "message"),
    [([], [], [], "no value"), ([0], [0], [np.nan], "not finite"), ([1, 1], [4, 4], [0.1, 0.2], "measured twice")],
)
def test_bad_tables_are_refused(seed: list[int], person: list[int], value: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        crossed(seed, person, value)


def test_gains_are_paired() -> None:
    own, other = table(np.array([[0.3, 0.5], [0.4, 0.4]])), table(np.array([[0.2, 0.5], [0.3, 0.5]]))
    assert gain(own, other).values.tolist() == [[0.1, 0.0], [0.1, -0.1]]
    assert gain(own, other, higher_is_better=False).values.tolist() == [[-0.1, 0.0], [-0.1, 0.1]]
    for changed in (
        Crossed(own.seeds + 1, own.people, own.values),
        Crossed(own.seeds, own.people + 1, own.values),
        table(np.array([[0.2, 0.5], [0.3, np.nan]])),
        table(np.array([[0.2, 0.5]])),
    ):
        with pytest.raises(DataError, match="same people under the same seeds"):
            gain(own, changed)


def test_gains_are_judged_as_in_a_comparison_of_methods() -> None:
    rng = np.random.default_rng(6)
    base = drawn(rng, 3, 40, 0.1, 1.0)
    lifts = {"none": 0.0, "small": 0.05, "large": 0.4, "worse": -0.4, "fickle": np.array([[1.0], [0.5], [-0.2]])}
    methods = {name: base + lift + 0.2 * rng.standard_normal(base.shape) for name, lift in lifts.items()}
    found = against({name: gain(table(values), table(base)) for name, values in methods.items()})
    scores = {
        name: {s: {f"{p:02}": Score(v, 10) for p, v in enumerate(row)} for s, row in enumerate(values)}
        for name, values in [*methods.items(), ("", base)]
    }
    theirs = comparison.against(scores, scores.pop(""))
    for name, one in found.items():
        other = theirs[name]
        assert one.gain == pytest.approx(other.gain)
        assert one.seed_gains == pytest.approx(other.seed_gains)
        assert (one.p_value, one.p_corrected) == pytest.approx((other.p_value, other.p_corrected))
        assert one.detectable == pytest.approx(other.detectable)
        assert one.ci95[0] <= one.gain <= one.ci95[1]
    assert [found[name].verdict for name in lifts] == [
        "no difference found", found["small"].verdict, "better", "worse", "no difference found",
    ]  # fmt: skip
    assert found["fickle"].p_corrected < 0.001  # over people there is no doubt; over seeds there is
    assert found["fickle"].ci95[0] < 0
    assert [one.p_corrected for one in found.values()] == holm([one.p_value for one in found.values()])
    assert against({}) == {}
