"""The directory of a sweep: what lies where, and how several processes share it.

    grid.yaml                        the grid that was swept last, its runs, and where they stand on its axes
    cells/HASH/                      a run directory for each run, whichever grid asked for it
    locks/HASH                       held by the process that runs it; the lock of a dead process is free
    refused.json, failed.json        what was not run or did not come to its end, and why
    results.parquet, users.parquet   made of all that by `results.collect`

The files that belong to the sweep as a whole are written by whoever holds the lock `locks/sweep`.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fedpers.errors import RunDirectoryError
from fedpers.run_place import RunPlace

Entries = dict[str, dict[str, Any]]  # by hash
REFUSED, FAILED, GRID = "refused.json", "failed.json", "grid.yaml"


def check(out: Path) -> None:
    """Raise RunDirectoryError unless a sweep may be written here, or taken up."""
    if out.exists() and not (out / "locks").is_dir() and not (out.is_dir() and not any(out.iterdir())):
        raise RunDirectoryError(f"{out} holds something that is no sweep; choose another place with --out.")


def create(out: Path, grid: str = "", refused: Entries | None = None, addresses: Iterable[str] = ()) -> None:
    """Make the directory with the locks of these cells, or take up one that has been swept before.

    Raises:
        RunDirectoryError: something else is there, or nothing can be written.
    """
    try:
        check(out)
        (out / "locks").mkdir(parents=True, exist_ok=True)
        out.chmod(0o700)  # metrics of single users are private
        (out / "cells").mkdir(exist_ok=True)
        for address in addresses:
            (out / "locks" / address).touch(mode=0o600)  # so that a disk that fills up later stops no locking
        with locked(out):
            write(out, GRID, grid)
            write(out, REFUSED, refused or {})
    except OSError as error:
        raise RunDirectoryError(f"{out}: cannot be written ({error.strerror}).") from error


def cell(out: Path, address: str) -> RunPlace:
    """Where the run of a cell lies."""
    return RunPlace(out / "cells" / address)


@contextmanager
def locked(out: Path, name: str = "sweep", *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock among all processes on this machine; gives False if another holds it and is not waited for."""
    descriptor = os.open(out / "locks" / name, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield _taken(descriptor, wait)
    finally:
        os.close(descriptor)  # which frees it, as the end of the process does


def _taken(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read(out: Path, name: str) -> Entries:
    """Read refused.json or failed.json; nothing where there is none. Raises RunDirectoryError for a damaged one."""
    path = out / name
    try:
        found: Entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise RunDirectoryError(f"{path} is damaged; remove it, and `fedpers sweep` writes it anew.") from error
    return found


def write(out: Path, name: str, content: str | Entries) -> None:
    """Write a file in one step: it is whole or not there."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2, sort_keys=True) + "\n"
    scratch = out / f".{name}.partial"
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(out / name)


def read_grid(out: Path) -> dict[str, Any]:
    """Read grid.yaml as `sweep.grid.Grid.to_yaml` wrote it.

    Raises:
        RunDirectoryError: `out` is no sweep, or the file is damaged.
    """
    path = out / GRID
    if not path.exists():
        raise RunDirectoryError(f"{out}: no sweep is here, {GRID} is missing; run `fedpers sweep` first.")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict) or not found.keys() >= {"name", "fedpers", "runs", "grid"}:
        raise RunDirectoryError(
            f"{path} is damaged or of an earlier version; the same `fedpers sweep` mends it and runs nothing twice."
        )
    return found


def note_failure(out: Path, address: str, entry: dict[str, Any] | None) -> None:
    """Put down that a cell failed, or with None that it no longer does."""
    with locked(out):
        failed = read(out, FAILED)
        before = failed.pop(address, None)
        if entry is not None:
            failed[address] = {**entry, "attempts": before["attempts"] + 1 if before else 1}
        if entry or before:
            write(out, FAILED, failed)
