"""Sweeps: which runs a grid asks for, and that each is run once, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from conftest import SECRET, Command
from fedpers import experiment, simulation
from fedpers.config import Config
from fedpers.errors import ConfigError, DataError, FedpersError, LedgerError, RunDirectoryError
from fedpers.sweep import pictures, place, results, runner
from fedpers.sweep.grid import Grid, expand, read_grid
from fedpers.sweep.runner import sweep

USER = {"unit": "user", "epsilon": 8, "delta": 1e-3, "clip": 1.0}
SHORT: dict[str, Any] = {"rounds": 2, "evaluation": {"every": 0}, "personal": {"epochs": 1}}
Tree = dict[str, Any]
FIGURES = pictures.FIGURES


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sweep of these, `swept`, makes pictures of its tables; nobody looks at those of the others."""
    monkeypatch.setattr(pictures, "FIGURES", ())


@pytest.fixture
def base(tiny: Callable[..., Config]) -> Tree:
    """A private configuration of a second, as a grid's base."""
    return tiny(**SHORT, method="fedper", privacy=USER, data={"users": 6}).model_dump(mode="json")


@pytest.fixture
def small(base: Tree) -> Tree:
    """Four cells and one baseline."""
    axes = {"method": ["fedavg", "fedper"], "privacy.epsilon": [float("inf"), 8]}
    return {"name": "small", "base": base, "product": axes}


def addresses(grid: Grid) -> dict[str, str]:
    return {cell.label: cell.address for cell in grid.cells}


# --- which runs there are ---------------------------------------------------------------------------------------------


def test_a_grid_is_expanded_as_by_hand(base: Tree) -> None:
    tree = {
        "base": base,
        "product": {"method": ["fedavg", "fedper"], "seed": [0, 1]},
        "zip": {"share": ["head", "adapter+head"], "local.lr.head": [0.1, 0.25]},
        "variants": {"few": {"data.users": 6}, "more": {"base": {**base, "rounds": 3}, "data.users": 8}},
        "skip": [{"method": "fedper", "variant": "more"}, {"share": ["head"], "seed": [1], "method": "fedavg"}],
    }
    cells = expand(tree).cells
    found = [
        (c.coordinates["variant"], c.config.share, c.config.local.lr.head, c.config.method, c.config.seed)
        for c in cells
    ]
    head, both = ("head",), ("adapter", "head")
    assert found == [
        ("few", head, 0.1, "fedavg", 0), ("few", head, 0.1, "fedper", 0), ("few", head, 0.1, "fedper", 1),
        ("few", both, 0.25, "fedavg", 0), ("few", both, 0.25, "fedavg", 1),
        ("few", both, 0.25, "fedper", 0), ("few", both, 0.25, "fedper", 1),
        ("more", head, 0.1, "fedavg", 0), ("more", both, 0.25, "fedavg", 0), ("more", both, 0.25, "fedavg", 1),
    ]  # fmt: skip
    assert {(c.coordinates["variant"], c.config.data.users, c.config.rounds) for c in cells} == {
        ("few", 6, 2), ("more", 8, 3),
    }  # fmt: skip
    assert cells[0].coordinates == {
        "variant": "few", "share": "head", "local.lr.head": "0.1", "method": "fedavg", "seed": "0",
    }  # fmt: skip


def test_two_kinds_of_no_noise(base: Tree) -> None:
    private = {**base, "privacy": {**base["privacy"], "adaptive": {"bit_noise": 4}}}
    grid = expand({"base": private, "product": {"privacy.epsilon": [float("inf"), "clip", 4]}})
    nothing, clip, noise = (cell.config.privacy for cell in grid.cells)
    assert (nothing.unit, nothing.clip, nothing.epsilon, nothing.adaptive) == ("none", None, np.inf, None)
    assert (clip.unit, clip.clip, clip.epsilon, clip.adaptive) == ("user", 1.0, np.inf, None)
    assert (noise.unit, noise.clip, noise.epsilon, noise.adaptive is None) == ("user", 1.0, 4, False)
    for cell in grid.cells:
        experiment.prepare(cell.config)  # all of them can be run


def test_options_are_the_base_methods_own(base: Tree) -> None:
    tree = {"base": {**base, "method": "fedprox", "options": {"mu": 0.5}}}
    found = expand({**tree, "product": {"method": ["fedprox", "fedavg"]}}).cells
    assert [cell.config.options for cell in found] == [{"mu": 0.5}, {}]
    found = expand({**tree, "variants": {"a": {"method": "ditto", "options.lambda": 2}, "b": {"options.mu": 1}}}).cells
    assert [cell.config.options for cell in found] == [{"lambda": 2}, {"mu": 1}]


@pytest.mark.parametrize("written", [float("inf"), ".inf", "Inf", "none", None])
def test_no_privacy_is_one_level_however_it_is_written(base: Tree, written: Any) -> None:
    axis = {"privacy.epsilon": [written, 8]}
    found = expand({"base": base, "product": axis, "skip": [{"privacy.epsilon": 8}]}).cells
    assert [cell.coordinates for cell in found] == [{"privacy.epsilon": "inf"}]
    assert found[0].config.privacy.unit == "none"
    with pytest.raises(ConfigError, match="the same run"):
        expand({"base": base, "product": {"privacy.epsilon": [written, ".inf"]}})


def test_a_configuration_and_an_empty_file_are_no_grids(base: Tree) -> None:
    with pytest.raises(ConfigError, match="`fedpers run` makes it"):
        expand(base)
    with pytest.raises(ConfigError, match="is empty"):
        expand({"name": "nothing"})


BAD: dict[str, tuple[Tree, str]] = {
    "nothing to vary": ({}, "no cells"),
    "all skipped": ({"product": {"seed": [0]}, "skip": [{"seed": 0}]}, "no cells"),
    "an empty list": ({"product": {"seed": []}}, r"product\.seed: expected a list of values.*found an empty list"),
    "a list that is none": ({"product": {"method": "fedavg"}}, r"product\.method: expected a list.*found str"),
    "unequal lists": ({"zip": {"seed": [0, 1], "rounds": [1]}}, "seed has 2, rounds has 1"),
    "a key of the grid": ({"products": {"seed": [0]}}, "unknown key 'products'; did you mean 'product'"),
    "a key of the configuration": (
        {"product": {"seeds": [0]}},
        r"\(seeds=0\): unknown key 'seeds'; did you mean 'seed'",
    ),
    "a deeper key": ({"product": {"privacy.epsilom": [1]}}, r"'privacy\.epsilom'; did you mean 'privacy\.epsilon'"),
    "a key in a variant": ({"variants": {"a": {"data.user": 3}}}, r"\(variant=a\): unknown key 'data\.user'"),
    "a key below a value": ({"product": {"seed.x": [1]}}, "'seed' holds a value"),
    "the same run twice": ({"product": {"seed": [0, 1, 0]}}, r"\(seed=0\) and \(seed=0\) are the same run"),
    "training at home twice": (
        {"product": {"method": ["local"], "privacy.epsilon": [8, 1]}},
        "same run; training at home hangs on neither privacy nor rounds; skip",
    ),
    "set twice": ({"product": {"seed": [0]}, "zip": {"seed": [1]}}, "'seed' is set twice"),
    "set twice, in part": ({"product": {"local": [{}]}, "variants": {"a": {"local.epochs": 2}}}, "'local.*set twice"),
    "the secret": ({"product": {"privacy.secret": [SECRET]}}, r"'privacy\.secret' is not to be varied"),
    "a section with the secret": ({"product": {"privacy": [{"secret": SECRET}]}}, "'privacy' is not to be varied"),
    "a skip of no axis": ({"product": {"seed": [0]}, "skip": [{"sed": 0}]}, "unknown key 'sed'; did you mean 'seed'"),
    "a skip of no value": ({"product": {"seed": [0, 1]}, "skip": [{"seed": 2}]}, "seed has no value 2; it has 0, 1"),
    "a skip of all": ({"product": {"seed": [0]}, "skip": [{}]}, "at least one axis"),
    "a skip that is no list": ({"product": {"seed": [0]}, "skip": {"seed": 0}}, "expected a list of conditions"),
    "no base": ({"base": None, "product": {"seed": [0]}}, "name a configuration file"),
    "a base that is not there": ({"base": "gone.yaml", "product": {"seed": [0]}}, r"gone\.yaml: cannot be read"),
    "a value": ({"product": {"rounds": [-1]}}, r"\(rounds=-1\): rounds = -1"),
    "a name": ({"name": "a/b", "product": {"seed": [0]}}, "name = 'a/b'"),
    "clip without a clip": ({"base": {}, "product": {"privacy.epsilon": ["clip"]}}, r"needs privacy\.unit"),
    "epsilon without a unit": ({"base": {}, "product": {"privacy.epsilon": [1]}}, r"set privacy\.unit"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_grid_is_refused(case: str, base: Tree, tmp_path: Path) -> None:
    tree, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as raised:
        expand({"base": base, **tree}, folder=tmp_path)
    assert SECRET not in str(raised.value)


def test_overrides_change_every_base_but_not_what_the_grid_sets(base: Tree, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    tree: Tree = {"base": "base.yaml", "product": {"seed": [3]}, "variants": {"a": None, "b": {"base": base}}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"\(variant=a, seed=3\) and \(variant=b, seed=3\) are the same run"):
        read_grid(tmp_path / "two.yaml")
    tree["variants"]["b"]["base"] = {**base, "rounds": 7}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(tree))
    grid = read_grid(tmp_path / "two.yaml", ["data.users=5"])
    assert (grid.name, [cell.config.rounds for cell in grid.cells]) == ("two", [2, 7])
    assert [cell.config.data.users for cell in grid.cells] == [5, 5]
    for override in ("seed=1", "seed.x=1"):
        with pytest.raises(ConfigError, match="sets it itself"):
            read_grid(tmp_path / "two.yaml", [override])


def test_an_address_follows_the_content_of_its_cell_alone(small: Tree) -> None:
    before = addresses(expand(small))
    assert len(set(before.values())) == 4
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in before.values())
    changed = json.loads(json.dumps(small).replace("Infinity", '"inf"'))
    changed["product"]["privacy.epsilon"] = [4, "inf"]  # one value is another, the other is spelt and placed otherwise
    changed["name"] = "renamed"
    after = addresses(expand(changed))
    assert {label for label in after if after[label] in before.values()} == {
        "method=fedavg, privacy.epsilon=inf", "method=fedper, privacy.epsilon=inf",
    }  # fmt: skip
    assert not set(addresses(expand(small, ["rounds=3"])).values()) & set(before.values())
    assert not set(addresses(expand(small, ["engine.threads=2"])).values()) & set(before.values())
    assert not set(addresses(expand(small, [f"privacy.secret={'ab' * 32}"])).values()) & set(before.values())
    assert addresses(expand(small, ["name=other"])) == before


def test_the_baseline_hangs_on_neither_method_nor_privacy(small: Tree) -> None:
    grid = expand({**small, "product": {**small["product"], "seed": [0, 1], "rounds": [1, 2]}})
    assert [cell.coordinates for cell in grid.baselines] == [
        {"method": "local", "seed": "0"}, {"method": "local", "seed": "1"},
    ]  # fmt: skip
    for cell in grid.cells:
        baseline = grid.baselines[cell.config.seed]
        assert (cell.baseline, cell.config.evaluation.local_only) == (baseline.address, False)
        assert (baseline.config.method, baseline.config.rounds, baseline.config.privacy.unit) == ("local", 0, "none")
        assert baseline.config.personal == cell.config.personal
    assert expand(small, ["rounds=5"]).baselines[0].address == expand(small).baselines[0].address
    assert expand(small, ["personal.epochs=5"]).baselines[0].address != expand(small).baselines[0].address
    assert expand(small, ["evaluation.local_only=false"]).baselines == ()
    named = expand({**small, "product": {"method": ["fedavg", "local"]}})
    assert (named.baselines, named.cells[0].baseline) == ((), named.cells[1].address)


def test_every_cell_has_a_secret_of_its_own_and_shows_none(small: Tree) -> None:
    grid = expand(small)
    secrets = [str(run.config.privacy.secret) for run in grid.runs]
    assert len({*secrets, SECRET}) == 6
    assert not any(secret in grid.to_yaml() for secret in [*secrets, SECRET])
    without = expand(small, ["privacy.secret=null"])
    assert {run.config.privacy.secret for run in without.runs} == {None}


# --- running them -----------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Note the first argument of every call of a function."""
    original, calls = getattr(owner, name), []

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(args[0] if args else None)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, counting)
    return calls


def contents(out: Path) -> tuple[bytes, Any]:
    """Both tables: the bytes of the users', and the results without their wall times."""
    return (out / "users.parquet").read_bytes(), pq.read_table(out / "results.parquet").drop_columns(["seconds"])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swept")


@pytest.fixture
def swept(small: Tree, kept: Path) -> Path:
    """The small grid, run once for all tests that only look at it."""
    if not (kept / "small").exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pictures, "FIGURES", FIGURES)
            assert sweep(expand(small), kept / "small").good
    return kept / "small"


def test_each_cell_is_run_once_and_what_is_shared_is_loaded_once(
    small: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small["base"]["method"] = "fedavg"
    small["product"] = {"seed": [0, 1], "share": ["head", "adapter+head"]}
    runs = counted(monkeypatch, runner, "simulate")
    loads, models = (counted(monkeypatch, experiment, name) for name in ("load", "CohortModel"))
    grid = expand(small)
    found = sweep(grid, tmp_path / "out")
    assert (found.good, found.finished, found.cells, found.results.num_rows) == (True, 6, 6, 6)  # type: ignore[union-attr]
    assert sorted(run.name for run in runs) == sorted(run.address for run in grid.runs)
    assert sorted(config.seed for config in loads) == [0, 1]
    assert sorted(config.seed for config in models) == [0, 0, 1, 1]  # heads alone, and with adapters
    del runs[:], loads[:]
    assert sweep(grid, tmp_path / "out").good
    assert (runs, loads) == ([], [])
    small["product"]["seed"] = [1, 2]
    found = sweep(expand(small), tmp_path / "out")
    assert [run.seed for run in runs] == [2, 2, 2]
    assert found.results["seed"].to_pylist() == [1, 1, 2, 2, 1, 2]  # type: ignore[index]
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 9


def test_the_tables_say_what_the_runs_have_stored(small: Tree, swept: Path) -> None:
    table, users = pd.read_parquet(swept / "results.parquet"), pd.read_parquet(swept / "users.parquet")
    grid = expand(small)
    assert list(table["hash"]) == [run.address for run in grid.runs]
    assert list(table["privacy_epsilon"])[:4] == ["inf", "8", "inf", "8"]
    assert (list(table["method"])[-1], table["privacy_epsilon"].isna().tolist()[-1]) == ("local", True)
    assert users["hash"].nunique() == 5
    local = json.loads((swept / "cells" / grid.baselines[0].address / "summary.json").read_text())
    for row in table.to_dict("records"):
        path = swept / "cells" / row["hash"]
        summary = json.loads((path / "summary.json").read_text())
        claim = json.loads((path / "claim.json").read_text())
        assert (row["claim"], row["epsilon"]) == (summary["claim"], float(claim["epsilon"]))
        assert (row["unit"], row["trust"], row["bytes_up"]) == (claim["unit"], claim["trust"], summary["bytes_up"])
        for kind, found in {**summary["metrics"], "local": local["metrics"]["own"]}.items():
            assert [row[f"{kind}_mean"], row[f"{kind}_low"], row[f"{kind}_high"]] == [found["mean"], *found["ci95"]]
        assert row["helped_over_global"] == summary["helped"]
        for family, ratio in summary["noise_to_update"].items():
            assert row[f"noise_to_update_{family}"] == ratio
        mine = users[users["hash"] == row["hash"]].set_index(["kind", "user"])[row["metric"]]
        gain = (mine["own"] - mine["local"]).mean()
        assert row["gain_over_local"] == pytest.approx(gain if row["higher_is_better"] else -gain)
        assert mine["local"].mean() == pytest.approx(row["local_mean"])
    assert users.groupby(["hash", "kind"])["user"].nunique().eq(6).all()
    private = table[table["privacy_epsilon"] == "8"]
    assert (private["epsilon"] <= 8).all()
    assert (private["noise_to_update_adapter"] > 0).all()


def test_tables_are_made_again_from_what_is_stored(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: (swept / name).read_bytes() for name in (results.RESULTS, results.USERS)}
    monkeypatch.setattr(simulation, "simulate", None)
    for name in before:
        (swept / name).unlink()
    results.collect(swept)
    assert {name: (swept / name).read_bytes() for name in before} == before
    with pytest.raises(RunDirectoryError, match="no sweep is here"):
        results.collect(tmp_path)


def test_a_claim_that_is_not_its_ledgers_is_in_no_table(small: Tree, tmp_path: Path) -> None:
    small["product"] = {"privacy.epsilon": [8]}
    grid = expand(small)
    sweep(grid, tmp_path)
    claim = tmp_path / "cells" / grid.cells[0].address / "claim.json"
    text = json.loads(claim.read_text())
    claim.write_text(json.dumps({**text, "epsilon": text["epsilon"] / 2}))
    with pytest.raises(LedgerError):
        results.collect(tmp_path)


def test_refused_cells_are_listed_with_their_reason(small: Tree, tmp_path: Path, fedpers: Command) -> None:
    small["base"]["privacy"] |= {"unit": "record", "record_rate": 0.5}
    small["product"] = {"method": ["fedbabu", "fedrep"]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(small))
    code, out, _ = fedpers("sweep", tmp_path / "grid.yaml", "--out", tmp_path / "out", "--quiet")
    assert code == 0
    assert "2 of 3 runs finished, 1 refused, 0 failed" in out
    assert "refused: method=fedrep: method 'fedrep' with privacy.unit=record is refused" in out
    refused = place.read(tmp_path / "out", place.REFUSED)
    (entry,) = refused.values()
    assert entry["coordinates"] == {"method": "fedrep"}
    assert "Three sound ways out" in entry["reason"]


def test_what_cannot_be_run_stops_the_sweep_before_it_starts(
    small: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = counted(monkeypatch, runner, "simulate")
    small["product"] = {"method": ["fedavg", "fedabg"]}
    with pytest.raises(ConfigError, match=r"cell \(method=fedabg\): .*did you mean 'fedavg'"):
        sweep(expand(small), tmp_path / "out")
    assert runs == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [ValueError("a private text"), DataError("user 3 has no records; add some.")])
def test_a_cell_that_fails_stops_no_other_and_is_tried_again(
    error: Exception, small: Tree, tmp_path: Path, fedpers: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    small["product"]["method"] = ["fedavg"]
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(small))
    arguments = ("sweep", tmp_path / "grid.yaml", "--out", tmp_path / "out")
    original = runner.simulate

    def failing(config: Config, *rest: Any, **options: Any) -> Any:
        if config.method == "fedavg" and config.privacy.unit == "user":
            raise error
        return original(config, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "simulate", failing)
        for attempt in (1, 2):
            code, out, _ = fedpers(*arguments)
            assert code == 1
            assert "2 of 3 runs finished, 0 refused, 1 failed" in out
            (entry,) = place.read(tmp_path / "out", place.FAILED).values()
            assert entry["coordinates"] == {"method": "fedavg", "privacy.epsilon": "8"}
            assert (entry["type"], entry["attempts"]) == (type(error).__name__, attempt)
            assert (str(error) in entry["message"]) == isinstance(error, FedpersError)
            assert (str(error) in out) == isinstance(error, FedpersError)
    assert pq.read_table(tmp_path / "out" / "results.parquet").num_rows == 2
    code, out, err = fedpers(*arguments)
    assert (code, place.read(tmp_path / "out", place.FAILED)) == (0, {})
    assert "3 of 3 runs finished, 0 refused, 0 failed" in out
    assert "method=fedavg, privacy.epsilon=8: accuracy" in err
    assert "cells: 1 ..." in err


def test_a_full_disk_stops_the_sweep(small: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, calls = expand(small), 0

    def full(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def told(*args: Any, **options: Any) -> Any:
        try:
            full()
        except OSError as error:
            raise RunDirectoryError("cannot be written.") from error

    for simulate in (full, told):
        monkeypatch.setattr(runner, "simulate", simulate)
        found = sweep(grid, tmp_path / "out")
        assert (found.good, found.finished, found.results) == (False, 0, None)
        assert found.stopped == f"cell ({grid.cells[0].label}): No space left on device"
        assert found.failed.keys() == {grid.cells[0].address}
    assert calls == 2


def test_what_holds_something_else_is_left_alone(small: Tree, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: a run\n")
    with pytest.raises(RunDirectoryError, match="no sweep"):
        sweep(expand(small), tmp_path)
    with pytest.raises(RunDirectoryError, match="no sweep"):
        sweep(expand(small), tmp_path / "config.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_ctrl_c_says_how_to_go_on(
    small: Tree, tmp_path: Path, fedpers: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(small))
    monkeypatch.setattr(runner, "simulate", interrupted)
    code, _, err = fedpers("sweep", tmp_path / "grid.yaml", "--out", tmp_path / "out", "--quiet")
    assert (code, err) == (130, "fedpers: stopped; continue with the same command.\n")
    with place.locked(tmp_path / "out", expand(small).cells[0].address, wait=False) as mine:
        assert mine


def test_a_lock_is_held_by_one_and_freed_by_the_end_of_its_process(tmp_path: Path) -> None:
    place.create(tmp_path)
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", f"{code}; time.sleep(60)", str(tmp_path / "locks" / "a")], stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with place.locked(tmp_path, "a", wait=False) as mine:
        assert not mine
    with place.locked(tmp_path, "b", wait=False) as mine:
        assert mine
    other.kill()
    other.communicate()
    with place.locked(tmp_path, "a", wait=False) as mine:
        assert mine


# --- the real program, several at once and killed from outside --------------------------------------------------------

# One process imports torch and its friends; each command is then a process forked from it, see test_resume.py.
PROGRAM = """
import json, os, sys
import torch
torch.set_num_threads(1)
from matplotlib.figure import Figure
from fedpers import cli
import fedpers.sweep.runner
Figure.savefig = lambda self, where, **_: where.write(b"a picture, undrawn")  # as in conftest.py
fedpers.sweep.pictures.FIGURES = ()
print("ready", flush=True)
while line := sys.stdin.readline():
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        log = os.open(os.devnull, os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["fedpers", "sweep", *job["start"]]
        cli.main()
    print(child, flush=True)
"""


@pytest.fixture(scope="module")
def processes(feature_cache: Path) -> Iterator[Callable[[Tree], int]]:
    """Sends one request to the program, and gives its answer."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env={**os.environ, "FEDPERS_CACHE": str(feature_cache)},
    )  # fmt: skip
    stdin, stdout = program.stdin, program.stdout
    assert stdin is not None
    assert stdout is not None
    assert stdout.readline() == "ready\n"

    def ask(job: Tree) -> int:
        print(json.dumps(job), file=stdin, flush=True)
        return int(stdout.readline())

    yield ask
    program.communicate(timeout=60)


@pytest.fixture
def start(small: Tree, tmp_path: Path, processes: Callable[[Tree], int]) -> Callable[..., int]:
    """Start a sweep of the small grid in a process of its own; gives its number."""
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(small))
    return lambda *options: processes({"start": [str(tmp_path / "grid.yaml"), *map(str, options)]})


def test_two_processes_on_one_directory_run_each_cell_once(
    start: Callable[..., int], processes: Callable[[Tree], int], swept: Path, tmp_path: Path
) -> None:
    pids = [start("--out", tmp_path / "out") for _ in range(2)]
    assert [processes({"wait": pid}) for pid in pids] == [0, 0]
    cells = list((tmp_path / "out" / "cells").iterdir())
    assert len(cells) == 5
    for cell in cells:
        lines = [json.loads(line) for line in (cell / "timing.jsonl").read_text().splitlines()]
        assert sorted(line["what"] for line in lines) in (["round 1", "round 2", "run"], ["run"])
    assert contents(tmp_path / "out") == contents(swept)


def test_killed_twice_the_results_are_the_same_bytes(
    start: Callable[..., int], processes: Callable[[Tree], int], swept: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for begun, late in ((2, "ledger.jsonl"), (4, "config.yaml")):
        pid = start("--out", out)
        deadline = time.monotonic() + 60
        while len(list(out.glob(f"cells/*/{late}"))) < begun and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        assert processes({"wait": pid}) == -signal.SIGKILL
        assert 0 < sum(1 for _ in out.glob("cells/*/summary.json")) < 5
    assert processes({"wait": start("--out", out)}) == 0
    assert contents(out) == contents(swept)


@pytest.mark.slow  # each process imports torch
def test_several_jobs_give_the_same_results(small: Tree, swept: Path, tmp_path: Path) -> None:
    """Of two cells, beside others that are there: whoever has run one finds that the other has it."""
    grid, out = expand(small), tmp_path / "out"
    shutil.copytree(swept, out)
    for name in (results.RESULTS, results.USERS):
        (out / name).unlink()
    for cell in grid.cells[1:3]:
        shutil.rmtree(out / "cells" / cell.address)
    assert sweep(grid, out, jobs=2).good
    assert contents(out) == contents(swept)
