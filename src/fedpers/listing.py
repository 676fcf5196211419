"""The methods as a table: what is shared, what stays, who proposed it, and how it differs from its neighbour.

It is no module of `fedpers.methods`, where each module is a method.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from fedpers.config import spoken
from fedpers.errors import ConfigError
from fedpers.methods.base import PERSONAL, SHARED, Method
from fedpers.registry import find

COLUMNS = ("method", "shared", "stays", "what it does", "after", "differs", "options")


def table(names: Sequence[str]) -> Table:
    """Return the methods for a terminal of 80 columns."""
    shown = Table(box=SIMPLE, header_style="bold", pad_edge=False)
    for column, width in (("method", 15), ("shared; stays", 15), ("what it does", 42)):
        shown.add_column(column, overflow="fold", width=width)
    for name in names:
        try:
            cells = _cells(name)
        except ConfigError as error:  # somebody's package; the others can be used all the same
            shown.add_row(name, "cannot be used", escape(str(error)))
            continue
        _, shared, stays, does, cite, differs, options = (escape(cell) for cell in cells)
        lines = [does, f"[dim]{cite}[/dim]", f"[dim]Differs {differs}.[/dim]", f"[dim]options: {options}[/dim]"]
        kept = [line for line, given in zip(lines, (does, cite, differs, options), strict=True) if given]
        shown.add_row(name, f"{shared or '-'}; {stays or '-'}", "\n".join(kept))
    return shown


def markdown(names: Sequence[str]) -> str:
    """Return the methods as a Markdown table."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_cells(name) for name in names)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def _cells(name: str) -> tuple[str, ...]:
    method = find("methods", name, Method)
    shared, stays = (
        ", ".join(spoken(group for group, where in method.scopes.items() if where is scope))
        for scope in (SHARED, PERSONAL)
    )
    copies = method.keeps or any(phase.own for phase in method.round)
    stays = ", ".join(part for part in (stays, "own copies" if copies else "", *method.remembers) if part)
    shared = ", ".join((shared, *method.travels))
    if method.clusters:
        shared = f"{method.clusters} times {shared}"
    options = ", ".join(f"{option} = {value:g}" for option, value in method.options.items())
    return name, shared, stays, method.summary(), method.cite, method.differs, options
