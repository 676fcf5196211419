"""Starting between the own model and the shared one, at a point that is learnt."""

from fedpers.methods.base import SHARED, Method, Phase


class FedALA(Method):
    """A client starts a round between what it kept and what it received, at weights learnt for every number.

    Zhang, Hua, Wang, Song, Xue, Ma, Guan: FedALA: Adaptive Local Aggregation for Personalized Federated Learning, AAAI
    2023 (arXiv:2212.01197), equations 3 to 5, with all trained arrays as its upper layers, all training records, and
    weights that start at one in each round (there they are kept). `options.eta` is the weights' step size.
    """

    cite = "Zhang et al., AAAI 2023"
    differs = "from fedavg: training starts between the kept and the received model, and the own one is what it left"
    options = {"eta": 1.0}
    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head", blend="eta"), Phase("adapter", "head"))
    keeps = True
