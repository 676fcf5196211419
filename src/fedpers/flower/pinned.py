"""`flwr-clientapp`, and nothing beside it, for a node that does not trust its server.

Flower hands the app from the server to the nodes, whose SuperNodes install and import what they are sent: whoever holds
the server could run any code beside the records. The server names the kind of app, too, and a SuperNode starts the
command of that kind which comes first on its PATH. `write_commands` puts all of them there: `flwr-clientapp` leads
here, where what is sent stays closed and the installed fedpers answers, and every other one refuses.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def main() -> None:
    """Do what `flwr-clientapp` does, with this node's own app. Private parts of Flower 1.41, kept in this one place."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    from fedpers.flower.node_app import app

    for name in ("install_from_fab", "install_app_dependencies", "get_load_client_app_fn"):
        getattr(run_clientapp, name)  # another Flower, in which nothing would be pinned, must not go on
    run_clientapp.install_from_fab = lambda *_args, **_kwargs: None
    run_clientapp.install_app_dependencies = lambda *_args, **_kwargs: None  # pip runs code of what it installs
    run_clientapp.get_load_client_app_fn = lambda **_kwargs: lambda *_args: app
    flwr_clientapp()


def write_commands(folder: Path) -> None:
    """Write a command for each kind of app that Flower knows into a folder, which is to come first on a SuperNode's
    PATH; all but `flwr-clientapp` refuse.
    """
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType

    answers = f'exec {shlex.quote(sys.executable)} -P -m fedpers.flower.pinned "$@"'
    refuses = "echo 'this node runs no app but its own fedpers' >&2\nexit 1"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, name in TASK_TYPE_TO_COMMAND.items():
        command = folder / name
        command.write_text(f"#!/bin/sh\n{answers if kind == TaskType.CLIENT_APP else refuses}\n", encoding="utf-8")
        command.chmod(0o755)


if __name__ == "__main__":
    main()
