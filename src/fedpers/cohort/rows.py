"""Whether a method's client functions keep the members of a cohort apart, found out before a private run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedpers.cohort.layout import layout
from fedpers.cohort.local_training import step_size
from fedpers.cohort.model import CohortModel
from fedpers.config import Config
from fedpers.errors import PrivacyRefusal
from fedpers.plan import Plan
from fedpers.visit import Tensors, Visit

CLIENTS = 3
FIELDS = ("received", "local", "own", "memory")


def check_rows(plan: Plan, model: CohortModel, config: Config) -> None:
    """Run `begin`, `gradient` and `end` on some made-up clients together and one by one; the results must be equal.

    Raises:
        PrivacyRefusal: a function in which one client's numbers depend on another's, so that clipping each client's
            update would not bound what one user does.
    """
    if not plan.method.overrides("begin", "gradient", "end"):
        return
    made = _made_up(plan, model, config)
    together = _played(plan, _rows(made, slice(None)))
    for client in range(CLIENTS):
        alone = _played(plan, _rows(made, slice(client, client + 1)))
        for name, value in alone.items():
            whole = together[name]
            if whole.shape != (CLIENTS, *value.shape[1:]) or not torch.allclose(
                whole[client : client + 1], value, 1e-4, 1e-5
            ):
                raise PrivacyRefusal(
                    f"method {plan.name!r}: {name.partition(' ')[0]} of one client changes with the others in its "
                    "cohort, so a clip does not bound what one user does; work along every axis but the first, as in "
                    "value.norm(dim=(1, 2), keepdim=True)."
                )


def _made_up(plan: Plan, model: CohortModel, config: Config) -> Visit:
    """Return a visit of random numbers in the shapes of a run."""
    arrays, rng = layout(config, plan, model), torch.Generator().manual_seed(0)

    def draw(shapes: Mapping[str, torch.Size]) -> Tensors:
        return {name: torch.randn(CLIENTS, *shape, generator=rng) for name, shape in shapes.items()}

    shapes = {name: value.shape for name, value in model.initial.items()}
    travel = {f"{kind}.{name}": shapes[name] for name in arrays.shared for kind in plan.method.travels}
    kept = {name: value.shape for name, value in arrays.kept().items() if name not in shapes}
    local = draw(shapes | travel)
    return Visit(
        options=plan.options,
        round=1,
        rounds=config.rounds,
        received=draw(shapes | travel),
        local=local,
        own=draw(shapes) if plan.twins else local,
        memory=draw(kept),
        shared=arrays.shared,
        rates={name: step_size(config.local, group) for name, group in model.group.items()},
        steps=torch.arange(1.0, CLIENTS + 1),
        client_rate=config.client_rate,
        users=CLIENTS,
        coin=torch.rand(CLIENTS, generator=rng),
        centroid=lambda count: torch.zeros(CLIENTS, count),
    )


def _rows(visit: Visit, part: slice) -> Visit:
    """Return some clients of a visit."""
    received, local, own, memory = (
        {n: value[part].clone() for n, value in values.items()}
        for values in (visit.received, visit.local, visit.own, visit.memory)
    )
    return replace(
        visit, received=received, local=local, own=local if visit.own is visit.local else own, memory=memory,
        steps=visit.steps[part].clone(), coin=visit.coin[part].clone(),
    )  # fmt: skip


def _played(plan: Plan, visit: Visit) -> dict[str, Tensor]:
    """Return all that the client functions leave behind, by function and array."""
    method = plan.method
    method.begin(visit)
    found = {f"begin {field} {n}": value.clone() for field in FIELDS for n, value in getattr(visit, field).items()}
    weights = {name: visit.local[name] for name in visit.shared}
    for name in weights:
        found[f"gradient {name}"] = method.gradient(visit, name, dict(weights), torch.cos(weights[name])).clone()
    method.end(visit)
    found |= {f"end {field} {n}": value.clone() for field in FIELDS for n, value in getattr(visit, field).items()}
    return found
