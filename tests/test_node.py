"""Nodes that trust no server: limits, ledger and state of their own; a hostile server gets fixed codes alone."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from conftest import SECRET
from fedpers.cohort.clients import Clients
from fedpers.cohort.layout import layout
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config, result_text
from fedpers.data import load
from fedpers.errors import ConfigError, DataError, LedgerError, PrivacyRefusal, RunDirectoryError
from fedpers.experiment import build_model, prepare
from fedpers.flower import messages as wire
from fedpers.flower import node as node_module
from fedpers.flower.at_home import train_at_home
from fedpers.flower.node import alone, configuration_hash
from fedpers.flower.node_app import app
from fedpers.flower.node_file import Limits, OwnerFile, People, UserFile, place_of, read, write_nodes
from fedpers.flower.pinned import write_commands
from fedpers.flower.roll import Roll
from fedpers.flower.server_app import serve
from fedpers.models import adapters
from fedpers.privacy.claim import Claim
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import EACH_ITS_OWN, SHARED, Secret
from fedpers.privacy.randomness import run_keys, seed_key
from fedpers.privacy.spending import composed
from fedpers.reporting import Reporter
from fedpers.rounds import federate
from fedpers.run_directory import RunDirectory

Arrays = dict[str, NDArray[np.float32]]
KEY = bytes.fromhex(SECRET)
USERS = 3
RECORD = {"unit": "record", "epsilon": 8, "delta": 0.001, "clip": 0.5, "record_rate": 0.5}
USER_LOCAL = {"unit": "user", "trust": "user-local", "epsilon": 50, "delta": 0.01, "clip": 0.5}
USER_CENTRAL = {"unit": "user", "epsilon": 8, "delta": 0.01, "clip": 0.05}
OPEN = Limits(unprotected=True)
SMALL: dict[str, Any] = {
    "rounds": 2, "evaluation": {"every": 0}, "personal": {"epochs": 1},
    "data": {"users": USERS, "max_train": 6, "max_test": 4, "max_tokens": 8},
}  # fmt: skip


@dataclass
class Nodes:
    """A grid in this process whose nodes have random numbers, as Flower's have; each message passes as a copy."""

    files: list[Path]
    numbers: list[int] = field(default_factory=lambda: [9001, 4001, 7001])
    absent: set[int] = field(default_factory=set)  # positions
    seen: list[tuple[Message, Message]] = field(default_factory=list)

    def get_node_ids(self) -> list[int]:
        return [number for place, number in enumerate(self.numbers) if place not in self.absent]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self.deliver(message) for message in messages]

    def deliver(self, message: Message) -> Message:
        sent = copy.deepcopy(message)
        path = self.files[self.numbers.index(sent.metadata.dst_node_id)]
        context = Context(1, sent.metadata.dst_node_id, {"node": str(path)}, RecordDict(), {})
        reply = app(copy.deepcopy(sent), context)
        self.seen.append((sent, copy.deepcopy(reply)))
        return reply


@dataclass
class World:
    """A configuration's file, and a node for each user."""

    config: Config
    path: Path
    files: list[Path]
    folder: Path

    @property
    def nodes(self) -> Nodes:
        return Nodes(self.files)

    def serve(self, nodes: Nodes, out: str = "server", **settings: Any) -> Claim:
        people = self.folder / "people.json"
        told = {"config": str(self.path), "out": str(self.folder / out), "people": str(people), "patience": 0.0}
        return serve(nodes, told | settings)

    def state(self, place: int = 0) -> Path:
        return self.files[place].parent / "state"

    def claim(self, place: int = 0) -> Claim:
        return Claim.from_json((self.state(place) / "claim.json").read_text(encoding="utf-8"))

    def change(self, name: str, section: str, **values: Any) -> None:
        """Change a section of the first node's own `config.yaml` or `node.yaml`."""
        path = self.files[0].parent / name
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        tree[section].update(values)
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")

    def ledger(self, place: int = 0) -> Ledger:
        return Ledger.load(self.state(place) / "ledger.jsonl")

    @cached_property
    def broadcast(self) -> Arrays:
        experiment = prepare(self.config)
        return layout(self.config, experiment.plan, build_model(experiment, Reporter())).broadcast()

    def message(self, number: int = 1, **changes: Any) -> Message:
        """What an honest server sends to the first node, with changes."""
        secret: Secret = EACH_ITS_OWN if self.config.privacy.secret is None else SHARED
        told: dict[str, Any] = {"server-round": number, "configuration": configuration_hash(self.config, secret)}
        content = RecordDict(
            {
                wire.ARRAYS: changes.get("arrays", ArrayRecord({n: Array(a) for n, a in self.broadcast.items()})),
                wire.CONFIG: ConfigRecord({k: v for k, v in {**told, **changes.get("told", {})}.items() if v != ""}),
                **changes.get("more", {}),
            }
        )
        return Message(content, 9001, changes.get("kind", "train"))


Make = Callable[..., World]


@pytest.fixture
def world(tiny: Callable[..., Config], tmp_path: Path) -> Make:
    """Return a function that makes a World from changes to a small configuration; nodes draw their own secrets unless
    `shared` is set.
    """
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def make(limits: Limits = OPEN, shared: bool = False, **changes: Any) -> World:
        privacy = {"secret": SECRET if shared else None, **changes.pop("privacy", {})}
        config = tiny(**{**SMALL, **changes}, privacy=privacy)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        federation = load(config, seed_key(config.seed))
        return World(config, path, write_nodes(federation, path, folder, limits, range(config.data.users)), folder)

    return make


def in_cohort(world: World) -> tuple[Arrays, Ledger]:
    """Run the same configuration on the cohort grid, under the keys that a shared test secret gives nodes."""
    return with_clients(world)[1:]


def with_clients(world: World) -> tuple[Clients, Arrays, Ledger]:
    """Do what `in_cohort` does; returns the clients, too."""
    experiment = prepare(world.config)
    model = build_model(experiment, Reporter())
    directory = RunDirectory.create(world.folder / "cohort", world.config)
    kept = layout(world.config, experiment.plan, model).kept()
    store = PersonalStore(directory.private / "rounds", world.config.data.users, kept)
    server, clients = run_keys(KEY, result_text(world.config))
    made = Clients(world.config, experiment.plan, experiment.guarantee, model, store, clients)
    shared, ledger, _ = federate(experiment, made, directory, server, Reporter())
    return made, shared, ledger


def sent_arrays(reply: Message) -> Arrays:
    return wire.from_record(wire.arrays_of(reply))


def code(reply: Message) -> int:
    assert reply.has_error()
    assert reply.error.reason == wire.REASONS[reply.error.code]
    return int(reply.error.code)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# One run on two roads


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "fedper"},
        {"method": "fedbabu", "privacy": RECORD},
        {"privacy": USER_LOCAL, "client_rate": 0.7},
        {"privacy": USER_CENTRAL, "client_rate": 0.7, "server": {"strategy": "FedAdam", "options": {"eta": 0.02}}},
        {"client_sampling": "fixed", "client_rate": 0.5},
    ],
    ids=["none", "record", "user-local", "user-central", "fixed"],
)
def test_nodes_give_what_the_cohort_grid_gives(world: Make, changes: dict[str, Any]) -> None:
    here = world(shared=True, **changes)
    nodes = here.nodes
    claim = here.serve(nodes)
    expected, ledger = in_cohort(here)
    done = RunDirectory(here.folder / "server").recover(PersonalStore(here.folder / "unused", 1, {}))
    assert done is not None
    assert done.round == here.config.rounds
    assert set(done.shared) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(done.shared[name], array, rtol=0, atol=1e-5)
        assert array.any() or name == "head.direction.weight"
    mine = Ledger.load(here.folder / "server" / "ledger.jsonl")
    assert [one.clients for one in mine.releases] == [one.clients for one in ledger.releases]
    trained: dict[int, set[int]] = {}
    for message, _ in nodes.seen:
        if message.metadata.message_type == "train":
            place = nodes.numbers.index(message.metadata.dst_node_id)
            trained.setdefault(wire.round_of(message), set()).add(place)
    if ledger.releases[0].clients is not None:
        assert trained == {one.round: set(one.clients or ()) for one in ledger.releases if one.clients}
    # The keys are known to all sides: nothing is claimed, by the server and by each node.
    assert claim.epsilon == np.inf
    assert claim.secret == SHARED
    for place in set.union(*trained.values()):
        own = Claim.from_json((here.state(place) / "claim.json").read_text(encoding="utf-8"))
        assert own.epsilon == np.inf
        assert own.protected_against == []


def test_a_server_that_stopped_goes_on_with_the_next_round(world: Make) -> None:
    here = world(shared=True, method="fedper", rounds=3)
    expected, _ = in_cohort(here)
    nodes = here.nodes
    real, asked = nodes.send_and_receive, []

    def breaking(messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        listed = list(messages)
        asked.append(len(listed))
        if len(asked) == 3:  # roll call, first round, second round
            raise ConnectionError
        return real(listed, timeout=timeout)

    nodes.send_and_receive = breaking  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        here.serve(nodes)
    again = here.nodes
    here.serve(again)
    numbers = [wire.round_of(sent) for sent, _ in again.seen if sent.metadata.message_type == "train"]
    assert numbers == [2] * USERS + [3] * USERS
    done = RunDirectory(here.folder / "server").recover(PersonalStore(here.folder / "unused", 1, {}))
    assert done is not None
    for name, array in expected.items():
        np.testing.assert_allclose(done.shared[name], array, rtol=0, atol=1e-5)


def test_two_servers_do_not_run_in_one_directory(world: Make) -> None:
    here = world()
    with alone(here.folder / "server"), pytest.raises(RunDirectoryError, match="another process works on it"):
        here.serve(here.nodes)
    assert not (here.folder / "server").exists()


# The node's own secret, ledger, claim and state


def test_secrets_and_personal_state_stay_with_their_nodes(world: Make) -> None:
    here = world(method="fedper", rounds=2)
    nodes = here.nodes
    here.serve(nodes)
    secrets = [(here.state(place) / "private" / "secret").read_text().strip() for place in range(USERS)]
    assert len({*secrets, (here.folder / "server" / "private" / "secret").read_text().strip()}) == USERS + 1
    kept = np.load(here.state(0) / "private" / "rounds" / "head.direction.weight.npy")
    assert kept.shape[0] == 1
    assert np.abs(kept).max() > 0
    told = b"".join(message_to_proto(one).SerializeToString() for pair in nodes.seen for one in pair)
    told += b"".join(files(here.folder / "server").values())
    for secret in (*secrets, *map(bytes.fromhex, secrets)):
        assert (secret.encode() if isinstance(secret, str) else secret) not in told
    assert kept[0].tobytes() not in told
    for _, reply in nodes.seen:
        if wire.ARRAYS in reply.content:
            assert set(sent_arrays(reply)) == set(here.broadcast)
            assert dict(reply.content[wire.METRICS]) == {wire.WEIGHT: 1}
    for path in (*here.state(0).rglob("*"), here.files[0].parent / "records.json"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert stat.S_IMODE(here.state(0).stat().st_mode) == 0o700


def test_each_node_noises_by_a_secret_of_its_own(world: Make) -> None:
    """The same records under the same configuration, on two nodes: other noise."""
    here = world(Limits(), method="fedbabu", privacy=RECORD)
    other = world(Limits(), method="fedbabu", privacy=RECORD)
    one, two = here.nodes.deliver(here.message()), other.nodes.deliver(other.message())
    assert any(not np.array_equal(a, sent_arrays(two)[n]) for n, a in sent_arrays(one).items())
    claim = Claim.from_json((here.state() / "claim.json").read_text(encoding="utf-8"))
    assert claim.unit == "record"
    assert 0 < claim.epsilon <= 8
    assert claim.secret == EACH_ITS_OWN
    assert claim.protected_against[0].startswith("the server")
    assert any(one.startswith("a server whose app a node runs") for one in claim.not_protected_against)
    assert "must not be sent" in claim.sentence


def test_the_nodes_ledger_says_what_the_server_says_of_it(world: Make) -> None:
    here = world(Limits(), method="fedbabu", privacy=RECORD)
    claim = here.serve(here.nodes)
    for place in range(USERS):
        own = Claim.from_json((here.state(place) / "claim.json").read_text(encoding="utf-8"))
        assert own.epsilon == pytest.approx(claim.epsilon, rel=1e-9)
        assert [one.round for one in here.ledger(place).releases] == [1, 2]
    assert claim.epsilon <= 8


def test_a_node_that_trusts_its_server_claims_nothing_itself(world: Make) -> None:
    here = world(OPEN, privacy=USER_CENTRAL)
    claim = here.serve(here.nodes)
    assert 0 < claim.epsilon <= 8
    own = Claim.from_json((here.state() / "claim.json").read_text(encoding="utf-8"))
    assert own.epsilon == np.inf
    assert "The server is trusted to clip" in own.sentence
    assert "this node adds no noise" in own.sentence
    assert "none was asked for" not in own.sentence
    assert all(fact in own.excluded for fact in place_of(here.files[0]).federation.facts)


def test_a_secret_that_was_shared_stays_shared(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that was killed before its first line keeps the secret it was given, whatever its file says now."""
    here = world(OPEN, shared=True, privacy=USER_LOCAL)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(node_module, "build_model", stop)
        with pytest.raises(KeyboardInterrupt):
            here.nodes.deliver(here.message(1))
    here.change("config.yaml", "privacy", secret=None)
    own = here.message(1, told={"configuration": configuration_hash(here.config, EACH_ITS_OWN)})
    assert code(here.nodes.deliver(own)) == wire.OTHER_CONFIGURATION
    here.change("node.yaml", "limits", unprotected=False)
    assert code(here.nodes.deliver(here.message(1))) == wire.LIMITS
    here.change("node.yaml", "limits", unprotected=True)
    assert here.nodes.deliver(here.message(1)).has_content()
    assert (here.claim().secret, here.claim().epsilon) == (SHARED, np.inf)


def test_nodes_that_share_a_secret_do_not_answer_a_server_without_it(world: Make) -> None:
    """Its claim would be finite, though the noise can be taken off."""
    here = world(OPEN, shared=True, method="fedbabu", privacy=RECORD)
    tree = yaml.safe_load(here.path.read_text(encoding="utf-8"))
    tree["privacy"]["secret"] = None
    here.path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    nodes = here.nodes
    here.serve(nodes)
    asked = [reply for sent, reply in nodes.seen if sent.metadata.message_type == "train"]
    assert {code(reply) for reply in asked} == {wire.OTHER_CONFIGURATION}


def test_runs_with_a_shared_secret_promise_nothing_together(world: Make) -> None:
    here = world(shared=True, privacy=USER_CENTRAL)
    here.serve(here.nodes)
    assert composed([Ledger.load(here.folder / "server" / "ledger.jsonl")]) == np.inf


def test_a_state_restored_from_a_copy_draws_fresh_noise(world: Make) -> None:
    """Else two replies to two messages for one round, subtracted, would be free of it."""
    here = world(Limits(), privacy=USER_LOCAL)
    nodes = here.nodes
    nodes.deliver(here.message(1))
    shutil.copytree(here.state(), here.folder / "copy")
    replies = []
    for shift in (0.0, 1.0):
        arrays = {name: array + np.float32(shift) for name, array in here.broadcast.items()}
        record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        reply = sent_arrays(nodes.deliver(here.message(2, arrays=record)))
        replies.append({name: array - arrays[name] for name, array in reply.items()})
        shutil.rmtree(here.state())
        shutil.copytree(here.folder / "copy", here.state())
    one, other = replies
    between = sum(float(np.square(array - other[name]).sum()) for name, array in one.items()) ** 0.5
    noise = 0.5 * prepare(here.config).guarantee.noise_multiplier * sum(array.size for array in one.values()) ** 0.5
    assert between > 2 * 0.5  # all that two clipped updates can differ by
    assert between == pytest.approx(2**0.5 * noise, rel=0.2)


def test_a_server_stopped_between_line_and_checkpoint_says_so(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    here = world(OPEN, privacy=USER_CENTRAL)
    nodes, commit = here.nodes, RunDirectory.commit

    def stop(self: RunDirectory, *rest: Any) -> None:
        if self.path.name == "server":
            raise KeyboardInterrupt
        commit(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            here.serve(nodes)
    asked = len(nodes.seen)
    with pytest.raises(LedgerError, match=r"between its line for round 1 and its checkpoint"):
        here.serve(nodes)
    assert len(nodes.seen) == asked


@pytest.mark.parametrize("method", ["fedper", "fedavg-finetune"])
def test_a_node_trains_at_home_what_a_simulation_does(world: Make, method: str) -> None:
    """From the state of its rounds, and without a release."""
    here = world(shared=True, method=method)
    here.serve(here.nodes)
    clients, shared, _ = with_clients(here)
    ((_, expected),) = clients.finish([0], shared, clients.store)
    before = files(here.state())
    found = train_at_home(here.files[0], here.folder / "server", here.folder / "own")
    assert set(found) == {"own", "shared"}
    assert files(here.state()) == before
    arrays = adapters.load(here.folder / "own")
    assert set(arrays) == set(expected)
    for name, array in arrays.items():
        np.testing.assert_allclose(array, expected[name][0].numpy(), rtol=0, atol=1e-5)
    with pytest.raises(RunDirectoryError, match="choose a new directory"):
        train_at_home(here.files[0], here.folder / "server", here.folder / "own")


def test_at_home_another_run_or_nothing_to_train_is_told(world: Make) -> None:
    here, other, plain = world(method="fedper"), world(method="fedavg-finetune"), world(method="fedavg")
    like = world(method="fedper", personal={"epochs": 2})  # the same arrays, made in another way
    for one in (other, like):
        one.serve(one.nodes)
    with pytest.raises(RunDirectoryError, match="has been in no round"):
        train_at_home(here.files[0], like.folder / "server", here.folder / "own")
    here.serve(here.nodes)
    for one in (other, like):
        with pytest.raises(RunDirectoryError, match="not the run that this node takes part in"):
            train_at_home(here.files[0], one.folder / "server", here.folder / "own")
    with pytest.raises(ConfigError, match="keeps nothing personal"):
        train_at_home(plain.files[0], other.folder / "server", here.folder / "own")
    assert not (here.folder / "own").exists()


# A hostile server


def _pickled(array: NDArray[np.float32]) -> Array:
    return Array(dtype="float32", shape=array.shape, stype="numpy.ndarray", data=pickle.dumps(array))


def _objects(array: NDArray[np.float32]) -> Array:
    import io

    file = io.BytesIO()
    np.save(file, np.array([{"run": "me"}], dtype=object), allow_pickle=True)
    return Array(dtype="float32", shape=array.shape, stype="numpy.ndarray", data=file.getvalue())


def _boasting(array: NDArray[np.float32]) -> Array:
    """A header that speaks of a terabyte."""
    header = str({"descr": "<f4", "fortran_order": False, "shape": (2**38,)}).encode().ljust(117) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + array.tobytes()
    return Array(dtype="float32", shape=array.shape, stype="numpy.ndarray", data=data)


BAD_ARRAYS: dict[str, Callable[[NDArray[np.float32]], Array]] = {
    "pickle": _pickled,
    "objects": _objects,
    "boasting": _boasting,
    "oversized": lambda a: Array(np.zeros((4096, 4096), np.float32)),
    "transposed": lambda a: Array(np.zeros(a.T.shape, np.float32) if a.shape[0] != a.shape[1] else a[:1]),
    "doubles": lambda a: Array(a.astype(np.float64)),
    "nan": lambda a: Array(np.full_like(a, np.nan)),
    "torn": lambda a: Array("float32", a.shape, "numpy.ndarray", Array(a).data[:-4]),
    "empty": lambda a: Array("float32", a.shape, "numpy.ndarray", b""),
    "other kind": lambda a: Array("float32", a.shape, "torch", Array(a).data),
}


def _spoilt(here: World, spoil: Callable[[NDArray[np.float32]], Array]) -> ArrayRecord:
    arrays = here.broadcast
    first = next(name for name, array in arrays.items() if array.shape[0] != array.shape[1])
    return ArrayRecord({name: spoil(a) if name == first else Array(a) for name, a in arrays.items()})


HOSTILE: dict[str, tuple[Callable[[World], Message], int]] = {
    "all parameters": (lambda here: here.message(told={"names": ["head.direction.weight"]}), wire.MALFORMED),
    "parameters by query": (lambda here: here.message(kind="query.get_parameters"), wire.UNKNOWN),
    "unknown action": (lambda here: here.message(kind="train.everything"), wire.UNKNOWN),
    "reconnect": (lambda here: here.message(kind="reconnect"), wire.UNKNOWN),
    "noise 0": (lambda here: here.message(told={"noise_multiplier": 0.0}), wire.MALFORMED),
    "larger clip": (lambda here: here.message(told={"privacy.clip": 1e9}), wire.MALFORMED),
    "more steps": (lambda here: here.message(told={"local.epochs": 1000}), wire.MALFORMED),
    "another configuration": (lambda here: here.message(told={"configuration": "0" * 64}), wire.OTHER_CONFIGURATION),
    "no round": (lambda here: here.message(told={"server-round": ""}), wire.MALFORMED),
    "round as text": (lambda here: here.message(told={"server-round": "1"}), wire.MALFORMED),
    "round 0": (lambda here: here.message(0), wire.MALFORMED),
    "round -1": (lambda here: here.message(-1), wire.MALFORMED),
    "replayed round": (lambda here: here.message(1), wire.ROUND_REFUSED),
    "round beyond the run": (lambda here: here.message(3), wire.ROUND_REFUSED),
    "more records": (lambda here: here.message(more={"more": MetricRecord({"x": 1})}), wire.MALFORMED),
    "other names": (lambda here: here.message(2, arrays=ArrayRecord({"x": Array(np.zeros(3))})), wire.MALFORMED),
    "nothing": (lambda here: Message(RecordDict(), 9001, "train"), wire.MALFORMED),
    **{
        name: (lambda here, spoil=spoil: here.message(2, arrays=_spoilt(here, spoil)), wire.MALFORMED)
        for name, spoil in BAD_ARRAYS.items()
    },
}


def test_a_hostile_server_gets_codes_and_the_ledger_stays_right(world: Make) -> None:
    """After an honest round each of these is refused, changes no file of the node, and the next round is answered."""
    here = world(Limits(), method="fedbabu", privacy=RECORD)
    nodes = here.nodes
    assert nodes.deliver(here.message(1)).has_content()
    before = files(here.state())
    for name, (make, expected) in HOSTILE.items():
        assert code(nodes.deliver(make(here))) == expected, name
        assert files(here.state()) == before, name
    assert nodes.deliver(here.message(2)).has_content()
    assert [one.round for one in here.ledger().releases] == [1, 2]
    claim = Claim.from_json((here.state() / "claim.json").read_text(encoding="utf-8"))
    assert (claim.rounds, claim.ledger_head) == (2, here.ledger().head)


def test_evaluation_tells_metrics_only_where_the_owner_allows_it(world: Make) -> None:
    closed, opened = world(), world(Limits(unprotected=True, metrics=True))
    silent = closed.nodes.deliver(closed.message(kind="evaluate"))
    assert dict(silent.content[wire.METRICS]) == {wire.WEIGHT: 1}
    told = opened.nodes.deliver(opened.message(kind="evaluate"))
    assert set(told.content[wire.METRICS]) == {wire.WEIGHT, "accuracy", "mrr", "loss"}
    for here, said in ((closed, "must not"), (opened, "may, where this node adds no noise,")):
        here.nodes.deliver(here.message())
        assert f"raw metrics {said} be sent" in here.claim().sentence
    spoilt = opened.message(kind="evaluate", arrays=_spoilt(opened, _pickled))
    assert code(opened.nodes.deliver(spoilt)) == wire.MALFORMED


@pytest.mark.parametrize("privacy", [RECORD, USER_LOCAL])
def test_no_metrics_beside_a_nodes_own_guarantee(world: Make, privacy: dict[str, Any]) -> None:
    """They hang on the records without noise: on arrays of the server's choice they would tell all of them."""
    here = world(Limits(metrics=True), method="fedbabu", privacy=privacy)
    told = here.nodes.deliver(here.message(kind="evaluate"))
    assert dict(told.content[wire.METRICS]) == {wire.WEIGHT: 1}


def test_a_node_without_an_owners_file_answers_nothing(world: Make) -> None:
    """A server could name data and configuration in the settings that come along."""
    here = world()
    settings = {"config": str(here.path), "out": str(here.folder / "elsewhere")}
    node_config = {"partition-id": 0, "num-partitions": USERS}
    for kind in ("query", "train"):
        reply = app(here.message(kind=kind), Context(1, 9001, node_config, RecordDict(), settings))
        assert code(reply) == wire.LIMITS
    assert not (here.folder / "elsewhere").exists()


def test_a_failure_is_told_to_the_owner_alone(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    here = world()
    (here.files[0].parent / "records.json").write_text('{"user": "Bartholomew"}', encoding="utf-8")
    reply = here.nodes.deliver(here.message())
    assert code(reply) == wire.CLIENT_FAILED
    assert b"records" not in message_to_proto(reply).SerializeToString()
    assert "records.json" in caplog.text
    assert "Bartholomew" not in caplog.text


# Limits and budget


@pytest.mark.parametrize(
    ("limits", "privacy"),
    [
        (Limits(), {}),
        (Limits(), {"unit": "record", "delta": 0.001, "clip": 0.5}),
        (Limits(), USER_CENTRAL),
        (Limits(min_noise=50), RECORD),
        (Limits(min_noise=0.01, unprotected=True), USER_CENTRAL),
        (Limits(max_clip=0.4), RECORD),
        (Limits(max_clip=0.4, unprotected=True), {}),
        (Limits(max_steps=1), RECORD),
    ],
    ids=["none", "no noise", "central", "noise", "noise of the server's", "clip", "no clip", "steps"],
)
def test_what_is_beyond_the_owners_limits_is_refused(world: Make, limits: Limits, privacy: dict[str, Any]) -> None:
    here = world(limits, privacy=privacy)
    assert code(here.nodes.deliver(here.message())) == wire.LIMITS
    assert not here.state().exists() or not files(here.state())


def test_a_shared_secret_counts_as_no_protection(world: Make) -> None:
    here = world(Limits(), shared=True, privacy=RECORD)
    assert code(here.nodes.deliver(here.message())) == wire.LIMITS


def test_limits_that_are_kept_do_not_hinder(world: Make) -> None:
    limits = Limits(epsilon=8.01, min_noise=0.1, max_clip=0.5, max_steps=2, max_rounds=2)
    here = world(limits, method="fedbabu", privacy=RECORD)
    assert here.nodes.deliver(here.message()).has_content()
    sentence = Claim.from_json((here.state() / "claim.json").read_text(encoding="utf-8")).sentence
    for said in ("epsilon at most 8.01", "noise multiplier at least 0.1", "clip at most 0.5", "rounds at most 2"):
        assert said in sentence


def test_a_spent_budget_outlives_the_node(world: Make) -> None:
    """The configuration's budget is for two rounds; the owner's is for one. What is spent stays spent."""
    first = world(Limits(), method="fedbabu", privacy=RECORD)
    first.nodes.deliver(first.message(1))
    one = Claim.from_json((first.state() / "claim.json").read_text(encoding="utf-8")).epsilon
    here = world(Limits(epsilon=one * 1.001), method="fedbabu", privacy=RECORD)
    assert here.nodes.deliver(here.message(1)).has_content()
    before = files(here.state())
    for _ in range(2):
        assert code(here.nodes.deliver(here.message(2))) == wire.BUDGET_SPENT
    assert files(here.state()) == before
    assert Claim.from_json((here.state() / "claim.json").read_text(encoding="utf-8")).epsilon == pytest.approx(one)


def test_a_server_that_asks_too_often_meets_the_configurations_budget(world: Make) -> None:
    """Users in turn: the noise was planned for every third round of three, and the owner gives no limit."""
    here = world(
        Limits(), privacy={**USER_LOCAL, "epsilon": 5}, client_rate=0.34, client_sampling="cyclic", rounds=3
    )  # fmt: skip
    nodes = here.nodes
    assert nodes.deliver(here.message(1)).has_content()
    assert code(nodes.deliver(here.message(2))) == wire.BUDGET_SPENT
    assert 0 < here.claim().epsilon <= 5


def test_rounds_are_counted_by_the_node(world: Make) -> None:
    here = world(Limits(max_rounds=1, unprotected=True))
    assert here.nodes.deliver(here.message(2)).has_content()
    assert code(here.nodes.deliver(here.message(1))) == wire.ROUND_REFUSED
    more = world(Limits(max_rounds=1, unprotected=True))
    assert more.nodes.deliver(more.message(1)).has_content()
    assert code(more.nodes.deliver(more.message(2))) == wire.LIMITS


def test_a_node_goes_on_for_its_own_run_alone(world: Make) -> None:
    """Other records, or another configuration, under the same state would meet the ledger and noise of the old."""
    here = world(Limits(), method="fedbabu", privacy=RECORD)
    nodes = here.nodes
    nodes.deliver(here.message(1))
    records = here.files[0].parent / "records.json"
    tree = json.loads(records.read_text(encoding="utf-8"))
    records.write_text(json.dumps({**tree, "train": tree["train"][1:]}), encoding="utf-8")
    assert code(nodes.deliver(here.message(2))) == wire.OTHER_CONFIGURATION
    records.write_text(json.dumps(tree), encoding="utf-8")
    assert nodes.deliver(here.message(2)).has_content()
    changed = yaml.safe_load(here.path.read_text(encoding="utf-8"))
    changed["privacy"]["noise_multiplier"], changed["privacy"]["epsilon"] = 1e-3, "inf"
    (here.files[0].parent / "config.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
    assert code(nodes.deliver(here.message(2, told={"configuration": ""}))) == wire.CLIENT_FAILED


def test_the_same_round_twice_at_once_is_answered_once(world: Make) -> None:
    here = world(Limits(), method="fedbabu", privacy=RECORD)
    nodes, message, replies = here.nodes, here.message(1), []
    workers = [threading.Thread(target=lambda: replies.append(nodes.deliver(message))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(reply.has_content() for reply in replies) == [False, True]
    assert [code(reply) for reply in replies if reply.has_error()] == [wire.ROUND_REFUSED]
    assert [one.round for one in here.ledger().releases] == [1]


@pytest.mark.parametrize("where", ["before the line", "after the line"])
def test_a_node_stopped_in_a_round(world: Make, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its ledger line nothing was sent, and the round can be asked again; after it, it is paid for and gone."""
    here = world(Limits(), method="fedbabu", privacy=RECORD)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        target = (Ledger, "append") if where == "before the line" else (node_module.Node, "commit")
        patch.setattr(*target, stop)
        with pytest.raises(KeyboardInterrupt):
            here.nodes.deliver(here.message(1))
    if where == "after the line":
        with (here.state() / "ledger.jsonl").open("a") as file:
            file.write('{"torn')
        assert code(here.nodes.deliver(here.message(1))) == wire.ROUND_REFUSED
    assert here.nodes.deliver(here.message(1 if where == "before the line" else 2)).has_content()
    assert len(here.ledger().releases) == (1 if where == "before the line" else 2)


# What a SuperNode starts


def test_every_command_but_the_nodes_own_refuses(tmp_path: Path) -> None:
    """A SuperNode starts whichever kind of app its server names, by the command that comes first on its PATH."""
    folder, trace = tmp_path / "bin", tmp_path / "imported"
    write_commands(folder)
    assert {path.name for path in folder.iterdir()} == set(TASK_TYPE_TO_COMMAND.values())
    (tmp_path / "sitecustomize.py").write_text(f"open({str(trace)!r}, 'w').close()\n", encoding="utf-8")
    path = f"{folder}:{os.environ['PATH']}"
    for name in set(TASK_TYPE_TO_COMMAND.values()) - {"flwr-clientapp"}:
        done = subprocess.run(
            [name, "--token", "x"], env={"PATH": path, "PYTHONPATH": str(tmp_path)}, capture_output=True, check=False
        )  # fmt: skip
        assert done.returncode == 1, name
        assert b"no app but its own" in done.stderr
    assert not trace.exists()
    assert "-m fedpers.flower.pinned" in (folder / "flwr-clientapp").read_text(encoding="utf-8")


# Who acts for whom


def test_who_was_drawn_is_not_streamed_where_the_drawing_is_credited(
    world: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    for privacy, rate, seat in ((USER_CENTRAL, 0.7, False), (USER_CENTRAL, 1.0, True), (RECORD, 0.7, True)):
        here = world(Limits(max_rounds=1, unprotected=False), privacy=privacy, client_rate=rate, shared=True)
        here.serve(here.nodes)
        said = capsys.readouterr().out
        assert "is left out" in said
        assert ("seat " in said) == seat


def test_seats_go_by_position_and_are_kept(world: Make) -> None:
    here = world()
    nodes = Nodes([*here.files, here.files[0]], numbers=[9001, 4001, 7001, 1001])
    roll = Roll(nodes, USERS, patience=0.0)
    roll.call(range(USERS))
    assert roll._seats == {0: 1001, 1: 4001, 2: 7001}  # of two that claim a seat the one that answers first
    assert [sent.metadata.message_type for sent, _ in nodes.seen] == ["query"] * 4
    nodes.absent = {3, 1}
    message = here.message()
    roll.grid = nodes
    for user in range(USERS):
        one = copy.deepcopy(message)
        one.metadata.dst_node_id = wire.FIRST_NODE + user
        replies = roll.send_and_receive([one])
        expected = [wire.FIRST_NODE + user] if user == 2 else []
        assert [reply.metadata.src_node_id for reply in replies] == expected


@dataclass
class Keyed(Nodes):
    """Nodes whose keys the SuperLink tells."""

    keys: list[bytes] = field(default_factory=list)

    def get_nodes(self) -> list[NodeInfo]:
        pairs = zip(self.numbers, self.keys, strict=True)
        return [NodeInfo(node_id=number, public_key=key) for number, key in pairs]


def _ssh(pem: bytes) -> str:
    return load_pem_public_key(pem).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def test_a_seat_is_its_keys(world: Make) -> None:
    """A node with another key that claims a user's seat gets none, and whoever has the key keeps it."""
    here = world()
    keys = [public_key_to_bytes(generate_key_pairs()[1]) for _ in range(USERS + 1)]
    stranger, first, second = keys[3], keys[0], keys[1]
    nodes = Keyed([here.files[0], *here.files[:2]], keys=[stranger, first, second])
    roll = Roll(nodes, USERS, patience=0.0, keys=[f"{_ssh(key)} of a user" for key in keys[:USERS]])
    message = here.message()
    for user, answers in enumerate((True, True, False)):
        one = copy.deepcopy(message)
        one.metadata.dst_node_id = wire.FIRST_NODE + user
        assert [reply.metadata.src_node_id for reply in roll.send_and_receive([one])] == [
            wire.FIRST_NODE + user
        ] * answers
    assert [(sent.metadata.message_type, sent.metadata.dst_node_id) for sent, _ in nodes.seen] == [
        ("train", 4001),
        ("train", 7001),
    ]
    for wrong in ([_ssh(first)] * USERS, [_ssh(first), _ssh(second)], ["ssh-rsa AAAA", *map(_ssh, keys[:2])]):
        with pytest.raises(DataError, match=r"one key for each user|a key that is none"):
            Roll(nodes, USERS, patience=0.0, keys=wrong)


@pytest.mark.parametrize("answer", [{"position": 3}, {"position": -1}, {"position": 0.0}, {"other": 1}, {}])
def test_a_seat_that_there_is_not_is_given_to_nobody(answer: dict[str, Any]) -> None:
    class One:
        def get_node_ids(self) -> list[int]:
            return [5]

        def send_and_receive(self, messages: Iterable[Message], timeout: float) -> list[Message]:
            return [Message(RecordDict({wire.METRICS: MetricRecord(answer)}), reply_to=one) for one in messages]

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 5
    roll = Roll(One(), USERS, patience=0.0)
    roll.call([0])
    assert roll._seats == {}


# What no road of nodes can do, and files that are not what they should be


@pytest.mark.parametrize(
    "changes", [{"privacy": {**USER_CENTRAL, "trust": "user-distributed"}}, {"method": "centralized"}]
)
def test_what_needs_everybody_at_one_place_is_refused(world: Make, changes: dict[str, Any]) -> None:
    here = world(**changes)
    with pytest.raises(PrivacyRefusal, match=r"secure aggregation|records of all users"):
        here.serve(here.nodes)
    assert code(here.nodes.deliver(here.message())) == wire.CLIENT_FAILED
    assert not here.state().exists()


def test_broken_files_are_told_without_quoting_them(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('{"user": "Bartholomew", "train": [{"id": 1}], "test": []}', encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.0") as caught:
        read(UserFile, path)
    assert "Bartholomew" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read(People, tmp_path / "none.json")
    path.write_text(
        "{config: a, people: b, records: c, state: d, limits: {min_noise: -1, max_nois: 2}}", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"limits\.max_nois, limits\.min_noise"):
        read(OwnerFile, path)


def test_a_user_who_is_not_on_the_list_has_no_place(world: Make) -> None:
    here = world()
    records = here.files[0].parent / "records.json"
    tree = json.loads(records.read_text(encoding="utf-8"))
    records.write_text(json.dumps({**tree, "user": "somebody else"}), encoding="utf-8")
    with pytest.raises(DataError, match="not on the public list"):
        place_of(here.files[0])
