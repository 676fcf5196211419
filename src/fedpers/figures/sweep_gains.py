"""Sorted gains of all runs of a sweep: who is helped, who is harmed, and what chance alone would draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fedpers.evaluation.crossed import gain, intervals
from fedpers.evaluation.per_user import NAMES, Pair, pair
from fedpers.evaluation.statistics import (
    MINIMUM_RECORDS,
    Floats,
    compare,
    minimum_detectable_effect,
    without_dust,
)
from fedpers.figures.gain import chance_band
from fedpers.figures.style import BLUE, GREY, VERMILLION, save, style, title
from fedpers.figures.sweep_facets import MOST_MARKS, explain, facets, file_name, heading, sample
from fedpers.sweep.points import Panel, Point, panels

_CAPTION = (
    f"Users with at least {MINIMUM_RECORDS} test records, sorted by gain. Means, their 95% intervals (users and seeds "
    "crossed) and the smallest mean gain that would be seen with 80% power (two-sided, 5%) are of all users. Colours, "
    "chance and band are of the first seed; thin curves are of the others."
)
_BAND: dict[str, Any] = {"facecolor": "#CFCFCF", "edgecolor": "#A0A0A0", "linewidth": 0.6}


@style()
def sorted_gains(results: pa.Table, users: pa.Table, folder: Path) -> list[Path]:
    """Draw the users of each method and level sorted by gain, over the shared model and over training at home alone.

    Grey is what the sorted curve would look like if own and other were exchangeable: by coin flips for each record that
    is right under one model only where these are counted (`statistics.null_band`), else for the sign of each user's
    gain (`statistics.sign_flip_band`). Users with at least 10 test records are drawn, of very many a random sample.
    Band, colours and the counts of chance are of the first seed, thin curves of the others; numbers are of all.

    Args:
        results: results.parquet of a sweep.
        users: its users.parquet.
        folder: gets `gains_over_global` and `gains_over_local`, for each panel where there are several.

    Returns:
        The written paths; methods that keep nothing personal are not drawn over the shared model.

    Raises:
        DataError: as `points.panels` and `per_user.pair` do.
    """
    found = panels(results, users)
    written = []
    for panel in found:
        for against in ("global", "local"):
            pairs = {point: both for point in panel.points if (both := _pairs(panel, point, users, against))}
            if not pairs:
                continue
            fig = facets(
                list(pairs),
                partial(_draw, panel=panel, against=against, pairs=pairs),
                f"gain in {panel.metric}",
            )
            explain(fig, _handles(), _CAPTION)
            title(fig, heading(panel, f"gain of the personal model over {NAMES[against]}, user by user"))
            written += save(fig, folder, file_name(f"gains_over_{against}", panel, found))
    return written


def _pairs(panel: Panel, point: Point, users: pa.Table, against: str) -> list[Pair]:
    """Own and other of the users with enough test records, for each seed; nothing where there is nothing to compare."""
    if against not in point.kinds:
        return []
    found = []
    for run in point.runs:
        rows = users.filter(pc.equal(users["hash"], run))
        both = pair(rows, against, panel.metric, higher_is_better=panel.higher_is_better)
        if both is None or (against == "global" and np.array_equal(both.own, both.other)):
            return []
        eligible = both.test_records[0] >= MINIMUM_RECORDS
        if not eligible.any():
            return []
        grids = (both.own, both.other, both.test_records, both.only_own, both.only_other)
        found.append(Pair(both.users[eligible], *(grid if grid is None else grid[:, eligible] for grid in grids)))  # type: ignore[arg-type]
    return found


def _draw(ax: Axes, point: Point, panel: Panel, against: str, pairs: Mapping[Point, Sequence[Pair]]) -> str:
    rng, found = np.random.default_rng(0), pairs[point]
    gains = [_gains(panel, both) for both in found]
    chosen = sample(gains[0].size, rng)
    ranks = _ranks(chosen.size)
    low, high = (np.pad(edge, 1, "edge") for edge in chance_band(found[0], chosen, gains[0][chosen], rng))
    ax.fill_between(np.concatenate([[0.0], ranks, [100.0]]), low, high, zorder=1, **_BAND)
    for others in gains[1:]:
        some = np.sort(others[sample(others.size, rng)])
        ax.plot(_ranks(some.size), some, color=GREY, linewidth=0.6, zorder=2)
    first, marker = np.sort(gains[0][chosen]), "." if chosen.size < 60 else ""
    for part, color in ((first > 0, BLUE), (first < 0, VERMILLION), (first == 0, "black")):
        ax.plot(ranks[part], first[part], color=color, marker=marker, markersize=4, linewidth=2, zorder=3)
    ax.axhline(0, color="black", linewidth=0.8, zorder=2)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter("{x:.0f}%")
    return f"{_counts(panel, found[0], gains)}\n{_mean(panel, point, against)}"


def _gains(panel: Panel, both: Pair) -> Floats:
    difference = both.own[0] - both.other[0]
    return without_dust(difference if panel.higher_is_better else -difference)


def _ranks(number: int) -> Floats:
    return (np.arange(number) + 0.5) / number * 100


def _counts(panel: Panel, first: Pair, gains: Sequence[Floats]) -> str:
    """Win, tie and loss: the mean over seeds, and what coin flips alone would do under the first."""
    won, tied, lost = np.mean([[(some > 0).sum(), (some == 0).sum(), (some < 0).sum()] for some in gains], axis=0)
    found = compare(
        first.own, first.other, first.test_records, first.only_own, first.only_other, np.random.default_rng(0),
        higher_is_better=panel.higher_is_better,
    )  # fmt: skip
    ranges = [
        "" if null is None else f" (chance {null.low:.4g}–{null.high:.4g})"
        for null in (found.null_helped, found.null_harmed)
    ]
    shown = f"; {MOST_MARKS:,} drawn" if gains[0].size > MOST_MARKS else ""
    over = "of" if len(gains) == 1 else "mean over seeds, of"
    counts = f"{won:.4g} helped{ranges[0]}, {tied:.4g} tied,\n{lost:.4g} harmed{ranges[1]}"
    return f"{counts}; {over} {won + tied + lost:,.5g}{shown}"


def _mean(panel: Panel, point: Point, against: str) -> str:
    gains = gain(point.kinds["own"], point.kinds[against], higher_is_better=panel.higher_is_better)
    [(mean, low, high)] = intervals([gains])
    effect = minimum_detectable_effect(gains.by_person)
    least = "unknown" if effect is None else f"{effect:.3f}"
    return f"mean {mean:+.3f} [{low:+.3f}, {high:+.3f}]; detectable {least}"


def _handles() -> list[Any]:
    return [
        Line2D([], [], color=BLUE, linewidth=2, label="helped (above 0)"),
        Line2D([], [], color=VERMILLION, linewidth=2, label="harmed (below 0)"),
        Patch(**_BAND, label="by chance, 95% at each rank"),
    ]
