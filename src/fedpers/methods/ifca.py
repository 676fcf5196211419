"""A few shared models, and each user takes the best."""

from fedpers.methods.base import SHARED, Method, Phase


class IFCA(Method):
    """All of `options.clusters` models travel; a client trains the one with the smallest loss on its training records.

    Ghosh, Chung, Yin, Ramchandran: An Efficient Framework for Clustered Federated Learning, NeurIPS 2020, Algorithm 1.
    The others come back as they were, and all are averaged over all clients of the round: the denominator of gradient
    averaging there, since that of a cluster alone would tell how many chose it. One clip and noise on every block cover
    it at user level. First values differ by small public draws, else nobody could choose.
    """

    cite = "Ghosh et al., NeurIPS 2020"
    differs = "from fedavg: several shared models, of which each user trains and uses the best"
    options = {"clusters": 2.0}
    clusters = "clusters"
    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head"),)
