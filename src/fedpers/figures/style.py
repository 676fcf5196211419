"""One look for all figures: safe for colour-blind readers, legible in grey, the same bytes for the same numbers."""

import io
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedpers.errors import RunDirectoryError

# Okabe and Ito, Color Universal Design, 2008.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, BLACK, GREY = "#56B4E9", "#CC79A7", "#000000", "#6E6E6E"

_SETTINGS: Any = {  # Any: newer stubs of matplotlib type the keys as literals, older ones as str
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "svg.fonttype": "path",
    "svg.hashsalt": "fedpers",  # without it the ids inside an SVG are random
    "pdf.fonttype": 42,  # text stays text, in fonts that every printer and journal takes
}


_FORMATS: Any = {  # with what would otherwise be a date, or name a version
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}

LineStyle = str | tuple[float, tuple[float, ...]]


@dataclass(frozen=True)
class Look:
    """How one model kind or method is drawn: colour, and line style and marker that tell it apart in grey."""

    name: str
    color: str
    line: LineStyle
    marker: str


KIND_LOOKS = {
    "own": Look("personal", BLUE, "-", "o"),
    "global": Look("shared", VERMILLION, "--", "s"),
    "local": Look("local-only", GREEN, "-.", "^"),
    "zero_shot": Look("zero-shot", GREY, ":", "v"),
    "swap": Look("another user's state", PURPLE, (0, (5, 1, 1, 1, 1, 1)), "D"),
}
_METHOD_LOOKS: tuple[tuple[str, LineStyle, str], ...] = (
    (BLUE, "-", "o"),
    (VERMILLION, (0, (6, 1.5)), "s"),
    (PURPLE, (0, (5, 1.5, 1, 1.5)), "D"),
    (ORANGE, (0, (3, 1)), "P"),
    (SKY, (0, (1, 1)), "X"),
    (BLACK, (0, (8, 1, 1, 1, 1, 1)), "*"),
)


def kind_look(kind: str) -> Look:
    """Look of a model kind; an unknown kind is drawn black under its own name."""
    return KIND_LOOKS.get(kind, Look(kind.replace("_", " "), BLACK, (0, (1, 2)), "x"))


def method_look(name: str, position: int) -> Look:
    """Look of the method at `position` in a figure; looks repeat after six."""
    color, line, marker = _METHOD_LOOKS[position % len(_METHOD_LOOKS)]
    return Look(name, color, line, marker)


def reference(
    ax: Axes, kind: str, mean: float, band: tuple[float, float] | None = None, note: str | None = None
) -> None:
    """Draw a model kind as a line across, behind what is held against it, with a band from low to high.

    `note` follows its name in the legend; without one it is not there.
    """
    look = kind_look(kind)
    if band is not None:
        ax.axhspan(*band, facecolor=look.color, alpha=0.15, zorder=0)
    label = None if note is None else f"{look.name}{note}"
    ax.axhline(mean, color=look.color, linestyle=look.line, linewidth=1.3, zorder=1, label=label)


@contextmanager
def style() -> Iterator[None]:
    """Draw inside this style and leave matplotlib's settings as they were; a user's matplotlibrc has no influence."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield


def new_figure(width: float, height: float) -> Figure:
    """Empty figure of `width` x `height` inches that belongs to no window and no global list."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def title(fig: Figure, text: str) -> None:
    """Set the title across the whole figure, so that a long claim does not run into the legend."""
    fig.suptitle(wrap(text), x=0.01, ha="left", fontsize=10)


def legend(ax: Axes, marker_scale: float = 1.0) -> None:
    """Put the legend right of `ax`, where it covers no data."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0, markerscale=marker_scale)


def wrap(text: str, width: int = 96) -> str:
    """Break a label into lines of at most `width` characters; line breaks already there are kept."""
    return "\n".join(line for part in text.splitlines() for line in (textwrap.wrap(part, width) or [""]))


def save(fig: Figure, directory: Path, name: str) -> list[Path]:
    """Write `name`.png (150 dpi), `name`.svg and `name`.pdf and return their paths.

    No date, version or random id goes in, so equal figures are equal files. Raises RunDirectoryError if the directory
    cannot be written.
    """
    written = []
    with style():
        for suffix, metadata in _FORMATS.items():
            content = io.BytesIO()
            fig.savefig(content, format=suffix, dpi=150, metadata=metadata)
            fig.set_layout_engine("none")  # the first has laid it out; that is most of the time
            path, part = directory / f"{name}.{suffix}", directory / f".{name}.{suffix}.part"
            try:
                directory.mkdir(parents=True, exist_ok=True)
                part.write_bytes(content.getvalue())
                os.replace(part, path)
            except OSError as error:
                raise RunDirectoryError(f"Cannot write {path}: {error.strerror or error}.") from error
            written.append(path)
    return written
