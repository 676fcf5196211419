"""Correlated noise over the rounds: a banded Toeplitz matrix mechanism of the DP-FTRL family, at user level.

Round t releases x_t + clip * z * y_t, where x_t is the sum of the clipped updates, z the noise multiplier and the rows
of Y are C^-1 Z with Z independent standard normal. That is C^-1 applied to C X + clip * z * Z, so only the Gaussian
mechanism on C X has to be accounted, with `sensitivity` in the place of one; updates may depend on earlier releases,
as C is lower triangular (Denisov et al., NeurIPS 2022, arXiv:2202.08312, Theorem 2.1). A round's noise partly takes
back that of the rounds before it, which the sum over rounds, the model, feels as less noise. No client sampling is
assumed or credited. With a clip that changes over the rounds, read x_t as the sum over the clip of its round, which is
public by then.

Rounds count from 1. C has c_0, c_1, ..., c_(bands - 1) down each column, cut off at the last round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpers.errors import ConfigError

Floats = NDArray[np.float64]


def coefficients(bands: int) -> Floats:
    """Return c_i = binom(2i, i) / 4^i for i < bands, shape (bands,): C is the square root of prefix sums, banded.

    The square root of the lower triangular matrix of ones has these entries on its diagonals; keeping the first few is
    the banded square root factorization (Kalinin and Lampert, NeurIPS 2024, arXiv:2405.13763). One band is independent
    noise. The c_i are positive and fall, so all zeros of their polynomial lie outside the unit circle (Enestrom and
    Kakeya) and the recurrence of `BandedNoise` does not blow up.

    Raises:
        ConfigError: fewer than one band.
    """
    if bands < 1:
        raise ConfigError(f"correlated noise with {bands} bands: give at least 1, which is independent noise.")
    i = np.arange(1, bands)
    return np.cumprod(np.concatenate([[1.0], (2 * i - 1) / (2 * i)]))


def sensitivity(coefficients: Floats, participations: Sequence[int], rounds: int) -> float:
    """L2 sensitivity of C X, in units of the clip, to zeroing out a user who took part in these rounds of `rounds`.

    With rows u_t, |u_t| <= 1, as the user's part of X, ||C X||^2 is the sum over s, t of <C_s, C_t> <u_s, u_t>, with
    C_t the columns of C; |<u_s, u_t>| <= 1 bounds it by the sum of |<C_s, C_t>|, whose root is returned. Where no
    coefficient is negative, as those of `coefficients`, one unit vector in all rounds attains the bound. The user may
    choose the rows with all earlier releases in view, the rounds not (Choquette-Choo et al., ICML 2023,
    arXiv:2211.06530, for participation schemas; NeurIPS 2023, arXiv:2306.08153, for bands).

    Args:
        coefficients: c_0, c_1, ..., shape (bands,).
        participations: distinct rounds, from 1; a user without any has sensitivity 0.
        rounds: number of rounds that are released; a column ends there.

    Raises:
        ValueError: a round is named twice or does not exist, so that the result would be too small.
    """
    taken = np.asarray(participations, dtype=np.int64)
    if len(np.unique(taken)) != len(taken) or np.any((taken < 1) | (taken > rounds)):
        raise ValueError(f"participations {list(participations)}: distinct rounds in 1..{rounds} are needed.")
    columns = np.zeros((len(taken), rounds))
    for column, start in zip(columns, taken - 1, strict=True):
        length = min(len(coefficients), rounds - start)
        column[start : start + length] = coefficients[:length]
    return float(np.sqrt(np.sum(np.abs(columns @ columns.T))))


class BandedNoise:
    """The rows y_t of C^-1 Z, one per round, from draws that can be repeated.

    Args:
        coefficients: c_0, c_1, ..., shape (bands,); c_0 is not zero.
        draw: independent standard normals z_t of round t, always the same for the same round. No other release may
            use them.
    """

    def __init__(self, coefficients: Floats, draw: Callable[[int], Floats]) -> None:
        self._coefficients, self._draw = coefficients, draw
        self._restart()

    def at(self, round: int) -> Floats:
        """Return y of a round (from 1), read-only, in the shape of the draws.

        It follows from the `bands - 1` rows before it. A round that is not the next one, as the first after a resume,
        is computed from round 1 on by the same operations, so it is the same bytes.

        Raises:
            ValueError: rounds count from 1.
        """
        if round < 1:
            raise ValueError(f"round {round}: rounds count from 1.")
        if round != self._done + 1:
            self._restart()
        while self._done < round - 1:
            self._step()
        return self._step()

    def _restart(self) -> None:
        self._done = 0
        self._rows: deque[Floats] = deque(maxlen=len(self._coefficients) - 1)  # the newest first

    def _step(self) -> Floats:
        # z_t = c_0 y_t + c_1 y_(t-1) + ..., solved for y_t
        row = np.array(self._draw(self._done + 1), dtype=np.float64)
        for coefficient, earlier in zip(self._coefficients[1:], self._rows, strict=False):  # fewer rows at the start
            row -= coefficient * earlier
        row /= self._coefficients[0]
        row.flags.writeable = False  # it is read again for later rounds
        self._rows.appendleft(row)
        self._done += 1
        return row


def error_factor(coefficients: Floats, patterns: Sequence[Sequence[int]], rounds: int) -> float:
    """Root mean squared error of all sums over rounds 1..t, over that of independent noise at equal privacy.

    ||A C^-1||_F sens(C) / (||A||_F sens(I)), A the lower triangular matrix of ones. Below 1 correlated noise is the
    better choice for the sums; independent noise is 1.

    Args:
        coefficients: c_0, c_1, ..., shape (bands,).
        patterns: rounds that users took part in; the most exposed user sets the noise of either mechanism.
        rounds: number of rounds.

    Raises:
        ValueError: nobody took part in any round, or `sensitivity` refuses a pattern.
    """
    worst = max((sensitivity(coefficients, pattern, rounds) for pattern in patterns), default=0.0)
    if worst == 0:
        raise ValueError("error_factor: nobody took part, so there is no noise to compare.")
    independent = max(sensitivity(np.ones(1), pattern, rounds) for pattern in patterns)
    impulse = BandedNoise(coefficients, lambda round: np.array(float(round == 1)))
    sums = np.cumsum([impulse.at(round) for round in range(1, rounds + 1)])  # first column of A C^-1, a Toeplitz matrix
    repeats = rounds - np.arange(rounds)  # of each entry, along its diagonal
    return float(np.sqrt(repeats @ sums**2) * worst / (np.sqrt(np.sum(repeats)) * independent))
