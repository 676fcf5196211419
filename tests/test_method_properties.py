"""Properties of every method on its production path: what travels, what stays, and what must not matter."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message
from numpy.typing import NDArray
from torch import Tensor

import fedpers.methods
from conftest import SECRET, Command
from fedpers.cohort.clients import Clients
from fedpers.cohort.layout import layout
from fedpers.cohort.model import Parameters
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import FAMILIES, FAMILY, Config
from fedpers.experiment import Reuse, build_model, prepare
from fedpers.flower import messages as wire
from fedpers.flower.cohort_grid import CohortGrid
from fedpers.flower.strategy import FedpersStrategy, RoundReport
from fedpers.methods.base import FROZEN, SHARED, Method
from fedpers.models.array_names import base_name
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.randomness import secret_key
from fedpers.registry import find, names
from fedpers.reporting import Reporter
from fedpers.tasks.base import Examples

Tiny = Callable[..., Config]
Arrays = dict[str, NDArray[np.float32]]
METHODS = names("methods")
KEY = secret_key(SECRET)  # one for all: two runs draw the same batches where their phases have the same places
REUSE = Reuse()  # no test here changes a model for good, so all can share one

# Numbers in one message, counted by hand on the tiny model: width 32, rank 2, query and value of one block adapted.
A, B, RESIDUAL, HEAD = 2 * (2 * 32), 2 * (32 * 2), 2 * (32 * 32), 1 + 32
BOTH = A + B + HEAD
TRAFFIC = {  # down, up in an odd round, up in an even round
    **dict.fromkeys(
        ["apfl", "centralized", "ditto", "fedala", "fedavg", "fedavg-finetune", "fedbn", "feddpa", "fedprox",
         "hetlora", "per-fedavg", "pfedme", "reptile"],
        (BOTH, BOTH, BOTH),
    ),
    **dict.fromkeys(["fedalt", "fedbabu", "fedit", "fedper", "fedrep", "hydra", "sdflora"], (A + B, A + B, A + B)),
    **dict.fromkeys(["fedex-lora", "flora"], (BOTH + RESIDUAL, BOTH, BOTH)),
    **dict.fromkeys(["lg-fedavg", "linear-probe"], (HEAD, HEAD, HEAD)),
    "fedsa-lora": (A, A, A),
    "ffa-lora": (B + HEAD, B + HEAD, B + HEAD),
    "fedsvd": (BOTH, B + HEAD, B + HEAD),
    "rolora": (BOTH, B + HEAD, A + HEAD),
    "scaffold": (2 * BOTH, 2 * BOTH, 2 * BOTH),
    "ifca": (2 * BOTH, 2 * BOTH, 2 * BOTH),
    "local": (0, 0, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One round as its messages tell it; the arrays of each user's messages."""

    down: dict[int, Arrays]
    up: dict[int, Arrays]
    after: Arrays
    report: RoundReport

    @property
    def before(self) -> Arrays:
        """What everybody started from."""
        return next(iter(self.down.values()))

    def stacked(self) -> Arrays:
        """All replies, (users, out, in) by name."""
        return {
            name: np.stack([self.up[user][name] for user in sorted(self.up)]) for name in next(iter(self.up.values()))
        }


def gentle(tiny: Tiny, name: str, **changes: Any) -> Config:
    """Whole batches and flat scores: neither the order of records nor float tolerance makes a difference to see."""
    settings = {"batch_size": 64, "epochs": 3, "lr": {"adapter": 1.0, "norm": 0.1, "head": 0.3}}
    everything = {**settings, "groups": "adapter+norm+head", "l2": 0.0}
    task = {"candidates": 4, "scale": 4.0, **changes.pop("task", {})}
    local, personal = {**settings, **changes.pop("local", {})}, {**everything, **changes.pop("personal", {})}
    return tiny(method=name, task=task, local=local, personal=personal, **changes)


def make(
    tiny: Tiny,
    folder: Path,
    name: str,
    *,
    who: Callable[[Examples], Examples] = lambda examples: examples,
    cohort: int = 8,
    reuse: Reuse = REUSE,
    **changes: Any,
) -> Clients:
    """Clients of a fresh federation; `who` chooses its people. For other candidates give a `reuse` of their own."""
    experiment = prepare(gentle(tiny, name, **changes), reuse)
    examples = who(experiment.examples)
    engine = experiment.config.engine.model_copy(update={"cohort_size": cohort})
    config = experiment.config.model_copy(update={"engine": engine})
    plan = experiment.plan
    model = build_model(replace(experiment, examples=examples), Reporter(), reuse)
    first = layout(config, plan, model).kept()
    store = PersonalStore(Path(mkdtemp(dir=folder)) / "personal", len(examples.users), first)
    clients = Clients(config, plan, experiment.guarantee, model, store, KEY)
    clients.examples = examples
    return clients


def play(clients: Clients, folder: Path, rounds: int = 1, start: Arrays | None = None) -> list[Turn]:
    """Rounds through Flower's messages, from the first broadcast or from `start`."""
    if not clients.shared_names:
        return []
    users, guarantee = clients.examples.users, clients.guarantee
    opening = guarantee.opening(clients.config, clients.shared_names, len(users), "given in the configuration")
    ledger = Ledger.create(Path(mkdtemp(dir=folder)) / "ledger.jsonl", opening)
    strategy = FedpersStrategy(clients.config, guarantee, users, ledger, KEY, clients.layout)
    shared, turns = start or clients.layout.broadcast(), []
    grid = CohortGrid(clients)
    for number in range(1, rounds + 1):
        record = wire.to_record(shared, clients.shared_names)
        asked = list(strategy.configure_train(number, record, ConfigRecord(), grid))
        answers = grid.send_and_receive(asked)
        arrays, _ = strategy.aggregate_train(number, answers)
        assert arrays is not None
        assert strategy.report is not None
        shared = wire.from_record(arrays)
        down = {message.metadata.dst_node_id - wire.FIRST_NODE: arrays_in(message) for message in asked}
        up = {message.metadata.src_node_id - wire.FIRST_NODE: arrays_in(message) for message in answers}
        turns.append(Turn(down, up, shared, strategy.report))
    return turns


def arrays_in(message: Message) -> Arrays:
    return {
        n: array for record in message.content.array_records.values() for n, array in wire.from_record(record).items()
    }


def last(turns: Sequence[Turn]) -> Arrays:
    return turns[-1].after if turns else {}


def own(clients: Clients, shared: Arrays) -> Parameters:
    """Everybody's model as it is now, (users, out, in) by name."""
    return joined(clients.own(range(len(clients.examples.users)), shared, clients.store))


def home(clients: Clients, shared: Arrays) -> Parameters:
    """Everybody's model after training at home."""
    return joined(clients.finish(range(len(clients.examples.users)), shared, clients.store))


def joined(parts: Any) -> Parameters:
    found = [one for _, one in parts]
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}


def kept(clients: Clients) -> Parameters:
    return clients.store.read(range(len(clients.examples.users)))


def scores(clients: Clients, parameters: Parameters) -> Tensor:
    """What every user's model says of its test records, (records, candidates)."""
    test = clients.examples.test
    rows, owners = np.concatenate(test), np.repeat(np.arange(len(test)), [len(one) for one in test])
    clients.model.load(parameters)
    with torch.no_grad():
        return clients.model.scores(clients.model.all_contexts(rows, owners), rows, torch.from_numpy(owners))


def assert_close(found: Any, expected: Any, atol: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(np.asarray(found[name]), np.asarray(expected[name]), atol=atol, err_msg=name)


def alike(source: int, users: int) -> Callable[[Examples], Examples]:
    """So many users who all hold the records of one; only their own names, and so their coins, differ."""

    def who(examples: Examples) -> Examples:
        return replace(
            examples, users=examples.users[:users], train=(examples.train[source],) * users,
            test=(examples.test[source],) * users,
        )  # fmt: skip

    return who


def listed(order: Sequence[int]) -> Callable[[Examples], Examples]:
    """These users alone, in this order; everybody keeps name and records."""

    def who(examples: Examples) -> Examples:
        users, train, test = (
            [part[user] for user in order] for part in (examples.users, examples.train, examples.test)
        )
        return replace(examples, users=tuple(users), train=tuple(train), test=tuple(test))

    return who


# ---------------------------------------------------------------- the tables


@pytest.mark.parametrize("name", METHODS)
def test_a_method_cites_its_paper_and_says_how_it_differs_from_another(name: str) -> None:
    method = find("methods", name, Method)
    assert method.cite
    assert re.search(r"\b(19|20)\d\d\b", method.cite) or method.cite == "baseline"
    assert method.differs.startswith("from ")
    assert neighbour(name) in set(METHODS) - {name}


def neighbour(name: str) -> str:
    return find("methods", name, Method).differs.removeprefix("from ").partition(":")[0]


def test_every_method_can_be_traced_to_fedavg() -> None:
    for name in METHODS:
        path = [name]
        while path[-1] != "fedavg":
            path.append(neighbour(path[-1]))
            assert len(path) == len(set(path)), f"a circle without fedavg: {path}"


def test_the_command_lists_all_methods_with_their_sources(fedpers: Command) -> None:
    code, out, _ = fedpers("methods")
    text = " ".join(out.split())
    assert code == 0
    assert len(METHODS) >= 25
    for name in METHODS:
        method = find("methods", name, Method)
        assert re.search(rf"^ +{name} ", out, re.MULTILINE), name
        for words in (method.cite, method.differs):
            # The table breaks lines, and other columns may stand in between.
            assert all(word in text for word in words.split()), (name, words)


@pytest.mark.parametrize("path", sorted(Path(fedpers.methods.__path__[0]).glob("*.py")), ids=lambda path: path.stem)
def test_a_method_is_a_short_file(path: Path) -> None:
    """About 60 lines of code at most: what is longer belongs into the engine, which all methods share."""
    if path.stem == "base":
        pytest.skip("what all methods share")
    text = path.read_text(encoding="utf-8")
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            prose.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    code = [
        line for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#") and number not in prose
    ]  # fmt: skip
    assert len(code) <= 65


# ---------------------------------------------------------------- what travels and what stays


@pytest.mark.parametrize("name", METHODS)
def test_what_travels_is_what_is_declared_and_as_many_bytes_as_by_hand(tiny: Tiny, tmp_path: Path, name: str) -> None:
    clients = make(tiny, tmp_path, name)
    plan, group = clients.plan, clients.model.group
    method = plan.method
    versions = [f"cluster{place}." for place in range(int(plan.options.get(method.clusters, 0)))]
    prefixes = versions or ["", *(f"{kind}." for kind in method.travels)]
    turns = play(clients, tmp_path, rounds=2)
    assert bool(turns) == (SHARED in plan.scopes.values())
    for number, turn in enumerate(turns, 1):
        moved = {g for phase in plan.round if not phase.own and phase.on(number) for g in phase.train}
        if method.overrides("end"):
            moved = set(plan.shared)
        down = {p + array for array, g in group.items() if plan.scopes[g] is SHARED for p in prefixes}
        up = {array for array in down if group[base_name(array)] in moved - set(method.serves)}
        assert {user: set(arrays) for user, arrays in turn.down.items()} == dict.fromkeys(range(8), down)
        assert {user: set(arrays) for user, arrays in turn.up.items()} == dict.fromkeys(range(8), up)
        assert set(turn.after) == down
        for array in up:
            if not method.overrides("combine"):
                assert np.abs(turn.after[array] - turn.before[array]).max() > 1e-6, f"{array} came back as it went"
    if name not in TRAFFIC:  # a third party's
        return
    assert bool(turns) == bool(TRAFFIC[name][0])
    down_bytes, *up_bytes = (4 * numbers for numbers in TRAFFIC[name])
    for turn, expected in zip(turns, up_bytes, strict=False):
        assert {sum(array.nbytes for array in arrays.values()) for arrays in turn.down.values()} == {down_bytes}
        assert {sum(array.nbytes for array in arrays.values()) for arrays in turn.up.values()} == {expected}
        assert (turn.report.bytes_down, turn.report.bytes_up) == (8 * down_bytes, 8 * expected)


def test_every_method_of_this_package_has_its_bytes_counted() -> None:
    modules = {path.stem for path in Path(fedpers.methods.__path__[0]).glob("*.py")} - {"__init__", "base"}
    assert {name.replace("-", "_") for name in TRAFFIC} == modules


def subsets(name: str) -> list[str]:
    """Values of `share` that leave something of the method: each family alone, and all."""
    method = find("methods", name, Method)
    mine = {FAMILY[group] for group, scope in method.scopes.items() if scope is SHARED} or set(FAMILIES)
    possible = [one for one in FAMILIES if one in mine and set(method.needs) <= {one}]
    return [*possible, "+".join(FAMILIES)]


@pytest.mark.parametrize(("name", "share"), [(name, share) for name in METHODS for share in subsets(name)])
def test_what_is_frozen_stays_at_its_public_value(tiny: Tiny, tmp_path: Path, name: str, share: str) -> None:
    """In the rounds, for subsets of what a method may share; at home only what a phase there trains moves."""
    clients = make(tiny, tmp_path, name, share=share)
    plan, model = clients.plan, clients.model
    after = last(play(clients, tmp_path, rounds=2))
    still = model.names([g for g in model.group.values() if plan.scopes[g] is FROZEN])
    assert still or FROZEN not in plan.scopes.values()
    late = {group for phase in plan.finish for group in phase.train}
    now, later = own(clients, after), home(clients, after)
    for array in still:
        expected = model.initial[array].expand_as(now[array])
        assert torch.equal(now[array], expected)
        assert torch.equal(later[array], expected) == (model.group[array] not in late)


@pytest.mark.parametrize("name", METHODS)
def test_personal_state_is_its_users_own_and_no_part_of_the_broadcast(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """Each user's state is another; a user who is not asked keeps it to the bit; none of it is in what is sent down."""
    clients = make(tiny, tmp_path, name)
    turns = play(clients, tmp_path, rounds=2)
    held = kept(clients)
    trained = {group for phase in clients.plan.round for group in phase.train}
    for array, rows in held.items():
        group = clients.model.group.get(array)
        if turns and group in trained:
            apart = (rows[:, None] - rows[None]).abs().amax(dim=(2, 3)) + torch.eye(8)
            assert float(apart.min()) > 1e-6, f"two users hold the same {array}"
    if turns and not clients.plan.method.everyone:
        clients.train_round(3, [1, 6], last(turns))
        rest = [0, 2, 3, 4, 5, 7]
        for array, rows in kept(clients).items():
            assert torch.equal(rows[rest], held[array][rest])
    private = [group for group, scope in clients.plan.scopes.items() if scope is not SHARED]
    for array in clients.model.names(private):
        assert not [sent for sent in last(turns) if base_name(sent) == array]


# ---------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("name", METHODS)
def test_identical_clients_are_a_fixed_point_of_averaging(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """How many there are of one user changes nothing, and where the mean is all there is, it is each one's reply."""
    # Ranks are drawn by name, so users with the same records may still have other ranks.
    options = {"lowest": 1.0} if name == "hetlora" else {}
    many, pair = (
        make(tiny, tmp_path, name, who=alike(2, users), options=options, local={"batch_size": 256}) for users in (8, 2)
    )
    turns, others = play(many, tmp_path, 2), play(pair, tmp_path, 2)
    for turn, other in zip(turns, others, strict=True):
        assert_close(turn.after, other.after)
        if not many.plan.method.overrides("combine", "serve"):
            for reply in turn.up.values():
                assert_close(turn.after, {**turn.before, **reply}, atol=1e-6)
    for found, expected in ((kept(many), kept(pair)), (home(many, last(turns)), home(pair, last(others)))):
        assert_close(found, {array: value[:1].expand(8, *value.shape[1:]) for array, value in expected.items()})


@pytest.mark.parametrize("name", METHODS)
def test_neither_the_order_of_the_clients_nor_their_cohorts_change_anything(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    """Users at other places, in other cohorts and summed in another order; and one by one."""
    order = [5, 2, 7, 0, 6, 1, 4, 3]
    small = {"batch_size": 4, "epochs": 1}
    together = make(tiny, tmp_path, name, cohort=8, local=small, personal=small)
    turns = play(together, tmp_path, 2)
    held, at_home = kept(together), home(together, last(turns))
    for cohort, places in ((3, order), (1, range(8))):
        other = make(tiny, tmp_path, name, cohort=cohort, who=listed(places), local=small, personal=small)
        others = play(other, tmp_path, 2)
        for turn, another in zip(turns, others, strict=True):
            assert_close(another.after, turn.after)
            for place, user in enumerate(places):
                assert_close(another.up[place], turn.up[user])
        for found, expected in ((kept(other), held), (home(other, last(others)), at_home)):
            assert_close(found, {array: value[list(places)] for array, value in expected.items()})


# ---------------------------------------------------------------- methods are not each other


@pytest.fixture(scope="module")
def said() -> dict[str, tuple[Tensor, Tensor]]:
    """What users' own models say of test records after training and before, by method: many have one neighbour."""
    return {}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_differs_measurably_from_its_nearest_neighbour(
    tiny: Tiny, tmp_path: Path, said: dict[str, tuple[Tensor, Tensor]], name: str
) -> None:
    """By more than a twentieth of what training changes at all in what users' own models say of their test records."""
    for one in {name, neighbour(name)} - said.keys():
        clients = make(tiny, tmp_path, one, rounds=3, personal={"l2": 0.01})
        after = last(play(clients, tmp_path, 3))
        said[one] = scores(clients, home(clients, after)), scores(clients, clients.model.broadcast(8))
    (first, start), (second, same) = said[name], said[neighbour(name)]
    torch.testing.assert_close(start, same, atol=1e-5, rtol=0)
    movement = max(float((first - start).norm()), float((second - start).norm()))
    assert float((first - second).norm()) > 0.05 * movement > 0
