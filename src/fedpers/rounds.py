"""The federated part of a run: rounds through Flower, a checkpoint after each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from numpy.typing import NDArray

from fedpers.cohort.clients import Clients
from fedpers.config import FAMILIES
from fedpers.errors import LedgerError
from fedpers.evaluation import models as evaluation
from fedpers.experiment import Experiment
from fedpers.flower import messages as wire
from fedpers.flower.cohort_grid import CohortGrid
from fedpers.flower.strategy import FedpersStrategy, RoundReport
from fedpers.models.array_names import family_of
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import Secret
from fedpers.privacy.randomness import fingerprint
from fedpers.privacy.spending import BudgetSpent, spent
from fedpers.reporting import Reporter
from fedpers.run_directory import Checkpoint, RunDirectory

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Road:
    """The way to the clients: in this process, or elsewhere, on Flower's Ray runtime or on the users' own machines.

    Attributes:
        grid: leads to them; its node FIRST_NODE + position acts for the user at that position.
        told: what every training message says besides arrays and round.
        secret: where the keys come from.
        timeout: seconds for which a round waits for answers.
        away: whether they are elsewhere.
    """

    grid: Any
    told: Mapping[str, str]
    secret: Secret
    timeout: float
    away: bool = True


def federate(
    experiment: Experiment,
    clients: Clients,
    directory: RunDirectory,
    server_key: bytes,
    reporter: Reporter,
    track: Callable[[Sequence[dict[str, Any]]], None] = lambda history: None,
    road: Road | None = None,
) -> tuple[Arrays, Ledger, list[dict[str, Any]]]:
    """Run the rounds that are left through Flower; returns final shared arrays, ledger and a row per round.

    `track` is given the rows of all rounds so far, once they are on disk: at the start and after each round.
    Without a `road` the clients are `clients`, in this process; where they are away, those tell their layout alone.
    """
    config = experiment.config
    road = road or Road(CohortGrid(clients), {}, directory.secret_origin(), timeout=3600, away=False)
    done = directory.recover(clients.store)
    history = list(done.history) if done else []
    track(history)
    users = experiment.examples.users
    shared: Arrays = clients.layout.broadcast()
    key = fingerprint(server_key, "run")
    opening = experiment.guarantee.opening(config, clients.shared_names, len(users), road.secret, key)
    if done is not None:
        shared = done.shared
        ledger = Ledger.rewind(directory.ledger, done.ledger_lines)
    elif directory.has_ledger():
        ledger = Ledger.rewind(directory.ledger, 1)
    else:
        ledger = Ledger.create(directory.ledger, opening)
    if ledger.opening != opening:
        old, new = ledger.opening.model_dump(), opening.model_dump()
        changed = [name for name in new if new[name] != old[name]]
        raise LedgerError(
            f"{directory.ledger} was opened for another run, in {', '.join(changed)}: people, records, model, method "
            "or version are no longer what it was started with; start a new run."
        )
    if road.away and ledger.pending:
        raise LedgerError(
            f"{directory.ledger}: the server was stopped between its line for round {ledger.pending[0].round} and its "
            "checkpoint, and nodes answer a round once, so the run cannot go on; start another, with a new `out` here "
            "and a new `state` at each node, and add what this ledger holds to what that one will claim."
        )
    rounds = config.rounds if clients.shared_names else 0
    strategy = FedpersStrategy(
        config, experiment.guarantee, users, ledger, server_key, clients.layout, first_round=len(history),
        tell=reporter.message if road.away else None,
    )  # fmt: skip
    if done is not None:
        strategy.load_state(done.strategy)
    round_began = time.monotonic()

    def after_round(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower calls this with the new broadcast: measure, write the checkpoint, report."""
        nonlocal shared, round_began
        if number == 0:
            return None
        shared = wire.from_record(arrays)
        seconds, round_began = time.monotonic() - round_began, time.monotonic()
        assert strategy.report is not None
        row = _row(len(history) + 1, clients, strategy.report, spent(ledger))
        if config.evaluation.every and (row["round"] % config.evaluation.every == 0 or row["round"] == rounds):
            row |= _measure(experiment, clients, shared)
        history.append(row)
        users_changed, rows = clients.store.drain()
        directory.commit(
            Checkpoint(row["round"], len(ledger), ledger.head, shared, strategy.state(), history),
            users_changed,
            rows,
            clients.store,
        )
        directory.note_time(f"round {row['round']}", seconds)
        reporter.round({**row, "clients_per_second": row["clients"] / max(seconds, 1e-9)}, rounds)
        track(history)
        return None

    if len(history) < rounds:
        logging.getLogger("flwr").setLevel(logging.ERROR)
        initial = wire.to_record(shared, clients.shared_names)
        try:
            strategy.start(
                road.grid, initial, num_rounds=rounds - len(history), timeout=road.timeout,
                train_config=ConfigRecord(dict(road.told)), evaluate_fn=after_round,
            )  # fmt: skip
        except BudgetSpent:
            reporter.message(f"the budget is spent after {len(history)} of {rounds} rounds")
    return shared, ledger, history


def _row(number: int, clients: Clients, report: RoundReport, epsilon: float) -> dict[str, Any]:
    """One row of rounds.parquet: the simulator's own channel, private in a deployment."""
    stats, clients.stats = clients.stats, type(clients.stats)()
    nonfinite, clients.nonfinite_updates = clients.nonfinite_updates, 0
    row: dict[str, Any] = {
        "round": number,
        "clients": report.clients,
        "train_loss": stats.loss_sum / stats.records if stats.records else None,
        "epsilon": None if np.isinf(epsilon) else epsilon,
        "records_clipped": stats.clipped,
        "records_nonfinite": stats.nonfinite,
        "updates_clipped": report.clipped,
        "updates_nonfinite": report.nonfinite + nonfinite,
        "median_update_norm": None if np.isnan(report.median_update_norm) else report.median_update_norm,
        "bytes_up": report.bytes_up,
        "bytes_down": report.bytes_down,
        "aggregation_error": None if report.diagnosis is None else report.diagnosis.error,
        "effective_rank": None if report.diagnosis is None else report.diagnosis.rank,
    }
    signal, noise = report.signal or {}, report.noise or {}
    if clients.noise and report.clients:  # the clients made the noise: of their mean
        made = {name: (value / report.clients).numpy() for name, value in clients.noise.items()}
        signal = _norms({name: moved - made.get(name, 0.0) for name, moved in report.moved.items()})
        noise = _norms(made)
    for family in FAMILIES:
        row[f"signal_{family}"], row[f"noise_{family}"] = signal.get(family), noise.get(family)
    return row


def _norms(arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, float]:
    """L2 norm by family of parameter groups."""
    squares: dict[str, float] = {}
    for name, array in arrays.items():
        squares[family_of(name)] = squares.get(family_of(name), 0.0) + float(np.sum(np.square(array, dtype=np.float64)))
    return {family: float(np.sqrt(square)) for family, square in squares.items()}


def _measure(experiment: Experiment, clients: Clients, shared: Arrays) -> dict[str, float]:
    """The task's metric of the shared model, averaged over users, and of the users' own if they move in the rounds."""
    users, task = experiment.measured, experiment.task
    kinds = {"global": evaluation.common(clients.model, clients.layout.common(shared), "shared")}
    if experiment.plan.moves_personal_state:
        kinds["own"] = evaluation.own(clients, shared, clients.store)
    found = evaluation.measure(clients.model, users, kinds)
    return {
        f"{kind}_{task.metric}": float(np.mean([user[task.metric] for user in found.per_user(task, kind)]))
        for kind in kinds
    }
