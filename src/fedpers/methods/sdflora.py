"""A shared and a private adapter, trained as one."""

import numpy as np

from fedpers.methods.base import PERSONAL, SHARED, Method, Phase
from fedpers.models.array_names import pairs
from fedpers.models.lora_algebra import truncate
from fedpers.visit import Arrays, Service, mean


class SDFLoRA(Method):
    """A shared and a private adapter are added and trained in the same steps; the shared ones are stacked and cut.

    Shen, Lu, Wan, Chen: Selective Decoupled Federated LoRA for Privacy-preserving Fine-tuning with Heterogeneous
    Clients, 2026 (arXiv:2601.11219): stacking gives the exact mean product, of which a truncated SVD keeps the rank.
    Here both adapters weigh one and have one rank. The private adapter feeds the shared one's gradients, so noise on
    the latter alone would claim too much; the stack is made of single replies.
    """

    cite = "after Shen et al., 2026"
    differs = (
        "from feddpa: both adapters and a personal head are trained in the same steps, the mean product is re-factored"
    )
    scopes = {"adapter": SHARED, "adapter2": PERSONAL, "head": PERSONAL}
    round = (Phase("adapter", "adapter2", "head"),)
    needs = ("adapter",)

    @classmethod
    def combine(cls, replies: list[Arrays], service: Service) -> Arrays:
        """Keep the largest part of the mean product that fits the rank."""
        result = mean(replies)
        for pair in pairs(result):
            A = np.concatenate([one[pair.A] / len(replies) for one in replies])
            B = np.concatenate([one[pair.B] for one in replies], axis=1)
            rank = len(service.broadcast[pair.A])
            result[pair.A], result[pair.B] = truncate(A, B, rank, service.broadcast[pair.A])
        return result
