"""The page of one run: what is shown of it, all of it read from stored results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import yaml
from markupsafe import Markup

from fedpers.config import dump_config
from fedpers.errors import RunDirectoryError
from fedpers.evaluation.per_user import NAMES
from fedpers.privacy.claim import Claim
from fedpers.public import without_folders
from fedpers.report.citations import bibtex
from fedpers.report.html import epsilon, render, short, write_page
from fedpers.report.stored import Values, read_run, read_users
from fedpers.report.tables import UserTable, user_table
from fedpers.simulation import Run

Pairs = Sequence[tuple[str, str]]
_REFERENCE = re.compile(r'(\bid="|href="#|url\(#)')  # where an SVG names a part of itself


@dataclass(frozen=True)
class Figure:
    """A stored figure; `svg` is markup that needs no escaping."""

    name: str
    svg: Markup


@dataclass(frozen=True)
class Results:
    """What was measured, without noise: nothing of it is public."""

    summary: Values
    names: Mapping[str, str]  # each kind of model in words
    figures: Sequence[Figure]
    users: UserTable


@dataclass(frozen=True)
class Page:
    """All that the page of a run shows.

    Attributes:
        title: the run's name and method.
        label: the claim in short.
        sentence: the claim in words.
        facts: the claim point by point.
        forecast: what a larger federation could claim, in words; no claim, and None where none was asked for.
        results: None in a public page.
        configuration: YAML, without the secret; in a public page without folders of this machine.
        environment: versions and machine.
        command: what makes the run again.
        citations: BibTeX.
    """

    title: str
    label: str
    sentence: str
    facts: Pairs
    forecast: str | None
    results: Results | None
    configuration: str
    environment: Pairs
    command: str
    citations: str


def write_report(path: Path, out: Path | None = None, *, public: bool = False) -> Path:
    """Write the page of a finished run and return where it is.

    Args:
        path: the run directory.
        out: a file that ends in .html; by default report.html in the run directory, or report-public.html.
        public: leave out all that was measured without noise, single users above all.

    Raises:
        FedpersError: no finished run, one of another version, a ledger that was edited, or a place that cannot be
            written.
    """
    page = collect(path, public=public)
    place = out or path / ("report-public.html" if public else "report.html")
    return write_page(place, render("report.html.j2", page=page), private=not public)


def collect(path: Path, *, public: bool = False) -> Page:
    """Gather what the page shows; trains nothing and loads no model. Raises as `write_report` does."""
    run, environment = read_run(path)
    config = run.config
    tree = yaml.safe_load(dump_config(config))
    return Page(
        title=f"{config.name}: {config.method}",
        label=run.claim.label(),
        sentence=run.claim.sentence,
        facts=claim_facts(run.claim),
        forecast=None if run.forecast is None else run.forecast.sentence,
        results=None if public else _results(run),
        configuration=yaml.safe_dump(without_folders(tree) if public else tree, sort_keys=False, allow_unicode=True),
        environment=environment_facts(environment),
        command=f"fedpers run config.yaml seed={config.seed} --out {config.name}-again",
        citations=bibtex(config),
    )


def claim_facts(claim: Claim) -> Pairs:
    """Return a claim point by point."""
    checks = ", ".join(f"{name} {epsilon(value)}" for name, value in claim.cross_check.items())
    facts = {
        "one protected unit": claim.unit,
        "ε": epsilon(claim.epsilon),
        "δ": short(claim.delta),
        "who adds the noise": claim.trust,
        "neighbouring data": claim.adjacency,
        "protected against": "; ".join(claim.protected_against) or "nobody",
        "not protected against": "; ".join(claim.not_protected_against),
        "sampling": claim.sampler,
        "noise": claim.mechanism,
        "noise multiplier": short(claim.sigma),
        "clip": short(claim.clip),
        "releases": str(claim.rounds),
        "accountant": claim.accountant,
        "other accountants": checks or "–",
        "personal state": claim.head_policy,
        "last line of the ledger": claim.ledger_head,
    }
    return list(facts.items())


def _results(run: Run) -> Results:
    summary = run.summary
    users = user_table(read_users(run), summary["metric"], higher_is_better=summary["higher_is_better"])
    return Results(summary, NAMES, read_figures(sorted((run.path / "figures").glob("*.svg"))), users)


def read_figures(paths: Iterable[Path]) -> list[Figure]:
    """Read stored SVGs, each with ids of its own: they would name parts of each other in one page.

    Raises:
        RunDirectoryError: a file is no SVG figure.
    """
    found = []
    for number, path in enumerate(paths):
        text = path.read_text(encoding="utf-8")
        try:
            whole = ElementTree.fromstring(text).tag.endswith("}svg")
        except ElementTree.ParseError:
            whole = False
        if not whole:
            raise RunDirectoryError(f"{path} is no SVG figure; restore it from a copy, or remove it.")
        drawn = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
        found.append(Figure(path.stem.replace("_", " "), Markup(_REFERENCE.sub(rf"\g<1>figure{number}-", drawn))))
    return found


def environment_facts(environment: Values) -> Pairs:
    """Return what environment.json says, point by point."""
    flat = {key: value for key, value in environment.items() if key != "packages"} | environment["packages"]
    return [(key, str(value)) for key, value in flat.items()]
