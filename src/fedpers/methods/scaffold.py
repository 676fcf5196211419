"""Control variates against client drift."""

import torch
from torch import Tensor

from fedpers.methods.base import SHARED, Method, Phase
from fedpers.visit import Tensors, Visit


class Scaffold(Method):
    """FedAvg whose steps are corrected by what the mean client does (c) less what this one does (c_k).

    Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: Stochastic Controlled Averaging for Federated Learning,
    ICML 2020, Algorithm 1, option II, server step 1. c travels with every shared array and moves by the mean change of
    c_k times the share of clients in a round; c_k stays at home. Both are times the step size here, so that one clip
    weighs them and the update alike, and made of what the steps, noised or not, did, as in DP-SCAFFOLD (Noble, Bellet,
    Dieuleveut, AISTATS 2022). At user level that clip covers update and c together.
    """

    cite = "Karimireddy et al., ICML 2020"
    differs = "from fedavg: steps are corrected by control variates, one of which travels"
    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head"),)
    travels = ("control",)
    remembers = ("client_control",)
    sgd = True

    @classmethod
    def gradient(cls, visit: Visit, name: str, weights: Tensors, gradient: Tensor) -> Tensor:
        """Correct: g - c_k + c."""
        correction = visit.received[f"control.{name}"] - visit.memory[f"client_control.{name}"]
        return gradient + correction / visit.rates[name]

    @classmethod
    def end(cls, visit: Visit) -> None:
        """c_k <- c_k - c + (x - y) / K, all times the step size; a client without steps keeps what it has."""
        moved = (visit.steps > 0)[:, None, None]
        steps = visit.steps.clamp(min=1)[:, None, None]
        for name in visit.shared:
            drift = (visit.received[name] - visit.local[name]) / steps
            change = torch.where(moved, drift - visit.received[f"control.{name}"], 0.0)
            visit.memory[f"client_control.{name}"] += change
            visit.local[f"control.{name}"] = visit.received[f"control.{name}"] + visit.client_rate * change
