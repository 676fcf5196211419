"""Averaging LoRA factors with the error put right."""

import numpy as np
from numpy.typing import NDArray

from fedpers.methods.base import SHARED, Method, Phase
from fedpers.models.array_names import pairs
from fedpers.models.lora_algebra import mean_product
from fedpers.visit import Arrays, Service, mean, stack


class FedExLoRA(Method):
    """A and B are averaged, and what is missing to the mean product is added to the frozen weights.

    Singhal, Ponkshe, Vepakomma: FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language
    Models, ACL 2025 (arXiv:2410.09432): W <- W + s (mean(B A) - mean(B) mean(A)). The residual is a whole matrix for
    every adapted layer and travels down; it is made of single replies, so a server that sees their sum cannot make it.
    """

    cite = "Singhal, Ponkshe, Vepakomma, ACL 2025"
    differs = "from fedavg: the frozen weights take up mean(B A) - mean(B) mean(A)"
    scopes = {"adapter": SHARED, "residual": SHARED, "head": SHARED}
    round = (Phase("adapter", "head"),)
    serves = ("residual",)
    needs = ("adapter",)

    @classmethod
    def combine(cls, replies: list[Arrays], service: Service) -> Arrays:
        """Average, and add to the residual what averaging lost."""
        result = mean(replies)
        for pair in pairs(result):
            exact = mean_product(stack(replies, pair.A), stack(replies, pair.B))
            lost: NDArray[np.float32] = exact - result[pair.B] @ result[pair.A]
            result[pair.residual] = service.broadcast[pair.residual] + service.scaling * lost
        return result
