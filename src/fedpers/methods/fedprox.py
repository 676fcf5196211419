"""Federated averaging that stays near."""

from fedpers.methods.base import SHARED, Method, Phase


class FedProx(Method):
    """FedAvg with a pull of strength mu toward the values received, so that clients drift apart less.

    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks, MLSys 2020
    (arXiv:1812.06127), equation 2. Flower's own FedProx strategy only sends mu; the term is the client's.
    """

    cite = "Li et al., MLSys 2020"
    differs = "from fedavg: every step is pulled toward the values received"
    options = {"mu": 0.1}
    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head", pull="mu"),)
