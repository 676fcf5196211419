"""Federated averaging, then fine-tuning at home."""

from fedpers.methods.base import SHARED, Method, Phase


class FedAvgFinetune(Method):
    """One model for all, then each user tunes an own copy of it at home, after the last release.

    Personalization by local fine-tuning of a federated model: Yu, Bagdasaryan, Shmatikov: Salvaging Federated Learning
    by Local Adaptation, 2020 (arXiv:2002.04758), section 3; the recipe of one adapter per user on top of a shared one
    is also that of OPPU (Tan et al., EMNLP 2024) and FedDPA-F. What happens at home costs no privacy budget.
    """

    cite = "Yu et al., 2020"
    differs = "from fedavg: each user tunes an own copy at home, after the last release"
    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head"),)
    finish = (Phase("adapter", "head"),)
