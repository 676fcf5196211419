"""A mixture of an own model and the shared one."""

from fedpers.methods.base import SHARED, Method, Phase
from fedpers.visit import Visit


class APFL(Method):
    """Beside the shared model w each user keeps an own v, trained and used in the mixture alpha v + (1 - alpha) w.

    Deng, Kamani, Mahdavi: Adaptive Personalized Federated Learning, 2020 (arXiv:2003.13461), Algorithm 1. Parameters
    are mixed, as in the paper (its code mixes outputs), with one fixed `options.alpha` for all; in a round w makes all
    its steps first, where the paper takes turns. v is never read when w is trained, so it costs no budget.
    Own copies are of `personal.groups` alone.
    """

    cite = "Deng, Kamani, Mahdavi, 2020"
    differs = "from ditto: the own copy is trained inside its mixture with the shared model, not pulled toward it"
    options = {"alpha": 0.5}
    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head"), Phase("adapter", "head", own=True, mix="alpha"))

    @classmethod
    def home(cls, visit: Visit) -> None:
        """Mix."""
        alpha = visit.options["alpha"]
        for name in visit.shared:
            visit.local[name] = alpha * visit.own[name] + (1 - alpha) * visit.local[name]
