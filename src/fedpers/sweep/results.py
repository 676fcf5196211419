"""The tables of a sweep, made of what is stored and of nothing else: `results.parquet` and `users.parquet`.

Coordinates are columns named by their axis, with `_` for dots (`privacy_epsilon`), and hold text. Where a column of
the table says the same with a type (`method`, `seed`), there is that column alone. The local-only baseline is a run of
its own, with a row of its own; in the rows of the runs that it belongs to it is the model kind `local`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedpers.config import FAMILIES, load_config
from fedpers.errors import DataError, LedgerError
from fedpers.evaluation.per_user import KINDS, write_table
from fedpers.evaluation.statistics import Comparison, compare
from fedpers.run_directory import MEMBERS
from fedpers.simulation import Run, load
from fedpers.sweep import place
from fedpers.sweep.cells import label

RESULTS, USERS = "results.parquet", "users.parquet"
_TEXT, _NUMBER, _COUNT = pa.string(), pa.float64(), pa.int64()
_WHICH = {"hash": _TEXT, "baseline": _TEXT, "data": _TEXT, "method": _TEXT, "seed": _COUNT}
_CLAIM = {
    "claim": _TEXT, "unit": _TEXT, "trust": _TEXT, "epsilon": _NUMBER, "delta": _NUMBER, "forecast_epsilon": _NUMBER,
    "forecast_users": _COUNT,
}  # fmt: skip
_ABOUT = {"n_users": _COUNT, "n_rounds": _COUNT, "metric": _TEXT, "higher_is_better": pa.bool_()}
_KIND = ("mean", "low", "high", "worst_decile")  # with a 95% interval
_GAIN = ("gain", "gain_low", "gain_high", "p", "helped", "tied", "harmed", "detectable")  # of own over another kind
_COST = {"bytes_up": _COUNT, "bytes_down": _COUNT, "seconds": _NUMBER}
FIXED = {
    **_WHICH,
    **_CLAIM,
    **_ABOUT,
    **{f"{kind}_{what}": _NUMBER for kind in KINDS for what in _KIND},
    **{f"{what}_over_{kind}": _NUMBER for kind in KINDS[1:] for what in _GAIN},
    **{f"noise_to_update_{family}": _NUMBER for family in FAMILIES},
    **_COST,
}


def collect(out: Path, known: Mapping[str, Run] | None = None) -> tuple[pa.Table, pa.Table]:
    """Make, write and return both tables, from the finished runs of the grid that was swept last, in its order.

    The first has a row per run: coordinates, claim, what `summary.json` holds, noise over update, bytes and seconds
    (the one column that differs between two sweeps with the same secret). `gain_over_KIND` is the mean gain of own over
    another kind with a 95% interval, p by the paired test of `statistics.compare`, users helped, tied and harmed, and
    the smallest gain that would be seen with 80% power. The second has a row per run, user and kind, where `user`
    is a position in the run and `person` the same for the same person in all runs.

    Args:
        out: the sweep's directory.
        known: by hash, runs that have been read already.

    Raises:
        RunDirectoryError: `out` is no sweep, or cannot be written.
        LedgerError: the claim of a run is not what its ledger gives; the message names the run.
    """
    runs = place.read_grid(out)["runs"]
    with place.locked(out):
        columns = {axis: axis.replace(".", "_") for run in runs for axis in run["coordinates"]}
        columns = {axis: column for axis, column in columns.items() if column not in FIXED}
        known = known or {}
        finished = [run for run in runs if place.cell(out, run["hash"]).finished]
        stored = {run["hash"]: known.get(run["hash"]) or _stored(out, run) for run in finished}
        baselines = {one: stored[one].users for one in {run["baseline"] for run in finished} & stored.keys()}
        rows, tables = [], []
        numbers: dict[str, int] = {}
        for run in finished:
            one = stored[run["hash"]]
            users = baselines.get(run["hash"]) or one.users
            home = _own(baselines[run["baseline"]]) if run["baseline"] in baselines else None
            which = _which(run, one) | {column: run["coordinates"].get(axis) for axis, column in columns.items()}
            rows.append(which | _row(one, users, stored.get(run["baseline"]), home))
            tables.append(_labelled(_numbered(_with_local(users, home), one, numbers), which))
        schema = _WHICH | dict.fromkeys(columns.values(), _TEXT)
        results = pa.Table.from_pylist(rows, schema=pa.schema(list((schema | FIXED).items())))
        joined = _joined(tables, schema)
        write_table(results, out / RESULTS)
        write_table(joined, out / USERS)
    return results, joined


def _stored(out: Path, run: Mapping[str, Any]) -> Run:
    path = place.cell(out, run["hash"]).path
    try:
        return load(path, load_config(path / "config.yaml"))
    except LedgerError as error:
        raise LedgerError(f"cell ({label(run['coordinates'])}): {error}") from error


def _which(run: Mapping[str, Any], one: Run) -> dict[str, Any]:
    names = {"data": one.config.data.name, "method": one.config.method, "seed": one.config.seed}
    return {"hash": run["hash"], "baseline": run["baseline"], **names}


def _row(one: Run, users: pa.Table, local: Run | None, home: pa.Table | None) -> dict[str, Any]:
    """Everything about a run but where it stands on the axes; `home` are the own models of its baseline."""
    claim, forecast, summary = one.claim, one.forecast, one.summary
    row = {name: getattr(claim, name) for name in ("unit", "trust", "epsilon", "delta")}
    row |= {name: summary[name] for name in ("claim", "metric", "higher_is_better", *_COST)}
    row |= {"n_users": summary["users"], "n_rounds": summary["rounds"]}
    if forecast is not None:
        row |= {"forecast_epsilon": forecast.epsilon, "forecast_users": forecast.population}
    row |= {f"noise_to_update_{family}": ratio for family, ratio in summary["noise_to_update"].items()}
    metrics, comparisons = dict(summary["metrics"]), dict(summary["comparisons"])
    if local is not None and home is not None:
        metrics["local"] = local.summary["metrics"]["own"]
        comparisons["local"] = asdict(_over_local(one, users, home))
    for kind, found in metrics.items():
        row |= {f"{kind}_mean": found["mean"], f"{kind}_worst_decile": found["worst_decile"]}
        row |= dict(zip((f"{kind}_low", f"{kind}_high"), found["ci95"], strict=True))
    for kind, found in comparisons.items():
        low, high = found["ci95"]
        values = (
            found["mean_gain"], low, high, found["p_value"], found["helped"], found["tied"], found["harmed"],
            found["minimum_detectable_effect"],
        )  # fmt: skip
        row |= {f"{what}_over_{kind}": value for what, value in zip(_GAIN, values, strict=True)}
    return row


def _over_local(one: Run, users: pa.Table, home: pa.Table) -> Comparison:
    """Compare the own models of a run with those of its local-only baseline, on the same people and test records."""
    metric, keys = one.summary["metric"], ("user", "test_records")
    mine, theirs = _own(users).sort_by("user"), home.sort_by("user")
    if any(not mine[key].equals(theirs[key]) for key in keys):
        raise DataError("the local-only baseline of a cell was measured on other people or records; run both again.")
    return compare(
        mine[metric].to_numpy(), theirs[metric].to_numpy(), mine["test_records"].to_numpy(), None, None,
        np.random.default_rng(one.config.seed), higher_is_better=one.summary["higher_is_better"],
    )  # fmt: skip


def _own(users: pa.Table) -> pa.Table:
    return users.filter(pc.equal(users["kind"], "own"))


def _with_local(users: pa.Table, home: pa.Table | None) -> pa.Table:
    """Add the baseline's own models as the kind `local`; record by record it was not compared with them."""
    table = _nullable(users)
    if home is not None:
        theirs = _nullable(home)
        unknown = pa.nulls(theirs.num_rows, _COUNT)
        theirs = _set(theirs, {"kind": pa.repeat("local", theirs.num_rows), "only_own": unknown, "only_other": unknown})
        table = pa.concat_tables([table, theirs])
    kinds = np.array([KINDS.index(kind) for kind in table["kind"].to_pylist()])
    return table.take(np.lexsort((kinds, table["user"].to_numpy())))


def _numbered(table: pa.Table, one: Run, numbers: dict[str, int]) -> pa.Table:
    """Add who each user is, by a number that is the same in all runs: at one position, seeds may have different people.

    Where records are made when they are needed, positions are people.
    """
    users = table["user"].to_pylist()
    if not one.config.data.lazy:
        names = json.loads((one.path / "private" / MEMBERS).read_text(encoding="utf-8"))
        users = [numbers.setdefault(names[user], len(numbers)) for user in users]
    return _set(table, {"person": pa.array(users, _COUNT)})


def _labelled(table: pa.Table, which: Mapping[str, Any]) -> pa.Table:
    """Put a run's coordinates beside each of its users."""
    rows = table.num_rows
    kinds = {name: _WHICH.get(name, _TEXT) for name in which}
    return _set(table, {name: pa.repeat(pa.scalar(value, kinds[name]), rows) for name, value in which.items()})


def _joined(tables: list[pa.Table], first: Mapping[str, Any]) -> pa.Table:
    """Put the users of all runs together; a metric that a run's task does not have is null there."""
    if not tables:
        return pa.schema(list(first.items())).empty_table()
    table = pa.concat_tables(tables, promote_options="default")
    named = (*first, "person", "user", "kind", "test_records", "train_records")
    last = ("only_own", "only_other")
    metrics = sorted(set(table.column_names) - {*named, *last})
    return table.select([*named, *metrics, *last])


def _nullable(table: pa.Table) -> pa.Table:
    return pa.table({name: table[name] for name in table.column_names})


def _set(table: pa.Table, columns: Mapping[str, Any]) -> pa.Table:
    return pa.table({name: table[name] for name in table.column_names} | dict(columns))
