"""A start from which many small steps go far."""

import numpy as np

from fedpers.methods.base import SHARED, Method, Phase
from fedpers.visit import Arrays, Service


class Reptile(Method):
    """The server goes a part of the way to the clients' mean, less from round to round; each user tunes from there.

    Nichol, Achiam, Schulman: On First-Order Meta-Learning Algorithms, 2018 (arXiv:1803.02999), Algorithm 2, with the
    step falling linearly to zero as in its code; as federated learning in Jiang, Konečný, Rush, Kannan, 2019
    (arXiv:1909.12488). A whole step in every round is FedAvg.
    """

    cite = "Nichol, Achiam, Schulman, 2018"
    differs = "from fedavg-finetune: the server's step shrinks from round to round"
    options = {"step": 1.0}
    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head"),)
    finish = (Phase("adapter", "head"),)

    @classmethod
    def serve(cls, arrays: Arrays, service: Service) -> Arrays:
        """phi <- phi + step (mean - phi)."""
        step = service.options["step"] * (1 - (service.round - 1) / service.rounds)
        old = service.broadcast
        return {name: (old[name] + step * (array - old[name])).astype(np.float32) for name, array in arrays.items()}
