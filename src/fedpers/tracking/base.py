"""What a tracker is, what it is told, and what happens when one fails.

Trackers hear of a round once it is final, and of nothing that a run computes with: they change no byte of it. They are
told means over people only. What they are told is measured without noise, so no privacy claim covers it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self

import pyarrow.parquet as pq
import yaml

from fedpers.config import Config, dump_config
from fedpers.errors import FedpersError, TrackingError
from fedpers.public import without_folders
from fedpers.reporting import Reporter
from fedpers.tracking import check_names

SINGLE = {"median_update_norm"}  # the median of an odd number of norms is one client's own
OVER_USERS = ("global_", "own_")
OF_EVERYBODY = ("clients", "epsilon", "bytes_", *OVER_USERS)  # the rest is about those who were in the round


class Tracker(Protocol):
    """A place that numbers go to. Whatever a call raises is told; training goes on without the tracker."""

    name: str

    def start(self, run: str, config: Mapping[str, str], folder: Path) -> int:
        """Open the place; returns the last round that it has already, 0 where it starts anew.

        Args:
            run: the run's name.
            config: dotted keys and values of its configuration, without the secret and the folders of this machine.
            folder: the tracker's own, inside the run directory; it exists, and holds what an earlier attempt left.
        """

    def round(self, number: int, numbers: Mapping[str, float]) -> None:
        """Take what is known of a round; rounds come in order."""

    def finish(self, numbers: Mapping[str, float], claim: str) -> None:
        """Take the run's results, and the sentence that says which privacy is claimed."""

    def close(self) -> None:
        """Let go; called once, after `finish`, or where the run or the tracker fails before."""


class Tracking:
    """The trackers of one run.

    Raises:
        TrackingError: an unknown name, or a package that is not installed.
    """

    def __init__(self, trackers: Sequence[str | Tracker], reporter: Reporter) -> None:
        check_names([one for one in trackers if isinstance(one, str)])
        self._reporter = reporter
        self._open = {one.name: one for one in map(_load, dict.fromkeys(trackers))}
        self._told: dict[str, int] = {}  # the last round that each has that was started
        self._failed: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name in list(self._open):
            self._close(name)
        if kind is None and self._failed:
            told = "; ".join(f"tracker {name}: {why}" for name, why in self._failed.items())
            raise TrackingError(
                f"the run is finished and whole, but not all of it was tracked: {told}; once that is mended, the same "
                "command with --resume hands over what is missing, without training."
            )

    def start(self, config: Config, path: Path) -> None:
        """Open all trackers for a run directory.

        Raises:
            TrackingError: one cannot be opened. The run goes on from here with --resume, with this tracker or without.
        """
        for name, tracker in self._open.items():
            if name in self._told:
                continue
            folder = path / "tracking" / name
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._told[name] = tracker.start(config.name, _flat(_shown(config)), folder)
            except Exception as error:  # another package's, so of any kind
                raise TrackingError(
                    f"tracker {name}: cannot be started ({_short(error)}); mend that, or leave it out, and continue "
                    f"{path} with --resume."
                ) from error

    def rounds(self, users: int, history: Sequence[Mapping[str, Any]]) -> None:
        """Tell each tracker the rounds that it does not have yet.

        Args:
            users: how many the means over users are about, at most.
            history: a row of rounds.parquet for each round that is final.
        """
        for name, tracker in list(self._open.items()):
            self._try(name, partial(self._catch_up, name, tracker, users, history))

    def finish(self, config: Config, path: Path, summary: Mapping[str, Any], claim: str, epsilon: float) -> None:
        """Tell each tracker what is missing of a finished run, and its results."""
        if not self._open:
            return
        self.start(config, path)  # a run that was finished before has not started any
        self.rounds(summary["users"], pq.read_table(path / "rounds.parquet").to_pylist())
        found = totals(summary, epsilon)
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.finish, found, claim))

    def _catch_up(self, name: str, tracker: Tracker, users: int, history: Sequence[Mapping[str, Any]]) -> None:
        for row in history:
            if row["round"] > self._told[name]:
                tracker.round(row["round"], numbers(row, users))
                self._told[name] = row["round"]

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # another package's, so of any kind; told now and raised when the run is done
            self._failed[name] = _short(error)
            self._reporter.message(f"tracker {name} failed ({_short(error)}); training goes on without it")
            self._close(name)

    def _close(self, name: str) -> None:
        tracker = self._open.pop(name)
        try:
            if name in self._told:
                tracker.close()
        except Exception as error:  # likewise; the first failure of a tracker is the one that is told
            self._failed.setdefault(name, _short(error))
            self._reporter.message(f"tracker {name} cannot be closed ({_short(error)})")


def optional(package: str, extra: str) -> ModuleType:
    """Import a package that is not installed by default; raises TrackingError that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise TrackingError(
            f'tracker {extra}: needs a package that is not installed; pip install "fedpers[{extra}]" brings it.'
        ) from error


def numbers(row: Mapping[str, Any], users: int) -> dict[str, float]:
    """Choose what may be told of a round: nothing about a single person.

    Where one client took part, means over clients are that client's, and only what is about everybody is left; where
    there is one user, means over users are that user's.
    """
    return {
        name: float(value)
        for name, value in row.items()
        if value is not None and name != "round" and name not in SINGLE
        if row["clients"] > 1 or name.startswith(OF_EVERYBODY)
        if users > 1 or not name.startswith(OVER_USERS)
    }


def totals(summary: Mapping[str, Any], epsilon: float) -> dict[str, float]:
    """Choose what may be told of a finished run: means over users with their intervals, and counts of users.

    No worst decile: among few users that is a single one's, as all means are of one user. No infinite epsilon: the
    claim says it in words.
    """
    found: dict[str, float] = {"users": summary["users"], "rounds": summary["rounds"]}
    if math.isfinite(epsilon):
        found["epsilon"] = epsilon
    if summary["users"] == 1:
        return found
    for kind, one in summary["metrics"].items():
        low, high = one["ci95"]
        name = f"{kind}_{summary['metric']}"
        found |= {name: one["mean"], f"{name}_low": low, f"{name}_high": high}
    for kind, one in summary["comparisons"].items():
        low, high = one["ci95"]
        found |= {f"gain_over_{kind}": one["mean_gain"], f"gain_over_{kind}_low": low, f"gain_over_{kind}_high": high}
        found |= {f"{what}_against_{kind}": one[what] for what in ("helped", "tied", "harmed", "p_value")}
    return {name: float(value) for name, value in found.items()}


def _load(one: str | Tracker) -> Tracker:
    if not isinstance(one, str):
        return one
    found: Tracker = importlib.import_module(f"fedpers.tracking.{one}").Place()
    return found


def _shown(config: Config) -> dict[str, Any]:
    tree: dict[str, Any] = without_folders(yaml.safe_load(dump_config(config)))
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return found


def _short(error: Exception) -> str:
    """One line; of our own errors all, of others' the kind and the beginning."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FedpersError) else f"{type(error).__name__}: {text[:200]}"
