"""The figures of a sweep, drawn of its two stored tables, of its rounds and its audits; nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fedpers.audit.bounds import Finding
from fedpers.audit.stored import read_findings
from fedpers.errors import RunDirectoryError
from fedpers.figures.audit import claimed_and_found_of_runs
from fedpers.figures.sweep_cost import cost
from fedpers.figures.sweep_curves import learning_curves
from fedpers.figures.sweep_frontier import sweep_frontier
from fedpers.figures.sweep_gains import sorted_gains
from fedpers.figures.sweep_records import gain_by_records
from fedpers.figures.sweep_tail import worst_and_gap
from fedpers.sweep import place
from fedpers.sweep.results import FIXED, RESULTS, USERS
from fedpers.sweep.settings import settings

Figure = Callable[[pa.Table, pa.Table, Path], list[Path]]  # results, users, folder -> what was written

FIGURES: tuple[Figure, ...] = (sweep_frontier, sorted_gains, worst_and_gap, gain_by_records, cost)
AUDITS = "audits"  # in the sweep's directory: by the hash of a run, what `fedpers audit` wrote about it
FOLDER = "figures"  # in the sweep's directory
_OF_USERS = (
    "hash", "baseline", "data", "method", "seed", "person", "user", "kind", "test_records", "train_records", "only_own",
    "only_other",
)  # fmt: skip
_AGAIN = "`fedpers sweep` of the same grid makes it, and runs nothing again"


def draw(out: Path) -> list[Path]:
    """Draw all figures of the sweep in `out` into `out`/figures, and return the paths.

    Pictures that an earlier sweep left there and that are not drawn now are removed: they would show other runs.

    Raises:
        RunDirectoryError: a table is missing, empty, or of another version; or nothing can be written.
        DataError: a table's numbers cannot be drawn.
    """
    results, users = _read(out / RESULTS, FIXED), _read(out / USERS, _OF_USERS)
    folder = out / FOLDER
    paths = [path for figure in FIGURES for path in figure(results, users, folder)]
    paths += learning_curves(results, users, _rounds(out, results), folder)
    paths += claimed_and_found_of_runs(_audits(out, results), folder, "Claimed and found")
    for path in folder.glob("*"):
        if path.suffix in {".png", ".svg", ".pdf"} and path not in paths:
            path.unlink()
    return paths


def _rounds(out: Path, results: pa.Table) -> dict[str, pa.Table]:
    """Rounds of the runs, by hash, as far as they lie there: the tables are enough for all other figures."""
    paths = {run: place.cell(out, run).path / "rounds.parquet" for run in results["hash"].to_pylist()}
    return {run: pq.read_table(path) for run, path in paths.items() if path.exists()}


def _audits(out: Path, results: pa.Table) -> dict[str, list[Finding]]:
    """Findings about the runs that were audited, by the run's name."""
    found = {}
    for setting in (one for some in settings(results).values() for one in some):
        for run in setting.runs:
            path = out / AUDITS / run["hash"] / "audit.json"
            if path.exists():
                name = f"{setting.data}, {setting.series}, {setting.level.label}, seed {run['seed']}"
                found[" ".join(name.split())] = read_findings(path)
    return found


def _read(path: Path, needed: Collection[str]) -> pa.Table:
    if not path.exists():
        raise RunDirectoryError(f"{path}: there is no such table to draw; {_AGAIN}.")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise RunDirectoryError(f"{path}: cannot be read as a table; {_AGAIN}.") from error
    if missing := [name for name in needed if name not in table.column_names]:
        raise RunDirectoryError(f"{path}: of another version, without {', '.join(missing)}; {_AGAIN}.")
    if not table.num_rows:
        raise RunDirectoryError(f"{path}: has no rows, as no run is finished; nothing can be drawn.")
    return table
