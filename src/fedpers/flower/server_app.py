"""The ServerApp that `flwr run` starts: the same rounds as in a simulation, with clients that are elsewhere.

The server holds nobody's records. Its settings (`flwr run -c`, or [tool.flwr.app.config]) are paths as its own process
sees them, and times in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedpers.cohort.clients import Clients
from fedpers.cohort.personal_store import PersonalStore
from fedpers.cohort.saving import save_versions
from fedpers.config import Config, load_config, result_text
from fedpers.data import Federation, load
from fedpers.experiment import build_model, prepare
from fedpers.flower.node import alone, check_away, configuration_hash, origin
from fedpers.flower.node_file import People, read
from fedpers.flower.roll import Roll
from fedpers.privacy.claim import TUNING, Claim
from fedpers.privacy.claiming import claim_from
from fedpers.privacy.randomness import run_keys, seed_key
from fedpers.reporting import PlainReporter
from fedpers.rounds import Road, federate
from fedpers.run_directory import RunDirectory

ANSWERS = "what nodes answer to evaluation messages, where their owners allow it; this server sends none"
OPERATORS = "whoever may start runs on this SuperLink: they are the server"
ROADS = "Where nodes protect what they send, each goes by its own copy of the configuration and by its own ledger."

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run or resume the rounds, and leave ledger, claim and the shared adapters in the directory `out`."""
    serve(grid, context.run_config)


def serve(grid: Any, settings: Mapping[str, Any]) -> Claim:
    """Run the rounds that are left with the nodes of a grid; returns what the server's ledger proves.

    Args:
        grid: Flower's.
        settings: `config` (YAML), `out` (run directory), `people` (the public list; empty on Ray, where the
            configuration's data are at hand), `patience` and `timeout` (seconds for nodes to appear and to answer).

    Raises:
        FedpersError: what cannot be run or claimed.
    """
    config = load_config(str(settings["config"]))
    reporter = PlainReporter(Console())
    federation, keys = _people(config, str(settings.get("people", "")))
    experiment = prepare(config, federation=federation)
    check_away(experiment)
    out = Path(str(settings["out"]))
    patience = float(settings.get("patience", 60))
    with alone(out, patience):  # a server whose SuperLink was stopped may need some time to end
        directory = RunDirectory(out)
        directory = (RunDirectory.reopen if directory.started else RunDirectory.create)(out, config)
        unmeasured = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"every": 0})})
        experiment = replace(experiment, config=unmeasured)
        model = build_model(experiment, reporter)
        store = PersonalStore(directory.private / "rounds", 1, {})  # personal state is where its user is
        clients = Clients(unmeasured, experiment.plan, experiment.guarantee, model, store, b"")
        secret = origin(directory, config)
        roll = Roll(grid, len(federation.users), patience, keys)
        road = Road(
            roll, {"configuration": configuration_hash(config, secret)}, secret, float(settings.get("timeout", 600))
        )
        server_key, _ = run_keys(directory.secret(), result_text(config))
        shared, ledger, history = federate(experiment, clients, directory, server_key, reporter, road=road)
        claim = claim_from(
            ledger,
            expected_rounds=len(history),
            population_note=ROADS,
            excluded=[ANSWERS, OPERATORS, TUNING, *federation.facts],
        )
        if shared:
            save_versions(model, clients.layout, directory.fresh_adapters(), shared)
        directory.write_text("claim.json", claim.to_json())
        reporter.message(claim.sentence)
        return claim


def _people(config: Config, path: str) -> tuple[Federation, tuple[str, ...]]:
    """Return who is registered, with nobody's records, and their nodes' keys."""
    if path:
        people = read(People, Path(path))
        return people.federation(), people.keys
    return load(config, seed_key(config.seed)).of(()), ()
