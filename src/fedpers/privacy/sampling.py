"""Which clients take part in a round; the accounting credits exactly the sampler that is run here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedpers.privacy.randomness import generator, order, seed_key

ClientSampling = Literal["poisson", "fixed", "cyclic"]
_TURNS = seed_key(0)


def draw(
    sampling: ClientSampling, rate: float, users: Sequence[str], key: bytes, round_number: int
) -> NDArray[np.int64]:
    """Return the positions of the clients of a round, ascending.

    poisson: each client independently with probability `rate`; who is in hangs on the key, the round and the client's
    place on the public list of registered users alone, so no user's records change it. It costs what the clients drawn
    cost, not those registered. fixed: `cohort_size` clients, drawn without replacement. cyclic: client groups take
    turns in a public order by id, so that a client comes back every `period` rounds exactly; nothing is secret there.

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
        return _hits(generator(key, "clients", round_number), rate, len(users))
    if sampling == "fixed":
        size = int(cohort_size("fixed", rate, len(users)))
        return np.sort(order(key, ("clients", round_number), users)[:size])
    turns = order(_TURNS, ("turns",), users)
    return np.sort(turns[(round_number - 1) % period(rate) :: period(rate)])


def _hits(rng: np.random.Generator, rate: float, size: int) -> NDArray[np.int64]:
    """Return which of `size` places are hit if each is with probability `rate` < 1, independently of the others.

    The misses before each hit are geometric, so they are drawn in place of a coin per place, by inversion (Devroye:
    Non-Uniform Random Variate Generation, 1986, section X.2). Probabilities are exact to a few times 2^-53.
    """
    found, last = [np.zeros(0)], -1.0
    while last < size:
        with np.errstate(over="ignore"):  # beyond all places
            misses = np.floor(np.log1p(-rng.random(int(rate * size) + 16)) / math.log1p(-rate))
        places = last + np.cumsum(misses + 1)  # whole numbers, exact in floats as far as `size` reaches
        found.append(places[places < size])
        last = float(places[-1])
    return np.concatenate(found).astype(np.int64)


def cohort_size(sampling: ClientSampling, rate: float, users: int) -> float:
    """Return the public number that a round's sum is divided by: the expected cohort, or the fixed one."""
    if rate == 1 or sampling == "poisson":
        return rate * users
    return float(max(1, round(rate * users))) if sampling == "fixed" else users / period(rate)


def period(rate: float) -> int:
    """Rounds from one turn of a client to its next, in cyclic sampling."""
    return math.ceil(1 / rate)
