"""Which runs of a sweep belong together, and at which level of privacy they stand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fedpers.privacy.claim import rounded_up

_LEVEL, _VARIANT = "privacy_epsilon", "variant"
_Key = tuple[str, str, float | None]


@dataclass(frozen=True, order=True)
class Level:
    """What is promised, as a place on an axis.

    Attributes:
        place: -1 for nothing released, 0 for an epsilon, 1 for clipping alone, 2 for no privacy; unit; epsilon.
        label: for people.
    """

    place: tuple[int, str, float]
    label: str


@dataclass(frozen=True, eq=False)
class Setting:
    """Runs of a sweep that differ in their seed alone.

    Attributes:
        data: data source, and variant where there is one: these have pictures of their own.
        series: method, and the values of all other axes that vary: these are lines or rows.
        level: from the claims of all runs on the same place of the axis of epsilon.
        runs: rows of results.parquet.
    """

    data: str
    series: str
    level: Level
    runs: tuple[Mapping[str, Any], ...]

    @property
    def metric(self) -> str:
        """Name of the headline metric."""
        return str(self.runs[0]["metric"])

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return bool(self.runs[0]["higher_is_better"])

    @property
    def hashes(self) -> list[str]:
        """Of its runs."""
        return [run["hash"] for run in self.runs]

    @property
    def baselines(self) -> list[str]:
        """Hashes of the local-only runs that belong to it."""
        return list(dict.fromkeys(run["baseline"] for run in self.runs if run["baseline"] is not None))

    def users(self, users: pa.Table) -> pa.Table:
        """Return its rows of users.parquet."""
        return users.filter(pc.is_in(users["hash"], pa.array(self.hashes)))


def settings(results: pa.Table) -> dict[str, list[Setting]]:
    """Group the runs of results.parquet by data, in its order; training at home alone is a reference, not a setting."""
    rows = [row for row in results.to_pylist() if row["method"] != "local"]
    names = results.column_names
    axes = names[names.index("seed") + 1 : names.index("claim")]  # where `sweep.results` puts them
    varied = [axis for axis in axes if axis not in {_LEVEL, _VARIANT} and len({row[axis] for row in rows}) > 1]
    levels = _levels(rows)
    groups: dict[tuple[str, str, Level], list[Mapping[str, Any]]] = {}
    for row in rows:
        data = " ".join(dict.fromkeys([row["data"], row.get(_VARIANT) or row["data"]]))
        series = ", ".join([row["method"], *(f"{axis}={row[axis]}" for axis in varied if row[axis] is not None)])
        groups.setdefault((data, series, levels[_key(row)]), []).append(row)
    found: dict[str, list[Setting]] = {}
    for (data, series, level), runs in groups.items():
        found.setdefault(data, []).append(Setting(data, series, level, tuple(runs)))
    return found


def series_of(found: Sequence[Setting]) -> list[str]:
    """Names of the lines, in order."""
    return list(dict.fromkeys(one.series for one in found))


def seeds(found: Sequence[Setting]) -> str:
    """How many seeds, in words."""
    numbers = sorted({len(one.runs) for one in found})
    shown = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return "1 seed" if shown == "1" else f"{shown} seeds"


def levels_of(found: Sequence[Setting]) -> list[Level]:
    """Levels, the most private first."""
    return sorted({one.level for one in found})


def _key(row: Mapping[str, Any]) -> _Key:
    """Runs on the same place of the axis of epsilon, whose claims may differ by a hair."""
    epsilon = row["epsilon"]
    return row["unit"], str(row.get(_LEVEL) or (epsilon if math.isinf(epsilon) else rounded_up(epsilon))), row["delta"]


def _levels(rows: Iterable[Mapping[str, Any]]) -> dict[_Key, Level]:
    most: dict[_Key, float] = {}
    for row in rows:
        most[_key(row)] = max(most.get(_key(row), 0.0), row["epsilon"])
    return {key: _level(key[0], epsilon, key[2]) for key, epsilon in most.items()}


def _level(unit: str, epsilon: float, delta: float | None) -> Level:
    if epsilon == 0:
        return Level((-1, unit, epsilon), "nothing released\n(ε = 0)")
    if unit == "none":
        return Level((2, unit, epsilon), "no privacy\n(ε = ∞)")
    if math.isinf(epsilon):
        return Level((1, unit, epsilon), f"clipped per {unit},\nno noise (ε = ∞)")
    return Level((0, unit, epsilon), f"ε = {rounded_up(epsilon)} per {unit},\nδ = {delta:g}")
