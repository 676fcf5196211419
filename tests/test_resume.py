"""Runs that are killed, interrupted or damaged: what is resumed ends as if nothing had happened, or is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedpers.privacy.ledger as ledger_module
from conftest import SECRET
from fedpers import cli, run_directory, simulation
from fedpers.cohort import saving
from fedpers.cohort.clients import Clients
from fedpers.cohort.model import CohortModel
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config, dump_config
from fedpers.errors import FedpersError, LedgerError, RunDirectoryError
from fedpers.experiment import Reuse
from fedpers.privacy.ledger import Ledger
from fedpers.run_directory import RunDirectory
from fedpers.simulation import simulate

FEDPER_USER: dict[str, Any] = {  # personal heads move in the rounds, momenta on the server, noise at the server
    "method": "fedper",
    "rounds": 2,
    "server": {"strategy": "FedAdam", "options": {"eta": 0.05, "tau": 0.01}},
    "privacy": {"unit": "user", "epsilon": 8, "delta": 1e-3, "clip": 1.0, "secret": SECRET},
    "engine": {"threads": 1},
}
FEDBABU_RECORD: dict[str, Any] = {
    "method": "fedbabu",
    "privacy": {"unit": "record", "epsilon": 8, "delta": 1e-3, "clip": 1.0, "record_rate": 0.5, "secret": SECRET},
    "engine": {"threads": 1},
}
SHORT: dict[str, Any] = {"evaluation": {"local_only": False, "every": 0}}


class Crash(BaseException):
    """Stands for the end of the process: nothing in fedpers may catch it."""


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def results(path: Path) -> dict[str, bytes]:
    """What must not depend on how often the run was stopped: all but wall times and the checkpoint's container."""
    apart = {"timing.jsonl", "summary.json", "private/checkpoint.safetensors"}
    found = {name: data for name, data in files(path).items() if name not in apart}
    summary = json.loads((path / "summary.json").read_text())
    del summary["seconds"]
    return {**found, "summary.json": json.dumps(summary).encode()}


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert sorted(found.keys() ^ expected.keys()) == []
    assert [name for name in expected if found[name] != expected[name]] == []


# --- crashes at every step of a round, in this process ----------------------------------------------------------------


@pytest.fixture(scope="module")
def reuse() -> Reuse:
    return Reuse()


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn from files that are compared anyway."""
    monkeypatch.setattr(simulation, "learning_curve", lambda *args, **options: None)
    monkeypatch.setattr(simulation, "per_user_gain", lambda *args, **options: None)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"": tmp_path_factory.mktemp("uninterrupted")}


@pytest.fixture
def expected(
    tiny: Callable[..., Config], reuse: Reuse, uninterrupted: dict[str, Path], without_figures: None
) -> dict[str, bytes]:
    """The short fedper run that nothing stopped."""
    if "short" not in uninterrupted:
        uninterrupted["short"] = simulate(
            tiny(**FEDPER_USER, **SHORT), uninterrupted[""] / "short", reuse=reuse
        ).path  # fmt: skip
    return results(uninterrupted["short"])


def crash_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, when: str) -> None:
    """Make the `call`-th call of a function the last thing that happens, or the first that does not."""
    original, count = getattr(owner, name), 0

    def crashing(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and when == "before":
            raise Crash
        result = original(*args, **options)
        if count == call:
            raise Crash
        return result

    patch.setattr(owner, name, crashing)


def half_apply(patch: pytest.MonkeyPatch) -> None:
    """Crash in the second round when the first of the personal arrays is written and the others are not."""
    original, count = PersonalStore.apply, 0

    def crashing(self: PersonalStore, users: Any, rows: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            name, array = next(iter(self.arrays.items()))
            array[list(users)] = rows[name]
            array.flush()
            raise Crash
        original(self, users, rows)

    patch.setattr(PersonalStore, "apply", crashing)


def half_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """Crash while the second round's checkpoint is written."""
    original, count = run_directory._save, 0

    def crashing(path: Path, arrays: Any, metadata: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            path.with_suffix(".partial").write_bytes(path.read_bytes()[:-30])
            raise Crash
        original(path, arrays, metadata)

    patch.setattr(run_directory, "_save", crashing)


def half_adapters(patch: pytest.MonkeyPatch) -> None:
    """Crash while the shared adapter is written: safetensors writes to a file with a random name first."""

    def crashing(model: CohortModel, directory: Path, arrays: Any) -> None:
        directory.mkdir(parents=True)
        (directory / ".tmpwhatever").write_bytes(b"half")
        raise Crash

    patch.setattr(saving, "save_shared", crashing)


def half_ledger_line(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Crash while a line of the ledger is written."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original, count = ledger_module._write_through, 0

        def crashing(descriptor: int, line: str) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.write(descriptor, line[: len(line) // 2].encode())
                raise Crash
            original(descriptor, line)

        patch.setattr(ledger_module, "_write_through", crashing)

    return apply


def at(owner: Any, name: str, call: int, when: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: crash_at(patch, owner, name, call, when)


# _save is called twice per round: for the journal, then for the checkpoint.
CRASHES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the ledger's opening is torn": half_ledger_line(1),
    "the ledger is empty": at(ledger_module, "_write_through", 1, "before"),
    "first release in the ledger, nothing committed": at(Ledger, "append", 1, "after"),
    "first journal, no checkpoint": at(run_directory, "_save", 1, "after"),
    "first checkpoint, rows not applied": at(PersonalStore, "apply", 1, "before"),
    "second release torn": half_ledger_line(3),
    "second release in the ledger, nothing committed": at(Ledger, "append", 2, "after"),
    "second journal, old checkpoint": at(run_directory, "_save", 3, "after"),
    "second checkpoint half written": half_checkpoint,
    "second checkpoint, rows not applied": at(PersonalStore, "apply", 2, "before"),
    "second checkpoint, rows half applied": half_apply,
    "second round applied, journal still there": at(PersonalStore, "apply", 2, "after"),
    "training at home": at(PersonalStore, "apply", 3, "after"),
    "adapters half written": half_adapters,
    "users table written, claim not": at(RunDirectory, "write_text", 1, "before"),
    "all but the summary": at(RunDirectory, "write_text", 2, "before"),
}


@pytest.mark.parametrize("crash", CRASHES)
def test_a_crash_between_any_two_steps_is_made_good(
    crash: str,
    tiny: Callable[..., Config],
    reuse: Reuse,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny(**FEDPER_USER, **SHORT)
    with monkeypatch.context() as patch:
        CRASHES[crash](patch)
        with pytest.raises(Crash):
            simulate(config, tmp_path / "run", reuse=reuse)
    assert not RunDirectory(tmp_path / "run").finished
    assert_same(results(simulate(config, tmp_path / "run", resume=True, reuse=reuse).path), expected)


def test_a_second_crash_in_the_repeated_round(
    tiny: Callable[..., Config],
    reuse: Reuse,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The repeated round replays the ledger line of the first attempt, and may itself be repeated."""
    config = tiny(**FEDPER_USER, **SHORT)
    for crash in ("second journal, old checkpoint", "first journal, no checkpoint"):  # after resuming: round 2 again
        with monkeypatch.context() as patch:
            CRASHES[crash](patch)
            with pytest.raises(Crash):
                simulate(config, tmp_path / "run", resume=True, reuse=reuse)
    assert len((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()) == 3
    assert_same(results(simulate(config, tmp_path / "run", resume=True, reuse=reuse).path), expected)


def test_a_resumed_run_keeps_saying_that_its_secret_was_given(
    tiny: Callable[..., Config], reuse: Reuse, tmp_path: Path, without_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**FEDPER_USER, **SHORT, "rounds": 1}
    with monkeypatch.context() as patch:
        crash_at(patch, Ledger, "create", 1, "before")  # no line says yet where the secret comes from
        with pytest.raises(Crash):
            simulate(tiny(**settings), tmp_path / "run", reuse=reuse)
    settings["privacy"] = {**settings["privacy"], "secret": None}
    claim = simulate(tiny(**settings), tmp_path / "run", resume=True, reuse=reuse).claim
    assert claim.secret == "given in the configuration"


# --- damage, and resuming something else ------------------------------------------------------------------------------


@pytest.fixture
def stopped(
    tiny: Callable[..., Config], reuse: Reuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_figures: None
) -> Path:
    """A run that was killed in its second round, with checkpoint, journal and ledger."""
    place = tmp_path / "run"
    with monkeypatch.context() as patch:
        crash_at(patch, PersonalStore, "apply", 2, "before")
        with pytest.raises(Crash):
            simulate(tiny(**FEDPER_USER, **SHORT), place, reuse=reuse)
    return place


def test_damage_is_found_and_nothing_is_changed(
    stopped: Path, tiny: Callable[..., Config], reuse: Reuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-8])

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-5] ^= 0x10
        path.write_bytes(data)

    def edit_first_release(path: Path) -> None:
        lines = path.read_text().splitlines(keepends=True)
        changed = lines[1].replace('"round":1', '"round":2')
        assert changed != lines[1]
        path.write_text("".join([lines[0], changed, *lines[2:]]))

    def drop_last_line(path: Path) -> None:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))

    def drop(path: Path) -> None:
        path.unlink()

    head = "private/rounds/head.direction.weight.npy"
    cases: list[tuple[str, Callable[[Path], None], type[FedpersError]]] = [
        ("private/checkpoint.safetensors", cut, RunDirectoryError),
        ("private/checkpoint.safetensors", flip, RunDirectoryError),
        ("private/journal.safetensors", cut, RunDirectoryError),
        ("private/journal.safetensors", flip, RunDirectoryError),
        ("private/secret", cut, RunDirectoryError),
        ("private/secret", drop, RunDirectoryError),
        (head, cut, RunDirectoryError),
        ("ledger.jsonl", edit_first_release, LedgerError),
        ("ledger.jsonl", drop_last_line, LedgerError),
        ("config.yaml", lambda path: path.write_text("a: ["), RunDirectoryError),
    ]
    config = tiny(**FEDPER_USER, **SHORT)
    monkeypatch.setattr(Clients, "train_round", None)  # none of them may come so far
    for number, (name, damage, kind) in enumerate(cases):
        place = tmp_path / str(number)
        shutil.copytree(stopped, place)
        damage(place / name)
        before = files(place)
        with pytest.raises(kind) as raised:
            simulate(config, place, resume=True, reuse=reuse)
        assert name.rpartition("/")[2] in str(raised.value)
        assert "\n" not in str(raised.value)
        assert files(place) == before


def test_a_flipped_byte_anywhere_in_a_checkpoint_is_found(stopped: Path) -> None:
    path = stopped / "private" / "checkpoint.safetensors"
    data = path.read_bytes()
    run_directory._load(path)
    for place in range(0, len(data), 13):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x01]) + data[place + 1 :])
        with pytest.raises(RunDirectoryError, match="is damaged"):
            run_directory._load(path)


def test_another_whole_ledger_is_not_taken(
    stopped: Path, tiny: Callable[..., Config], reuse: Reuse, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """A ledger can be rewritten with a sound chain; the checkpoint knows which line it was made after."""
    settings = {**FEDPER_USER, **SHORT}
    settings["privacy"] = {**settings["privacy"], "secret": "ab" * 32}
    other = simulate(tiny(**settings), tmp_path / "other", reuse=reuse)
    shutil.copy(other.path / "ledger.jsonl", stopped / "ledger.jsonl")
    with pytest.raises(LedgerError, match="not the one that the checkpoint"):
        simulate(tiny(**FEDPER_USER, **SHORT), stopped, resume=True, reuse=reuse)


def test_resuming_with_another_configuration_names_the_keys(
    stopped: Path, tiny: Callable[..., Config], reuse: Reuse
) -> None:
    before = files(stopped)
    changed = tiny(**{**FEDPER_USER, **SHORT, "rounds": 3, "local": {"lr": {"adapter": 0.25}}})
    with pytest.raises(RunDirectoryError, match=r"differs .* in local\.lr\.adapter, rounds;"):
        simulate(changed, stopped, resume=True, reuse=reuse)
    settings = {**FEDPER_USER, **SHORT}
    settings["privacy"] = {**settings["privacy"], "secret": "cd" * 32}
    with pytest.raises(RunDirectoryError, match=r"not started with this privacy\.secret"):
        simulate(tiny(**settings), stopped, resume=True, reuse=reuse)
    with pytest.raises(RunDirectoryError, match="holds another run"):
        simulate(tiny(**FEDPER_USER, **SHORT), stopped, reuse=reuse)
    assert files(stopped) == before


def test_a_finished_run_is_returned_without_training(
    tiny: Callable[..., Config],
    reuse: Reuse,
    expected: dict[str, bytes],
    uninterrupted: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = uninterrupted["short"]
    before = files(place)
    monkeypatch.setattr(Clients, "train_round", None)
    monkeypatch.setattr(Clients, "finish", None)
    monkeypatch.setattr(simulation, "build_model", None)
    found = simulate(tiny(**FEDPER_USER, **SHORT), place, resume=True, reuse=reuse)
    assert files(place) == before
    assert found.summary == json.loads(before["summary.json"])
    assert found.users.num_rows == 8 * 4


@pytest.mark.parametrize("exists", [True, False])
def test_resume_starts_what_is_not_there(
    exists: bool, tiny: Callable[..., Config], reuse: Reuse, expected: dict[str, bytes], tmp_path: Path
) -> None:
    place = tmp_path / "run"
    if exists:
        place.mkdir()
    assert_same(results(simulate(tiny(**FEDPER_USER, **SHORT), place, resume=True, reuse=reuse).path), expected)


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "c.yaml").write_text("name: c\n")
    monkeypatch.setattr(simulation, "prepare", interrupted)
    monkeypatch.setattr(sys, "argv", ["fedpers", "run", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130
    assert capfd.readouterr().err == "fedpers: stopped; continue with the same command and --resume.\n"


# --- the real program, killed from outside ----------------------------------------------------------------------------

# Importing torch and its friends takes longer than a tiny run. So one process imports, and warms up by a run; each
# command is then a process forked from it, with a pid, memory and an end of its own. It keeps to one thread, since
# OpenMP's pool does not survive a fork.
PROGRAM = """
import gc, json, os, signal, sys
from pathlib import Path
import torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
torch.set_num_threads(1)
from fedpers import cli, load_config, simulate
for name in sys.argv[2:]:
    simulate(load_config(Path(name)), Path(sys.argv[1]) / ("warm-" + Path(name).stem))
gc.freeze()
print("ready", flush=True)
while line := sys.stdin.readline():
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["fedpers", *job["arguments"]]
        cli.main()
    print(child, flush=True)
    sys.stdin.readline()  # until the test has sent its signal, so that it never goes to another process
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
KILLED_FEDPER = {**FEDPER_USER, "rounds": 6, "client_rate": 0.7}
KILLED_FEDBABU = {**FEDBABU_RECORD, "rounds": 6}


class Program:
    """Starts `fedpers` commands, one at a time."""

    def __init__(self, folder: Path, configs: dict[str, Config]) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}  # that an undisturbed run takes
        self._whole: dict[str, dict[str, bytes]] = {}
        for name, config in configs.items():
            text = dump_config(config).replace("privacy:\n", f"privacy:\n  secret: {config.privacy.secret}\n")
            (folder / f"{name}.yaml").write_text(text)
        names = [str(folder / f"{name}.yaml") for name in configs]
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), *names],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._answer() == "ready"

    def run(
        self, name: str, out: Path, *options: str, until: Path | None = None, after: float | None = None,
        stop: int = signal.SIGKILL,
    ) -> tuple[int, str]:  # fmt: skip
        """Run a configuration, stopped as soon as the file `until` is new or another, or `after` some seconds; returns
        exit code and output.
        """
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        before = _state(until)
        job = {"arguments": ["run", str(self.folder / f"{name}.yaml"), "--out", str(out), *options], "log": str(log)}
        self._tell(json.dumps(job))
        pid = int(self._answer())
        assert pid > 1
        if until is not None:
            deadline = time.monotonic() + 30
            over = out / "summary.json"
            while _state(until) in {None, before} and not over.exists() and time.monotonic() < deadline:
                time.sleep(0.0005)
            after = DELAYS.choice([0, 0.002, 0.02])
        if after is not None:
            time.sleep(after)
            os.kill(pid, stop)
        self._tell("wait for its end")
        return int(self._answer()), log.read_text() if log.exists() else ""

    def uninterrupted(self, name: str) -> dict[str, bytes]:
        """Results of a run in a process of its own that nothing stops."""
        if name not in self._whole:
            began = time.monotonic()
            assert self.run(name, self.folder / name)[0] == 0
            self.seconds[name] = time.monotonic() - began
            self._whole[name] = results(self.folder / name)
        return self._whole[name]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


DELAYS = random.Random(0)  # after the file has changed, in seconds: where exactly the kill hits is chance anyway


def _state(path: Path | None) -> tuple[int, ...] | None:
    try:
        found = path.stat() if path else None
    except FileNotFoundError:
        return None
    return found and (found.st_ino, found.st_size, found.st_mtime_ns)


@pytest.fixture(scope="module")
def programs() -> Iterator[list[Program]]:
    started: list[Program] = []
    yield started
    for program in started:
        program.close()


@pytest.fixture
def program(tiny: Callable[..., Config], programs: list[Program], tmp_path_factory: pytest.TempPathFactory) -> Program:
    if not programs:
        configs = {"fedper": tiny(**KILLED_FEDPER), "fedbabu": tiny(**KILLED_FEDBABU)}
        programs.append(Program(tmp_path_factory.mktemp("program"), configs))
    return programs[0]


KILLS = (
    "config.yaml",  # before anything else
    "ledger.jsonl",  # the opening line
    "ledger.jsonl",  # the first release, before the first checkpoint
    "private",  # a journal is begun
    "private/checkpoint.safetensors",
    "private/rounds/written.npy",
    "timing.jsonl",  # a round is noted
    "private/own/written.npy",  # training at home
    "private/local/written.npy",
    "users.parquet",
    "figures/learning_curve.png",
)


@pytest.mark.slow
def test_kill_nine_again_and_again(program: Program, tmp_path: Path) -> None:
    """Of a run whose clients add the noise; the one whose server does is killed at random moments below."""
    name, place, codes = "fedbabu", tmp_path / "killed", []
    for moment in KILLS:
        code, output = program.run(name, place, "--resume", until=place / moment)
        codes.append(code)
        assert code in {-signal.SIGKILL, 0}, output
        if code == 0:  # the kill came too late, which can happen at the last moments alone
            break
    assert codes.count(-signal.SIGKILL) >= 6
    code, output = program.run(name, place, "--resume")
    assert code == 0, output
    assert_same(results(place), program.uninterrupted(name))


@pytest.mark.slow
def test_kill_nine_at_twenty_random_moments(program: Program, tmp_path: Path) -> None:
    """The clock alone says where. A run that comes to its end all the same is compared, and another takes its place."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    moments, kills, run = random.Random(seed), 0, 0
    expected = program.uninterrupted("fedper")
    while kills < 20:
        place = tmp_path / str(run)
        # Not up to the end: what comes after the rounds is begun anew each time, and is seldom all done before a kill.
        after = moments.uniform(0, 0.7 * program.seconds["fedper"])
        code, output = program.run("fedper", place, "--resume", after=after)
        assert code in {-signal.SIGKILL, 0}, output
        kills += code == -signal.SIGKILL
        if code == 0:
            assert_same(results(place), expected)
            run += 1
            assert run < 20, f"after {kills} kills"
    code, output = program.run("fedper", place, "--resume")
    assert code == 0, output
    assert_same(results(place), expected)


@pytest.mark.slow
def test_ctrl_c_leaves_a_resumable_run(program: Program, tmp_path: Path) -> None:
    place = tmp_path / "stopped"
    code, output = program.run("fedper", place, until=place / "timing.jsonl", stop=signal.SIGINT)
    assert code == 130
    assert output.splitlines()[-1] == "fedpers: stopped; continue with the same command and --resume."
    assert "Traceback" not in output
    assert not (place / "summary.json").exists()
    assert program.run("fedper", place)[0] == 2  # without --resume nothing is written over
    assert program.run("fedper", place, "--resume")[0] == 0
    assert_same(results(place), program.uninterrupted("fedper"))


def test_personal_state_moves_in_the_rounds_of_what_is_killed_here(expected: dict[str, bytes]) -> None:
    """Otherwise the tests above would hold whatever becomes of it."""
    rows = np.frombuffer(expected["private/rounds/head.direction.weight.npy"][-8 * 32 * 4 :], np.float32)
    assert rows.all()  # the head's direction starts at 0
