"""The command `fedpers sweep`. Errors go up to the main command line, which prints them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import pyarrow as pa

    from fedpers.sweep.runner import Sweep

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
    from fedpers.registry import check_named
    from fedpers.reporting import reporter
    from fedpers.sweep import place
    from fedpers.sweep.grid import read_grid

    found = read_grid(grid, overrides or [])
    where = out or Path("runs") / found.name
    place.check(where)
    check_named(*(cell.config for cell in found.runs))
    try:  # from here on torch is imported: what comes before is answered at once
        from fedpers.sweep.runner import sweep as run

        with closing(reporter(Console(stderr=True), quiet)) as progress:
            done = run(found, where, jobs=jobs, reporter=progress)
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
        for table in _tables(done.results):
            out.print(table)
        lines += [f"results: {done.path / RESULTS}", f"users: {done.path / USERS}"]
        lines += [f"figures: {done.path / FOLDER}"] if done.results.num_rows else []
    if done.stopped is not None:
        lines += [f"stopped: {done.stopped}; mend that and continue with the same command"]
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def _tables(results: pa.Table) -> Iterator[Table]:
    """For each data set the mean of the own models over seeds, by method and by what is claimed."""
    from fedpers.sweep.settings import levels_of, seeds, series_of, settings

    means = {row["hash"]: row["own_mean"] for row in results.to_pylist()}
    for data, found in settings(results).items():
        levels = levels_of(found)
        baselines = dict.fromkeys(one for setting in found for one in setting.baselines)
        alone = [means[one] for one in baselines if one in means]
        trusts = sorted({str(run["trust"]) for one in found for run in one.runs} - {"none"})
        notes = [f"training at home alone: {fmean(alone):.3f}, nothing released"] if alone else []
        notes += [f"trust: {', '.join(trusts)}"] if trusts else []
        table = Table(
            box=SIMPLE,
            title=escape(f"{data}: {found[0].metric} of own models, mean over {seeds(found)}"),
            caption=escape("\n".join(notes)),
        )
        table.add_column("method", no_wrap=True)
        for level in levels:
            table.add_column(escape(level.label))
        held = {(one.series, one.level): fmean(means[run] for run in one.hashes) for one in found}
        for name in series_of(found):
            cells = (held.get((name, level)) for level in levels)
            table.add_row(escape(name), *("" if mean is None else f"{mean:.3f}" for mean in cells))
        yield table
