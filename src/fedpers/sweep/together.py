"""What the runs of a sweep promise together to a person who takes part in all of them.

It is computed from ledgers alone, those of unfinished runs and of earlier grids in the same directory included: what
was released stays released.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedpers.config import Config, load_config
from fedpers.errors import LedgerError
from fedpers.privacy.claim import rounded_up
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.spending import composed, kind, spending
from fedpers.public import without_folders
from fedpers.run_directory import MEMBERS

if TYPE_CHECKING:
    from fedpers.simulation import Run


@dataclass(frozen=True)
class Together:
    """The runs on the people of one source: who takes part in each is another matter, so anybody may be in all."""

    source: str
    sentences: Sequence[str]


@dataclass(frozen=True)
class _Spent:
    """A run that has released something."""

    source: str
    ledger: Ledger
    people: Hashable  # equal where users' numbers stand for the same people
    epsilon: float


def together(out: Path, name: Callable[[str], str] = str, known: Mapping[str, Run] | None = None) -> list[Together]:
    """Say for each source of people what all runs in `out` promise together.

    Runs are grouped by source, not by members or seed: that can only make the numbers larger.

    Args:
        out: a sweep's directory.
        name: how to call the run with an address, in errors.
        known: by address, runs that have been read already.

    Raises:
        LedgerError: a ledger was edited or is torn; the message names the run.
    """
    spent: dict[str, list[_Spent]] = {}
    for path in sorted((out / "cells").iterdir()):
        if (path / "config.yaml").exists() and (path / "ledger.jsonl").exists():
            try:
                found = _read(path, (known or {}).get(path.name))
            except LedgerError as error:
                raise LedgerError(f"{name(path.name)}: {error}") from error
            if found.ledger.releases:
                spent.setdefault(found.source, []).append(found)
    return [Together(source, _sentences(runs)) for source, runs in spent.items()]


def _read(path: Path, run: Run | None) -> _Spent:
    config = load_config(path / "config.yaml") if run is None else run.config
    ledger = Ledger.load(path / "ledger.jsonl") if run is None else run.ledger
    members = path / "private" / MEMBERS
    # where nobody is listed, the data section and the seed decide
    people = members.read_bytes() if members.exists() else repr((config.data, config.seed)).encode()
    total = spending(ledger.opening, ledger.releases).total
    return _Spent(_source(config), ledger, hashlib.sha256(people).digest(), total)


def _source(config: Config) -> str:
    tree = without_folders(config.model_dump(mode="json"))
    return f"{config.data.name} {tree['data']['path']}" if config.data.path else config.data.name


def _sentences(runs: Sequence[_Spent]) -> list[str]:
    noised = [run for run in runs if math.isfinite(run.epsilon)]
    kinds: dict[Hashable, list[_Spent]] = {}
    for run in noised:
        if run.ledger.opening.unit == "user":
            kinds.setdefault(kind(run.ledger.opening), []).append(run)
    records = [run for run in noised if run.ledger.opening.unit == "record"]
    found = _void(len(runs), len(noised)) if len(noised) < len(runs) else []
    found += [_users(group) for group in kinds.values()]
    found += [_records(records)] if records else []
    if len(kinds) + bool(records) > 1:
        found.append(
            "These numbers are for different units, adversaries, samplings, δ or numbers of users, and are not added "
            "up: all of these runs together promise less than each number says."
        )
    if noised:
        found.append(
            "Each ε is an upper bound for a person who takes part in each of its runs, against those whom all of their "
            "claims name. Runs on the same people in other directories, or under another source's name, are not "
            "counted, nor is what was learnt by looking at metrics."
        )
    return found


def _void(number: int, noised: int) -> list[str]:
    every, bare = ("all", f"{number - noised} of them") if number > 1 else ("the", "it")
    runs = "1 run" if number == 1 else f"{number} runs"
    said = [f"Whoever sees what {every} {runs} on these people released is promised nothing: {bare} added no noise."]
    return said + (["To those who see what the other runs released, and nothing more:"] if noised else [])


def _users(runs: Sequence[_Spent]) -> str:
    opening = runs[0].ledger.opening
    total = composed([run.ledger for run in runs], [run.people for run in runs])
    return (
        f"{_promise(runs)} at user level ({opening.trust}, {opening.population} users) ε = {rounded_up(total)} and "
        f"δ = {opening.delta:g} for one user ({opening.adjacency})."
    )


def _records(runs: Sequence[_Spent]) -> str:
    """Basic composition (Dwork and Roth, 2014, theorem 3.16): epsilons and deltas add up, whatever the runs are."""
    epsilon = math.fsum(run.epsilon for run in runs)
    delta = math.fsum(run.ledger.opening.delta or 0.0 for run in runs)
    said = f"{_promise(runs)} at record level"
    if delta * max(run.ledger.opening.protected for run in runs) >= 1:
        return f"{said} nothing that can be said here: their δ add up to {delta:g}, which allows to publish a record."
    adjacency = runs[0].ledger.opening.adjacency
    return (
        f"{said} no more than ε = {rounded_up(epsilon)} and δ = {delta:g} for one record ({adjacency}), the sums of "
        "their own; nothing about a person as a whole follows from that."
    )


def _promise(runs: Sequence[_Spent]) -> str:
    return "1 run promises" if len(runs) == 1 else f"{len(runs)} runs promise together"
