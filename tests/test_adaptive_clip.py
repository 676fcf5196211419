"""Adaptive clipping: sum and bits together cost what was configured, and the clip finds its quantile."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedpers.errors import ConfigError
from fedpers.privacy.adaptive_clip import AdaptiveClip, joint_noise, split_noise
from fedpers.privacy.mechanisms import clip_update

multipliers = st.floats(1e-3, 100)
slack = st.floats(1.001, 1e4)  # of 2 bit_noise over the noise multiplier


def silent(quantile: float = 0.5, rate: float = 0.2) -> AdaptiveClip:
    return AdaptiveClip(quantile, rate, bit_noise=0.0)


def count(norms: list[float], clip: float) -> float:
    """The noise-free centred count, as the released fraction shows it."""
    return (silent().fraction(norms, clip, 1.0, np.random.default_rng(0))) - 0.5


# ---------------------------------------------------------------- noise


@given(multipliers, slack)
def test_splitting_follows_the_closed_form_and_is_undone(z: float, factor: float) -> None:
    bit_noise = factor * z / 2
    z_delta = split_noise(z, bit_noise)
    assert z_delta == pytest.approx((z**-2 - (2 * bit_noise) ** -2) ** -0.5, rel=1e-6)
    assert z_delta > z
    assert joint_noise(z_delta, bit_noise) == pytest.approx(z, rel=1e-9)
    assert joint_noise(z_delta, bit_noise) == pytest.approx((z_delta**-2 + (2 * bit_noise) ** -2) ** -0.5, rel=1e-9)


def test_a_small_example() -> None:
    assert split_noise(3.0, 2.5) == pytest.approx(15 / 4)  # 1/9 - 1/25 = (4/15)^2
    assert joint_noise(15 / 4, 2.5) == pytest.approx(3.0)


@pytest.mark.parametrize("bit_noise", [0.6, 0.3, 0.0, -5.0, float("nan")])
def test_bits_that_use_up_the_guarantee_are_refused_with_a_value_that_works(bit_noise: float) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.adaptive\.bit_noise.* is 0\.6001"):
        split_noise(1.2, bit_noise)
    assert math.isfinite(split_noise(1.2, 0.6001))


def test_no_noise_is_no_guarantee() -> None:
    assert split_noise(0.0, 0.0) == split_noise(0.0, 3.0) == 0
    assert joint_noise(0.0, 3.0) == joint_noise(3.0, 0.0) == joint_noise(0.0, 0.0) == 0


# ---------------------------------------------------------------- sensitivity


def joint_shift(updates: list[np.ndarray], gone: int, clip: float, z_delta: float, bit_noise: float) -> float:
    """By how many noise deviations sum and count move together when one user is removed."""

    def release(some: list[np.ndarray]) -> tuple[np.ndarray, float]:
        kept = [clip_update({"w": update}, clip) for update in some]
        return sum((one["w"] for one, _ in kept), np.zeros(3)), count([norm for _, norm in kept], clip)

    (total, bits), (other_total, other_bits) = release(updates), release(updates[:gone] + updates[gone + 1 :])
    moved = np.linalg.norm(total - other_total) / (z_delta * clip)
    return math.hypot(moved, (bits - other_bits) / bit_noise)


finite = st.floats(-1e4, 1e4, width=32)
update = arrays(np.float32, 3, elements=finite | st.sampled_from([0.0, math.nan, math.inf]))


@given(st.lists(update, min_size=1, max_size=5), st.data(), st.floats(1e-2, 1e3), multipliers, slack)
def test_removing_any_user_moves_sum_and_bits_by_no_more_than_configured(
    updates: list[np.ndarray], data: st.DataObject, clip: float, z: float, factor: float
) -> None:
    gone = data.draw(st.integers(0, len(updates) - 1))
    bit_noise = factor * z / 2
    z_delta = split_noise(z, bit_noise)
    shift = joint_shift(updates, gone, clip, z_delta, bit_noise)
    removed = updates[gone]
    if not np.all(np.isfinite(removed)) or not np.any(removed):
        assert shift <= 1e-9 / z  # as if absent
        return
    assert shift <= (1 + 1e-6) / z
    if np.linalg.norm(removed.astype(np.float64)) > clip:
        assert shift == pytest.approx(1 / z, rel=1e-6)  # and the bound is attained


@given(st.lists(st.floats(0, 10) | st.just(math.inf), max_size=6), st.floats(1e-3, 20), st.floats(0.1, 10))
@example([0.0], 1.0, 1.0)
def test_a_fraction_is_a_noised_count_over_a_constant(norms: list[float], clip: float, bit_noise: float) -> None:
    found = AdaptiveClip(0.5, 0.2, bit_noise).fraction(norms, clip, 20.0, np.random.default_rng(3))
    shorter = sum(0 < norm <= clip for norm in norms)
    longer = sum(clip < norm < math.inf for norm in norms)
    noise = bit_noise * np.random.default_rng(3).standard_normal()
    assert found == pytest.approx(0.5 + ((shorter - longer) / 2 + noise) / 20.0)


def test_bits_of_zero_and_one_would_cost_more_than_configured() -> None:
    """Negative control: what is not centred moves the count by 1, twice what Theorem 1 allows for."""
    z, bit_noise, clip = 1.0, 0.8, 2.0
    z_delta = split_noise(z, bit_noise)
    assert math.hypot(1 / z_delta, abs(count([clip], clip)) / bit_noise) == pytest.approx(1 / z)
    uncentred = (count([clip], clip) + 0.5) - 0
    assert math.hypot(1 / z_delta, uncentred / bit_noise) > 1.4 / z


def test_dividing_by_the_cohort_that_came_would_cost_more_than_configured() -> None:
    """Negative control: with everybody else below the clip, one user above it moves the ratio twice as far."""
    z, bit_noise, others = 1.0, 0.8, [1.0] * 99
    z_delta = split_noise(z, bit_noise)

    def shift(with_user: int, without: int) -> float:
        rng = np.random.default_rng(0)
        both = silent().fraction([*others, 5.0], 2.0, with_user, rng), silent().fraction(others, 2.0, without, rng)
        deviation = bit_noise / with_user
        return math.hypot(1 / z_delta, (both[0] - both[1]) / deviation)

    assert shift(100, 100) == pytest.approx(1 / z)
    assert shift(100, 99) > 1.4 / z


# ---------------------------------------------------------------- the clip


@pytest.mark.parametrize("start", [1e-3, 40.0])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_clip_finds_the_quantile(quantile: float, start: float) -> None:
    norms = np.random.default_rng(1).lognormal(size=400)
    adaptive, clip = silent(quantile), start
    rng = np.random.default_rng(0)
    for _ in range(300):
        clip = adaptive.next_clip(clip, adaptive.fraction(list(norms), clip, 400, rng))
    assert np.mean(norms <= clip) == pytest.approx(quantile, abs=0.01)


def test_the_clip_finds_the_quantile_under_noise() -> None:
    norms = list(np.random.default_rng(1).lognormal(size=400))
    adaptive, clip, seen = AdaptiveClip(0.5, 0.2, bit_noise=20.0), 30.0, []
    rng = np.random.default_rng(0)
    for _ in range(300):
        clip = adaptive.next_clip(clip, adaptive.fraction(norms, clip, 400, rng))
        seen.append(np.mean(np.array(norms) <= clip))
    assert np.mean(seen[100:]) == pytest.approx(0.5, abs=0.03)


@given(st.floats(1e-30, 1e30), st.floats(-0.5, 1.5), st.floats(0.01, 0.99), st.floats(0.01, 2))
def test_a_step_is_geometric(clip: float, fraction: float, quantile: float, rate: float) -> None:
    found = silent(quantile, rate).next_clip(clip, fraction)
    assert found == pytest.approx(clip * math.exp(-rate * (fraction - quantile)), rel=1e-12)
    if abs(fraction - quantile) > 1e-6:  # too many unclipped: a smaller clip
        assert (found < clip) == (fraction > quantile)


@pytest.mark.parametrize("fraction", [1e9, -1e9])
def test_a_clip_stays_finite_and_positive_however_wild_the_noise(fraction: float) -> None:
    clip = 1.0
    for _ in range(5):
        clip = silent().next_clip(clip, fraction)
        assert np.float32(clip) > 0
        assert np.isfinite(np.float32(clip))
    back = silent().next_clip(clip, -fraction)
    assert back != clip  # it can come back
