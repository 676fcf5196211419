"""The aggregation at user level: one order (clip, sum, noise, divide) for three origins of noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedpers.errors import ConfigError
from fedpers.privacy.mechanisms import (
    Aggregate,
    clip_update,
    gaussian_mean,
    noise_share,
    standard_normals,
    unflatten,
)

SHAPES = {"head.w": (2, 3), "adapter.b": (4,), "adapter.a": (2, 1), "head.c": ()}
Update = dict[str, np.ndarray]

updates = st.fixed_dictionaries(
    {name: arrays(np.float32, shape, elements=st.floats(-1e4, 1e4, width=32)) for name, shape in SHAPES.items()}
)


def group(name: str) -> str:
    return name.split(".")[0]


def some(count: int, seed: int = 0, scale: float = 1.0) -> list[Update]:
    rng = np.random.default_rng(seed)
    return [{n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()} for _ in range(count)]


def flat(arrays: Any) -> np.ndarray:
    return np.concatenate([np.ravel(arrays[name]).astype(np.float64) for name in sorted(arrays)])


def aggregate(received: list[Update], **changes: Any) -> Aggregate:
    options: dict[str, Any] = {"clip": 1.5, "noise_multiplier": 0.0, "denominator": 4.0, "noise": None, **changes}
    return gaussian_mean(received, SHAPES, group, **options)


# ---------------------------------------------------------------- independent noise, as ever


@pytest.mark.parametrize("count", [0, 5])
def test_the_default_path_is_the_same_bytes_as_its_definition(count: int) -> None:
    clip, z, denominator = 1.5, 0.7, 3.2
    received = some(count)
    found = aggregate(
        received,
        noise_multiplier=z,
        denominator=denominator,
        noise=standard_normals(SHAPES, np.random.default_rng(11)),
    )
    rng = np.random.default_rng(11)
    for name in sorted(SHAPES):
        total = np.zeros(SHAPES[name])
        for update in received:
            norm = np.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in update.values()))
            total += update[name].astype(np.float64) * min(1.0, clip / norm)
        noise = z * clip * rng.standard_normal(SHAPES[name])
        assert found.mean[name].tobytes() == ((total + noise) / denominator).astype(np.float32).tobytes()
        assert found.mean[name].dtype == np.float32


def test_a_vector_is_cut_in_the_order_of_names() -> None:
    rng = np.random.default_rng(2)
    one_by_one = {name: rng.standard_normal(SHAPES[name]) for name in sorted(SHAPES)}
    cut = unflatten(np.random.default_rng(2).standard_normal(13), SHAPES)
    assert list(cut) == sorted(SHAPES)
    for name, array in standard_normals(SHAPES, np.random.default_rng(2)).items():
        assert array.shape == SHAPES[name]
        assert array.tobytes() == cut[name].tobytes() == one_by_one[name].tobytes()
    with pytest.raises(ValueError, match="13 entries"):
        unflatten(np.zeros(12), SHAPES)


def test_what_the_simulator_sees() -> None:
    small, large, broken = some(3)
    small = {name: array * np.float32(1e-3) for name, array in small.items()}
    broken["adapter.b"][1] = np.nan
    noise = standard_normals(SHAPES, np.random.default_rng(0))
    found = aggregate([small, large, broken], noise_multiplier=2.0, noise=noise)
    expected = float(np.linalg.norm(flat(small))), float(np.linalg.norm(flat(large)))
    assert found.norms == pytest.approx((*expected, math.inf))
    assert (found.clipped, found.nonfinite) == (1, 1)
    assert found.median_norm == pytest.approx(np.mean(expected))
    squares = {g: sum(np.sum(noise[n] ** 2) for n in SHAPES if group(n) == g) for g in ("adapter", "head")}
    assert found.noise == pytest.approx({g: 2.0 * 1.5 * math.sqrt(s) / 4.0 for g, s in squares.items()})
    quiet = aggregate([small, large, broken])
    assert math.hypot(*quiet.signal.values()) == pytest.approx(np.linalg.norm(flat(quiet.mean)))
    assert quiet.signal == found.signal
    assert set(quiet.noise.values()) == {0.0}
    empty = aggregate([])
    assert (empty.norms, empty.clipped, empty.nonfinite) == ((), 0, 0)
    assert math.isnan(empty.median_norm)


# ---------------------------------------------------------------- clipping


@given(updates, st.floats(1e-3, 1e3))
def test_per_layer_every_array_keeps_its_direction_and_its_share_of_the_bound(update: Update, bound: float) -> None:
    kept, norm = clip_update(update, bound, per_layer=True)
    assert norm == pytest.approx(np.linalg.norm(flat(update)), rel=1e-6)
    limit = bound / math.sqrt(len(update))
    for name, array in update.items():
        length = float(np.linalg.norm(array.astype(np.float64)))
        assert np.linalg.norm(kept[name]) == pytest.approx(min(length, limit), rel=1e-9)
        np.testing.assert_allclose(kept[name] * length, array * np.linalg.norm(kept[name]), rtol=1e-6, atol=1e-12)
    assert np.linalg.norm(flat(kept)) <= bound * (1 + 1e-12)


@given(st.lists(updates, min_size=1, max_size=4), st.data(), st.floats(1e-2, 1e3), st.booleans())
def test_removing_a_user_moves_the_sum_by_no_more_than_the_clip(
    received: list[Update], data: st.DataObject, clip: float, per_layer: bool
) -> None:
    gone = data.draw(st.integers(0, len(received) - 1))
    kept = [flat(clip_update(update, clip, per_layer)[0]) for update in received]
    moved = sum(kept) - sum([k for i, k in enumerate(kept) if i != gone], np.zeros(13))
    assert np.linalg.norm(moved) <= clip * (1 + 1e-9)
    found = aggregate(received, clip=clip, per_layer=per_layer)  # and this sum is what gets divided
    np.testing.assert_allclose(flat(found.mean) * 4.0, sum(kept), rtol=1e-6, atol=1e-6 * clip)


def test_layers_clipped_to_the_whole_bound_would_exceed_it() -> None:
    """Negative control: without the root of the number of layers the joint norm is too long."""
    (update,) = some(1, scale=100.0)
    kept = [clip_update({name: array}, 1.5, per_layer=True)[0] for name, array in update.items()]
    assert np.linalg.norm(np.concatenate([flat(one) for one in kept])) == pytest.approx(1.5 * 2)
    assert np.linalg.norm(flat(clip_update(update, 1.5, per_layer=True)[0])) == pytest.approx(1.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("per_layer", [False, True])
def test_one_bad_number_in_one_layer_zeroes_the_whole_user(per_layer: bool, bad: float) -> None:
    good, spoilt = some(2)
    spoilt["head.c"] = np.array(bad, dtype=np.float32)
    kept, norm = clip_update(spoilt, 1.5, per_layer)
    assert norm == math.inf
    assert not np.any(flat(kept))
    with_user = aggregate([good, spoilt], per_layer=per_layer)
    np.testing.assert_array_equal(flat(with_user.mean), flat(aggregate([good], per_layer=per_layer).mean))


def test_a_user_with_one_long_layer_counts_as_clipped() -> None:
    update = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    update["adapter.b"][0] = 1.0  # within 1.5, beyond 1.5 / 2
    assert aggregate([update]).clipped == 0
    found = aggregate([update], per_layer=True)
    assert found.clipped == 1
    assert found.norms == (1.0,)
    assert found.mean["adapter.b"][0] == pytest.approx(0.75 / 4)


# ---------------------------------------------------------------- noise that the users bring along


def test_shares_of_all_honest_clients_add_up_to_the_full_noise() -> None:
    clip, z, honest, shapes = 1.5, 0.8, 5, {"a": (300, 100), "b": (70_000,)}
    shares = [flat(noise_share(shapes, clip, z, honest, np.random.default_rng([3, i]))) for i in range(honest)]
    size = len(shares[0])
    wide = 6 / math.sqrt(2 * size)  # six deviations of an estimated deviation
    for share in shares:
        assert share.std() == pytest.approx(z * clip / math.sqrt(honest), rel=wide)
    assert sum(shares).std() == pytest.approx(z * clip, rel=wide)
    # Negative control: with one honest client fewer than assumed the noise is too small, and it shows.
    assert sum(shares[1:]).std() == pytest.approx(z * clip * math.sqrt(4 / 5), rel=wide)
    assert sum(shares[1:]).std() < z * clip * (1 - wide)
    assert abs(np.corrcoef(shares)[0, 1]) < 6 / math.sqrt(size)


def test_a_client_that_trusts_nobody_adds_everything() -> None:
    local = noise_share(SHAPES, 1.5, 0.8, 1, np.random.default_rng(4))
    central = aggregate(
        [], noise_multiplier=0.8, denominator=1.0, noise=standard_normals(SHAPES, np.random.default_rng(4))
    )
    np.testing.assert_array_equal(flat(local).astype(np.float32), flat(central.mean).astype(np.float32))
    assert {name: array.shape for name, array in local.items()} == SHAPES
    with pytest.raises(ConfigError, match="at least 1"):
        noise_share(SHAPES, 1.5, 0.8, 0, np.random.default_rng(4))


def test_updates_with_shares_are_summed_as_they_are() -> None:
    sent = []
    for i, update in enumerate(some(3, scale=5.0)):
        kept, _ = clip_update(update, 1.5)
        share = noise_share(SHAPES, 1.5, 10.0, 3, np.random.default_rng(i))
        sent.append({name: (kept[name] + share[name]).astype(np.float32) for name in SHAPES})
    found = aggregate(sent, clip=math.inf)
    np.testing.assert_allclose(flat(found.mean), sum(flat(one) for one in sent) / 4.0, rtol=1e-6, atol=1e-7)
    assert found.clipped == 0
    assert set(found.noise.values()) == {0.0}  # none was added here
    # Negative control: clipped once more, the shares would shrink with the updates and no longer add up.
    again = aggregate(sent, clip=1.5)
    assert again.clipped == 3
    assert np.linalg.norm(flat(again.mean)) < 0.5 * np.linalg.norm(flat(found.mean))


# ---------------------------------------------------------------- what would be a false claim


def test_calls_that_would_add_less_noise_than_they_say_are_refused() -> None:
    noise = standard_normals(SHAPES, np.random.default_rng(0))
    with pytest.raises(ValueError, match="needs noise"):
        aggregate(some(1), noise_multiplier=1.0, noise=None)
    with pytest.raises(ValueError, match="noise a clip"):
        aggregate(some(1), clip=math.inf, noise=noise)
    one_number = {**noise, "head.w": noise["head.w"][:1, :1]}  # would be spread over the whole array
    with pytest.raises(ValueError, match="shapes"):
        aggregate(some(1), noise_multiplier=1.0, noise=one_number)
    missing = {name: array for name, array in noise.items() if name != "head.c"}
    with pytest.raises(ValueError, match="shapes"):
        aggregate(some(1), noise_multiplier=1.0, noise=missing)


def test_an_update_that_would_be_spread_over_the_sum_is_refused() -> None:
    (update,) = some(1)
    with pytest.raises(ValueError, match="shapes"):
        aggregate([{**update, "head.w": np.full((1, 1), 1.0, np.float32)}])
