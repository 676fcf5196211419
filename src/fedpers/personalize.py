"""A personal model for somebody who joins after a run's last release.

It is fitted at the user's home. Nothing of it is sent, so it spends no privacy budget, and all of it is private to that
user. As in a run, what the frozen part of the backbone makes of the texts is left in the cache of features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fedpers.cohort.clients import Clients
from fedpers.cohort.model import CohortModel
from fedpers.cohort.personal_store import PersonalStore
from fedpers.cohort.saving import save_shared
from fedpers.config import GROUPS, PLAIN, Family, expand, spoken
from fedpers.errors import ConfigError, DataError, RunDirectoryError
from fedpers.evaluation import models as evaluation
from fedpers.finished_run import (
    Arrays,
    Finished,
    Measured,
    measure,
    nothing_released,
    open_run,
    over_records,
    read_records,
)
from fedpers.methods.base import FROZEN, PERSONAL, SHARED, Method, Phase
from fedpers.models.backbone import public_name
from fedpers.plan import Plan
from fedpers.privacy.randomness import seed_key
from fedpers.reporting import Reporter
from fedpers.run_place import check_new
from fedpers.tasks.base import Examples

PRIVATE = "private to the user whose records it was fitted to: no claim covers it, so it must not be shown to others"


@dataclass(frozen=True)
class Personal:
    """A personal model that was fitted to somebody new."""

    path: Path
    groups: tuple[str, ...]
    train: int  # records it was fitted to
    own: Measured | None  # on the records held out; None where there are none
    common: Measured | None  # the shared model on the same


def personalize(
    run_dir: Path,
    user_data: Path,
    out: Path,
    *,
    groups: tuple[Family, ...] = (),
    test: float = 0.2,
    reporter: Reporter | None = None,
) -> Personal:
    """Fit a personal model to somebody who joins after the last release, and write it.

    Args:
        run_dir: a finished or exported run.
        user_data: JSONL of {"input", "target"}, and optionally "id" and "conversation", in the order of time.
        out: a new directory for PEFT's files, the head and personal.json; none of them holds a text.
        groups: fit these on top of the shared model, as fedavg-finetune does; by default what the method says.
        test: share of the records, the last ones, that are held out to compare with the shared model; 0 for none.
        reporter: whom to tell about progress.

    Raises:
        DataError: a file that cannot be used; it names the line.
        ConfigError: a method that has nothing for somebody new.
        RunDirectoryError: no finished run, or `out` exists.
    """
    if not 0 <= test < 1:
        raise ConfigError(f"--test {test:g}: expected a share from 0 to below 1.")
    check_new(out)
    run = open_run(run_dir)
    plan = newcomer_plan(run.plan, groups)
    records = read_records(user_data, optional_input=run.task.causal)
    held = max(1, int(test * len(records) + 1e-9)) if test else 0
    if held >= len(records):
        raise DataError(f"{user_data.name}: {len(records)} record, too few to fit and to test; add some, or --test 0.")
    cut = len(records) - held
    model = over_records(run, plan, records[:cut], records[cut:], user_data.name, reporter)
    fitted = fit_at_home(run, plan, model, model.examples, run.wire)
    own, common = None, None
    if held:
        mine = evaluation.Kind(lambda _: fitted, "own")
        own, common = measure(model, {"own": mine, "shared": evaluation.common(model, run.shared, "shared")})
    write_own(model, fitted, out)
    about = {
        "run": run.config.name,
        "made_on": run.mark,
        "method": run.config.method,
        "task": run.config.task.name,
        "backbone": public_name(run.config.model.backbone),
        "groups": list(spoken(plan.personal)),
        "fit": [str(phase) for phase in plan.finish],
        "records": {"train": cut, "test": held},
        "metric": run.task.metric,
        "metrics": {} if own is None or common is None else {"own": own.metrics, "shared": common.metrics},
        "private": PRIVATE,
    }
    (out / "personal.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return Personal(out, plan.personal, cut, own, common)


def newcomer_plan(plan: Plan, groups: tuple[Family, ...] = ()) -> Plan:
    """Return what is done at home for somebody who was in no round.

    By default the method's phases after the last release, and before them those of its rounds that move personal
    groups, on these alone. With `groups`, one phase on them, from the shared model, whatever the method keeps.

    Raises:
        ConfigError: nothing is personal, or personal state grows in the rounds from what somebody new does not have.
    """
    name, method = plan.name, plan.method
    if groups:
        wanted = expand(groups)
        scopes = {g: SHARED if plan.scopes.get(g) is SHARED else FROZEN for g in GROUPS
                  if g in PLAIN or g in wanted or plan.scopes.get(g) is SHARED}  # fmt: skip
        rounds = (Phase(*plan.shared),) if plan.shared else ()
        return Plan(name, scopes, rounds, (Phase(*wanted),), method=method if method.clusters else Method,
                    options=plan.options)  # fmt: skip
    if plan.twins or method.remembers or method.travels:
        raise ConfigError(
            f"method {name!r}: a user's own model grows from what stayed at home in the rounds, which somebody new "
            "does not have; say --groups head (or adapter+head) to fit these on top of the shared model."
        )
    late = {group for phase in plan.finish for group in phase.train}
    early = (phase.only(set(plan.groups(PERSONAL)) - late) for phase in plan.round)
    finish = (*(phase for phase in early if phase.train), *plan.finish)
    if not finish and not method.clusters:
        raise ConfigError(
            f"method {name!r} keeps nothing personal; say --groups head (or adapter+head) to fit these on top of the "
            "shared model, as fedavg-finetune does."
        )
    return replace(plan, finish=finish)


def fit_at_home(
    run: Finished, plan: Plan, model: CohortModel, examples: Examples, start: Arrays
) -> dict[str, torch.Tensor]:
    """Train everybody in `examples`, rows of the model's, at home from the arrays in `start`.

    Returns whole models, each array (users, out, in). Raises ConfigError for numbers that are not finite.
    """
    users = len(examples.users)
    with TemporaryDirectory() as nowhere:  # personal state of rounds, of which there are none
        store = PersonalStore(Path(nowhere), users, {})
        clients = Clients(run.config, plan, nothing_released(run), model, store, seed_key(run.config.seed))
        clients.examples = examples
        parts = [fitted for _, fitted in clients.finish(range(users), start, None)]
    check_finite(clients)
    return {name: torch.cat([part[name] for part in parts]) for name in model.layers}


def check_finite(clients: Clients) -> None:
    """Raise ConfigError if training at home went to numbers that are not finite."""
    if clients.nonfinite_updates:
        raise ConfigError("training at home went to numbers that are not finite; run again with a lower personal.lr.")


def write_own(model: CohortModel, own: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write one user's own model, each array (1, out, in), as PEFT's files with the head beside them.

    Raises:
        RunDirectoryError: `out` exists or cannot be written.
    """
    try:
        out.mkdir(parents=True, mode=0o700)
        save_shared(model, out, {name: own[name][0].numpy() for name in model.layers})
    except OSError as error:
        raise RunDirectoryError(f"{out}: cannot be written ({error.strerror}); choose a new directory.") from error
