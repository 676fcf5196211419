"""What the functions of a method see: a cohort's visit on the client's side, the service on the server's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Arrays = dict[str, NDArray[np.float32]]  # by array name, (out, in)
Tensors = dict[str, Tensor]  # by array name, (clients, out, in)


@dataclass
class Visit:
    """A cohort's part of one round, as the client functions of a method see it; tensors are (clients, out, in).

    Attributes:
        options: the method's own numbers.
        round: the round's number, from 1; 0 at home, after the last release.
        rounds: of the whole run.
        received: what the server sent, and the public initial values of all that it does not send.
        local: what the phases train and what is sent afterwards; begins as received, with the user's personal groups.
        own: the user's own copies of shared groups, where the method keeps any.
        memory: by "kind.array", what `Method.remembers` declares.
        shared: names of the shared arrays.
        rates: step size of every array.
        steps: how many steps each client made on shared groups, (clients,).
        client_rate: share of the clients that take part in a round.
        users: registered clients.
        coin: a public draw of each user, the same in every round, from 0 to 1, (clients,).
        centroid: at home only, since it reads records: unit-length features of a user's first so many training inputs
            by the frozen backbone, averaged, (clients, width).
    """

    options: Mapping[str, float]
    round: int
    rounds: int
    received: Tensors
    local: Tensors
    own: Tensors
    memory: Tensors
    shared: tuple[str, ...]
    rates: Mapping[str, float]
    steps: Tensor
    client_rate: float
    users: int
    coin: Tensor
    centroid: Callable[[int], Tensor]


@dataclass(frozen=True)
class Service:
    """What the server functions of a method see besides the arrays that clients sent; arrays are (out, in).

    What a server has to remember it keeps in what travels: `serve` may set the companions that `Method.travels`
    declares, and finds them in the next round's `broadcast`. Nothing else outlives a round, or a run that is resumed.

    Attributes:
        options: the method's own numbers.
        round: the round's number, from 1.
        rounds: of the whole run.
        scaling: what the product of LoRA factors is multiplied by.
        broadcast: what the clients started from.
        initial: public initial values of every array of the model.
        fresh: values of a factor A as at the start of a run, but drawn for this round, by array name.
    """

    options: Mapping[str, float]
    round: int
    rounds: int
    scaling: float
    broadcast: Arrays
    initial: Arrays
    fresh: Callable[[str], NDArray[np.float32]]


def stack(replies: Sequence[Arrays], name: str) -> NDArray[np.float32]:
    """Return one array of all clients, (clients, out, in)."""
    return np.stack([one[name] for one in replies])


def mean(replies: Sequence[Arrays]) -> Arrays:
    """Return the plain mean of the clients' arrays; everybody weighs the same."""
    return {name: stack(replies, name).mean(axis=0).astype(np.float32) for name in replies[0]}
