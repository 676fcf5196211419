"""Findings of kind "check", and the one that every noise has to pass: normal, of the promised size, fresh each time."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedpers.audit.bounds import Finding

TOLERANCE = 1e-4  # of a clip; sums are fp32
SURE = 1e-9  # a chance finding of a statistical check is this unlikely


def check(
    name: str, unit: str, what: str, allowed: float, measured: float, detail: str,
    numbers: Mapping[str, float] | None = None, *, holds: bool | None = None,
) -> Finding:  # fmt: skip
    """Return the finding of a check, which holds unless more was measured than is allowed, or as `holds` says."""
    if holds is None:
        holds = measured <= allowed + TOLERANCE * max(1.0, allowed)
    return Finding(
        name=name, what=what, unit=unit, claimed=allowed, delta=None, empirical=float(measured), ceiling=math.nan,
        kind="check", verdict="consistent" if holds else "violation", detail=detail, numbers=dict(numbers or {}),
    )  # fmt: skip


def noise_checks(unit: str, draws: Sequence[NDArray[np.float64]], deviation: float, noised: bool) -> list[Finding]:
    """Test the noise of some releases against independent normals of the deviation that the ledger promises."""
    if not noised:
        return [check("noise", unit, "release", 0.0, 0.0, "The ledger claims no noise and no guarantee.")]
    sizes = [draw.size for draw in draws]
    squares = [float(np.sum(np.square(draw))) / deviation**2 for draw in draws]
    measured = math.sqrt(sum(squares) / sum(sizes))
    # Less noise than promised is a violation, more is not.
    chances = [stats.chi2.cdf(square, size) * len(draws) for square, size in zip(squares, sizes, strict=True)]
    chance = min(float(stats.chi2.cdf(sum(squares), sum(sizes))), *map(float, chances))
    pairs = list(combinations(draws, 2))
    largest = max((_alike(one, other) for one, other in pairs), default=0.0)
    limit = float(stats.norm.isf(SURE / (2 * max(len(pairs), 1))))
    return [
        check("noise", unit, "release", 1.0, measured,
              "Deviation of the noise over what the ledger says; less than 1 beyond chance is too little.",
              {"chance": chance, "numbers": float(sum(sizes))}, holds=chance >= SURE),
        check("fresh noise", unit, "release", limit, largest,
              "Largest correlation of the noise of two releases, of different rounds, clients or phases, in standard "
              "deviations of chance.", {"releases": float(len(draws))}, holds=largest <= limit),
    ]  # fmt: skip


def _alike(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Correlation of two draws over the length that they share, in standard deviations of chance."""
    size = min(one.size, other.size)
    one, other = one[:size], other[:size]
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return abs(float(one @ other)) / length * math.sqrt(size) if length else 0.0
