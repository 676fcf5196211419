"""A user's own model, trained on the user's machine after a run's last release.

    python -m fedpers.flower.at_home NODE.yaml RUN OUT

RUN is the server's run directory, or what its operator gave out of it: config.yaml, claim.json and adapters/. What the
method trains at home starts from the shared arrays there and from the personal state that has never left the node.
Nothing is sent, so no budget is spent.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fedpers.config import Config
from fedpers.errors import ConfigError, FedpersError, RunDirectoryError
from fedpers.evaluation import models as evaluation
from fedpers.experiment import prepare
from fedpers.finished_run import open_run
from fedpers.flower import messages as wire
from fedpers.flower.node import Node, alone
from fedpers.flower.node_file import place_of
from fedpers.models.array_names import base_name
from fedpers.models.backbone import public_name
from fedpers.personalize import check_finite, write_own
from fedpers.run_directory import RunDirectory
from fedpers.run_place import check_new


def train_at_home(file: Path, run: Path, out: Path) -> dict[str, dict[str, float]]:
    """Train the own model of the user of an owner's file and write it: PEFT's files, and the head beside them.

    Returns the task's metrics of the own and of the shared model on the user's test records; they are private.

    Raises:
        ConfigError: the method keeps nothing personal, or training goes to numbers that are not finite.
        RunDirectoryError: the run is not there or another's, or `out` exists or cannot be written.
        Refused: the node's state was begun for another configuration or other records.
    """
    check_new(out)
    place = place_of(file)
    experiment = prepare(place.config, federation=place.federation)
    if not experiment.plan.personal:
        raise ConfigError(f"method {place.config.method!r} keeps nothing personal: the shared model is everybody's.")
    if not RunDirectory(place.state).started:
        raise RunDirectoryError(
            f"{place.state}: this node has been in no round; name the state that it has worked with."
        )
    given = open_run(run)
    with alone(place.state):
        clients = Node(experiment, place).clients
        sent = {name: array.shape for name, array in clients.layout.broadcast().items() if base_name(name) == name}
        found_there = {name: array.shape for name, array in given.wire.items()}
        if _about(given.config) != _about(place.config) or found_there != sent:
            raise RunDirectoryError(f"{run}: not the run that this node takes part in; name that one.")
        ((_, own),) = clients.finish([place.position], given.wire, clients.store)
    check_finite(clients)
    write_own(clients.model, own, out)
    common = clients.layout.common(given.wire)
    kinds = {
        "own": evaluation.Kind(lambda _: own, "own"),
        "shared": evaluation.common(clients.model, common, "shared"),
    }
    found = evaluation.measure(clients.model, [place.position], kinds)
    return {kind: found.per_user(experiment.task, kind)[0] for kind in kinds}


def _about(config: Config) -> dict[str, Any]:
    """What node and server must have alike for the model at home to be what the run is about, but for folders."""
    sections = {"method", "options", "share", "task", "model", "personal"}
    tree = config.model_dump(mode="json", include=sections)
    tree["model"]["backbone"] = public_name(tree["model"]["backbone"])
    return tree


def main() -> None:
    """Do it for an owner."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("node", "run", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    try:
        found = train_at_home(args.node, args.run, args.out)
    except (FedpersError, wire.Refused) as error:
        print(f"fedpers: {error}", file=sys.stderr)
        sys.exit(2)
    for kind, metrics in found.items():
        print(kind, *(f"{name} {value:.4f}" for name, value in metrics.items()))


if __name__ == "__main__":
    main()
