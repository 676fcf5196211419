"""An own adapter beside the mean of everybody else's."""

from fedpers.methods.base import PERSONAL, SHARED, Method, Phase
from fedpers.models.array_names import pairs, second
from fedpers.visit import Visit


class FedALT(Method):
    """Each user trains an own adapter, which is also what it sends, beside the frozen mean of all the others'.

    Bian, Wang, Zhang, Xu: FedALT: Federated Fine-Tuning through Adaptive Local Training with Rest-of-World LoRA, AAAI
    2026 (arXiv:2503.11880). The server sends one mean to all, and each user takes itself off it at home, which needs
    everybody in every round. One mixer (a sigmoid of frozen features) weighs the two, where the paper has one in each
    adapted layer. The personal adapter travels as it is: nothing can be claimed about it.
    """

    cite = "Bian et al., AAAI 2026"
    differs = "from feddpa: the own adapter is uploaded, the frozen one is the others' mean, gate and head are personal"
    scopes = {"adapter": SHARED, "adapter2": PERSONAL, "gate": PERSONAL, "head": PERSONAL}
    round = (Phase("adapter", "gate", "head"),)
    keeps = True
    everyone = True
    link = "sigmoid"
    needs = ("adapter",)
    unclaimable = "its users upload their personal adapters, of which a claim would have to say that they stay"

    @classmethod
    def begin(cls, visit: Visit) -> None:
        """Go on from the own adapter; the second one is the mean of the others."""
        for name in (name for pair in pairs(visit.shared) for name in (pair.A, pair.B)):
            others = (visit.users * visit.received[name] - visit.own[name]) / (visit.users - 1)
            visit.local[second(name)], visit.local[name] = others, visit.own[name].clone()

    home = begin
