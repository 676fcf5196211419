"""A data source in words and numbers: what it is, who is in it, how much each has; never an id, never a text.

It is no module of `fedpers.data`, where each module is a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from fedpers.data.base import Federation, Record, Source


def about(name: str, source: type[Source]) -> list[tuple[str, str]]:
    """Return what is known of a source before anything is loaded, as label and value."""
    return [
        ("name", name),
        ("about", source.about),
        ("licence", source.licence),
        ("citation", source.citation),
        ("split", source.split),
        ("tasks", ", ".join(source.tasks)),
    ]


def numbers(federation: Federation) -> list[tuple[str, str]]:
    """Return a loaded federation's numbers and what a claim about it leaves out, as label and value."""
    held = [("records", "made when they are needed")] if federation.lazy else [
        ("training records", _spread(sizes(federation.train))),
        ("test records", _spread(sizes(federation.test))),
    ]  # fmt: skip
    rows = [
        ("users", f"{len(federation.users):,}"),
        *held,
        ("public pool", f"{len(federation.pool):,} texts" if federation.pool else "none"),
    ]
    rows += [(name.replace("_", " "), f"{count:,}") for name, count in federation.counts.items()]
    return rows + [("a claim leaves out" if not place else "", fact) for place, fact in enumerate(federation.facts)]


def sizes(parts: Sequence[Sequence[Record]]) -> list[int]:
    """Return each user's number of records."""
    return [len(records) for records in parts]


def _spread(counts: Sequence[int]) -> str:
    return f"{sum(counts):,}; of a user {min(counts):,} to {max(counts):,}, median {median(counts):g}"
