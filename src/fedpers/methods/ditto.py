"""A personal model beside the shared one."""

from fedpers.methods.base import SHARED, Method, Phase


class Ditto(Method):
    """One model for all; in each round a user also trains an own copy of it, pulled toward the shared values.

    Li, Hu, Beirami, Smith: Ditto: Fair and Robust Federated Learning Through Personalization, ICML 2021, Algorithm 1;
    `personal.l2` is its lambda. The own copy is never read when the shared one is trained, so it costs no budget.
    Own copies are of `personal.groups` alone.
    """

    cite = "Li et al., ICML 2021"
    differs = "from fedavg: each user trains an own copy beside the shared model, pulled toward it"
    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head"), Phase("adapter", "head", own=True))
