"""One LoRA factor at a time."""

from fedpers.methods.base import SHARED, Method, Phase


class RoLoRA(Method):
    """In odd rounds B is trained and averaged, in even rounds A; the head in all. Averaging is exact in each.

    Chen, Guo, Ju, Dalal, Zhu, Khisti: Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, NeurIPS
    2025 (arXiv:2502.01755), Algorithm 1. B comes first: while it is zero, A has no gradient. Only what moved is sent.
    """

    cite = "Chen et al., NeurIPS 2025"
    differs = "from ffa-lora: A is trained, too, in every other round"
    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("B", "head", turn=(1, 2)), Phase("A", "head", turn=(0, 2)))
    needs = ("adapter",)
