"""Gradient matching: dummy inputs are moved until they explain a client's update, then read as tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedpers.cohort.batching import Index
from fedpers.cohort.model import CohortModel
from fedpers.models.backbone import pool

STEP = 0.25  # Adam's step size, over the root mean square of the start
FLOOR = 0.05  # of the step size, reached at the last iteration


def match_updates(
    model: CohortModel,
    rows: Index,
    shared: Mapping[str, Tensor],
    observed: Mapping[str, Tensor],
    start: Tensor,
    unlikely: Callable[[Tensor], Tensor],
    iterations: int,
) -> Tensor:
    """Return inputs of the first block whose adapter gradients point where the observed ones do.

    The objective per record is one minus the cosine between dummy and observed gradient (Geiping et al., Inverting
    Gradients, NeurIPS 2020; the dummies are those of Zhu et al., Deep Leakage from Gradients, NeurIPS 2019), here the
    mean over the adapter's arrays, plus `unlikely`: matching alone finds few tokens in so few iterations, and a
    distance to the span of the update guides it, after TIGER (Kalikman et al., arXiv 2606.18312). The attacker knows
    the number of tokens, the candidates of the task and the broadcast; a cosine ignores length, so the clip is not
    needed.

    Args:
        model: adapted from its first block on; its weights are overwritten.
        rows: the attacked records (records,); each is treated as the only one of its client.
        shared: the broadcast, (out, in) by name.
        observed: what each client's update says its gradient was, (records, out, in) for each array to be matched.
        start: first dummy inputs (tokens, width), the same for each record; at least as many tokens as the longest has.
        unlikely: penalty (records, tokens) of dummy inputs (records, tokens, width).
        iterations: steps of Adam; each runs the model forward, backward, and backward through the backward pass.
    """
    lengths = torch.from_numpy(model.lengths[rows])
    longest = int(lengths.max())
    mask = (torch.arange(longest) < lengths[:, None]).long()
    owners = torch.arange(len(rows))
    model.load(model.broadcast(len(rows), shared))
    for name, layer in model.layers.items():
        layer.weight.requires_grad_(name in observed)
    weights = [model.layers[name].weight for name in observed]
    dummy = start[:longest].expand(len(rows), -1, -1).clone().requires_grad_()
    rate = STEP * float(start.square().mean().sqrt())
    optimizer = torch.optim.Adam([dummy], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=FLOOR * rate)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        for _ in range(iterations):
            model.owners.set(owners)
            contexts = pool(model.backbone.above(dummy, mask, 0), mask)
            loss = model.losses(contexts, np.asarray(rows), owners).sum()
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            penalty = (unlikely(dummy) * mask).sum(dim=1) / lengths
            objective = (1 - _similarity(gradients, list(observed.values())) + penalty).sum()
            (dummy.grad,) = torch.autograd.grad(objective, [dummy])
            optimizer.step()
            schedule.step()
    return dummy.detach()


def _similarity(ours: tuple[Tensor, ...], theirs: list[Tensor]) -> Tensor:
    """Cosine per record, mean over arrays: one cosine over all would be that of the few largest arrays."""
    return torch.stack(
        [
            functional.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=1e-12)
            for a, b in zip(ours, theirs, strict=True)
        ]
    ).mean(dim=0)
