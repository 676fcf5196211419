"""Two adapters, one shared and one at home, mixed for each input."""

import torch

from fedpers.methods.base import PERSONAL, SHARED, Method, Phase
from fedpers.visit import Visit


class FedDPA(Method):
    """The shared adapter is trained alone, a personal one beside it; an input like the user's own gives it more weight.

    Yang, Long, Shen, Jiang, Blumenstein: Dual-Personalizing Adapter for Federated Foundation Models, NeurIPS 2024
    (arXiv:2403.19211), FedDPA-T with the code's defaults: in training the personal adapter weighs `options.weight` and
    the shared one the rest; at test the weight is `options.weight` times the mean cosine between the input and five of
    the user's training inputs (here by the frozen backbone's features). FedDPA-F is fedavg-finetune.
    """

    cite = "Yang et al., NeurIPS 2024"
    differs = "from ditto: a second adapter is added to the shared one, by weights that depend on the input"
    options = {"weight": 0.5}
    scopes = {"adapter": SHARED, "adapter2": PERSONAL, "gate": PERSONAL, "head": SHARED}
    round = (Phase("adapter2", gate="weight"), Phase("adapter", "head", without=("adapter2", "gate")))
    needs = ("adapter",)

    @classmethod
    def home(cls, visit: Visit) -> None:
        """Weigh the personal adapter by the likeness of an input to the user's own."""
        likeness = visit.options["weight"] * visit.centroid(5)
        visit.local["gate.weight"] = torch.cat([likeness, torch.zeros(len(likeness), 1)], dim=1)[:, None, :]
