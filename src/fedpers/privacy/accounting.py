"""From noise to epsilon: the accountant of every claim.

The claim uses privacy loss distributions (PLD; Meiser and Mohammadi, CCS 2018; Koskela et al., AISTATS 2020) as
implemented by Google's dp-accounting, with pessimistic rounding: what comes out is an upper bound. Where nothing is
sampled the analytic Gaussian (Balle and Wang, ICML 2018, Theorem 8) is exact and is used instead. Opacus's Renyi and
PRV accountants are second opinions and never a claim.

Adjacency is add/remove or zero-out: one unit's contribution is there or is nothing, so the L2 sensitivity is the clip.
Replace-one adjacency would double it and has no function here.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.special import log_ndtr

from fedpers.errors import ConfigError

_STEPS_PER_UNIT = 10_000  # calibrated noise multipliers have four decimals
_NOISE_RANGE = (0.01, 1e6)  # noise multipliers that calibration tries
_PRV_MAX_GRID = 4_000_000  # points; beyond it Opacus's PRV accountant takes gigabytes for a second opinion


@dataclass(frozen=True)
class GaussianEvent:
    """`count` releases of a (Poisson sub-sampled) Gaussian mechanism.

    Attributes:
        noise_multiplier: Standard deviation of the noise divided by the clip; 0 means no noise, that is no guarantee.
        sampling_rate: Probability with which the protected unit takes part, independently for each release and unit
            (Poisson sampling), in (0, 1]; 1.0 means that it takes part every time.
        count: How many times, 0 or more.
    """

    noise_multiplier: float
    sampling_rate: float
    count: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ConfigError(f"noise_multiplier must be a finite number >= 0, not {self.noise_multiplier}.")
        if not 0 < self.sampling_rate <= 1:
            raise ConfigError(f"sampling_rate must be a probability in (0, 1], not {self.sampling_rate}.")
        if self.count < 0:
            raise ConfigError(f"count must be 0 or more, not {self.count}.")


def epsilon(events: Iterable[GaussianEvent], delta: float) -> float:
    """Epsilon of all events together, an upper bound: 0.0 for none, `math.inf` if one of them has no noise.

    The events compose adaptively (design: reference section 2.2). Sampling rates are those of the protected unit;
    a client rate must not be multiplied by a record rate, because the steps of a round share one participation coin.

    Args:
        events: Releases, in any order; equal ones are merged.
        delta: Target delta, in (0, 1).

    Raises:
        ConfigError: `delta` is not in (0, 1).
    """
    _check_delta_range(delta)
    merged = _merge(events)
    if not merged:
        return 0.0
    if any(event.noise_multiplier == 0 for event in merged):
        return math.inf
    return _finite_epsilon(merged, delta, 1.0)


def cross_check(events: Iterable[GaussianEvent], delta: float) -> dict[str, float]:
    """Epsilon by Opacus's accountants: `{"rdp": ..., "prv": ...}`, for comparison and never for a claim.

    "rdp" (Mironov, CSF 2017) is a looser bound; "prv" (Gopi et al., NeurIPS 2021, with an error of .01) should agree
    with `epsilon` to about .02. "prv" is left out without noise and where its grid would not fit in memory, which
    happens at epsilons of a hundred and more.

    Raises:
        ConfigError: `delta` is not in (0, 1).
    """
    _check_delta_range(delta)
    merged = _merge(events)
    if not merged:
        return {"rdp": 0.0, "prv": 0.0}
    if any(event.noise_multiplier == 0 for event in merged):
        return {"rdp": math.inf}
    history = [(event.noise_multiplier, event.sampling_rate, event.count) for event in merged]
    rdp = RDPAccountant()
    rdp.history = list(history)
    eps_error, delta_error = 0.01, delta / 1000
    with warnings.catch_warnings():
        # Opacus tries a fixed list of orders and says so when the best lies at its end: a looser second opinion
        warnings.filterwarnings("ignore", message="Optimal order", category=UserWarning)
        opinions = {"rdp": float(rdp.get_epsilon(delta))}
        largest_loss = float(rdp.get_epsilon(delta_error / 4))
    # Opacus's own mesh and range (opacus/accountants/prv.py and analysis/prv/domain.py)
    mesh = eps_error / math.sqrt(sum(event.count for event in merged) * math.log(12 / delta_error) / 2)
    if 2 * (largest_loss + 3) / mesh <= _PRV_MAX_GRID:
        prv = PRVAccountant()
        prv.history = list(history)
        with np.errstate(divide="ignore"), warnings.catch_warnings():  # it takes log(1 - q) also at q = 1
            warnings.filterwarnings("ignore", message="Optimal order", category=UserWarning)
            opinions["prv"] = float(prv.get_epsilon(delta, eps_error=eps_error, delta_error=delta_error))
    return opinions


def calibrate(target_epsilon: float, delta: float, sampling_rate: float, count: int) -> float:
    """Smallest noise multiplier, in steps of 1e-4, whose `epsilon` is at most `target_epsilon`.

    Takes about half a second; two or three for rates of 1e-3 and less.

    Args:
        target_epsilon: Upper limit of epsilon, positive and finite.
        delta: Target delta, in (0, 1).
        sampling_rate: Poisson rate of the protected unit, in (0, 1].
        count: Number of noised releases of the whole run (all rounds together), 1 or more.

    Raises:
        ConfigError: A value is out of its range, or no noise multiplier between 0.01 and 1e6 reaches the target.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ConfigError(f"target epsilon must be positive and finite, not {target_epsilon}.")
    _check_delta_range(delta)
    if count < 1:
        raise ConfigError(f"count must be 1 or more to calibrate noise, not {count}.")

    def spent(noise_multiplier: float, coarseness: float) -> float:
        return _finite_epsilon((GaussianEvent(noise_multiplier, sampling_rate, count),), delta, coarseness)

    coarse = 10.0
    low = high = 1.0
    while spent(high, coarse) > target_epsilon:
        low, high = high, 2 * high
        if high > _NOISE_RANGE[1]:
            raise ConfigError(f"no noise multiplier up to {high:g} reaches epsilon {target_epsilon} at delta {delta}.")
    while spent(low, coarse) <= target_epsilon:
        low, high = low / 2, low
        if low < _NOISE_RANGE[0]:
            raise ConfigError(f"epsilon {target_epsilon} is hardly any privacy; ask for none or for a smaller epsilon.")
    log_noise = brentq(lambda x: spent(math.exp(x), coarse) - target_epsilon, math.log(low), math.log(high), xtol=0.01)
    guess = math.exp(float(log_noise))
    slope = math.log(spent(guess * 1.02, coarse) / spent(guess, coarse)) / math.log(1.02)
    for _ in range(2):  # Newton on log-log scale, where epsilon over noise is almost a straight line
        guess *= (target_epsilon / spent(guess, 1.0)) ** (1 / slope)
    guessed_steps = max(1, math.ceil(guess * _STEPS_PER_UNIT))
    return _smallest(lambda n: spent(n / _STEPS_PER_UNIT, 1.0) <= target_epsilon, guessed_steps) / _STEPS_PER_UNIT


def _check_delta_range(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be in (0, 1), not {delta}.")


def _merge(events: Iterable[GaussianEvent]) -> tuple[GaussianEvent, ...]:
    """Equal events become one with the sum of their counts; an accountant pays per distinct event."""
    counts: dict[tuple[float, float], int] = {}
    for event in events:
        if event.count:
            key = (event.noise_multiplier, event.sampling_rate)
            counts[key] = counts.get(key, 0) + event.count
    return tuple(GaussianEvent(z, q, count) for (z, q), count in sorted(counts.items()))


@lru_cache(maxsize=4096)  # many clients share a history, and a display asks again each round
def _finite_epsilon(events: tuple[GaussianEvent, ...], delta: float, coarseness: float) -> float:
    """Epsilon of merged events that all have noise; `coarseness` > 1 is faster and a looser upper bound."""
    if all(event.sampling_rate == 1 for event in events):
        return _analytic_gaussian(math.sqrt(sum(event.count / event.noise_multiplier**2 for event in events)), delta)
    accountant = PLDAccountant(
        NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=coarseness * min(_interval(event) for event in events),
    )
    for event in events:
        gaussian = dp_event.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(dp_event.PoissonSampledDpEvent(event.sampling_rate, gaussian), event.count)
    return float(accountant.get_epsilon(delta))


def _interval(event: GaussianEvent) -> float:
    """Grid step of the privacy loss distribution for one event.

    Rounding is pessimistic on any grid, so the step decides how tight epsilon is, never whether it holds. Linear
    interpolation of a loss with standard deviation s on a step h inflates its variance by h^2 / 6, and epsilon by
    about h^2 / (12 s^2): one part in 5000 at h = s / 20. Measured (epsilon; seconds), reference table 3.1:

        q, z, count          h = 1e-3         h = 1e-4         this function
        .01, 1.0, 1000       1.8289  (.09)    1.8282  (.68)    1.8285  (.08)
        .001, .7, 10000      1.6420  (.11)    1.6370  (.70)    1.6370  (.53)
        .004, 1.1, 15000     2.3052  (.05)    2.2955  (.44)    2.2959  (.21)
        .1, .5, 10          12.2612  (.14)   12.2612 (1.73)   12.2612  (.13)

    A fixed 1e-3 is too loose in the third row, a fixed 1e-4 slow in the fourth. The last bound keeps a single loss
    on about 4e4 points; the loss is at most `widest` except with a probability below 1e-18.
    """
    q, z = event.sampling_rate, event.noise_multiplier
    spread = q * math.sqrt(math.expm1(min(z**-2, 700.0)))  # exp overflows beyond 709
    largest = 9 / z + 0.5 / z**2
    widest = largest + math.log(q) if largest > 700 else math.log1p(q * math.expm1(largest))
    return max(min(1e-3, spread / 20), widest / 4e4)


def _analytic_gaussian(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian with sensitivity / standard deviation = mu (Balle and Wang, ICML 2018, Theorem 8)."""
    log_delta = math.log(delta)

    def excess(eps: float) -> float:
        first = float(log_ndtr(mu / 2 - eps / mu))
        second = eps + float(log_ndtr(-mu / 2 - eps / mu))
        # the difference of two almost equal terms may round to nothing; finite, because brentq takes no -inf
        return first + math.log(max(-math.expm1(second - first), 1e-300)) - log_delta

    if excess(0.0) <= 0:
        return 0.0
    upper = mu**2 / 2 + mu * math.sqrt(-2 * log_delta)  # the bound of zCDP (Bun and Steinke, 2016) is never smaller
    tolerance = 1e-9
    return float(brentq(excess, 0.0, upper, xtol=tolerance)) + tolerance


def _smallest(holds: Callable[[int], bool], guess: int) -> int:
    """Smallest positive integer for which a monotone condition holds, starting near it."""
    stride, low, high = 1, guess - 1, guess
    if holds(guess):
        while low > 0 and holds(low):
            stride *= 2
            low, high = max(low - stride, 0), low
    else:
        low, high = guess, guess + 1
        while not holds(high):
            stride *= 2
            low, high = high, high + stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
