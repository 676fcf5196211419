"""From noise to epsilon: the accountant of every claim.

The claim uses privacy loss distributions (PLD; Meiser and Mohammadi, CCS 2018; Koskela et al., AISTATS 2020) as
implemented by Google's dp-accounting, with pessimistic rounding: what comes out is an upper bound. Where nothing is
sampled the analytic Gaussian (Balle and Wang, ICML 2018, Theorem 8) is exact and is used instead. Opacus's Renyi and
PRV accountants are second opinions and never a claim.

Adjacency is add/remove or zero-out unless `replace_one` is asked for: one unit's contribution is there or is nothing,
so the L2 sensitivity is the clip. Under replace-one it becomes another contribution: a sensitivity of two clips. Noise
multipliers are relative to the clip under both; the doubling is done here, never by the caller.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.special import erfcx, log_ndtr

from fedpers.errors import ConfigError

_SMALLEST_GRID_NOISE = 1e-3  # noise multiplier; with less, losses reach 5e5 and more and dp-accounting overflows
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


def epsilon(events: Iterable[GaussianEvent], delta: float, *, replace_one: bool = False) -> float:
    """Epsilon of all events together, an upper bound: 0.0 for none, `math.inf` if one of them has no noise.

    The events compose adaptively (design: reference section 2.2), with noise and rates fixed before the run; for those
    that depend on outputs see `renyi.RdpFilter`. Sampling rates are those of the protected unit; a client rate must
    not be multiplied by a record rate, because the steps of a round share one participation coin.

    With an event below a noise multiplier of 1e-3 nothing is amplified; that is still an upper bound.

    Args:
        events: Releases, in any order; equal ones are merged.
        delta: Target delta, in (0, 1).
        replace_one: The unit's contribution is replaced by another one of norm up to the clip, instead of vanishing.

    Raises:
        ConfigError: `delta` is not in (0, 1).
    """
    check_delta_range(delta)
    merged = merge_events(events)
    if not merged:
        return 0.0
    if any(event.noise_multiplier == 0 for event in merged):
        return math.inf
    return finite_epsilon(merged, delta, 1.0, replace_one)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism without sampling, exact but for 1e-9 and rounded up.

    Balle and Wang, ICML 2018, Theorem 8: delta(eps) = Phi(mu/2 - eps/mu) - exp(eps) Phi(-mu/2 - eps/mu). Several
    Gaussians on one unit are one with the root of the sum of the squared `mu`.

    Args:
        mu: L2 sensitivity divided by the standard deviation of the noise, 0 or more; `math.inf` means no noise.
        delta: Target delta, in (0, 1).

    Returns:
        Epsilon; 0.0 for mu = 0 and `math.inf` for mu = inf.

    Raises:
        ConfigError: `mu` is negative or not a number, or `delta` is not in (0, 1).
    """
    check_delta_range(delta)
    if not mu >= 0:
        raise ConfigError(f"mu, sensitivity over noise, must be 0 or more, not {mu}.")
    log_delta = math.log(delta)

    def excess(eps: float) -> float:
        near, far = mu / 2 - eps / mu, mu / 2 + eps / mu
        first = float(log_ndtr(near))
        # exp(eps) Phi(-far), written so that nothing cancels where eps is huge: far^2 / 2 - eps = near^2 / 2
        second = math.log(float(erfcx(far / math.sqrt(2))) / 2) - near * near / 2
        # the difference of two almost equal terms may round to nothing; finite, because brentq takes no -inf
        return first + math.log(max(-math.expm1(second - first), 1e-300)) - log_delta

    upper = mu * mu / 2 + mu * math.sqrt(-2 * log_delta)  # the bound of zCDP (Bun and Steinke, 2016) is never smaller
    if not math.isfinite(upper):
        return math.inf
    if mu == 0 or excess(0.0) <= 0:
        return 0.0
    tolerance = 1e-9
    return float(brentq(excess, 0.0, upper, xtol=tolerance)) * (1 + 1e-12) + tolerance


def cross_check(events: Iterable[GaussianEvent], delta: float) -> dict[str, float]:
    """Add/remove epsilon by Opacus's accountants, `{"rdp": ..., "prv": ...}`: a comparison and never a claim.

    "rdp" (Mironov, CSF 2017) is a looser bound; "prv" (Gopi et al., NeurIPS 2021, with an error of .01) should agree
    with `epsilon` to about .02. "prv" is left out without noise and where its grid would not fit in memory, which
    happens at epsilons of a hundred and more.

    Raises:
        ConfigError: `delta` is not in (0, 1).
    """
    check_delta_range(delta)
    merged = merge_events(events)
    if not merged:
        return {"rdp": 0.0, "prv": 0.0}
    if any(event.noise_multiplier == 0 for event in merged):
        return {"rdp": math.inf}
    return dict(_opinions(merged, delta))


@lru_cache(maxsize=256)  # the runs of a sweep at one level have the same events
def _opinions(merged: tuple[GaussianEvent, ...], delta: float) -> dict[str, float]:
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


def check_delta_range(delta: float) -> None:
    """Raise ConfigError unless delta is in (0, 1)."""
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be in (0, 1), not {delta}.")


def merge_events(events: Iterable[GaussianEvent]) -> tuple[GaussianEvent, ...]:
    """Equal events become one with the sum of their counts; an accountant pays per distinct event."""
    counts: dict[tuple[float, float], int] = {}
    for event in events:
        if event.count:
            key = (event.noise_multiplier, event.sampling_rate)
            counts[key] = counts.get(key, 0) + event.count
    return tuple(GaussianEvent(z, q, count) for (z, q), count in sorted(counts.items()))


@lru_cache(maxsize=4096)  # many clients share a history, and a display asks again each round
def finite_epsilon(events: tuple[GaussianEvent, ...], delta: float, coarseness: float, replace_one: bool) -> float:
    """Epsilon of merged events that all have noise; `coarseness` > 1 is faster and a looser upper bound.

    Forgetting about sampling gives an upper bound too. A sampled release is a mixture over the unit's coin of the
    release with the unit and, under both data sets alike, without it; hockey-stick divergences are jointly convex, so
    the Gaussian pair dominates the mixture (Balle, Barthe, Gaboardi, NeurIPS 2018), and dominating pairs compose
    adaptively (Zhu, Dong, Wang, AISTATS 2022, Theorem 10). With hardly any noise it is the only one that can be had.

    For replace-one the pair of dp-accounting, (1-q) N(0) + q N(1) against (1-q) N(0) + q N(-1), dominates all
    contributions u and v of norm 1 or less. At alpha >= 1 their divergence is q E max(0, 1 - b exp(X) - c exp(Y)) with
    constants b, c >= 0 and, under N(u), the log-ratios X of N(0) and Y of N(v) to N(u). X and Y are Gaussian with means
    of minus half their variances, so the expectation of a convex function of b exp(X) + c exp(Y) grows with both
    variances, `|u|^2 / z^2` and `|u-v|^2 / z^2`, and with their covariance, `<u, u-v> / z^2`; v = -u with `|u| = 1`
    has the largest of all three. For alpha < 1 exchange the two.
    """
    sensitivity = 2 if replace_one else 1
    mu = sensitivity * math.hypot(*(math.sqrt(event.count) / event.noise_multiplier for event in events))
    unamplified = gaussian_epsilon(mu, delta)
    if all(event.sampling_rate == 1 for event in events):
        return unamplified
    if any(event.noise_multiplier < _SMALLEST_GRID_NOISE for event in events):
        return unamplified
    accountant = PLDAccountant(
        NeighboringRelation.REPLACE_ONE if replace_one else NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=coarseness * _interval(events),
    )
    for event in events:
        gaussian = dp_event.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(dp_event.PoissonSampledDpEvent(event.sampling_rate, gaussian), event.count)
    return min(float(accountant.get_epsilon(delta)), unamplified)


def _interval(events: tuple[GaussianEvent, ...]) -> float:
    """Grid step of the privacy loss distributions of events that are composed.

    Rounding is pessimistic on any grid, so the step decides how tight epsilon is, never whether it holds. Linear
    interpolation of a loss with standard deviation s on a step h inflates its variance by h^2 / 6, and epsilon by
    about h^2 / (12 s^2): one part in 5000 at h = s / 20. Measured (epsilon; seconds), reference table 3.1:

        q, z, count          h = 1e-3         h = 1e-4         this function
        .01, 1.0, 1000       1.8289  (.09)    1.8282  (.68)    1.8285  (.08)
        .001, .7, 10000      1.6420  (.11)    1.6370  (.70)    1.6370  (.53)
        .004, 1.1, 15000     2.3052  (.05)    2.2955  (.44)    2.2959  (.21)
        .1, .5, 10          12.2612  (.14)   12.2612 (1.73)   12.2612  (.13)

    A fixed 1e-3 is too loose in the third row, a fixed 1e-4 slow in the fourth. Each event's single loss is kept on
    about 4e4 points, because the time goes with them: one release with z = .01 beside the first row takes a minute on
    the step of the first row (5304.50) and .2 seconds on this one (5304.94).
    """
    return max(min(_finest(event) for event in events), max(_widest(event) for event in events) / 4e4)


def _finest(event: GaussianEvent) -> float:
    """A twentieth of the standard deviation of one loss, 1e-3 at most."""
    spread = event.sampling_rate * math.sqrt(math.expm1(min(event.noise_multiplier**-2, 700.0)))  # no overflow
    return min(1e-3, spread / 20)


def _widest(event: GaussianEvent) -> float:
    """A bound that one loss exceeds with a probability below 1e-18."""
    q, z = event.sampling_rate, event.noise_multiplier
    largest = 9 / z + 0.5 / z**2
    return largest + math.log(q) if largest > 700 else math.log1p(q * math.expm1(largest))
