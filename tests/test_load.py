"""A real SuperLink under many nodes and many rounds, and killed under way.

The nodes are SuperNodes' connections without their processes: Flower's own Fleet client, whose messages are answered
here.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_connection import http_request_response

from fedpers.flower import messages as wire
from fedpers.flower.node_app import app
from fedpers.flower.node_file import Limits
from fedpers.privacy.claim import Claim
from fedpers.privacy.ledger import Ledger
from test_deployment import app_folder, deployment
from test_node import RECORD, SMALL, USER_CENTRAL, USERS, Make, World, world

__all__ = ["world"]  # the fixture
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
INSECURE = "insecure = true"
Answer = Callable[[int, Message], Message | None]


class Fleet:
    """Nodes that poll one SuperLink in turn; what `answer` gives for a place and a message is sent, if anything."""

    def __init__(self, address: str, answer: Answer) -> None:
        self.address, self.answer, self.nodes = address, answer, list[Any]()
        self._stack = ExitStack()

    def grow(self, size: int) -> None:
        while len(self.nodes) < size:
            self.nodes.append(self._stack.enter_context(http_request_response(self.address, insecure=True)))

    def turn(self) -> None:
        """Let each node take a message, if there is one."""
        busy = False
        for place in range(len(self.nodes)):
            with suppress(RunNotRunningException):  # as a SuperNode does
                busy |= self._step(place)
        if not busy:
            time.sleep(0.1)

    def _step(self, place: int) -> bool:
        _, receive, send, _, _, pull, push, confirm = self.nodes[place]
        if (got := receive()) is None:
            return False
        name, run = got[0].metadata.message_id, got[0].metadata.run_id
        objects = [one.object_id for one in iterate_object_tree(got[1])]
        message = inflate_object_from_contents(name, pull_objects(objects, partial(pull, run)))
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = name
        confirm(run, name)
        if (reply := self.answer(place, message)) is None:
            return True
        reply.metadata.__dict__["_message_id"] = reply.object_id
        held = get_all_nested_objects(reply)
        wanted, session = send(reply, get_object_tree(reply), 0.1)
        for one in wanted:
            push(run, session, one, held[one].deflate())
        return True

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def hand_over(script: ModuleType, home: Path, here: World, folder: Path) -> Path:
    """Start the run, or what is left of it, on the SuperLink known there; returns its directory."""
    app = folder / "app"
    if not app.exists():
        app_folder(folder)
    out, people = here.folder / "server", here.folder / "people.json"
    settings = f'config="{here.path}" out="{out}" people="{people}" patience=600.0 timeout=600.0'
    script.call(["run", app, "here", "--run-config", settings], home, 600)
    return out


def children(pid: int) -> Iterator[int]:
    """Yield the processes below one."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            yield int(path.parent.name)
            yield from children(int(path.parent.name))


def server_app(link: int) -> int:
    """Return the process of the ServerApp that a SuperLink has started."""
    (found,) = [one for one in children(link) if b"flwr-serverapp" in Path(f"/proc/{one}/cmdline").read_bytes()]
    return found


def size(pid: int) -> tuple[int, int]:
    """Return the resident megabytes and the open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = int(status.partition("VmRSS:")[2].split()[0])
    return kilobytes // 1024, len(os.listdir(f"/proc/{pid}/fd"))


def nudged(message: Message) -> Message:
    """What a node answers, but for the training."""
    arrays = {name: array + np.float32(0.01) for name, array in wire.from_record(wire.arrays_of(message)).items()}
    return wire.reply(message, arrays, sorted(arrays))


def answer_until(over: Callable[[], bool], fleet: Fleet, seconds: float = 900) -> None:
    """Let the nodes answer."""
    deadline = time.monotonic() + seconds
    while not over():
        assert time.monotonic() < deadline, "the run does not go on"
        fleet.turn()


def finished(out: Path) -> tuple[Claim, Ledger]:
    """Read what a server ends with."""
    return Claim.from_json((out / "claim.json").read_text(encoding="utf-8")), Ledger.load(out / "ledger.jsonl")


def test_many_nodes_and_many_rounds(world: Make, tmp_path: Path) -> None:
    """Many rounds, after ten of which neither memory nor open files grow; then a round of many nodes."""
    script, few = deployment(), 2
    many, rounds = (200, 100) if os.environ.get("FEDPERS_LOAD") == "full" else (64, 25)  # in full: five minutes
    told: dict[str, Any] = {"share": "head", "privacy": {**USER_CENTRAL, "delta": 1e-3}, "client_rate": 1.0}
    long = world(Limits(), rounds=rounds, data={**SMALL["data"], "users": few}, **told)
    wide = world(Limits(), rounds=1, data={**SMALL["data"], "users": many}, **told)
    sizes: dict[int, dict[str, tuple[int, int]]] = {}
    counts: dict[int, int] = {}

    def answer(place: int, message: Message) -> Message:
        if message.metadata.message_type == "query":
            return wire.position_reply(message, place)
        number = wire.round_of(message)
        counts[number] = counts.get(number, 0) + 1
        if number in {11, rounds} and number not in sizes:
            sizes[number] = {"SuperLink": size(process.pid), "ServerApp": size(server_app(process.pid))}
        return nudged(message)

    port = script.free_ports(1)[0]
    started = script.superlink(tmp_path, ["--insecure"], INSECURE, port)
    with started as (home, process), Fleet(f"{script.HOST}:{port}", answer) as fleet:
        for here, users in ((long, few), (wide, many)):
            counts.clear()
            fleet.grow(users)
            out = hand_over(script, home, here, tmp_path)
            answer_until((out / "claim.json").exists, fleet)
            claim, ledger = finished(out)
            assert counts == dict.fromkeys(range(1, here.config.rounds + 1), users)
            assert claim.rounds == here.config.rounds
            assert 0 < claim.epsilon <= USER_CENTRAL["epsilon"]
            assert len(ledger.releases) == here.config.rounds
        print(f"(MB, open files): {sizes}; SuperLink at the end: {size(process.pid)}")
    for name, (megabytes, opened) in sizes[11].items():
        assert sizes[rounds][name][0] - megabytes < 10, name
        assert sizes[rounds][name][1] - opened < 10, name


def test_a_superlink_that_is_killed_in_a_round_and_started_again(world: Make, tmp_path: Path) -> None:
    """Its nodes connect again by themselves; the run is handed over again and goes on after its last checkpoint. No
    node answers a round twice, whoever asks: an answer that was lost with the SuperLink is paid for.
    """
    script = deployment()
    here = world(Limits(), method="fedbabu", privacy=RECORD, client_rate=1.0, rounds=3)
    answers: list[tuple[int, int, int]] = []  # round, place, code of a refusal or 0
    up, dying = True, True

    def answer(place: int, message: Message) -> Message | None:
        nonlocal up
        number = wire.round_of(message) if message.metadata.message_type == "train" else 0
        up = up and not (dying and number == 2 and place == 1)
        if not up:
            return None
        context = Context(1, message.metadata.dst_node_id, {"node": str(here.files[place])}, RecordDict(), {})
        reply = app(message, context)
        if number:
            answers.append((number, place, reply.error.code if reply.has_error() else 0))
        return reply

    flags, port = ["--insecure", "--database", tmp_path / "superlink.db"], script.free_ports(1)[0]
    with Fleet(f"{script.HOST}:{port}", answer) as fleet:
        with script.superlink(tmp_path, flags, INSECURE, port) as (home, process):
            fleet.grow(USERS)
            out = hand_over(script, home, here, tmp_path)
            answer_until(lambda: not up, fleet)
            for pid in [*children(process.pid), process.pid]:
                os.kill(pid, signal.SIGKILL)
        assert answers[-1] == (2, 0, 0)
        assert [line.round for line in Ledger.load(out / "ledger.jsonl").releases] == [1]
        up, dying = True, False
        with script.superlink(tmp_path, flags, INSECURE, port) as (home, process):
            hand_over(script, home, here, tmp_path)
            answer_until((out / "claim.json").exists, fleet)
    claim, ledger = finished(out)
    every = range(1, here.config.rounds + 1)
    assert [line.round for line in ledger.releases] == list(every)
    assert sorted(a[:2] for a in answers if a[2] == 0) == [
        (number, place) for number in every for place in range(USERS)
    ]
    assert (2, 0, wire.ROUND_REFUSED) in answers
    assert {code for _, _, code in answers} == {0, wire.ROUND_REFUSED}
    assert 0 < claim.epsilon <= RECORD["epsilon"]
    for place in range(USERS):
        assert [line.round for line in here.ledger(place).releases] == list(every)
        assert here.claim(place).epsilon == pytest.approx(claim.epsilon)
