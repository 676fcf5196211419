"""Claimed against found: each audit's lower bound beside the claim, with the most that the audit could have shown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fedpers.audit.bounds import Finding
from fedpers.figures.style import BLUE, GREY, ORANGE, VERMILLION, new_figure, save, style
from fedpers.figures.style import title as draw_title

_COLORS = {"consistent": BLUE, "powerless": GREY, "violation": VERMILLION}
_RATES = {  # what of gradient inversion is drawn
    "span_recall": "token-span test",
    "nearest_recall": "nearest token to the span",
    "optimization_recall": "gradient matching",
    "chance": "guessing the commonest token",
}


@style()
def claimed_and_found(
    findings: Sequence[Finding], inversion: Mapping[str, Mapping[str, float]], directory: Path, title: str
) -> list[Path]:
    """Draw every finding that is an epsilon, and below it how much of a text inversion gives away; returns the paths.

    A dot is a lower bound (an open one an estimate, which bounds nothing), a bar its ceiling, a diamond the claim.
    Returns [] where there is neither.
    """
    rows = [f for f in findings if f.kind in {"bound", "estimate", "attack"} and math.isfinite(f.empirical)]
    if not rows and not inversion:
        return []
    parts = [len(rows)] * bool(rows) + [len(_RATES)] * bool(inversion)
    fig = new_figure(8.2, 1.6 + 0.36 * sum(parts))
    axes = fig.subplots(len(parts), 1, height_ratios=parts, squeeze=False)[:, 0]
    if rows:
        _draw_epsilons(axes[0], rows)
    if inversion:
        _draw_inversion(axes[-1], inversion)
    draw_title(fig, title)
    return save(fig, directory, "audit")


def claimed_and_found_of_runs(audits: Mapping[str, Sequence[Finding]], directory: Path, title: str) -> list[Path]:
    """Draw the bounds of several runs' audits, by the run's name, as `claimed_and_found` does; returns the paths.

    Estimates are left out: they bound nothing, and of many runs the largest is the luckiest.
    """
    bounds = [
        replace(one, name=f"{run} (per {one.unit})\n{one.name}")
        for run, found in audits.items()
        for one in found
        if one.kind == "bound"
    ]
    return claimed_and_found(bounds, {}, directory, f"{title}\n{len(bounds)} bounds, of which each holds with 95%")


def _draw_epsilons(ax: Axes, rows: Sequence[Finding]) -> None:
    # Ceilings may lie far beyond what matters; a bar that reaches the edge goes on behind it.
    edge = 1.4 * max([3.0, *(v for f in rows for v in (f.claimed, f.empirical) if math.isfinite(v))])
    for place, one in enumerate(rows):
        color = _COLORS[one.verdict] if math.isfinite(one.claimed) else BLUE
        if math.isfinite(one.ceiling):
            ax.barh(place, min(one.ceiling, edge), height=0.5, color=color, alpha=0.16, zorder=1)
        face = "white" if one.kind == "estimate" else color
        ax.plot(one.empirical, place, marker="o", color=color, markerfacecolor=face, zorder=5, clip_on=False)
        if math.isfinite(one.claimed):
            ax.plot(one.claimed, place, marker="D", color="black", markersize=7, zorder=4)
        else:
            ax.annotate("none claimed", (edge, place), ha="right", va="center", fontsize=8, color=GREY)
    ax.set_yticks(range(len(rows)), [f"{one.name}: {one.what}\n({one.told})" for one in rows], fontsize=7.5)
    ax.invert_yaxis()
    ax.set_xlim(0, edge)
    ax.grid(visible=False, axis="y")
    deltas = sorted({one.delta for one in rows if one.delta is not None})
    units = sorted({one.unit for one in rows})
    ax.set_xlabel(f"ε per {' or '.join(units)}, δ = {', '.join(f'{delta:g}' for delta in deltas)}")
    handles = [
        Line2D([], [], marker="D", linestyle="", color="black", markersize=7, label="claimed"),
        Line2D([], [], marker="o", linestyle="", color=BLUE, label="found: lower bound, 95%"),
        Line2D([], [], marker="o", linestyle="", color=BLUE, markerfacecolor="white", label="found: estimate"),
        Line2D([], [], linewidth=7, color=BLUE, alpha=0.16, label="most it could show"),
    ]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0)


def _draw_inversion(ax: Axes, inversion: Mapping[str, Mapping[str, float]]) -> None:
    looks = {"without DP": (VERMILLION, "s"), "with DP": (ORANGE, "o")}
    for place, key in enumerate(_RATES):
        for name, (color, marker) in looks.items():
            if name in inversion:
                label = name if not place else None
                ax.plot(inversion[name][key], place, marker=marker, linestyle="", color=color, label=label)
    ax.set_yticks(range(len(_RATES)), list(_RATES.values()), fontsize=7.5)
    ax.invert_yaxis()
    ax.set_xlim(-0.03, 1.03)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("share of a record's tokens that its LoRA update gives away")
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0)
