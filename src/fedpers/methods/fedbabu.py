"""A shared body under a fixed head, heads at home."""

from fedpers.methods.base import PERSONAL, SHARED, Method, Phase


class FedBABU(Method):
    """Shared adapter trained under the fixed public head; each user fits an own head after the last release.

    Oh, Kim, Yun: FedBABU: Toward Enhanced Representation for Federated Image Classification, ICLR 2022, Algorithm 1.
    Nothing personal moves before the last release, so noise on the adapter alone gives a true record-level claim.
    """

    cite = "Oh, Kim, Yun, ICLR 2022"
    differs = "from fedper: the head stays at its public value until the last release"
    scopes = {"adapter": SHARED, "head": PERSONAL}
    round = (Phase("adapter"),)
    finish = (Phase("head"),)
