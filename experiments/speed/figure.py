"""Seconds of one round, by contestant and workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpers.figures.style import BLUE, GREY, new_figure, save, style, title


@style()
def draw(found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw bars, a panel for each workload and kind of protection."""
    panels = [(name, kind) for name in found for kind in ("dp", "none")]
    fig = new_figure(7.2, 1.2 + 1.1 * len(panels))
    axes = fig.subplots(len(panels), 1, squeeze=False, sharex=False)[:, 0]
    for ax, (name, kind) in zip(axes, panels, strict=True):
        rows = sorted((row for row in found[name] if row["kind"] == kind), key=lambda row: -row["seconds"])
        seconds = [row["seconds"] for row in rows]
        bars = ax.barh(
            [row["name"] for row in rows], seconds, color=[BLUE if row["name"] == "fedpers" else GREY for row in rows]
        )
        ax.bar_label(bars, [f"{value:.1f} s" for value in seconds], padding=3)
        ax.set_xlim(0, 1.15 * max(seconds))
        ax.grid(False, axis="y")
        protection = "clipping and noise per record" if kind == "dp" else "without DP"
        ax.set_title(f"{name}: {protection}", loc="left", fontsize=9.5)
    axes[-1].set_xlabel("seconds of one round")
    title(fig, "One federated round with LoRA on real chats")
    save(fig, path.parent, path.stem)
