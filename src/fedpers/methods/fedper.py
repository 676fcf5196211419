"""Personal heads, trained together with a shared body."""

from fedpers.methods.base import PERSONAL, SHARED, Method, Phase


class FedPer(Method):
    """Shared adapter, personal head, both trained in the same steps; only the adapter travels.

    Arivazhagan, Aggarwal, Singh, Choudhary: Federated Learning with Personalization Layers, 2019 (arXiv:1912.00818),
    Algorithms 1 and 2.
    """

    cite = "Arivazhagan et al., 2019"
    differs = "from fedavg: the head stays with its user"
    scopes = {"adapter": SHARED, "head": PERSONAL}
    round = (Phase("adapter", "head"),)
