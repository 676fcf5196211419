"""All methods side by side: own accuracy with its interval, a panel for each privacy level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fedpers.evaluation.comparison import Verdict
from fedpers.figures.style import BLUE, GREY, KIND_LOOKS, ORANGE, VERMILLION, Look, new_figure, save, style, wrap
from fedpers.figures.style import title as draw_title

_VERDICTS: Mapping[Verdict | None, tuple[str, str]] = {  # colour, marker
    "better": (BLUE, "^"),
    "worse": (VERMILLION, "v"),
    "no difference found": (GREY, "o"),
    None: ("black", "D"),
}


@dataclass(frozen=True)
class Estimate:
    """A method's own accuracy: mean and 95% interval over people, and its verdict against fedavg (None: fedavg)."""

    mean: float
    low: float
    high: float
    verdict: Verdict | None


@dataclass(frozen=True)
class Panel:
    """One privacy level. `label` is the wording of the claim; `references` are lines, by the names fedavg, local and
    zero_shot; `refused` are methods that must not run at this level.
    """

    label: str
    rows: Mapping[str, Estimate]
    references: Mapping[str, float]
    refused: Sequence[str]


@style()
def forest(panels: Sequence[Panel], directory: Path, title: str, metric: str = "accuracy") -> list[Path]:
    """Draw a row for each method, the best of the first panel on top, and return the written paths.

    Returns [] if there is nothing to draw.
    """
    if not any(panel.rows for panel in panels):
        return []
    names = _ordered(panels)
    fig = new_figure(3.2 + 3.6 * len(panels), 2.2 + 0.24 * len(names))
    axes = fig.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        _draw(ax, panel, names, metric)
    axes[0].set_yticks(range(len(names)), names, fontsize=8.5)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    fig.legend(handles=_handles(axes), loc="outside lower left", ncols=3)
    draw_title(fig, title)
    return save(fig, directory, "methods")


def _ordered(panels: Sequence[Panel]) -> list[str]:
    known = dict.fromkeys(name for panel in panels for name in (*panel.rows, *panel.refused))

    def place(name: str) -> tuple[float, str]:
        means = [panel.rows[name].mean for panel in panels if name in panel.rows]
        return (-means[0] if means else 0.0), name

    return sorted(known, key=place)


def _draw(ax: Axes, panel: Panel, names: Sequence[str], metric: str) -> None:
    for reference, value in panel.references.items():
        look = _look(reference)
        ax.axvline(value, color=look.color, linestyle=look.line, linewidth=1.2, zorder=1, label=look.name)
    for name, one in panel.rows.items():
        color, marker = _VERDICTS[one.verdict]
        place = names.index(name)
        ax.plot([one.low, one.high], [place, place], color=color, linewidth=1.3, zorder=3)
        ax.plot(one.mean, place, marker=marker, color=color, linestyle="", zorder=4)
    for name in panel.refused:
        ax.text(
            0.02, names.index(name), "refused", transform=ax.get_yaxis_transform(), va="center", fontsize=8, color=GREY,
            style="italic",
        )  # fmt: skip
    ax.set_title(wrap(panel.label, 44), fontsize=9, loc="left")
    ax.set_xlabel(f"own {metric}, mean over people")


def _look(reference: str) -> Look:
    return KIND_LOOKS.get(reference, Look(reference, ORANGE, (0, (6, 1.5)), ""))


def _handles(axes: Sequence[Axes]) -> list[Artist]:
    """Explain verdicts and lines, each line once."""
    texts: dict[Verdict | None, str] = {"better": "better than fedavg", "worse": "worse than fedavg", None: "fedavg"}
    handles: list[Artist] = [
        Line2D([], [], color=color, marker=marker, linewidth=1.3, label=texts.get(verdict, str(verdict)))
        for verdict, (color, marker) in _VERDICTS.items()
    ]
    lines = {f"mean of {line.get_label()}": line for ax in axes for line in ax.get_legend_handles_labels()[0]}
    for text, line in lines.items():
        line.set_label(text)
    return [*handles, *lines.values()]
