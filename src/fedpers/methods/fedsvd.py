"""LoRA with a first factor that the server keeps orthonormal."""

from fedpers.methods.base import SHARED, Method, Phase
from fedpers.models.array_names import pairs
from fedpers.models.lora_algebra import orthonormal_factors
from fedpers.visit import Arrays, Service


class FedSVD(Method):
    """Clients train B and the head; the server re-factors the product so that the rows of A are orthonormal.

    Lee, Park, Lee, Wagner, Seong, Bocklet, Lee, Hwang: FedSVD: Adaptive Orthogonalization for Private Federated
    Learning with LoRA, NeurIPS 2025 (arXiv:2505.12805): B A = U S V^T, then A <- V^T and B <- U S, after every round.
    That is post-processing of the (noised) mean, so it costs no budget, and A follows the data all the same.
    """

    cite = "Lee et al., NeurIPS 2025"
    differs = "from ffa-lora: A follows the product's right singular vectors, set by the server"
    scopes = {"A": SHARED, "B": SHARED, "head": SHARED}
    round = (Phase("B", "head"),)
    serves = ("A",)
    needs = ("adapter",)

    @classmethod
    def serve(cls, arrays: Arrays, service: Service) -> Arrays:
        """Re-factor every module's product."""
        found = {}
        for pair in pairs(arrays):
            found[pair.A], found[pair.B] = orthonormal_factors(arrays[pair.A], arrays[pair.B])
        return found
