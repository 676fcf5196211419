"""Cold start: the metric of people who were in no round over the number of records that their models were fitted to."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from fedpers.errors import DataError
from fedpers.figures.style import kind_look, legend, new_figure, reference, save, style, title


@style()
def cold_start_curve(
    metric: str,
    people: int,
    lines: Mapping[str, Sequence[tuple[int, float, float, float]]],
    references: Mapping[str, float],
    directory: Path,
) -> list[Path]:
    """Draw mean and 95% interval over people of each kind, and return the written paths.

    Args:
        metric: its name.
        people: how many there are; the same at each point.
        lines: by model kind (records, mean, low, high), in order of records.
        references: means that do not hang on the number of records, by model kind.
        directory: gets `cold_start` as .png, .svg and .pdf.

    Raises:
        DataError: no line.
    """
    if not lines:
        raise DataError("cold_start_curve: there is no line to draw.")
    fig = new_figure(7.2, 4.2)
    ax = fig.add_subplot()
    counts: set[int] = set()
    for kind, points in lines.items():
        look = kind_look(kind)
        records, mean, low, high = zip(*points, strict=True)
        counts |= set(records)
        ax.plot(records, mean, color=look.color, linestyle=look.line, marker=look.marker, zorder=3, label=look.name)
        ax.fill_between(records, low, high, color=look.color, alpha=0.15, linewidth=0)
    for kind, value in references.items():
        reference(ax, kind, value, note=f": {value:.3f}")
    ax.set_xscale("symlog", linthresh=1, base=2)
    ax.xaxis.set_major_locator(FixedLocator([float(count) for count in sorted(counts)]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.set_xlim(-0.3, 1.15 * max(counts) + 0.3)
    ax.set_xlabel("training records of somebody new")
    ax.set_ylabel(f"mean {metric} over people")
    title(
        fig,
        f"Cold start: {people} people who were in no round\nbands: 95% intervals over people, wide as people differ",
    )
    legend(ax)
    return save(fig, directory, "cold_start")
