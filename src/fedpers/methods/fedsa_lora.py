"""A shared, B at home."""

from fedpers.methods.base import PERSONAL, SHARED, Method, Phase


class FedSALoRA(Method):
    """A is averaged; B and the head stay with their user, who trains all three in the same steps.

    Guo, Zeng, Wang, Fan, Wang, Qu: Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025
    (arXiv:2410.01463); B and classifier are local in the official configuration. B feeds the gradient of A, so noise on
    A's steps alone would claim too much.
    """

    cite = "Guo et al., ICLR 2025"
    differs = "from fedper: of the adapter only A travels, B stays with its user like the head"
    scopes = {"A": SHARED, "B": PERSONAL, "head": PERSONAL}
    round = (Phase("A", "B", "head"),)
    needs = ("adapter",)
