"""The commands `fedpers data list` and `describe`. Errors go up to the main command line, which prints them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpers.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Data sources: list them, see who and what is in them.")


@app.command("list")
def list_sources() -> None:
    """List the data sources, their tasks and licences. Fetches nothing."""
    from fedpers.data.base import Source
    from fedpers.registry import broken, find, names

    failed = broken("data", Source)
    for name, error in failed.items():  # one cannot be used; the others can all the same
        Console(stderr=True).print(f"{name} cannot be used: {error}", markup=False, soft_wrap=True)
    table = Table("name", "what it is", "tasks", "licence", box=SIMPLE)
    for column in table.columns:
        column.overflow = "fold"
    for name in names("data"):
        if name not in failed:
            source = find("data", name, Source)  # type: ignore[type-abstract]
            table.add_row(*map(escape, (name, source.about, ", ".join(source.tasks), source.licence)))
    Console().print(table)


@app.command()
def describe(
    name: Annotated[
        str, typer.Argument(help="A data source, as `fedpers data list` shows it, or a configuration file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Configuration, such as data.users=50 data.max_train=20.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Draw the records per user into this directory.")] = None,
) -> None:
    """Load a data source, fetching it if need be, and print users, records, split, licence and facts."""
    from fedpers import describe as words
    from fedpers.config import load_config
    from fedpers.data.base import Source, load
    from fedpers.privacy.randomness import seed_key
    from fedpers.registry import find

    if any(override.split("=")[0].strip() == "data.name" for override in overrides or []):
        raise ConfigError(f"data describe {name}: data.name is given twice; name the source once, before the others.")
    if name.endswith((".yaml", ".yml")):
        config = load_config(Path(name), overrides or [])
        name = config.data.name
    else:
        config = load_config(None, [*(overrides or []), f"data.name={name}"])
    source = find("data", name, Source)  # type: ignore[type-abstract]
    federation = load(config, seed_key(config.seed))
    rows = words.about(name, source) + words.numbers(federation)
    width = max(len(label) for label, _ in rows) + 2
    for label, value in rows:
        typer.echo(textwrap.fill(value, 118, initial_indent=f"{label:<{width}}", subsequent_indent=" " * width))
    if out is not None:
        from fedpers.figures.records import records_per_user

        shown = f"{name}: {source.about}; {len(federation.users):,} users"
        for path in records_per_user(words.sizes(federation.train), words.sizes(federation.test), shown, out):
            typer.echo(f"figure: {path}")
