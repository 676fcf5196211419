"""What the figures of a sweep have in common: axes for each point, names of levels, values by seed and person."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedpers.evaluation.crossed import crossed
from fedpers.evaluation.statistics import Floats
from fedpers.figures.frontier import tick
from fedpers.figures.style import new_figure, wrap
from fedpers.sweep.points import Panel, Point
from fedpers.sweep.settings import seeds

MOST_MARKS = 1000  # above this many users a random sample of them is drawn


@dataclass(frozen=True)
class Measured:
    """One model kind of a point; arrays are (seeds, people), NaN where a person was not measured under a seed."""

    values: Floats
    test_records: Floats
    train_records: Floats


def measured(users: pa.Table, runs: Sequence[str], kind: str, metric: str) -> Measured | None:
    """Return what users.parquet says about a kind under some runs that differ in their seed; None if it is not there.

    Raises:
        DataError: as `crossed` does.
    """
    rows = users.filter(pc.and_(pc.is_in(users["hash"], pa.array(runs, pa.string())), pc.equal(users["kind"], kind)))
    if not rows.num_rows:
        return None
    who = rows["seed"].to_numpy(), rows["person"].to_numpy()
    return Measured(*(crossed(*who, rows[one].to_numpy()).values for one in (metric, "test_records", "train_records")))


def baselines(panel: Panel) -> list[str]:
    """Hashes of the local-only runs that belong to a panel."""
    runs = (run for point in panel.points for run in point.setting.runs)
    return list(dict.fromkeys(run["baseline"] for run in runs if run["baseline"] is not None))


def levels(points: Sequence[Point]) -> list[str]:
    """Names of the levels of some points, the most private first; epsilons that round up to the same are one."""
    ordered = sorted(points, key=lambda point: (point.setting.level.place[0], point.epsilon))
    return list(dict.fromkeys(map(level, ordered)))


def level(point: Point) -> str:
    """Name of a level."""
    return point.level or f"ε = {tick(point.epsilon)}"


def promise(panel: Panel) -> str:
    """What the epsilons of a panel are of."""
    return "no privacy" if panel.delta is None else f"ε per {panel.unit}, δ = {panel.delta:g}, {panel.trust}"


def heading(panel: Panel, what: str) -> str:
    """Title of a figure: what it shows, of whom, under which promise."""
    direction = "" if panel.higher_is_better else f"; a lower {panel.metric} is better"
    people = panel.points[0].kinds["own"].people.size
    counted = f"{people:,} users, {seeds([point.setting for point in panel.points])}"
    return f"{panel.name}: {what}\n({promise(panel)}; {counted}{direction})"


def facets(points: Sequence[Point], draw: Callable[[Axes, Point], str], y: str) -> Figure:
    """Draw each point into axes of its own, a row per line and a column per level.

    `draw` returns what is written above its axes, below the point's name.
    """
    shown = levels(points)
    lines = list(dict.fromkeys(point.line for point in points))
    fig = new_figure(1.0 + 2.9 * max(len(shown), 2), 1.6 + 2.2 * len(lines))
    axes = fig.subplots(len(lines), len(shown), sharex=True, sharey=True, squeeze=False)
    drawn = np.zeros(axes.shape, dtype=bool)
    for point in points:
        place = lines.index(point.line), shown.index(level(point))
        drawn[place] = True
        name = wrap(f"{point.line}: {level(point)}", 46)
        axes[place].set_title(f"{name}\n{draw(axes[place], point)}", fontsize=7, loc="left", linespacing=1.3)
    for (row, column), ax in np.ndenumerate(axes):  # a method that was not run at a level leaves a hole
        ax.set_visible(bool(drawn[row, column]))
        ax.tick_params(labelbottom=not drawn[row + 1 :, column].any(), labelleft=not drawn[row, :column].any())
    fig.supylabel(y, fontsize=9)
    return fig


def explain(fig: Figure, handles: Sequence[Artist], caption: str) -> None:
    """Put a legend below all axes, with a caption above it: a label of the figure would lie in the legend's place."""
    width = int(15 * fig.get_figwidth())
    fig.legend(
        handles=list(handles), loc="outside lower left", ncols=3, title=wrap(caption, width), title_fontsize=8,
        alignment="left",
    )  # fmt: skip


def sample(users: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Places of the users that are drawn: all, or `MOST_MARKS` of them at random."""
    if users <= MOST_MARKS:
        return np.arange(users)
    return np.sort(rng.choice(users, MOST_MARKS, replace=False))


def file_name(name: str, panel: Panel, all_panels: Sequence[Panel]) -> str:
    """Name of a panel's figure: with the panel's own where there are several, and its promise where that is needed."""
    if len(all_panels) == 1:
        return name
    alike = sum(one.name == panel.name for one in all_panels) > 1
    own = f"{panel.name} {panel.trust} {panel.delta}" if alike else panel.name
    return f"{name}_{re.sub(r'[^A-Za-z0-9]+', '-', own)}"
