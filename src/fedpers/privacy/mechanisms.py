"""User-level aggregation: clip each user's whole shared update, add up, add noise, divide by a public constant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Aggregate:
    """A noised mean update, and what only the simulator may see of how it came about."""

    mean: dict[str, NDArray[np.float32]]
    clipped: int  # users whose update was longer than the bound
    nonfinite: int  # users whose update was not finite and counted as zero
    median_norm: float  # of the updates before clipping; nan for an empty cohort
    signal: dict[str, float]  # L2 norm of the noise-free mean, per parameter group
    noise: dict[str, float]  # L2 norm of the noise in the mean, per parameter group


def clip_update(update: Arrays, bound: float) -> tuple[dict[str, NDArray[np.float64]], float]:
    """Scale an update so that the L2 norm over all its arrays jointly is at most `bound`.

    Returns the clipped update and the norm before. An update that is not finite becomes the zero vector and its norm
    is reported as infinity: a rule that looks at this user alone.
    """
    norm = float(np.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in update.values())))
    if not np.isfinite(norm):
        return {name: np.zeros(a.shape) for name, a in update.items()}, float("inf")
    factor = min(1.0, bound / norm) if norm > 0 else 1.0
    return {name: a.astype(np.float64) * factor for name, a in update.items()}, norm


def gaussian_mean(
    updates: Sequence[Arrays],
    shapes: Mapping[str, tuple[int, ...]],
    group_of: Callable[[str], str],
    *,
    clip: float,
    noise_multiplier: float,
    denominator: float,
    rng: np.random.Generator,
) -> Aggregate:
    """DP-FedAvg's fixed-denominator mean (McMahan et al., ICLR 2018, estimator f_f), as user-central needs it.

    Every user weighs the same, noise of deviation `noise_multiplier * clip` goes on the sum, and an empty cohort
    releases noise too. Removing one user changes the sum by at most `clip`.

    Args:
        updates: one mapping of name to array for each user of the cohort.
        shapes: shape of every array, so that an empty cohort knows what to release.
        group_of: parameter group of an array's name.
        clip: L2 bound on a whole update.
        noise_multiplier: noise deviation over clip.
        denominator: public constant, sampling rate times the number of registered users.
        rng: the stream of this round's noise, used for nothing else.
    """
    total = {name: np.zeros(shape) for name, shape in sorted(shapes.items())}
    norms = []
    for update in updates:
        kept, norm = clip_update(update, clip)
        norms.append(norm)
        for name in total:
            total[name] += kept[name]
    noise = {name: noise_multiplier * clip * rng.standard_normal(t.shape) for name, t in total.items()}
    mean = {name: ((total[name] + noise[name]) / denominator).astype(np.float32) for name in total}
    finite = [norm for norm in norms if np.isfinite(norm)]
    return Aggregate(
        mean=mean,
        clipped=sum(norm > clip for norm in finite),
        nonfinite=len(norms) - len(finite),
        median_norm=float(np.median(finite)) if finite else float("nan"),
        signal=_group_norms(total, group_of, denominator),
        noise=_group_norms(noise, group_of, denominator),
    )


def _group_norms(
    arrays: Mapping[str, NDArray[np.float64]], group_of: Callable[[str], str], denominator: float
) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, array in arrays.items():
        squares[group_of(name)] = squares.get(group_of(name), 0.0) + float(np.sum(array**2))
    return {group: float(np.sqrt(square)) / denominator for group, square in squares.items()}
