"""How the steps of a phase differ from plain ones: pulls, corrections, mixtures, blends."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpers.cohort.local_training import StepRule
from fedpers.cohort.model import CohortModel, Parameters
from fedpers.cohort.visits import clone, repeat
from fedpers.config import TrainConfig
from fedpers.methods.base import Phase
from fedpers.models.array_names import GATE
from fedpers.plan import Plan
from fedpers.visit import Visit


def unmoved(plan: Plan, model: CohortModel, phase: Phase, clients: int) -> Parameters:
    """Return what a phase reads in another way than it is: public initial values, and a gate that is fixed."""
    still = {name: model.initial[name] for name in model.names(phase.without)}
    if phase.gate:
        still[GATE] = torch.zeros_like(model.initial[GATE])
        still[GATE][..., -1] = plan.options[phase.gate]  # of the constant input, whatever the features
    return repeat(still, clients)


def step_rule(
    plan: Plan, model: CohortModel, visit: Visit, phase: Phase, settings: TrainConfig, strength: float, at_home: bool
) -> StepRule:
    """Say how a phase's steps differ from plain ones.

    Args:
        plan: the method's table.
        model: its arrays.
        visit: what the cohort has received and kept.
        phase: what is trained.
        settings: its optimizer.
        strength: of the pull toward the values received, or, of personal groups, toward their public initial values;
            at home toward the values that training there starts from.
        at_home: after the last release.
    """
    names, method = model.names(phase.train), plan.method
    if phase.blend:
        # W <- W - step * g * d for the point own + W * d moves that point by -step * g * d^2.
        far = {name: visit.received[name] - visit.own[name] for name in names}
        ends = {name: (visit.received[name], visit.own[name]) for name in names}
        bounds = {name: (torch.minimum(*pair), torch.maximum(*pair)) for name, pair in ends.items()}
        return StepRule(gradient=lambda name, weights, gradient: gradient * far[name] ** 2, bounds=bounds)
    if phase.mix:
        # The own part moves by share * gradient, and the model by share times that; Adam's steps ignore scale.
        share = plan.options[phase.mix]
        return StepRule(rate=share**2 if settings.optimizer == "sgd" else share)
    if at_home:
        anchors = clone({name: visit.local[name] for name in names})
    elif phase.own or phase.pull:
        anchors = visit.received
    else:
        anchors = model.broadcast(len(visit.steps))
    bends = method.overrides("gradient") and not at_home and not phase.own
    shared = set(visit.shared)

    def bend(name: str, weights: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        if bends and name in shared:
            gradient = method.gradient(visit, name, dict(weights), gradient)
        return gradient + strength * (weights[name] - anchors[name]) if strength > 0 else gradient

    inner = plan.options[phase.inner] if phase.inner else None
    return StepRule(gradient=bend if bends or strength > 0 else None, inner=inner)
