"""Who is protected from whom, and by which methods: a table made by asking the checks that every run has to pass.

It is no module of `fedpers.methods`, where each module is a method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import get_args

from rich.box import SIMPLE
from rich.table import Table

from fedpers.config import TRUSTS, HeadPolicy, Trust, Unit, parse_config
from fedpers.errors import ConfigError, PrivacyRefusal
from fedpers.methods.base import SHARED, Method, plan
from fedpers.privacy.claim import adversaries
from fedpers.privacy.guarantee import Guarantee, resolve
from fedpers.privacy.ledger_lines import ADJACENCIES, Opening
from fedpers.privacy.refusals import OF_SINGLE_REPLIES, OF_THE_MEAN
from fedpers.registry import find

USERS = 100  # registered users of the federation that the checks are asked about
USUAL = "fedavg"  # keeps nothing personal, so it may run in every mode
STRATEGIES = (*OF_THE_MEAN, *OF_SINGLE_REPLIES)
POLICIES: tuple[HeadPolicy, ...] = tuple(policy for policy in get_args(HeadPolicy) if policy != "method")
COLUMNS = (
    "trust", "unit; adjacency", "protected against", "not protected against", "methods", "with privacy.head",
    "server strategies",
)  # fmt: skip


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
        covered: Head policies under which personal models are covered, too.
        strategies: Server strategies that may be chosen.
    """

    unit: Unit
    trust: Trust
    against: tuple[str, ...]
    not_against: tuple[str, ...]
    methods: tuple[str, ...]
    policies: Mapping[HeadPolicy, tuple[str, ...]]
    covered: frozenset[HeadPolicy]
    strategies: tuple[str, ...]


def guarantees(names: Sequence[str]) -> list[Mode]:
    """Return the modes in the order of the configuration, asked about the registered methods `names`.

    Raises:
        ConfigError: a name that is not registered.
    """
    return [_mode(unit, trust, names) for unit, trusts in TRUSTS.items() for trust in trusts]


def markdown(modes: Sequence[Mode], names: Sequence[str]) -> str:
    """Return the modes as a Markdown table, a row each, with a legend below."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_cells(mode, names) for mode in modes)]
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", " ".join(_legend(modes, names))]) + "\n"


def table(modes: Sequence[Mode], names: Sequence[str]) -> Table:
    """Return the modes as a table for a terminal of 80 columns, some lines each, with a legend below."""
    shown = Table(box=SIMPLE, show_header=False, caption=" ".join(_legend(modes, names)), caption_justify="left")
    for column in ("bold", "dim", ""):
        shown.add_column(style=column)
    for mode in modes:
        trust, *cells = _cells(mode, names)
        for place, (head, cell) in enumerate(zip(COLUMNS[1:], cells, strict=True)):
            shown.add_row("" if place else trust, head, cell, end_section=head == COLUMNS[-1])
    return shown


def _mode(unit: Unit, trust: Trust, names: Sequence[str]) -> Mode:
    usual = _ask(unit, trust, USUAL, "method")
    assert usual is not None
    against, not_against = adversaries(usual[1], math.inf if unit == "none" else 1.0)  # any finite epsilon
    plain = tuple(name for name in names if _ask(unit, trust, name, "method"))
    found = {head: {name: one for name in names if (one := _ask(unit, trust, name, head))} for head in POLICIES}
    return Mode(
        unit=unit,
        trust=trust,
        against=tuple(against),
        not_against=tuple(not_against),
        methods=plain,
        policies={head: tuple(found[head]) for head in POLICIES if found[head]},
        covered=frozenset(h for h in POLICIES if found[h] and all(g.personal_covered for g, _ in found[h].values())),
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


def _cells(mode: Mode, names: Sequence[str]) -> tuple[str, ...]:
    adjacencies = " or ".join(text.partition(":")[0] for text in ADJACENCIES[mode.trust])
    return (
        mode.trust,
        mode.unit if mode.unit == "none" else f"one {mode.unit}; {adjacencies}",
        "; ".join(mode.against) or "nobody",
        "; ".join(mode.not_against),
        _some(mode.methods, names),
        _policies(mode),
        _some(mode.strategies, STRATEGIES),
    )


def _some(chosen: Sequence[str], known: Sequence[str]) -> str:
    """The chosen among the known, in as few words as possible."""
    others = [name for name in known if name not in chosen]
    if not others:
        return "all"
    return f"all but {', '.join(others)}" if len(others) < len(chosen) else ", ".join(chosen)


def _policies(mode: Mode) -> str:
    """Head policies and the methods that they go with, policies of the same methods together."""
    parts = []
    for methods, heads in groupby(sorted(mode.policies, key=lambda h: mode.policies[h]), lambda h: mode.policies[h]):
        parts.append(f"{', '.join(h + ('*' if h in mode.covered else '') for h in heads)}: {', '.join(methods)}")
    return "; ".join(parts) or "none"


def _legend(modes: Sequence[Mode], names: Sequence[str]) -> list[str]:
    defined = dict.fromkeys(text for mode in modes for text in ADJACENCIES[mode.trust] if ":" in text)
    silent = [name for name in names if not _shares(name)]
    lines = [f"Asked for {USERS} users, all in each round.", *(f"{text[:1].upper()}{text[1:]}." for text in defined)]
    if any(mode.covered for mode in modes):
        lines.append("*: also protected against whoever obtains one user's personal model.")
    lines.append(f"Methods: {', '.join(names)}.")
    if silent:
        lines.append(f"Nothing is shared, so epsilon is 0 in every mode: {', '.join(silent)}.")
    lines.append(f"Server strategies: {', '.join(STRATEGIES)}.")
    return lines


def _shares(name: str) -> bool:
    return SHARED in find("methods", name, Method).scopes.values()
