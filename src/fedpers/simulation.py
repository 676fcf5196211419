"""A run, from configuration to claim."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fedpers import frontier
from fedpers.cohort.clients import Clients
from fedpers.cohort.layout import layout
from fedpers.cohort.personal_store import PersonalStore
from fedpers.cohort.saving import save_versions
from fedpers.cohort.tuning import tune
from fedpers.config import FAMILIES, Config
from fedpers.errors import RunDirectoryError
from fedpers.evaluation import models as evaluation
from fedpers.evaluation.per_user import summarize, users_table, write_table
from fedpers.experiment import Experiment, Reuse, build_model, prepare
from fedpers.figures.curve import learning_curve
from fedpers.figures.gain import per_user_gain
from fedpers.identity import identity
from fedpers.models.adapters import load as load_adapters
from fedpers.privacy.claim import Claim
from fedpers.privacy.claiming import claim_from, reread
from fedpers.privacy.forecast import Forecast, forecast_from
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.randomness import run_keys
from fedpers.reporting import Reporter
from fedpers.rounds import federate
from fedpers.run_directory import RunDirectory
from fedpers.run_place import place_of_run
from fedpers.summary import headline
from fedpers.tracking.base import Tracker, Tracking

Arrays = dict[str, NDArray[np.float32]]
NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
COLUMNS = (
    ("round", pa.int64()),
    ("clients", pa.int64()),
    ("train_loss", pa.float64()),
    ("epsilon", pa.float64()),
    *((name, pa.int64()) for name in ("records_clipped", "records_nonfinite", "updates_clipped", "updates_nonfinite")),
    ("median_update_norm", pa.float64()),
    *((f"{what}_{group}", pa.float64()) for what in ("signal", "noise") for group in FAMILIES),
    ("aggregation_error", pa.float64()),
    ("effective_rank", pa.float64()),
    ("bytes_up", pa.int64()),
    ("bytes_down", pa.int64()),
)


def rounds_schema(metric: str) -> pa.Schema:
    """Return the columns of rounds.parquet; the metric is of the shared and of the users' own models."""
    return pa.schema([*COLUMNS, *((f"{kind}_{metric}", pa.float64()) for kind in ("global", "own"))])


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    config: Config
    claim: Claim
    summary: dict[str, Any]
    ledger: Ledger
    forecast: Forecast | None = None  # of a larger federation; never this run's guarantee

    @property
    def users(self) -> pa.Table:
        """A row per user and model kind."""
        return pq.read_table(self.path / "users.parquet")

    @property
    def rounds(self) -> pa.Table:
        """A row per round."""
        return pq.read_table(self.path / "rounds.parquet")

    @property
    def shared(self) -> Arrays:
        """The final shared arrays; empty for a method that shares nothing."""
        folder = self.path / "adapters" / "shared"
        return load_adapters(folder) if folder.exists() else {}


def simulate(
    config: Config,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
    reuse: Reuse | None = None,
    track: Sequence[str | Tracker] = (),
) -> Run:
    """Run a configuration, or continue it; returns the finished run.

    Args:
        config: what to run.
        out: the run directory; by default `runs/NAME`, with a number appended when that is taken.
        resume: continue what a killed run left in `out`; starts it if nothing is there.
        reporter: whom to tell about progress; by default nobody.
        reuse: what to share with other runs in this process.
        track: where else the numbers go: "csv", "mlflow", "tensorboard", "wandb", or a `Tracker`. The run itself is
            the same bytes; runs in its picture are not tracked.

    Raises:
        FedpersError: for anything that the caller can mend; nothing is written over.
        TrackingError: a tracker cannot be started; or, after all else is done and written, one failed on the way.
    """
    reporter = reporter or Reporter()
    try:
        with Tracking(track, reporter) as tracking:
            run = _simulate(config, out, resume, reporter, reuse or Reuse(), tracking)
            tracking.finish(run.config, run.path, run.summary, run.claim.sentence, run.claim.epsilon)
    except OSError as error:
        if error.errno not in NOT_WRITTEN:
            raise
        raise RunDirectoryError(
            f"{error.filename or out or 'the run directory'}: cannot be written ({error.strerror}); mend that, and "
            "continue with the same command and --resume."
        ) from error
    return run


def _simulate(
    config: Config, out: Path | str | None, resume: bool, reporter: Reporter, reuse: Reuse, tracking: Tracking
) -> Run:
    began = time.monotonic()
    place = place_of_run(out, config.name, resume)
    resumed = resume and place.started  # what comes to lie there from now on is another's
    experiment = prepare(config, reuse)
    refused = frontier.check(config, lambda cell: prepare(cell, reuse)) if config.frontier else {}
    if config.frontier is not None and config.method not in config.frontier.methods:
        drawn = ", ".join(config.frontier.methods)
        reporter.message(f"no picture: frontier.methods is {drawn}; frontier.methods=[{config.method}] draws this one")
        config = config.model_copy(update={"frontier": None})
        experiment = replace(experiment, config=config)
    directory = RunDirectory.reopen(place.path, config) if resumed else RunDirectory(place.path)
    if resumed and directory.finished:
        reporter.message(f"{directory.path}: this run is finished already")
        return load(directory.path, config)
    if not reuse.models:  # once for all runs in a picture
        reporter.message(_people(experiment))
    model = build_model(experiment, reporter, reuse)
    if not resumed:  # the first write: what a user can mend has been found by now
        directory = RunDirectory.create(directory.path, config)
    tracking.start(config, directory.path)
    if config.engine.tune:
        reuse.choice = directory.tuned(lambda: reuse.choice or tune(model, experiment.plan, config))
        reporter.message("cohort size and token budget are chosen: private/engine.json")
        model.budget = reuse.choice.token_budget
        # `config` stays as it was given: it is shown to others, and the choice hangs on how long people's texts are.
        experiment = replace(experiment, config=reuse.choice.apply(config))
    users = experiment.measured
    everybody = len(experiment.examples.users)
    store = PersonalStore(directory.private / "rounds", everybody, layout(config, experiment.plan, model).kept())
    server_key, clients_key = run_keys(directory.secret(), identity(experiment, model))
    clients = Clients(experiment.config, experiment.plan, experiment.guarantee, model, store, clients_key)

    track = partial(tracking.rounds, everybody)
    shared, ledger, history = federate(experiment, clients, directory, server_key, reporter, track)
    excluded = experiment.excluded
    claim, forecast = claim_from(ledger, expected_rounds=len(history), excluded=excluded), forecast_from(ledger)
    kinds = _train_at_home(experiment, clients, shared, directory, reporter)
    found = evaluation.measure(model, users, kinds)

    task = experiment.task
    table = users_table(evaluation.rows(task, found, config.seed), task.columns)
    rounds = pa.Table.from_pylist(history, schema=rounds_schema(task.metric))
    write_table(table, directory.path / "users.parquet")
    write_table(rounds, directory.path / "rounds.parquet")
    if shared:
        save_versions(model, clients.layout, directory.fresh_adapters(), shared)
    result = summarize(table, metric=task.metric, seed=config.seed, higher_is_better=task.higher_is_better)
    references = {kind: one["mean"] for kind, one in result["metrics"].items() if kind != "global"}
    label = f"{claim.label()}; the metrics are exact and not covered"
    learning_curve(rounds, references, label, directory.figures, task.metric)
    against = "global" if experiment.plan.personal else "zero_shot"
    per_user_gain(table, label, directory.figures, against, task.metric, higher_is_better=task.higher_is_better)
    if config.frontier is not None:
        cells = frontier.draw(
            config, directory.path, (claim, result, forecast), refused,
            lambda cell, place: _cell(cell, place, reporter, reuse),
        )  # fmt: skip
        excluded = [*excluded, *frontier.further_runs(ledger, cells)]
        claim = claim_from(ledger, expected_rounds=len(history), excluded=excluded)
    if not experiment.federation.lazy:  # there the source tells who is who
        directory.write_members(experiment.examples.users)
    directory.write_text("claim.json", claim.to_json())
    if forecast is not None:
        directory.write_text("forecast.json", forecast.to_json())
    directory.note_time("run", time.monotonic() - began)
    summary = headline(experiment, claim, result, history, directory.seconds())
    directory.write_text("summary.json", json.dumps(summary, indent=2) + "\n")
    return Run(directory.path, config, claim, summary, ledger, forecast)


def load(path: Path, config: Config) -> Run:
    """Read a finished run; raises LedgerError if its claim is not what its ledger gives."""
    ledger = Ledger.load(path / "ledger.jsonl")
    claim = reread(Claim.from_json((path / "claim.json").read_bytes()), ledger)
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    return Run(path, config, claim, summary, ledger, forecast_from(ledger))


def _cell(config: Config, path: Path, reporter: Reporter, reuse: Reuse) -> frontier.Outcome:
    reporter.message(f"frontier: {path.name}")
    cell = simulate(config, path, resume=True, reporter=reporter, reuse=reuse)
    return cell.claim, cell.summary, cell.forecast


def _train_at_home(
    experiment: Experiment, clients: Clients, shared: Arrays, directory: RunDirectory, reporter: Reporter
) -> dict[str, evaluation.Kind]:
    """Run what follows the last release, for the method and the local-only baseline; returns the models to measure."""
    model, plan = clients.model, experiment.plan
    users, everybody = experiment.measured, len(experiment.examples.users)

    def train_all(who: Clients, start: Arrays, rounds: PersonalStore | None, name: str) -> PersonalStore:
        store = directory.fresh_store(name, everybody, model.initial_of(who.plan.personal))
        done = 0
        reporter.stage(f"training at home ({name})", done, len(users))
        for cohort, parameters in who.finish(users, start, rounds):
            store.stage(cohort, {name: parameters[name] for name in store.arrays})
            store.apply(*store.drain())
            done += len(cohort)
            reporter.stage(f"training at home ({name})", done, len(users))
        return store

    common = clients.layout.common(shared)
    kinds = {"own": evaluation.common(model, common, "shared" if shared else "initial")}
    kinds["global"] = kinds["own"]
    if plan.personal:
        kinds["own"] = evaluation.finished(model, common, train_all(clients, shared, clients.store, "own"), plan)
    if experiment.config.evaluation.local_only:
        local = clients.with_plan(experiment.local_plan)
        store = train_all(local, {}, None, "local")
        kinds["local"] = evaluation.finished(model, {}, store, experiment.local_plan, "local")
    kinds["zero_shot"] = evaluation.common(model, {}, "initial")
    if experiment.swap is not None:
        kinds["swap"] = evaluation.swapped(kinds["own"], experiment.swap)
    return kinds


def _people(experiment: Experiment) -> str:
    federation = experiment.federation
    if federation.lazy:
        return f"{len(federation.users)} users of {federation.source}, whose records are made when they are needed"
    train, test = (sum(map(len, part)) for part in (federation.train, federation.test))
    skipped = ", ".join(f"{key.replace('_', ' ')} {count}" for key, count in federation.counts.items())
    task, scale = experiment.config.task, ""
    if task.name == "rating" and not {"low", "high"} <= task.model_fields_set:
        scale = f"; ratings are taken to go from {task.low:g} to {task.high:g} (task.low, task.high)"
    people = f"{len(federation.users)} users of {federation.source}"
    return f"{people}: {train} training and {test} test records{f' ({skipped})' if skipped else ''}{scale}"
