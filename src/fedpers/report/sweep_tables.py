"""The tables of a sweep's page: each method at each level over seeds and users, and single users at one level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from fedpers.config import FAMILIES
from fedpers.evaluation.comparison import Versus
from fedpers.evaluation.crossed import Crossed, against, gain, intervals
from fedpers.evaluation.statistics import Interval
from fedpers.report.html import SHOWN
from fedpers.report.tables import Column, UserTable
from fedpers.report.tables import gain as gain_of_one
from fedpers.sweep.points import kinds
from fedpers.sweep.settings import Level, Setting, levels_of, seeds, series_of, settings

FREE = {"local": "training at home alone", "zero_shot": "no training at all"}  # what costs no privacy
REFERENCES = ("local", "global")


@dataclass(frozen=True)
class Entry:
    """A method at a level: its own models, their gains by reference, and noise over the mean update by family."""

    own: Interval
    over: Mapping[str, Versus]
    noise: Mapping[str, float]
    seeds: int


@dataclass(frozen=True)
class Headline:
    """A table of one data set.

    Attributes:
        data: its name.
        metric: the headline metric.
        higher_is_better: whether more of it is better.
        people: how many users under how many seeds, in words.
        levels: columns, the most private first.
        rows: by method, and by the values of the other axes that vary, an entry for each level; None where not run.
        free: in words what costs no privacy, with its mean.
        comparisons: how many gains p is corrected for.
        detectable: smallest and largest of the smallest detectable gains.
    """

    data: str
    metric: str
    higher_is_better: bool
    people: str
    levels: Sequence[str]
    rows: Mapping[str, Sequence[Entry | None]]
    free: Sequence[tuple[str, Interval]]
    comparisons: int
    detectable: tuple[float, float] | None


@dataclass(frozen=True)
class Users:
    """Single users of one data set, at one level and under one seed, and how many there are in all."""

    which: str
    table: UserTable
    everybody: int


def headlines(results: pa.Table, users: pa.Table) -> list[Headline]:
    """Return a table for each data set; intervals and p as in `evaluation.crossed`, p corrected over a whole table."""
    return [_headline(data, found, users) for data, found in settings(results).items()]


def _headline(data: str, found: Sequence[Setting], users: pa.Table) -> Headline:
    measured = [kinds(one, users) for one in found]
    higher = found[0].higher_is_better
    gains = {
        f"{place} {kind}": gain(one["own"], one[kind], higher_is_better=higher)
        for place, one in enumerate(measured)
        for kind in REFERENCES
        if kind in one
    }
    versus = against(gains)
    means = intervals([one["own"] for one in measured])
    entries = {
        (one.series, one.level): Entry(
            means[place],
            {kind: versus[f"{place} {kind}"] for kind in REFERENCES if f"{place} {kind}" in versus},
            _noise(one),
            len(one.runs),
        )
        for place, one in enumerate(found)
    }
    levels = levels_of(found)
    detectable = [one.detectable for one in versus.values() if one.detectable is not None]
    return Headline(
        data=data,
        metric=found[0].metric,
        higher_is_better=higher,
        people=f"{max(one['own'].people.size for one in measured)} users, {seeds(found)}",
        levels=[level.label.replace("\n", " ") for level in levels],
        rows={name: [entries.get((name, level)) for level in levels] for name in series_of(found)},
        free=_free(found, measured),
        comparisons=len(versus),
        detectable=(min(detectable), max(detectable)) if detectable else None,
    )


def _noise(one: Setting) -> dict[str, float]:
    """Mean over the runs, where all have it."""
    held = {family: [run[f"noise_to_update_{family}"] for run in one.runs] for family in FAMILIES}
    return {family: sum(ratios) / len(ratios) for family, ratios in held.items() if None not in ratios}


def _free(found: Sequence[Setting], measured: Sequence[Mapping[str, Crossed]]) -> list[tuple[str, Interval]]:
    """Means of what costs no privacy; several where the runs of a data set have different baselines."""
    free: dict[tuple[str, float], tuple[set[str], Crossed]] = {}
    for one, by_kind in zip(found, measured, strict=True):
        for kind in FREE:
            if kind in by_kind:
                names, _ = free.setdefault((kind, by_kind[kind].mean), (set(), by_kind[kind]))
                names.add(one.series)
    means = intervals([values for _, values in free.values()])
    several = {kind for kind in FREE if sum(key == kind for key, _ in free) > 1}
    return [
        (f"{FREE[kind]} ({'; '.join(sorted(names))})" if kind in several else FREE[kind], mean)
        for (kind, _), (names, _), mean in zip(free, free.values(), means, strict=True)
    ]


def user_by_user(results: pa.Table, users: pa.Table) -> Users | None:
    """Return every method's own models for the first users of the first data set; None without any run but baselines.

    Of its levels the one with the largest finite epsilon is taken, and the smallest seed: no result has a say in it.
    Runs on other people or with another baseline than the first such run are left out.
    """
    found = next(iter(settings(results).values()), None)
    if found is None:
        return None
    levels = levels_of(found)
    level = next((one for one in reversed(levels) if one.place[0] == 0), levels[-1])
    at = [one for one in found if one.level == level]
    seed = min(run["seed"] for one in at for run in one.runs)
    runs = {one.series: run for one in at for run in one.runs if run["seed"] == seed}
    base = next(iter(runs.values()))
    metric, higher = found[0].metric, found[0].higher_is_better
    first, local = (_one(users, base["hash"], kind, metric) for kind in ("own", "local"))
    own = {n: _one(users, run["hash"], "own", metric) for n, run in runs.items() if run["baseline"] == base["baseline"]}
    own = {name: one for name, one in own.items() if _records(one) == _records(first)}
    shown = [*([local] if local else []), *own.values()]
    columns = [Column("user"), Column("test records"), Column("training records")]
    columns += [Column(f"local {metric}", 3)] if local else []
    columns += [Column(f"{name}: own {metric}", 3) for name in own]
    columns += [Column(f"{name}: gain over local", 3) for name in own if local]
    rows = []
    for user in sorted(first)[:SHOWN]:
        test, train, _ = first[user]
        values = [found[user][2] for found in shown]
        gains = [gain_of_one(value, values[0], higher) for value in values[1:]] if local else []
        rows.append([user, test, train, *(round(value, 6) for value in (*values, *gains))])
    return Users(_which(found[0].data, level, seed), UserTable(columns, rows), len(first))


def _one(users: pa.Table, address: str, kind: str, metric: str) -> dict[int, tuple[int, int, float]]:
    """Test and training records and the metric of a run's users under a kind of model."""
    rows = users.filter(pc.and_(pc.equal(users["hash"], address), pc.equal(users["kind"], kind)))
    columns = (rows[name].to_pylist() for name in ("user", "test_records", "train_records", metric))
    return {user: (test, train, value) for user, test, train, value in zip(*columns, strict=True)}


def _records(rows: Mapping[int, tuple[int, int, float]]) -> dict[int, int]:
    return {user: test for user, (test, _, _) in rows.items()}


def _which(data: str, level: Level, seed: int) -> str:
    return f"{data}, {level.label.replace(chr(10), ' ')}, seed {seed}"
