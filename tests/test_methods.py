"""Every registered method, new ones included: its table is what happens, and a table that cannot be true is refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from numpy.typing import NDArray
from torch import Tensor

from conftest import SECRET
from fedpers import simulation
from fedpers.cohort.clients import Clients
from fedpers.cohort.layout import layout
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import FAMILIES, FAMILY, GROUPS, Config
from fedpers.errors import ConfigError, PrivacyRefusal
from fedpers.experiment import Experiment, Reuse, build_model, method_plan, prepare
from fedpers.flower import messages as wire
from fedpers.flower.cohort_grid import CohortGrid
from fedpers.flower.strategy import FedpersStrategy
from fedpers.methods.base import FROZEN, PERSONAL, SHARED, Method, Phase
from fedpers.models.array_names import base_name, family_of
from fedpers.plan import Plan
from fedpers.privacy.dataflow import feedback, memories
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.randomness import secret_key
from fedpers.privacy.refusals import check_setup
from fedpers.registry import find, names
from fedpers.reporting import Reporter
from fedpers.simulation import simulate

Tiny = Callable[..., Config]
Arrays = dict[str, NDArray[np.float32]]
METHODS = names("methods")
TABLES = {name: find("methods", name, Method) for name in METHODS}
SHARING = [name for name, method in TABLES.items() if SHARED in method.scopes.values()]
KEY = secret_key(SECRET)
REUSE = Reuse()  # no test here changes a model for good, so all can share one
ALL = "+".join(FAMILIES)
BOTH = ("A", "B", "head")
# What is trained on the records without noise and shapes what is sent, by the papers' algorithms and not by the code.
FEEDS_BACK: dict[str, tuple[str, ...]] = {
    "apfl": (),  # the shared model makes its own steps
    "centralized": (),
    "ditto": (),
    "fedala": (),  # no state at home does, but the blend reads the records: see LEAKS
    "fedalt": ("gate", "head"),
    "fedavg": (),
    "fedavg-finetune": (),
    "fedbabu": (),
    "fedbn": ("norm",),
    "feddpa": (),  # the shared adapter is trained without the personal one
    "fedex-lora": (),
    "fedit": (),
    "fedper": ("head",),
    "fedprox": (),
    "fedrep": ("head",),
    "fedsa-lora": ("B", "head"),
    "fedsvd": (),
    "ffa-lora": (),
    "flora": (),
    "hetlora": (),
    "hydra": ("head",),
    "ifca": (),  # but a choice reads the records: see LEAKS
    "lg-fedavg": ("A", "B"),
    "linear-probe": (),
    "local": (),
    "per-fedavg": (),
    "pfedme": BOTH,  # the shared model goes to the own one, which is trained without noise
    "reptile": (),
    "rolora": (),
    "scaffold": (),  # its control variates are made of noised steps, as in DP-SCAFFOLD
    "sdflora": ("A2", "B2", "head"),
}
# Ways from the records into what is sent that no state at home is on.
LEAKS = {name for name, groups in FEEDS_BACK.items() if groups} | {"fedala", "ifca"}
# What a user kept from earlier rounds and shapes what is sent, where it is not what feeds back.
REMEMBERS: dict[str, tuple[str, ...]] = {
    "fedala": BOTH,
    "fedalt": ("A", "B", "gate", "head"),  # the second adapter is made anew in each round
    "hetlora": ("cut",),
    "pfedme": (),  # the own model starts anew in each round
    "scaffold": ("client_control",),
}
UNCLAIMABLE = {"centralized", "fedalt", "flora", "hetlora"}
SINGLE_REPLIES = {"fedex-lora", "flora", "hetlora", "sdflora"}


@pytest.fixture
def tiny(tiny: Tiny) -> Tiny:
    """One thread (faster for tiny models), and step sizes that move every group visibly."""

    def make(**changes: Any) -> Config:
        rates = {"adapter": 0.3, "norm": 0.1, "head": 0.1}
        local = {"batch_size": 4, "lr": rates, **changes.pop("local", {})}
        personal = {"lr": rates, "batch_size": 4, "epochs": 2, **changes.pop("personal", {})}
        return tiny(engine={"threads": 1, "cohort_size": 4}, local=local, personal=personal, **changes)

    return make


def make_clients(experiment: Experiment, folder: Path) -> Clients:
    model = build_model(experiment, Reporter(), REUSE)
    first = layout(experiment.config, experiment.plan, model).kept()
    store = PersonalStore(folder / "personal", len(experiment.examples.users), first)
    clients = Clients(experiment.config, experiment.plan, experiment.guarantee, model, store, KEY)
    clients.examples = experiment.examples
    return clients


def initial(clients: Clients) -> Arrays:
    return clients.layout.broadcast()


@dataclass(frozen=True)
class Round:
    """One round through Flower's messages."""

    before: Arrays
    after: Arrays
    replies: Arrays  # (users, out, in) by name
    seen: dict[int, set[str]]  # the names in both messages of each user


def server_round(clients: Clients, folder: Path, shared: Arrays, number: int = 1) -> Round:
    guarantee, folder = clients.guarantee, folder / f"round-{number}"
    folder.mkdir(parents=True)
    ledger = Ledger.create(
        folder / "ledger.jsonl",
        guarantee.opening(clients.config, clients.shared_names, 8, "given in the configuration"),
    )  # fmt: skip
    strategy = FedpersStrategy(
        clients.config, guarantee, clients.examples.users, ledger, KEY, clients.layout, first_round=number - 1
    )
    record = wire.to_record(shared, clients.shared_names)
    grid = CohortGrid(clients)
    messages = list(strategy.configure_train(1, record, ConfigRecord(), grid))
    answers = grid.send_and_receive(messages)
    seen: dict[int, set[str]] = {}
    for message in (*messages, *answers):
        node = {message.metadata.src_node_id, message.metadata.dst_node_id} - {1}
        held = {name for record in message.content.array_records.values() for name in record}
        seen.setdefault(min(node) - wire.FIRST_NODE, set()).update(held)
    sent = [wire.from_record(wire.arrays_of(answer)) for answer in answers]
    replies = {name: np.stack([one[name] for one in sent]) for name in sent[0]}
    arrays, _ = strategy.aggregate_train(1, answers)
    assert arrays is not None
    return Round(shared, wire.from_record(arrays), replies, seen)


def moved(found: Mapping[str, Any], start: Mapping[str, Any], wanted: Collection[str]) -> float:
    return max(float(np.abs(np.asarray(found[name]) - np.asarray(start[name])).max()) for name in wanted)


@dataclass(frozen=True)
class Played:
    """Two rounds of a method, and what its users have in the end."""

    clients: Clients
    rounds: tuple[Round, ...]
    kept: dict[str, Tensor]  # after the first round, (users, out, in) by name
    own: dict[str, NDArray[np.float32]]  # own models after training at home, (users, out, in) by name

    @property
    def plan(self) -> Plan:
        return self.clients.plan


@pytest.fixture
def played(tiny: Tiny, tmp_path: Path, known: dict[str, Played]) -> Callable[[str], Played]:
    """Return a function that plays a method, each once."""

    def play(name: str) -> Played:
        if name not in known:
            folder = tmp_path / name
            clients = make_clients(prepare(tiny(method=name, personal={"groups": ALL})), folder)
            shared, rounds, kept = initial(clients), [], {}
            for number in (1, 2) if shared else ():
                rounds.append(server_round(clients, folder, shared, number))
                kept = kept or clients.store.read(range(8))
                shared = rounds[-1].after
            parts = [own for _, own in clients.finish(range(8), shared, clients.store)]
            own = {array: torch.cat([part[array] for part in parts]).numpy() for array in clients.model.layers}
            known[name] = Played(clients, tuple(rounds), kept, own)
        return known[name]

    return play


@pytest.fixture(scope="module")
def known() -> dict[str, Played]:
    return {}


def companions(plan: Plan, array: str) -> list[str]:
    """The names under which a shared array travels."""
    if plan.method.clusters:
        return [f"cluster{place}.{array}" for place in range(int(plan.options[plan.method.clusters]))]
    return [array, *(f"{kind}.{array}" for kind in plan.method.travels)]


def sends(plan: Plan, number: int) -> set[str]:
    """The groups that clients send in a round, read off the table once more."""
    if plan.method.end.__func__ is not Method.end.__func__:  # the method fills what it sends itself
        return {group for group, scope in plan.scopes.items() if scope is SHARED} - set(plan.method.serves)
    running = [phase for phase in plan.round if number % phase.turn[1] == phase.turn[0] and not phase.own]
    return {group for phase in running for group in phase.train if plan.scopes[group] is SHARED}


# ---------------------------------------------------------------- what every method does


@pytest.mark.parametrize("name", METHODS)
def test_only_shared_names_travel_and_personal_groups_stay(played: Callable[[str], Played], name: str) -> None:
    found = played(name)
    plan, clients, model = found.plan, found.clients, found.clients.model
    shared = {array for array, group in model.group.items() if plan.scopes.get(group) is SHARED}
    down = {sent for array in shared for sent in companions(plan, array)}
    assert set(clients.shared_names) == down
    assert bool(found.rounds) == bool(shared)
    for number, one in enumerate(found.rounds, start=1):
        up = {sent for array in shared if model.group[array] in sends(plan, number) for sent in companions(plan, array)}
        assert up, "a round that nobody learns from"
        assert set(one.replies) == up
        assert one.seen == dict.fromkeys(range(8), down)
        assert set(one.after) == down
    changed = {sent for one in found.rounds for sent in one.after if moved(one.after, one.before, [sent]) > 1e-6}
    changed |= {
        sent for one in found.rounds for sent in one.replies if moved(one.replies, one.before, [sent]) > 1e-6
    }  # what the server sets back was moved by its clients
    for array in shared:  # of some models a user trains the best alone
        under = set(companions(plan, array))
        assert under & changed if plan.method.clusters else under <= changed


@pytest.mark.parametrize("name", METHODS)
def test_what_a_user_keeps_is_what_the_table_calls_personal(played: Callable[[str], Played], name: str) -> None:
    found = played(name)
    plan, model = found.plan, found.clients.model
    twins = {group for phase in plan.round if phase.own for group in phase.train}
    twins |= set(plan.shared) if plan.method.keeps else set()
    own = {a for a, group in model.group.items() if plan.scopes.get(group) is PERSONAL or group in twins}
    shared = {array for array, group in model.group.items() if plan.scopes.get(group) is SHARED}
    beside = {f"{kind}.{array}" for kind in plan.method.remembers for array in shared}
    assert set(found.clients.store.arrays) == own | beside
    trained = {group for phase in plan.round for group in phase.train}
    for array in own if found.rounds else ():
        untouched = bool((found.kept[array] == model.initial[array]).all())
        if model.group[array] in trained:
            assert not untouched
        elif not plan.method.overrides("begin"):  # which may fill a group that no phase trains
            assert untouched
    for array in shared:  # a user's own model differs from the others' exactly where the table says so
        apart = moved({array: found.own[array][0]}, {array: found.own[array][1]}, [array]) > 0
        assert not apart or model.group[array] in plan.personal


@pytest.mark.parametrize("name", SHARING)
def test_the_next_broadcast_is_the_mean_or_what_the_method_makes_of_it(
    played: Callable[[str], Played], name: str
) -> None:
    """Nothing but the server functions may come between; what was not sent stays to the last bit."""
    found = played(name)
    plan, own_step = found.plan, []
    for one in found.rounds:
        means = {array: rows.mean(axis=0) for array, rows in one.replies.items()}
        own_step.append(moved(one.after, {**one.before, **means}, one.after) > 1e-6)
        if not plan.method.overrides("combine", "serve"):
            assert not own_step[-1]
        for array in set(one.after) - set(one.replies):
            kept = one.after[array].tobytes() == one.before[array].tobytes()
            assert kept != (found.clients.model.group[base_name(array)] in plan.method.serves)
    assert any(own_step) == plan.method.overrides("combine", "serve")


@pytest.mark.parametrize("name", METHODS)
def test_what_is_sent_depends_on_what_was_kept_where_it_is_said_to(
    tiny: Tiny, tmp_path: Path, played: Callable[[str], Played], name: str
) -> None:
    """Each part of what a user keeps, and that ever moves, is changed on its own. The refusals rest on this list."""
    experiment = prepare(tiny(method=name, personal={"groups": ALL}))
    clients = make_clients(experiment, tmp_path)
    start, first, rng = initial(clients), clients.store.initial, np.random.default_rng(5)
    kind = {array: clients.model.group.get(array, array.partition(".")[0]) for array in first}
    beside, kept = set(experiment.plan.method.remembers), played(name).kept
    moving = {part for array, part in kind.items() if kept and (part in beside or (kept[array] != first[array]).any())}
    scattered = {
        array: torch.from_numpy(
            np.float32(value + (kind[array] not in beside) * 0.2 * rng.standard_normal((8, *value.shape)))
        )
        for array, value in first.items()
    }

    def replies(kept: Mapping[str, Tensor]) -> Arrays:
        clients.store.stage(range(8), kept)
        return clients.train_round(2, range(8), start)

    usual = replies(scattered)
    found = set()
    for part in moving:
        other = {
            array: value + (kind[array] == part) * (torch.ones(()) if part in beside else torch.rand(value.shape))
            for array, value in scattered.items()
        }
        if moved(replies(other), usual, usual) > 1e-6:
            found.add(part)
    assert found == set(REMEMBERS.get(name, FEEDS_BACK.get(name, feedback(experiment.plan))))
    if found:  # sampling of a fixed size is refused for these
        assert memories(experiment.plan)
    if name in FEEDS_BACK:
        assert bool(memories(experiment.plan)) == bool(found or FEEDS_BACK[name])


@pytest.mark.parametrize("name", METHODS)
def test_personal_state_is_carried_into_the_next_round(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """A round starts from what its user kept, not from the public initial value; nobody else's state is touched."""
    slow = {"lr": {"adapter": 0.01, "norm": 0.01, "head": 0.01}}
    experiment = prepare(tiny(method=name, local=slow, personal={"groups": ALL, **slow}))
    plan, clients = experiment.plan, make_clients(experiment, tmp_path)
    if not clients.store.arrays:
        assert plan.groups(PERSONAL) == plan.twins == ()
        return
    far = {array: value.expand(8, *value.shape) + 5.0 for array, value in clients.store.initial.items()}
    clients.store.stage(range(8), far)
    clients.train_round(2, [1, 6, 3], initial(clients))
    trained = {group for phase in plan.round for group in phase.train if plan.scopes[group] is PERSONAL}
    for array, rows in clients.store.read(range(8)).items():
        assert torch.equal(rows[[0, 2, 4, 5, 7]], far[array][[0, 2, 4, 5, 7]]), "a user who was not asked changed"
        group = clients.model.group.get(array)
        # What a method's own functions fill, or blend into what was received, starts elsewhere.
        if group in trained or not (group is None or plan.method.keeps or plan.method.overrides("begin")):
            assert float((rows - far[array]).abs().max()) < 2.5, "training started somewhere else"


@pytest.mark.parametrize("name", METHODS)
def test_a_run_exports_the_shared_groups_alone(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The end of the road: what the server holds after a whole run, and whose own models moved."""
    for figure in ("learning_curve", "per_user_gain"):
        monkeypatch.setattr(simulation, figure, lambda *args, **options: None)
    evaluation = {"every": 0, "local_only": name == "local"}
    config = tiny(method=name, rounds=1, data={"users": 4}, personal={"groups": ALL}, evaluation=evaluation)
    plan = method_plan(name, config)
    run = simulate(config, tmp_path / "run", reuse=REUSE)
    # PEFT's file needs both factors: beside a shared one lies the other at its public initial value.
    factors = {"A", "B"} if {"A", "B"} & set(plan.shared) else set()
    model = build_model(prepare(config), Reporter(), REUSE)
    assert {model.group[array] for array in run.shared} == set(plan.shared) | factors
    for array in run.shared:
        if model.group[array] not in plan.shared:
            np.testing.assert_array_equal(run.shared[array], model.initial[array].numpy())
    kinds = set(run.users.column("kind").to_pylist())
    table = run.users.to_pandas().pivot(index="user", columns="kind", values="loss")
    assert ("swap" in kinds) == bool(plan.personal)
    differs = table["own"] != table["global"]
    assert bool(differs.any()) == bool(plan.personal)
    if plan.kept or plan.finish:  # a user whose own part is a choice, or a cut, may have chosen the whole
        assert differs.all()


def at_home(method: type[Method]) -> set[str]:
    return {FAMILY[group] for phase in method.finish for group in phase.train}


@pytest.mark.parametrize(
    ("name", "share"),
    [
        (name, share)
        for name in SHARING
        for share in FAMILIES
        if share in {FAMILY[g] for g, scope in TABLES[name].scopes.items() if scope is SHARED}
    ],
)
def test_a_frozen_group_never_changes(tiny: Tiny, tmp_path: Path, name: str, share: str) -> None:
    """What `share` leaves out is frozen in the rounds; at home it may be tuned, if the configuration says so."""
    method = TABLES[name]
    tuned = share if share in at_home(method) else "+".join(sorted(at_home(method)) or FAMILIES)
    config = tiny(method=name, share=share, personal={"groups": tuned})
    if missing := [family for family in method.needs if family != share]:
        says = rf"share={share}: method '{name}' is about the {missing[0]}.*; set share={missing[0]}\+{share}"
        with pytest.raises(ConfigError, match=says):
            prepare(config)
        assert prepare(config.model_copy(update={"share": (*missing, share)})).plan.shared
        return
    experiment = prepare(config)
    plan, clients = experiment.plan, make_clients(experiment, tmp_path)
    model = clients.model
    for group, scope in method.scopes.items():
        assert plan.scopes[group] is (FROZEN if scope is SHARED and FAMILY[group] != share else scope)
    frozen = [array for array, group in model.group.items() if plan.scopes[group] is FROZEN]
    start = initial(clients)
    replies = clients.train_round(1, range(8), start)
    assert not set(frozen) & {base_name(array) for array in (*replies, *start)}
    for array in frozen:
        held = model.layers[array].weight.detach()  # what the last cohort's last phase read
        assert torch.equal(held, model.initial[array].expand_as(held))
    given = {**start, **{array: reply.mean(axis=0) for array, reply in replies.items()}}
    before = {}
    for cohort, own in clients.own(range(8), given, clients.store):
        before.update({user: {n: v[i].clone() for n, v in own.items()} for i, user in enumerate(cohort)})
    still = [array for array, group in model.group.items() if group not in plan.personal]
    common = clients.layout.common(given)
    for cohort, own in clients.finish(range(8), given, clients.store):
        for array in still:
            everyones = torch.from_numpy(common[array]) if array in common else model.initial[array]
            assert torch.equal(own[array], everyones.expand_as(own[array]))
        for group in (g for phase in plan.finish for g in phase.train):
            for place, user in enumerate(cohort):
                assert moved({n: v[place] for n, v in own.items()}, before[user], model.names([group])) > 1e-6


@pytest.mark.parametrize("name", [name for name in SHARING if TABLES[name].pooled])
def test_a_pool_is_one_client_with_the_records_of_all(tiny: Tiny, tmp_path: Path, name: str) -> None:
    whole = {"batch_size": 1000, "epochs": 2}  # the order of the records is then no matter
    pooled = make_clients(prepare(tiny(method=name, local=whole)), tmp_path / "pool")
    alone = make_clients(prepare(tiny(method="fedavg", local=whole)), tmp_path / "alone")
    rows = np.concatenate(alone.examples.train)
    alone.examples = replace(alone.examples, train=(rows, *alone.examples.train[1:]))
    start = initial(pooled)
    expected = alone.train_round(1, [0], start)
    replies = pooled.train_round(1, range(8), start)
    assert moved(expected, start, expected) > 1e-3
    for array, reply in replies.items():
        np.testing.assert_array_equal(reply, np.repeat(reply[:1], 8, axis=0))
        np.testing.assert_allclose(reply[:1], expected[array], atol=1e-5)


def test_averaging_counts_every_client_the_same(tiny: Tiny, tmp_path: Path) -> None:
    """Users differ in how many records they have, and that number must not weigh: it is private."""
    experiment = prepare(tiny(method="fedavg"))
    assert len({len(rows) for rows in experiment.examples.train}) > 1
    clients = make_clients(experiment, tmp_path)
    replies = clients.train_round(1, range(8), initial(clients))
    found = server_round(clients, tmp_path, initial(clients))
    for array, reply in replies.items():
        np.testing.assert_allclose(found.after[array], reply.mean(axis=0), atol=1e-6)


# ---------------------------------------------------------------- methods are not each other


def test_no_two_methods_are_the_same(played: Callable[[str], Played]) -> None:
    """After two rounds and training at home, what the server holds or what the users have differs between any two."""

    def outcome(name: str) -> Arrays:
        found = played(name)
        shared = found.rounds[-1].after if found.rounds else {}
        return {**{f"own {n}": v for n, v in found.own.items()}, **{f"shared {n}": v for n, v in shared.items()}}

    outcomes = {name: outcome(name) for name in METHODS}
    for one, other in itertools.combinations(METHODS, 2):
        first, second = outcomes[one], outcomes[other]
        assert set(first) != set(second) or moved(first, second, first) > 1e-4, f"{one} is {other}"


@pytest.mark.parametrize(
    ("one", "other"), [("fedrep", "fedper"), ("fedbabu", "fedavg-finetune"), ("fedper", "fedbabu")]
)
def test_methods_differ_measurably(played: Callable[[str], Played], one: str, other: str) -> None:
    first, second = played(one), played(other)
    after, start = first.rounds[-1].after, first.rounds[0].before
    adapter = [name for name in after if family_of(name) == "adapter"]
    assert moved(after, second.rounds[-1].after, adapter) > 0.05 * moved(after, start, adapter)


def test_fedrep_fits_the_head_first_and_the_adapter_through_it(tiny: Tiny, tmp_path: Path) -> None:
    """With a head that cannot move, FedRep is FedBABU; the two differ by the head that FedRep puts in between."""
    # The phases draw their batch orders by their place, so whole batches make the comparison exact.
    whole = {"batch_size": 64}
    rep = make_clients(prepare(tiny(method="fedrep", local=whole, personal={"lr": {"head": 1e-30}})), tmp_path / "rep")
    babu = make_clients(prepare(tiny(method="fedbabu", local=whole)), tmp_path / "babu")
    still, bare = rep.train_round(1, range(8), initial(rep)), babu.train_round(1, range(8), initial(babu))
    for array, value in bare.items():
        np.testing.assert_allclose(still[array], value, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "section", "moves"),
    [
        ("fedper", "local", False),
        ("fedper", "personal", True),
        ("fedrep", "local", True),
        ("fedrep", "personal", False),
    ],
)
def test_phases_of_personal_groups_alone_use_the_personal_settings(
    tiny: Tiny, tmp_path: Path, name: str, section: str, moves: bool
) -> None:
    """Where a section's step size for the head is next to nothing, a head trained under it stands still."""
    clients = make_clients(prepare(tiny(method=name, **{section: {"lr": {"adapter": 0.3, "head": 1e-30}}})), tmp_path)
    replies = clients.train_round(1, range(8), initial(clients))
    assert moved(replies, {n: v[None] for n, v in initial(clients).items()}, clients.shared_names) > 1e-4
    heads = clients.store.read(range(8))
    start = {array: value.expand(8, *value.shape) for array, value in clients.store.initial.items()}
    assert (moved(heads, start, list(heads)) > 1e-4) == moves


@pytest.mark.parametrize("other", ["fedavg-finetune", "ditto", "apfl"])
def test_what_happens_beside_the_shared_model_or_after_it_leaves_the_rounds_as_they_are(
    played: Callable[[str], Played], other: str
) -> None:
    for first, second in zip(played("fedavg").rounds, played(other).rounds, strict=True):
        assert {n: v.tobytes() for n, v in second.after.items()} == {n: v.tobytes() for n, v in first.after.items()}


# ---------------------------------------------------------------- verdicts and refusals


@pytest.mark.parametrize("name", sorted(FEEDS_BACK))
def test_feedback_is_read_off_the_table(tiny: Tiny, name: str) -> None:
    assert feedback(method_plan(name, tiny(method=name, personal={"groups": ALL}))) == FEEDS_BACK[name]


@pytest.mark.parametrize("name", METHODS)
def test_the_verdict_follows_from_what_moves_in_a_round(tiny: Tiny, name: str) -> None:
    """A new method needs no line here: its verdict is derived a second time."""
    made = method_plan(name, tiny(method=name, personal={"groups": ALL}))
    sending = [phase for phase in made.round if not phase.own and set(phase.train) & set(made.shared)]
    read = {group for phase in sending for group in made.scopes if group not in phase.without}
    own = {group for phase in made.round if phase.own for group in phase.train}
    moves = {group for phase in made.round if not phase.own for group in phase.train} - set(made.shared)
    expected = moves & read  # a personal group that moves and is read where a shared one is trained
    if made.method.overrides("begin", "gradient", "end"):  # code of its own may read all that stays at home
        expected |= {*moves, *own} if made.shared else set()
    assert set(feedback(made)) == expected


def record_level(tiny: Tiny, name: str, **privacy: Any) -> Config:
    return tiny(method=name, privacy={"unit": "record", "clip": 1.0, "epsilon": 4.0, "delta": 1e-4, **privacy},
                personal={"groups": ALL}, data={"name": "no-such-source"})  # fmt: skip


def passes(config: Config) -> None:
    """The checks are through when data are looked for."""
    with pytest.raises(ConfigError, match="no-such-source"):
        prepare(config)


@pytest.mark.parametrize("name", sorted(LEAKS - UNCLAIMABLE))
def test_feedback_under_record_level_noise_is_refused_before_any_data_is_read(tiny: Tiny, name: str) -> None:
    config = record_level(tiny, name)
    with pytest.raises(PrivacyRefusal) as refusal:
        prepare(config)
    message, personal = str(refusal.value), TABLES[name].scopes.values()
    assert f"method '{name}' with privacy.unit=record is refused (the records -> " in message
    assert "privacy.unit=user" in message
    users = tiny(method=name, personal={"groups": ALL}, privacy={"unit": "user", "clip": 1.0, "trust": "user-local"})
    check_setup(users, method_plan(name, users))
    feeds = [group for group in FEEDS_BACK[name] if TABLES[name].scopes[group] is PERSONAL]
    if not feeds:  # nothing personal to freeze or to noise
        assert "privacy.head" not in message
        for policy in ("frozen", "joint"):
            with pytest.raises((ConfigError, PrivacyRefusal)):
                prepare(record_level(tiny, name, head=policy))
        return
    assert PERSONAL in personal
    assert "epsilon" in message
    freezes = "B" not in feeds or TABLES[name].scopes["A"] is not SHARED  # else A would get no gradient
    assert ("privacy.head=frozen" in message) == freezes
    assert "privacy.head=joint" in message
    for method in ("fedbabu", "fedavg-finetune"):  # both are about heads
        assert (f"method={method}" in message) == (feeds == ["head"])
    if freezes:
        passes(record_level(tiny, name, head="frozen"))
    passes(record_level(tiny, name, head="joint"))
    passes(config.model_copy(update={"method": "fedbabu"}))
    passes(config.model_copy(update={"method": "fedavg-finetune"}))


@pytest.mark.parametrize("name", sorted(FEEDS_BACK))
def test_what_may_be_claimed_of_a_method(tiny: Tiny, name: str) -> None:
    """Records where nothing leaks, users nearly always; where the server sums, without looking at single replies."""

    def accepted(**privacy: Any) -> bool:
        config = tiny(method=name, personal={"groups": ALL}, privacy={"clip": 1.0, "delta": 1e-3, **privacy})
        try:
            return prepare(config, REUSE).guarantee.unit == privacy["unit"]
        except PrivacyRefusal:
            return False

    fit = name not in UNCLAIMABLE
    assert accepted(unit="record") == (fit and name not in LEAKS)
    assert accepted(unit="user", trust="user-local") == fit
    for trust in ("user-central", "user-distributed"):
        assert accepted(unit="user", trust=trust) == (fit and name not in SINGLE_REPLIES)
    assert accepted(unit="none", clip=None)
    assert accepted(unit="none") == (name not in SINGLE_REPLIES and not TABLES[name].everyone)


def define(scopes: Any, rounds: Sequence[Phase] = (), finish: Sequence[Phase] = (), **more: Any) -> type[Method]:
    return type("Odd", (Method,), {"scopes": scopes, "round": tuple(rounds), "finish": tuple(finish)} | more)


BABU = {"adapter": SHARED, "head": PERSONAL}
AVG = {"adapter": SHARED, "head": SHARED}
STEP = Phase("adapter", "head")
ODD: dict[str, tuple[Any, Sequence[Phase], Sequence[Phase], dict[str, Any], str]] = {
    "a group without a scope": ({"adapter": SHARED}, [Phase("adapter")], [], {}, "scopes must also name head"),
    "half an adapter": ({"A": SHARED, "head": FROZEN}, [Phase("A")], [], {}, "scopes must also name B; FROZEN leaves"),
    "scopes that are no mapping": ([("adapter", SHARED)], [], [], {}, 'scopes must map groups to scopes, such as {"ad'),
    "a scope that is none": ({**BABU, "head": "mine"}, [], [], {}, "scope of 'head' is 'mine'; use FROZEN, SHARED or"),
    "an unknown group": ({**BABU, "hed": SHARED}, [Phase("adapter")], [], {}, "scopes['hed'] names an unknown group"),
    "shared and personal": (
        {**BABU, "A": PERSONAL}, [Phase("adapter")], [], {}, "scopes name 'A' twice, as 'adapter' and as 'A'",
    ),
    "personal and shared": (
        {"B": PERSONAL, **BABU}, [Phase("adapter")], [], {}, "scopes name 'B' twice, as 'B' and as 'adapter'",
    ),
    "a phase of an unknown group": (
        BABU, [Phase("adapter"), Phase("tail")], [], {},
        "round[1] = Phase('tail') names the group 'tail', which scopes do not; there: adapter, head",
    ),
    "a phase of a group without a scope": (
        BABU, [Phase("adapter", "norm")], [], {}, "round[0] = Phase('adapter', 'norm') names the group 'norm', which",
    ),
    "a last phase of an unknown group": (
        BABU, [Phase("adapter")], [Phase("hed")], {}, "finish[0] = Phase('hed') names the group 'hed', which scopes",
    ),
    "reading an unknown group": (
        BABU, [Phase("adapter", without=("adapter2",))], [], {},
        "round[0] = Phase('adapter', without=('adapter2',)) names the group 'A2'",
    ),
    "training a frozen group": (
        {**BABU, "head": FROZEN}, [Phase("adapter", "head")], [], {},
        "round[0] = Phase('adapter', 'head') trains 'head', which is frozen; change its scope or the phase",
    ),
    "training a frozen factor": (
        {"A": FROZEN, "B": SHARED, "head": PERSONAL}, [Phase("adapter")], [], {},
        "round[0] = Phase('adapter') trains 'A', which is frozen",
    ),
    "tuning a frozen group": (
        {**BABU, "head": FROZEN}, [Phase("adapter")], [Phase("head")], {}, "finish[0] = Phase('head') trains 'head'",
    ),
    "sharing what never moves": (BABU, [Phase("head")], [Phase("adapter")], {}, "'A' is shared but no round phase"),
    "sharing a copy's group": (
        AVG, [Phase("adapter"), Phase("head", own=True)], [], {}, "'head' is shared but no round phase trains it",
    ),
    "a phase of nothing": (BABU, [Phase("adapter"), Phase()], [], {}, "round[1] = Phase() trains nothing; name a gr"),
    "rounds that are no tuple": (BABU, [], [], {"round": [Phase("adapter")]}, "round must be a tuple of phases, such"),
    "a phase that is none": (BABU, [Phase("adapter")], ["head"], {}, "finish must be a tuple of phases"),
    "an own copy of what is personal": (
        BABU, [Phase("adapter"), Phase("head", own=True)], [], {},
        "round[1] = Phase('head', own=True): 'head' is personal already; own copies are of shared groups",
    ),
    "an own copy at home": (
        AVG, [STEP], [Phase("head", own=True)], {}, "finish[0] = Phase('head', own=True): after the last release",
    ),
    "an option that is not declared": (
        AVG, [Phase("adapter", "head", pull="mu")], [], {},
        "round[0] = Phase('adapter', 'head', pull='mu') reads the option 'mu'; add it to options = {\"mu\": ...}",
    ),
    "an inner step that is not declared": (
        AVG, [Phase("adapter", "head", inner="inner")], [], {"options": {"iner": 1.0}}, "reads the option 'inner'; add",
    ),
    "a gate that is not declared": (AVG, [Phase("adapter", "head", gate="g")], [], {}, "reads the option 'g'; add it"),
    "clusters that are not declared": (
        AVG, [STEP], [], {"clusters": "models"}, "clusters = 'models' names no option; add it to options",
    ),
    "a turn that never comes": (
        AVG, [Phase("adapter", turn=(2, 2)), Phase("head")], [], {},
        "round[0] = Phase('adapter', turn=(2, 2)): turn is (remainder, divisor) with 0 <= remainder < divisor",
    ),
    "a turn before the first": (AVG, [Phase("adapter", "head", turn=(-1, 2))], [], {}, "turn is (remainder, divisor)"),
    "a turn of nothing": (AVG, [Phase("adapter", "head", turn=(0, 0))], [], {}, "turn is (remainder, divisor)"),
    "training without itself": (
        AVG, [Phase("adapter", "head", without=("B",))], [], {}, "trains 'B' and reads it at its initial value",
    ),
    "a blend with nothing": (
        AVG, [Phase("adapter", "head", blend="eta"), STEP], [], {"options": {"eta": 1.0}},
        "blends with what the user kept; add keeps = True",
    ),
    "a mixture of nothing": (
        AVG, [Phase("adapter", "head", mix="alpha")], [], {"options": {"alpha": 0.5}}, "mix is of own copies; add own=",
    ),
    "serving what is personal": (BABU, [Phase("adapter")], [], {"serves": ("head",)}, "serves names 'head', which"),
    "serving what is not there": (
        AVG, [STEP], [], {"serves": ("residual",)}, "serves names 'residual', which is not shared; change its scope",
    ),
    "a phase without its comma": (
        AVG, [], [], {"round": STEP}, "a comma is missing: round = (Phase('adapter', 'head'),)",
    ),
    "keeping what never moves": (BABU, [Phase("adapter")], [], {}, "'head' is personal but no phase trains it; it"),
    "a first factor that gets no gradient": (
        {"A": SHARED, "B": FROZEN, "head": SHARED}, [Phase("A", "head")], [], {},
        "'B' is frozen at its initial value, zero, so 'A' gets no gradient; train 'B' and freeze 'A'",
    ),
    "needing a group that is no family": (AVG, [STEP], [], {"needs": ("A",)}, "needs names 'A'; `share` knows adapter"),
    "a strength in the place of its name": (
        AVG, [Phase("adapter", "head", pull=0.1)], [], {}, 'write pull="pull" and options = {"pull": 0.1}',  # type: ignore[arg-type]
    ),
    "a misspelt attribute": (AVG, [STEP], [], {"finnish": ()}, "'finnish' is nothing that a method has; did you mean"),
    "a misspelt function": (
        AVG, [STEP], [], {"beginn": classmethod(lambda cls, visit: None)}, "did you mean 'begin'? (A helper of you",
    ),
    "a function of no class": (
        AVG, [STEP], [], {"end": lambda cls, visit: None}, "end must be a class method; write @classmethod above",
    ),
    "a name without its comma": (AVG, [STEP], [], {"travels": "pace"}, 'a comma is missing: travels = ("pace",)'),
    "names that are none": (AVG, [STEP], [], {"remembers": (1,)}, "remembers = (1,); expected a tuple of names"),
    "a switch that is none": (AVG, [STEP], [], {"keeps": "yes"}, "keeps = 'yes'; expected True or False"),
    "a reason that is no text": (AVG, [STEP], [], {"unclaimable": True}, "unclaimable = True; expected text"),
    "a link that is none": (AVG, [STEP], [], {"link": "tanh"}, "link = 'tanh'; expected one of linear, sigmoid"),
    "an option that is no number": (
        AVG, [STEP], [], {"options": {"mu": "0.1"}}, "options['mu'] = '0.1'; expected a finite number, its default",
    ),
    "options that are no mapping": (AVG, [STEP], [], {"options": ("mu",)}, "options must map names to numbers"),
    "a range of nothing": (AVG, [STEP], [], {"ranges": {"mu": (0.0, 1.0)}}, "ranges names 'mu', which is no option"),
    "a range that is none": (AVG, [STEP], [], {"options": {"mu": 1.0}, "ranges": {"mu": 1.0}}, "expected (least, la"),
    "a default out of range": (
        AVG, [STEP], [], {"options": {"mu": 2.0}, "ranges": {"mu": (0.0, 1.0)}}, "lies outside of ranges, (0.0, 1.0)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_a_table_that_contradicts_itself_is_refused_when_it_is_defined(case: str) -> None:
    scopes, rounds, finish, more, message = ODD[case]
    with pytest.raises(ConfigError, match=re.escape(message)) as refusal:
        define(scopes, rounds, finish, **more)
    assert str(refusal.value).startswith("method Odd: ")


def test_a_sound_table_is_accepted() -> None:
    expected = {"A": SHARED, "B": SHARED, "head": PERSONAL}
    assert define(BABU, [Phase("adapter")], [Phase("head")]).scopes == expected
    assert define({"head": PERSONAL, "B": SHARED, "A": SHARED}, [Phase("B", "A")], [Phase("head")]).scopes == expected
    assert list(define(AVG, [STEP]).scopes) == [group for group in GROUPS if group in BOTH]
    # Each of these is one line away from a table above.
    define(AVG, [Phase("adapter", "head", pull="mu")], options={"mu": 0.1})
    define(AVG, [STEP], clusters="models", options={"models": 2.0})
    define(AVG, [Phase("adapter", turn=(1, 2)), Phase("head")])
    define({**AVG, "norm": PERSONAL}, [Phase("adapter", "head", without=("norm",)), Phase("norm")])
    define(AVG, [Phase("adapter", "head", blend="eta"), STEP], options={"eta": 1.0}, keeps=True)
    define(AVG, [STEP, Phase("adapter", "head", own=True, mix="alpha")], options={"alpha": 0.5})
    define({**AVG, "residual": SHARED}, [STEP], serves=("residual",))


def test_a_phase_says_what_it_is_in_the_words_of_its_definition() -> None:
    phase = Phase("adapter", "head", own=True, pull="mu", without=("adapter2", "gate"), turn=(1, 3))
    assert eval(str(phase)) == phase
    less = Phase("B", "head", own=True, pull="mu", without=("A2", "B2", "gate"), turn=(1, 3))
    assert phase.only({"B", "head"}) == less != phase
    assert [phase.on(number) for number in range(1, 5)] == [True, False, False, True]


# ---------------------------------------------------------------- what the configuration may change


def phases(of: Sequence[Phase]) -> list[tuple[str, ...]]:
    return [phase.train for phase in of]


def test_share_freezes_what_it_leaves_out_in_the_rounds(tiny: Tiny) -> None:
    found = method_plan("fedavg", tiny(share="adapter"))
    assert found.scopes == {"A": SHARED, "B": SHARED, "head": FROZEN}
    assert phases(found.round) == [("A", "B")]
    assert found.shared == ("A", "B")
    assert found.personal == ()
    found = method_plan("fedavg", tiny(share="head"))
    assert phases(found.round) == [("head",)]
    assert method_plan("fedavg", tiny()).shared == BOTH


def test_share_never_turns_a_personal_group_into_something_else(tiny: Tiny) -> None:
    found = method_plan("fedrep", tiny(share="adapter"))
    assert found.scopes["head"] is PERSONAL
    assert phases(found.round) == [("head",), ("A", "B")]
    found = method_plan("fedsa-lora", tiny(share="adapter"))
    assert (found.scopes["A"], found.scopes["B"]) == (SHARED, PERSONAL)


@pytest.mark.parametrize("name", ["fedrep", "fedper", "fedbabu"])
def test_sharing_nothing_of_what_a_method_shares_is_refused(tiny: Tiny, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"share=head: method '{name}' shares only adapter; set share=adapter"):
        method_plan(name, tiny(share="head"))
    assert method_plan("local", tiny(share="head")).shared == ()


@pytest.mark.parametrize("name", METHODS)
def test_options_are_the_methods_own_numbers(tiny: Tiny, name: str) -> None:
    declared = TABLES[name].options
    own = {"method": name, "personal": {"groups": ALL}}
    assert method_plan(name, tiny(**own)).options == declared
    for option, value in declared.items():
        other = value / 2 + 0.25
        assert method_plan(name, tiny(**own, options={option: other})).options == {**declared, option: other}
        with pytest.raises(ConfigError, match=rf"options\.{option} = -1: method '{name}' expects a number from 0"):
            method_plan(name, tiny(**own, options={option: -1.0}))
    known = ", ".join(f"{option}={value:g}" for option, value in declared.items()) or "none"
    says = f"options.no_such: method '{name}' has no such number; its options: {known}."
    with pytest.raises(ConfigError, match=re.escape(says)):
        method_plan(name, tiny(**own, options={**declared, "no_such": 1.0}))


def test_options_stay_in_the_range_that_a_method_gives(tiny: Tiny) -> None:
    for option in ("lowest", "gamma"):
        assert method_plan("hetlora", tiny(options={option: 1.0})).options[option] == 1
        with pytest.raises(
            ConfigError, match=rf"options\.{option} = 1\.5: method 'hetlora' expects a number from 0 to 1"
        ):
            method_plan("hetlora", tiny(options={option: 1.5}))


def test_what_moves_by_own_copies_alone_needs_them_all(tiny: Tiny) -> None:
    """Else the part without an own copy would be sent as it came, in every round."""
    says = r"'pfedme'.*the shared adapter would never change; set personal\.groups=adapter\+head, or share=head"
    with pytest.raises(ConfigError, match=says):
        method_plan("pfedme", tiny(method="pfedme", personal={"groups": "head"}))
    for right in ({"personal": {"groups": "adapter+head"}}, {"share": "head", "personal": {"groups": "head"}}):
        found = method_plan("pfedme", tiny(method="pfedme", **right))
        assert found.sent(1) == found.shared


@pytest.mark.parametrize("count", [1.0, 0.0, 2.5])
def test_a_number_of_clusters_is_a_whole_number_from_two_on(tiny: Tiny, tmp_path: Path, count: float) -> None:
    clustered = next(name for name, method in TABLES.items() if method.clusters)
    with pytest.raises(ConfigError, match=rf"options\.clusters = {count:g}: expected a whole number from 2 on"):
        make_clients(prepare(tiny(method=clustered, options={"clusters": count})), tmp_path)
    found = make_clients(prepare(tiny(method=clustered, options={"clusters": 3.0})), tmp_path)
    assert len(found.shared_names) == 3 * len(found.layout.shared)


@pytest.mark.parametrize(
    ("groups", "finish"),
    [("head", ("head",)), ("adapter", ("A", "B")), ("adapter+head", BOTH)],
)
def test_personal_groups_say_what_is_tuned_at_home(tiny: Tiny, groups: str, finish: tuple[str, ...]) -> None:
    found = method_plan("fedavg-finetune", tiny(personal={"groups": groups}))
    assert phases(found.finish) == [finish]
    assert found.personal == finish
    assert found.shared == BOTH, "tuning at home takes nothing from what is shared"
    assert feedback(found) == ()
    assert phases(found.round) == [BOTH]
    assert phases(method_plan("local", tiny(personal={"groups": groups})).finish) == [finish]
    ditto = method_plan("ditto", tiny(personal={"groups": groups}))
    assert phases(ditto.round) == [BOTH, finish]
    assert ditto.twins == ditto.personal == finish
    # The rounds of a method that trains personal groups in them do not depend on it.
    assert phases(method_plan("fedrep", tiny(personal={"groups": groups})).round) == [("head",), ("A", "B")]


def test_a_group_frozen_in_the_rounds_may_be_tuned_at_home(tiny: Tiny, tmp_path: Path) -> None:
    experiment = prepare(tiny(method="fedavg-finetune", share="adapter", personal={"groups": "head"}))
    assert experiment.plan.scopes["head"] is FROZEN
    assert experiment.plan.personal == ("head",)
    clients = make_clients(experiment, tmp_path)
    (cohort, own), *_ = clients.finish(range(4), initial(clients), clients.store)
    assert len(cohort) == 4
    heads = clients.model.names(["head"])
    assert moved(own, clients.model.broadcast(4), heads) > 1e-4
    assert moved(own, clients.model.broadcast(4), clients.shared_names) == 0


@pytest.mark.parametrize("name", sorted(FEEDS_BACK))
def test_a_method_says_where_it_is_from_and_what_it_adds(name: str) -> None:
    method = TABLES[name]
    assert method.summary().endswith(".") or len(method.summary()) > 20
    neighbour = re.match(r"from ([a-z-]+): .", method.differs)
    assert neighbour, f"{name}: differs does not begin with `from METHOD: `"
    assert neighbour[1] in set(METHODS) - {name}
    if name not in {"local", "centralized"}:
        assert re.search(r"\b(19|20)\d\d$", method.cite), f"{name}: cite names no year"
        year = method.cite[-4:]
        assert year in (method.__doc__ or ""), f"{name}: the docstring does not cite the paper of {year}"


def test_a_phase_at_home_that_the_configuration_empties_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"personal\.groups=adapter: leaves nothing of Phase\('head'\).*=head"):
        method_plan("fedbabu", tiny(method="fedbabu", personal={"groups": "adapter"}))
