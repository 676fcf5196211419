"""Bounds of privacy audits: known values, validity against mechanisms of known epsilon, power, negative controls."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy import integrate, stats

from fedpers.audit.bounds import (
    Finding,
    attack_rates,
    corrected,
    guess,
    one_run_bound,
    one_run_ceiling,
    two_sample_bound,
    two_sample_ceiling,
    verdict,
)
from fedpers.audit.gaussian import gaussian_epsilon
from fedpers.audit.user_canary import canaries, ceiling, estimate
from fedpers.errors import ConfigError, DataError
from fedpers.privacy.accounting import GaussianEvent, epsilon

DELTA = 1e-5
AUDITS = 40
ALLOWED = 7  # violations by chance of 40 bounds at 95%: the binomial tail beyond it is 0.001


def true_epsilon(noise: float) -> float:
    return epsilon([GaussianEvent(noise, 1.0, 1)], DELTA)


# --- one run


def slow_one_run_bound(v: int, r: int, m: int, delta: float, level: float = 0.05) -> float:
    """The definition with exact binomial coefficients, scanned upwards in steps of 0.002."""
    ways = [math.comb(r, k) for k in range(r + 1)]
    last = 0.0
    for step in range(10_000):
        q = 1 / (1 + math.exp(-step * 0.002))
        mass = [ways[k] * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
        near = max((sum(mass[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
        if sum(mass[v:]) + 2 * m * delta * near > level:
            return last
        last = step * 0.002
    raise AssertionError("no crossing")


@pytest.mark.parametrize(
    ("v", "r", "m", "delta"),
    [(75, 100, 1000, 1e-4), (40, 40, 40, 0.0), (35, 40, 500, 1e-5), (28, 40, 40, 1e-3), (0, 0, 9, 0.0)],
)  # fmt: skip
def test_the_one_run_bound_is_its_definition(v: int, r: int, m: int, delta: float) -> None:
    assert 0 <= one_run_bound(v, r, m, delta) - slow_one_run_bound(v, r, m, delta) < 0.002 + 1e-6


def test_known_ceilings_of_one_run() -> None:
    assert [round(one_run_ceiling(m, m, DELTA), 2) for m in (50, 200, 1000, 5000)] == [2.78, 4.19, 5.78, 7.28]
    assert round(one_run_bound(75, 100, 1000, 1e-4), 3) == 0.673  # example of the paper's appendix D


def test_the_one_run_bound_grows_with_right_guesses_and_falls_with_canaries_delta_and_confidence() -> None:
    bounds = [one_run_bound(v, 200, 1000, DELTA) for v in range(0, 201, 5)]
    assert all(a <= b for a, b in pairwise(bounds))
    assert bounds[20] == 0  # half right is chance
    assert bounds[-1] == one_run_ceiling(200, 1000, DELTA) > bounds[-2] > 0
    base = one_run_bound(180, 200, 1000, 1e-4)
    assert base > one_run_bound(180, 200, 10_000, 1e-4)
    assert base > one_run_bound(180, 200, 1000, 1e-3)
    assert base > one_run_bound(180, 200, 1000, 1e-4, 0.99)
    assert one_run_bound(200, 200, 1000, 0.5) == 0  # so large a delta allows everything


def gaussian_sum_audit(noise: float, rng: np.random.Generator, m: int = 1000, guesses: int = 200) -> float:
    """One release of a noised sum of random unit directions, each there by a coin; scored by its inner product."""
    directions = canaries(m, 1500, 1.0, rng)
    coins = rng.random(m) < 0.5
    release = coins @ directions + noise * rng.standard_normal(1500)
    return one_run_bound(guess(directions @ release, coins, guesses), guesses, m, DELTA)


@pytest.mark.parametrize("noise", [1.0, 2.0])  # epsilon 4.38 and 1.99
def test_one_run_audits_of_a_gaussian_sum_seldom_exceed_the_truth(noise: float) -> None:
    rng = np.random.default_rng(3)
    bounds = [gaussian_sum_audit(noise, rng) for _ in range(AUDITS)]
    assert sum(bound > true_epsilon(noise) for bound in bounds) <= ALLOWED
    assert np.mean(bounds) > 0.05 * true_epsilon(noise)  # zero would be valid, and useless


@pytest.mark.parametrize("eps", [0.5, 1.0, 2.0])
def test_one_run_is_tight_and_valid_for_randomised_response(eps: float) -> None:
    """Each coin is told truthfully with probability e^eps / (1 + e^eps): the mechanism that attains the bound."""
    rng = np.random.default_rng(4)
    bounds = []
    for _ in range(100):
        coins = rng.random(300) < 0.5
        told = np.where(rng.random(300) < 1 / (1 + math.exp(-eps)), coins, ~coins)
        bounds.append(one_run_bound(int((told == coins).sum()), 300, 300, 0.0))
    violations = sum(bound > eps for bound in bounds)
    assert 1 <= violations <= 13  # 5% of 100 are 5; the tail beyond 13 is 0.0005, that of 0 is 0.006
    assert np.mean(bounds) > eps - 0.5


def test_without_noise_one_run_is_a_violation_unless_the_claim_is_above_the_ceiling() -> None:
    rng = np.random.default_rng(5)
    coins = rng.random(1000) < 0.5
    top = one_run_ceiling(200, 1000, DELTA)
    bound = one_run_bound(guess(coins * 1.0, coins, 200), 200, 1000, DELTA)
    assert bound == top
    assert verdict(true_epsilon(2.0), bound, top) == "violation"
    assert verdict(8.0, bound, top) == "powerless"


def test_the_best_of_many_scores_needs_the_correction() -> None:
    """Scores that know nothing, epsilon 0: the best of 20 refutes it far too often, corrected it does not."""
    rng = np.random.default_rng(6)
    tried, rates = 20, {}
    coins = rng.random((AUDITS, 200)) < 0.5
    right = [max(guess(rng.standard_normal(200), row, 100) for _ in range(tried)) for row in coins]
    for confidence in (0.95, corrected(0.95, tried)):
        rates[confidence] = sum(one_run_bound(v, 100, 200, 0.0, confidence) > 0 for v in right)
    assert rates[0.95] > 2 * ALLOWED  # the negative control
    assert rates[corrected(0.95, tried)] <= ALLOWED


def test_corrected_splits_the_error() -> None:
    assert corrected(0.95, 1) == 0.95
    assert corrected(0.95, 5) == pytest.approx(0.99)
    assert one_run_ceiling(200, 200, DELTA, corrected(0.95, 5)) < one_run_ceiling(200, 200, DELTA)


def test_guessing_counts_both_ends_and_breaks_ties_by_position() -> None:
    included = np.array([True, False, True, False, True, False])
    assert guess([5, 0, 4, 1, 2, 3], included, 4) == 4
    assert guess([0, 5, 1, 4, 3, 2], included, 4) == 0
    assert guess([5, 0, 9, 1, 9, 3], ~included, 2) == 0
    assert guess(np.zeros(300), np.arange(300) >= 150, 300) == 300  # the rule: later ranks higher
    rng = np.random.default_rng(7)
    draws = [guess(np.zeros(100), rng.random(100) < 0.5, 50) for _ in range(200)]
    assert abs(np.mean(draws) - 25) < 1.0  # with coins tossed after the order a constant score is chance


def test_what_cannot_be_guessed_or_bounded_is_refused() -> None:
    included = np.array([True, False])
    for guesses in (0, 1, 3, 4):
        with pytest.raises(ConfigError, match="even"):
            guess([0.0, 1.0], included, guesses)
    with pytest.raises(DataError, match="finite"):
        guess([math.nan, 1.0], included, 2)
    with pytest.raises(DataError, match="boolean"):
        guess([0.0, 1.0], included.astype(int), 2)  # ~1 is -2: it would count wrongly
    with pytest.raises(DataError, match="one entry per canary"):
        guess([0.0, 1.0, 2.0], included, 2)
    for counts in ((3, 2, 5), (1, 6, 5), (-1, 2, 5)):
        with pytest.raises(ConfigError, match="correct"):
            one_run_bound(*counts, DELTA)
    for delta, confidence in ((1.0, 0.95), (-0.1, 0.95), (DELTA, 1.0), (DELTA, 0.0)):
        with pytest.raises(ConfigError, match="must be in"):
            one_run_bound(1, 2, 5, delta, confidence)
        with pytest.raises(ConfigError, match="must be in"):
            two_sample_bound([1.0, 2.0], [1.0, 2.0], delta, confidence)
    with pytest.raises(ConfigError, match="tried"):
        corrected(0.95, 0)


# --- two samples


def test_known_ceilings_of_two_samples() -> None:
    assert [round(two_sample_ceiling(n, DELTA), 2) for n in (100, 1000, 10_000, 100_000)] == [3.28, 5.60, 7.90, 10.21]
    u = 1 - 0.025 ** (1 / 100)  # no error among 100
    assert two_sample_ceiling(100, DELTA) == pytest.approx(math.log((1 - DELTA - u) / u))
    mu = -2 * stats.norm.ppf(u)
    assert two_sample_ceiling(100, DELTA, gaussian=True) == pytest.approx(true_epsilon(1 / mu), abs=1e-6)


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("noise", [1.0, 2.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_two_sample_audits_of_a_gaussian_seldom_exceed_the_truth(noise: float, gaussian: bool, sign: float) -> None:
    rng = np.random.default_rng(8)
    bounds = []
    for _ in range(AUDITS):
        with_canary, without = rng.standard_normal((2, 4000)) * noise
        bounds.append(two_sample_bound(sign * (with_canary + 1), sign * without, DELTA, gaussian=gaussian))
    assert sum(bound > true_epsilon(noise) for bound in bounds) <= ALLOWED
    assert np.mean(bounds) > (0.6 if gaussian else 0.2) * true_epsilon(noise)


def test_two_samples_of_randomised_response_approach_its_epsilon_and_seldom_exceed_it() -> None:
    rng = np.random.default_rng(9)
    eps, n = 2.0, 4000
    truth = 1 / (1 + math.exp(-eps))
    bounds = [two_sample_bound(rng.random(n) < truth, rng.random(n) > truth, 0.0) for _ in range(AUDITS)]
    assert sum(bound > eps for bound in bounds) <= ALLOWED
    assert np.mean(bounds) > 0.85 * eps


def test_without_noise_two_samples_reach_the_ceiling_whatever_the_sign() -> None:
    ones, zeros = np.ones(200), np.zeros(200)
    for gaussian in (False, True):
        top = two_sample_ceiling(100, DELTA, gaussian=gaussian)
        assert two_sample_bound(ones, zeros, DELTA, gaussian=gaussian) == pytest.approx(top)
        assert two_sample_bound(zeros, ones, DELTA, gaussian=gaussian) == pytest.approx(top)
    dust = np.random.default_rng(0).standard_normal((2, 200)) * 1e-9
    assert two_sample_bound(ones + dust[0], zeros + dust[1], DELTA) == pytest.approx(two_sample_ceiling(100, DELTA))


def test_two_samples_that_are_alike_show_nothing() -> None:
    rng = np.random.default_rng(10)
    null = [two_sample_bound(*rng.standard_normal((2, 400)), 0.0) > 0 for _ in range(AUDITS)]
    assert sum(null) <= ALLOWED
    assert two_sample_bound(np.zeros(50), np.zeros(50), DELTA) == 0
    assert two_sample_bound([1.0, 2.0], [3.0, 4.0], 0.0) == 0
    assert two_sample_bound(np.ones(50), np.zeros(50), 0.999) == 0


def test_two_samples_choose_on_the_first_half_alone() -> None:
    """A separation in the first half alone gives nothing: judged where it was chosen, luck would be a bound."""
    lucky = np.concatenate([np.ones(100), np.zeros(100)])
    assert two_sample_bound(lucky, np.zeros(200), DELTA) == 0
    assert two_sample_bound(lucky[:100], np.zeros(100), DELTA) > 2


def test_two_samples_refuse_what_they_cannot_use() -> None:
    with pytest.raises(DataError, match="two runs"):
        two_sample_bound([1.0], [1.0, 2.0], DELTA)
    with pytest.raises(DataError, match="finite"):
        two_sample_bound([1.0, math.inf], [1.0, 2.0], DELTA)
    with pytest.raises(ConfigError, match="delta 0"):
        two_sample_bound([1.0, 2.0], [1.0, 2.0], 0.0, gaussian=True)
    with pytest.raises(ConfigError, match="n must"):
        two_sample_ceiling(0, DELTA)


# --- membership attacks, verdicts, findings


def test_attack_rates_against_a_pairwise_count() -> None:
    rng = np.random.default_rng(11)
    scores, members = rng.integers(0, 12, 3000).astype(float), rng.random(3000) < 0.4
    scores[members] += rng.integers(0, 3, int(members.sum()))
    inside, outside = scores[members], scores[~members]
    rates = attack_rates(scores, members)
    pairs = (inside[:, None] > outside).mean() + (inside[:, None] == outside).mean() / 2
    assert rates["auc"] == pytest.approx(pairs)
    curve = [((inside >= t).mean(), (outside >= t).mean()) for t in [*np.unique(scores), 99.0]]
    assert rates["best_advantage"] == pytest.approx(max(tpr - fpr for tpr, fpr in curve))
    for level in (0.01, 0.001):
        assert rates[f"tpr_at_fpr_{level}"] == pytest.approx(max(tpr for tpr, fpr in curve if fpr <= level))
    assert rates["tpr_at_fpr_0.01"] > 0


def test_attack_rates_at_the_ends() -> None:
    members = np.arange(10) < 4
    perfect = {"auc": 1.0, "tpr_at_fpr_0.01": 1.0, "tpr_at_fpr_0.001": 1.0, "best_advantage": 1.0}
    assert attack_rates(members * 1.0, members) == perfect
    blind = {"auc": 0.5, "tpr_at_fpr_0.01": 0.0, "tpr_at_fpr_0.001": 0.0, "best_advantage": 0.0}
    assert attack_rates(np.zeros(10), members) == blind
    with pytest.raises(DataError, match="both members"):
        attack_rates(np.zeros(10), np.ones(10, dtype=bool))


def test_verdicts() -> None:
    assert verdict(2.0, 2.1, 4.0) == "violation"
    assert verdict(2.0, 2.0, 4.0) == "consistent"
    assert verdict(4.0, 2.0, 4.0) == "powerless"
    assert verdict(math.inf, 3.0, math.inf) == "powerless"
    assert verdict(2.0, math.inf, 1.0) == "violation"
    with pytest.raises(DataError, match="needs numbers"):
        verdict(2.0, math.nan, 4.0)


def test_a_finding_survives_json() -> None:
    numbers = {"auc": np.float64(0.5), "worst": -math.inf, "none": math.nan}
    finding = Finding(
        "audit", "shared model", "user", math.inf, None, math.nan, 4.2, "attack", "powerless", "Why.", numbers
    )
    text = json.dumps(finding.to_dict(), allow_nan=False)
    assert json.loads(text) == {
        "name": "audit", "what": "shared model", "unit": "user", "claimed": "inf", "delta": None, "empirical": None,
        "ceiling": 4.2, "kind": "attack", "verdict": "powerless", "detail": "Why.",
        "numbers": {"auc": 0.5, "worst": "-inf", "none": None},
    }  # fmt: skip


# --- Gaussians and user canaries


@pytest.mark.parametrize(("mean", "std"), [(1.0, 1.0), (0.5, 1.3), (-2.0, 0.7), (0.0, 1.5), (3.0, 1.0001), (0.01, 0.9)])
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_epsilon_between_two_gaussians_is_where_the_integral_is_delta(mean: float, std: float, delta: float) -> None:
    eps = gaussian_epsilon(mean, delta, std)
    first, second = stats.norm(0, 1), stats.norm(mean, std)

    def divergence(p: stats.rv_continuous, q: stats.rv_continuous, at: float) -> float:
        grid = np.linspace(-40, 40, 800_001)
        return float(integrate.simpson(np.maximum(p.pdf(grid) - math.exp(at) * q.pdf(grid), 0), x=grid))

    def both(at: float) -> float:
        return max(divergence(first, second, at), divergence(second, first, at))

    assert both(eps) == pytest.approx(delta, rel=1e-4) if eps else both(0.0) <= delta


@pytest.mark.parametrize("noise", [0.05, 0.5, 1.0, 4.0])
def test_epsilon_between_equal_variances_is_that_of_the_gaussian_mechanism(noise: float) -> None:
    eps = gaussian_epsilon(-1 / noise, DELTA)
    assert eps == pytest.approx(true_epsilon(noise), abs=1e-7)
    if noise == 1.0:
        pld = privacy_loss_distribution.from_gaussian_mechanism(noise, value_discretization_interval=1e-4)
        assert eps == pytest.approx(pld.get_epsilon_for_delta(DELTA), abs=1e-3)


def test_epsilon_between_gaussians_at_the_ends() -> None:
    assert gaussian_epsilon(0.0, DELTA) == 0
    assert gaussian_epsilon(1e-7, DELTA) == 0  # closer than delta in total variation
    assert gaussian_epsilon(1.0, DELTA, 0.0) == math.inf
    assert gaussian_epsilon(1000.0, DELTA) == pytest.approx(true_epsilon(1e-3), rel=1e-9)
    values = [gaussian_epsilon(mean, DELTA, 1.2) for mean in (0.0, 0.5, 1.0, 2.0)]
    assert all(a < b for a, b in pairwise(values))
    for arguments in ((math.nan, DELTA, 1.0), (1.0, 0.0, 1.0), (1.0, DELTA, -1.0)):
        with pytest.raises(ConfigError, match="must be"):
            gaussian_epsilon(*arguments)


def one_shot(
    noise: float, count: int, rng: np.random.Generator, dimension: int = 5000, *, fixed_std: bool = True
) -> tuple[float, float, float]:
    directions = canaries(count, dimension, 2.0, rng)
    release = directions.sum(axis=0) + 2.0 * noise * rng.standard_normal(dimension)
    cosines = directions @ release / (2.0 * np.linalg.norm(release))
    return estimate(cosines, dimension, DELTA, fixed_std)


def test_canaries_are_random_directions_of_one_length() -> None:
    sent = canaries(200, 2000, 3.0, np.random.default_rng(12))
    assert sent.shape == (200, 2000)
    np.testing.assert_allclose(np.linalg.norm(sent, axis=1), 3.0)
    cosines = (sent @ sent.T / 9)[np.triu_indices(200, 1)]
    assert cosines.std() == pytest.approx(1 / math.sqrt(2000), rel=0.05)
    with pytest.raises(ConfigError, match="positive"):
        canaries(3, 5, 0.0, np.random.default_rng(0))


def test_the_one_shot_estimate_finds_epsilon_within_its_interval() -> None:
    rng = np.random.default_rng(13)
    truth = true_epsilon(2.0)
    found = [one_shot(2.0, 100, rng) for _ in range(AUDITS)]
    assert sum(low <= truth <= high for _, low, high in found) >= 32  # 95% less what the approximation costs
    assert np.mean([eps for eps, _, _ in found]) == pytest.approx(truth, rel=0.1)
    free = [one_shot(2.0, 100, rng, fixed_std=False)[0] for _ in range(AUDITS)]
    assert np.mean(free) > 1.3 * truth  # the negative control: why the deviation is fixed


def test_the_one_shot_estimate_of_nothing_and_of_no_noise() -> None:
    rng = np.random.default_rng(14)
    unsent = canaries(200, 5000, 1.0, rng) @ canaries(1, 5000, 1.0, rng)[0]
    middle, low, high = estimate(unsent, 5000, DELTA)
    assert low == 0
    assert middle < high < 1
    bare = one_shot(0.0, 200, rng)[0]
    assert bare == pytest.approx(ceiling(200, 5000, DELTA), rel=0.05)
    assert verdict(true_epsilon(2.0), bare, ceiling(200, 5000, DELTA)) == "violation"
    assert estimate(np.full(5, 0.1), 5000, DELTA, fixed_std=False) == (math.inf,) * 3
    for cosines in ([0.1], [0.1, math.nan], [0.1, 1.5]):
        with pytest.raises(DataError, match="cosines"):
            estimate(cosines, 5000, DELTA)
