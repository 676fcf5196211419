"""The worst off and the gap between groups over the levels of privacy, for each method of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fedpers.evaluation.statistics import MINIMUM_RECORDS, Interval
from fedpers.evaluation.tails import FEW, MANY, decile, decile_of_equals, gap, resampled, thirds
from fedpers.figures.style import BLACK, KIND_LOOKS, Look, method_look, new_figure, reference, save, style, title, wrap
from fedpers.figures.sweep_facets import Measured, baselines, file_name, heading, level, levels, measured
from fedpers.sweep.points import Panel, panels


@style()
def worst_and_gap(results: pa.Table, users: pa.Table, folder: Path) -> list[Path]:
    """Draw the worst decile of own models, and how much better those with many training records are off, by level.

    The worst tenth is chosen by the metric that is then averaged, so it is low even among equals. A dash beside each
    point says how low: what chance alone makes of users who all have the same accuracy (`tails.decile_of_equals`).
    Training at home alone is a band in both parts.

    Args:
        results: results.parquet of a sweep.
        users: its users.parquet.
        folder: gets `worst_and_gap`, for each panel where there are several.

    Returns:
        The written paths; nothing where no user has enough test records.

    Raises:
        DataError: as `points.panels` does.
    """
    found = panels(results, users)
    written = []
    for panel in found:
        own = [_enough(measured(users, point.runs, "own", panel.metric)) for point in panel.points]
        if any(one is None for one in own):
            continue
        local = _enough(measured(users, baselines(panel), "own", panel.metric))
        fig = new_figure(8.6, 6.6)
        upper, lower = fig.subplots(2, 1, sharex=True)
        _draw(upper, lower, panel, [one for one in own if one is not None])
        if local is not None:
            for ax, value in ((upper, _worst(panel, local)), (lower, _gap(panel, local))):
                if value is not None:
                    reference(ax, "local", value.mean, (value.low, value.high))
        _finish(upper, lower, panel, local is not None)
        title(
            fig, heading(panel, "the worst tenth of users, and those with many training records against those with few")
        )
        fig.supxlabel(wrap(_caption(own[0]), 120), fontsize=8, x=0.01, ha="left")
        written += save(fig, folder, file_name("worst_and_gap", panel, found))
    return written


def _enough(found: Measured | None) -> Measured | None:
    """Leave out whom so few test records were measured on that the metric is mostly chance."""
    if found is None:
        return None
    enough = found.test_records >= MINIMUM_RECORDS
    people = enough.any(axis=0)
    if not people.any():
        return None
    grids = (found.values, found.test_records, found.train_records)
    return Measured(*(np.where(enough, grid, np.nan)[:, people] for grid in grids))


def _draw(upper: Axes, lower: Axes, panel: Panel, own: Sequence[Measured]) -> None:
    places = levels(panel.points)
    for point, one in zip(panel.points, own, strict=True):
        number = panel.lines.index(point.line)
        look = method_look(point.line, number)
        step = min(0.16, 0.7 / len(panel.lines))
        x = places.index(level(point)) + (number - (len(panel.lines) - 1) / 2) * step
        worst, between = _worst(panel, one), _gap(panel, one)
        _mark(upper, x, worst, look)
        _mark(lower, x, between, look)
        if panel.metric == "accuracy":
            chance = decile_of_equals(float(np.nanmean(one.values)), one.test_records, np.random.default_rng(0))
            upper.plot([x - 0.4 * step, x + 0.4 * step], [chance] * 2, color=look.color, linewidth=1.4, zorder=2)


def _worst(panel: Panel, one: Measured) -> Interval:
    marks = np.zeros(one.values.shape, dtype=np.int64)
    statistic = partial(decile, higher_is_better=panel.higher_is_better)
    return resampled(lambda values, _: statistic(values), one.values, marks, np.random.default_rng(0))


def _gap(panel: Panel, one: Measured) -> Interval | None:
    marks = thirds(one.train_records)
    if not marks.any():
        return None
    return resampled(partial(gap, higher_is_better=panel.higher_is_better), one.values, marks, np.random.default_rng(0))


def _mark(ax: Axes, x: float, value: Interval | None, look: Look) -> None:
    if value is not None:
        ax.plot([x, x], [value.low, value.high], color=look.color, linewidth=1.3, zorder=3)
        ax.plot(x, value.mean, color=look.color, marker=look.marker, linestyle="", zorder=4)


def _finish(upper: Axes, lower: Axes, panel: Panel, local: bool) -> None:
    lower.axhline(0, color=BLACK, linewidth=0.8, zorder=1)
    lower.set_xticks(range(len(levels(panel.points))), levels(panel.points))
    lower.set_xlim(-0.6, len(levels(panel.points)) - 0.4)
    for ax in (upper, lower):
        ax.grid(visible=False, axis="x")
    upper.set_ylabel(wrap(f"{panel.metric} of the worst tenth", 30))
    lower.set_ylabel(wrap(f"{panel.metric}: how much better off with many training records", 34))
    handles: list[Artist] = [_handle(method_look(line, number)) for number, line in enumerate(panel.lines)]
    if local:
        handles.append(_handle(replace(KIND_LOOKS["local"], name="local-only, 95%", marker="")))
    if panel.metric == "accuracy":
        label = "dash: the worst tenth if\nall were equally well\nserved (chance alone)"
        handles.append(Line2D([], [], color=BLACK, linewidth=1.4, label=label))
    upper.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0)


def _handle(look: Look) -> Artist:
    """The entry of a method, which has no line since levels are no scale, or of a line, which has no marker."""
    style: Any = "" if look.marker else look.line
    return Line2D([], [], color=look.color, marker=look.marker, linestyle=style, linewidth=1.3, label=look.name)


def _caption(one: Measured | None) -> str:
    assert one is not None
    marks, train = thirds(one.train_records), one.train_records
    people = f"{one.values.shape[1]:,} users with at least {MINIMUM_RECORDS} test records. "
    groups = "All users have equally many training records, so there are no groups. "
    if marks.any():
        few, many = marks == FEW, marks == MANY
        groups = (
            f"Many: {train[many].min():.0f} training records and more ({many[0].sum():,} users); few: "
            f"{train[few].max():.0f} and fewer ({few[0].sum():,}). "
        )
    return (
        f"{people}The worst tenth is chosen after the fact by the same noisy metric, so it looks worse off than it is. "
        f"{groups}Bars: 95% over users and seeds (crossed bootstrap), which does not cover that choice. The groups "
        "differ in more than their records, and the metrics are exact, which no claim covers."
    )
