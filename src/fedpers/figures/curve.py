"""Learning curve: the metric over rounds, with what it has to be compared with and the epsilon it has cost."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedpers.errors import DataError
from fedpers.evaluation.statistics import Floats
from fedpers.figures.style import BLACK, kind_look, legend, new_figure, reference, save, style, title


@style()
def learning_curve(
    rounds: pa.Table,
    references: Mapping[str, float],
    claim_label: str,
    directory: Path,
    metric: str = "accuracy",
) -> list[Path]:
    """Draw the columns `<kind>_<metric>` of `rounds` over its column `round` and return the written paths.

    Rounds without an evaluation are null and are skipped. `references` are horizontal lines (model kind to mean
    metric). Where the column `epsilon` (epsilon spent so far, cumulative) has finite values, a second panel shows them;
    its delta and unit are part of `claim_label`. Returns [] if nothing was evaluated. Raises DataError if there is no
    column `round`.
    """
    if "round" not in rounds.column_names:
        raise DataError("The rounds table has no column 'round'.")
    suffix = f"_{metric}"
    curves = {
        name.removesuffix(suffix): points
        for name in rounds.column_names
        if name.endswith(suffix) and (points := _points(rounds, name))[0].size
    }
    if not curves:
        return []
    spent = _points(rounds, "epsilon") if "epsilon" in rounds.column_names else None
    private = spent is not None and spent[0].size > 0
    fig = new_figure(7.2, 5.0 if private else 4.0)
    if private and spent is not None:
        ax, lower = fig.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _draw_epsilon(lower, *spent)
        bottom = lower
    else:
        ax = bottom = fig.add_subplot()
    for kind, (x, y) in curves.items():
        look = kind_look(kind)
        ax.plot(x, y, color=look.color, linestyle="-", marker=look.marker, zorder=3, label=f"{look.name}, by round")
    for kind, value in references.items():
        if np.isfinite(value):
            reference(ax, kind, value, note=f": {value:.3f}")
    ax.margins(y=0.08)
    ax.set_ylabel(f"mean {metric} over users")
    title(fig, f"Learning curve\n{claim_label}")
    bottom.set_xlabel("round")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(ax)
    return save(fig, directory, "learning_curve")


def _draw_epsilon(ax: Axes, x: Floats, y: Floats) -> None:
    ax.plot(x, y, color=BLACK, linewidth=1.3, drawstyle="steps-post")
    ax.plot(x[-1:], y[-1:], color=BLACK, marker="o", linestyle="none")
    ax.annotate(
        f"ε = {y[-1]:.3g}",
        (float(x[-1]), float(y[-1])),
        xytext=(1.02, float(y[-1])),  # right of the panel, where no line can cross it
        textcoords=ax.get_yaxis_transform(),
        va="center",
        annotation_clip=False,
    )
    ax.set_ylim(0, float(y.max()) * 1.15 or 1.0)
    ax.set_ylabel("ε spent")


def _points(rounds: pa.Table, name: str) -> tuple[Floats, Floats]:
    """Rounds and values where the column is neither null nor infinite."""
    x = rounds["round"].to_numpy().astype(np.float64)
    y = rounds[name].to_numpy().astype(np.float64)
    kept = np.isfinite(y)
    return x[kept], y[kept]
