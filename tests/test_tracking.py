"""Trackers, with the real packages: what they are told, that a run does not notice them, what their failure does."""

from __future__ import annotations

import csv
import json
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import SECRET, Command
from fedpers import tracking
from fedpers.config import Config, dump_config
from fedpers.errors import TrackingError
from fedpers.reporting import Reporter
from fedpers.run_directory import RunDirectory
from fedpers.simulation import Run, simulate
from fedpers.tracking import base

Read = tuple[dict[int, dict[str, float]], dict[str, float], str]  # numbers by round, results, claim
PRIVATE: dict[str, Any] = {
    "rounds": 3,
    "evaluation": {"local_only": False},
    "privacy": {"unit": "user", "epsilon": 8, "delta": 1e-3, "clip": 1.0, "secret": SECRET},
}


class Crash(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of the settings of whoever runs the tests, and a command line that must not be told."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["fedpers", "run", f"privacy.secret={SECRET}"])
    monkeypatch.setenv("HOME", str(tmp_path))


def read_csv(folder: Path) -> Read:
    rows = list(csv.DictReader((folder / "rounds.csv").open(encoding="utf-8")))
    assert [int(row["round"]) for row in rows] == list(range(1, len(rows) + 1))
    rounds = {int(row.pop("round")): {name: float(value) for name, value in row.items() if value} for row in rows}
    found = dict(list(csv.reader((folder / "results.csv").open(encoding="utf-8")))[1:])
    claim = found.pop("claim")
    return rounds, {name: float(value) for name, value in found.items()}, claim


def read_tensorboard(folder: Path) -> Read:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder))
    board.Reload()
    rounds: dict[int, dict[str, float]] = {}
    results = {}
    for tag in board.Tags()["scalars"]:
        kind, _, name = tag.partition("/")
        for point in board.Scalars(tag):
            into = rounds.setdefault(point.step, {}) if kind == "round" else results
            assert name not in into, "twice"
            into[name] = point.value
    (claim,) = board.Tensors("claim/text_summary")
    return dict(sorted(rounds.items())), results, claim.tensor_proto.string_val[0].decode()


def read_mlflow(folder: Path) -> Read:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder / "store").resolve().as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'fedpers'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["privacy.unit"] == "user"
    rounds: dict[int, dict[str, float]] = {}
    results = {}
    for tag in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, tag):
            into = results if tag.startswith("result/") else rounds.setdefault(point.step, {})
            assert tag.removeprefix("result/") not in into, "twice"
            into[tag.removeprefix("result/")] = point.value
    for number, row in rounds.items():
        assert row.pop("round") == number
    return dict(sorted(rounds.items())), results, run.data.tags["claim"]


def wandb_records(data: bytes) -> Iterator[bytes]:
    """What W&B's file holds: a header, then LevelDB's log format, in blocks of 32 KiB."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in {1, 4}:  # a whole record, or the last part of one
            yield whole
            whole = b""


def read_wandb(folder: Path) -> Read:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    rounds: dict[int, dict[str, float]] = {}
    told: dict[str, Any] = {}
    for data in wandb_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            assert record.history.step.num not in rounds, "twice"
            rounds[record.history.step.num] = {k: v for k, v in row.items() if not k.startswith("_")}
        for item in record.summary.update:
            told["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    results = {name.removeprefix("result/"): value for name, value in told.items() if name.startswith("result/")}
    return rounds, results, told["claim"]


READERS: dict[str, Callable[[Path], Read]] = {
    "csv": read_csv, "mlflow": read_mlflow, "tensorboard": read_tensorboard, "wandb": read_wandb,
}  # fmt: skip


def assert_told(run: Run, name: str) -> None:
    """The tracker has all rounds of rounds.parquet, each once, the results and the claim."""
    rounds, results, claim = READERS[name](run.path / "tracking" / name)
    rows = run.rounds.to_pylist()
    assert list(rounds) == [row["round"] for row in rows]
    for row in rows:
        left_out = {name for name, value in row.items() if value is None} | {"round", "median_update_norm"}
        expected = {name: value for name, value in row.items() if name not in left_out}
        assert rounds[row["round"]] == pytest.approx(expected)
    assert results["own_accuracy"] == pytest.approx(run.summary["metrics"]["own"]["mean"])
    assert results["epsilon"] == pytest.approx(run.claim.epsilon)
    assert results["helped_against_global"] == run.summary["comparisons"]["global"]["helped"]
    assert not any("worst" in one for one in results)
    assert claim == run.claim.sentence


def results(path: Path) -> dict[str, bytes]:
    """Everything in a run directory but what trackers wrote, wall times and the checkpoint's container."""
    apart = ("tracking/", "timing.jsonl", "summary.json", "private/checkpoint.safetensors")
    found = {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}
    found = {name: data for name, data in found.items() if not name.startswith(apart)}
    summary = json.loads((path / "summary.json").read_text())
    del summary["seconds"]
    return {**found, "summary": json.dumps(summary).encode()}


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return {}


@pytest.fixture
def untracked(tiny: Callable[..., Config], runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    if "untracked" not in runs:
        runs["untracked"] = simulate(tiny(**PRIVATE), tmp_path_factory.mktemp("untracked") / "run")
    return runs["untracked"]


@pytest.fixture
def tracked(
    tiny: Callable[..., Config], runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory, untracked: Run
) -> Run:
    if "tracked" not in runs:
        place = tmp_path_factory.mktemp("tracked") / "run"
        runs["tracked"] = simulate(tiny(**PRIVATE), place, track=tracking.NAMES)
    return runs["tracked"]


def test_a_run_does_not_notice_them(tracked: Run, untracked: Run) -> None:
    assert results(tracked.path) == results(untracked.path)
    assert not (untracked.path / "tracking").exists()


@pytest.mark.parametrize("name", tracking.NAMES)
def test_they_are_told_what_the_run_found(name: str, tracked: Run) -> None:
    assert_told(tracked, name)


def test_wandb_stays_offline_unless_told_otherwise(tracked: Run) -> None:
    folders = [one.name for one in (tracked.path / "tracking" / "wandb" / "wandb").iterdir() if one.is_dir()]
    assert all(one.startswith("offline-run-") for one in folders if "run-" in one)
    assert any(one.startswith("offline-run-") for one in folders)


def test_nothing_private_is_told(tracked: Run, tiny: Callable[..., Config]) -> None:
    secret = (tracked.path / "private" / "secret").read_text().strip()
    users = json.loads((tracked.path / "private" / "members.json").read_text())
    config = tiny(**PRIVATE)
    words = {"secret": secret, "given": SECRET, "folder": str(tracked.path.parent), "user": users[0][:-3],
             "backbone": config.model.backbone, "argument": "privacy.secret="}  # fmt: skip
    allowed = {("mlflow", "folder")}  # the store's own place, which its files name
    logs = {("wandb", "folder")}  # W&B's log of what it did: stays here, `wandb sync` leaves it out
    files = [one for one in (tracked.path / "tracking").rglob("*") if one.is_file()]
    assert len(files) > 50
    for file in files:
        data, tracker = file.read_bytes(), file.relative_to(tracked.path).parts[1]
        found = {(tracker, what) for what, word in words.items() if word.encode() in data}
        assert found <= (logs if "debug" in file.name else allowed), (file.name, found)
    assert config.model.backbone.rpartition("/")[2].encode() in b"".join(f.read_bytes() for f in files)  # they are read


def test_what_is_about_one_client_is_not_told() -> None:
    row = {"round": 4, "clients": 2, "train_loss": 1.5, "epsilon": 3.0, "median_update_norm": 0.5, "bytes_up": 8,
           "global_accuracy": 0.4, "own_accuracy": None, "signal_head": 0.1, "records_clipped": 3}  # fmt: skip
    told = {"clients": 2, "train_loss": 1.5, "epsilon": 3.0, "bytes_up": 8, "global_accuracy": 0.4, "signal_head": 0.1,
            "records_clipped": 3}  # fmt: skip
    assert base.numbers(row, 2) == told
    everybody = {"clients": 1, "epsilon": 3.0, "bytes_up": 8, "global_accuracy": 0.4}
    assert base.numbers({**row, "clients": 1}, 2) == everybody


def test_nothing_is_told_of_a_user_who_is_alone() -> None:
    row = {"round": 4, "clients": 1, "epsilon": 3.0, "bytes_up": 8, "global_accuracy": 0.4, "own_accuracy": 0.5}
    assert base.numbers(row, 1) == {"clients": 1, "epsilon": 3.0, "bytes_up": 8}
    measured = {"mean": 0.4, "ci95": (0.4, 0.4)}
    summary = {"users": 1, "rounds": 2, "metric": "accuracy", "metrics": {"own": measured}, "comparisons": {}}
    assert base.totals(summary, 3.0) == {"users": 1, "rounds": 2, "epsilon": 3.0}
    assert "own_accuracy" in base.totals({**summary, "users": 2}, 3.0)


@pytest.mark.parametrize("when", ["before the second round is final", "before a tracker hears of the second round"])
def test_a_resumed_run_is_told_once(
    when: str, tiny: Callable[..., Config], tracked: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = RunDirectory if "final" in when else base.Tracking
    name = "commit" if "final" in when else "rounds"
    original, count = getattr(owner, name), 0

    def crashing(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == (2 if "final" in when else 3):  # `rounds` is called at the start, too
            raise Crash
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crashing)
        with pytest.raises(Crash):
            simulate(tiny(**PRIVATE), tmp_path / "run", track=tracking.NAMES)
    run = simulate(tiny(**PRIVATE), tmp_path / "run", resume=True, track=tracking.NAMES)
    assert results(run.path) == results(tracked.path)
    for one in tracking.NAMES:
        assert_told(run, one)


def test_a_finished_run_is_told_afterwards(tiny: Callable[..., Config], untracked: Run) -> None:
    before = results(untracked.path)
    run = simulate(tiny(**PRIVATE), untracked.path, resume=True, track=["csv"])
    assert_told(run, "csv")
    assert results(run.path) == before


class Failing:
    """A tracker that fails in one call, and remembers all."""

    name = "failing"

    def __init__(self, *fails: str) -> None:
        self.fails, self.calls = fails, list[Any]()

    def _call(self, *what: Any) -> None:
        self.calls.append(what)
        if " ".join(map(str, what)) in self.fails:
            raise OSError(f"the disk of {what[0]} is full")

    def start(self, run: str, config: Mapping[str, str], folder: Path) -> int:
        self._call("start")
        return 0

    def round(self, number: int, numbers: Mapping[str, float]) -> None:
        self._call("round", number)

    def finish(self, numbers: Mapping[str, float], claim: str) -> None:
        self._call("finish")

    def close(self) -> None:
        self._call("close")


class Heard(Reporter):
    def __init__(self) -> None:
        self.lines = list[str]()

    def message(self, text: str) -> None:
        self.lines.append(text)


FAILURES: dict[str, list[tuple[Any, ...]]] = {
    "round 2": [("start",), ("round", 1), ("round", 2), ("close",)],
    "finish": [("start",), ("round", 1), ("round", 2), ("round", 3), ("finish",), ("close",)],
    "close": [("start",), ("round", 1), ("round", 2), ("round", 3), ("finish",), ("close",)],
}


@pytest.mark.parametrize("fails", FAILURES)
def test_a_failing_tracker_is_told_and_stops_nothing(
    fails: str, tiny: Callable[..., Config], untracked: Run, tmp_path: Path
) -> None:
    failing, heard = Failing(fails), Heard()
    with pytest.raises(TrackingError, match=r"is finished and whole.*tracker failing: OSError: .* full; .*--resume"):
        simulate(tiny(**PRIVATE), tmp_path / "run", reporter=heard, track=[failing, "csv"])
    assert failing.calls == FAILURES[fails]
    assert any("tracker failing" in line for line in heard.lines)
    assert results(tmp_path / "run") == results(untracked.path)
    mended = Failing()
    run = simulate(tiny(**PRIVATE), tmp_path / "run", resume=True, track=[mended])
    assert mended.calls == FAILURES["finish"]
    assert_told(run, "csv")


def test_one_that_does_not_start_stops_the_run_before_it_trains(
    tiny: Callable[..., Config], untracked: Run, tmp_path: Path
) -> None:
    with pytest.raises(TrackingError, match=r"tracker failing: cannot be started \(OSError.*leave it out.*--resume"):
        simulate(tiny(**PRIVATE), tmp_path / "run", track=["csv", Failing("start")])
    assert not (tmp_path / "run" / "ledger.jsonl").exists()
    simulate(tiny(**PRIVATE), tmp_path / "run", resume=True)
    assert results(tmp_path / "run") == results(untracked.path)


def test_an_error_of_the_run_is_not_hidden_by_one_of_a_tracker(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: Any) -> None:
        raise Crash

    monkeypatch.setattr(RunDirectory, "commit", crash)
    failing = Failing("close")
    with pytest.raises(Crash):
        simulate(tiny(**PRIVATE), tmp_path / "run", track=[failing])
    assert failing.calls == [("start",), ("close",)]


@pytest.mark.parametrize("name", ["mlflow", "tensorboard", "wandb"])
def test_a_missing_package_is_told_before_anything_is_written(
    name: str, tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in list(sys.modules):
        if package.partition(".")[0] == name:
            monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrackingError, match=rf'tracker {name}: .*pip install "fedpers\[{name}\]"'):
        simulate(tiny(**PRIVATE), tmp_path / "run", track=[name])
    assert not (tmp_path / "run").exists()


def test_the_command(fedpers: Command, tiny: Callable[..., Config], tmp_path: Path, untracked: Run) -> None:
    file, out = tmp_path / "tiny.yaml", tmp_path / "run"
    file.write_text(dump_config(tiny(**PRIVATE)).replace("privacy:\n", f"privacy:\n  secret: {SECRET}\n"))
    code, said, err = fedpers("run", file, "--out", out, "--track", "tensorbord", "--quiet")
    assert (code, said) == (2, "")
    assert err == (
        "fedpers: tracker 'tensorbord': unknown; did you mean 'tensorboard'? known: csv, mlflow, tensorboard, wandb.\n"
    )
    assert not out.exists()
    code, said, err = fedpers("run", file, "--out", out, "--track", "csv", "--track", "tensorboard", "--quiet")
    assert (code, err) == (0, "")
    assert sorted(one.name for one in (out / "tracking").iterdir()) == ["csv", "tensorboard"]
    assert results(out) == results(untracked.path)
