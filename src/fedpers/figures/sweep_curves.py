"""Learning curves of all methods of a sweep, as far as its runs measured while they trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedpers.evaluation.statistics import Floats
from fedpers.figures.style import KIND_LOOKS, Look, method_look, new_figure, reference, save, style, title
from fedpers.figures.sweep_facets import file_name, heading, level, levels
from fedpers.sweep.points import Panel, Point, panels


class Curve(NamedTuple):
    """A run's metric by round, of its personal models (own) or of the shared one (global)."""

    rounds: Floats
    values: Floats
    kind: str


@style()
def learning_curves(results: pa.Table, users: pa.Table, rounds: Mapping[str, pa.Table], folder: Path) -> list[Path]:
    """Draw the metric over rounds, a panel per level and a line per method, with the range over seeds.

    A curve is of the personal models where they were measured, else of the shared one. Training at home alone and no
    training at all are lines, since they have no rounds.

    Args:
        results: results.parquet of a sweep.
        users: its users.parquet.
        rounds: rounds.parquet of its runs, by hash; a point that lacks one is left out.
        folder: gets `learning_curves`, for each panel where there are several.

    Returns:
        The written paths; nothing where no run was measured before its end.

    Raises:
        DataError: as `points.panels` does.
    """
    found = panels(results, users)
    written = []
    for panel in found:
        curves = {point: some for point in panel.points if (some := _curves(panel, point, rounds))}
        columns = levels(list(curves))
        if not curves:
            continue
        fig = new_figure(1.6 + 2.9 * max(len(columns), 2), 4.4)
        axes = fig.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for point, some in curves.items():
            look = method_look(point.line, panel.lines.index(point.line))
            _draw(axes[columns.index(level(point))], some, look)
        for ax, name in zip(axes, columns, strict=True):
            for kind, one in (("local", panel.local), ("zero_shot", panel.points[0].kinds.get("zero_shot"))):
                if one is not None:
                    reference(ax, kind, one.mean, note="")
            ax.set_title(name, fontsize=9, loc="left")
            ax.set_xlabel("round")
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes[0].set_ylabel(f"mean {panel.metric} over users")
        handles = {text: handle for ax in axes for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
        fig.legend(handles=list(handles.values()), loc="outside lower left", ncols=3)
        many = ", bands from the least to the most over seeds" if any(len(some) > 1 for some in curves.values()) else ""
        title(fig, heading(panel, f"learning curves, exact metrics{many}"))
        written += save(fig, folder, file_name("learning_curves", panel, found))
    return written


def _curves(panel: Panel, point: Point, rounds: Mapping[str, pa.Table]) -> list[Curve]:
    """A curve for each run; nothing if one of them was not measured before its end."""
    found = []
    for run in point.runs:
        kinds = ("own", "global") if run in rounds else ()
        curves = [_curve(rounds[run], kind, panel.metric) for kind in kinds]
        found += [one for one in curves if one.rounds.size > 1][:1]
    return found if len(found) == len(point.runs) else []


def _curve(table: pa.Table, kind: str, metric: str) -> Curve:
    values = table[f"{kind}_{metric}"].to_numpy().astype(np.float64)
    measured = np.isfinite(values)
    return Curve(table["round"].to_numpy()[measured].astype(np.float64), values[measured], kind)


def _draw(ax: Axes, curves: Sequence[Curve], look: Look) -> None:
    """Draw the rounds that all seeds have: a run that stopped early would else move the mean."""
    shown = sorted(set.intersection(*(set(curve.rounds.tolist()) for curve in curves)))
    values = np.array([curve.values[np.isin(curve.rounds, shown)] for curve in curves])
    label = f"{look.name}, {KIND_LOOKS[curves[0].kind].name}"
    ax.plot(
        shown, values.mean(axis=0), color=look.color, linestyle=look.line, marker=look.marker, markersize=4,
        markevery=max(1, len(shown) // 8), zorder=3, label=label,
    )  # fmt: skip
    ax.fill_between(shown, values.min(axis=0), values.max(axis=0), color=look.color, alpha=0.15, linewidth=0)
