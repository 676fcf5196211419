"""Who is protected from whom, and by which methods: a table made by asking the checks that every run has to pass.

It is no module of `fedpers.methods`, where each module is a method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from fedpers.config import TRUSTS, HeadPolicy, Trust, Unit, parse_config
from fedpers.errors import ConfigError, PrivacyRefusal
from fedpers.methods.base import SHARED, Method
from fedpers.plan import plan
from fedpers.privacy.adversaries import adversaries
from fedpers.privacy.guarantee import Guarantee, resolve
from fedpers.privacy.ledger_lines import ADJACENCIES, Opening
from fedpers.privacy.refusals import OF_SINGLE_REPLIES, OF_THE_MEAN
from fedpers.registry import find

USERS = 100  # registered users of the federation that the checks are asked about
USUAL = "fedavg"  # keeps nothing personal, so it may run in every mode
STRATEGIES = (*OF_THE_MEAN, *OF_SINGLE_REPLIES)
POLICIES: tuple[HeadPolicy, ...] = tuple(policy for policy in get_args(HeadPolicy) if policy != "method")
COLUMNS = ("trust", "unit; adjacency", "protected against", "not protected against", "server strategies")


@dataclass(frozen=True)
class Mode:
    """What holds for one unit and trust.

    Attributes:
        unit: What one protected thing is.
        trust: Who adds the noise.
        against: Whom a finite epsilon holds against.
        not_against: Whom or what it does not cover.
        methods: Methods that may run as they are.
        policies: For each head policy the methods that it lets run, where it changes anything.
        covered: For each head policy those of them whose personal models are covered, too.
        strategies: Server strategies that may be chosen.
    """

    unit: Unit
    trust: Trust
    against: tuple[str, ...]
    not_against: tuple[str, ...]
    methods: tuple[str, ...]
    policies: Mapping[HeadPolicy, tuple[str, ...]]
    covered: Mapping[HeadPolicy, tuple[str, ...]]
    strategies: tuple[str, ...]


def guarantees(names: Sequence[str]) -> list[Mode]:
    """Return the modes in the order of the configuration, asked about the registered methods `names`.

    Raises:
        ConfigError: a name that is not registered.
    """
    return [_mode(unit, trust, names) for unit, trusts in TRUSTS.items() for trust in trusts]


def markdown(modes: Sequence[Mode], names: Sequence[str]) -> str:
    """Return two Markdown tables and a legend: what each mode promises, and which methods may run in it."""
    promises = [COLUMNS, ("---",) * len(COLUMNS), *(_cells(mode) for mode in modes)]
    columns = ("methods", *(mode.trust for mode in modes))
    permits = [columns, ("---",) * len(columns), *((", ".join(m), *cells) for m, cells in _permits(modes, names))]
    tables = ("\n".join("| " + " | ".join(row) + " |" for row in rows) for rows in (promises, permits))
    return "\n\n".join([*tables, " ".join(_legend(modes, names))]) + "\n"


def table(modes: Sequence[Mode], names: Sequence[str]) -> Group:
    """Return the same for a terminal of 80 columns: some lines for each mode, then for methods of equal rights."""
    promises = _lines_table()
    for mode in modes:
        trust, *cells = _cells(mode)
        _add(promises, trust, list(zip(COLUMNS[1:], cells, strict=True)))
    permits = _lines_table()
    for methods, verdicts in _permits(modes, names):
        _add(permits, "\n".join(methods), list(zip((mode.trust for mode in modes), verdicts, strict=True)))
    return Group(promises, permits, *_legend(modes, names))


def _lines_table() -> Table:
    shown = Table(box=SIMPLE, show_header=False)
    for style in ("bold", "dim", ""):
        shown.add_column(style=style)
    return shown


def _add(shown: Table, first: str, lines: Sequence[tuple[str, str]]) -> None:
    """Add a section: the names in `first` below each other, and beside them the lines."""
    names = first.split("\n")
    rows = max(len(lines), len(names))
    for place in range(rows):
        name = names[place] if place < len(names) else ""
        shown.add_row(name, *(lines[place] if place < len(lines) else ("", "")), end_section=place == rows - 1)


def _mode(unit: Unit, trust: Trust, names: Sequence[str]) -> Mode:
    usual = _ask(unit, trust, USUAL, "method")
    assert usual is not None
    against, not_against = adversaries(usual[1], math.inf if unit == "none" else 1.0)  # any finite epsilon
    plain = tuple(name for name in names if _ask(unit, trust, name, "method"))
    found = {head: {name: one for name in names if (one := _ask(unit, trust, name, head))} for head in POLICIES}
    covered = {head: tuple(name for name, (g, _) in found[head].items() if g.personal_covered) for head in POLICIES}
    return Mode(
        unit=unit,
        trust=trust,
        against=tuple(against),
        not_against=tuple(not_against),
        methods=plain,
        policies={head: tuple(found[head]) for head in POLICIES if found[head]},
        covered={head: methods for head, methods in covered.items() if methods},
        strategies=tuple(name for name in STRATEGIES if _ask(unit, trust, USUAL, "method", name)),
    )


def _ask(
    unit: Unit, trust: Trust, name: str, head: HeadPolicy, strategy: str = "FedAvg"
) -> tuple[Guarantee, Opening] | None:
    """Return what a run of this kind would promise, and its ledger's opening line; None if it is refused, as false or
    as without effect.
    """
    noise = {} if unit == "none" else {"clip": 1.0, "noise_multiplier": 1.0}
    config = parse_config(
        {
            "method": name,
            "rounds": 1,
            "personal": {"groups": "adapter+head"},
            "server": {"strategy": strategy},
            "privacy": {"unit": unit, "trust": trust, "head": head, **noise},
        }
    )
    method = find("methods", name, Method)
    try:
        table_of_method = plan(name, method, config)
        guarantee = resolve(config, table_of_method, USERS)
    except (PrivacyRefusal, ConfigError):
        return None
    return guarantee, guarantee.opening(config, table_of_method.shared, USERS, "kept by the simulator")


def _cells(mode: Mode) -> tuple[str, ...]:
    adjacencies = " or ".join(text.partition(":")[0] for text in ADJACENCIES[mode.trust])
    return (
        mode.trust,
        mode.unit if mode.unit == "none" else f"one {mode.unit}; {adjacencies}",
        "; ".join(mode.against) or "nobody",
        "; ".join(mode.not_against),
        "all" if mode.strategies == STRATEGIES else ", ".join(mode.strategies),
    )


def _permits(modes: Sequence[Mode], names: Sequence[str]) -> list[tuple[list[str], tuple[str, ...]]]:
    """Methods that may run in the same ways, and these ways in each mode; those that may run in most come first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(_permit(mode, name) for mode in modes), []).append(name)
    return sorted(((found, cells) for cells, found in groups.items()), key=lambda row: (row[1].count("no"), row[0]))


def _permit(mode: Mode, name: str) -> str:
    """How far one method may run in one mode."""
    heads = [
        head + ("*" if name in mode.covered.get(head, ()) else "")
        for head, methods in mode.policies.items()
        if name in methods
    ]
    if name in mode.methods:
        return f"yes; also {', '.join(heads)}" if heads else "yes"
    return f"only {', '.join(heads)}" if heads else "no"


def _legend(modes: Sequence[Mode], names: Sequence[str]) -> list[str]:
    defined = dict.fromkeys(text for mode in modes for text in ADJACENCIES[mode.trust] if ":" in text)
    silent = [name for name in names if not _shares(name)]
    lines = [
        f"Asked for {USERS} users, all in each round.",
        *(f"{text[:1].upper()}{text[1:]}." for text in defined),
        f"Server strategies: {', '.join(STRATEGIES)}.",
        "Methods: yes, as they are; also, or only, under these values of privacy.head.",
    ]
    if any(mode.covered for mode in modes):
        lines.append("*: also protected against whoever obtains one user's personal model.")
    if silent:
        lines.append(f"Nothing is shared, so epsilon is 0 in every mode: {', '.join(silent)}.")
    return lines


def _shares(name: str) -> bool:
    return SHARED in find("methods", name, Method).scopes.values()
