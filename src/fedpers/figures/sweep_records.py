"""Gain over training records of a user: who has little gains from others, who has much may not need them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from fedpers.evaluation.crossed import Crossed, gain
from fedpers.evaluation.per_user import NAMES
from fedpers.evaluation.statistics import Floats, Interval, mean_interval
from fedpers.figures.records import TICKS
from fedpers.figures.style import BLACK, SKY, save, style, title
from fedpers.figures.sweep_facets import MOST_MARKS, explain, facets, file_name, heading, measured, sample
from fedpers.sweep.points import Panel, Point, panels

GROUPS, FEWEST = 6, 10  # groups at most; people of a group at least, about, or its interval says nothing


@style()
def gain_by_records(results: pa.Table, users: pa.Table, folder: Path) -> list[Path]:
    """Draw each user's gain of own over training at home alone against their training records, by method and level.

    Where a point of the sweep has no such baseline the gain is over the shared model.

    Args:
        results: results.parquet of a sweep.
        users: its users.parquet.
        folder: gets `gain_by_records`, for each panel where there are several.

    Returns:
        The written paths.

    Raises:
        DataError: as `points.panels` does.
    """
    found = panels(results, users)
    written = []
    for panel in found:
        against = "local" if all("local" in point.kinds for point in panel.points) else "global"
        most = max(point.kinds["own"].people.size for point in panel.points)
        dots = (
            "Dots are users" if most <= MOST_MARKS else f"Dots are {MOST_MARKS:,} of {most:,} users, chosen at random"
        )
        fig = facets(
            panel.points,
            partial(_draw, panel=panel, users=users, against=against),
            f"gain in {panel.metric}",
        )
        label = "mean of a group of users, 95%"
        handles = [Line2D([], [], color=BLACK, marker="o", markersize=4, linewidth=1.3, label=label)]
        caption = (
            f"Below the axes: a user's training records. {dots}, means over their seeds. Up to {GROUPS} groups of "
            "about equal size; their intervals are over users alone, not over seeds."
        )
        explain(fig, handles, caption)
        title(fig, heading(panel, f"gain of the personal model over {NAMES[against]}, by training records"))
        written += save(fig, folder, file_name("gain_by_records", panel, found))
    return written


def groups(records: Floats, gains: Crossed) -> Iterator[tuple[float, int, Interval]]:
    """Cut people into groups of about equal size by their records, (people,); equally many are never set apart.

    Yields a group's median number of records, how many people it has, and the mean of their gains, averaged over
    seeds first, with its interval over people: a few seeds cannot tell how much a small group's mean hangs on them.
    """
    number = max(1, min(GROUPS, records.size // FEWEST))
    edges = np.unique(np.quantile(records, np.linspace(0, 1, number + 1)[1:-1], method="lower"))
    which = np.searchsorted(edges, records, side="left")
    for one in np.unique(which):
        mine = which == one
        mean = mean_interval(gains.by_person[mine], np.random.default_rng(0))
        yield float(np.median(records[mine])), int(mine.sum()), mean


def _draw(ax: Axes, point: Point, panel: Panel, users: pa.Table, against: str) -> str:
    gains = gain(point.kinds["own"], point.kinds[against], higher_is_better=panel.higher_is_better)
    own = measured(users, point.runs, "own", panel.metric)
    assert own is not None  # it is among the point's kinds
    records = np.nanmean(own.train_records, axis=0)
    chosen = sample(records.size, np.random.default_rng(0))
    ax.scatter(records[chosen], gains.by_person[chosen], s=6, color=SKY, alpha=0.6, linewidth=0, rasterized=True)
    x, sizes, means = zip(*groups(records, gains), strict=True)
    ax.plot(x, [one.mean for one in means], color=BLACK, marker="o", markersize=4, linewidth=1.3, zorder=3)
    ax.vlines(x, [one.low for one in means], [one.high for one in means], color=BLACK, linewidth=1.5, zorder=3)
    ax.axhline(0, color=BLACK, linewidth=0.8, zorder=1)
    ax.set_xscale("log")
    fewest, most = float(records.min()), float(records.max())
    ax.xaxis.set_major_locator(FixedLocator([float(one) for one in TICKS if fewest / 1.6 <= one <= 1.6 * most]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    span = f"{min(sizes):,} to {max(sizes):,}" if min(sizes) < max(sizes) else f"{sizes[0]:,}"
    return f"n = {records.size:,}; {len(sizes)} groups of {span} users"
