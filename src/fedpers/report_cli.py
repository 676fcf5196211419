"""The commands `report` and `compare`. Errors go up to the main command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_directory: Annotated[
        Path, typer.Argument(metavar="RUN", help="A finished run, or a sweep.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="An .html file; by default RUN/report.html.", show_default=False)
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Leave out single users and all that was measured without noise.")
    ] = False,
) -> None:
    """Write one HTML page about a run or a sweep: claims, results, figures, users, how to repeat it, whom to cite."""
    from fedpers.report.page import write_report
    from fedpers.report.sweep_page import is_sweep, write_sweep_report

    write = write_report
    if is_sweep(run_directory):
        write = write_sweep_report
        typer.echo("making tables and figures of all runs, a second or two for each ...", err=True)
    typer.echo(write(run_directory, out, public=public))


def compare(
    run_directories: Annotated[
        list[Path], typer.Argument(help="Finished runs; the first is the reference.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="An .html file; by default beside the first run.", show_default=False)
    ] = None,
) -> None:
    """Write one HTML page with finished runs side by side, person by person where they have the same people."""
    from fedpers.report.compare import write_comparison

    typer.echo(write_comparison(run_directories, out))


COMMANDS = (report, compare)
