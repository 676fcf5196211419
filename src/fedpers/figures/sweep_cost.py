"""Bytes and seconds against utility, for each method and level of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from fedpers.evaluation.crossed import intervals
from fedpers.evaluation.statistics import Interval
from fedpers.figures.style import KIND_LOOKS, Look, method_look, new_figure, reference, save, style, title
from fedpers.figures.sweep_facets import baselines, explain, file_name, heading, level, levels
from fedpers.sweep.points import Panel, panels

_TICKS = [step * 10.0**power for power in range(-3, 7) for step in (1, 2, 3, 5, 7)]
_CAPTION = (
    "Upright bars: 95%, users and seeds crossed; level bars: least to most over seeds. Seconds are wall time: what "
    "runs beside a run, or is cached from an earlier one, changes them."
)


@style()
def cost(results: pa.Table, users: pa.Table, folder: Path) -> list[Path]:
    """Draw the mean metric of own models over bytes and over seconds, a column per level, a mark per method.

    Bytes are those of all messages, counted; seconds are wall time as it was, whatever else the machine did. Training
    at home alone sends nothing: its mean is a line over the bytes.

    Args:
        results: results.parquet of a sweep.
        users: its users.parquet.
        folder: gets `cost`, for each panel where there are several.

    Returns:
        The written paths.

    Raises:
        DataError: as `points.panels` does.
    """
    found = panels(results, users)
    rows = {row["hash"]: row for row in results.to_pylist()}
    written = []
    for panel in found:
        columns = levels(panel.points)
        fig = new_figure(2.0 + 2.6 * max(len(columns), 2), 6.2)
        axes = fig.subplots(2, len(columns), sharex="row", sharey=True, squeeze=False)
        means = intervals([point.kinds["own"] for point in panel.points])
        for point, mean in zip(panel.points, means, strict=True):
            look = method_look(point.line, panel.lines.index(point.line))
            for ax, amounts in zip(axes[:, columns.index(level(point))], _amounts(rows, point.runs), strict=True):
                _mark(ax, amounts, mean, look)
        home = baselines(panel)
        if panel.local is not None and all(run in rows for run in home):
            [mean] = intervals([panel.local])
            for upper, lower in axes.T:
                reference(upper, "local", mean.mean, (mean.low, mean.high))
                _mark(lower, _amounts(rows, home)[1], mean, KIND_LOOKS["local"])
        _finish(axes, columns)
        fig.supylabel(f"mean {panel.metric} over users", fontsize=9)
        title(fig, heading(panel, "what utility costs"))
        explain(fig, _handles(panel), _CAPTION)
        written += save(fig, folder, file_name("cost", panel, found))
    return written


def _amounts(rows: dict[str, dict[str, Any]], runs: Sequence[str]) -> tuple[list[float], list[float]]:
    """Megabytes and seconds of each run."""
    mine = [rows[run] for run in runs]
    return [(one["bytes_up"] + one["bytes_down"]) / 1e6 for one in mine], [one["seconds"] for one in mine]


def _mark(ax: Axes, amounts: Sequence[float], utility: Interval, look: Look) -> None:
    x = float(np.mean(amounts))
    if x > 0:  # a method that sends nothing has no place on a logarithmic axis
        ax.plot([x, x], [utility.low, utility.high], color=look.color, linewidth=1.2, zorder=3)
        ax.plot([min(amounts), max(amounts)], [utility.mean] * 2, color=look.color, linewidth=0.8, zorder=3)
        ax.plot(x, utility.mean, color=look.color, marker=look.marker, linestyle="", zorder=4)


def _finish(axes: Any, columns: Sequence[str]) -> None:
    for row, label in zip(axes, ("MB sent, up and down, by all users in all rounds", "seconds of a run"), strict=True):
        for ax in row:
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(FixedLocator(_TICKS))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            ax.tick_params(axis="x", labelsize=8)
        row[0].set_xlabel(label, loc="left")
    for ax, name in zip(axes[0], columns, strict=True):
        ax.set_title(name, fontsize=9, loc="left")


def _handles(panel: Panel) -> list[Line2D]:
    looks = [method_look(line, number) for number, line in enumerate(panel.lines)]
    if panel.local is not None:
        looks.append(replace(KIND_LOOKS["local"], name="local-only, which sends nothing"))
    return [Line2D([], [], color=look.color, marker=look.marker, linestyle="", label=look.name) for look in looks]
