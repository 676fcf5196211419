"""Per-user gain: who is helped, who is harmed, and what coin flips alone would look like."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fedpers.evaluation.per_user import NAMES, Pair, pair
from fedpers.evaluation.statistics import (
    MINIMUM_RECORDS,
    Comparison,
    Floats,
    NullRange,
    compare,
    null_band,
    sign_flip_band,
    without_dust,
)
from fedpers.figures.style import BLUE, GREY, VERMILLION, legend, new_figure, save, style, title, wrap


@style()
def per_user_gain(
    table: pa.Table,
    claim_label: str,
    directory: Path,
    against: str = "global",
    metric: str = "accuracy",
    *,
    higher_is_better: bool = True,
    seed: int = 0,
) -> list[Path]:
    """Draw the users sorted by their gain of own over `against` and return the written paths.

    Only users with at least 10 test records are drawn; the band is the permutation null of `statistics.compare`, and
    for a metric that is not 0/1 that of `statistics.sign_flip_band`. With several seeds each is one sorted curve;
    markers and band belong to the first. Returns [] and writes nothing if either kind is missing or no user has enough
    records. Raises DataError as `per_user.pair` does.
    """
    both = pair(table, against, metric, higher_is_better=higher_is_better)
    if both is None:
        return []
    eligible = np.flatnonzero((both.test_records >= MINIMUM_RECORDS).all(axis=0))
    if eligible.size == 0:
        return []
    rng = np.random.default_rng(seed)
    found = compare(
        both.own,
        both.other,
        both.test_records,
        both.only_own,
        both.only_other,
        rng,
        higher_is_better=higher_is_better,
    )
    difference = both.own - both.other if higher_is_better else both.other - both.own
    curves = np.sort(without_dust(difference[:, eligible]), axis=1)
    fig = new_figure(7.2, 4.6)
    ax = fig.add_subplot()
    _draw_band(ax, both, eligible, difference[0, eligible], rng)
    for curve in curves[1:]:
        ax.plot(np.arange(1, curve.size + 1), curve, color=GREY, linewidth=0.7, zorder=2)
    _draw_users(ax, curves[0], found)
    ax.axhline(0, color="black", linewidth=0.9, zorder=2)
    ax.set_xlim(0, curves.shape[1] + 1)
    title(fig, f"Gain of the personal model over {NAMES.get(against, against)}, user by user\n{claim_label}")
    ax.set_ylabel(f"gain in {metric}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("users, sorted by gain")
    fig.supxlabel(wrap(_caption(found, curves.shape[0]), 105), fontsize=8, color=GREY, x=0.01, ha="left")
    legend(ax, marker_scale=math.sqrt(26 / _marker_size(curves.shape[1])))
    return save(fig, directory, f"gain_over_{against}")


def chance_band(both: Pair, users: NDArray[np.intp], gains: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Band of sorted gains by chance, under the first seed: coin flips per record where they are counted, else signs.

    `users` are places in `both`, and `gains` theirs. Returns and raises as `statistics.null_band`.
    """
    if both.only_own is None or both.only_other is None:
        return sign_flip_band(gains, rng)
    return null_band(both.test_records[0, users], (both.only_own + both.only_other)[0, users], rng)


def _draw_band(ax: Axes, both: Pair, eligible: NDArray[np.intp], gains: Floats, rng: np.random.Generator) -> None:
    label = f"{'sign' if both.only_own is None else 'coin'} flips, 95%"
    low, high = chance_band(both, eligible, gains, rng)
    # Half a rank more on both sides: a single user is a band, not a line.
    ranks = np.concatenate([[0.5], np.arange(1, low.size + 1), [low.size + 0.5]])
    low, high = np.pad(low, 1, mode="edge"), np.pad(high, 1, mode="edge")
    ax.fill_between(ranks, low, high, facecolor="#D4D4D4", edgecolor="#A0A0A0", linewidth=0.6, zorder=1, label=label)


def _draw_users(ax: Axes, curve: Floats, found: Comparison) -> None:
    ranks = np.arange(1, curve.size + 1)
    groups = (
        ("helped", curve > 0, found.helped, found.null_helped, BLUE, "^"),
        ("tied", curve == 0, found.tied, None, GREY, "o"),
        ("harmed", curve < 0, found.harmed, found.null_harmed, VERMILLION, "v"),
    )
    for word, chosen, count, null, color, marker in groups:
        ax.scatter(
            ranks[chosen],
            curve[chosen],
            s=_marker_size(curve.size),
            marker=marker,
            color=color,
            zorder=3,
            label=f"{word}: {count:.4g}{_by_chance(null)}",
            rasterized=curve.size > 2000,  # a vector marker per user would make a huge file
        )


def _marker_size(users: int) -> float:
    return float(np.clip(2400 / users, 5, 26))


def _by_chance(null: NullRange | None) -> str:
    return f"\n(coin flips: {null.low:.4g} to {null.high:.4g})" if null else ""


def _caption(found: Comparison, seeds: int) -> str:
    low, high = found.ci95
    effect = found.minimum_detectable_effect
    parts = [
        f"n = {found.n_eligible} of {found.n_users} users, those with at least {found.minimum_records} test records",
        f"mean gain over all {found.n_users}: {found.mean_gain:+.3f} (95% interval {low:+.3f} to {high:+.3f})",
        f"minimum detectable effect {'unknown' if effect is None else f'{effect:.3f}'} (80% power, two-sided 5%)",
    ]
    if seeds > 1:
        parts.append(f"{seeds} seeds: markers and band show the first, counts are means over all")
    return "; ".join(parts) + "."
