"""Many methods against a few references on the same people, corrected for how many they are.

The unit is the person: somebody who takes part under several seeds is averaged over them first and counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from fedpers.errors import DataError
from fedpers.evaluation.statistics import Floats, compare, minimum_detectable_effect, without_dust

LEVEL = 0.05
Verdict = Literal["better", "worse", "no difference found"]


class Score(NamedTuple):
    """A person's metric under one seed, and on how many test records it was measured."""

    value: float
    test_records: int


Scores = Mapping[int, Mapping[str, Score]]  # seed -> person -> score


@dataclass(frozen=True)
class Versus:
    """A method against a reference; a positive gain favours the method.

    Attributes:
        gain: mean over people, in the unit of the metric.
        ci95: bootstrap interval of the gain over people.
        seed_gains: mean gain under each seed, in the order of the seeds.
        p_value: paired Wilcoxon signed-rank test over people, zeros by Pratt.
        p_corrected: the same by Holm, over all methods that were held against this reference.
        detectable: smallest true gain that the test would find with 80% power at the level of Holm's first step, the
            usual level over the number of methods; None without a spread.
        verdict: "better" or "worse" if `p_corrected` is below the level and all seeds agree on the sign.
    """

    gain: float
    ci95: tuple[float, float]
    seed_gains: tuple[float, ...]
    p_value: float
    p_corrected: float
    detectable: float | None
    verdict: Verdict


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number, in the given order (Holm, Scandinavian Journal of Statistics 6, 1979).

    The k-th smallest of m is multiplied by m - k + 1, made at least the one before it and at most 1. Raises DataError
    for one that is no probability.
    """
    values = np.asarray(p_values, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise DataError("A p-value is not between 0 and 1: check that no accuracy is missing.")
    order = np.argsort(values, kind="stable")
    stepped = values[order] * np.arange(values.size, 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return [float(value) for value in corrected]


def by_person(scores: Scores) -> tuple[list[str], Floats, Floats]:
    """Average over each person's seeds: names in order, values (people,), and test records (people,) of one seed.

    Raises DataError if there is nobody.
    """
    people = sorted({person for found in scores.values() for person in found})
    if not people:
        raise DataError("There are no scores to average: finish the runs first.")
    held = {person: [found[person] for found in scores.values() if person in found] for person in people}
    values = np.array([np.mean([one.value for one in held[person]]) for person in people])
    records = np.array([min(one.test_records for one in held[person]) for person in people], dtype=np.float64)
    return people, values, records


def against(methods: Mapping[str, Scores], reference: Scores, level: float = LEVEL) -> dict[str, Versus]:
    """Hold every method against one reference, on the same people under the same seeds.

    Raises DataError if a method was run under other seeds, on other people or on other test records.
    """
    _, other, records = by_person(reference)
    found = {}
    for name, scores in methods.items():
        _check_same(name, scores, reference)
        _, own, _ = by_person(scores)
        found[name] = compare(own, other, records, None, None, np.random.default_rng(0)), own - other
    corrected = holm([one.p_value for one, _ in found.values()])
    result = {}
    for (name, (one, gains)), p in zip(found.items(), corrected, strict=True):
        seed_gains = tuple(_mean_gain(methods[name][seed], reference[seed]) for seed in sorted(reference))
        result[name] = Versus(
            gain=one.mean_gain,
            ci95=one.ci95,
            seed_gains=seed_gains,
            p_value=one.p_value,
            p_corrected=p,
            detectable=minimum_detectable_effect(without_dust(gains), level=level / len(found)),
            verdict=verdict(p, (one.mean_gain, *seed_gains), level),
        )
    return result


def reading(found: Mapping[str, Versus], reference: str) -> str:
    """Say in a sentence or two what a comparison of all methods with one reference has shown."""
    groups = {word: [name for name, one in found.items() if one.verdict == word] for word in ("better", "worse")}
    if not found:
        return f"There is no method to hold against {reference}."
    if not any(groups.values()):
        said = f"None of {len(found)} methods could be told apart from {reference}"
    else:
        parts = [f"{len(names)} {word} ({', '.join(names)})" for word, names in groups.items() if names]
        rest = len(found) - sum(map(len, groups.values()))
        said = f"Of {len(found)} methods held against {reference}, {' and '.join(parts)}"
        said += f"; for {rest} no difference was found" if rest else ""
    known = [one.detectable for one in found.values() if one.detectable is not None]
    if not known:
        return f"{said}."
    return f"{said}. Found would be, with 80% power, differences of {_span(known)}."


def verdict(p_corrected: float, gains: Iterable[float], level: float) -> Verdict:
    """Say what a corrected p may be taken for, given the mean gain and that of each seed."""
    # The test knows the spread over people, not over runs: a difference that changes its sign with the seed is none.
    signs = {float(np.sign(gain)) for gain in gains}
    if p_corrected >= level or len(signs) != 1 or signs == {0.0}:
        return "no difference found"
    return "better" if signs == {1.0} else "worse"


def _mean_gain(own: Mapping[str, Score], other: Mapping[str, Score]) -> float:
    return float(without_dust(np.array([own[person].value - other[person].value for person in other])).mean())


def _check_same(name: str, scores: Scores, reference: Scores) -> None:
    same = scores.keys() == reference.keys() and all(
        {person: one.test_records for person, one in scores[seed].items()}
        == {person: one.test_records for person, one in reference[seed].items()}
        for seed in reference
    )
    if not same:
        raise DataError(f"{name}: was not measured on the people, test records and seeds of what it is compared with.")


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}, depending on the method"
