"""Which clients take part in a round; the accounting credits exactly the sampler that is run here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedpers.privacy.randomness import order, seed_key, uniforms

ClientSampling = Literal["poisson", "fixed", "cyclic"]
_TURNS = seed_key(0)


def draw(
    sampling: ClientSampling, rate: float, users: Sequence[str], key: bytes, round_number: int
) -> NDArray[np.int64]:
    """Return the positions of the clients of a round, ascending.

    poisson: each client independently with probability `rate`, by a coin of its own id. fixed: `cohort_size` clients,
    drawn without replacement. cyclic: client groups take turns in a public order by id, so that a client comes back
    every `period` rounds exactly; nothing about it is secret.

    Args:
        sampling: how to draw.
        rate: share of the clients in a round, in (0, 1].
        users: ids of the registered users.
        key: the server's secret key.
        round_number: from 1.
    """
    if rate == 1:
        return np.arange(len(users))
    if sampling == "poisson":
        return np.flatnonzero(uniforms(key, ("clients", round_number), users)[:, 0] < rate)
    if sampling == "fixed":
        size = int(cohort_size("fixed", rate, len(users)))
        return np.sort(order(key, ("clients", round_number), users)[:size])
    turns = order(_TURNS, ("turns",), users)
    return np.sort(turns[(round_number - 1) % period(rate) :: period(rate)])


def cohort_size(sampling: ClientSampling, rate: float, users: int) -> float:
    """Return the public number that a round's sum is divided by: the expected cohort, or the fixed one."""
    if rate == 1 or sampling == "poisson":
        return rate * users
    return float(max(1, round(rate * users))) if sampling == "fixed" else users / period(rate)


def period(rate: float) -> int:
    """Rounds from one turn of a client to its next, in cyclic sampling."""
    return math.ceil(1 / rate)
