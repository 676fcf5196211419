"""A personal body under a shared head."""

from fedpers.methods.base import PERSONAL, SHARED, Method, Phase


class LGFedAvg(Method):
    """Personal adapter, shared head: each user encodes in an own way, and all score alike.

    Liang, Liu, Ziyin, Salakhutdinov, Morency: Think Locally, Act Globally: Federated Learning with Local and Global
    Representations, 2020 (arXiv:2001.01523). The official runs start from a model of fedavg; here from the public one.
    """

    cite = "Liang et al., 2020"
    differs = "from fedper: the other way round, the adapter stays and the head is averaged"
    scopes = {"adapter": PERSONAL, "head": SHARED}
    round = (Phase("adapter", "head"),)
