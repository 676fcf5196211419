"""Correlated noise: against dense linear algebra, and its sensitivity against users who try to exceed it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from fedpers.errors import ConfigError
from fedpers.privacy.matrix_noise import BandedNoise, coefficients, error_factor, sensitivity
from fedpers.privacy.mechanisms import standard_normals, unflatten
from fedpers.privacy.randomness import generator

KEY = bytes(range(32))
SIZE = 7


def dense(c: np.ndarray, rounds: int) -> np.ndarray:
    """The matrix C."""
    column = np.zeros(rounds)
    column[: len(c)] = c[:rounds]
    return scipy.linalg.toeplitz(column, np.zeros(rounds))


def draw(round: int) -> np.ndarray:
    return generator(KEY, "user-noise", round).standard_normal(SIZE)


@st.composite
def schemas(draw_from: st.DrawFn) -> tuple[int, int, list[int]]:
    """Bands, rounds and the rounds that a user took part in."""
    rounds = draw_from(st.integers(1, 7))
    taken = draw_from(st.lists(st.integers(1, rounds), min_size=1, unique=True))
    return draw_from(st.integers(1, 9)), rounds, taken


# ---------------------------------------------------------------- the matrix


def test_coefficients_are_those_of_the_square_root_of_prefix_sums() -> None:
    np.testing.assert_allclose(coefficients(30), [math.comb(2 * i, i) / 4**i for i in range(30)], rtol=1e-13)
    root = dense(coefficients(12), 12)
    np.testing.assert_allclose(root @ root, np.tri(12), atol=1e-12)
    np.testing.assert_array_equal(coefficients(1), [1.0])
    with pytest.raises(ConfigError, match="at least 1"):
        coefficients(0)


@pytest.mark.parametrize("c", [*map(coefficients, (1, 2, 5, 40)), np.array([2.0, -1.0, 0.5])], ids=len)
def test_the_recurrence_applies_the_inverse(c: np.ndarray) -> None:
    rounds = 12
    noise = BandedNoise(c, draw)
    rows = np.stack([noise.at(t) for t in range(1, rounds + 1)])
    z = np.stack([draw(t) for t in range(1, rounds + 1)])
    np.testing.assert_allclose(dense(c, rounds) @ rows, z, atol=1e-12)
    # as a linear map: unit draws show C^-1 itself, so the covariance of a column of Y is (C^T C)^-1
    unit = BandedNoise(c, lambda t: np.eye(rounds)[t - 1])
    inverse = np.stack([unit.at(t) for t in range(1, rounds + 1)])
    matrix = dense(c, rounds)
    np.testing.assert_allclose(inverse @ matrix, np.eye(rounds), atol=1e-12)
    np.testing.assert_allclose(inverse @ inverse.T, np.linalg.inv(matrix.T @ matrix), atol=1e-10)


def test_the_noise_has_the_covariance_of_the_closed_form() -> None:
    rounds, c, size = 6, coefficients(3), 200_000
    noise = BandedNoise(c, lambda t: generator(KEY, "wide", t).standard_normal(size))
    rows = np.stack([noise.at(t) for t in range(1, rounds + 1)])
    matrix = dense(c, rounds)
    np.testing.assert_allclose(rows @ rows.T / size, np.linalg.inv(matrix.T @ matrix), atol=6 * 2 / math.sqrt(size))


def test_noise_stays_bounded_over_many_rounds() -> None:
    unit = BandedNoise(coefficients(8), lambda t: np.array([float(t == 1)]))
    response = np.array([unit.at(t)[0] for t in range(1, 2001)])
    assert np.abs(response).max() == 1
    assert np.abs(response[1000:]).max() < 1e-12


def test_any_order_and_a_resume_give_the_same_bytes() -> None:
    whole = BandedNoise(coefficients(4), draw)
    rows = {t: whole.at(t) for t in range(1, 11)}
    for start in (1, 4, 10):
        resumed = BandedNoise(coefficients(4), draw)
        for t in range(start, 11):
            assert resumed.at(t).tobytes() == rows[t].tobytes()
    for t in (3, 3, 9, 1, 2, 10):
        assert whole.at(t).tobytes() == rows[t].tobytes()
    with pytest.raises(ValueError, match="count from 1"):
        whole.at(0)


def test_a_row_cannot_be_changed_under_later_rounds() -> None:
    noise = BandedNoise(coefficients(3), draw)
    with pytest.raises(ValueError, match="read-only"):
        noise.at(1)[0] = 0


def test_one_band_is_independent_noise_to_the_byte() -> None:
    shapes = {"b": (2, 2), "a": (3,)}
    noise = BandedNoise(coefficients(1), draw)
    for t in (1, 2, 3):
        independent = standard_normals(shapes, generator(KEY, "user-noise", t))
        for name, array in unflatten(noise.at(t), shapes).items():
            assert array.tobytes() == independent[name].tobytes()


# ---------------------------------------------------------------- sensitivity


def moved(c: np.ndarray, rounds: int, taken: Sequence[int], rows: np.ndarray) -> float:
    """How far a user with these contributions, shape (participations, dimensions), moves C X."""
    part = np.zeros((rounds, rows.shape[1]))
    part[np.array(taken) - 1] = rows
    return float(np.linalg.norm(dense(c, rounds) @ part))


@given(schemas())
def test_sensitivity_is_the_largest_shift_over_all_signs(schema: tuple[int, int, list[int]]) -> None:
    """A convex function of the contributions is largest where each is +1 or -1, so this maximum is exact in 1-d."""
    bands, rounds, taken = schema
    c = coefficients(bands)
    signs = itertools.product([-1.0, 1.0], repeat=len(taken))
    worst = max(moved(c, rounds, taken, np.array(sign)[:, None]) for sign in signs)
    assert sensitivity(c, taken, rounds) == pytest.approx(worst, rel=1e-12)


@given(schemas(), st.booleans(), st.integers(0, 2**32 - 1))
def test_no_vectors_exceed_the_sensitivity(schema: tuple[int, int, list[int]], mixed: bool, seed: int) -> None:
    """Also for coefficients of mixed signs; block ascent from a random start makes the user as harmful as it gets."""
    bands, rounds, taken = schema
    rng = np.random.default_rng(seed)
    c = coefficients(bands) * (rng.choice([-1.0, 1.0], bands) if mixed else 1)
    columns = dense(c, rounds)[:, np.array(taken) - 1]
    gram = columns.T @ columns
    rows = rng.standard_normal((len(taken), 3))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for _ in range(20):
        for i in range(len(taken)):
            pull = gram[i] @ rows - gram[i, i] * rows[i]
            rows[i] = pull / np.linalg.norm(pull) if np.linalg.norm(pull) > 1e-9 else rows[i]
    bound = sensitivity(c, taken, rounds)
    assert moved(c, rounds, taken, rows) <= bound * (1 + 1e-12)
    if not mixed:
        assert moved(c, rounds, taken, rows) == pytest.approx(bound, rel=1e-2)


def test_sensitivity_has_known_special_cases() -> None:
    c = coefficients(4)
    column = float(np.linalg.norm(c))
    assert sensitivity(c, [1, 5, 9], 12) == pytest.approx(math.sqrt(3) * column)  # disjoint bands
    assert sensitivity(c, [1, 5, 10], 10) == pytest.approx(math.sqrt(2 * column**2 + 1))  # the last column is cut off
    assert sensitivity(c, [9, 1, 5], 12) == sensitivity(c, [1, 5, 9], 12)
    assert sensitivity(coefficients(1), [1, 2, 3, 7], 9) == pytest.approx(2)
    assert sensitivity(c, [], 9) == 0


@pytest.mark.parametrize("taken", [[2, 2], [0, 1], [5]])
def test_rounds_that_cannot_be_are_refused(taken: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct rounds"):
        sensitivity(coefficients(2), taken, 4)


def test_counting_participations_alone_would_claim_too_little() -> None:
    """Negative control: sqrt(k), right for independent noise, is exceeded as soon as bands overlap."""
    rounds = 8
    every = list(range(1, rounds + 1))
    assert moved(coefficients(1), rounds, every, np.ones((rounds, 1))) == pytest.approx(math.sqrt(rounds))
    for bands in (2, 4, 8):
        assert moved(coefficients(bands), rounds, every, np.ones((rounds, 1))) > 1.4 * math.sqrt(rounds)


# ---------------------------------------------------------------- what it is good for


@pytest.mark.parametrize("bands", [1, 3, 9, 20])
def test_error_factor_agrees_with_dense_matrices(bands: int) -> None:
    rounds, c = 9, coefficients(bands)
    sums, matrix = np.tri(rounds), dense(c, rounds)
    patterns = [[1, 4, 7], [2], [8, 9]]
    worst = max(np.sqrt(np.abs((matrix.T @ matrix)[np.ix_(p, p)]).sum()) for p in ([0, 3, 6], [1], [7, 8]))
    expected = np.linalg.norm(sums @ np.linalg.inv(matrix)) * worst / (np.linalg.norm(sums) * math.sqrt(3))
    assert error_factor(c, patterns, rounds) == pytest.approx(expected, rel=1e-12)


def test_correlated_noise_helps_if_users_come_seldom() -> None:
    rounds = 32
    assert error_factor(coefficients(1), [[1, 9], [4]], rounds) == pytest.approx(1)
    assert error_factor(coefficients(8), [[1, 9, 17, 25]], rounds) < 0.6
    assert error_factor(coefficients(rounds), [[1]], rounds) < error_factor(coefficients(4), [[1]], rounds) < 1
    assert error_factor(coefficients(8), [list(range(1, rounds + 1))], rounds) > 1
    with pytest.raises(ValueError, match="nobody"):
        error_factor(coefficients(2), [[]], rounds)
