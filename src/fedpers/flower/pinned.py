"""`flwr-clientapp` for a node that does not trust its server.

Flower hands the app from the server to the nodes, whose SuperNodes install and import what they are sent: whoever holds
the server could run any code beside the records. Here what is sent stays closed, and the installed fedpers answers. A
SuperNode starts whatever `flwr-clientapp` comes first on its PATH; `write_command` puts one there that leads here.
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

    for name in ("install_from_fab", "get_load_client_app_fn"):
        getattr(run_clientapp, name)  # another Flower, in which nothing would be pinned, must not go on
    run_clientapp.install_from_fab = lambda *_args, **_kwargs: None
    run_clientapp.get_load_client_app_fn = lambda **_kwargs: lambda *_args: app
    flwr_clientapp()


def write_command(folder: Path) -> Path:
    """Write the command `flwr-clientapp` into a folder, which is to come first on a SuperNode's PATH; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = folder / "flwr-clientapp"
    command.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m fedpers.flower.pinned "$@"\n', encoding="utf-8"
    )
    command.chmod(0o755)
    return command


if __name__ == "__main__":
    main()
