"""Compare all methods on the same people, with and without privacy. What the numbers mean: README.md beside this file.

    python experiments/methods/run.py [--size default|full|tiny] [--out runs/methods]

The same command continues what was stopped, and finishes at once where all is done.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two runs at a time: more threads would wait for each other

import numpy as np
from grid import CLIPS, DELTA, SIZES, Size, configure, passes, refusals, rehearsal, settings, user_level
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from table import write_results

from fedpers.config import Config
from fedpers.data import load
from fedpers.errors import FedpersError
from fedpers.experiment import Reuse, build_model, method_plan, prepare
from fedpers.privacy.randomness import seed_key
from fedpers.registry import names
from fedpers.reporting import Reporter
from fedpers.simulation import simulate

T = TypeVar("T")
R = TypeVar("R")
ALWAYS = ("fedavg", "local")  # what the others are held against
OVERHEAD = 1.5  # what a run costs besides its passes, in passes


@dataclass(frozen=True)
class Task:
    """One run: where, what, and its cost in passes over all records."""

    path: Path
    config: Config
    cost: float


@dataclass(frozen=True)
class Comparison:
    """What the command was asked for."""

    size: Size
    backbone: str
    out: Path
    methods: list[str]
    seeds: int
    secret: str | None
    processes: int
    members: int  # users of a federation
    others: int  # development users, outside of all federations

    def task(self, folder: str, method: str, level: str = "", **choices: Any) -> Task:
        """Return a run of `method` below `folder`."""
        config = configure(self.size, self.backbone, method, **choices)
        if self.secret is not None:
            config = config.model_copy(update={"privacy": config.privacy.model_copy(update={"secret": self.secret})})
        users = self.others if choices.get("development") else self.members
        cost = users * (passes(method_plan(method, config), config) + OVERHEAD)
        return Task(self.out / folder / "-".join(filter(None, (method, level))), config, cost)

    def rehearsed(self, refused: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str, float]]:
        """Return the private levels, methods and clips to try; a method that shares nothing has no clip."""
        return [
            (level, method, clip)
            for level, method in self.allowed(refused)
            if math.isfinite(self.size.levels[level])
            and method_plan(method, configure(self.size, self.backbone, method)).shared
            for clip in CLIPS
        ]

    def allowed(self, refused: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str]]:
        """Yield privacy levels and the methods that may run there."""
        for level in self.size.levels:
            yield from ((level, method) for method in self.methods if method not in refused[level])


# What one worker keeps from run to run: only the last seed's people and models, to bound memory.
_kept: dict[str, Reuse] = {}


def _start() -> None:
    """Let a worker end when the command does, however that was killed: nobody else may write into its runs."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _reuse(config: Config) -> Reuse:
    key = f"{config.data.people} {config.seed}"
    if key not in _kept:
        _kept.clear()
        _kept[key] = Reuse()
    return _kept[key]


def _execute(task: Task) -> tuple[float, float, float]:
    """Run or continue; returns, of own models and as means over people, reciprocal rank and accuracy; and seconds."""
    run = simulate(task.config, task.path, resume=True, reuse=_reuse(task.config))
    own = run.users.filter(np.asarray(run.users["kind"].to_numpy(zero_copy_only=False) == "own"))
    rank, accuracy = (float(np.mean(own[name].to_numpy())) for name in ("mrr", "accuracy"))
    return rank, accuracy, float(run.summary["seconds"])


def _encode(config: Config) -> None:
    """Compute what is frozen, into the cache that all runs read."""
    build_model(prepare(config), Reporter())


@contextmanager
def _workers(processes: int) -> Iterator[Executor | None]:
    """Yield processes to run in; None for one, which is this one."""
    if processes == 1:
        yield None
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_start)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _each(pool: Executor | None, function: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R]]:
    """Yield place and result of every item, as they come; the first error ends it."""
    if pool is None:
        yield from ((place, function(item)) for place, item in enumerate(items))
        return
    waiting = {pool.submit(function, item): place for place, item in enumerate(items)}
    try:
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    finally:
        for future in waiting:
            future.cancel()


class Bench:
    """Runs tasks and tells how long it will take."""

    def __init__(self, pool: Executor | None, processes: int, console: Console) -> None:
        self.pool, self.processes, self.console = pool, processes, console
        self.seconds = self.cost = 0.0

    def run(self, what: str, tasks: Sequence[Task]) -> list[tuple[float, float]]:
        """Return reciprocal rank and accuracy of every task, in order."""
        found: dict[int, tuple[float, float]] = {}
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as progress:
            bar = progress.add_task(what, total=len(tasks), left="")
            for place, (rank, accuracy, seconds) in _each(self.pool, _execute, tasks):
                found[place] = rank, accuracy
                self.seconds, self.cost = self.seconds + seconds, self.cost + tasks[place].cost
                left = self.minutes(task.cost for i, task in enumerate(tasks) if i not in found)
                progress.update(bar, advance=1, left=f"about {left:.0f} min left")
                if not self.console.is_terminal:
                    name = tasks[place].path.name
                    self.console.print(f"{what} {len(found)}/{len(tasks)}: {name}, {accuracy:.3f}, {seconds:.1f} s")
        return [found[place] for place in range(len(tasks))]

    def encode(self, people: str, configs: Sequence[Config]) -> None:
        """Compute what is frozen, into the cache that all runs read."""
        began = time.monotonic()
        for _ in _each(self.pool, _encode, configs):
            pass
        self.console.print(f"texts of {people} encoded in {time.monotonic() - began:.0f} s")

    def minutes(self, costs: Iterable[float]) -> float:
        """Return the wall time that this much work takes, at the speed of what was run so far."""
        return sum(costs) * self.seconds / max(self.cost, 1e-9) / self.processes / 60


def compare(asked: Comparison, console: Console) -> None:
    """Search, run, and write the results."""
    refused = refusals(asked.size, asked.backbone, asked.methods, asked.members)
    _write(asked.out / "refused.json", refused)
    search, rehearsed = list(_search(asked, refused)), asked.rehearsed(refused)
    runs = [(level, method, seed) for seed in range(asked.seeds) for level, method in asked.allowed(refused)]
    console.print(
        f"{len(asked.methods)} methods, {asked.members} people, {asked.seeds} seeds: {len(search)} settings and "
        f"{len(rehearsed)} clips are tried on {asked.others} development people, then {len(runs)} runs"
    )
    with _workers(asked.processes) as pool:
        bench = Bench(pool, asked.processes, console)
        bench.encode("development people", [configure(asked.size, asked.backbone, "fedavg", development=True)])
        bench.run("clock", [task for _, _, task in search[: asked.processes]])
        costs = [task.cost for _, _, task in search]  # the settings of the rest are not known yet, what they cost is
        costs += [asked.task("", method, development=True).cost for _, method, _ in rehearsed]
        costs += [asked.task("", method, seed=seed).cost for _, method, seed in runs]
        console.print(f"about {bench.minutes(costs):.0f} minutes in all, if nothing is there yet")
        chosen = _choose(asked, refused, search, bench)
        _write(asked.out / "chosen.json", chosen)
        federations = [configure(asked.size, asked.backbone, "fedavg", seed=seed) for seed in range(asked.seeds)]
        bench.encode("the federations", federations)
        tasks = [_final(asked, chosen, *run) for run in runs]
        bench.run("runs", tasks)
    places = {run: task.path for run, task in zip(runs, tasks, strict=True)}
    budget = {run: passes(method_plan(run[1], task.config), task.config) for run, task in zip(runs, tasks, strict=True)}
    people = [prepare(config).examples.users for config in federations]
    console.print(write_results(asked.out, places, people, budget, refused), markup=False)


def _search(asked: Comparison, refused: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, dict[str, Any], Task]]:
    """Yield the settings to try of every method that may run at any level."""
    for method in dict.fromkeys(method for _, method in asked.allowed(refused)):
        plan = method_plan(method, configure(asked.size, asked.backbone, method))
        for number, setting in enumerate(settings(plan)):
            yield method, setting, asked.task("search", method, f"setting{number}", setting=setting, development=True)


def _choose(
    asked: Comparison,
    refused: Mapping[str, Mapping[str, str]],
    search: list[tuple[str, dict[str, Any], Task]],
    bench: Bench,
) -> dict[str, Any]:
    """Return for each method the setting, and for each private level the clip, with the largest reciprocal rank."""
    found = bench.run("settings", [task for _, _, task in search])
    tried: dict[str, list[dict[str, Any]]] = {}
    for (method, setting, _), (rank, accuracy) in zip(search, found, strict=True):
        tried.setdefault(method, []).append({"setting": setting, "mrr": rank, "accuracy": accuracy})
    best = {method: max(ones, key=lambda one: one["mrr"])["setting"] for method, ones in tried.items()}
    rehearsed, levels = asked.rehearsed(refused), asked.size.levels
    tasks = [
        asked.task(
            "search", method, f"{level}-clip{clip:g}", setting=best[method], development=True,
            privacy=rehearsal(asked.size, asked.backbone, levels[level], clip, asked.members, asked.others),
        )
        for level, method, clip in rehearsed
    ]  # fmt: skip
    clips: dict[str, dict[str, list[dict[str, float]]]] = {method: {} for method in best}
    for (level, method, clip), (rank, accuracy) in zip(rehearsed, bench.run("clips", tasks), strict=True):
        clips[method].setdefault(level, []).append({"clip": clip, "mrr": rank, "accuracy": accuracy})
    return {
        method: {
            "setting": best[method],
            "clip": {level: max(ones, key=lambda one: one["mrr"])["clip"] for level, ones in clips[method].items()},
            "tried": {"settings": tried[method], "clips": clips[method]},
        }
        for method in best
    }


def _final(asked: Comparison, chosen: Mapping[str, Any], level: str, method: str, seed: int) -> Task:
    one = chosen[method]
    clip = one["clip"].get(level, CLIPS[0])
    privacy = user_level(asked.size.levels[level], clip)
    return asked.task("runs", method, f"{level}-seed{seed}", seed=seed, setting=one["setting"], privacy=privacy)


def _write(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)


def _asked() -> Comparison:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="default", help="tiny: made-up people, to try the command")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="a directory; the same one continues")
    parser.add_argument("--backbone", default="all-MiniLM-L6-v2", help="an asset's name, a path or a Hugging Face id")
    parser.add_argument("--methods", help="comma-separated; by default all that `fedpers methods` lists")
    parser.add_argument("--seeds", type=int, help="by default the size's")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each of one thread")
    parser.add_argument("--secret", help="64 hexadecimal digits: replays noise, so that it protects nobody")
    given = parser.parse_args()
    size = SIZES[given.size]
    methods = sorted({*ALWAYS, *given.methods.split(",")}) if given.methods else names("methods")
    counts = []
    for development in (False, True):
        config = configure(size, given.backbone, "fedavg", development=development)
        counts.append(len(load(config, seed_key(config.seed)).users))
    if 1 / counts[0] <= DELTA:
        parser.error(f"delta {DELTA} must be below one over the {counts[0]} people")
    return Comparison(
        size, given.backbone, given.out, methods, given.seeds or size.seeds, given.secret, given.processes, *counts
    )


def main() -> None:
    """Run the command."""
    console = Console(soft_wrap=True, highlight=False)
    try:
        compare(_asked(), console)
    except FedpersError as error:
        console.print(f"methods: {error}", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("methods: stopped; the same command continues.")
        sys.exit(130)


if __name__ == "__main__":
    main()
