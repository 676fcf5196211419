"""One phase of local training for a whole cohort."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor

from fedpers.cohort.batching import Index, Step, microbatches
from fedpers.cohort.model import CohortModel, Parameters
from fedpers.cohort.optimizer import CohortDPOptimizer, Noise
from fedpers.config import GROUPS, TrainConfig


@dataclass(frozen=True)
class RecordProtection:
    """DP-SGD inside the client: what one record can do to a step's sum, and the noise that hides it."""

    clip: float  # L2 bound on a record's gradient, over all trained arrays jointly
    noise_multiplier: float  # noise deviation over clip; 0 clips without noise
    lot_size: float  # public divisor of every sum
    noise: Noise
    per_layer: bool = False  # clip each trained array to clip/sqrt(arrays) instead: the same joint bound


@dataclass
class Stats:
    """What the simulator may look at; none of it ever leaves a client."""

    loss_sum: float = 0.0
    records: int = 0
    clipped: int = 0
    nonfinite: int = 0
    steps: list[int] = field(default_factory=list)

    def add(self, other: Stats) -> None:
        """Take in the counts of another cohort."""
        self.loss_sum += other.loss_sum
        self.records += other.records
        self.clipped += other.clipped
        self.nonfinite += other.nonfinite


def train_phase(
    model: CohortModel,
    parameters: Parameters,
    train: Sequence[str],
    steps: Sequence[Step],
    settings: TrainConfig,
    *,
    pull: tuple[float, Mapping[str, Tensor]] | None = None,
    protection: RecordProtection | None = None,
) -> Stats:
    """Train the groups `train` of all clients of a cohort through `steps`; changes `parameters` in place.

    Args:
        model: the cohort model; `parameters` are loaded into it.
        parameters: by array name, (clients, out, in).
        train: names of the parameter groups that move.
        steps: the logical batches.
        settings: optimizer and step sizes.
        pull: strength and anchors (clients, out, in) of the L2 pull `strength/2 * ||w - anchor||^2`.
        protection: per-record clipping and noise; None trains on plain mean gradients.
    """
    model.load(parameters)
    moving = model.names(train)
    for name, layer in model.layers.items():
        layer.weight.requires_grad_(name in moving)
    weights = [model.layers[name].weight for name in moving]
    optimizer = _optimizer(model, train, settings)
    contexts = _fixed_contexts(model, train, steps)
    stats = Stats()
    with _opacus(model, optimizer, protection) as private:
        for number, step in enumerate(steps):
            optimizer.zero_grad()
            scale = torch.from_numpy(step.weights)
            for part in microbatches(model.lengths[step.rows], model.budget):
                losses = _losses(model, step, part, None if contexts is None else contexts[number])
                if private is None:
                    (losses * scale[torch.from_numpy(part)]).sum().backward()  # type: ignore[no-untyped-call]
                else:
                    with warnings.catch_warnings():
                        # The head reads features that need no gradient: its hooks see outputs alone, as Opacus needs.
                        warnings.filterwarnings("ignore", message="Full backward hook is firing")
                        losses.sum().backward()  # type: ignore[no-untyped-call]
                    private.accumulate()
                stats.loss_sum += float(losses.detach().nansum())
                stats.records += len(part)
            before = [weight.detach().clone() for weight in weights] if not step.active.all() else None
            hooks = _pull_into_gradient(model, moving, pull)
            if private is None:
                hooks()
                optimizer.step()
            else:
                private.attach_step_hook(lambda _optimizer, run=hooks: run())
                private.finish_batch()
            if before is not None:
                _restore(weights, before, torch.from_numpy(step.active))
    if private is not None:
        stats.clipped, stats.nonfinite = private.clipped, private.nonfinite
    for name in moving:
        parameters[name] = model.layers[name].weight.detach()
    return stats


def _optimizer(model: CohortModel, train: Sequence[str], settings: TrainConfig) -> torch.optim.Optimizer:
    groups = [
        {"params": [model.layers[name].weight for name in model.names([group])], "lr": getattr(settings.lr, group)}
        for group in GROUPS  # one order for weights and noise, whatever the phase's
        if group in train and model.names([group])
    ]
    return torch.optim.SGD(groups) if settings.optimizer == "sgd" else torch.optim.Adam(groups)


def _fixed_contexts(model: CohortModel, train: Sequence[str], steps: Sequence[Step]) -> list[Tensor] | None:
    """Encode once what the steps will read, when no adapter moves in this phase; else None."""
    if "adapter" in train and model.lora is not None:
        return None
    rows = np.concatenate([step.rows for step in steps] or [np.zeros(0, np.int64)])
    owners = np.concatenate([step.owners for step in steps] or [np.zeros(0, np.int64)])
    unique, first, place = np.unique(rows, return_index=True, return_inverse=True)
    encoded = model.all_contexts(unique, owners[first])[torch.from_numpy(place)]
    return list(torch.split(encoded, [len(step.rows) for step in steps]))


def _losses(model: CohortModel, step: Step, part: Index, contexts: Tensor | None) -> Tensor:
    rows, owners = step.rows[part], torch.from_numpy(step.owners[part])
    context = model.contexts(rows, owners) if contexts is None else contexts[torch.from_numpy(part)]
    return model.task.loss(model.scores(context, rows, owners))


@contextmanager
def _opacus(
    model: CohortModel, optimizer: torch.optim.Optimizer, protection: RecordProtection | None
) -> Iterator[CohortDPOptimizer | None]:
    if protection is None:
        yield None
        return
    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        yield CohortDPOptimizer(
            optimizer,
            owners=model.owners,
            noise_multiplier=protection.noise_multiplier,
            max_grad_norm=protection.clip,
            lot_size=protection.lot_size,
            noise=protection.noise,
            per_layer=protection.per_layer,
        )
    finally:
        hooks.cleanup()


def _pull_into_gradient(
    model: CohortModel, moving: Sequence[str], pull: tuple[float, Mapping[str, Tensor]] | None
) -> Callable[[], None]:
    """Return a function that adds the pull's gradient; under DP it runs after the noise, on released values only."""

    def add() -> None:
        if pull is None:
            return
        strength, anchors = pull
        for name in moving:
            weight = model.layers[name].weight
            assert weight.grad is not None
            weight.grad += strength * (weight.detach() - anchors[name])

    return add


def _restore(weights: Sequence[Tensor], before: Sequence[Tensor], active: Tensor) -> None:
    """Undo the step of clients that rest; they never step again, so their optimizer state does not matter."""
    for weight, old in zip(weights, before, strict=True):
        weight.data = torch.where(active[:, None, None], weight.detach(), old)
