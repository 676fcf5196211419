"""LoRA products on the server: exact, orthonormal, nearest, and the same for the same input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import entropy

from fedpers.errors import ConfigError
from fedpers.models.lora_algebra import aggregation_error, effective_rank, mean_product, orthonormal_factors, truncate

Array = NDArray[np.float32]
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 7)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def cohort(seed: int, clients: int = 3, rank: int = 2, inputs: int = 5, outputs: int = 4) -> tuple[Array, Array]:
    return normal(seed, clients, rank, inputs), normal(seed + 1, clients, outputs, rank)


@st.composite
def factors(draw: st.DrawFn) -> tuple[Array, Array, int]:
    """A, B and a bound on the rank of their product, often below that of the factors, with rank <= inputs."""
    inputs, outputs, seed = draw(sizes), draw(sizes), draw(seeds)
    rank = draw(st.integers(1, inputs))
    keep = draw(st.integers(0, rank))
    A, B = normal(seed, rank, inputs), normal(seed + 1, outputs, keep) @ normal(seed + 2, keep, rank)
    A[draw(st.integers(0, rank - 1))] = A[0]  # two equal rows, unless it is row 0
    return A, B, min(keep, outputs)


def close(one: NDArray[np.floating], other: NDArray[np.floating]) -> bool:
    return bool(np.linalg.norm(one - other) <= 1e-5 * (1 + np.linalg.norm(other)))


@given(seeds, sizes, sizes, sizes, sizes)
def test_the_mean_product_is_the_mean_of_products(seed: int, clients: int, rank: int, inputs: int, out: int) -> None:
    As, Bs = cohort(seed, clients, rank, inputs, out)
    weights = 0.1 + np.random.default_rng(seed).random(clients)
    products = np.array([B.astype(float) @ A for A, B in zip(As, Bs, strict=True)])
    assert close(mean_product(As, Bs), products.mean(axis=0))
    assert close(mean_product(As, Bs, weights), np.average(products, axis=0, weights=weights))
    assert close(mean_product(As[::-1], Bs[::-1], weights[::-1]), mean_product(As, Bs, weights))
    assert aggregation_error(As, Bs, mean_product(As, Bs, weights), weights) < 1e-6


@given(seeds)
def test_averaging_the_factors_is_exact_only_if_one_of_them_is_shared(seed: int) -> None:
    As, Bs = cohort(seed)
    for shared_As, shared_Bs in ((As[[0, 0, 0]], Bs), (As, Bs[[0, 0, 0]])):
        combined = shared_Bs.mean(axis=0, dtype=float) @ shared_As.mean(axis=0, dtype=float)
        assert aggregation_error(shared_As, shared_Bs, combined) < 1e-12
    combined, mean = Bs.mean(axis=0) @ As.mean(axis=0), np.einsum("kor,kri->oi", Bs, As) / 3
    error = aggregation_error(As, Bs, combined)
    assert error == pytest.approx(np.linalg.norm(mean - combined) / np.linalg.norm(mean), rel=1e-3)
    assert error > 1e-3
    assert aggregation_error(As[::-1], Bs[::-1], combined) == pytest.approx(error, rel=1e-9)


def test_the_error_of_a_zero_mean_is_zero_or_undefined_but_never_infinite() -> None:
    (As, Bs), zero = cohort(0), np.zeros((4, 5))
    assert aggregation_error(As, 0 * Bs, zero) == 0
    assert np.isnan(aggregation_error(As, 0 * Bs, zero + 1))
    A, B = As[0].astype(float), Bs[0].astype(float)
    cancelling = np.array([A, np.pi * A, A]), np.array([B, B / np.pi, -2 * B])
    assert mean_product(*cancelling).any()  # rounding, which is no error
    assert aggregation_error(*cancelling, zero) == 0
    assert aggregation_error(As, Bs, zero) == pytest.approx(1)


@given(seeds, st.integers(1, 6))
def test_effective_rank(seed: int, rank: int) -> None:
    A, B = normal(seed, rank, 6), normal(seed + 1, 8, rank)
    assert effective_rank(np.eye(rank), np.eye(rank)) == pytest.approx(rank)
    assert effective_rank(A, np.outer(B[:, 0], A[:, 0])) == pytest.approx(1, abs=1e-4)
    assert effective_rank(A, 0 * B) == 0
    assert effective_rank(np.concatenate([A, A]), np.concatenate([B, -B], axis=1)) == 0  # the product, not the factors
    values = np.linalg.svd(B.astype(float) @ A, compute_uv=False)[:rank]
    assert effective_rank(-5 * A, B) == pytest.approx(np.exp(entropy(values)), rel=1e-6)


@given(factors())
def test_new_factors_keep_the_product_with_orthonormal_rows(given_factors: tuple[Array, Array, int]) -> None:
    A, B, bound = given_factors
    rows, columns = orthonormal_factors(A, B)
    assert close(columns @ rows, B.astype(float) @ A)
    assert np.allclose(rows @ rows.T, np.eye(len(A)), atol=1e-5)
    values = np.pad(np.linalg.svd(B.astype(float) @ A, compute_uv=False)[:bound], (0, len(A) - bound))
    assert close(columns.T @ columns, np.diag(values**2))  # as of U S: orthogonal columns, the longest first
    if np.linalg.cond(A) < 1e3:
        assert np.allclose(rows @ np.linalg.pinv(A) @ A, rows, atol=1e-3)  # in the old row space, spare rows too
    assert all(map(np.array_equal, orthonormal_factors(A.copy(), B.copy()), (rows, columns)))


@given(seeds, st.integers(1, 5))
def test_a_square_module_and_signs_that_follow_from_the_product(seed: int, rank: int) -> None:
    A, B = normal(seed, rank, rank), normal(seed + 1, rank, rank)
    rows, columns = orthonormal_factors(A, B)
    assert np.all(rows[np.arange(rank), np.abs(rows).argmax(axis=1)] > 0)
    if np.diff(-np.linalg.svd(B @ A, compute_uv=False), append=0).min() > 1e-2:
        for same in ((-A[::-1], -B[:, ::-1]), (rows, columns)):
            assert np.allclose(orthonormal_factors(*same)[0], rows, atol=1e-3)
    for tied in (3.0, 3 + 1e-6, 3 - 1e-6):  # rounding does not choose the sign
        assert np.allclose(orthonormal_factors([[0, -3, tied]], [[2]])[0], [[0, 0.5**0.5, -(0.5**0.5)]])


def test_a_zero_product_keeps_orthonormal_rows_and_zero_rows_become_unit_vectors() -> None:
    rows, columns = orthonormal_factors(normal(0, 3, 6), np.zeros((4, 3)))
    assert not columns.any()
    assert np.allclose(orthonormal_factors(-rows, columns)[0], -rows, atol=1e-6)
    assert np.array_equal(orthonormal_factors(np.zeros((2, 3)), np.zeros((4, 2)))[0], np.eye(2, 3))
    with pytest.raises(ConfigError, match="3 inputs"):
        orthonormal_factors(normal(0, 4, 3), normal(0, 5, 4))


@given(seeds, sizes, sizes, sizes, sizes)
def test_truncation_is_nearest_and_fills_with_spare_rows(seed: int, n: int, inputs: int, out: int, rank: int) -> None:
    A, B, spare = normal(seed, n, inputs), normal(seed + 1, out, n), normal(seed + 2, rank, inputs)
    rows, columns = truncate(A, B, rank, spare)
    U, values, Vt = np.linalg.svd(B.astype(float) @ A, full_matrices=False)
    k = min(n, inputs, out, rank)
    assert close(columns @ rows, (U[:, :k] * values[:k]) @ Vt[:k])
    assert np.allclose(np.linalg.norm(rows[:k], axis=1), np.linalg.norm(columns[:, :k], axis=0), atol=1e-4)  # balanced
    assert np.array_equal(rows[k:], spare[k:])
    assert not columns[:, k:].any()
    assert np.array_equal(truncate(A, 0 * B, rank, spare)[0], spare)
    with pytest.raises(ValueError, match="nobody could train"):
        truncate(A, 0 * B, rank, 0 * spare)


def test_what_cannot_be_meant_is_refused() -> None:
    As, Bs = cohort(0)
    for Bs_, weights in ((Bs, [1, 1]), (Bs, [1, -1, 1]), (Bs, [0, 0, 0]), (Bs, [1, 1, np.nan]), (Bs[:2], None)):
        with pytest.raises(ValueError, match="are needed"):
            mean_product(As, Bs_, weights)
    with pytest.raises(ValueError, match="combined"):
        aggregation_error(As, Bs, np.zeros((5, 4)))
    for bad_A, bad_B in ((As[0] * np.inf, Bs[0]), (As[0], Bs[0].T), (As[0], Bs)):
        with pytest.raises(ValueError, match="are needed"):
            orthonormal_factors(bad_A, bad_B)
    with pytest.raises(ValueError, match="spare"):
        truncate(As[0], Bs[0], 2, As[0][:1])
