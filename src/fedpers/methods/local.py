"""Training at home only."""

from fedpers.methods.base import PERSONAL, Method, Phase


class Local(Method):
    """One model per user, trained on that user's records alone; nothing is sent, so nothing needs protection.

    The baseline that federation has to beat: it is free of privacy cost.
    """

    cite = "baseline"
    differs = "from fedavg: nothing is shared"
    scopes = {"adapter": PERSONAL, "head": PERSONAL}
    finish = (Phase("adapter", "head"),)
