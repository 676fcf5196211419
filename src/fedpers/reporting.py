"""What a person sees while a run goes on: bars on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Reporter:
    """Base: says nothing."""

    def stage(self, what: str, done: int, total: int, note: str = "") -> None:
        """Report progress of a stage, with a note beside a bar; called again with a larger `done`."""

    def message(self, text: str) -> None:
        """Report one line."""

    def round(self, row: dict[str, Any], total: int) -> None:
        """Report a finished round."""

    def close(self) -> None:
        """Remove bars."""


class PlainReporter(Reporter):
    """Lines for logs: a stage at its start and end, a line per round."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started: dict[str, float] = {}

    def stage(self, what: str, done: int, total: int, note: str = "") -> None:
        """Print when a stage starts and when it ends."""
        if what not in self._started:
            self._started[what] = time.monotonic()
            self.message(f"{what}: {total} ...")
        if done >= total:
            self.message(f"{what}: done in {time.monotonic() - self._started.pop(what):.1f} s")

    def message(self, text: str) -> None:
        """Print the line, however wide."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def round(self, row: dict[str, Any], total: int) -> None:
        """Print the round's line."""
        self.message(f"round {row['round']}/{total}: {describe_round(row)}")


class BarReporter(Reporter):
    """Progress bars."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=console,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self.progress.start()

    def stage(self, what: str, done: int, total: int, note: str = "") -> None:
        """Move the stage's bar, with a note beside it."""
        if what not in self._tasks:
            self._tasks[what] = self.progress.add_task(what, total=total, note="")
        self.progress.update(self._tasks[what], completed=done, total=total, note=note)
        if done >= total:
            del self._tasks[what]

    def message(self, text: str) -> None:
        """Print the line above the bars."""
        self.progress.console.print(text, highlight=False, markup=False)

    def round(self, row: dict[str, Any], total: int) -> None:
        """Move the bar of rounds."""
        self.stage("rounds", row["round"], total, describe_round(row))

    def close(self) -> None:
        """Stop drawing."""
        self.progress.stop()


def describe_round(row: dict[str, Any]) -> str:
    """A round's figures in one line."""
    parts = [f"{row['clients']} clients"]
    if row.get("train_loss") is not None:
        parts.append(f"loss {row['train_loss']:.3f}")
    parts += [
        f"{name.replace('_', ' ', 1)} {value:.3f}"
        for name, value in row.items()
        if name.startswith("global_") and value is not None
    ]
    if row.get("clients_per_second") is not None:
        parts.append(f"{row['clients_per_second']:.1f} clients/s")
    epsilon = row.get("epsilon")
    if epsilon is not None and not math.isinf(epsilon):
        parts.append(f"epsilon spent {epsilon:.2f}")
    return ", ".join(parts)


def reporter(console: Console, quiet: bool) -> Reporter:
    """Choose by where the output goes."""
    if quiet:
        return Reporter()
    return BarReporter(console) if console.is_terminal else PlainReporter(console)
