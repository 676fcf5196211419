"""Federated averaging."""

from fedpers.methods.base import SHARED, Method, Phase


class FedAvg(Method):
    """One model for all: every client trains adapter and head, the server averages both.

    McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of Deep Networks from
    Decentralized Data, AISTATS 2017, Algorithm 1. Clients weigh the same here (the number of records is private).
    """

    cite = "McMahan et al., AISTATS 2017"
    differs = "from local: adapter and head are averaged in every round"
    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head"),)
