"""The command `fedpers sweep`. Errors go up to the main command line, which prints them."""

from __future__ import annotations

import math
import sys
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from fedpers.sweep.runner import Sweep

CLIP_ONLY = sys.float_info.max  # a place between no privacy and any epsilon
LEVELS = {math.inf: "no privacy", CLIP_ONLY: "clip only", 0.0: "nothing leaves"}
SHOWN = 3  # refused and failed cells that are printed; the others are in a file


def sweep(
    grid: Annotated[Path, typer.Argument(help="A grid file; see docs/sweeps.md.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to its base, such as rounds=2 data.users=50.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new or an earlier sweep's directory; by default runs/NAME.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that run cells beside each other.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
) -> None:
    """Run all combinations of a grid that are not finished; exit code 1 if some failed.

    GRID is a grid file, see docs/sweeps.md and configs/frontier.yaml; OVERRIDES are changes to its base, as rounds=2.
    """
    from fedpers.reporting import reporter
    from fedpers.sweep.grid import read_grid

    found = read_grid(grid, overrides or [])  # before torch is imported: a typo is answered at once
    place = out or Path("runs") / found.name
    try:
        from fedpers.sweep.runner import sweep as run

        with closing(reporter(Console(stderr=True), quiet)) as progress:
            done = run(found, place, jobs=jobs, reporter=progress)
    except KeyboardInterrupt:
        typer.echo("fedpers: stopped; continue with the same command.", err=True)
        raise typer.Exit(130) from None
    _print(done)
    if not done.good:
        raise typer.Exit(1)


def _print(done: Sweep) -> None:
    from fedpers.sweep.cells import label
    from fedpers.sweep.pictures import FOLDER
    from fedpers.sweep.results import RESULTS, USERS

    out = Console()
    lines = [f"{done.finished} of {done.cells} runs finished, {len(done.refused)} refused, {len(done.failed)} failed"]
    for title, entries, why in (("refused", done.refused, "reason"), ("failed", done.failed, "message")):
        lines += [f"{title}: {label(one['coordinates'])}: {one[why]}" for one in list(entries.values())[:SHOWN]]
        lines += [f"all that are {title}: {done.path / title}.json"] if len(entries) > SHOWN else []
    if done.results is not None:
        out.print(_table(done.results.to_pylist()))
        lines += [f"results: {done.path / RESULTS}", f"users: {done.path / USERS}"]
        lines += [f"figures: {done.path / FOLDER}"] if done.results.num_rows else []
    if done.stopped is not None:
        lines += [f"stopped: {done.stopped}; mend that and continue with the same command"]
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(rows: list[dict[str, Any]]) -> Table:
    """Mean of the own models per data and method, at each epsilon that was asked for, over all else."""
    levels = sorted(set(map(_level, rows)), reverse=True)
    table = Table("data", "metric", title="own models, mean over runs", box=SIMPLE)
    for column in ("method", *(LEVELS.get(level, f"ε {level:g}") for level in levels)):
        table.add_column(column, no_wrap=column == "method")
    for key in dict.fromkeys((row["data"], row["metric"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["data"], row["metric"], row["method"]) == key]
        held = [[row["own_mean"] for row in mine if _level(row) == level] for level in levels]
        table.add_row(*map(escape, key), *(f"{fmean(found):.3f}" if found else "" for found in held))
    return table


def _level(row: dict[str, Any]) -> float:
    """How epsilon was asked for, as a number to sort by; where it is no axis, what is claimed."""
    if row["method"] == "local":
        return 0.0
    asked = row.get("privacy_epsilon") or row["epsilon"]
    return CLIP_ONLY if asked == "clip" else float(asked)
