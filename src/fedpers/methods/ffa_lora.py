"""LoRA with a frozen first factor."""

from fedpers.methods.base import FROZEN, SHARED, Method, Phase


class FFALoRA(Method):
    """A stays at its public random value; B and the head are trained and averaged, which is then exact.

    Sun, Li, Li, Ding: Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024 (arXiv:2403.12313). Noise
    enters the product linearly, and half the adapter travels. Re-implementations differ on the head; here it is shared.
    """

    cite = "Sun et al., ICLR 2024"
    differs = "from fedavg: A is never trained and never sent"
    scopes = {"A": FROZEN, "B": SHARED, "head": SHARED}
    round = (Phase("B", "head"),)
    needs = ("adapter",)
