"""Epsilon between two Gaussians, which may differ in deviation too."""

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr

from fedpers.errors import ConfigError

_TOLERANCE = 1e-9  # of epsilon, in root finding


def gaussian_epsilon(mean: float, delta: float, std: float = 1.0) -> float:
    """Smallest epsilon at which N(0, 1) and N(mean, std^2) are (epsilon, delta)-indistinguishable in both directions.

    With std = 1 this is a Gaussian mechanism with sensitivity / deviation = |mean| (Balle and Wang, ICML 2018, Theorem
    8). Otherwise the set where one density exceeds e^epsilon times the other is bounded by the roots of a quadratic, so
    both masses are exact. Infinite if std is 0. Raises ConfigError if delta is not in (0, 1), `mean` is not finite or
    `std` is negative or not finite.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be in (0, 1), not {delta}.")
    if not (math.isfinite(mean) and math.isfinite(std) and std >= 0):
        raise ConfigError(f"mean must be finite and std finite and >= 0, not {mean} and {std}.")
    if std == 0:
        return math.inf

    def excess(eps: float) -> float:
        return max(_hockey_stick(eps, mean, std), _hockey_stick(eps, mean / std, 1 / std)) - delta

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=_TOLERANCE))


def _hockey_stick(eps: float, mean: float, std: float) -> float:
    """P(A) - e^eps Q(A) for P = N(0, 1), Q = N(mean, std^2) and A the set where p > e^eps q; eps >= 0."""
    a, b = (1 / std**2 - 1) / 2, abs(mean) / std**2  # mirrored, so that Q lies on the left
    c = (mean / std) ** 2 / 2 + math.log(std) - eps  # A is where a x^2 + b x + c > 0
    discriminant = b * b - 4 * a * c
    if discriminant <= 0:  # A is empty: for eps >= 0 it cannot be everything
        return 0.0
    far = -(b + math.sqrt(discriminant)) / 2  # b >= 0: no cancellation
    low, high = (-math.inf, c / far) if a == 0 else sorted((far / a, c / far))
    mass = _log_inside if a < 0 else _log_outside
    centre = -abs(mean)
    p, q = mass(low, high), mass((low - centre) / std, (high - centre) / std)
    return math.exp(p) * -math.expm1(min(eps + q - p, 0.0)) if p > -math.inf else 0.0


def _log_inside(low: float, high: float) -> float:
    """Log of the standard normal mass of [low, high]."""
    if low > 0:
        low, high = -high, -low  # the left tail keeps its digits
    upper, lower = float(log_ndtr(high)), float(log_ndtr(low))
    return upper + math.log(-math.expm1(lower - upper)) if lower < upper else -math.inf


def _log_outside(low: float, high: float) -> float:
    """Log of the standard normal mass outside [low, high]."""
    return float(np.logaddexp(log_ndtr(low), log_ndtr(-high)))
