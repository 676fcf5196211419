"""Arriving and leaving: from a broadcast and personal state to what a cohort trains, and from there to what is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.cohort.layout import Layout
from fedpers.cohort.local_training import step_size
from fedpers.cohort.model import CohortModel, Parameters
from fedpers.config import Config
from fedpers.errors import ConfigError, PrivacyRefusal
from fedpers.methods.base import PERSONAL
from fedpers.privacy.randomness import seed_key, uniforms
from fedpers.tasks.base import Examples
from fedpers.visit import Visit

Choice = NDArray[np.int64]  # (clients,), which version of a clustered method's arrays each client takes


def arrive(
    config: Config,
    layout: Layout,
    model: CohortModel,
    examples: Examples,
    number: int,
    cohort: Sequence[int],
    wire: Mapping[str, Tensor],
    kept: Parameters,
) -> tuple[Visit, Choice | None]:
    """Return what a cohort starts from, and its choice where the method has clusters.

    Args:
        config: the run's configuration.
        layout: which arrays travel and which stay.
        model: the model that is trained.
        examples: whose records.
        number: the round; 0 at home.
        cohort: positions of the users.
        wire: what the server sent, (out, in) by name.
        kept: the users' personal state, (clients, out, in) by name.
    """
    plan, clients = layout.plan, len(cohort)
    personal = {n: kept[n] for n in model.names(plan.groups(PERSONAL)) if n in kept}
    twins = {n: kept[n] for n in model.names(plan.twins) if n in kept}
    chosen = None
    if layout.clusters:
        chosen = _choose(layout, model, examples, cohort, wire, personal)
        given = {n: torch.stack([wire[f"cluster{place}.{n}"] for place in chosen]) for n in layout.shared}
        received = model.broadcast(clients) | given
    else:
        received = model.broadcast(clients, {n: wire[n] for n in layout.shared if n in wire})
        received |= repeat({n: v for n, v in wire.items() if n.partition(".")[0] in plan.method.travels}, clients)
    local = clone(received) | personal
    ids = [examples.users[user] for user in cohort]
    visit = Visit(
        options=plan.options,
        round=number,
        rounds=config.rounds,
        received=received,
        local=local,
        own=clone(local) | twins if plan.twins else local,
        memory={n: value for n, value in kept.items() if n not in model.layers},
        shared=layout.shared,
        rates={n: step_size(config.local, group) for n, group in model.group.items()},
        steps=torch.zeros(clients),
        client_rate=config.client_rate,
        users=len(examples.users),
        coin=torch.from_numpy(uniforms(seed_key(config.seed), ("coin",), ids)[:, 0].astype(np.float32)),
        centroid=lambda count: _centroid(model, examples, cohort, count, number),
    )
    return visit, chosen


def leave(visit: Visit, wire: Mapping[str, Tensor], chosen: Choice | None, names: Sequence[str]) -> Parameters:
    """Return what would be sent without protection, (clients, out, in) by name; models that were not chosen come back
    as they were.
    """
    if chosen is None:
        return {name: visit.local[name] for name in names}
    reply = repeat({name: wire[name] for name in names}, len(chosen))
    for name in names:
        cluster, _, array = name.partition(".")
        mine = torch.from_numpy(chosen == int(cluster.removeprefix("cluster")))
        reply[name][mine] = visit.local[array][mine]
    return reply


def clone(parameters: Parameters) -> Parameters:
    """Copy every array."""
    return {name: value.clone() for name, value in parameters.items()}


def repeat(arrays: Mapping[str, Tensor], clients: int) -> Parameters:
    """Give every client a copy of arrays (out, in)."""
    return {name: value.expand(clients, *value.shape).clone() for name, value in arrays.items()}


def _choose(
    layout: Layout,
    model: CohortModel,
    examples: Examples,
    cohort: Sequence[int],
    wire: Mapping[str, Tensor],
    personal: Parameters,
) -> Choice:
    """Return for each client the version with the smallest loss on its training records; without any, the first."""
    rows = np.concatenate([examples.train[user] for user in cohort])
    owners = np.repeat(np.arange(len(cohort)), [len(examples.train[user]) for user in cohort])
    if not len(rows):
        return np.zeros(len(cohort), dtype=np.int64)
    losses = []
    for place in range(layout.clusters):
        version = {n: wire[f"cluster{place}.{n}"] for n in layout.shared}
        model.load(model.broadcast(len(cohort), version) | personal)
        with torch.no_grad():
            found = (
                model.losses(model.all_contexts(rows, owners), rows, torch.from_numpy(owners)).cpu().double().numpy()
            )
        losses.append(np.bincount(owners, np.nan_to_num(found, nan=np.inf), len(cohort)))
    return np.asarray(np.argmin(losses, axis=0))


def _centroid(model: CohortModel, examples: Examples, cohort: Sequence[int], count: int, number: int) -> Tensor:
    """Average the features of each client's first `count` training records, (clients, width); zero without any."""
    if number:
        raise PrivacyRefusal(
            "visit.centroid reads records, which in a round only phases may do, under the noise that is planned for "
            "them; use it in `home`, after the last release."
        )
    if model.features is None:
        raise ConfigError("visit.centroid needs the features that a gate is made of; name the group gate in scopes.")
    parts = [model.features[model.on_device(examples.train[user][:count])] for user in cohort]
    return torch.stack([part.sum(dim=0) / max(len(part), 1) for part in parts]).cpu()
