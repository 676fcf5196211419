"""The page of a sweep: what its runs promise, one by one and together, and what came of them; from stored results."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedpers.errors import FedpersError, RunDirectoryError
from fedpers.models.backbone import public_name
from fedpers.privacy.claim import Claim, rounded_up
from fedpers.report.citations import bibtex
from fedpers.report.html import render, write_page
from fedpers.report.page import Figure, Pairs, environment_facts, read_figures
from fedpers.report.stored import Values, check_version, read_run
from fedpers.report.sweep_tables import Headline, Users, headlines, user_by_user
from fedpers.simulation import Run
from fedpers.sweep import place, results
from fedpers.sweep.cells import label
from fedpers.sweep.pictures import draw
from fedpers.sweep.together import Together, together

Named = Mapping[str, str]


@dataclass(frozen=True)
class Promise:
    """Runs whose claims say the same up to epsilon: in words, with a mark where they differ, and one by one."""

    sentence: str
    claims: Mapping[str, Claim]  # by the run's name
    data: str  # names of the sources that they learn from

    @property
    def label(self) -> str:
        """The claims in short, with the smallest and the largest epsilon."""
        low, high = (pick(self.claims.values(), key=lambda claim: claim.epsilon) for pick in (min, max))
        if low.label() == high.label():
            return low.label()
        one, other = rounded_up(low.epsilon), rounded_up(high.epsilon)
        return low.label().replace(f"ε = {one}", f"ε from {one} to {other}")


@dataclass(frozen=True)
class Results:
    """What was measured, without noise: nothing of it is public."""

    headlines: Sequence[Headline]
    figures: Sequence[Figure]
    users: Users | None


@dataclass(frozen=True)
class SweepPage:
    """All that the page of a sweep shows. A public one shows folders of this machine by their last part.

    Attributes:
        name: the sweep's.
        finished: how many runs are finished.
        promises: their claims.
        together: what they promise together, for each source of people.
        results: None in a public page.
        refused: runs that would make a false claim, and why.
        failed: runs that did not come to their end, and why; in a public page without messages.
        missing: runs that have not been tried, or not to their end.
        grid: a grid file that needs no other one.
        environment: versions and machine; several values where runs differ.
        command: what makes the sweep again.
        forecasts: what larger federations could claim, in words, and by which runs; no claims.
        citations: BibTeX.
    """

    name: str
    finished: int
    promises: Sequence[Promise]
    together: Sequence[Together]
    results: Results | None
    refused: Named
    failed: Named
    missing: Sequence[str]
    grid: str
    environment: Pairs
    command: str
    forecasts: Mapping[str, Sequence[str]]
    citations: str


def is_sweep(path: Path) -> bool:
    """Whether a directory is a sweep's."""
    return (path / place.GRID).exists()


def write_sweep_report(path: Path, out: Path | None = None, *, public: bool = False) -> Path:
    """Write the page of a sweep and return where it is; unless it is public, tables and figures are made anew first.

    Args:
        path: the sweep's directory.
        out: a file that ends in .html; by default report.html in the directory, or report-public.html.
        public: leave out all that was measured without noise, single users above all.

    Raises:
        FedpersError: no finished run, one of another version, a ledger that was edited (the message names the run), or
            a place that cannot be written.
    """
    page = collect(path, public=public)
    written = out or path / ("report-public.html" if public else "report.html")
    return write_page(written, render("sweep.html.j2", page=page), private=not public)


def collect(path: Path, *, public: bool = False) -> SweepPage:
    """Gather what the page shows; trains nothing and loads no model. Raises as `write_sweep_report` does."""
    about = place.read_grid(path)
    check_version(path, str(about["fedpers"]))
    named = _names({run["hash"]: run["coordinates"] for run in about["runs"]}, public)
    stored, environments = _read(path, named)
    runs = {named[address]: run for address, run in stored.items()}
    refused, failed = (
        {named[address]: entry for address, entry in place.read(path, name).items() if address in named}
        for name in (place.REFUSED, place.FAILED)
    )
    over = {*runs, *refused, *failed}
    return SweepPage(
        name=about["name"],
        finished=len(runs),
        promises=_promises(
            {name: run.claim for name, run in runs.items()}, {name: run.config.data.name for name, run in runs.items()}
        ),
        together=together(path, lambda address: named.get(address, address), stored),
        results=None if public else _results(path, stored),
        refused={name: entry["reason"] for name, entry in refused.items()},
        failed={name: entry["type"] + ("" if public else f": {entry['message']}") for name, entry in failed.items()},
        missing=[name for name in named.values() if name not in over],
        grid=yaml.safe_dump(_public(about["grid"]) if public else about["grid"], sort_keys=False, allow_unicode=True),
        environment=_environment(environments),
        command=f"fedpers sweep {about['name']}.yaml --out {about['name']}-again",
        forecasts=_forecasts(runs),
        citations=bibtex(*(run.config for run in runs.values())),
    )


def _read(path: Path, named: Named) -> tuple[dict[str, Run], list[Values]]:
    """Read the finished runs by address, and their environments."""
    runs, environments = {}, []
    for address, name in named.items():
        directory = place.cell(path, address)
        if directory.finished:
            try:
                runs[address], environment = read_run(directory.path)
            except FedpersError as error:
                raise type(error)(f"{name}: {error}") from error
            environments.append(environment)
    if not runs:
        raise RunDirectoryError(f"{path}: none of its runs is finished; go on with the same `fedpers sweep` first.")
    return runs, environments


def _promises(claims: Mapping[str, Claim], data: Named) -> list[Promise]:
    """Group claims that say the same up to epsilon: what is promised first, then what promises nothing.

    Args:
        claims: by the run's name.
        data: its source, by the same.
    """
    groups: dict[str, dict[str, Claim]] = {}
    for name, claim in claims.items():
        groups.setdefault(_masked(claim), {})[name] = claim
    found = []
    for masked, group in groups.items():
        sentences = {claim.sentence for claim in group.values()}
        sources = ", ".join(dict.fromkeys(data[name] for name in group))
        found.append(Promise(sentences.pop() if len(sentences) == 1 else masked, group, sources))
    return sorted(found, key=lambda one: max((not claim.rounds, claim.epsilon) for claim in one.claims.values()))


def _masked(claim: Claim) -> str:
    """A claim's sentence with a mark for each of its epsilons."""
    spread = [claim.per_client.min, claim.per_client.median] if claim.per_client else []
    said = claim.sentence
    for value in (claim.epsilon, claim.record_level, *spread):
        if value is not None and math.isfinite(value):
            said = re.sub(rf"\b{re.escape(rounded_up(value))}\b", "…", said)
    return said


def _results(path: Path, stored: Mapping[str, Run]) -> Results:
    table, users = results.collect(path, stored)
    pictures = [one for one in draw(path) if one.suffix == ".svg"]
    return Results(headlines(table, users), read_figures(pictures), user_by_user(table, users))


def _environment(environments: Iterable[Values]) -> Pairs:
    found: dict[str, dict[str, None]] = {}
    for one in environments:
        for key, value in environment_facts(one):
            found.setdefault(key, {})[value] = None
    return [(key, ", ".join(values)) for key, values in found.items()]


def _forecasts(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, run in runs.items():
        if run.forecast is not None:
            found.setdefault(run.forecast.sentence, []).append(name)
    return found


def _names(coordinates: Mapping[str, Mapping[str, str]], public: bool) -> dict[str, str]:
    """Name the runs by their coordinates, and by their addresses where those are alike."""
    found = {address: label(_public(dict(one)) if public else one) for address, one in coordinates.items()}
    several = {name for name, number in Counter(found.values()).items() if number > 1}
    return {address: f"{name} ({address[:6]})" if name in several else name for address, name in found.items()}


def _public(tree: Any, key: str = "") -> Any:
    """Leave of everything that may be a folder of this machine its last part."""
    if isinstance(tree, dict):
        return {key: _public(value, key) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_public(value, key) for value in tree]
    if not isinstance(tree, str) or tree.startswith("hub:"):
        return tree
    if key.endswith("path") or tree.startswith(("{", "[")):  # a section as a coordinate is JSON
        return tree.rstrip("/").rpartition("/")[2]
    return public_name(tree)
