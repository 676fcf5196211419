"""The commands `personalize`, `score`, `generate`, `cold-start` and `write`. Errors go up to the main command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fedpers.errors import ConfigError
from fedpers.run_place import new_directory

if TYPE_CHECKING:
    from fedpers.config import Family
    from fedpers.reporting import Reporter

Run = Annotated[Path, typer.Argument(help="A finished run.", show_default=False)]
User = Annotated[
    str | None, typer.Option(help="A member's own model: number in users.parquet, or user id.", show_default=False)
]
Model = Annotated[
    Path | None, typer.Option(help="A model that `fedpers personalize` made on this run.", show_default=False)
]
Shared = Annotated[bool, typer.Option("--shared", help="The shared model.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the result only.")]


def personalize(
    run_directory: Run,
    user_data: Annotated[
        Path, typer.Option(help='JSONL: {"input": ..., "target": ...} a line, in order of time.', show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="A new directory; by default runs/NAME-personal, numbered.", show_default=False)
    ] = None,
    groups: Annotated[
        str, typer.Option(help="Fit these instead of what the method says: head, adapter+head, ...", show_default=False)
    ] = "",
    test: Annotated[float, typer.Option(help="Share of the records, the last, to compare on; 0 for none.")] = 0.2,
    quiet: Quiet = False,
) -> None:
    """Fit a personal model to a new user's records, on top of a finished run."""
    wanted = _families(groups)
    place = new_directory(out, f"{run_directory.resolve().name}-personal")
    from fedpers import personalize as use
    from fedpers.evaluation.statistics import MINIMUM_RECORDS
    from fedpers.models.assets import cache_dir

    with _reporting(quiet) as progress:
        found = use.personalize(run_directory, user_data, place, groups=wanted, test=test, reporter=progress)
    out_ = Console()
    if found.own is not None and found.common is not None:
        table = Table("model", *found.own.metrics, title=f"{found.own.records} records held out", box=SIMPLE)
        for name, one in (("own", found.own), ("shared", found.common)):
            table.add_row(name, *(f"{value:.4f}" for value in one.metrics.values()))
        out_.print(table)
        if found.own.records < MINIMUM_RECORDS:
            typer.echo(f"warning: fewer than {MINIMUM_RECORDS} records were held out; they hardly tell the two apart")
    for line in (
        f"fitted to {found.train} records; no privacy budget is spent, since nothing of it is sent",
        f"personal model: {found.path}, {use.PRIVATE}",
        f"features of the texts, as private: {cache_dir() / 'features'}, may be deleted",
    ):
        out_.print(line, highlight=False, markup=False, soft_wrap=True)


def score(
    run_directory: Run,
    data: Annotated[Path, typer.Option(help='JSONL: {"input": ..., "target": ...} a line.', show_default=False)],
    user: User = None,
    model: Model = None,
    shared: Shared = False,
    quiet: Quiet = False,
) -> None:
    """Measure one model of a finished run on your records. It scores too well on those that it was trained on."""
    from fedpers import try_model
    from fedpers.finished_run import Which

    with _reporting(quiet) as progress:
        progress.message("records that the model was trained on score too well; which these are cannot be known here")
        found = try_model.score(run_directory, data, Which(user, model, shared), progress)
    for name, value in found.metrics.items():
        typer.echo(f"{name} {value:.6g}")
    typer.echo(f"records {found.records}")


def generate(
    run_directory: Run,
    prompt: Annotated[str, typer.Option(help="The text before.", show_default=False)],
    user: User = None,
    model: Model = None,
    shared: Shared = False,
    tokens: Annotated[int | None, typer.Option(help="At most so many tokens.", show_default="32, or what fits")] = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time; else drawn.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Let a language model of a finished run go on after a prompt."""
    from fedpers import try_model
    from fedpers.finished_run import Which

    with _reporting(quiet=True) as progress:
        text = try_model.generate(
            run_directory, prompt, Which(user, model, shared), tokens=tokens, seed=seed, temperature=temperature,
            reporter=progress,
        )  # fmt: skip
    typer.echo(text)


@contextmanager
def _reporting(quiet: bool) -> Iterator[Reporter]:
    from fedpers.reporting import reporter

    with closing(reporter(Console(stderr=True), quiet)) as progress:
        yield progress


def _families(text: str) -> tuple[Family, ...]:
    from fedpers.config import FAMILIES

    found = tuple(text.split("+")) if text else ()
    if unknown := sorted(set(found) - set(FAMILIES)):
        raise ConfigError(f"--groups {text}: {', '.join(unknown)} not known; join some of {', '.join(FAMILIES)} by +.")
    return cast("tuple[Family, ...]", found)


def cold_start(
    run_directory: Run,
    out: Annotated[
        Path | None,
        typer.Option(help="A new directory; by default runs/NAME-cold-start, numbered.", show_default=False),
    ] = None,
    users: Annotated[int | None, typer.Option(help="At most so many people.", show_default=False)] = None,
    records: Annotated[str, typer.Option(help="Numbers of training records, with commas.")] = "0,1,2,4,8,16,32",
    groups: Annotated[
        str, typer.Option(help="Fit these instead of what the method says: head, adapter+head, ...", show_default=False)
    ] = "",
    quiet: Quiet = False,
) -> None:
    """Measure how many records somebody who was in no round needs for a model of their own."""
    wanted = _families(groups)
    if not all(part.strip().isdecimal() for part in records.split(",")):
        raise ConfigError(f"--records {records}: expected numbers with commas between, as 0,1,2,4.")
    place = new_directory(out, f"{run_directory.resolve().name}-cold-start")
    from fedpers import cold_start as use

    with _reporting(quiet) as progress:
        curve = use.cold_start(
            run_directory, place, counts=tuple(map(int, records.split(","))), users=users, groups=wanted,
            reporter=progress,
        )  # fmt: skip
    table = Table(
        "records", curve.metric, "local", "over shared", "p", "over local", "p", box=SIMPLE,
        title=f"{curve.people} people; shared {curve.shared:.4f}, zero-shot {curve.zero_shot:.4f}",
    )  # fmt: skip
    for point in curve.points:
        cells = [f"{point.means[kind][0]:.4f}" for kind in use.KINDS]
        for mean, low, high, p in (point.over_shared, point.over_local):
            cells += [f"{mean:+.4f} ({low:+.4f}, {high:+.4f})", f"{p:.2g}"]
        table.add_row(str(point.records), *cells)
    Console().print(table)
    typer.echo(f"table and figure: {place}")


def write(
    run_directory: Run,
    users: Annotated[int | None, typer.Option(help="The first so many members.", show_default=False)] = None,
    tokens: Annotated[
        int | None, typer.Option(help="At most so many of an answer; 32 or what fits.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new directory; by default runs/NAME-written, numbered.", show_default=False)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Let a language-model run's models answer members' test records, and score the answers; no text is kept."""
    place = new_directory(out, f"{run_directory.resolve().name}-written")
    from fedpers import write_texts as use
    from fedpers.models.assets import cache_dir

    with _reporting(quiet) as progress:
        found = use.write_texts(run_directory, place, users=users, tokens=tokens, reporter=progress)
    table = Table(
        "model", "metric", "mean (95% interval)", f"{found.first} over it", "p", box=SIMPLE,
        title=f"{found.records} test records of {found.people} people, at most {found.tokens} tokens written",
    )  # fmt: skip
    for kind, means in found.means.items():
        for metric, (mean, low, high) in means.items():
            cells = [kind, metric, f"{mean:.4f} ({low:.4f}, {high:.4f})"]
            if kind in found.gains:
                gain, low, high, p = found.gains[kind][metric]
                cells += [f"{gain:+.4f} ({low:+.4f}, {high:+.4f})", f"{p:.2g}"]
            table.add_row(*cells)
    Console().print(table)
    typer.echo(f"table, metrics of single people, as private: {place}")
    typer.echo(f"features of the texts, as private: {cache_dir() / 'features'}, may be deleted")


COMMANDS = (personalize, score, generate, cold_start, write)
