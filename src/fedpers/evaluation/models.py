"""Measuring models on the users' test records: own, global, local-only, zero-shot and somebody else's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.cohort.batching import Index, microbatches
from fedpers.cohort.clients import Clients
from fedpers.cohort.model import CohortModel, Parameters
from fedpers.cohort.personal_store import PersonalStore
from fedpers.plan import Plan, encodes
from fedpers.privacy.randomness import generator
from fedpers.tasks.base import Task

Arrays = Mapping[str, NDArray[np.float32]]
PerRecord = dict[str, NDArray[np.float64]]  # metric -> (records,)


@dataclass(frozen=True)
class Found:
    """What was measured on the test records of some users, one user's after another's."""

    users: tuple[int, ...]  # positions
    train: tuple[int, ...]  # (users,) how many training records they have
    test: tuple[int, ...]  # (users,) how many test records
    kinds: Mapping[str, PerRecord]

    def per_user(self, task: Task, kind: str) -> list[dict[str, float]]:
        """Return the task's metrics of one kind for each user."""
        edges = np.cumsum([0, *self.test])
        return [
            task.of_user({metric: values[edges[i] : edges[i + 1]] for metric, values in self.kinds[kind].items()})
            for i in range(len(self.users))
        ]


@dataclass(frozen=True)
class Kind:
    """One model per user. Kinds with the same `adapter` label encode contexts alike, so that is done once."""

    parameters: Callable[[list[int]], Parameters]  # positions of users -> (users, out, in) by name
    adapter: str
    common: bool = False  # everyone has the same model


def common(model: CohortModel, arrays: Arrays, adapter: str) -> Kind:
    """The same arrays for everyone; names that are not given stay at their public initial value."""
    given = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
    return Kind(lambda users: model.broadcast(len(users), given), adapter, common=True)


def own(clients: Clients, shared: Arrays, store: PersonalStore) -> Kind:
    """Each user's own model during the rounds: what the personal state in `store` makes of the shared arrays."""

    def parameters(users: list[int]) -> Parameters:
        parts = [one for _, one in clients.own(users, shared, store)]
        return {name: torch.cat([part[name] for part in parts]) for name in clients.model.layers}

    return Kind(parameters, _label(clients.plan, shared, "own"))


def finished(model: CohortModel, shared: Arrays, store: PersonalStore, plan: Plan, label: str = "own") -> Kind:
    """Each user's final model: its groups in `store` on top of the shared arrays, by the model's names."""
    given = {name: torch.from_numpy(np.array(value)) for name, value in shared.items()}

    def parameters(users: list[int]) -> Parameters:
        return model.broadcast(len(users), given) | store.read(users)

    return Kind(parameters, _label(plan, shared, label))


def _label(plan: Plan, shared: Arrays, own: str) -> str:
    """Name what shapes a kind's contexts."""
    if encodes(plan.personal):
        return own
    return "shared" if shared else "initial"


def swapped(kind: Kind, partner: Mapping[int, int] | Sequence[int]) -> Kind:
    """Every user with somebody else's model."""
    adapter = kind.adapter if kind.adapter in {"shared", "initial"} else "swap"
    return Kind(lambda users: kind.parameters([partner[user] for user in users]), adapter)


def measure(model: CohortModel, users: Sequence[int], kinds: Mapping[str, Kind], cohort: int = 64) -> Found:
    """Return every kind's metrics on every test record, in the order of users and of their test rows.

    All kinds are measured on one cohort before the next, and those that encode alike on one pass before the next. So
    contexts are held of one pass at a time, and records that are made when they are needed of one cohort.
    """
    train: list[int] = []
    test: list[int] = []
    found: dict[str, list[Mapping[str, Tensor]]] = {name: [] for name in kinds}
    for start in range(0, len(users), cohort):
        members = list(users[start : start + cohort])
        model.present(members, keep=True)
        held = [model.examples.test[user] for user in members]
        train += [len(model.examples.train[user]) for user in members]
        test += [len(one) for one in held]
        rows, owned = np.concatenate(held), np.repeat(np.arange(len(members)), [len(one) for one in held])
        alike: dict[str, list[str]] = {}
        for name, kind in kinds.items():
            alike.setdefault(kind.adapter, []).append(name)
        for names in alike.values():
            for name, metrics in _measured(model, {n: kinds[n] for n in names}, members, rows, owned).items():
                found[name].append(metrics)
    joined = {
        name: {metric: torch.cat([part[metric] for part in parts]).double().numpy() for metric in parts[0]}
        for name, parts in found.items()
    }
    return Found(tuple(users), tuple(train), tuple(test), joined)


def _measured(
    model: CohortModel, kinds: Mapping[str, Kind], members: list[int], rows: Index, owned: Index
) -> dict[str, dict[str, Tensor]]:
    """Return the metrics of kinds that encode alike on a cohort's rows."""
    weights = {n: kind.parameters(members[:1] if kind.common else members) for n, kind in kinds.items()}
    owners = {name: torch.from_numpy(np.zeros_like(owned) if kind.common else owned) for name, kind in kinds.items()}
    first = next(iter(kinds))
    found: dict[str, dict[str, Tensor]] = {name: {} for name in kinds}
    parts = list(microbatches(model.lengths[rows], model.budget))

    def one(by: CohortModel, part: Index) -> dict[str, Mapping[str, Tensor]]:
        here = torch.from_numpy(part)
        with torch.no_grad():
            by.load(weights[first])
            contexts = by.contexts(rows[part], owners[first][here])
            metrics: dict[str, Mapping[str, Tensor]] = {}
            for name in kinds:
                by.load(weights[name])
                measured = by.metrics(contexts, rows[part], owners[name][here])
                metrics[name] = {metric: value.cpu() for metric, value in measured.items()}
        return metrics

    effort = model.effort(int(model.lengths[rows].sum())) / 2
    for part, metrics in zip(parts, model.lanes.each(one, parts, effort), strict=True):
        for name, values in metrics.items():
            for metric, value in values.items():
                whole = found[name].setdefault(metric, value.new_empty(len(rows)))
                whole[torch.from_numpy(part)] = value
    return found


def shared_metrics(clients: Clients, users: Sequence[int], shared: Arrays) -> list[dict[str, float]]:
    """Metrics of the shared model for each user."""
    found = measure(clients.model, users, {"global": common(clients.model, clients.layout.common(shared), "shared")})
    return found.per_user(clients.model.task, "global")


def rows(task: Task, found: Found, seed: int) -> list[dict[str, int | float | str]]:
    """Return the rows of the users table: a row per user and kind."""
    table: list[dict[str, int | float | str]] = []
    edges = np.cumsum([0, *found.test])
    for kind, records in found.kinds.items():
        only_own, only_other = _one_is_better(found.kinds["own"], records)
        for place, (user, metrics) in enumerate(zip(found.users, found.per_user(task, kind), strict=True)):
            part = slice(edges[place], edges[place + 1])
            table.append(
                {
                    "seed": seed,
                    "user": user,
                    "kind": kind,
                    "test_records": found.test[place],
                    "train_records": found.train[place],
                    **metrics,
                    "only_own": int(only_own[part].sum()),
                    "only_other": int(only_other[part].sum()),
                }
            )
    return table


def _one_is_better(own: PerRecord, other: PerRecord) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Records that own alone, or the other alone, gets right; of a task without right and wrong: with less loss."""
    if "accuracy" in own:
        right, theirs = own["accuracy"] > 0.5, other["accuracy"] > 0.5
        return right & ~theirs, ~right & theirs
    return own["loss"] < other["loss"], own["loss"] > other["loss"]


def swap_partners(
    users: Sequence[str], met: Sequence[frozenset[int]], key: bytes, pools: Sequence[frozenset[int]] | None = None
) -> list[int]:
    """Choose for each user somebody else whose personal state to try: never oneself, never a conversation partner.

    Args:
        users: names.
        met: positions of each user's conversation partners.
        key: public key of the choice.
        pools: positions of those among whom each user's partner is chosen, where not anybody will do.

    Somebody for whom nobody is left gets a stranger nowhere; then ValueError is raised.
    """
    chosen = []
    for user, name in enumerate(users):
        pool = range(len(users)) if pools is None else sorted(pools[user])
        drawn = (pool[place] for place in generator(key, "swap", name).permutation(len(pool)))
        other = next((other for other in drawn if other != user and other not in met[user]), None)
        if other is None:
            raise ValueError(f"user {user} has met every other member, so no swap control is possible")
        chosen.append(other)
    return chosen
