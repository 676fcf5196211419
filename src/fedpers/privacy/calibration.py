"""From epsilon to noise: the smallest noise multiplier that keeps what `accounting` gives within a target."""

import math
from collections.abc import Callable

from scipy.optimize import brentq

from fedpers.errors import ConfigError
from fedpers.privacy.accounting import GaussianEvent, check_delta_range, finite_epsilon, gaussian_epsilon

_STEPS_PER_UNIT = 10_000  # calibrated noise multipliers have four decimals
_NOISE_RANGE = (0.01, 1e6)  # noise multipliers that calibration tries


def calibrate_gaussian(target_epsilon: float, delta: float, sensitivity: float) -> float:
    """Smallest noise multiplier, in steps of 1e-4, of one Gaussian release without sampling.

    Args:
        target_epsilon: Upper limit of epsilon, positive and finite.
        delta: Target delta, in (0, 1).
        sensitivity: L2 sensitivity in units of the clip, positive: 1 if the unit is zeroed out once, 2 if it is
            replaced, the root of k for k releases it takes part in, and so on.

    Returns:
        z, noise deviation over clip, with `gaussian_epsilon(sensitivity / z, delta) <= target_epsilon`.

    Raises:
        ConfigError: A value is out of its range, or no noise multiplier up to 1e6 reaches the target.
    """
    check_target(target_epsilon, delta)
    if not (math.isfinite(sensitivity) and sensitivity > 0):
        raise ConfigError(f"sensitivity must be a positive number of clips, not {sensitivity}.")
    guess = sensitivity * math.sqrt(2 * math.log(2 / delta)) / target_epsilon
    return smallest_noise_multiplier(lambda z: gaussian_epsilon(sensitivity / z, delta) <= target_epsilon, guess)


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
    check_target(target_epsilon, delta)
    if count < 1:
        raise ConfigError(f"count must be 1 or more to calibrate noise, not {count}.")

    def spent(noise_multiplier: float, coarseness: float) -> float:
        return finite_epsilon((GaussianEvent(noise_multiplier, sampling_rate, count),), delta, coarseness, False)

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
    return smallest_noise_multiplier(lambda z: spent(z, 1.0) <= target_epsilon, guess)


def smallest_noise_multiplier(holds: Callable[[float], bool], guess: float) -> float:
    """Smallest positive multiple of 1e-4 for which a condition holds that more noise can only help.

    Args:
        holds: The condition on a noise multiplier.
        guess: Where the search starts; the closer, the fewer calls.

    Raises:
        ConfigError: It does not hold at a noise multiplier of 1e6.
    """
    most = int(_NOISE_RANGE[1]) * _STEPS_PER_UNIT
    start = max(1, math.ceil(min(guess * _STEPS_PER_UNIT, most)))
    steps = _smallest(lambda n: n > most or holds(n / _STEPS_PER_UNIT), start)
    if steps > most:
        raise ConfigError(f"no noise multiplier up to {_NOISE_RANGE[1]:g} is enough; allow a larger epsilon or delta.")
    return steps / _STEPS_PER_UNIT


def check_target(target_epsilon: float, delta: float) -> None:
    """A target that noise can be calibrated to: epsilon positive and finite, delta in (0, 1).

    Raises:
        ConfigError: It is not.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ConfigError(f"target epsilon must be positive and finite, not {target_epsilon}.")
    check_delta_range(delta)


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
