"""A finished run as a page reads it: what is stored, checked, without any model."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedpers.config import load_config
from fedpers.errors import RunDirectoryError
from fedpers.run_directory import RunDirectory
from fedpers.simulation import Run, load

NEEDED = ("metric", "higher_is_better", "metrics", "comparisons", "reading", "noise_to_update", "seconds", "task")
Values = dict[str, Any]


def read_run(path: Path) -> tuple[Run, Values]:
    """Return a finished run and its environment; the claim is derived anew from the ledger.

    Raises:
        RunDirectoryError: no finished run, one of another version of fedpers, or a file of it is damaged.
        LedgerError: the ledger was edited, or gives another claim than the one beside it.
    """
    if not path.is_dir():
        raise RunDirectoryError(f"{path}: no such directory; name a finished run.")
    if not RunDirectory(path).started:
        raise RunDirectoryError(f"{path}: neither a run nor a sweep; name what `fedpers run` or `fedpers sweep` made.")
    if not RunDirectory(path).finished:
        raise RunDirectoryError(
            f"{path}: no finished run; finish it with `fedpers run ... --resume` first (an exported run has no results "
            "to show: use the run itself)."
        )
    try:
        environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
        check_version(path, str(environment["fedpers"]))
        run = load(path, load_config(path / "config.yaml"))
        lacking = [name for name in NEEDED if name not in run.summary]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{path}: one of its files is damaged or missing; restore it from a copy.") from error
    if lacking:
        raise RunDirectoryError(f"{path}/summary.json lacks {', '.join(lacking)}; restore it from a copy.")
    return run, environment


def read_users(run: Run) -> pa.Table:
    """Return a row per user and kind of model; raises RunDirectoryError if the file is damaged."""
    try:
        return run.users
    except (OSError, pa.ArrowInvalid) as error:
        raise RunDirectoryError(f"{run.path}/users.parquet is damaged or missing; restore it from a copy.") from error


def check_version(path: Path, made: str) -> None:
    """Raise RunDirectoryError unless this version reads it: files keep their meaning within a minor version."""
    here = version("fedpers")
    if made.split(".")[:2] != here.split(".")[:2]:
        raise RunDirectoryError(f"{path}: made by fedpers {made}, and this is {here}; use that version to look at it.")
