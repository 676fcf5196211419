"""Renyi differential privacy where privacy loss distributions do not reach.

Two places: a fixed number of clients drawn without replacement, and noise or a stopping time that depends on what was
released before. Everything else is accounted by `accounting.epsilon`, which is tighter.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.rdp import RdpAccountant
from numpy.typing import NDArray
from scipy.optimize import brentq

from fedpers.errors import ConfigError
from fedpers.privacy.accounting import GaussianEvent, gaussian_epsilon, merge_events
from fedpers.privacy.calibration import calibrate_gaussian, check_target, smallest_noise_multiplier

_HIGH_ORDERS = (72, 80, 96, 112, 128, 160, 192, 256)
# Without replacement the bound between whole orders is interpolated: nothing to gain there.
_FIXED_SIZE_ORDERS = (*range(2, 65), *_HIGH_ORDERS)
# From 2: below it dp-accounting often finds no value. Costs a tenth of the noise at epsilon 50, nothing at epsilon 8
# (delta 1e-5, rate .1, 100 releases).
_FILTER_ORDERS = (*(tenth / 10 for tenth in range(20, 110)), *range(11, 65), *_HIGH_ORDERS, 384, 512, 1024)
# Outside of this range of noise multipliers dp-accounting's formulas overflow or round to log(0).
_NOISE_RANGE = (1e-3, 1e6)


def fixed_size_epsilon(noise_multiplier: float, population: int, sample: int, count: int, delta: float) -> float:
    """Epsilon under replace-one of `count` noised sums, each over `sample` clients drawn without replacement.

    Renyi DP by Wang, Balle, Kasiviswanathan (AISTATS 2019, Theorem 27) as implemented by dp-accounting, or the
    analytic Gaussian without amplification where that is smaller: it is exact for `sample` = `population` and an upper
    bound otherwise, because sampling never hurts (see `accounting`). Much looser than Poisson sampling at the same
    rate under add/remove.

    dp-accounting loses digits at much noise and high orders. Against an evaluation with 500 digits its divergences
    were larger there, never smaller by more than one part in 1e9 (multipliers 2 to 2000, orders to 63).

    Args:
        noise_multiplier: Noise deviation of the sum divided by the *clip*, like everywhere in fedpers; the doubled
            sensitivity of replace-one is taken care of here.
        population: Clients to draw from.
        sample: Clients in each release, 1 to `population`.
        count: Releases, 0 or more.
        delta: Target delta, in (0, 1).

    Returns:
        An upper bound; 0.0 for no release and `math.inf` for no noise.

    Raises:
        ConfigError: A value is out of its range.
    """
    _check_sample(population, sample)
    GaussianEvent(noise_multiplier, sample / population, count)  # raises for noise and counts out of their range
    if count == 0 or noise_multiplier == 0:
        return gaussian_epsilon(math.inf if count else 0.0, delta)
    unamplified = gaussian_epsilon(2 * math.sqrt(count) / noise_multiplier, delta)
    if sample == population or noise_multiplier < _NOISE_RANGE[0]:
        return unamplified
    divergences = count * _fixed_size_divergences(min(noise_multiplier, _NOISE_RANGE[1]), population, sample)
    conversions = [_conversion(order, delta) for order in _FIXED_SIZE_ORDERS]
    return min(max(0.0, float(np.min(divergences + conversions))), unamplified)


def calibrate_fixed_size(target_epsilon: float, delta: float, population: int, sample: int, count: int) -> float:
    """Smallest noise multiplier, in steps of 1e-4, whose `fixed_size_epsilon` is at most `target_epsilon`.

    Takes a few seconds.

    Raises:
        ConfigError: A value is out of its range, or no noise multiplier up to 1e6 reaches the target.
    """
    check_target(target_epsilon, delta)
    _check_sample(population, sample)
    if count < 1:
        raise ConfigError(f"count must be 1 or more to calibrate noise, not {count}.")

    def excess(noise_multiplier: float) -> float:
        return fixed_size_epsilon(noise_multiplier, population, sample, count, delta) - target_epsilon

    high = calibrate_gaussian(target_epsilon, delta, 2 * math.sqrt(count))  # enough without amplification
    low = high / 2
    while excess(low) <= 0:
        low, high = low / 2, low
    root = brentq(lambda log_noise: excess(math.exp(log_noise)), math.log(low), math.log(high), xtol=1e-4)
    return smallest_noise_multiplier(lambda z: excess(z) <= 0, math.exp(float(root)))


@dataclass(frozen=True)
class RdpFilter:
    """A privacy filter: the releases that it allows, however they were chosen, cost `epsilon` at `delta` together.

    Noise multipliers, sampling rates and the end of the run may depend on earlier releases, as long as each release is
    allowed beforehand together with all before it (Feldman and Zrnic, NeurIPS 2021, Theorem 4.3; Lecuyer,
    arXiv:2103.01379). The price: `epsilon` is claimed as soon as the run starts and whatever it spends. What
    `accounting.epsilon` gives for the releases of such a run is no bound, for they were picked by their outputs.

    The theorem is about one order, so `order` is fixed before the run. The best of several orders at the end would
    need a union bound over them, that is a smaller delta for each.

    Attributes:
        order: Renyi order, above 1.
        epsilon: What is claimed; positive and finite.
        delta: In (0, 1).

    Raises:
        ConfigError: A value is out of its range, or `order` is too small for any release at this epsilon and delta.
    """

    order: float
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        check_target(self.epsilon, self.delta)
        if not 1 < self.order < math.inf:
            raise ConfigError(f"the order of a privacy filter must be finite and above 1, not {self.order}.")
        if self.budget <= 0:
            raise ConfigError(
                f"order {self.order} leaves nothing to spend at epsilon {self.epsilon}, delta {self.delta}; "
                "take a larger order."
            )

    @property
    def budget(self) -> float:
        """Renyi divergence of `order` that implies (`epsilon`, `delta`).

        Canonne, Kamath, Steinke, NeurIPS 2020, Proposition 12 in arXiv:2004.00010v4, the main case of dp-accounting's
        `compute_epsilon`: epsilon = divergence + log(1 - 1/order) - log(delta order) / (order - 1).
        """
        return self.epsilon - _conversion(self.order, self.delta)

    def spent(self, events: Iterable[GaussianEvent]) -> float:
        """Sum of the events' add/remove Renyi divergences of `order`; `math.inf` if one of them has no noise.

        Each is the Poisson sub-sampled Gaussian of Mironov, Talwar, Zhang (arXiv:1908.10530).
        """
        return math.fsum(
            event.count * _divergences((self.order,), event.noise_multiplier, event.sampling_rate)[0]
            for event in merge_events(events)
        )

    def allows(self, events: Iterable[GaussianEvent]) -> bool:
        """Whether all these releases, those of the past and the next one, fit into the budget."""
        return self.spent(events) <= self.budget


def choose_filter(target_epsilon: float, delta: float, sampling_rate: float, count: int) -> tuple[RdpFilter, float]:
    """The filter that fits `count` equal releases with the least noise, to be chosen before the run.

    Args:
        target_epsilon: What will be claimed, positive and finite.
        delta: In (0, 1).
        sampling_rate: Poisson rate of the protected unit, in (0, 1].
        count: Releases, 1 or more.

    Returns:
        The filter and the noise multiplier, in steps of 1e-4, at which it allows `count` releases and no more of them.

    Raises:
        ConfigError: A value is out of its range, or no noise multiplier up to 1e6 reaches the target.
    """
    check_target(target_epsilon, delta)
    GaussianEvent(1.0, sampling_rate, count)  # raises for a rate out of its range
    if count < 1:
        raise ConfigError(f"count must be 1 or more to choose a filter, not {count}.")
    budgets = target_epsilon - np.array([_conversion(order, delta) for order in _FILTER_ORDERS])

    def slack(noise_multiplier: float) -> NDArray[np.float64]:
        return budgets - count * _divergences(_FILTER_ORDERS, noise_multiplier, sampling_rate)

    guess = 1.0
    while np.max(slack(guess)) < 0 and guess < _NOISE_RANGE[1]:
        guess *= 1.5
    noise_multiplier = smallest_noise_multiplier(lambda z: bool(np.max(slack(z)) >= 0), guess)
    order = float(_FILTER_ORDERS[int(np.argmax(slack(noise_multiplier)))])
    return RdpFilter(order, target_epsilon, delta), noise_multiplier


def _conversion(order: float, delta: float) -> float:
    """What is added to a Renyi divergence of `order` to get epsilon (source: `RdpFilter.budget`)."""
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


@lru_cache(maxsize=4096)
def _divergences(orders: tuple[float, ...], noise_multiplier: float, sampling_rate: float) -> NDArray[np.float64]:
    """Add/remove divergences of one Poisson sub-sampled Gaussian, one for each order."""
    if noise_multiplier < _NOISE_RANGE[0]:
        with np.errstate(divide="ignore", over="ignore"):  # infinity is right; without sampling: an upper bound
            return np.array(orders) / (2 * np.float64(noise_multiplier) ** 2)
    accountant = RdpAccountant(list(orders), NeighboringRelation.ADD_OR_REMOVE_ONE)
    gaussian = dp_event.GaussianDpEvent(min(noise_multiplier, _NOISE_RANGE[1]))
    accountant.compose(dp_event.PoissonSampledDpEvent(sampling_rate, gaussian))
    return np.asarray(accountant.rdp, dtype=np.float64)


@lru_cache(maxsize=256)
def _fixed_size_divergences(noise_multiplier: float, population: int, sample: int) -> NDArray[np.float64]:
    """Replace-one divergences of one release for `_FIXED_SIZE_ORDERS`; half the multiplier, for twice the clip."""
    accountant = RdpAccountant(list(_FIXED_SIZE_ORDERS), NeighboringRelation.REPLACE_ONE)
    gaussian = dp_event.GaussianDpEvent(noise_multiplier / 2)
    accountant.compose(dp_event.SampledWithoutReplacementDpEvent(population, sample, gaussian))
    return np.asarray(accountant.rdp, dtype=np.float64)


def _check_sample(population: int, sample: int) -> None:
    if not 1 <= sample <= population:
        raise ConfigError(f"a sample of {sample} clients out of {population} is impossible; draw 1 to {population}.")
