"""Personal norm layers."""

from fedpers.methods.base import PERSONAL, SHARED, Method, Phase


class FedBN(Method):
    """Adapter and head are shared; scale and shift of the adapted blocks' layer norms stay with their user.

    The idea of Li, Jiang, Zhang, Kamp, Dou: FedBN: Federated Learning on Non-IID Features via Local Batch
    Normalization, ICLR 2021. Transformers have layer norms: there are no batch statistics to keep (which would let one
    record shape another's loss), only scale and shift.
    """

    cite = "after Li et al., ICLR 2021"
    differs = "from fedavg: layer norms are trained, too, and stay with their user"
    scopes = {"adapter": SHARED, "norm": PERSONAL, "head": SHARED}
    round = (Phase("adapter", "norm", "head"),)
