"""Sampling without replacement and the privacy filter, with the mistakes that they prevent as controls."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon
from scipy.special import logsumexp
from scipy.stats import norm

from fedpers.errors import ConfigError
from fedpers.privacy.accounting import GaussianEvent, epsilon, gaussian_epsilon
from fedpers.privacy.calibration import calibrate
from fedpers.privacy.renyi import RdpFilter, calibrate_fixed_size, choose_filter, fixed_size_epsilon

# table 3.1 of the reference: clients drawn of 1000, noise deviation / clip, count, delta; dp-accounting's epsilon with
# that multiplier as it is (wrong) and with half of it (right), and half a unit of their last digits
TABLE = [
    (10, 1.0, 1000, 1e-5, 3.58, 20.99, 0.005),
    (50, 1.3, 200, 1e-5, 6.64, 20.5, 0.05),
    (100, 2.0, 500, 1e-5, 13.62, 36.6, 0.05),
    (250, 1.0, 60, 1e-4, 25.37, 131, 0.5),
    (1000, 4.0, 50, 1e-5, 9.24, 22.0, 0.05),
    (1, 0.7, 10000, 1e-6, 2.83, 82.4, 0.05),
    (20, 0.6, 300, 1e-5, 13.96, 1210, 0.5),
    (500, 5.0, 100, 1e-5, 10.93, 26.1, 0.05),
    (100, 0.5, 10, 1e-5, 17.51, 131, 0.5),
    (4, 1.1, 15000, 1e-5, 5.05, 23.2, 0.05),
]


def events(z: float, q: float, count: int) -> list[GaussianEvent]:
    """Releases one by one, as a ledger has them."""
    return [GaussianEvent(z, q, 1)] * count


def without_replacement(multiplier: float, sample: int, count: int, delta: float) -> float:
    """dp-accounting's epsilon, with a multiplier relative to the sensitivity under replace-one."""
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    gaussian = dp_event.GaussianDpEvent(multiplier)
    accountant.compose(dp_event.SampledWithoutReplacementDpEvent(1000, sample, gaussian), count)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(("sample", "z", "count", "delta", "wrong", "right", "digits"), TABLE)
def test_fixed_size_of_the_reference(
    sample: int, z: float, count: int, delta: float, wrong: float, right: float, digits: float
) -> None:
    """The last lines are the control: the multiplier as it is promises less than what an adversary can learn.

    All others contribute the clip in one direction, and the unit is replaced from there to the opposite: the sum moves
    by two clips when it is drawn. That is Poisson sampling with half of the multiplier, and PLD is tight for it.
    """
    assert without_replacement(z, sample, count, delta) == pytest.approx(wrong, abs=0.0051)
    assert without_replacement(z / 2, sample, count, delta) == pytest.approx(right, abs=digits)
    unamplified = gaussian_epsilon(2 * math.sqrt(count) / z, delta)
    claimed = fixed_size_epsilon(z, 1000, sample, count, delta)
    assert claimed == pytest.approx(min(right, unamplified), abs=digits)
    learned = epsilon([GaussianEvent(z / 2, sample / 1000, count)], delta)
    assert learned <= claimed
    assert (wrong < learned) == (sample != 500)  # there the looseness of Renyi DP is larger than the mistake


@pytest.mark.parametrize(("z", "sample", "count"), [(4.0, 100, 50), (10.0, 300, 100), (2.0, 300, 3)])
def test_fixed_size_against_the_theorem(z: float, sample: int, count: int) -> None:
    """Wang, Balle, Kasiviswanathan, Theorem 27, its forward differences by integration instead of alternating sums."""
    q, sigma, delta, orders = sample / 1000, z / 2, 1e-5, range(2, 21)
    x, step = np.linspace(-60 * sigma, 60 * sigma, 20_000, retstep=True)  # an even number: no point at a loss of 0
    log_density, log_change = norm.logpdf(x, 0, sigma), np.log(np.abs(np.expm1((2 * x - 1) / (2 * sigma**2))))
    difference = {even: logsumexp(even * log_change + log_density) + math.log(step) for even in range(2, 21, 2)}

    def divergence(order: int) -> float:
        second = min(4 * math.expm1(sigma**-2), 2 * math.exp(sigma**-2))
        terms = [0.0, math.log(q**2 * math.comb(order, 2) * second)]
        for j in range(3, order + 1):
            spread = math.log(4) + (difference[2 * (j // 2)] + difference[2 * ((j + 1) // 2)]) / 2
            plain = math.log(2) + (j - 1) * j / (2 * sigma**2)
            terms.append(j * math.log(q) + math.log(math.comb(order, j)) + min(spread, plain))
        return float(logsumexp(terms)) / (order - 1)

    candidates = [count * divergence(a) + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a in orders]
    assert 0 < np.argmin(candidates) < len(orders) - 1 or q == 0.3
    assert fixed_size_epsilon(z, 1000, sample, count, delta) == pytest.approx(min(candidates), abs=1e-6)


def test_fixed_size_of_everybody_is_exact_and_of_almost_everybody_no_worse() -> None:
    exact = fixed_size_epsilon(4.0, 1000, 1000, 50, 1e-5)
    assert exact == gaussian_epsilon(2 * math.sqrt(50) / 4.0, 1e-5) == pytest.approx(20.68, abs=0.005)
    assert fixed_size_epsilon(4.0, 1000, 999, 50, 1e-5) <= exact
    assert fixed_size_epsilon(4.0, 1000, 10, 50, 1e-5) < 0.2 * exact


def test_fixed_size_at_the_ends() -> None:
    assert fixed_size_epsilon(1.0, 100, 10, 0, 1e-5) == 0
    assert fixed_size_epsilon(0.0, 100, 10, 5, 1e-5) == math.inf
    for z in (1e-6, 1e-3, 1e9):
        eps = fixed_size_epsilon(z, 100, 10, 5, 1e-5)
        assert 0 <= eps <= gaussian_epsilon(2 * math.sqrt(5) / z, 1e-5) < math.inf


@pytest.mark.parametrize(
    ("population", "sample", "count", "z", "delta"),
    [(10, 11, 1, 1.0, 1e-5), (10, 0, 1, 1.0, 1e-5), (10, 1, -1, 1.0, 1e-5), (10, 1, 1, -1.0, 1e-5), (10, 1, 1, 1.0, 0)],
)
def test_fixed_size_refuses(population: int, sample: int, count: int, z: float, delta: float) -> None:
    with pytest.raises(ConfigError):
        fixed_size_epsilon(z, population, sample, count, delta)


@pytest.mark.parametrize(
    ("target", "population", "sample", "count"), [(8.0, 1000, 100, 100), (50.0, 10000, 10, 100), (4.0, 50, 50, 10)]
)
def test_calibrate_fixed_size_inverts_fixed_size_epsilon(
    target: float, population: int, sample: int, count: int
) -> None:
    z = calibrate_fixed_size(target, 1e-5, population, sample, count)
    assert z == round(z, 4)
    assert fixed_size_epsilon(z, population, sample, count, 1e-5) <= target
    assert fixed_size_epsilon(z - 0.0001, population, sample, count, 1e-5) > target


@pytest.mark.parametrize(
    ("target", "delta", "population", "sample", "count"),
    [(0.0, 1e-5, 10, 1, 1), (1.0, 1.0, 10, 1, 1), (1.0, 1e-5, 10, 0, 1), (1.0, 1e-5, 10, 1, 0)],
)
def test_calibrate_fixed_size_refuses(target: float, delta: float, population: int, sample: int, count: int) -> None:
    with pytest.raises(ConfigError):
        calibrate_fixed_size(target, delta, population, sample, count)


@pytest.mark.parametrize(("order", "eps", "delta"), [(3.2, 8.0, 1e-5), (21, 1.0, 1e-6), (2, 15.0, 1e-3)])
def test_budget_converts_to_epsilon(order: float, eps: float, delta: float) -> None:
    budget = RdpFilter(order, eps, delta).budget
    assert compute_epsilon([order], [budget], delta)[0] == pytest.approx(eps, abs=1e-9)
    assert budget > eps + math.log(delta) / (order - 1)  # tighter than Mironov's conversion of 2017


def test_spent_is_the_sum_of_divergences() -> None:
    filter_ = RdpFilter(6.0, 4.0, 1e-5)
    mixed = [*events(1.3, 0.05, 20), GaussianEvent(2.0, 1.0, 3), GaussianEvent(0.9, 0.01, 7)]
    accountant = RdpAccountant([6.0])
    for event in mixed:
        gaussian = dp_event.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(dp_event.PoissonSampledDpEvent(event.sampling_rate, gaussian), event.count)
    assert filter_.spent(mixed) == pytest.approx(accountant.rdp[0], rel=1e-12)
    assert filter_.spent([GaussianEvent(2.0, 1.0, 3)]) == pytest.approx(3 * 6 / (2 * 2.0**2), rel=1e-12)
    assert filter_.spent([]) == 0
    assert filter_.spent([GaussianEvent(0.0, 0.5, 1)]) == math.inf
    assert filter_.spent([GaussianEvent(1e-6, 0.5, 1)]) == pytest.approx(6 / (2 * 1e-12))
    assert filter_.spent([GaussianEvent(5e-324, 0.5, 1)]) == math.inf


def test_divergence_of_a_sampled_release_by_integration() -> None:
    """Of order 3, from its definition, in the worse direction: with the unit against without it."""
    q, z, order = 0.2, 0.9, 3
    x, step = np.linspace(-15, 15, 200_001, retstep=True)
    without = norm.pdf(x, 0, z)
    sampled = (1 - q) * without + q * norm.pdf(x, 1, z)
    pairs = ((sampled, without), (without, sampled))
    divergences = [math.log(float((a**order * b ** (1 - order)).sum()) * step) / (order - 1) for a, b in pairs]
    spent = RdpFilter(order, 9.0, 1e-5).spent([GaussianEvent(z, q, 1)])
    assert spent == pytest.approx(divergences[0], rel=1e-6)
    assert spent > divergences[1]


@pytest.mark.parametrize(
    ("target", "delta", "q", "count"), [(8.0, 1e-5, 0.1, 100), (1.0, 1e-6, 0.01, 1000), (4.0, 1e-5, 1.0, 50)]
)
def test_chosen_filter_fits_the_planned_releases_with_the_least_noise(
    target: float, delta: float, q: float, count: int
) -> None:
    chosen, z = choose_filter(target, delta, q, count)
    assert (chosen.epsilon, chosen.delta) == (target, delta)
    assert z == round(z, 4)
    assert chosen.allows(events(z, q, count))
    assert not chosen.allows(events(z, q, count + 1))
    assert not chosen.allows(events(z - 0.0001, q, count))

    def best_of_all_orders(noise: float) -> float:
        accountant = RdpAccountant()
        accountant.compose(dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(noise)), count)
        return float(accountant.get_epsilon(delta))

    assert best_of_all_orders(z) <= target + 1e-9
    assert best_of_all_orders(z - 0.001) > target
    assert z > calibrate(target, delta, q, count)  # what full adaptivity costs against a fixed plan


def test_filter_counts_what_was_released_not_what_was_planned() -> None:
    chosen, z = choose_filter(3.0, 1e-5, 0.05, 200)
    half = events(z, 0.05, 100)
    assert chosen.allows(half + events(2 * z, 0.05, 150))
    assert not chosen.allows(half + events(z / 2, 0.05, 100))
    assert not chosen.allows([*half, GaussianEvent(0.0, 0.05, 1)])


def loss_beyond(claim: Callable[[np.ndarray], np.ndarray], allowed: np.ndarray, stop_beyond: float) -> float:
    """delta at the claimed epsilon of a run whose noise and end depend on its outputs, over 200,000 runs.

    One release changes the privacy loss by mu^2 / 2 + mu N(0, 1), mu = 1 / noise multiplier. After a release that gave
    much away the next has a multiplier of 2, else 4; the run ends when the loss is `stop_beyond` above the claim for
    the releases so far, or before a release that is not allowed.

    Args:
        claim: Epsilon for the releases so far, of arrays over runs: 200 times those with 2 plus those with 4.
        allowed: Whether count_2 releases with multiplier 2 and count_4 with 4 are allowed, (200, 200).
        stop_beyond: Loss above the claim at which the adversary stops, in epsilon.
    """
    draws, runs = np.random.default_rng(0), 200_000
    loss, counts = np.zeros(runs), np.zeros((2, runs), int)
    at_work = np.ones(runs, bool)
    strong = np.zeros(runs, bool)
    while at_work.any():
        following = counts + np.stack([strong, ~strong])
        at_work &= allowed[following[0], following[1]]
        counts = np.where(at_work, following, counts)
        mu = np.where(strong, 1 / 2, 1 / 4)
        noise = draws.standard_normal(runs)
        loss += np.where(at_work, mu**2 / 2 + mu * noise, 0.0)
        strong = noise > 0
        at_work &= loss <= claim(counts[0] * 200 + counts[1]) + stop_beyond
    return float(np.maximum(0, 1 - np.exp(claim(counts[0] * 200 + counts[1]) - loss)).mean())


def test_filter_holds_where_the_epsilon_of_the_releases_made_does_not() -> None:
    """The claim of a fully adaptive run is the filter's; the accountant's epsilon for its ledger is the control."""
    delta = 0.01
    chosen, _ = choose_filter(6.0, delta, 1.0, 40)
    twos, fours = np.indices((200, 200))
    spent_by_two, spent_by_four = (chosen.spent([GaussianEvent(z, 1.0, 1)]) for z in (2.0, 4.0))
    allowed = twos * spent_by_two + fours * spent_by_four <= chosen.budget
    assert chosen.allows([GaussianEvent(2.0, 1.0, 5), GaussianEvent(4.0, 1.0, 5)]) == allowed[5, 5]

    made = np.zeros(200 * 200)
    for two, four in np.argwhere(allowed):
        made[two * 200 + four] = gaussian_epsilon(math.hypot(math.sqrt(two) / 2, math.sqrt(four) / 4), delta)
    assert 0.5 * chosen.epsilon < made.max() < chosen.epsilon  # it promises more
    assert made[5 * 200 + 5] == epsilon([GaussianEvent(2.0, 1.0, 5), GaussianEvent(4.0, 1.0, 5)], delta)

    assert loss_beyond(lambda at: made[at], allowed, stop_beyond=0.25) > 2 * delta
    for stop_beyond in (0.0, 0.25, 1.0):
        assert loss_beyond(lambda at: np.full(at.shape, chosen.epsilon), allowed, stop_beyond) <= delta


@pytest.mark.parametrize(
    ("order", "eps", "delta"),
    [
        (1.0, 1.0, 1e-5),
        (math.inf, 1.0, 1e-5),
        (math.nan, 1.0, 1e-5),
        (4.0, 0.0, 1e-5),
        (4.0, 8.0, 1.0),
        (2.0, 1.0, 1e-5),
    ],
)
def test_filter_refuses(order: float, eps: float, delta: float) -> None:
    with pytest.raises(ConfigError):
        RdpFilter(order, eps, delta)


@pytest.mark.parametrize(
    ("target", "delta", "q", "count"),
    [(0.0, 1e-5, 0.1, 1), (1.0, 0.0, 0.1, 1), (1.0, 1e-5, 0.0, 1), (1.0, 1e-5, 0.1, 0)],
)
def test_choose_filter_refuses(target: float, delta: float, q: float, count: int) -> None:
    with pytest.raises(ConfigError):
        choose_filter(target, delta, q, count)
