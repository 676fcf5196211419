"""Weights & Biases, offline unless WANDB_MODE says otherwise."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from fedpers.tracking.base import optional

PROJECT = "fedpers"
# By itself W&B notes the command line (which may hold the secret), paths, the machine's and the user's name, the
# repository with its uncommitted changes, and what is printed.
NOTHING_ELSE = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "host": "",
    "silent": True,
}


class Place:
    """One W&B run. Its id is kept in the folder, so that a resumed run continues it."""

    name = "wandb"

    def __init__(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._wandb = optional("wandb", self.name)

    def start(self, run: str, config: Mapping[str, str], folder: Path) -> int:
        """Start a run; offline it is written anew, so that `wandb sync` finds each round once."""
        mode, remembered = os.environ.get("WANDB_MODE", "offline"), folder / "id"
        if mode == "offline":
            shutil.rmtree(folder / "wandb", ignore_errors=True)
        if not remembered.exists():
            remembered.write_text(secrets.token_hex(4), encoding="utf-8")
        self._done = False
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run,
            id=remembered.read_text(encoding="utf-8"),
            config=dict(config),
            dir=str(folder),
            mode=mode,
            resume=None if mode == "offline" else "allow",
            reinit="create_new",  # a notebook may have a run of its own
            settings=self._wandb.Settings(**NOTHING_ELSE),
        )
        return max(int(self._run.step) - 1, 0)  # its steps are our rounds, and it tells the next one

    def round(self, number: int, numbers: Mapping[str, float]) -> None:
        """Log the round."""
        self._run.log(dict(numbers), step=number)

    def finish(self, numbers: Mapping[str, float], claim: str) -> None:
        """Put the results and the claim into the run's summary."""
        self._run.summary.update({**{f"result/{name}": value for name, value in numbers.items()}, "claim": claim})
        self._done = True

    def close(self) -> None:
        """Write, or send, what is left."""
        self._run.finish(exit_code=0 if self._done else 1)
