"""Plain averaging of LoRA factors."""

from fedpers.methods.base import FROZEN, SHARED, Method, Phase


class FedIT(Method):
    """Both LoRA factors are trained and averaged, each by itself; nothing else moves.

    Zhang, Vahidian, Kuo, Li, Zhang, Yu, Wang, Chen: Towards Building the Federated GPT: Federated Instruction Tuning,
    ICASSP 2024 (arXiv:2305.05644), which has no head. mean(B) mean(A) is not mean(B A): see `aggregation_error`.
    """

    cite = "Zhang et al., ICASSP 2024"
    differs = "from fedavg: the head stays at its public value"
    scopes = {"adapter": SHARED, "head": FROZEN}
    round = (Phase("adapter"),)
    needs = ("adapter",)
