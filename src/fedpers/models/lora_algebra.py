"""Products of LoRA factors on the server: their exact mean, what averaging the factors loses, and new factors for them.

A module has factors A (rank, in) and B (out, rank); its update is scaling * B @ A, without the scaling here. float64
inside, float32 out; the SVD is of the small core that QR of both factors leaves. Results are as private as the factors:
of noised ones post-processing, of clients' own ones nothing to release. Each function raises ValueError if shapes do
not match or a number is not finite; other errors are named.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedpers.errors import ConfigError

Floats = NDArray[np.float64]
Factors = tuple[NDArray[np.float32], NDArray[np.float32]]

TIE = 1e-6  # float32 inputs: relative differences below this are rounding


def mean_product(As: ArrayLike, Bs: ArrayLike, weights: ArrayLike | None = None) -> NDArray[np.float32]:
    """Return the mean over clients of B_k @ A_k, shape (out, in), of rank up to clients * rank.

    As [w_1 B_1, ..., w_K B_K] @ [A_1; ...; A_K] (FLoRA, Wang et al., NeurIPS 2024, arXiv:2409.05976). As has shape
    (clients, rank, in), Bs (clients, out, rank), weights (clients,): not negative, divided by their sum; None: equal.
    """
    A, B = _stack(As, Bs, weights)
    return np.asarray(B @ A, dtype=np.float32)


def aggregation_error(As: ArrayLike, Bs: ArrayLike, combined: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Return |M - combined| / |M| in Frobenius norms: M is the mean product, combined (out, in) the next broadcast's.

    With combined = mean(B) @ mean(A) the numerator is the residual of FedEx-LoRA (Singhal et al., ACL 2025,
    arXiv:2410.09432), zero if all clients have the same A (FFA-LoRA, Sun et al., ICLR 2024, arXiv:2403.12313) or the
    same B (in turn: RoLoRA, arXiv:2502.01755). Other arguments as for `mean_product`. 0.0 if M and combined are zero up
    to float64 rounding; nan, never inf, if only M is: there is nothing to be relative to.
    """
    A, B = _stack(As, Bs, weights)
    mean, sent, rounding = B @ A, _finite("combined", combined, 2), _rounding(A, B)
    if sent.shape != mean.shape:
        raise ValueError(f"combined has shape {sent.shape}, the mean product {mean.shape}.")
    if np.linalg.norm(mean) <= rounding:
        return 0.0 if np.linalg.norm(sent) <= rounding else float("nan")
    return float(np.linalg.norm(mean - sent) / np.linalg.norm(mean))


def effective_rank(A: ArrayLike, B: ArrayLike) -> float:
    """Return exp of the entropy (nats) of B @ A's singular values over their sum, 1 to the rank; of a zero product 0.0.

    Roy and Vetterli, EUSIPCO 2007, section 2. A has shape (rank, in), B (out, rank).
    """
    _, values, _ = _svd(*_pair(A, B))
    shares = values / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares)))) if len(values) else 0.0


def orthonormal_factors(A: ArrayLike, B: ArrayLike) -> Factors:
    """Return A' (rank, in) with orthonormal rows, right singular vectors, and B' = U S (out, rank): B' @ A' = B @ A.

    The server step of FedSVD (Lee et al., NeurIPS 2025, arXiv:2505.12805). Rows that the product does not fix come last
    and have zero columns in B': old rows of A in order, made orthogonal to those before (Gram-Schmidt, so with the old
    sense), then unit vectors if A has too few independent rows. The first largest entry of a singular vector is
    positive, so machines agree up to rounding, and the step leaves its own result as it is; but of (nearly) equal
    singular values only the space of their vectors is determined. Raises ConfigError if the rank exceeds the inputs.
    """
    A, B = _pair(A, B)
    rank, inputs = A.shape
    if rank > inputs:
        raise ConfigError(f"model.adapter.rank = {rank}: a layer has {inputs} inputs only; give at most that many.")
    U, values, rows = _svd(A, B)
    # The first `rank` unit vectors suffice: fewer than `rank` orthonormal rows cannot span them all.
    for candidate in (*A, *np.eye(rank, inputs)):
        rest = candidate - (rows @ candidate) @ rows
        norm = np.linalg.norm(rest)
        if len(rows) < rank and norm > TIE * np.linalg.norm(candidate):
            rows = np.vstack([rows, rest / norm])
    return rows.astype(np.float32), _widen(U * values, rank)


def truncate(A_stack: ArrayLike, B_stack: ArrayLike, rank: int, spare: ArrayLike) -> Factors:
    """Return A' = sqrt(S) V^T (rank, in), B' = U sqrt(S) (out, rank), as near to B_stack @ A_stack as any of that rank.

    Frobenius norm (Eckart and Young 1936); FlexLoRA (Bai et al., NeurIPS 2024, arXiv:2402.11505) does so with the mean
    product. A_stack is (total, in), B_stack (out, total), with any weights within. If the product has rank k < `rank`,
    rows k, k + 1, ... of A' are those of `spare` (rank, in), for example of the last broadcast's A, beside zero columns
    of B': the product is exact, and the columns can be trained, as beside zero rows they could not (ValueError if such
    a row is zero). Signs, and what machines agree on, as for `orthonormal_factors`.
    """
    A, B = _pair(A_stack, B_stack)
    rest = _finite("spare", spare, 2)
    if rank < 1 or rest.shape != (rank, A.shape[1]):
        raise ValueError(f"truncate to rank {rank}: spare has shape {rest.shape}, ({rank}, {A.shape[1]}) is needed.")
    U, values, rows = _svd(A, B)
    roots, rest = np.sqrt(values[:rank]), rest[len(values) :]
    if not rest.any(axis=1).all():
        raise ValueError(f"spare: a row from {len(values)} on is zero, so nobody could train it; give other rows.")
    rows = np.vstack([roots[:, None] * rows[:rank], rest])
    return rows.astype(np.float32), _widen(U[:, :rank] * roots, rank)


def _svd(A: Floats, B: Floats) -> tuple[Floats, Floats, Floats]:
    """U (out, k), S (k,), V^T (k, in) of B @ A without what is zero up to rounding, signs fixed by V^T."""
    Q_out, R_out = np.linalg.qr(B)
    Q_in, R_in = np.linalg.qr(A.T)
    U, values, rows = np.linalg.svd(R_out @ R_in.T, full_matrices=False)
    k = int(np.sum(values > _rounding(A, B)))
    U, values, rows = Q_out @ U[:, :k], values[:k], rows[:k] @ Q_in.T
    sizes = np.abs(rows)
    # Of entries that differ by rounding only, the first: which of them is larger could change with the machine.
    largest = np.argmax(sizes >= (1 - TIE) * sizes.max(axis=1, keepdims=True), axis=1)
    signs = np.sign(rows[np.arange(k), largest])
    return U * signs, values, rows * signs[:, None]


def _rounding(A: Floats, B: Floats) -> float:
    """B @ A is float64 rounding up to this Frobenius norm, as the sum of the b_j a_j^T, each rounded in its size."""
    terms = np.linalg.norm(B, axis=0) * np.linalg.norm(A, axis=1)
    return float(np.finfo(np.float64).eps * max(*A.shape, *B.shape) * terms.sum())


def _widen(B: Floats, rank: int) -> NDArray[np.float32]:
    return np.pad(B, ((0, 0), (0, rank - B.shape[1]))).astype(np.float32)


def _stack(As: ArrayLike, Bs: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats]:
    A, B = _finite("As", As, 3), _finite("Bs", Bs, 3)
    shares = np.ones(len(A)) if weights is None else _finite("weights", weights, 1)
    if len(shares) != len(A) or np.any(shares < 0) or not shares.any():
        raise ValueError(f"weights: {len(A)} numbers are needed, none below 0 and not all 0.")
    if B.shape[::2] != A.shape[:2]:
        raise ValueError(f"As {A.shape} and Bs {B.shape}: (clients, rank, in) and (clients, out, rank) are needed.")
    return np.concatenate(A), np.concatenate(B * (shares / shares.sum())[:, None, None], axis=1)


def _pair(A: ArrayLike, B: ArrayLike) -> tuple[Floats, Floats]:
    rows, columns = _finite("A", A, 2), _finite("B", B, 2)
    if len(rows) != columns.shape[1]:
        raise ValueError(f"A {rows.shape} and B {columns.shape}: (rank, in) and (out, rank) are needed.")
    return rows, columns


def _finite(name: str, values: ArrayLike, dimensions: int) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{name}: {dimensions} dimensions of finite numbers are needed, not shape {array.shape}.")
    return array
