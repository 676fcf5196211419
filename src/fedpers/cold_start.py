"""How many records does somebody new need? Models of people who were in no round, fitted to their last k records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from fedpers.cohort.model import CohortModel
from fedpers.config import Family
from fedpers.data.base import Federation, everybody, load
from fedpers.errors import ConfigError
from fedpers.evaluation import models as evaluation
from fedpers.evaluation.per_user import write_table
from fedpers.evaluation.statistics import Floats, Interval, compare, mean_interval
from fedpers.experiment import method_plan
from fedpers.figures.cold_start import cold_start_curve
from fedpers.finished_run import Arrays, Finished, members_of, model_over, open_run
from fedpers.personalize import fit_at_home, newcomer_plan
from fedpers.plan import Plan
from fedpers.privacy.randomness import seed_key
from fedpers.reporting import Reporter
from fedpers.run_place import check_new
from fedpers.tasks.base import Task

COUNTS = (0, 1, 2, 4, 8, 16, 32)
KINDS = ("own", "local")


@dataclass(frozen=True)
class Point:
    """What people who were new had after so many records; gains are positive where own is better.

    Attributes:
        records: k, the number of training records of each.
        means: by kind the mean of the metric over people, and its 95% bootstrap interval.
        over_shared: mean gain of own over the shared model, 95% interval, p of Wilcoxon's paired test.
        over_local: the same over a model that was fitted to the same k records without a federation.
    """

    records: int
    means: Mapping[str, Interval]
    over_shared: tuple[float, float, float, float]
    over_local: tuple[float, float, float, float]


@dataclass(frozen=True)
class ColdStart:
    """The curve, of the same people at each point."""

    people: int
    metric: str
    higher_is_better: bool
    shared: float  # means of models that do not hang on k
    zero_shot: float
    points: tuple[Point, ...]


def cold_start(
    run_dir: Path,
    out: Path,
    *,
    counts: Sequence[int] = COUNTS,
    users: int | None = None,
    groups: tuple[Family, ...] = (),
    reporter: Reporter | None = None,
) -> ColdStart:
    """Fit and measure models of people whom the run could have had but did not, and write table, JSON and figure.

    They are those of the run's data source beyond its `data.users` or `data.held_out`, with `max(counts)` training
    records or more, so that every point is about the same people. Their models are fitted at home to the last k
    training records, those nearest to the test records, from the shared model (own) and from the public start (local).

    Args:
        run_dir: a finished run.
        out: a new directory.
        counts: the numbers of records.
        users: at most so many people.
        groups: as for `personalize`.
        reporter: whom to tell about progress.

    Raises:
        ConfigError: nobody is left whom the run did not have, or a method without anything for somebody new.
        RunDirectoryError: `out` exists.
    """
    check_new(out)
    if not counts or min(counts) < 0:
        raise ConfigError(f"records {', '.join(map(str, counts))}: expected numbers from 0 on.")
    run, reporter = open_run(run_dir), reporter or Reporter()
    federation = strangers(run, max(counts), users)
    task, plan = run.task, newcomer_plan(run.plan, groups)
    examples = task.prepare(federation, seed_key(run.config.seed))
    model = model_over(run, plan, federation, examples, reporter)
    local = method_plan("local", run.config.model_copy(update={"options": {}}))
    fixed = {
        "shared": evaluation.common(model, run.shared, "shared"), "zero_shot": evaluation.common(model, {}, "initial"),
    }  # fmt: skip
    people, sizes = range(len(federation.users)), sorted(set(counts))
    reporter.stage("records of somebody new", 0, len(sizes))
    values = _values(task, evaluation.measure(model, people, fixed))
    rows: list[dict[str, object]] = []
    points = []
    for done, count in enumerate(sizes, start=1):
        kinds = {
            "own": _fitted(run, plan, model, count, run.wire, f"own{count}"),
            "local": _fitted(run, local, model, count, {}, f"local{count}"),
        }
        found = _values(task, evaluation.measure(model, people, kinds))
        rows += [
            {"user": user, "records": count, "kind": kind, task.metric: float(value)}
            for kind in KINDS for user, value in enumerate(found[kind])
        ]  # fmt: skip
        points.append(_point(count, found, values["shared"], task.higher_is_better, model, run.config.seed))
        reporter.stage("records of somebody new", done, len(sizes))
    shared, zero = (float(values[kind].mean()) for kind in ("shared", "zero_shot"))
    curve = ColdStart(len(federation.users), task.metric, task.higher_is_better, shared, zero, tuple(points))
    out.mkdir(parents=True, mode=0o700)  # metrics of single people are private
    write_table(pa.Table.from_pylist(rows), out / "cold_start.parquet")
    (out / "cold_start.json").write_text(json.dumps(_tree(curve), indent=2) + "\n", encoding="utf-8")
    cold_start_curve(curve.metric, curve.people, _lines(curve), {"global": shared, "zero_shot": zero}, out)
    return curve


def strangers(run: Finished, fewest: int, most: int | None) -> Federation:
    """Return the people of the run's source whom it did not have, with so many training records or more.

    Each has their own records, also where the members' preferences changed; who gave records for that was in the run.
    Raises ConfigError if there are none.
    """
    key = seed_key(run.config.seed)
    members = set(members_of(run))
    if run.config.data.drift is not None:
        members |= set(load(run.config, key).donors)
    everyone = everybody(run.config.data, key)
    places = [
        place for place, user in enumerate(everyone.users)
        if user not in members and len(everyone.train[place]) >= max(fewest, 1)
    ][:most]  # fmt: skip
    if not places:
        others = [len(held) for user, held in zip(everyone.users, everyone.train, strict=True) if user not in members]
        most_held = max(others, default=0)
        raise ConfigError(
            f"nobody is left: the run had {len(members)} of {len(everyone.users)} people, and no other has {fewest} "
            f"training records (the most is {most_held}); run with a smaller data.users or with data.held_out, or ask "
            "for fewer (--records)."
        )
    return replace(
        everyone,
        users=tuple(everyone.users[place] for place in places),
        train=tuple(everyone.train[place] for place in places),
        test=tuple(everyone.test[place] for place in places),
        partners=tuple(frozenset() for _ in places),
        swap=None,
    ).check()


def _fitted(run: Finished, plan: Plan, model: CohortModel, count: int, start: Arrays, label: str) -> evaluation.Kind:
    """Train everybody at home on the last `count` records each."""
    kept = tuple(rows[len(rows) - count :] for rows in model.examples.train)
    whole = fit_at_home(run, plan, model, replace(model.examples, train=kept), start)
    return evaluation.Kind(lambda users: {name: value[users].clone() for name, value in whole.items()}, label)


def _values(task: Task, found: evaluation.Found) -> dict[str, Floats]:
    """Return the task's headline metric of each user, by kind."""
    return {kind: np.array([one[task.metric] for one in found.per_user(task, kind)]) for kind in found.kinds}


def _point(
    count: int, found: Mapping[str, Floats], shared: Floats, higher: bool, model: CohortModel, seed: int
) -> Point:
    tested = np.array([len(rows) for rows in model.examples.test])

    def gain(other: Floats) -> tuple[float, float, float, float]:
        draws = np.random.default_rng(seed)
        versus = compare(found["own"], other, tested, None, None, draws, higher_is_better=higher)
        return versus.mean_gain, *versus.ci95, versus.p_value

    means = {kind: mean_interval(found[kind], np.random.default_rng(seed)) for kind in KINDS}
    return Point(count, means, gain(shared), gain(found["local"]))


def _lines(curve: ColdStart) -> dict[str, list[tuple[int, float, float, float]]]:
    return {kind: [(point.records, *point.means[kind]) for point in curve.points] for kind in KINDS}


def _tree(curve: ColdStart) -> dict[str, object]:
    points = [vars(point) | {"means": dict(point.means)} for point in curve.points]
    return vars(curve) | {"points": points}
