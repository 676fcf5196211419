"""The frontier of a sweep: utility over the epsilon that is claimed, beside what costs no privacy at all."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes

from fedpers.evaluation.comparison import Versus
from fedpers.evaluation.crossed import against, gain, intervals
from fedpers.evaluation.statistics import Floats
from fedpers.figures.frontier import tick
from fedpers.figures.style import (
    BLACK,
    GREY,
    Look,
    legend,
    method_look,
    new_figure,
    reference,
    save,
    style,
    title,
    wrap,
)
from fedpers.sweep.points import LEVELS, Panel, Point, panels
from fedpers.sweep.settings import Level

LINES = 6  # in one panel, as many as have looks of their own
BANDS = 3  # with more lines, bands would only cover each other, and bars are enough
_RING: Any = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": BLACK, "linestyle": "", "zorder": 6}
_CAPTION = (
    "Thick: own models, mean over users and seeds with a 95% interval (bootstrap, users and seeds crossed), as wide as "
    "people differ; comparisons are paired. Thin dashes: the shared model. Filled marker: better than local-only "
    "under every seed, with p < 0.05 by a signed-rank test over users, corrected by Holm for all points of the panel; "
    "hollow: not shown to be. Black ring around a marker: no other point, nor local-only, is at once as private and as "
    "good, by means. Metrics are exact: no claim covers that, nor choosing by them."
)


@style()
def sweep_frontier(results: pa.Table, users: pa.Table, folder: Path) -> list[Path]:
    """Draw a panel for each variant and promise, and return the written paths; [] if only local-only runs are there.

    A panel with more than six lines is drawn in several, of which each has the comparisons and the frontier of all.

    Args:
        results: as in a sweep's results.parquet.
        users: as in its users.parquet.
        folder: gets `sweep_frontier`.

    Raises:
        DataError: as `points.panels` does.
    """
    found = panels(results, users)
    if not found:
        return []
    parts = [(panel, lines) for panel in found for lines in _parts(panel)]
    columns = min(2, len(parts))
    rows = -(-len(parts) // columns)
    strip = 0.06 * (1 + max(len(lines) for _, lines in parts))  # below each panel, a row of numbers for each line
    fig = new_figure(1.4 + 5.8 * columns, 1.3 + 4.6 * rows)
    axes = fig.subplots(2 * rows, columns, height_ratios=[1, strip] * rows, squeeze=False)
    pairs = [(axes[2 * row, column], axes[2 * row + 1, column]) for row in range(rows) for column in range(columns)]
    for (upper, lower), (panel, lines) in zip(pairs, parts, strict=False):
        _draw(upper, lower, panel, lines)
    for unused in pairs[len(parts) :]:
        for ax in unused:
            ax.remove()
    title(fig, "Utility against privacy")
    fig.supxlabel(wrap(_CAPTION, 95 * columns + 25), fontsize=7.5, color=GREY, x=0.01, ha="left")
    return save(fig, folder, "sweep_frontier")


def pareto(epsilons: Sequence[float], utilities: Sequence[float], *, higher_is_better: bool = True) -> list[bool]:
    """Tell for each point whether no other is at least as private and as good, and one of both more so.

    Args:
        epsilons: smaller is more private; infinity where nothing is promised, 0 where nothing leaves.
        utilities: in the unit of the metric.
        higher_is_better: the metric's direction.
    """
    sign = 1.0 if higher_is_better else -1.0
    points = [(epsilon, -sign * utility) for epsilon, utility in zip(epsilons, utilities, strict=True)]
    return [not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points) for x, y in points]


def _parts(panel: Panel) -> list[Sequence[str]]:
    return [panel.lines[start : start + LINES] for start in range(0, len(panel.lines), LINES)]


def _draw(ax: Axes, below: Axes, panel: Panel, lines: Sequence[str]) -> None:
    """Draw these lines of a panel, and below them how much noise there was."""
    places = _places([point.setting.level for point in panel.points])
    ordered = sorted(places.values())
    spacing = min(np.diff(ordered), default=0.5)
    dodge = min(0.14, 0.6 / len(lines)) * float(spacing)  # side by side, so that no bar hides another
    versus, ringed = _over_local(panel), _ringed(panel)
    _draw_free(ax, panel)
    for index, line in enumerate(lines):
        look = method_look(line, index)
        shift = (index - (len(lines) - 1) / 2) * dodge
        points = sorted(
            (point for point in panel.points if point.line == line),
            key=lambda point: places[point.setting.level],
        )
        x = np.array([places[point.setting.level] for point in points])
        better = [point in versus and versus[point].verdict == "better" for point in points]
        _draw_line(ax, x + shift, points, look, better, banded=len(lines) <= BANDS)
        for at, point in zip(x, points, strict=True):
            if point in ringed:
                ax.plot(at + shift, point.kinds["own"].mean, markersize=13, **_RING)
            if point.noise_to_update is not None:
                below.text(at, index, f"{point.noise_to_update:.2g}", ha="center", va="center", fontsize=7.5)
    _label(ax, below, panel, lines, places)
    ax.set_title(_heading(panel, versus), fontsize=8.5, loc="left")
    legend(ax)


def _places(levels: Iterable[Level]) -> dict[Level, float]:
    """Place on the axis: log10 of each epsilon, and what is no epsilon a step beside them, in order."""
    ordered = sorted(set(levels))
    found = {level: math.log10(level.place[2]) for level in ordered if level.place[0] == 0}
    step = float(np.median(np.diff(list(found.values())))) if len(found) > 1 else 0.5
    least, most = min(found.values(), default=0.0), max(found.values(), default=0.0)
    before = [level for level in ordered if level.place[0] < 0]
    after = [level for level in ordered if level.place[0] > 0]
    found |= {level: least - step * (len(before) - place) for place, level in enumerate(before)}
    return found | {level: most + step * place for place, level in enumerate(after, start=1)}


def _over_local(panel: Panel) -> dict[Point, Versus]:
    """Judge every point against training at home alone, on the same people under the same seeds."""
    gains = {
        point: gain(point.kinds["own"], point.kinds["local"], higher_is_better=panel.higher_is_better)
        for point in panel.points
        if "local" in point.kinds
    }
    judged = against({str(place): one for place, one in enumerate(gains.values())})
    return dict(zip(gains, judged.values(), strict=True))


def _ringed(panel: Panel) -> set[Point]:
    """Points on the frontier."""
    epsilons = [point.epsilon for point in panel.points]
    means = [point.kinds["own"].mean for point in panel.points]
    if panel.local is not None:
        epsilons, means = [*epsilons, 0.0], [*means, panel.local.mean]
    best = pareto(epsilons, means, higher_is_better=panel.higher_is_better)
    return {point for point, on in zip(panel.points, best, strict=False) if on}


def _draw_free(ax: Axes, panel: Panel) -> None:
    """Draw what costs no privacy: training at home, and no training."""
    if panel.local is not None:
        [(mean, low, high)] = intervals([panel.local])
        reference(ax, "local", mean, (low, high), "\n(free)")
    shown = [point.kinds["zero_shot"] for point in panel.points if "zero_shot" in point.kinds]
    if shown:
        reference(ax, "zero_shot", max(shown, key=lambda one: one.seeds.size).mean, note="")


def _draw_line(
    ax: Axes, x: Floats, points: Sequence[Point], look: Look, better: Sequence[bool], *, banded: bool
) -> None:
    found = intervals([point.kinds["own"] for point in points])
    mean, low, high = np.array(found).T
    if banded:
        ax.fill_between(x, low, high, color=look.color, alpha=0.1, linewidth=0, zorder=1)
    ax.vlines(x, low, high, color=look.color, linewidth=1.3, zorder=3)
    ax.plot(x, mean, color=look.color, linestyle=look.line, linewidth=1.9, zorder=4)
    ax.plot([], [], color=look.color, linestyle=look.line, marker=look.marker, label=wrap(look.name, 24))
    for filled in (True, False):
        chosen = np.array(better) == filled
        face = look.color if filled else "white"
        ax.plot(
            x[chosen], mean[chosen], linestyle="", marker=look.marker, color=look.color, markerfacecolor=face, zorder=5
        )
    shared = [point.kinds["global"].mean if "global" in point.kinds else math.nan for point in points]
    if not np.array_equal(shared, mean):  # a method without personal state has one line, not two
        ax.plot(x, shared, color=look.color, linestyle=(0, (4, 3)), linewidth=0.9, zorder=2)


def _label(ax: Axes, below: Axes, panel: Panel, lines: Sequence[str], places: Mapping[Level, float]) -> None:
    """Say what the axes are; the numbers below stand under their epsilons."""
    ordered = sorted(places.items(), key=lambda item: item[1])
    at = [place for _, place in ordered]
    words = [LEVELS[level.place[0]].replace(" ", "\n") or tick(level.place[2]) for level, _ in ordered]
    margin = 0.5 * float(min(np.diff(at), default=1.0))
    for one in (ax, below):
        one.set_xticks(at, words)
        one.set_xlim(at[0] - margin, at[-1] + margin)
        one.grid(visible=False, axis="x")
    between = [(a + b) / 2 for (x, a), (y, b) in pairwise(ordered) if (x.place[0] == 0) != (y.place[0] == 0)]
    for place in between:
        ax.axvline(place, color="#9A9A9A", linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)
    ax.margins(y=0.08)
    direction = "" if panel.higher_is_better else "\n(lower is better; axis turned over)"
    ax.set_ylabel(f"mean {panel.metric} over users{direction}")
    if not panel.higher_is_better:
        ax.invert_yaxis()
    if panel.delta is not None:
        promise = f"ε per {panel.unit}, δ = {panel.delta:g}, trust: {panel.trust} (log scale; smaller is more private)"
        ax.set_xlabel(promise)
    below.set_yticks(range(len(lines)), [textwrap.shorten(line, 24, placeholder=" …") for line in lines], fontsize=7)
    below.set_ylim(len(lines) - 0.5, -0.5)
    below.tick_params(left=False, bottom=False, labelbottom=False)
    below.spines[:].set_visible(False)
    below.grid(visible=False)
    below.set_xlabel("noise over update, largest of the shared groups of parameters", fontsize=7.5)


def _heading(panel: Panel, versus: Mapping[Point, Versus]) -> str:
    own = [point.kinds["own"] for point in panel.points]
    users = _span([one.people.size for one in own])
    seeds = _span([one.seeds.size for one in own])
    known = [one.detectable for one in versus.values() if one.detectable is not None]
    parts = [f"{users} users", "1 seed: intervals cover users alone" if seeds == "1" else f"{seeds} seeds"]
    if known:
        least, most = min(known), max(known)
        parts.append(f"gains over local-only of {least:.2g} to {most:.2g} would be detected (80% power)")
    elif not versus:
        parts.append("no local-only runs to compare with")
    return wrap(f"{panel.name}\n{'; '.join(parts)}", 72)


def _span(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
