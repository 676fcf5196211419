"""Every registered method, new ones included: its table is what happens, and a table that cannot be true is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from numpy.typing import NDArray

from conftest import SECRET
from fedpers.cohort.clients import Clients
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import GROUPS, Config
from fedpers.errors import ConfigError, PrivacyRefusal
from fedpers.experiment import Experiment, Reuse, build_model, method_plan, prepare
from fedpers.flower import messages as wire
from fedpers.flower.cohort_grid import CohortGrid
from fedpers.flower.strategy import FedpersStrategy
from fedpers.methods.base import FROZEN, PERSONAL, SHARED, Method, Phase
from fedpers.privacy.dataflow import feedback
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.randomness import secret_key
from fedpers.registry import find, names
from fedpers.reporting import Reporter
from fedpers.simulation import simulate
from fedpers.tasks.base import Examples

Tiny = Callable[..., Config]
Arrays = dict[str, NDArray[np.float32]]
METHODS = names("methods")
KEY = secret_key(SECRET)
REUSE = Reuse()  # no test here changes a model for good, so all can share one
FEEDS_BACK = {
    "fedper": ("head",),
    "fedrep": ("head",),
    "fedavg": (),
    "fedavg-finetune": (),
    "fedbabu": (),
    "local": (),
    "ditto": (),
}


@pytest.fixture
def tiny(tiny: Tiny) -> Tiny:
    """One thread (faster for tiny models), and step sizes that move every group visibly."""

    def make(**changes: Any) -> Config:
        rates = {"adapter": 0.3, "head": 0.1}
        local = {"batch_size": 4, "lr": rates, **changes.pop("local", {})}
        personal = {"lr": rates, "batch_size": 4, "epochs": 2, **changes.pop("personal", {})}
        return tiny(engine={"threads": 1, "cohort_size": 4}, local=local, personal=personal, **changes)

    return make


def make_clients(experiment: Experiment, folder: Path) -> Clients:
    model = build_model(experiment, Reporter(), REUSE)
    initial = {name: model.initial[name] for name in model.names(experiment.plan.kept)}
    store = PersonalStore(folder / "personal", len(experiment.examples.users), initial)
    clients = Clients(experiment.config, experiment.plan, experiment.guarantee, model, store, KEY)
    clients.examples = experiment.examples
    return clients


def initial(clients: Clients) -> Arrays:
    return {name: clients.model.initial[name].numpy() for name in clients.shared_names}


def server_round(clients: Clients, folder: Path, shared: Arrays, number: int = 1) -> tuple[Arrays, dict[int, set[str]]]:
    """One round through Flower's messages; returns the next broadcast and the names in each message, by user."""
    guarantee, folder = clients.guarantee, folder / f"round-{number}"
    folder.mkdir(parents=True)
    ledger = Ledger.create(
        folder / "ledger.jsonl",
        guarantee.opening(clients.config, clients.shared_names, 8, "given in the configuration"),
    )  # fmt: skip
    strategy = FedpersStrategy(clients.config, guarantee, clients.examples.users, ledger, KEY, first_round=number - 1)
    record = wire.to_record(shared, clients.shared_names)
    grid = CohortGrid(clients)
    messages = list(strategy.configure_train(1, record, ConfigRecord(), grid))
    replies = grid.send_and_receive(messages)
    seen: dict[int, set[str]] = {}
    for message in (*messages, *replies):
        node = {message.metadata.src_node_id, message.metadata.dst_node_id} - {1}
        held = {name for record in message.content.array_records.values() for name in record}
        seen.setdefault(min(node) - wire.FIRST_NODE, set()).update(held)
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return wire.from_record(arrays), seen


def moved(found: Mapping[str, Any], start: Mapping[str, Any], wanted: Sequence[str]) -> float:
    return max(float(np.abs(np.asarray(found[name]) - np.asarray(start[name])).max()) for name in wanted)


# ---------------------------------------------------------------- what every method does


@pytest.mark.parametrize("name", METHODS)
def test_only_shared_names_travel_and_personal_groups_stay(tiny: Tiny, tmp_path: Path, name: str) -> None:
    experiment = prepare(tiny(method=name, personal={"groups": "adapter+head"}))
    plan = experiment.plan
    clients = make_clients(experiment, tmp_path)
    model = clients.model
    expected = {array for array, group in model.group.items() if plan.scopes[group] is SHARED}
    assert set(clients.shared_names) == expected
    replies = clients.train_round(1, range(8), initial(clients))
    assert set(replies) == expected
    personal = {array for array, group in model.group.items() if group in plan.kept}
    assert set(clients.store.arrays) == personal
    trained = {group for phase in plan.round for group in phase.train}
    kept = clients.store.read(range(8))
    for array in personal:
        untouched = bool((kept[array] == model.initial[array]).all())
        assert untouched == (model.group[array] not in trained)
    clients.store.drain()
    if expected:
        after, seen = server_round(clients, tmp_path, initial(clients))
        assert set(after) == expected
        assert seen == dict.fromkeys(range(8), expected)
        for array in expected:
            assert moved(after, initial(clients), [array]) > 1e-6, f"{array} is shared and never changed"


@pytest.mark.parametrize("name", METHODS)
def test_personal_state_is_carried_into_the_next_round(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """A round starts from what its user kept, not from the public initial value, and what is sent depends on it."""
    experiment = prepare(tiny(method=name, personal={"groups": "adapter+head"}))
    fresh, clients = (make_clients(experiment, tmp_path / which) for which in ("fresh", "kept"))
    if not clients.store.arrays:
        assert experiment.plan.groups(PERSONAL) == ()
        return
    far = {array: value.expand(8, *value.shape) + 5.0 for array, value in clients.store.initial.items()}
    clients.store.stage(range(8), far)
    users = [1, 6, 3]
    start = initial(clients)
    replies, others = clients.train_round(2, users, start), fresh.train_round(2, users, start)
    for array, rows in clients.store.read(range(8)).items():
        assert float((rows - far[array]).abs().max()) < 2.5, "training started somewhere else"
        assert torch.equal(rows[[0, 2, 4, 5, 7]], far[array][[0, 2, 4, 5, 7]]), "a user who was not asked changed"
    for array in replies if feedback(experiment.plan) else ():
        assert moved(replies, others, [array]) > 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_a_run_exports_the_shared_groups_alone(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """The end of the road: what the server holds after a whole run, and whose own models moved."""
    config = tiny(
        method=name, rounds=1, data={"users": 4}, personal={"groups": "adapter+head"}, evaluation={"every": 0}
    )
    plan = method_plan(name, config)
    run = simulate(config, tmp_path / "run", reuse=REUSE)
    assert {("head" if array.startswith("head.") else "adapter") for array in run.shared} == set(plan.shared)
    kinds = set(run.users.column("kind").to_pylist())
    table = run.users.to_pandas().pivot(index="user", columns="kind", values="loss")
    assert ("swap" in kinds) == bool(plan.personal)
    assert bool((table["own"] != table["global"]).all()) == bool(plan.personal)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        (name, share)
        for name in METHODS
        for share in GROUPS
        if share in {g for g, s in find("methods", name, Method).scopes.items() if s is SHARED}
    ],
)
def test_a_frozen_group_never_changes(tiny: Tiny, tmp_path: Path, name: str, share: str) -> None:
    """What `share` leaves out is frozen in the rounds; at home it may be tuned, if the configuration says so."""
    other = next(group for group in GROUPS if group != share)
    at_home = {group for phase in find("methods", name, Method).finish for group in phase.train}
    tuned = share if share in at_home else "+".join(sorted(at_home) or GROUPS)
    experiment = prepare(tiny(method=name, share=share, personal={"groups": tuned}))
    plan, clients = experiment.plan, make_clients(experiment, tmp_path)
    model = clients.model
    frozen = [array for array, group in model.group.items() if plan.scopes[group] is FROZEN]
    assert plan.scopes[share] is SHARED
    method = find("methods", name, Method)
    assert plan.scopes[other] is (FROZEN if method.scopes[other] is SHARED else method.scopes[other])
    replies = clients.train_round(1, range(8), initial(clients))
    assert not set(frozen) & set(replies)
    for array in frozen:
        held = model.layers[array].weight.detach()  # what the last cohort's last phase read
        assert torch.equal(held, model.initial[array].expand_as(held))
    shared = {array: reply.mean(axis=0) for array, reply in replies.items()}
    start = model.broadcast(8, {array: torch.from_numpy(value) for array, value in shared.items()})
    still = [array for array, group in model.group.items() if group not in plan.personal]
    for cohort, own in clients.finish(range(8), shared, clients.store):
        for array in still:
            assert torch.equal(own[array], start[array][: len(cohort)])
        for group in (g for phase in plan.finish for g in phase.train):
            assert moved(own, {n: v[: len(cohort)] for n, v in start.items()}, model.names([group])) > 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_the_clients_changes_nothing(tiny: Tiny, tmp_path: Path, name: str) -> None:
    gentle = {"candidates": 4, "scale": 4.0}  # float differences stay far below the tolerance
    experiment = prepare(tiny(method=name, task=gentle, personal={"groups": "adapter+head"}))
    order = [5, 2, 7, 0, 6, 1, 4, 3]
    results = []
    for place, users in enumerate((list(range(8)), order)):
        clients = make_clients(experiment, tmp_path / str(place))
        replies = clients.train_round(1, users, initial(clients))
        replies = clients.train_round(2, users, {n: r.mean(axis=0) for n, r in replies.items()})
        kept = clients.store.read(users)
        home = {}
        for cohort, own in clients.finish(users, {n: r.mean(axis=0) for n, r in replies.items()}, clients.store):
            home.update({user: {n: v[i].numpy() for n, v in own.items()} for i, user in enumerate(cohort)})
        results.append((replies, {n: v.numpy() for n, v in kept.items()}, home))
    (first, first_kept, first_home), (second, second_kept, second_home) = results
    for there, here in ((first, second), (first_kept, second_kept)):
        for array in there:
            np.testing.assert_allclose(here[array], there[array][order], atol=1e-6)
    for user in range(8):
        for array, value in first_home[user].items():
            np.testing.assert_allclose(second_home[user][array], value, atol=1e-6)
    assert moved(first_home[0], first_home[1], list(first_home[0])) > 1e-6 or not experiment.plan.personal


def identical(examples: Examples, source: int) -> Examples:
    """Everybody holds the records of one user; only the users' own names, and so their coins, differ."""
    users = len(examples.users)
    return replace(examples, train=(examples.train[source],) * users, test=(examples.test[source],) * users)


@pytest.mark.parametrize("name", [name for name in METHODS if SHARED in find("methods", name, Method).scopes.values()])
def test_identical_clients_are_a_fixed_point_of_averaging(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """The mean of what all send is what one sends, over two rounds of carried personal state."""
    config = tiny(method=name, local={"batch_size": 64, "epochs": 2}, personal={"batch_size": 64})
    experiment = prepare(config)
    experiment = replace(experiment, examples=identical(experiment.examples, 2))
    many, one = make_clients(experiment, tmp_path / "many"), make_clients(experiment, tmp_path / "one")
    shared = alone = initial(many)
    for number in (1, 2):
        shared, _ = server_round(many, tmp_path / "many", shared, number)
        alone = {array: reply[0] for array, reply in one.train_round(number, [3], alone).items()}
        assert moved(alone, initial(one), list(alone)) > 1e-4
        for array, value in shared.items():
            np.testing.assert_allclose(value, alone[array], atol=2e-6)
    for array, rows in many.store.read(range(8)).items():
        np.testing.assert_allclose(rows, one.store.read([3])[array].expand_as(rows), atol=2e-6)


def test_averaging_counts_every_client_the_same(tiny: Tiny, tmp_path: Path) -> None:
    """Users differ in how many records they have, and that number must not weigh: it is private."""
    experiment = prepare(tiny(method="fedavg"))
    assert len({len(rows) for rows in experiment.examples.train}) > 1
    clients = make_clients(experiment, tmp_path)
    replies = clients.train_round(1, range(8), initial(clients))
    after, _ = server_round(clients, tmp_path, initial(clients))
    for array, reply in replies.items():
        np.testing.assert_allclose(after[array], reply.mean(axis=0), atol=1e-6)


# ---------------------------------------------------------------- methods are not each other


def shared_after(tiny: Tiny, folder: Path, name: str, rounds: int = 2) -> tuple[Arrays, Clients]:
    clients = make_clients(prepare(tiny(method=name, personal={"groups": "adapter+head"})), folder / name)
    shared = initial(clients)
    for number in range(1, rounds + 1):
        shared = {n: r.mean(axis=0) for n, r in clients.train_round(number, range(8), shared).items()}
    return shared, clients


@pytest.mark.parametrize(
    ("one", "other"), [("fedrep", "fedper"), ("fedbabu", "fedavg-finetune"), ("fedper", "fedbabu")]
)
def test_methods_differ_measurably(tiny: Tiny, tmp_path: Path, one: str, other: str) -> None:
    first, clients = shared_after(tiny, tmp_path, one)
    second, _ = shared_after(tiny, tmp_path, other)
    adapter = [name for name in first if not name.startswith("head.")]
    assert moved(first, second, adapter) > 0.05 * moved(first, initial(clients), adapter)


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


def test_fedavg_and_its_finetuned_form_share_the_same_rounds(tiny: Tiny, tmp_path: Path) -> None:
    first, _ = shared_after(tiny, tmp_path, "fedavg")
    second, _ = shared_after(tiny, tmp_path, "fedavg-finetune")
    for array, value in first.items():
        np.testing.assert_array_equal(second[array], value)


# ---------------------------------------------------------------- verdicts and refusals


@pytest.mark.parametrize("name", sorted(FEEDS_BACK))
def test_feedback_is_read_off_the_table(tiny: Tiny, name: str) -> None:
    assert feedback(method_plan(name, tiny(method=name))) == FEEDS_BACK[name]


@pytest.mark.parametrize("name", METHODS)
def test_the_verdict_follows_from_what_moves_in_a_round(tiny: Tiny, name: str) -> None:
    """A new method needs no line here: its verdict is derived a second time."""
    made = method_plan(name, tiny(method=name))
    moves = {group for phase in made.round for group in phase.train}
    expected = {group for group in moves if made.scopes[group] == "personal"} if made.shared else set()
    assert set(feedback(made)) == expected


@pytest.mark.parametrize("name", sorted(name for name, groups in FEEDS_BACK.items() if groups))
def test_feedback_under_record_level_noise_is_refused_before_any_data_is_read(tiny: Tiny, name: str) -> None:
    config = tiny(method=name, privacy={"unit": "record", "clip": 1.0, "epsilon": 4.0}, data={"name": "no-such-source"})
    with pytest.raises(PrivacyRefusal) as refusal:
        prepare(config)
    message = str(refusal.value)
    assert name in message
    assert "epsilon" in message
    for way_out in ("method=fedbabu", "method=fedavg-finetune", "privacy.unit=user"):
        assert way_out in message
    with pytest.raises(ConfigError, match="no-such-source"):
        prepare(config.model_copy(update={"method": "fedbabu"}))


@pytest.mark.parametrize("name", sorted(FEEDS_BACK))
def test_the_ways_out_are_open(tiny: Tiny, name: str) -> None:
    """Every method runs at user level; at record level those without feedback do."""
    user = {"unit": "user", "clip": 1.0, "delta": 1e-3}
    assert prepare(tiny(method=name, privacy=user)).guarantee.unit == "user"
    if not FEEDS_BACK[name]:
        assert prepare(tiny(method=name, privacy={"unit": "record", "clip": 1.0})).guarantee.unit == "record"


def define(scopes: Mapping[str, Any], rounds: Sequence[Phase] = (), finish: Sequence[Phase] = ()) -> type[Method]:
    return type("Odd", (Method,), {"scopes": scopes, "round": tuple(rounds), "finish": tuple(finish)})


BABU = {"adapter": SHARED, "head": PERSONAL}


@pytest.mark.parametrize(
    ("scopes", "rounds", "finish", "message"),
    [
        ({"adapter": SHARED}, [Phase("adapter")], [], "scopes must name exactly the groups adapter, head"),
        ({**BABU, "norm": FROZEN}, [Phase("adapter")], [], "scopes must name exactly the groups adapter, head"),
        (BABU, [Phase("adapter"), Phase("tail")], [], "round[1] = Phase('tail') trains the unknown group 'tail'"),
        (BABU, [Phase("adapter")], [Phase("hed")], "finish[0] = Phase('hed') trains the unknown group 'hed'"),
        ({**BABU, "head": FROZEN}, [Phase("adapter", "head")], [], "round[0] = Phase('adapter', 'head') trains 'head'"),
        ({**BABU, "head": FROZEN}, [Phase("adapter")], [Phase("head")], "finish[0] = Phase('head') trains 'head'"),
        (BABU, [Phase("head")], [Phase("adapter")], "'adapter' is shared but no round phase trains it"),
        (BABU, [Phase("adapter"), Phase()], [], "round[1] = Phase() trains nothing"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused_when_it_is_defined(
    scopes: Mapping[str, Any], rounds: Sequence[Phase], finish: Sequence[Phase], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refusal:
        define(scopes, rounds, finish)
    assert "Odd" in str(refusal.value)


def test_a_sound_table_is_accepted() -> None:
    assert define(BABU, [Phase("adapter")], [Phase("head")]).scopes == BABU


# ---------------------------------------------------------------- what the configuration may change


def phases(of: Sequence[Phase]) -> list[tuple[str, ...]]:
    return [phase.train for phase in of]


def test_share_freezes_what_it_leaves_out_in_the_rounds(tiny: Tiny) -> None:
    found = method_plan("fedavg", tiny(share="adapter"))
    assert (found.scopes["adapter"], found.scopes["head"]) == (SHARED, FROZEN)
    assert phases(found.round) == [("adapter",)]
    assert found.shared == ("adapter",)
    assert found.personal == ()
    found = method_plan("fedavg", tiny(share="head"))
    assert phases(found.round) == [("head",)]
    assert method_plan("fedavg", tiny()).shared == ("adapter", "head")


def test_share_never_turns_a_personal_group_into_something_else(tiny: Tiny) -> None:
    found = method_plan("fedrep", tiny(share="adapter"))
    assert found.scopes["head"] is PERSONAL
    assert phases(found.round) == [("head",), ("adapter",)]


@pytest.mark.parametrize("name", ["fedrep", "fedper", "fedbabu"])
def test_sharing_nothing_of_what_a_method_shares_is_refused(tiny: Tiny, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"share=head: method '{name}' shares only adapter; set share=adapter"):
        method_plan(name, tiny(share="head"))
    assert method_plan("local", tiny(share="head")).shared == ()


@pytest.mark.parametrize(
    ("groups", "finish", "personal"),
    [
        ("head", [("head",)], ("head",)),
        ("adapter", [("adapter",)], ("adapter",)),
        ("adapter+head", [("adapter", "head")], ("adapter", "head")),
    ],
)
def test_personal_groups_say_what_is_tuned_at_home(
    tiny: Tiny, groups: str, finish: list[tuple[str, ...]], personal: tuple[str, ...]
) -> None:
    found = method_plan("fedavg-finetune", tiny(personal={"groups": groups}))
    assert phases(found.finish) == finish
    assert found.personal == personal
    assert found.shared == ("adapter", "head"), "tuning at home takes nothing from what is shared"
    assert feedback(found) == ()
    assert phases(found.round) == [("adapter", "head")]
    assert phases(method_plan("local", tiny(personal={"groups": groups})).finish) == finish
    # The rounds of a method that trains personal groups in them do not depend on it.
    assert phases(method_plan("fedrep", tiny(personal={"groups": groups})).round) == [("head",), ("adapter",)]


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
def test_a_method_says_in_its_docstring_where_it_is_from(name: str) -> None:
    method = find("methods", name, Method)
    assert method.summary().endswith(".") or len(method.summary()) > 20
    if name != "local":
        assert re.search(r"\b(19|20)\d\d\b", method.__doc__ or ""), f"{name}: the docstring cites no paper with a year"


def test_a_phase_at_home_that_the_configuration_empties_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"personal\.groups=adapter: leaves nothing of Phase\('head'\).*=head"):
        method_plan("fedbabu", tiny(method="fedbabu", personal={"groups": "adapter"}))
