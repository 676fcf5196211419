"""Adapters of different ranks."""

import numpy as np
import torch
from torch import Tensor

from fedpers.methods.base import SHARED, Method, Phase
from fedpers.models.array_names import group_of, pairs, rank_index
from fedpers.visit import Arrays, Service, Tensors, Visit, mean, stack


class HetLoRA(Method):
    """Users have adapters of different ranks: cut off on arrival, padded with zeros on return, pruned on the way.

    Cho, Liu, Xu, Fahrezi, Joshi: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models,
    EMNLP 2024 (arXiv:2401.06432): the server weighs each client by the norm of its product; a rank falls from r to
    floor(gamma r) when |tail of B| |tail of A|, which is penalized by lambda, has shrunk. A user's first rank is a
    public draw between `options.lowest` of the full rank and all of it. Scale is alpha over the user's own rank.
    With a full rank of 1 there is nothing to cut, and what is left of it are the weights.
    """

    cite = "Cho et al., EMNLP 2024"
    differs = "from fedavg: users have adapters of different ranks, weighed by their norms"
    options = {"lowest": 0.5, "gamma": 0.99, "lambda": 0.001}
    ranges = {"lowest": (0.0, 1.0), "gamma": (0.0, 1.0)}
    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head"),)
    remembers = ("cut",)
    needs = ("adapter",)
    sgd = True
    unclaimable = "the weights and the ranks of its clients depend on their records, and sizes tell them"

    @classmethod
    def begin(cls, visit: Visit) -> None:
        """Cut off to each user's rank; B carries the user's own scale."""
        for name in factors(visit):
            visit.local[name] = visit.local[name] * within(visit, name) * scale(visit, name)

    home = begin

    @classmethod
    def gradient(cls, visit: Visit, name: str, weights: Tensors, gradient: Tensor) -> Tensor:
        """Step within the rank, and away from the tail: the gradient of lambda |tail of A| |tail of B|."""
        if name not in factors(visit):
            return gradient
        (pair,) = pairs([name])
        own, other = (weights[one] * tail(visit, one) for one in (name, pair.A if name == pair.B else pair.B))
        pull = visit.options["lambda"] * norm(other) * own / norm(own).clamp(min=1e-12)
        return (gradient + pull / scale(visit, pair.B)) * scale(visit, name) ** 2 * within(visit, name)

    @classmethod
    def end(cls, visit: Visit) -> None:
        """Take the user's own scale off again, and prune where the tail has shrunk."""
        visit.local.update({name: visit.local[name] / scale(visit, name) for name in factors(visit)})
        before = after = torch.zeros(())
        for A, B in ((pair.A, pair.B) for pair in pairs(factors(visit))):
            before = before + norm(visit.received[A] * tail(visit, A)) * norm(visit.received[B] * tail(visit, B))
            after = after + norm(visit.local[A] * tail(visit, A)) * norm(visit.local[B] * tail(visit, B))
        ranks, gamma = rank(visit), visit.options["gamma"]
        cut = torch.where(after < before, ranks - (gamma * ranks).floor().clamp(min=1), 0.0)
        for name in factors(visit):
            visit.memory[f"cut.{name}"] = visit.memory[f"cut.{name}"] + cut

    @classmethod
    def combine(cls, replies: list[Arrays], service: Service) -> Arrays:
        """Weigh the factors of each client by the norm of its product."""
        result, found = mean(replies), pairs(replies[0])
        norms = [np.sqrt(sum(np.sum((one[p.B] @ one[p.A]) ** 2) for p in found)) for one in replies]
        for name in (name for pair in found for name in pair[1:3]):
            result[name] = np.average(stack(replies, name), 0, norms if any(norms) else None).astype(np.float32)
        return result


def factors(visit: Visit) -> list[str]:
    """Names of the adapter's arrays."""
    return [name for name in visit.shared if group_of(name) in {"A", "B"}]


def rank(visit: Visit) -> Tensor:
    """Each user's rank now, (clients, 1, 1): a public draw, less what was cut."""
    name = next(name for name in factors(visit) if group_of(name) == "A")
    full = visit.received[name].shape[1]
    lowest = round(visit.options["lowest"] * full)
    first = (lowest + torch.floor(visit.coin * (full - lowest + 1)))[:, None, None]
    return (first - visit.memory[f"cut.{name}"][:, :1, :1]).clamp(min=1)


def within(visit: Visit, name: str, share: float = 1.0) -> Tensor:
    """Ones in the rows of A, or columns of B, within a share of the user's rank; else zeros."""
    rows = rank_index(name, visit.received[name])
    return (rows < torch.floor(share * rank(visit))).float()


def tail(visit: Visit, name: str) -> Tensor:
    """Ones in what pruning would take off next."""
    return within(visit, name) - within(visit, name, visit.options["gamma"])


def scale(visit: Visit, name: str) -> Tensor:
    """Full rank over the user's own, carried by B alone."""
    return visit.received[name].shape[2] / rank(visit) if group_of(name) == "B" else torch.ones(())


def norm(value: Tensor) -> Tensor:
    """Frobenius norm of each client's array, (clients, 1, 1)."""
    return value.square().sum(dim=(1, 2), keepdim=True).sqrt()
