"""One phase of local training for a whole cohort."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedpers.cohort.batching import Step
from fedpers.cohort.gradients import Contexts, Gradients, RecordProtection
from fedpers.cohort.model import CohortModel, Parameters
from fedpers.config import FAMILY, TrainConfig
from fedpers.plan import encodes


@dataclass(frozen=True)
class StepRule:
    """How a step differs from a plain one; all of it works on what clipping and noise have left.

    Attributes:
        gradient: makes the gradient to step with of an array's name, all moving weights, and its gradient.
        bounds: by array name, the lowest and the highest value that a weight may take.
        inner: step in units of the step size after which every other gradient is taken; see `Phase.inner`.
        rate: factor on the step sizes.
    """

    gradient: Callable[[str, Mapping[str, Tensor], Tensor], Tensor] | None = None
    bounds: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    inner: float | None = None
    rate: float = 1.0


@dataclass
class Stats:
    """What the simulator may look at; none of it ever leaves a client."""

    loss_sum: float = 0.0
    records: int = 0
    clipped: int = 0
    nonfinite: int = 0
    noise: dict[str, Tensor] = field(default_factory=dict)  # what the steps' noise adds up to, (clients, out, in)

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
    rule: StepRule | None = None,
    protection: RecordProtection | None = None,
) -> Stats:
    """Train the groups `train` of all clients of a cohort through `steps`; changes `parameters` in place.

    Args:
        model: the cohort model; `parameters` are loaded into it.
        parameters: by array name, (clients, out, in).
        train: names of the parameter groups that move.
        steps: the logical batches.
        settings: optimizer and step sizes.
        rule: what a step does besides; None for plain steps.
        protection: per-record clipping and noise; None trains on plain mean gradients.
    """
    rule = rule or StepRule()
    model.load(parameters)
    moving = model.names(train)
    for name, layer in model.layers.items():
        layer.weight.requires_grad_(name in moving)
    weights = {name: model.layers[name].weight for name in moving}
    optimizer = _optimizer(weights, model, settings, rule.rate)
    contexts = _fixed_contexts(model, train, steps)
    stats = Stats()
    origin: list[Tensor] = []
    bounds = {name: (low.to(model.device), high.to(model.device)) for name, (low, high) in rule.bounds.items()}
    with Gradients(model, moving, optimizer, protection, steps, contexts) as work:
        for number, step in enumerate(steps):
            optimizer.zero_grad()
            stats.loss_sum += work.step(number)
            stats.records += len(step.rows)
            stepping = rule.inner is not None or not step.active.all()
            before = [weight.detach().clone() for weight in weights.values()] if stepping else []
            hook = _gradient_hook(weights, rule)
            if work.private is None:
                hook()
                optimizer.step()
            else:
                work.private.attach_step_hook(lambda _optimizer, run=hook: run())
                work.private.finish_batch()
            for name, (low, high) in bounds.items():
                weights[name].data = torch.minimum(torch.maximum(weights[name].detach(), low), high)
            if not step.active.all():
                _restore(list(weights.values()), before, model.on_device(step.active))
            if rule.inner is not None:
                if number % 2 == 0:
                    origin = before
                    _toward(weights, before, rule.inner)
                else:
                    _from(weights, origin, before)
        if rule.inner is not None and len(steps) % 2:
            raise AssertionError("an inner step without the gradient that it is taken for")
        if work.private is not None:
            stats.clipped, stats.nonfinite = work.private.clipped, work.private.nonfinite
            if settings.optimizer == "sgd" and rule.inner is None:
                rates = (group["lr"] for group in optimizer.param_groups)
                drawn = zip(moving, rates, work.private.drawn, strict=True)
                stats.noise = {name: -lr * noise.cpu() for name, lr, noise in drawn}
    for name in moving:
        parameters[name] = model.layers[name].weight.detach().cpu()
    return stats


def _optimizer(
    weights: Mapping[str, torch.nn.Parameter], model: CohortModel, settings: TrainConfig, rate: float
) -> torch.optim.Optimizer:
    """Return an optimizer with an entry for each array in the order of names, which is that of the noise, too."""
    groups = [
        {"params": [weight], "lr": rate * step_size(settings, model.group[name])} for name, weight in weights.items()
    ]
    return torch.optim.SGD(groups) if settings.optimizer == "sgd" else torch.optim.Adam(groups)


def step_size(settings: TrainConfig, group: str) -> float:
    """Return the step size of a parameter group."""
    return float(getattr(settings.lr, FAMILY[group]))


def _fixed_contexts(model: CohortModel, train: Sequence[str], steps: Sequence[Step]) -> Contexts | None:
    """Encode once what the steps will read, when no adapter moves in this phase; else None."""
    if encodes(tuple(train)) and model.lora is not None:
        return None
    rows = np.concatenate([step.rows for step in steps] or [np.zeros(0, np.int64)])
    owners = np.concatenate([step.owners for step in steps] or [np.zeros(0, np.int64)])
    unique, first, place = np.unique(rows, return_index=True, return_inverse=True)
    ends = np.cumsum([len(step.rows) for step in steps])
    return Contexts(model.all_contexts(unique, owners[first]), np.split(place, ends[:-1]))


def _gradient_hook(weights: Mapping[str, torch.nn.Parameter], rule: StepRule) -> Callable[[], None]:
    """Return a function that changes the gradients; under DP it runs after the noise, on released values only.

    A rule sees tensors on the CPU, wherever the model is, as all functions of a method do.
    """

    def change() -> None:
        if rule.gradient is None:
            return
        values = {name: weight.detach().cpu() for name, weight in weights.items()}
        for name, weight in weights.items():
            assert weight.grad is not None
            weight.grad = rule.gradient(name, values, weight.grad.cpu()).to(weight.device)

    return change


def _toward(weights: Mapping[str, torch.nn.Parameter], before: Sequence[Tensor], share: float) -> None:
    """Go a share of the step that was just made."""
    for weight, old in zip(weights.values(), before, strict=True):
        weight.data = old + share * (weight.detach() - old)


def _from(weights: Mapping[str, torch.nn.Parameter], origin: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Make the step that was just made from another place."""
    for weight, start, old in zip(weights.values(), origin, before, strict=True):
        weight.data = start + (weight.detach() - old)


def _restore(weights: Sequence[Tensor], before: Sequence[Tensor], active: Tensor) -> None:
    """Undo the step of clients that rest; they never step again, so their optimizer state does not matter."""
    for weight, old in zip(weights, before, strict=True):
        weight.data = torch.where(active[:, None, None], weight.detach(), old)
