"""Flower's side: stock strategies drive our clients, and at user level nothing but the noised mean reaches one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy as stock
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from numpy.typing import NDArray
from safetensors.numpy import load_file

from conftest import SECRET
from fedpers import rounds
from fedpers.cohort.clients import Clients
from fedpers.cohort.layout import Layout, layout
from fedpers.cohort.model import CohortModel
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config
from fedpers.errors import ConfigError, LedgerError, PrivacyRefusal
from fedpers.evaluation.models import shared_metrics
from fedpers.experiment import Experiment, Reuse, build_model, prepare
from fedpers.flower import messages as wire
from fedpers.flower.client_app import answer
from fedpers.flower.cohort_grid import CohortGrid
from fedpers.flower.strategy import FedpersStrategy, stock_strategy
from fedpers.methods.base import PERSONAL, SHARED
from fedpers.models.array_names import base_name
from fedpers.privacy import guarantee as guarantee_module
from fedpers.privacy import sampling, user_level
from fedpers.privacy.ledger import Ledger
from fedpers.reporting import Reporter
from fedpers.rounds import federate
from fedpers.run_directory import RunDirectory
from fedpers.simulation import simulate

Arrays = dict[str, NDArray[np.float32]]
Make = Callable[..., "World"]
KEY = bytes.fromhex(SECRET)
USERS = 8
CLIP = 0.05  # shorter than the updates of the tiny model, so that clipping acts
USER_LEVEL = {"unit": "user", "epsilon": 8, "delta": 0.01, "clip": CLIP}
RECORD_LEVEL = {"unit": "record", "epsilon": 8, "delta": 0.01, "clip": 0.5, "record_rate": 1.0}
OPTIONS: dict[str, dict[str, float]] = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.5},
    "FedAdagrad": {"eta": 0.02},
    "FedAdam": {"eta": 0.02},
    "FedYogi": {"eta": 0.02},
}
METHODS = (
    "fedavg", "fedavg-finetune", "fedbabu", "fedper", "fedrep", "local", "ditto", "fedbn", "feddpa", "fedsa-lora",
    "ifca", "lg-fedavg", "rolora", "sdflora",
)  # fmt: skip
DIRECTION = "head.direction.weight"


@dataclass
class World:
    """A configuration with everything that it needs; clients are made fresh, each with personal state of its own."""

    experiment: Experiment
    model: CohortModel
    scratch: Path
    made: int = 0

    @property
    def config(self) -> Config:
        return self.experiment.config

    def place(self) -> Path:
        self.made += 1
        place = self.scratch / str(self.made)
        place.mkdir()
        return place

    def store(self, directory: Path) -> PersonalStore:
        return PersonalStore(directory, len(self.users), self.layout.kept())

    @property
    def layout(self) -> Layout:
        return layout(self.config, self.experiment.plan, self.model)

    def clients(self, store: PersonalStore | None = None) -> Clients:
        store = store or self.store(self.place())
        return Clients(self.config, self.experiment.plan, self.experiment.guarantee, self.model, store, KEY)

    def strategy(self, clients: Clients, **changes: Any) -> FedpersStrategy:
        guarantee = self.experiment.guarantee
        opening = guarantee.opening(self.config, clients.shared_names, len(self.users), "given in the configuration")
        ledger = Ledger.create(self.place() / "ledger.jsonl", opening)
        given = {"users": self.users, "secret": KEY, **changes}
        return FedpersStrategy(self.config, guarantee, ledger=ledger, layout=clients.layout, **given)

    def initial(self, clients: Clients) -> ArrayRecord:
        return wire.to_record(clients.layout.broadcast(), clients.shared_names)

    @property
    def users(self) -> tuple[str, ...]:
        return self.experiment.examples.users


@dataclass
class Road:
    """A run directory with clients, for runs through `federate`."""

    world: World
    path: Path
    store: PersonalStore = field(init=False)
    directory: RunDirectory = field(init=False)

    def __post_init__(self) -> None:
        config = self.world.config
        known = RunDirectory(self.path).started
        self.directory = RunDirectory.reopen(self.path, config) if known else RunDirectory.create(self.path, config)
        self.store = self.world.store(self.directory.private / "rounds")

    def go(self, reporter: Reporter | None = None) -> tuple[Arrays, Ledger, list[dict[str, Any]]]:
        clients = self.world.clients(self.store)
        key = bytes.fromhex(self.world.experiment.config.privacy.secret or SECRET)
        return federate(self.world.experiment, clients, self.directory, key, reporter or Reporter())


class WatchedGrid(CohortGrid):
    """Keeps copies of all messages that pass; messages to the users in `absent` get lost.

    Copies, because stock strategies write the next round's number into the same config, and some empty the replies.
    """

    def __init__(self, clients: Clients, absent: Iterable[int] = ()) -> None:
        super().__init__(clients)
        self.absent = {wire.FIRST_NODE + user for user in absent}
        self.seen: list[tuple[list[Message], list[Message]]] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = [message for message in messages if message.metadata.dst_node_id not in self.absent]
        kept = copy.deepcopy(sent)
        replies = super().send_and_receive(sent, timeout=timeout)
        if sent:
            self.seen.append((kept, copy.deepcopy(replies)))
        return replies

    @property
    def messages(self) -> Iterator[Message]:
        return (message for round_ in self.seen for part in round_ for message in part)


@pytest.fixture(scope="module")
def known() -> tuple[Reuse, dict[str, Experiment]]:
    return Reuse(), {}


@pytest.fixture
def world(tiny: Callable[..., Config], tmp_path: Path, known: tuple[Reuse, dict[str, Experiment]]) -> Make:
    """Return a function that makes a World from changes to the tiny configuration; models are built once."""
    reuse, experiments = known
    (tmp_path / "worlds").mkdir()

    def make(**changes: Any) -> World:
        small: dict[str, Any] = {
            "engine": {"cohort_size": USERS, "threads": 1}, "evaluation": {"every": 0}, "personal": {"epochs": 1},
            "data": {"max_train": 6, "max_test": 4, "max_tokens": 8}, "local": {"batch_size": 8},
        }  # fmt: skip
        config = tiny(**{**small, **changes})
        key = config.model_dump_json()
        if key not in experiments:
            experiments[key] = prepare(config, reuse)
        experiment = experiments[key]
        scratch = tmp_path / "worlds" / str(len(list((tmp_path / "worlds").iterdir())))
        scratch.mkdir()
        return World(experiment, build_model(experiment, Reporter(), reuse), scratch)

    return make


def arrays_in(message: Message) -> Arrays:
    return wire.from_record(wire.arrays_of(message))


def distance(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> float:
    assert set(one) == set(other)
    return max(float(np.max(np.abs(one[name].astype(np.float64) - other[name]))) for name in one)


def norm(arrays: Mapping[str, NDArray[Any]]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays.values())))


def same_bytes(one: Arrays, other: Arrays) -> bool:
    return set(one) == set(other) and all(one[name].tobytes() == other[name].tobytes() for name in one)


# Stock strategies, unmodified, on our grid


@pytest.mark.parametrize(
    ("name", "options"), [("FedAvg", {}), ("FedAdam", {"eta": 0.02}), ("Krum", {"num_malicious_nodes": 1})]
)
def test_an_unmodified_strategy_trains_and_evaluates_on_the_grid(
    world: Make, name: str, options: dict[str, Any]
) -> None:
    here = world()
    clients = here.clients()
    grid = WatchedGrid(clients)
    initial = here.initial(clients)
    strategy = getattr(stock, name)(fraction_train=0.75, **options)
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=2)

    sizes = [(sent[0].metadata.message_type, len(sent), len(replies)) for sent, replies in grid.seen]
    assert sizes == [("train", 6, 6), ("evaluate", 8, 8)] * 2
    assert distance(wire.from_record(result.arrays), wire.from_record(initial)) > 1e-3
    # The metrics that come back are those of the arrays that went out, averaged over users.
    found = shared_metrics(clients, range(USERS), wire.from_record(result.arrays))
    got = result.evaluate_metrics_clientapp[2]
    assert set(got) == {"accuracy", "mrr", "loss"}
    for metric in got:
        assert got[metric] == pytest.approx(np.mean([user[metric] for user in found]), abs=1e-5)
    if name == "Krum":  # one client's reply, as it was sent
        replies = [arrays_in(reply) for reply in grid.seen[2][1]]
        assert min(distance(wire.from_record(result.arrays), reply) for reply in replies) == 0


@pytest.mark.parametrize(
    ("method", "privacy"), [("fedper", {}), ("fedbabu", RECORD_LEVEL)], ids=["fedper-none", "fedbabu-record"]
)
def test_a_cohort_of_one_answers_as_the_grid_does(world: Make, method: str, privacy: dict[str, Any]) -> None:
    """One client function serves both, whatever a client keeps for itself."""
    here = world(method=method, privacy=privacy, local={"batch_size": 3, "lr": {"adapter": 0.1, "head": 0.1}})
    together, alone = here.clients(), here.clients()
    grid = WatchedGrid(together)
    result = stock.FedAvg(fraction_evaluate=1.0).start(grid=grid, initial_arrays=here.initial(together), num_rounds=2)
    assert result.arrays is not None
    for sent, replies in grid.seen:
        for message, expected in zip(sorted(sent, key=lambda m: m.metadata.dst_node_id), replies, strict=True):
            node = message.metadata.dst_node_id
            (reply,) = answer(alone, [node - wire.FIRST_NODE], [message], pytest.fail)
            assert reply.metadata.src_node_id == expected.metadata.src_node_id == node
            assert set(reply.content) == set(expected.content)
            if wire.ARRAYS in expected.content:
                assert distance(arrays_in(reply), arrays_in(expected)) < 1e-6
            assert dict(reply.content[wire.METRICS]) == pytest.approx(dict(expected.content[wire.METRICS]), abs=1e-5)
    mine, theirs = alone.store.read(range(USERS)), together.store.read(range(USERS))
    for name in theirs:
        assert torch.allclose(mine[name], theirs[name], atol=1e-6, rtol=0)
    if method == "fedper":
        assert not torch.equal(theirs["head.direction.weight"][0], theirs["head.direction.weight"][1])


# Our strategy around a stock one


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_fedavg_is_the_plain_mean_of_what_clients_hold(world: Make, rate: float) -> None:
    here = world(rounds=1, client_rate=rate)
    clients, reference = here.clients(), here.clients()
    grid = WatchedGrid(clients)
    strategy = here.strategy(clients)
    initial = here.initial(clients)
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=1)
    users = sorted(message.metadata.dst_node_id - wire.FIRST_NODE for message in grid.seen[0][0])
    assert (len(users) == USERS) == (rate == 1.0)
    held = reference.train_round(1, users, wire.from_record(initial))
    assert distance(wire.from_record(result.arrays), {n: rows.mean(axis=0) for n, rows in held.items()}) < 1e-6
    assert list(strategy.ledger.releases[0].clients or ()) == users
    assert strategy.report is not None
    assert strategy.report.bytes_up == strategy.report.bytes_down == len(users) * 4 * sum(
        rows[0].size for rows in held.values()
    )  # fmt: skip


@pytest.mark.parametrize("name", ["FedAdam", "FedAvgM", "FedMedian", "MultiKrum"])
def test_a_strategy_by_name_is_the_stock_one(world: Make, name: str) -> None:
    """Two rounds and a resumed third: the same replies, given to Flower's own object, make the same broadcast."""
    options = {"MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3}, "FedMedian": {}, **OPTIONS}[name]
    here = world(server={"strategy": name, "options": options})
    clients = here.clients()
    grid = WatchedGrid(clients)
    broadcasts: list[Arrays] = []
    strategy = here.strategy(clients)
    strategy.start(
        grid=grid, initial_arrays=here.initial(clients), num_rounds=2,
        evaluate_fn=lambda number, arrays: broadcasts.append(wire.from_record(arrays)),
    )  # fmt: skip
    later = here.strategy(clients, first_round=2)
    later.load_state(strategy.state())
    later.start(
        grid=grid, initial_arrays=wire.to_record(broadcasts[-1], clients.shared_names), num_rounds=1,
        evaluate_fn=lambda number, arrays: broadcasts.append(wire.from_record(arrays)) if number else None,
    )  # fmt: skip

    plain = getattr(stock, name)(**options)
    for number, (_, replies) in enumerate(grid.seen, start=1):
        start = wire.to_record(broadcasts[number - 1], clients.shared_names)
        list(plain.configure_train(number, start, ConfigRecord(), grid))
        arrays, _ = plain.aggregate_train(number, replies)
        assert distance(broadcasts[number], wire.from_record(arrays)) < 1e-6
        assert distance(broadcasts[number], broadcasts[number - 1]) > 1e-4
    assert len(grid.seen) == 3
    assert [wire.round_of(sent[0]) for sent, _ in grid.seen] == [1, 2, 3]


@pytest.mark.parametrize("privacy", [{}, USER_LEVEL], ids=["none", "user"])
def test_a_node_counts_once_and_only_if_it_was_asked(world: Make, privacy: dict[str, Any]) -> None:
    """A user who is heard twice would count with twice the clip; a client that failed is as if it had not come."""
    here = world(privacy=privacy, client_rate=0.5)
    clients = here.clients()
    grid = WatchedGrid(clients)

    counted: list[int] = []

    def broadcast(change: Callable[[list[Message], list[Message]], list[Message]]) -> Arrays:
        strategy = here.strategy(clients)
        asked = list(strategy.configure_train(1, here.initial(clients), ConfigRecord(), grid))
        arrays, _ = strategy.aggregate_train(1, change(asked, grid.send_and_receive(asked)))
        assert arrays is not None
        assert strategy.report is not None
        counted.append(strategy.report.clients)
        return wire.from_record(arrays)

    def with_a_stranger(asked: list[Message], replies: list[Message]) -> list[Message]:
        nodes = {message.metadata.dst_node_id for message in asked}
        stranger = next(wire.FIRST_NODE + user for user in range(USERS) if wire.FIRST_NODE + user not in nodes)
        uninvited = Message(asked[0].content, dst_node_id=stranger, message_type=MessageType.TRAIN)
        return [*replies, *grid.send_and_receive([uninvited])]

    usual = broadcast(lambda asked, replies: replies)
    assert 2 <= counted[0] < USERS
    assert same_bytes(usual, broadcast(lambda asked, replies: [replies[0], *replies[::-1]]))
    assert same_bytes(usual, broadcast(with_a_stranger))
    assert counted == counted[:1] * 3
    fewer = broadcast(lambda asked, replies: replies[1:])
    assert distance(fewer, usual) > 1e-4

    def first_failed(asked: list[Message], replies: list[Message]) -> list[Message]:
        failed = next(m for m in asked if m.metadata.dst_node_id == replies[0].metadata.src_node_id)
        return [wire.failure(failed), *replies[1:]]

    assert same_bytes(fewer, broadcast(first_failed))


# The coupling probe


class Shifted:
    """A round's noise plus a given vector; arrays are asked for in the order of their names."""

    def __init__(self, rng: np.random.Generator, shift: Mapping[str, NDArray[np.float64]]) -> None:
        self.rng, self.parts = rng, [shift[name] for name in sorted(shift)]

    def standard_normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return self.rng.standard_normal(shape) + self.parts.pop(0)


def clipped_sum(sent: list[Message], replies: list[Message]) -> tuple[dict[str, NDArray[np.float64]], float]:
    """Sum of the clipped updates, by hand from what went over the wire, and the shortest update before clipping."""
    start = arrays_in(sent[0])
    total = {name: np.zeros(array.shape) for name, array in start.items()}
    shortest = float("inf")
    for reply in replies:
        update = {name: array.astype(np.float64) - start[name] for name, array in arrays_in(reply).items()}
        shortest = min(shortest, norm(update))
        for name in total:
            total[name] += update[name] * min(1.0, CLIP / norm(update))
    return total, shortest


Spoil = Callable[[FedpersStrategy, WatchedGrid], None]


def probe(here: World, monkeypatch: pytest.MonkeyPatch, spoil: Spoil | None = None) -> tuple[float, list[float]]:
    """Run with all users, then without user 3 but with noise that makes up for it in the clipped sum.

    Returns the largest difference between the broadcast models of the two runs, and how much noise made up for user 3
    in each round. If only the noised mean reaches the strategy, no broadcast can tell the runs apart.
    """
    real = user_level.generator
    guarantee = here.experiment.guarantee
    deviation = guarantee.noise_multiplier * CLIP
    assert deviation > 0
    full: list[dict[str, NDArray[np.float64]]] = []
    shifts: list[float] = []

    def run(absent: tuple[int, ...]) -> list[Arrays]:
        clients = here.clients()
        grid = WatchedGrid(clients, absent)
        strategy = here.strategy(clients)
        if spoil is not None:
            spoil(strategy, grid)

        def generator(key: bytes, *address: str | int) -> Shifted:
            total, shortest = clipped_sum(*grid.seen[-1])
            assert shortest > CLIP  # else the probe would not see a clip that is left out
            if not absent:
                full.append(total)
            shift = {name: full[len(grid.seen) - 1][name] - total[name] for name in total}
            if absent:
                shifts.append(norm(shift))
            return Shifted(real(key, *address), {name: part / deviation for name, part in shift.items()})

        monkeypatch.setattr(user_level, "generator", generator)
        broadcasts: list[Arrays] = []
        strategy.start(
            grid=grid, initial_arrays=here.initial(clients), num_rounds=2,
            evaluate_fn=lambda number, arrays: broadcasts.append(wire.from_record(arrays)),
        )  # fmt: skip
        monkeypatch.setattr(user_level, "generator", real)
        assert [len(replies) for _, replies in grid.seen] == [USERS - len(absent)] * 2
        return broadcasts

    everyone, without = run(()), run((3,))
    assert distance(everyone[1], everyone[0]) > 1e-3
    return max(distance(a, b) for a, b in zip(everyone, without, strict=True)), shifts


@pytest.mark.parametrize("name", OPTIONS)
def test_at_user_level_only_the_noised_mean_reaches_the_strategy(
    world: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    here = world(method="fedper", privacy=USER_LEVEL, server={"strategy": name, "options": OPTIONS[name]})
    gap, shifts = probe(here, monkeypatch)
    assert gap < 1e-6
    # What has to be made up for is one user's clipped update, in the second round too.
    assert shifts == pytest.approx([CLIP, CLIP], rel=1e-3)


def raw_replies(strategy: FedpersStrategy, grid: WatchedGrid) -> None:
    """Wrong on purpose: the strategy sees the replies behind the noised mean."""
    aggregate = strategy.inner.aggregate_train
    strategy.inner.aggregate_train = lambda number, listed: aggregate(number, grid.seen[-1][1])


def noise_at_the_end(strategy: FedpersStrategy, grid: WatchedGrid) -> None:
    """Wrong on purpose: the strategy works on the mean without noise, and its result gets the noise."""
    aggregate = strategy.inner.aggregate_train

    def late(number: int, listed: list[Message]) -> tuple[ArrayRecord, MetricRecord]:
        sent, replies = grid.seen[-1]
        start, noised, total = arrays_in(sent[0]), arrays_in(listed[0]), clipped_sum(sent, replies)[0]
        clean = {n: (start[n] + total[n] / strategy.guarantee.denominator).astype(np.float32) for n in start}
        content = RecordDict(
            {wire.ARRAYS: wire.to_record(clean, sorted(clean)), wire.METRICS: MetricRecord({wire.WEIGHT: 1})}
        )
        arrays, metrics = aggregate(number, [Message(content, dst_node_id=1, message_type=MessageType.TRAIN)])
        found = wire.from_record(arrays)
        return wire.to_record({n: found[n] + (noised[n] - clean[n]) for n in found}, sorted(found)), metrics

    strategy.inner.aggregate_train = late


@pytest.mark.parametrize("spoil", [raw_replies, noise_at_the_end])
def test_the_probe_finds_aggregations_that_leak(world: Make, monkeypatch: pytest.MonkeyPatch, spoil: Spoil) -> None:
    here = world(method="fedper", privacy=USER_LEVEL, server={"strategy": "FedAdam", "options": OPTIONS["FedAdam"]})
    gap, _ = probe(here, monkeypatch, spoil)
    assert gap > 1e-4


# Refusals


@pytest.mark.parametrize("name", ["Krum", "MultiKrum", "Bulyan", "FedMedian", "FedTrimmedAvg"])
def test_strategies_that_look_at_single_replies_are_refused_where_there_is_only_a_mean(
    tiny: Callable[..., Config], tmp_path: Path, name: str
) -> None:
    server = {"strategy": name}
    for privacy in (USER_LEVEL, {"unit": "none", "clip": 1.0}):
        # Refused for the strategy, although these people do not exist: what needs no data comes first.
        config = tiny(server=server, privacy=privacy, data={"name": "no-such-people"})
        with pytest.raises(PrivacyRefusal, match=name) as refusal:
            simulate(config, tmp_path / "run")
        for allowed in OPTIONS:
            assert allowed in str(refusal.value)
        assert not (tmp_path / "run").exists()
    for privacy in ({"unit": "none"}, RECORD_LEVEL):
        config = tiny(server=server, privacy=privacy)
        prepare(config)
        assert type(stock_strategy(config)) is getattr(stock, name)


@pytest.mark.parametrize("privacy", [{}, USER_LEVEL, RECORD_LEVEL], ids=["none", "user", "record"])
@pytest.mark.parametrize(
    "name", ["FedProx", "QFedAvg", "DifferentialPrivacyServerSideFixedClipping", "Strategy", "Nix"]
)
def test_other_strategies_are_unknown(tiny: Callable[..., Config], name: str, privacy: dict[str, Any]) -> None:
    """FedProx changes the clients' loss, which ours would not do: accepting the name would be a silent FedAvg."""
    with pytest.raises(ConfigError, match=f"server.strategy = '{name}'.*FedAdam"):
        prepare(tiny(server={"strategy": name}, privacy=privacy))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FedAdam", {"etta": 1}),
        ("FedAvg", {"eta": 1}),
        ("Krum", {"num_malicious": 1}),
        ("FedAvg", {"fraction_train": 1}),
        ("FedTrimmedAvg", {"beta": 0.9}),
    ],
)
def test_options_that_a_strategy_does_not_take(
    tiny: Callable[..., Config], name: str, options: dict[str, float]
) -> None:
    """Among them the options that would bring back Flower's own sampling."""
    with pytest.raises(ConfigError, match=f"server.options.*{name}.*{next(iter(options))}"):
        stock_strategy(tiny(server={"strategy": name, "options": options}))


# Who takes part


def drawn(strategy: FedpersStrategy, grid: CohortGrid, count: int) -> list[set[str]]:
    """The user ids that are asked in rounds 1 to `count`."""
    record = ArrayRecord({"a": Array(np.zeros(1, np.float32))})
    return [
        {
            strategy.users[message.metadata.dst_node_id - wire.FIRST_NODE]
            for message in strategy.configure_train(number, record, ConfigRecord(), grid)
        }
        for number in range(1, count + 1)
    ]


def test_sampling_is_poisson_by_place_on_the_list_of_users(world: Make) -> None:
    here = world(client_rate=0.3)
    clients = here.clients()
    grid = CohortGrid(clients)
    people = tuple(f"person-{number}" for number in range(60))

    def draw(users: tuple[str, ...] = people, count: int = 8, **changes: Any) -> list[set[str]]:
        return drawn(here.strategy(clients, users=users, **changes), grid, count)

    many = draw(count=150)
    sizes = np.array([len(users) for users in many])
    trials = len(people) * len(many)
    assert abs(sizes.sum() - 0.3 * trials) < 4 * np.sqrt(0.3 * 0.7 * trials)
    # Independent coins: sizes scatter like a binomial. Samples of a fixed size would not scatter at all.
    assert 0.6 < sizes.var() / (0.3 * 0.7 * len(people)) < 1.5
    times = np.array([sum(person in users for users in many) for person in people])
    assert np.all(np.abs(times - 0.3 * len(many)) < 5 * np.sqrt(0.3 * 0.7 * len(many)))

    assert draw() == many[:8]
    assert draw(secret=bytes(32)) != many[:8]
    assert draw(first_round=3, count=5) == many[3:8]  # a resumed run goes on with the coins of the later rounds
    # The list is public and stays: who somebody else on it is, or whether anybody comes behind, changes nothing.
    other = tuple("somebody-else" if person == "person-7" else person for person in people)
    assert any("person-7" in users for users in many[:8])
    assert [users - {"somebody-else"} for users in draw(users=other)] == [users - {"person-7"} for users in many[:8]]
    assert [users & set(people[:50]) for users in many[:8]] == draw(users=people[:50])


def nobody(secret: str, rate: float) -> bool:
    """Whether this secret draws nobody in the first two rounds."""
    people = [f"federation-user-{number:05d}" for number in range(USERS)]
    return not any(len(sampling.draw("poisson", rate, people, bytes.fromhex(secret), number)) for number in (1, 2))


@pytest.mark.parametrize("privacy", [{}, USER_LEVEL], ids=["none", "user"])
def test_a_round_without_anybody(
    world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, privacy: dict[str, Any]
) -> None:
    grids = watch(monkeypatch)
    secret = next(f"{number:064x}" for number in range(100) if nobody(f"{number:064x}", rate=0.02))
    privacy = {**privacy, "secret": secret}
    here = world(privacy=privacy, client_rate=0.02, server={"strategy": "FedAdam", "options": OPTIONS["FedAdam"]})
    broadcasts: list[Arrays] = []
    strategy_start = FedpersStrategy.start

    def start(self: FedpersStrategy, grid: CohortGrid, initial: ArrayRecord, **given: Any) -> Any:
        after = given.pop("evaluate_fn")

        def both(number: int, arrays: ArrayRecord) -> None:
            broadcasts.append(wire.from_record(arrays))
            after(number, arrays)

        return strategy_start(self, grid, initial, evaluate_fn=both, **given)

    monkeypatch.setattr(FedpersStrategy, "start", start)
    _, ledger, history = Road(here, tmp_path / "run").go()
    assert grids[0].seen == []
    assert [row["clients"] for row in history] == [0, 0]
    assert [release.round for release in ledger.releases] == [1, 2]
    moved = [distance(one, other) for one, other in zip(broadcasts[1:], broadcasts, strict=False)]
    if "unit" in privacy:
        assert min(moved) > 1e-3  # noise alone
        assert all(release.mechanism == "gaussian" for release in ledger.releases)
        assert ledger.releases[0].release_hash != ledger.releases[1].release_hash
    else:
        assert moved == [0.0, 0.0]
        assert [release.clients for release in ledger.releases] == [[], []]


# What leaves a client, what the server keeps

NUMBER = 12345.678  # a personal number that no shared one comes near
PATTERN = b"SEC>"  # as fp32 the innocent number 0.19
WORDS = "SENTINEL"


def watch(monkeypatch: pytest.MonkeyPatch) -> list[WatchedGrid]:
    """Let `federate` use watched grids; returns the list that they appear in."""
    grids: list[WatchedGrid] = []

    def make(clients: Clients) -> WatchedGrid:
        grids.append(WatchedGrid(clients))
        return grids[-1]

    monkeypatch.setattr(rounds, "CohortGrid", make)
    return grids


def plant(store: PersonalStore) -> None:
    """Give user 0 a personal number, and the others personal bytes, that are easy to find again."""
    rows = {name: np.array(tensor.numpy()) for name, tensor in store.read(range(USERS)).items()}
    if "head.direction.weight" in rows:
        direction = rows["head.direction.weight"]
        direction[0, 0, 0] = NUMBER
        direction[1:] = np.frombuffer(PATTERN * direction[1:].size, np.float32).reshape(direction[1:].shape)
        store.apply(range(USERS), rows)


def secrets_of(here: World, store: PersonalStore) -> dict[str, bytes]:
    """What nobody may see, by a name for the assertion's message."""
    examples = here.experiment.examples
    found = {"planted bytes": PATTERN * 2, "words": WORDS.encode(), "key": KEY, "key in hex": SECRET.encode()}
    found |= {f"number as {kind}": np.array(NUMBER, kind).tobytes() for kind in ("<f4", "<f8")}
    found |= {"number as text": b"12345.6", "user id": b"federation-user-"}
    found |= {f"text {row}": text.encode() for row, text in enumerate(examples.inputs)}
    for name, rows in store.read(range(USERS)).items():
        for user, row in enumerate(rows.numpy()):
            if row.size > 1 and np.count_nonzero(row) == row.size:
                found[f"{name} of user {user}"] = row.tobytes()
    return found


def leaks(message: Message, secrets: Mapping[str, bytes]) -> list[str]:
    """Which secrets are in a message as Flower would put it on the wire, or as a number in any of its arrays."""
    data = message_to_proto(message).SerializeToString()
    found = [name for name, secret in secrets.items() if secret in data]
    if message.has_content():
        for record in message.content.array_records.values():
            for array in record.values():
                if np.any(np.abs(array.numpy() - NUMBER) < 1000):
                    found.append("number in an array")
    return found


def test_the_search_for_leaks_finds_them_everywhere_in_a_message(world: Make) -> None:
    here = world(method="fedper")
    clients = here.clients()
    CohortGrid(clients)
    plant(clients.store)
    secrets = secrets_of(here, clients.store)
    assert "head.direction.weight of user 5" in secrets
    head = clients.store.read([5])["head.direction.weight"].numpy()
    near = np.array([[0.5, NUMBER - 3]], np.float32)

    def message(**content: Any) -> Message:
        return Message(RecordDict(content), dst_node_id=5, message_type="train")

    clean = message(arrays=here.initial(clients), config=ConfigRecord({"server-round": 1}))
    assert leaks(clean, secrets) == []
    assert leaks(Message(Error(1, "client failed"), reply_to=clean), secrets) == []
    for dirty in (
        message(arrays=ArrayRecord({"x": Array(head)})),
        message(arrays=ArrayRecord({"x": Array(near)})),
        message(arrays=ArrayRecord({WORDS: Array(np.zeros(1))})),
        message(metrics=MetricRecord({"a": NUMBER})),
        message(config=ConfigRecord({"a": f"no {WORDS}"})),
        message(config=ConfigRecord({"a": here.experiment.examples.inputs[0]})),
        Message(Error(1, WORDS), reply_to=clean),
    ):
        assert leaks(dirty, secrets)


@pytest.mark.parametrize(
    ("method", "privacy"),
    [
        *((method, {}) for method in METHODS),
        *((method, USER_LEVEL) for method in ("fedper", "fedrep", "fedbn", "fedsa-lora", "feddpa")),
        *((method, RECORD_LEVEL) for method in ("fedbabu", "feddpa", "rolora")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("unit", "none"),
)
def test_no_message_holds_anything_personal(
    world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, privacy: dict[str, Any]
) -> None:
    grids = watch(monkeypatch)
    here = world(method=method, privacy=privacy)
    road = Road(here, tmp_path / "run")
    plant(road.store)
    secrets = secrets_of(here, road.store)
    road.go()
    secrets |= {f"{name} afterwards": row for name, row in secrets_of(here, road.store).items()}
    messages = [(wire.round_of(sent[0]), one) for grid in grids for sent, got in grid.seen for one in (*sent, *got)]
    if method == "local":
        assert messages == []
        return
    assert len(messages) == 2 * 2 * USERS
    plan, shared = here.experiment.plan, sorted(here.layout.shared)
    assert any("head" in name for name in shared) == (plan.scopes["head"] is SHARED)
    stays = {group for phase in plan.round for group in phase.train if phase.own or plan.scopes[group] is PERSONAL}
    for array in here.model.names(sorted(stays)):  # the search knows what stays before and after the rounds
        assert sum(name.startswith(f"{array} of user") for name in secrets) > (USERS if array == DIRECTION else 0) or (
            road.store.read([0])[array].numel() == 1
        )
    for number, message in messages:
        assert leaks(message, secrets) == []
        down = message.metadata.src_node_id == 1
        sent = message.content[wire.ARRAYS]
        assert sorted({base_name(name) for name in sent}) == (
            shared if down else [name for name in shared if here.model.group[name] in plan.sent(number)]
        )
        for name, array in sent.items():
            assert array.shape == tuple(here.model.initial[base_name(name)].shape)
        if message.metadata.src_node_id == 1:  # the server
            assert set(message.content) == {wire.ARRAYS, wire.CONFIG}
            assert set(message.content[wire.CONFIG]) == {"server-round"}
        else:
            assert set(message.content) == {wire.ARRAYS, wire.METRICS}
            assert dict(message.content[wire.METRICS]) == {"num-examples": 1}


@pytest.mark.parametrize("shape", [(), (3,), (1, 384), (0, 5), (2, 3, 4)])
def test_arrays_are_flowers_byte_for_byte(shape: tuple[int, ...]) -> None:
    """And what another writes is read as Flower reads it: other types, and other orders in memory."""
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    flat = np.ascontiguousarray(values)
    assert wire.to_record({"head.w": values}, ["head.w"])["head.w"] == Array(flat)
    assert np.array_equal(wire.from_record(ArrayRecord({"head.w": Array(flat)}))["head.w"], flat)
    for other in (flat.astype(np.float64), np.asfortranarray(flat), flat.astype(">f4")):
        found = wire.from_record(ArrayRecord({"head.w": Array(other)}))["head.w"]
        assert found.dtype == np.float32
        assert np.array_equal(found, flat)


def test_a_reply_with_other_names_cannot_be_built(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    here = world(method="fedper")
    clients = here.clients()
    train = clients.train_round

    def generous(number: int, users: Any, shared: Any) -> dict[str, Any]:
        heads = {name: rows.numpy() for name, rows in clients.store.read(users).items()}
        return train(number, users, shared) | heads

    monkeypatch.setattr(clients, "train_round", generous)
    with pytest.raises(PrivacyRefusal, match=r"head\.direction\.weight"):
        here.strategy(clients).start(grid=CohortGrid(clients), initial_arrays=here.initial(clients), num_rounds=1)


@pytest.mark.parametrize("privacy", [{}, USER_LEVEL, RECORD_LEVEL], ids=["none", "user", "record"])
def test_metrics_travel_only_where_nothing_is_claimed(world: Make, privacy: dict[str, Any]) -> None:
    """A server that asks all the same, with a stock strategy, learns nothing."""
    here = world(privacy=privacy)
    clients = here.clients()
    grid = WatchedGrid(clients)
    message = Message(
        RecordDict({wire.ARRAYS: here.initial(clients), wire.CONFIG: ConfigRecord({"server-round": 1})}),
        dst_node_id=wire.FIRST_NODE + 2, message_type=MessageType.EVALUATE,
    )  # fmt: skip
    for reply in (*grid.send_and_receive([message]), *answer(clients, [2], [message], pytest.fail)):
        assert set(reply.content) == {wire.METRICS}
        metrics = dict(reply.content[wire.METRICS])
        assert metrics.pop("num-examples") == 1
        assert (metrics == {}) == bool(privacy)
    strategy = here.strategy(clients)
    assert list(strategy.configure_evaluate(1, here.initial(clients), ConfigRecord(), grid)) == []


def test_a_failing_client_tells_the_server_nothing_and_the_simulator_everything(
    world: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = world()
    clients = here.clients()
    grid = CohortGrid(clients)
    told: list[Exception] = []
    config = ConfigRecord({"server-round": 1})

    def message(kind: str, **content: Any) -> Message:
        whole = {wire.ARRAYS: here.initial(clients), wire.CONFIG: config, **content}
        return Message(RecordDict(whole), dst_node_id=wire.FIRST_NODE, message_type=kind)

    def answered(asked: Message, user: int = 0) -> Message:
        return answer(clients, [user], [asked], told.append)[0]

    def check(reply: Message) -> None:
        assert reply.has_error()
        assert (reply.error.code, reply.error.reason) == (wire.CLIENT_FAILED, "client failed")
        assert leaks(reply, {"words": WORDS.encode(), "traceback": b"Traceback"}) == []

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{WORDS}: cannot read 'meet me at the station'")

    with monkeypatch.context() as patch:
        patch.setattr(here.model, "contexts", broken)
        for kind in (MessageType.TRAIN, MessageType.EVALUATE):
            check(answered(message(kind)))
            assert isinstance(told[-1], RuntimeError)
            assert WORDS in str(told.pop())
            with pytest.raises(RuntimeError, match=WORDS):
                grid.send_and_receive([message(kind)])
    for odd in (
        message("train", **{wire.CONFIG: ConfigRecord({WORDS: 1})}),
        message("train", **{wire.ARRAYS: ArrayRecord({WORDS: Array(np.zeros(1))})}),
    ):
        check(answered(odd))
        assert told.pop()
    check(answered(message("train"), user=USERS))
    assert isinstance(told.pop(), IndexError)

    (reply,) = grid.send_and_receive([message("train")])  # a failure is over once it has been raised
    assert not reply.has_error()
    assert not answered(message("train")).has_error()
    assert told == []


def test_the_servers_files_hold_nothing_personal(world: Make, tmp_path: Path) -> None:
    here = world(method="fedper", privacy=USER_LEVEL, server={"strategy": "FedAdam", "options": OPTIONS["FedAdam"]})
    road = Road(here, tmp_path / "run")
    plant(road.store)
    before = (road.directory.private / "rounds" / "head.direction.weight.npy").read_bytes()
    secrets = secrets_of(here, road.store)
    road.go()
    secrets |= {f"{name} afterwards": row for name, row in secrets_of(here, road.store).items()}
    checkpoint, ledger = road.directory.private / "checkpoint.safetensors", road.directory.ledger
    assert PATTERN * 2 in before  # the search would find it where it belongs
    for path in (checkpoint, ledger):
        data = path.read_bytes()
        assert [name for name, secret in secrets.items() if secret in data] == []
    shared = set(here.model.names(("adapter",)))
    arrays = load_file(checkpoint)
    assert {name for name in arrays if name.startswith("shared/")} == {f"shared/{name}" for name in shared}
    kept = {name.split("|", 2)[-1] for name in arrays if name.startswith("strategy/")}
    assert kept == shared  # FedAdam's moments, of the shared arrays alone
    assert all(np.all(np.abs(array - NUMBER) > 1000) for array in arrays.values())
    opening, *lines = map(json.loads, ledger.read_text().splitlines())
    assert opening["shared_names"] == sorted(shared)
    assert [line["participants"] for line in lines] == ["", ""]


# State and ledger


class Killed(Exception):
    """Stands for the power cut."""


class Killer(Reporter):
    def round(self, row: dict[str, Any], total: int) -> None:
        if row["round"] == 2:
            raise Killed


@pytest.mark.parametrize("privacy", [{}, USER_LEVEL], ids=["none", "user"])
@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam"])
def test_a_resumed_strategy_goes_on_with_its_momenta(
    world: Make, tmp_path: Path, name: str, privacy: dict[str, Any]
) -> None:
    here = world(method="fedper", rounds=4, privacy=privacy, server={"strategy": name, "options": OPTIONS[name]})
    whole, whole_ledger, _ = Road(here, tmp_path / "whole").go()
    with pytest.raises(Killed):
        Road(here, tmp_path / "parts").go(Killer())
    again = Road(here, tmp_path / "parts")
    checkpoint = again.directory.recover(again.store)
    assert checkpoint is not None
    assert checkpoint.round == 2
    assert {array.dtype for array in checkpoint.strategy.values()} == {np.dtype(np.float32)}
    parts, parts_ledger, history = again.go()
    assert [row["round"] for row in history] == [1, 2, 3, 4]
    assert same_bytes(parts, whole)
    assert parts_ledger.path.read_bytes() == whole_ledger.path.read_bytes()


@pytest.mark.parametrize("name", OPTIONS)
def test_state_comes_back_as_it_was_saved(world: Make, name: str) -> None:
    here = world(server={"strategy": name, "options": OPTIONS[name]})
    clients = here.clients()
    strategy, other = here.strategy(clients), here.strategy(clients)
    assert strategy.state() == {}
    strategy.start(grid=CohortGrid(clients), initial_arrays=here.initial(clients), num_rounds=1)
    state = strategy.state()
    assert any(name.startswith(("m_t|", "momentum_vector|")) for name in state) == (name != "FedAvg")
    other.load_state(dict(sorted(state.items())))  # the order in which a file gives them back
    assert same_bytes(other.state(), state)


@pytest.mark.parametrize("privacy", [{}, {"clip": CLIP}, RECORD_LEVEL, USER_LEVEL, {**USER_LEVEL, "epsilon": "inf"}])
def test_each_round_has_one_line_in_the_ledger(world: Make, tmp_path: Path, privacy: dict[str, Any]) -> None:
    here = world(method="fedbabu", rounds=3, privacy=privacy)
    guarantee = here.experiment.guarantee
    _, ledger, history = Road(here, tmp_path / "run").go()
    lines = ledger.path.read_text().splitlines()
    assert len(lines) == 1 + 3
    releases = Ledger.load(ledger.path).releases
    assert [release.round for release in releases] == [1, 2, 3] == [row["round"] for row in history]
    assert len({release.release_hash for release in releases}) == 3
    noised = guarantee.noise_multiplier > 0
    assert noised == (privacy.get("epsilon") == 8)
    assert len({release.noise_address for release in releases}) == (3 if noised else 1)
    for release in releases:
        assert (release.mechanism == "gaussian") == noised
        assert (release.noise_multiplier, release.clip) == (guarantee.noise_multiplier, privacy.get("clip"))
        assert release.clients == (None if guarantee.unit == "user" else list(range(USERS)))
    if guarantee.releases:
        assert sum(release.steps for release in releases) == guarantee.releases


@pytest.mark.parametrize("privacy", [USER_LEVEL, RECORD_LEVEL], ids=["user", "record"])
def test_noise_from_an_address_that_was_used_before_is_not_released(
    world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, privacy: dict[str, Any]
) -> None:
    here = world(method="fedbabu", privacy=privacy)
    road = Road(here, tmp_path / "run")
    for module in (guarantee_module, user_level):
        monkeypatch.setattr(module, "fingerprint", lambda key, *address: "ab" * 32)
    with pytest.raises(LedgerError, match="noise key reuse"):
        road.go()
    assert len(Ledger.load(road.directory.ledger).releases) == 1
    checkpoint = road.directory.recover(road.store)
    assert checkpoint is not None
    assert checkpoint.round == 1  # the second broadcast was never made
