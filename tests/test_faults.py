"""What breaks on the way: bad replies, failing clients, a full disk, a directory that cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from conftest import opening_fields
from fedpers import simulation
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config
from fedpers.errors import AssetError, PrivacyRefusal, RunDirectoryError
from fedpers.experiment import Reuse, prepare
from fedpers.flower import messages as wire
from fedpers.models.backbone import Backbone
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import Opening
from fedpers.run_directory import RunDirectory
from fedpers.simulation import simulate
from test_node import BAD_ARRAYS, RECORD, USER_CENTRAL, USERS, Make, Nodes, World, world
from test_refusals import REUSE, USER, Server
from test_resume import FEDPER_USER, SHORT, assert_same, expected, results, reuse, uninterrupted, without_figures

__all__ = ["expected", "reuse", "uninterrupted", "without_figures", "world"]  # fixtures
Tiny = Callable[..., Config]
HONEST = MetricRecord({wire.WEIGHT: 1})

# --- bad replies ------------------------------------------------------------------------------------------------------


def bad_contents(arrays: wire.Arrays) -> dict[str, RecordDict]:
    """What a client might send in the place of these arrays."""
    packed = {name: Array(np.array(array)) for name, array in arrays.items()}
    first = next(name for name in sorted(arrays) if len(set(arrays[name].shape)) > 1)

    def content(changed: dict[str, Array], metrics: MetricRecord = HONEST, **more: Any) -> RecordDict:
        return RecordDict({wire.ARRAYS: ArrayRecord(changed), wire.METRICS: metrics, **more})

    spoilt = {name: content({**packed, first: spoil(np.array(arrays[first]))}) for name, spoil in BAD_ARRAYS.items()}
    return spoilt | {
        "infinite": content({**packed, first: Array(np.full(arrays[first].shape, -np.inf, np.float32))}),
        "weight": content(packed, MetricRecord({wire.WEIGHT: 10**6})),
        "weights": content(packed, MetricRecord({wire.WEIGHT: [1, 1]})),
        "no weight": content(packed, MetricRecord()),
        "metrics": content(packed, MetricRecord({wire.WEIGHT: 1, "Bartholomew": 0.5})),
        "another name": content({**packed, "Bartholomew": packed[first]}),
        "a name less": content({name: array for name, array in packed.items() if name != first}),
        "more records": content(packed, Bartholomew=ConfigRecord({"x": b"x"})),
        "records of other kinds": RecordDict({wire.ARRAYS: HONEST, wire.METRICS: ArrayRecord(packed)}),
        "nothing": RecordDict(),
    }


def arrays_of(record: ArrayRecord | None) -> dict[str, bytes]:
    assert record is not None
    return {name: array.tobytes() for name, array in wire.from_record(record).items()}


@pytest.mark.parametrize("privacy", [{}, USER, {**USER, "trust": "user-local"}, {**USER, "unit": "record"}],
                         ids=["none", "user-central", "user-local", "record-local"])  # fmt: skip
def test_a_bad_reply_from_elsewhere_is_as_no_reply(tiny: Tiny, tmp_path: Path, privacy: dict[str, Any]) -> None:
    """The round goes on with the rest, to the byte; where the clients are ours the same reply is a bug to see."""
    server, told = Server(prepare(tiny(method="fedavg", share="head", privacy=privacy), REUSE), tmp_path), []
    sent = wire.from_record(wire.arrays_of(server.replies[0]))
    server.strategy._tell = told.append
    without = arrays_of(server.strategy.aggregate_train(1, server.replies[1:])[0])
    assert told == []
    (line,) = server.ledger.releases
    assert line.clients in (None, list(range(8))), "who was asked is charged"
    for name, content in bad_contents(sent).items():
        replies = [Message(content, reply_to=server.first), *server.replies[1:]]
        server.strategy._tell = told.append
        assert arrays_of(server.strategy.aggregate_train(1, replies)[0]) == without, name
        (said,) = told
        assert said.startswith("round 1: seat 0 is left out: a reply with "), name
        assert "Bartholomew" not in said
        told.clear()
        if name not in {"nan", "infinite"}:  # which count as zero there, and are counted
            server.strategy._tell = None
            with pytest.raises(PrivacyRefusal):
                server.strategy.aggregate_train(1, replies)
    assert server.ledger.releases == (line,), "the same noise on the same sum, whatever came besides"


def test_if_everybody_fails_the_noise_is_that_of_an_empty_round(tiny: Tiny, tmp_path: Path) -> None:
    found, said = [], []
    for name in ("failing", "empty"):
        (tmp_path / name).mkdir()
        server = Server(prepare(tiny(method="fedavg", share="head", privacy=USER), REUSE), tmp_path / name)
        server.strategy._tell = said.append
        failures = [wire.failure(server.first, wire.BUDGET_SPENT), *map(_stripped, server.replies[1:])]
        found.append(server.strategy.aggregate_train(1, failures if name == "failing" else [])[0])
        assert server.strategy.report is not None
        assert server.strategy.report.clients == 0
        assert len(server.ledger.releases) == 1
    before = wire.to_record(server.strategy._broadcast, server.clients.shared_names)
    assert arrays_of(found[0]) == arrays_of(found[1]) != arrays_of(before)
    assert said[0] == "round 1: seat 0 is left out: the node's privacy budget is spent"
    assert len(said) == 8


def _stripped(reply: Message) -> Message:
    reply.content.clear()
    return reply


Fault = Callable[[Message], list[Message]]


@dataclass
class Faulty(Nodes):
    """Nodes whose answers in a round are changed, by (round, position)."""

    faults: dict[tuple[int, int], Fault] = field(default_factory=dict)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies: list[Message] = []
        for message in messages:
            position, kind = self.numbers.index(message.metadata.dst_node_id), message.metadata.message_type
            fault = self.faults.get((wire.round_of(message), position)) if kind == "train" else None
            reply = self.deliver(message)
            replies += [reply] if fault is None else fault(reply)
        return replies


def _poisoned(reply: Message) -> list[Message]:
    arrays = wire.from_record(wire.arrays_of(reply))
    arrays[sorted(arrays)[0]][:] = np.nan
    reply.content[wire.ARRAYS] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return [reply]


def _heavy(reply: Message) -> list[Message]:
    reply.content[wire.METRICS] = MetricRecord({wire.WEIGHT: 1000})
    return [reply]


def _silent(reply: Message) -> list[Message]:
    return []


def _twice(reply: Message) -> list[Message]:
    return [reply, *_heavy(_copy(reply)), _copy(reply)]


def _with_a_stranger(reply: Message) -> list[Message]:
    return [_copy(reply, 31337), reply]


def _copy(reply: Message, node: int | None = None) -> Message:
    from copy import deepcopy

    other = deepcopy(reply)
    if node is not None:
        other.metadata.__dict__["_src_node_id"] = node
    return other


@pytest.mark.parametrize("privacy", [USER_CENTRAL, RECORD], ids=["user-central", "record-local"])
def test_a_deployment_goes_on_with_who_is_left(
    world: Make, privacy: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    here = world(shared=True, method="fedbabu", privacy=privacy, client_rate=1.0)
    faulty = {(1, 0): _poisoned, (1, 1): _twice, (1, 2): _with_a_stranger, (2, 0): _heavy, (2, 1): _silent}
    here.serve(Faulty(here.files, faults=faulty | {(2, 2): _poisoned}), "faulty")
    said = capsys.readouterr().out
    for line in (
        "round 1: seat 0 is left out: a reply with an array with numbers that are not finite",
        "round 2: seat 0 is left out: a reply with a num-examples other than 1",
        "round 2: seat 2 is left out: a reply with an array with numbers that are not finite",
    ):
        assert said.count(line) == 1
    assert said.count("is left out") == 3

    again = world(shared=True, method="fedbabu", privacy=privacy, client_rate=1.0)
    quiet = dict.fromkeys(((1, 0), (2, 0), (2, 1), (2, 2)), _silent)
    again.serve(Faulty(again.files, faults=quiet), "quiet")
    one, other = ended(here, "faulty"), ended(again, "quiet")
    assert {name: array.tobytes() for name, array in one[0].items()} == {n: a.tobytes() for n, a in other[0].items()}
    assert all(np.isfinite(array).all() for array in one[0].values())
    assert one[1].releases == other[1].releases
    guarantee = prepare(here.config).guarantee
    for line in one[1].releases:
        assert (line.noise_multiplier, line.clip) == (guarantee.noise_multiplier, guarantee.clip)
        assert line.clients in (None, list(range(USERS)))


@dataclass
class Slow(Nodes):
    """Nodes of which the first answers the first round when the second one is under way, before it answers that."""

    held: list[Message] = field(default_factory=list)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies: list[Message] = []
        for message in messages:
            # Flower's grids name each message that they send, and its answer says which one it is to.
            message.metadata.__dict__["_message_id"] = f"{len(self.seen)}"
            reply = self.deliver(message)
            number = wire.round_of(message) if message.metadata.message_type == "train" else 0
            if number == 1 and reply.metadata.src_node_id == self.numbers[0]:
                self.held = [reply]
                continue
            if number == 2:
                replies, self.held = [*replies, *self.held], []
            replies.append(reply)
        return replies


@pytest.mark.parametrize("privacy", [USER_CENTRAL, RECORD], ids=["user-central", "record-local"])
def test_a_late_answer_is_no_answer(world: Make, privacy: dict[str, Any]) -> None:
    """It would stand for the answer to the round that is under way; to the byte it is as if it had been lost. Who was
    asked is charged, by the server and by the node, whose answer somebody saw.
    """
    here = world(shared=True, method="fedbabu", privacy=privacy, client_rate=1.0)
    slow = Slow(here.files)
    here.serve(slow, "slow")
    assert slow.held == []
    again = world(shared=True, method="fedbabu", privacy=privacy, client_rate=1.0)
    again.serve(Faulty(again.files, faults={(1, 0): _silent}), "lost")
    one, other = ended(here, "slow"), ended(again, "lost")
    assert {name: array.tobytes() for name, array in one[0].items()} == {n: a.tobytes() for n, a in other[0].items()}
    assert one[1].releases == other[1].releases
    assert [line.clients for line in one[1].releases] in ([None] * 2, [list(range(USERS))] * 2)
    assert [line.round for line in here.ledger(0).releases] == [1, 2]


def ended(here: World, out: str) -> tuple[dict[str, NDArray[np.float32]], Ledger]:
    done = RunDirectory(here.folder / out).recover(PersonalStore(here.folder / "unused", 1, {}))
    assert done is not None
    assert done.round == 2
    return done.shared, Ledger.load(here.folder / out / "ledger.jsonl")


# --- a disk that cannot be written ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "number"), [(3, errno.ENOSPC), (5, errno.EROFS)])
def test_a_full_disk_is_told_and_made_good(
    tiny: Tiny,
    reuse: Reuse,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    number: int,
) -> None:
    """Whatever was being written: the message says what to do, and doing it ends in the same bytes."""
    config, original, count = tiny(**FEDPER_USER, **SHORT), os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count >= call:
            raise OSError(number, os.strerror(number))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunDirectoryError, match=rf"\({os.strerror(number)}\).*--resume") as raised:
            simulate(config, tmp_path / "run", reuse=reuse)
    assert "\n" not in str(raised.value)
    assert_same(results(simulate(config, tmp_path / "run", resume=True, reuse=reuse).path), expected)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_disk_that_fills_up_under_the_adapters_is_told_and_made_good(
    tiny: Tiny, reuse: Reuse, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors' own error for it is none of the system's."""
    config, fresh = tiny(**FEDPER_USER, **SHORT), RunDirectory.fresh_adapters

    def full(directory: RunDirectory) -> Path:
        folder = fresh(directory)
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").symlink_to("/dev/full")
        return folder

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "fresh_adapters", full)
        with pytest.raises(RunDirectoryError, match=r"run: cannot be written \(No space left on device\).*--resume"):
            simulate(config, tmp_path / "run", reuse=reuse)
    assert_same(results(simulate(config, tmp_path / "run", resume=True, reuse=reuse).path), expected)


def test_weights_that_are_a_pickle_are_not_loaded(random_tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_tiny_bert, tmp_path / "pickled")
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(AssetError, match=r"model\.safetensors"):
        Backbone(str(folder))


def test_other_errors_of_the_system_are_bugs_to_see(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(simulation, "prepare", broken)
    with pytest.raises(OSError, match="Bad file descriptor"):
        simulate(tiny(**SHORT), tmp_path / "run")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_a_directory_that_cannot_be_written_is_told(tiny: Tiny, reuse: Reuse) -> None:
    with pytest.raises(RunDirectoryError, match=r"/proc/self/fedpers: cannot be written"):
        simulate(tiny(**FEDPER_USER, **SHORT), Path("/proc/self/fedpers"), reuse=reuse)


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    """What was never synced was never released; the other lines stand."""
    path = tmp_path / "ledger.jsonl"
    Ledger.create(path, Opening(**opening_fields("user")))
    whole = path.read_bytes()
    for torn in (b'{"round": 1, "mech', b"\xff\x00", b"[" * 5000 + b"\n"):
        path.write_bytes(whole + torn)
        assert len(Ledger.rewind(path, 1)) == 1
        assert path.read_bytes() == whole
