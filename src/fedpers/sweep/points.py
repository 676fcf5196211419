"""The runs of a sweep as points of a frontier, made of its two stored tables and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedpers.config import FAMILIES
from fedpers.evaluation.crossed import Crossed, crossed
from fedpers.evaluation.per_user import KINDS
from fedpers.sweep.cells import AT_HOME
from fedpers.sweep.settings import Setting, series_of, settings

LEVELS = {-1: "nothing leaves", 0: "", 1: "clip only", 2: "no privacy"}  # by the first part of a level's place
_AT_HOME = {*AT_HOME, "evaluation"} - {"seed"}  # sections that decide about people, models and baselines
Promise = tuple[str, str, float | None]  # unit, trust and delta


@dataclass(frozen=True, eq=False)
class Point:
    """A method at a privacy level.

    Attributes:
        setting: its runs, which differ in the seed alone.
        kinds: by model kind (own, global, local, zero_shot, swap) the metric over seeds and people.
        noise_to_update: the largest over the shared families, of medians over seeds; None where nothing was noised.
    """

    setting: Setting
    kinds: Mapping[str, Crossed]
    noise_to_update: float | None

    @property
    def line(self) -> str:
        """Its method, and its place on the axes on which there are several."""
        return self.setting.series

    @property
    def level(self) -> str:
        """What it is where it has no epsilon above 0: "no privacy", "clip only" or "nothing leaves"; otherwise ""."""
        return LEVELS[self.setting.level.place[0]]

    @property
    def epsilon(self) -> float:
        """The largest that any of its runs claims."""
        return self.setting.level.place[2]

    @property
    def runs(self) -> list[str]:
        """Hashes of its runs."""
        return self.setting.hashes


@dataclass(frozen=True, eq=False)
class Panel:
    """Points that may share an axis: the same people, models and metric, and the same promise but for its epsilon.

    Attributes:
        name: data and variant, and the place on the axes that decide about people and models.
        unit: record or user; none where no run promises anything.
        trust: who adds the noise.
        delta: of all epsilons; None for unit none.
        points: those without privacy are in the panel of every promise.
        local: training at home alone, over seeds and people; None if there is none.
    """

    name: str
    unit: str
    trust: str
    delta: float | None
    points: tuple[Point, ...]
    local: Crossed | None

    @property
    def lines(self) -> list[str]:
        """Names of the lines, in order."""
        return series_of([point.setting for point in self.points])

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return self.points[0].setting.metric

    @property
    def higher_is_better(self) -> bool:
        """Whether more of it is better."""
        return self.points[0].setting.higher_is_better


def panels(results: pa.Table, users: pa.Table) -> list[Panel]:
    """Group a sweep's runs, in the order of `results`.

    Args:
        results: as in results.parquet.
        users: as in users.parquet.

    Raises:
        DataError: a value is not finite, or two runs differ in nothing that tells them apart.
    """
    home = [name for name in results.column_names if name in users.column_names and name.split("_")[0] in _AT_HOME]
    home = [name for name in home if name != "data"]
    groups: dict[tuple[str, ...], list[Setting]] = {}
    for data, found in settings(results).items():
        for one in found:
            at = (f"{axis} {one.runs[0][axis]}" for axis in home if one.runs[0][axis] is not None)
            groups.setdefault((data, *at), []).append(one)
    return [panel for name, found in groups.items() for panel in _panels(", ".join(name), found, users)]


def _panels(name: str, found: Sequence[Setting], users: pa.Table) -> list[Panel]:
    points = [Point(one, kinds(one, users), _noise(one.runs)) for one in found]
    baselines = {run["baseline"] for one in found for run in one.runs}
    at_home = users.filter(pc.and_(pc.equal(users["kind"], "own"), pc.is_in(users["hash"], pa.array(list(baselines)))))
    local = _crossed(at_home, found[0].metric) if at_home.num_rows else None
    promises = list(dict.fromkeys(promise for one in found if (promise := _promise(one)) is not None))
    return [
        Panel(name, *promise, tuple(one for one in points if _promise(one.setting) in (None, promise)), local)
        for promise in promises or [("none", "none", None)]
    ]


def kinds(one: Setting, users: pa.Table) -> dict[str, Crossed]:
    """Return the metric of each model kind that all its runs have, over seeds and people.

    `users` is all of users.parquet. Local-only training that failed under one seed is no match for the others.

    Raises:
        DataError: as `crossed.crossed` does.
    """
    rows = one.users(users)
    parts = {kind: rows.filter(pc.equal(rows["kind"], kind)) for kind in KINDS}
    whole = (kind for kind, part in parts.items() if len(pc.unique(part["hash"])) == len(one.runs))
    return {kind: _crossed(parts[kind], one.metric) for kind in whole}


def _crossed(rows: pa.Table, metric: str) -> Crossed:
    return crossed(*(rows[name].to_numpy() for name in ("seed", "person", metric)))


def _promise(one: Setting) -> Promise | None:
    run = one.runs[0]
    return None if run["unit"] == "none" else (run["unit"], run["trust"], run["delta"])


def _noise(runs: Sequence[Mapping[str, Any]]) -> float | None:
    held = ([run[f"noise_to_update_{family}"] for run in runs] for family in FAMILIES)
    known = [[ratio for ratio in ratios if ratio] for ratios in held]
    return max((float(np.median(ratios)) for ratios in known if ratios), default=None)
