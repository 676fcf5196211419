"""Privacy-utility frontier: what each method keeps at each epsilon, beside what costs no privacy at all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from fedpers.errors import DataError, PrivacyRefusal
from fedpers.figures.style import Look, legend, method_look, new_figure, reference, save, style, wrap
from fedpers.figures.style import title as draw_title
from fedpers.privacy.claim import rounded_up

MeanRange = tuple[float, float, float]


@dataclass(frozen=True)
class FrontierCell:
    """One method at one privacy level, from the claim and the users tables of its runs.

    `epsilon` may be infinite (no privacy); `delta` and `unit` ("record", "user") belong to it. `label` is the wording
    of the claim. With `forecast` the epsilon is that of a larger federation, worded so and drawn dashed. `own`,
    `global_` and `local` are (mean, low, high) of the metric over users; `zero_shot` is a mean.
    """

    method: str
    epsilon: float
    delta: float
    unit: str
    label: str
    own: MeanRange
    global_: MeanRange
    local: MeanRange
    zero_shot: float
    forecast: str | None = None


@style()
def frontier(cells: Sequence[FrontierCell], directory: Path, title: str, metric: str = "accuracy") -> list[Path]:
    """Draw utility over epsilon, one line per method, and return the written paths.

    Epsilon is on a log scale with infinity as a last position of its own. Thick lines with 95% bars are the personal
    models, thin dashed ones the shared models. The local-only band spans the intervals of all cells. Returns [] for no
    cells. Raises PrivacyRefusal if cells protect different units, as their epsilons cannot share an axis, and DataError
    for an epsilon that is not positive.
    """
    if not cells:
        return []
    if any(not cell.epsilon > 0 for cell in cells):
        raise DataError("Epsilon must be positive on a frontier; local-only training has its own band in every cell.")
    private = [cell for cell in cells if math.isfinite(cell.epsilon)]
    units = sorted({cell.unit for cell in private})
    if len(units) > 1:
        raise PrivacyRefusal(
            f"A frontier cannot put epsilons of different units ({', '.join(units)}) on one axis: draw one per unit."
        )
    positions = _positions(sorted({cell.epsilon for cell in cells}))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    fig = new_figure(7.4, 4.6)
    ax = fig.add_subplot()
    _draw_free(ax, cells)
    ordered = list(positions.values())
    spacing = min(np.diff(ordered), default=0.5)
    dodge = min(0.14, 0.6 / len(methods)) * float(spacing)  # side by side, so that no bar hides another
    for index, method in enumerate(methods):
        shift = (index - (len(methods) - 1) / 2) * dodge
        mine = sorted((cell for cell in cells if cell.method == method), key=lambda cell: cell.epsilon)
        _draw_method(ax, mine, positions, shift, dodge, method_look(method, index))
    if private and math.inf in positions:
        ax.axvline((ordered[-2] + ordered[-1]) / 2, color="#9A9A9A", linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)
    ax.set_xticks(ordered, [tick(epsilon) for epsilon in positions])
    ax.set_xlim(ordered[0] - 0.5 * spacing, ordered[-1] + 0.5 * spacing)
    ax.grid(visible=False, axis="x")
    ax.margins(y=0.08)
    ax.set_ylabel(f"mean {metric} over users")
    ax.set_xlabel(_axis_label(private))
    draw_title(fig, title)
    legend(ax)
    return save(fig, directory, "frontier")


def _positions(epsilons: Sequence[float]) -> dict[float, float]:
    """Place on the axis of each epsilon, ascending: log10, and infinity one step behind the last."""
    finite = {epsilon: math.log10(epsilon) for epsilon in epsilons if math.isfinite(epsilon)}
    places = list(finite.values())
    step = float(np.median(np.diff(places))) if len(places) > 1 else 0.5
    if len(finite) == len(epsilons):
        return finite
    return finite | {math.inf: (places[-1] if places else 0.0) + step}


def _draw_free(ax: Axes, cells: Sequence[FrontierCell]) -> None:
    """Draw what costs no privacy: training at home, and no training."""
    means, lows, highs = zip(*(cell.local for cell in cells), strict=True)
    reference(ax, "local", float(np.mean(means)), (min(lows), max(highs)), ", 95%\n(free: nothing leaves)")
    reference(ax, "zero_shot", float(np.mean([cell.zero_shot for cell in cells])), note="")


def _draw_method(
    ax: Axes, cells: Sequence[FrontierCell], positions: dict[float, float], shift: float, dodge: float, look: Look
) -> None:
    x = np.array([positions[cell.epsilon] for cell in cells]) + shift
    lines = [([cell.own for cell in cells], 0.0, True), ([cell.global_ for cell in cells], 0.3 * dodge, False)]
    one_for_all = lines[0][0] == lines[1][0]  # a method without personal state has one line, not two
    for values, offset, personal in lines[:1] if one_for_all else lines:
        mean, low, high = np.array(values, dtype=np.float64).T
        ax.errorbar(
            x + offset,
            mean,
            # A bootstrap interval may miss its mean by a hair; matplotlib takes no negative lengths.
            yerr=np.maximum([mean - low, high - mean], 0.0),
            color=look.color,
            marker=look.marker,
            # dashed for what is shared, and for every forecast
            linestyle=look.line if personal and not any(cell.forecast for cell in cells) else (0, (4, 3)),
            linewidth=1.9 if personal else 0.9,
            elinewidth=1.3 if personal else 0.7,
            markersize=6 if personal else 4.5,
            markerfacecolor=look.color if personal else "white",
            capsize=3 if personal else 2,
            zorder=4 if personal else 3,
            label=f"{look.name}, {'personal' if personal and not one_for_all else 'shared'}",
        )


def _axis_label(private: Sequence[FrontierCell]) -> str:
    if not private:
        return "ε"
    deltas = ", ".join(f"{delta:g}" for delta in sorted({cell.delta for cell in private}))
    label = f"ε per {private[0].unit}, δ = {deltas} (log scale; smaller is more private)"
    forecasts = sorted({cell.forecast for cell in private if cell.forecast})
    if forecasts:
        label += f"\n{', '.join(forecasts)}: no guarantee for the users of these runs"
    wordings = {cell.label for cell in private}
    # Wordings that carry each cell's own epsilon would repeat the axis; a common one adds the adversary.
    return f"{label}\n{wrap(wordings.pop())}" if len(wordings) == 1 else label


def tick(epsilon: float) -> str:
    """Name an epsilon on the axis, rounded up."""
    return rounded_up(epsilon).rstrip("0").rstrip(".") if math.isfinite(epsilon) else "∞\n(no privacy)"
