"""Running a grid: cell after cell, each once, through kills, failures and other processes on the same directory."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from fedpers.errors import FedpersError, PrivacyRefusal, RunDirectoryError
from fedpers.experiment import Reuse, prepare
from fedpers.reporting import BarReporter, Reporter
from fedpers.simulation import simulate
from fedpers.sweep import pictures, place, results
from fedpers.sweep.cells import Cell
from fedpers.sweep.grid import Grid

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # what ails the disk ails every cell
_DIED = "one of its processes died, perhaps for want of memory; fewer --jobs need less"
_PAUSE = 0.5  # seconds between looks at what other processes have done


class Job(NamedTuple):
    """A cell to run, and what it can share with others: cells with the same `group` come one after the other."""

    cell: Cell
    group: str


@dataclass(frozen=True)
class Sweep:
    """What has become of a grid.

    Attributes:
        path: the directory.
        cells: how many runs the grid asks for, its local-only baselines among them.
        finished: how many of them have come to their end, now or earlier.
        refused: by hash, coordinates and reason of those that would make a false claim.
        failed: by hash, coordinates, type and message of those that failed in their latest attempt.
        stopped: why the sweep ended before its end; None if it did not.
        results: a row per finished run, as in results.parquet; None after a stop.
    """

    path: Path
    cells: int
    finished: int
    refused: place.Entries
    failed: place.Entries
    stopped: str | None
    results: pa.Table | None

    @property
    def good(self) -> bool:
        """Whether all that is not refused has been run."""
        return not self.failed and self.stopped is None


def sweep(grid: Grid, out: Path | str, *, jobs: int = 1, reporter: Reporter | None = None) -> Sweep:
    """Run what of a grid is not finished, then make tables and figures; a sweep that had to stop makes none.

    Every cell is checked before the first is run. What a killed sweep left is continued, and what failed earlier is
    tried again. Data and the frozen part of the model are loaded once for the cells that share them, by each process.

    Args:
        grid: what to run.
        out: a new directory, or one that was swept before, with this grid or another.
        jobs: how many processes run cells beside each other; more than one know installed methods alone, not those that
            `register` added. The bytes of a result hang on `engine.threads`, so that is left as each cell has it.
        reporter: whom to tell about progress.

    Raises:
        FedpersError: a cell cannot be run as it is configured, and not for being refused; then nothing is run.
    """
    out, reporter = Path(out), reporter or Reporter()
    reuse = Reuse()
    refused, todo = _check(grid, out, reuse, reporter)
    place.create(out, grid.to_yaml(), refused, [run.address for run in grid.runs])
    before = place.read(out, place.FAILED)
    progress = _Progress(reporter, todo, out, before)
    if jobs > 1 and len(todo) > 1:
        stopped = _run_beside(todo, out, before, min(jobs, len(todo)), progress)
    else:
        inner = reporter if isinstance(reporter, BarReporter) else Reporter()  # lines for each round would drown these
        stopped = _run(todo, out, before, reuse, inner, progress.update)
    table = _tables(out) if stopped is None else None
    named = {cell.address for cell in grid.runs}
    failed = {address: entry for address, entry in place.read(out, place.FAILED).items() if address in named}
    finished = sum(place.cell(out, address).finished for address in named)
    return Sweep(out, len(named), finished, refused, failed, stopped, table)


def _tables(out: Path) -> pa.Table:
    """Make tables and figures; returns the results."""
    table, _ = results.collect(out)
    if table.num_rows:
        with place.locked(out):
            pictures.draw(out)
    return table


def _check(grid: Grid, out: Path, reuse: Reuse, reporter: Reporter) -> tuple[place.Entries, list[Job]]:
    """Return the refused cells and the jobs, those that can share something together; loads the data of all."""
    refused: place.Entries = {}
    groups: dict[str, list[Cell]] = {}
    todo = [cell for cell in grid.runs if not place.cell(out, cell.address).finished]
    if todo:
        reporter.stage("checking cells", 0, len(todo))
    for number, cell in enumerate(todo, start=1):
        try:
            experiment = prepare(cell.config, reuse)
        except PrivacyRefusal as refusal:
            refused[cell.address] = {"coordinates": dict(cell.coordinates), "reason": str(refusal)}
        except FedpersError as error:
            raise type(error)(f"cell ({cell.label}): {error}") from error
        else:
            shared = cell.config.model_dump(mode="json", include={"data", "task", "seed", "model", "engine"})
            # Not together with cells that adapt: what is frozen would then come from their model where it is there, and
            # from a pass of its own after a kill, which agree to float tolerance alone.
            groups.setdefault(json.dumps([shared, experiment.adapts], sort_keys=True), []).append(cell)
        reporter.stage("checking cells", number, len(todo))
    return refused, [Job(cell, group) for group, cells in groups.items() for cell in cells]


def _run(
    jobs: Sequence[Job], out: Path, before: place.Entries, reuse: Reuse, reporter: Reporter, tell: Callable[[], None]
) -> str | None:
    """Run what no other process runs, then what others leave; returns why it had to stop, or None."""
    group = ""
    waiting = list(jobs)
    while waiting:
        left = []
        for job in waiting:
            if _orphaned():
                return None
            with place.locked(out, job.cell.address, wait=False) as mine:
                if not mine:
                    left.append(job)
                elif not _over(job, out, before, place.read(out, place.FAILED)):
                    if job.group != group:
                        group, reuse = job.group, Reuse(reuse.federations)
                        gc.collect()  # a model and its threads' copies hold each other
                    if stopped := _attempt(job.cell, out, reuse, reporter):
                        return stopped
            tell()
        if len(left) == len(waiting):
            time.sleep(_PAUSE)
        waiting = left
    return None


def _over(job: Job, out: Path, before: place.Entries, failed: place.Entries) -> bool:
    """Whether a cell is finished, or has failed since this sweep began."""
    entry = failed.get(job.cell.address)
    return place.cell(out, job.cell.address).finished or (entry is not None and entry != before.get(job.cell.address))


def _attempt(cell: Cell, out: Path, reuse: Reuse, reporter: Reporter) -> str | None:
    """Run a cell, or continue it, and put down how it failed; returns why nothing else can be run, or None."""
    try:
        simulate(cell.config, place.cell(out, cell.address).path, resume=True, reporter=reporter, reuse=reuse)
        place.note_failure(out, cell.address, None)
    except Exception as error:  # whatever it is, it is put down, and other cells can do without this one
        entry = {"coordinates": dict(cell.coordinates), **_described(error)}
        disk = _disk(error)
        try:
            place.note_failure(out, cell.address, entry)
        except OSError as second:
            disk = disk or second
        return f"cell ({cell.label}): {disk.strerror or type(disk).__name__}" if disk else None
    return None


def _described(error: Exception) -> dict[str, str]:
    """Type and message of a failure; of errors that are not ours the place, since their messages may quote data."""
    if isinstance(error, FedpersError):
        return {"type": type(error).__name__, "message": str(error)}
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = f"in {Path(frame.filename).name}, line {frame.lineno}; `fedpers run` of the cell's config.yaml shows more"
    return {"type": type(error).__name__, "message": message}


def _disk(error: BaseException | None) -> OSError | None:
    """Return the system's error, if this is one, or was caused by one that ails the disk."""
    if isinstance(error, OSError):
        return error
    cause = error.__cause__ if isinstance(error, RunDirectoryError) else None
    return cause if isinstance(cause, OSError) and cause.errno in _FULL else None


def _run_beside(jobs: Sequence[Job], out: Path, before: place.Entries, number: int, progress: _Progress) -> str | None:
    """Run the jobs in several processes, each of which starts at another place; returns why they had to stop."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    reasons: SimpleQueue[str] = context.SimpleQueue()
    starts = [len(jobs) * one // number for one in range(number)]
    workers = [
        context.Process(target=_worker, args=([*jobs[at:], *jobs[:at]], out, before, reasons), daemon=True)
        for at in starts
    ]
    try:
        for worker in workers:
            worker.start()
        while reasons.empty() and any(worker.is_alive() for worker in workers):
            wait([worker.sentinel for worker in workers if worker.is_alive()], timeout=_PAUSE)
            progress.update()
    finally:
        for worker in workers:
            worker.terminate()  # those that still run; what they have done is kept
            worker.join()
    if not reasons.empty():
        return reasons.get()
    return _DIED if any(worker.exitcode for worker in workers) else None


def _worker(jobs: Sequence[Job], out: Path, before: place.Entries, reasons: SimpleQueue[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends this one
    if stopped := _run(jobs, out, before, Reuse(), Reporter(), lambda: None):
        reasons.put(stopped)


def _orphaned() -> bool:
    """Whether this process works for one that was killed."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


class _Progress:
    """Tells which cells are over, and how long the rest may take."""

    def __init__(self, reporter: Reporter, jobs: Sequence[Job], out: Path, before: place.Entries) -> None:
        self.reporter, self.out, self.before = reporter, out, before
        self.left, self.total = list(jobs), len(jobs)
        self.began = time.monotonic()
        if jobs:
            reporter.stage("cells", 0, self.total)

    def update(self) -> None:
        """Look at what is on disk, and tell what is new."""
        failed = place.read(self.out, place.FAILED)
        new = [job for job in self.left if _over(job, self.out, self.before, failed)]
        if not new:
            return
        self.left = [job for job in self.left if job not in new]
        done = self.total - len(self.left)
        rest = (time.monotonic() - self.began) / done * len(self.left)
        for job in new:
            self.reporter.message(f"{job.cell.label}: {self._outcome(job.cell)}")
        note = f"about {_duration(rest)} left" if self.left else ""
        self.reporter.stage("cells", done, self.total, note)
        if self.left and not isinstance(self.reporter, BarReporter):
            self.reporter.message(f"{done} of {self.total} cells, {note}")

    def _outcome(self, cell: Cell) -> str:
        directory = place.cell(self.out, cell.address)
        if not directory.finished:
            return "failed"
        summary = json.loads((directory.path / "summary.json").read_text(encoding="utf-8"))
        return f"{summary['metric']} {summary['metrics']['own']['mean']:.3f}, {summary['claim']}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "a minute or less"
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
