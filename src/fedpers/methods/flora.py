"""Stacked adapters, merged in each round."""

import numpy as np

from fedpers.methods.base import SHARED, Method, Phase
from fedpers.models.array_names import pairs
from fedpers.models.lora_algebra import mean_product
from fedpers.visit import Arrays, Service, mean, stack


class FLoRA(Method):
    """The clients' adapters are stacked and merged into the frozen weights; every round starts with a fresh adapter.

    Wang, Shen, He, Sun, Wang, Lyu, Li: FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
    Adaptations, NeurIPS 2024 (arXiv:2409.05976). The stack's product is the exact mean(B A); as a matrix it is sent
    down here, while FLoRA sends the stack, that is every client's adapter to every client.
    """

    cite = "Wang et al., NeurIPS 2024"
    differs = "from fedex-lora: the whole mean product goes into the frozen weights, and the adapter starts anew"
    scopes = {"adapter": SHARED, "residual": SHARED, "head": SHARED}
    round = (Phase("adapter", "head"),)
    serves = ("residual",)
    needs = ("adapter",)
    unclaimable = "its server sends the stack of all clients' adapters on, which releases each of them"

    @classmethod
    def combine(cls, replies: list[Arrays], service: Service) -> Arrays:
        """Merge the mean product; draw A anew, and set B to zero."""
        result = mean(replies)
        for pair in pairs(result):
            exact = mean_product(stack(replies, pair.A), stack(replies, pair.B))
            result[pair.residual] = service.broadcast[pair.residual] + service.scaling * exact
            result[pair.A], result[pair.B] = service.fresh(pair.A), np.zeros_like(result[pair.B])
        return result
