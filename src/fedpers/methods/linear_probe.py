"""One head for all on features that never change."""

from fedpers.methods.base import FROZEN, SHARED, Method, Phase


class LinearProbe(Method):
    """Frozen backbone without adapter: features are computed once, a head on them is averaged, then tuned at home.

    Legate, Bernier, Page-Caccia, Oyallon, Belilovsky: Guiding The Last Layer in Federated Learning with Pre-Trained
    Models, NeurIPS 2023 (arXiv:2306.03937), its baseline LP, from the task's own first head.
    Tuning at home is an addition of ours.
    """

    cite = "Legate et al., NeurIPS 2023"
    differs = "from fedavg-finetune: no adapter, so that a round passes no text through the backbone"
    scopes = {"adapter": FROZEN, "head": SHARED}
    round = (Phase("head"),)
    finish = (Phase("head"),)
