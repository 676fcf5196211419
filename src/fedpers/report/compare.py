"""Runs side by side: claims, headline, what differs, and the same people's differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedpers.config import dump_config
from fedpers.errors import ConfigError
from fedpers.evaluation.comparison import Score, Versus, against
from fedpers.evaluation.per_user import KINDS, NAMES
from fedpers.report.html import render, write_page
from fedpers.report.stored import read_run, read_users
from fedpers.report.tables import Column, UserTable, by_kind, gain
from fedpers.run_directory import MEMBERS
from fedpers.simulation import Run

SAME = {"data": "the data section", "task": "the task section", "seed": "the seed"}  # else other people or questions
Own = Mapping[int, Mapping[str, Any]]  # rows of users.parquet for own models, by user


@dataclass(frozen=True)
class Paired:
    """A run's own models against the first run's, on the same people: counts of people, and the test."""

    better: int
    same: int
    worse: int
    versus: Versus


@dataclass(frozen=True)
class Comparison:
    """All that the page shows; runs go by their names, in the order given, and the first is the reference.

    Attributes:
        runs: the runs.
        kinds: kinds of models that any of them measured.
        differences: configuration keys that differ, with each run's value.
        paired: runs that could be paired with the first.
        unpaired: the others, and why.
        users: the paired people; None without any.
    """

    runs: Mapping[str, Run]
    names: Mapping[str, str]
    kinds: Sequence[str]
    differences: Mapping[str, Sequence[str]]
    paired: Mapping[str, Paired]
    unpaired: Mapping[str, str]
    users: UserTable | None


def write_comparison(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page and return where it is: by default compare.html beside the first run.

    Raises:
        ConfigError: fewer than two runs, one named twice, or runs of other metrics.
        FedpersError: a run that is not finished, of another version, or whose ledger was edited.
    """
    found = compare_runs(paths)
    place = out or paths[0].resolve().parent / "compare.html"
    return write_page(place, render("compare.html.j2", found=found), private=True)


def compare_runs(paths: Sequence[Path]) -> Comparison:
    """Gather what the page shows; trains nothing. Raises as `write_comparison` does."""
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("compare: name two or more different runs.")
    runs = {name: read_run(path)[0] for name, path in zip(_names(paths), paths, strict=True)}
    _check_metrics(runs)
    own = {name: by_kind(read_users(run))["own"] for name, run in runs.items()}
    first, *others = runs
    unpaired = {name: why for name in others if (why := _unlike((runs[first], own[first]), (runs[name], own[name])))}
    together = {name: own[name] for name in runs if name not in unpaired}
    metric, higher = runs[first].summary["metric"], runs[first].summary["higher_is_better"]
    scores = {name: {0: _scores(rows, metric, higher)} for name, rows in together.items()}
    versus = against({name: scores[name] for name in scores if name != first}, scores[first])
    gains = {name: _gains(together[name], own[first], metric, higher) for name in versus}
    return Comparison(
        runs=runs,
        names=NAMES,
        kinds=[kind for kind in KINDS if any(kind in run.summary["metrics"] for run in runs.values())],
        differences=_differences(list(runs.values())),
        paired={name: _paired(list(gains[name].values()), one) for name, one in versus.items()},
        unpaired=unpaired,
        users=_users(together, gains, metric) if versus else None,
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """Name the runs by their directories, with the whole path where two have one name."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _check_metrics(runs: Mapping[str, Run]) -> None:
    measured = {name: (run.summary["task"], run.summary["metric"]) for name, run in runs.items()}
    if len(set(measured.values())) > 1:
        said = "; ".join(f"{name}: {metric} of {task}" for name, (task, metric) in measured.items())
        raise ConfigError(f"compare: the runs measure different things ({said}); compare runs of one task and metric.")


def _unlike(first: tuple[Run, Own], other: tuple[Run, Own]) -> str | None:
    """Say why two runs' people cannot be paired; None if they can."""
    one, two = first[0].config, other[0].config
    if different := [said for part, said in SAME.items() if getattr(one, part) != getattr(two, part)]:
        return f"{' and '.join(different)} differ{'s' if len(different) == 1 else ''} from the first run's"
    members = [run.path / "private" / MEMBERS for run, _ in (first, other)]
    if all(path.exists() for path in members) and members[0].read_bytes() != members[1].read_bytes():
        return "its members are others than the first run's, so the data have changed"
    tested = [{user: row["test_records"] for user, row in rows.items()} for _, rows in (first, other)]
    if tested[0] != tested[1]:
        return "it was measured on other people or test records than the first run (evaluation.users, or other data)"
    return None


def _scores(rows: Own, metric: str, higher_is_better: bool) -> dict[str, Score]:
    """Own models by person, with such a sign that more is better."""
    sign = 1 if higher_is_better else -1
    return {str(user): Score(sign * row[metric], row["test_records"]) for user, row in rows.items()}


def _gains(rows: Own, first: Own, metric: str, higher_is_better: bool) -> dict[int, float]:
    return {user: gain(row[metric], first[user][metric], higher_is_better) for user, row in rows.items()}


def _paired(gains: Sequence[float], versus: Versus) -> Paired:
    better, worse = sum(one > 0 for one in gains), sum(one < 0 for one in gains)
    return Paired(better, len(gains) - better - worse, worse, versus)


def _users(own: Mapping[str, Own], gains: Mapping[str, Mapping[int, float]], metric: str) -> UserTable:
    """A row per person: the own model's metric in each run, and its gain over the first."""
    first = next(iter(own))
    columns = [Column("user"), Column("test records"), *(Column(f"{name}: own {metric}", 3) for name in own)]
    columns += [Column(f"{name}: gain over {first}", 3) for name in gains]
    found = []
    for user, row in sorted(own[first].items()):
        values = [rows[user][metric] for rows in own.values()]
        found.append([user, row["test_records"], *values, *(one[user] for one in gains.values())])
    return UserTable(columns, found)


def _differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    flat = [_flat(yaml.safe_load(dump_config(run.config))) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    values = {key: [one.get(key, "–") for one in flat] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys of nested dictionaries, with their values as text."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: yaml.safe_dump(tree, default_flow_style=True).removesuffix("...\n").strip()}
    return {key: v for part, one in tree.items() for key, v in _flat(one, f"{prefix}.{part}".lstrip(".")).items()}
