"""How many records users have: what a federation's long tail looks like."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from fedpers.errors import DataError
from fedpers.figures.style import BLUE, VERMILLION, legend, new_figure, save, style, title

TICKS = [step * 10**power for power in range(6) for step in (1, 2, 5)]


@style()
def records_per_user(train: Sequence[int], test: Sequence[int], label: str, directory: Path) -> list[Path]:
    """Draw the users' numbers of records, most first, on a logarithmic axis, and return the written paths.

    Args:
        train: one number per user, each 1 or more.
        test: the same for testing; each of the two is sorted for itself.
        label: of whom, in one line.
        directory: gets `records_per_user` as .png, .svg and .pdf.

    Raises:
        DataError: no users, or a user without records.
        RunDirectoryError: the directory cannot be written.
    """
    if not train or not test or min(*train, *test) < 1:
        raise DataError("records_per_user: every user needs a record for training and one for testing.")
    fig = new_figure(7.2, 4.0)
    ax = fig.add_subplot()
    for counts, name, color, line in ((train, "training", BLUE, "-"), (test, "testing", VERMILLION, "--")):
        ordered = np.sort(np.asarray(counts))[::-1]
        places = np.arange(1, ordered.size + 1)
        ax.plot(
            places,
            ordered,
            color=color,
            linestyle=line,
            marker="o" if ordered.size == 1 else None,
            label=f"{name}, {int(ordered.sum()):,} in all",
        )
    most = max(*train, *test)
    ax.set_yscale("log")
    ax.set_ylim(0.9, 1.25 * most)
    ax.yaxis.set_major_locator(FixedLocator([float(tick) for tick in TICKS if tick <= 1.25 * most]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlim(0, max(len(train), len(test)) + 1)
    ax.set_xlabel("users, most records first (sorted for each line)")
    ax.set_ylabel("records of a user")
    title(fig, f"Records per user\n{label}")
    legend(ax)
    return save(fig, directory, "records_per_user")
