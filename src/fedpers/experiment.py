"""From a configuration to everything that a run needs: people, model, method, guarantee."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedpers.cohort.batching import Index
from fedpers.cohort.linear import Owners, to_cohort
from fedpers.cohort.model import CohortModel
from fedpers.cohort.products import supported
from fedpers.cohort.rows import check_rows
from fedpers.cohort.tuning import Choice
from fedpers.config import Config
from fedpers.data import Federation, load
from fedpers.data.base import Source
from fedpers.errors import ConfigError, DataError, PrivacyRefusal
from fedpers.evaluation.models import swap_partners
from fedpers.flower.strategy import stock_strategy
from fedpers.methods.base import Method
from fedpers.models import adapters
from fedpers.models.array_names import HEAD, array_name, family_of, group_of
from fedpers.models.backbone import Backbone, usable
from fedpers.plan import Plan, encodes, plan
from fedpers.population import sample
from fedpers.privacy.claim import METRICS, TUNING
from fedpers.privacy.guarantee import Guarantee, resolve
from fedpers.privacy.randomness import seed_key
from fedpers.privacy.refusals import check_setup
from fedpers.registry import find, source_of
from fedpers.reporting import Reporter
from fedpers.tasks.base import Examples, Task

FEW = 3  # users on whose records a model is tried out


@dataclass(frozen=True)
class Experiment:
    """All that is fixed before the first round."""

    config: Config
    plan: Plan
    local_plan: Plan  # the local-only baseline: the same training at home, from the public start
    guarantee: Guarantee
    federation: Federation
    examples: Examples
    task: Task
    # whose personal state each measured user tries, by position; None where nothing is personal
    swap: Mapping[int, int] | None

    @property
    def measured(self) -> Sequence[int]:
        """The positions of the users who are measured and train at home."""
        return _measured(self.config, self.federation)

    def records_of(self, users: Sequence[int]) -> Examples:
        """Make the records of some users, by position, where records are made when they are needed."""
        return _examples(self.config, self.federation.of(users), self.task)

    @property
    def excluded(self) -> list[str]:
        """What the accounting leaves out, for the claim."""
        return [METRICS, TUNING, *self.federation.facts]

    @property
    def adapts(self) -> bool:
        """Whether any adapter moves; if not, every context is encoded once."""
        local = self.local_plan.trained if self.config.evaluation.local_only else ()
        return encodes((*self.plan.trained, *self.plan.beyond, *local))


@dataclass
class Reuse:
    """What several runs in one process may share, by the part of the configuration that it depends on."""

    federations: dict[str, tuple[Federation, Examples, Task]] = field(default_factory=dict)
    models: dict[tuple[Any, ...], CohortModel] = field(default_factory=dict)
    choice: Choice | None = None  # how the first of them found that the engine's work is best cut


def method_plan(name: str, config: Config) -> Plan:
    """Look a method up and apply the configuration to its table."""
    return plan(name, find("methods", name, Method), config)


def prepare(config: Config, reuse: Reuse | None = None, federation: Federation | None = None) -> Experiment:
    """Load the federation, apply the method's table, check the guarantee. Trains nothing and loads no model.

    Args:
        config: what is to be run.
        reuse: what to share with other runs in this process.
        federation: the people, where they are not to be loaded: a node of a deployment knows its own user's records,
            its server nobody's.

    Raises:
        FedpersError: whatever cannot be used or claimed, before any work is done.
    """
    reuse = reuse or Reuse()
    usable(config.engine.device)
    own_plan = method_plan(config.method, config)
    local_plan = method_plan("local", config.model_copy(update={"options": {}}))
    check_setup(config, own_plan)  # refusals that need no data come first
    stock_strategy(config)  # refuses options that it does not take
    key = _json(config, "data", "task", "seed")
    if key not in reuse.federations:
        _check_task(config)
        federation = federation or load(config, seed_key(config.seed))
        task = find("tasks", config.task.name, Task)(config.task)  # type: ignore[type-abstract]
        some = federation.of(range(min(FEW, len(federation.users)))) if federation.lazy else federation
        reuse.federations[key] = federation, _examples(config, some, task), task
    federation, examples, task = reuse.federations[key]
    if federation.lazy and config.engine.precision == "bf16":
        raise ConfigError(
            "data.lazy with engine.precision=bf16: what is frozen is computed again for each round, then by rounded "
            "weights; choose one of them."
        )
    if federation.lazy and config.evaluation.users is None:
        raise ConfigError(
            "data.lazy: all users would be measured and train at home, so the records of all would be made; set "
            "evaluation.users to how many are to be measured."
        )
    guarantee = resolve(config, own_plan, users=len(federation.users))
    swap = None
    if own_plan.personal:
        try:
            swap = _swap(federation, _measured(config, federation), seed_key(config.seed))
        except ValueError as error:
            raise DataError(f"data {federation.source}: {error}; raise data.users.") from error
    return Experiment(config, own_plan, local_plan, guarantee, federation, examples, task, swap)


def _examples(config: Config, federation: Federation, task: Task) -> Examples:
    """Make the examples of the users whose records are here; refuse more of them than was planned with."""
    most = max((len(federation.train[user]) for user in federation.people), default=0)
    if most > config.data.max_train:
        raise DataError(
            f"data {federation.source}: a user has {most} training records, more than data.max_train = "
            f"{config.data.max_train}, which delta and noise are planned with; cap them in the data source."
        )
    return task.prepare(federation, seed_key(config.seed))


def _measured(config: Config, federation: Federation) -> Sequence[int]:
    return sample(len(federation.users), config.evaluation.users, seed_key(config.seed))


def _swap(federation: Federation, measured: Sequence[int], key: bytes) -> dict[int, int]:
    """Choose a swap partner for each measured user among the others."""
    place = {user: number for number, user in enumerate(measured)}

    def among(groups: Sequence[frozenset[int]]) -> list[frozenset[int]]:
        return [frozenset(place[other] for other in groups[user] if other in place) for user in measured]

    names = [federation.users[user] for user in measured]
    pools = None if federation.swap is None else among(federation.swap)
    chosen = swap_partners(names, among(federation.partners), key, pools)
    return {user: measured[other] for user, other in zip(measured, chosen, strict=True)}


def _check_task(config: Config) -> None:
    """Refuse a task of ours that a source is known not to fit; what others add is theirs to know."""
    fitting = find("data", config.data.name, Source).tasks  # type: ignore[type-abstract]
    name = config.task.name
    if fitting and name not in fitting and find("tasks", name, Task).__module__.startswith("fedpers."):  # type: ignore[type-abstract]
        raise ConfigError(
            f"data.name={config.data.name} is for {' or '.join(fitting)}, which task.name={name} is not; set "
            f"task.name={fitting[0]}, or choose other data (`fedpers data list`)."
        )


def build_model(experiment: Experiment, reporter: Reporter, reuse: Reuse | None = None) -> CohortModel:
    """Load the backbone and compute what is frozen, once for all runs that share it."""
    config = experiment.config
    torch.set_num_threads(1)  # passes go on beside each other, see cohort/lanes.py; one is not split
    torch.use_deterministic_algorithms(True, warn_only=False)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - costs time, changes nothing
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's products are refused as random
    if config.engine.precision == "bf16" and not supported(torch.device(config.engine.device)):
        reporter.message("engine.precision=bf16: this machine has no bfloat16 products, so fp32 would be faster")
    reuse = reuse or Reuse()
    kept = (config.engine.precision, config.engine.prefix, config.engine.threads, config.engine.device)
    parts = (_json(config, "data", "task", "seed", "model"), *kept)
    beyond, link = experiment.plan.beyond, experiment.plan.method.link
    key = parts, experiment.adapts, beyond, link
    if key not in reuse.models:
        # At their initial values adapters change nothing, so a model without them takes all from one with them.
        lazy = bool(experiment.federation.lazy)
        donor = None
        if not (experiment.adapts or lazy or config.engine.rounded):
            donor = next((m for k, m in reuse.models.items() if k[:2] == (parts, True)), None)
        reuse.models[key] = CohortModel(
            config,
            experiment.task,
            experiment.examples,
            seed_key(config.seed),
            experiment.adapts,
            reporter.stage,
            donor,
            beyond,
            link,
            experiment.records_of if lazy else None,
        )
    model = reuse.models[key]
    model.budget = config.engine.token_budget
    if experiment.guarantee.unit != "none":
        check_separate(model)
        check_rows(experiment.plan, model, config)
        _check_secret(experiment)
    return model


def _check_secret(experiment: Experiment) -> None:
    """Refuse a given secret where a changed run could not be told from this one and would draw the same noise."""
    if experiment.config.privacy.secret is None:
        return
    for what, kind in {"method": experiment.plan.method, "task": type(experiment.task)}.items():
        if not source_of(kind):
            raise PrivacyRefusal(
                f"privacy.secret with the {what} {kind.__name__}: no file defines it, so a changed version could "
                "not be told from this one and would draw the same noise; leave privacy.secret out, or put the "
                f"{what} into a file."
            )
    if experiment.config.engine.tune and experiment.config.engine.rounded:
        raise PrivacyRefusal(
            "privacy.secret with engine.tune under bf16 or fp16: the work may be cut in another way the next time, "
            "which changes rounded results and not the noise; leave privacy.secret out, or set engine.tune=false."
        )
    source = find("data", experiment.config.data.name, Source)  # type: ignore[type-abstract]
    if experiment.federation.lazy and not source.__module__.startswith("fedpers."):
        raise PrivacyRefusal(
            f"privacy.secret with the lazy data source {source.__name__}: records are made when they are needed, so "
            "changed ones could not be told from these and would meet the same noise; leave privacy.secret out, or "
            "set data.lazy=false."
        )


def check_separate(model: CohortModel) -> None:
    """Compute the losses of some records together and one by one; they must not notice each other.

    Raises:
        PrivacyRefusal: a task or a backbone in which one record shapes another's loss, so that clipping bounds nothing.
    """
    people = model.examples.people[:FEW]
    if not people:
        return  # the server of a deployment, whose nodes look for themselves
    rows = np.concatenate([model.examples.train[user][:2] for user in people])
    owners = np.zeros_like(rows)
    generator = torch.Generator().manual_seed(0)
    model.load({n: t[None] + 0.1 * torch.randn(1, *t.shape, generator=generator) for n, t in model.initial.items()})

    def losses(part: Index) -> torch.Tensor:
        owner = torch.from_numpy(owners[part])
        return model.losses(model.contexts(rows[part], owner), rows[part], owner)

    with torch.no_grad():
        together = losses(np.arange(len(rows)))
        alone = torch.cat([losses(np.array([place])) for place in range(len(rows))])
    if not torch.allclose(together, alone, rtol=1e-4, atol=1e-4):
        raise PrivacyRefusal(
            "task or backbone: a record's loss changes with the other records of its batch, so clipping does not bound "
            "what one record or user does; use a loss per record and no batch statistics."
        )


def shared_sizes(experiment: Experiment) -> dict[str, int]:
    """How many numbers of each shared family a client sends in a round; loads the backbone, computes nothing."""
    backbone, plan = Backbone(experiment.config.model.backbone), experiment.plan
    shapes = {f"{HEAD}{n}": p.numel() for n, p in experiment.task.head(backbone.width).named_parameters()}
    if encodes(plan.shared):
        lora = adapters.place(backbone, experiment.config.model.adapter, plan.beyond)
        layers = to_cohort(lora, Owners())
        shapes |= {array_name(name): layer.weight[0].numel() for name, layer in layers.items()}
    sizes: dict[str, int] = {}
    copies = 1 + len(plan.method.travels)
    if plan.method.clusters:
        copies = int(plan.options[plan.method.clusters])
    for name, size in shapes.items():
        if group_of(name) in plan.sent(1):
            family = family_of(name)
            sizes[family] = sizes.get(family, 0) + copies * size
    return sizes


def _json(config: Config, *sections: str) -> str:
    tree: dict[str, Any] = config.model_dump(mode="json", include=set(sections))
    return repr(sorted(tree.items()))
