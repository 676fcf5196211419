"""One-shot estimate of user-level epsilon from canary clients.

Andrew, Kairouz, Oh, Oprea, McMahan, Suriyakumar: One-shot Empirical Privacy Estimation for Federated Learning, ICLR
2024, arXiv:2302.03098.

Canary clients send random directions of the largest norm that the clip lets through. In high dimension the cosine of
the release with a direction that was not sent is N(0, 1/d); how far the cosines of those that were sent stand off from
it estimates epsilon. It is AN ESTIMATE, NOT A BOUND: it takes the release for Gaussian noise around the sum, so a fault
that random directions do not show escapes it, and it may exceed the true epsilon by chance.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedpers.audit.gaussian import gaussian_epsilon
from fedpers.errors import ConfigError, DataError

_Z = 1.959963984540054  # two-sided 95% of a normal


def canaries(count: int, dimension: int, norm: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Updates of canary clients, `(count, dimension)`: independent uniform directions, each of length `norm`.

    `norm` is in the unit of the clip. Raises ConfigError if a number is not positive.
    """
    if count < 1 or dimension < 1 or not (math.isfinite(norm) and norm > 0):
        raise ConfigError(f"canaries need positive numbers, not count {count}, dimension {dimension}, norm {norm}.")
    directions = rng.standard_normal((count, dimension))
    directions *= norm / np.linalg.norm(directions, axis=1, keepdims=True)
    return directions


def estimate(cosines: ArrayLike, dimension: int, delta: float, fixed_std: bool = True) -> tuple[float, float, float]:
    """Estimate of epsilon with the 95% interval that the uncertainty of the mean cosine gives: `(epsilon, low, high)`.

    Epsilon at `delta` between N(0, 1/d) and N(mean, std^2), in both directions. `cosines` is `(canaries,)`, of each
    canary that was sent with the release. `fixed_std` takes the deviation to be 1/sqrt(d), as it is without a canary:
    a deviation estimated from a few hundred cosines makes the far tails differ, and those rule at a small delta (100
    canaries, d = 10,000: 3.4 for a true 1.99, reference section 4.3). Without it the interval leaves the uncertainty of
    the deviation out, and cosines that are all equal give infinity.

    Raises ConfigError if delta is not in (0, 1) or dimension below 2, DataError if a cosine is not in [-1, 1] or there
    are fewer than two.
    """
    if dimension < 2:
        raise ConfigError(f"dimension must be 2 or more, not {dimension}.")
    values = np.asarray(cosines, dtype=np.float64)
    if values.ndim != 1 or values.size < 2 or not (np.abs(values) <= 1 + 1e-6).all():
        raise DataError("cosines must be one row of two or more numbers in [-1, 1]; a release of zeros has none.")
    scale = math.sqrt(dimension)
    mean = abs(float(values.mean())) * scale  # in units of the deviation without a canary
    std = 1.0 if fixed_std else float(values.std(ddof=1)) * scale
    margin = _Z * std / math.sqrt(values.size)
    middle, low, high = (gaussian_epsilon(m, delta, std) for m in (mean, max(mean - margin, 0.0), mean + margin))
    return middle, low, high


def ceiling(count: int, dimension: int, delta: float) -> float:
    """The estimate for a release without noise that is the sum of `count` orthogonal canaries and nothing else.

    Their cosines are 1/sqrt(count), so the estimate stays finite where epsilon is infinite, and no claim above this
    number can be questioned by it. Raises ConfigError if a number is not positive or delta is not in (0, 1).
    """
    if count < 1 or dimension < 1:
        raise ConfigError(f"count and dimension must be 1 or more, not {count} and {dimension}.")
    return gaussian_epsilon(math.sqrt(dimension / count), delta)
