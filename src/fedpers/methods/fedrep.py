"""Personal heads, fitted before the shared body."""

from fedpers.methods.base import PERSONAL, SHARED, Method, Phase


class FedRep(Method):
    """Shared adapter, personal head; in each round first the head is fitted, then the adapter through it.

    Collins, Hassani, Mokhtari, Shakkottai: Exploiting Shared Representations for Personalized Federated Learning,
    ICML 2021, Algorithm 1.
    """

    cite = "Collins et al., ICML 2021"
    differs = "from fedper: head and adapter are trained one after the other, not in the same steps"
    scopes = {"adapter": SHARED, "head": PERSONAL}
    round = (Phase("head"), Phase("adapter"))
