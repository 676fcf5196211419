"""A method whose own number is at its limit is another method, exactly; and what each promises of its server state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpers.cohort.batching import Step, epochs
from fedpers.cohort.clients import Clients
from fedpers.cohort.local_training import StepRule, train_phase
from fedpers.cohort.model import Parameters
from fedpers.config import Config
from fedpers.experiment import Reuse, prepare
from fedpers.methods.base import Method
from fedpers.models.array_names import family_of
from fedpers.registry import find, names
from fedpers.tasks.base import Examples
from test_method_properties import KEY, alike, assert_close, home, kept, last, listed, make, own, play, scores

Tiny = Callable[..., Config]
GROUPS = ("A", "B", "head")
WITH_OPTIONS = [name for name in names("methods") if find("methods", name, Method).options]


def common(clients: Clients, shared: Any) -> Parameters:
    """Everybody with the shared model, (users, out, in) by name."""
    arrays = {name: torch.from_numpy(value) for name, value in clients.layout.common(shared).items()}
    return clients.model.broadcast(len(clients.examples.users), arrays)


def differ(found: Any, expected: Any, by: float = 1e-4) -> bool:
    return any(np.abs(np.asarray(found[name]) - np.asarray(expected[name])).max() > by for name in expected)


def trained_alone(tiny: Tiny, folder: Path, passes: int) -> Parameters:
    """Each user's model after so many passes over whole batches, from the public start."""
    return home(make(tiny, folder, "local", personal={"epochs": passes}), {})


# ---------------------------------------------------------------- limits that are fedavg


@pytest.mark.parametrize(
    ("name", "options", "rounds", "atol"),
    [
        ("fedprox", {"mu": 0.0}, 3, 0.0),
        ("scaffold", {}, 1, 0.0),  # both control variates are zero then
        ("reptile", {"step": 1.0}, 1, 1e-6),  # a whole step
        ("fedavg-finetune", {}, 3, 0.0),  # differs at home alone
        ("ditto", {}, 3, 0.0),  # its own copies are read by nothing that is sent
        ("apfl", {}, 3, 0.0),
        ("feddpa", {}, 3, 1e-5),
        ("fedala", {"eta": 0.0}, 3, 1e-5),  # the start stays at what was received
        ("per-fedavg", {"inner": 0.0}, 3, 1e-5),  # of two gradients the second counts, from where the first was taken
    ],
)
def test_at_its_limit_a_method_sends_what_fedavg_sends(
    tiny: Tiny, tmp_path: Path, name: str, options: dict[str, float], rounds: int, atol: float
) -> None:
    plain = play(make(tiny, tmp_path, "fedavg", rounds=3), tmp_path, rounds)
    limit = play(make(tiny, tmp_path, name, rounds=3, options=options), tmp_path, rounds)
    for turn, other in zip(limit, plain, strict=True):
        assert_close({array: turn.after[array] for array in other.after}, other.after, atol)
        for user, reply in other.up.items():
            assert_close({array: turn.up[user][array] for array in reply}, reply, atol)


@pytest.mark.parametrize(
    ("name", "options", "rounds"),
    [
        ("fedprox", {"mu": 0.01}, 1),
        ("scaffold", {}, 2),
        ("reptile", {"step": 0.9}, 1),
        ("reptile", {"step": 1.0}, 2),
        ("fedala", {"eta": 1.0}, 2),
        ("per-fedavg", {"inner": 0.1}, 1),
        ("pfedme", {}, 1),
    ],
)
def test_away_from_its_limit_it_does_not(
    tiny: Tiny, tmp_path: Path, name: str, options: dict[str, float], rounds: int
) -> None:
    plain = last(play(make(tiny, tmp_path, "fedavg", rounds=3), tmp_path, rounds))
    other = last(play(make(tiny, tmp_path, name, rounds=3, options=options), tmp_path, rounds))
    assert differ({array: other[array] for array in plain}, plain)


def test_centralized_on_one_user_is_fedavg_on_one_user(tiny: Tiny, tmp_path: Path) -> None:
    one = listed([4])
    pooled, plain = (make(tiny, tmp_path, name, who=one) for name in ("centralized", "fedavg"))
    for turn, other in zip(play(pooled, tmp_path, 3), play(plain, tmp_path, 3), strict=True):
        assert_close(turn.after, other.after)


def test_centralized_is_one_trainer_with_all_records(tiny: Tiny, tmp_path: Path) -> None:
    """Against the same model trained by itself on everybody's records as if they were one user's."""
    clients = make(tiny, tmp_path, "centralized", local={"batch_size": 256})

    def merged(examples: Examples) -> Examples:
        rows = np.concatenate(examples.train)
        return replace(examples, users=examples.users[:1], train=(rows,), test=(rows[:1],))

    single = make(tiny, tmp_path, "fedavg", who=merged, local={"batch_size": 256})
    (turn,), (other,) = play(clients, tmp_path), play(single, tmp_path)
    assert_close(turn.after, other.after)


# ---------------------------------------------------------------- own copies


def test_ditto_without_a_pull_trains_each_user_alone(tiny: Tiny, tmp_path: Path) -> None:
    clients = make(tiny, tmp_path, "ditto", personal={"epochs": 2, "l2": 0.0})
    shared = last(play(clients, tmp_path, 3))
    assert_close(own(clients, shared), trained_alone(tiny, tmp_path, 6))
    pulled = make(tiny, tmp_path, "ditto", personal={"epochs": 2, "l2": 0.1})
    shared = last(play(pulled, tmp_path, 3))
    assert differ(own(pulled, shared), trained_alone(tiny, tmp_path, 6))


@pytest.mark.parametrize(("name", "options"), [("ditto", {}), ("fedprox", {"mu": 0.5}), ("pfedme", {"lambda": 0.5})])
def test_pulls_go_toward_what_was_received(tiny: Tiny, tmp_path: Path, name: str, options: dict[str, float]) -> None:
    """Two steps by hand: v <- v - rate * (gradient + strength * (v - received)), far from the public start."""
    settings = {"epochs": 2, "l2": 0.5}
    clients = make(tiny, tmp_path, name, options=options, local={"epochs": 2}, personal=settings)
    model, train = clients.model, clients.config.personal.model_copy(update={"epochs": 1})
    draws = torch.Generator().manual_seed(0)
    start = {n: v + 0.3 * torch.randn(v.shape, generator=draws) for n, v in model.initial.items()}
    received = {n: v.expand(8, *v.shape) for n, v in start.items()}
    own_start = received
    if name == "ditto":  # its own copies go on from where they were
        own_start = {n: v + 0.1 * torch.randn(v.shape, generator=draws) for n, v in received.items()}
        clients.store.stage(range(8), own_start)
    (turn,) = play(clients, tmp_path, start={n: v.numpy() for n, v in start.items()})
    point = {n: v.clone() for n, v in own_start.items()}
    for _ in range(2):
        after = {n: v.clone() for n, v in point.items()}
        train_phase(model, after, GROUPS, whole(clients), train)
        rate = {n: getattr(train.lr, family_of(n)) for n in point}
        point = {n: after[n] - rate[n] * 0.5 * (point[n] - received[n]) for n in point}
    assert_close(turn.stacked() if name == "fedprox" else kept(clients), point)


def whole(clients: Clients) -> list[Step]:
    """One step for each user, on all its training records."""
    return epochs(clients.examples, range(len(clients.examples.users)), 1, 64, KEY, ("elsewhere",))


def test_apfl_at_its_ends_is_local_or_global(tiny: Tiny, tmp_path: Path) -> None:
    alone = make(tiny, tmp_path, "apfl", options={"alpha": 1.0}, personal={"epochs": 2})
    shared = last(play(alone, tmp_path, 3))
    assert_close(own(alone, shared), trained_alone(tiny, tmp_path, 6))
    joint = make(tiny, tmp_path, "apfl", options={"alpha": 0.0}, personal={"epochs": 2})
    shared = last(play(joint, tmp_path, 3))
    assert_close(own(joint, shared), common(joint, shared), atol=0.0)
    assert_close(kept(joint), {n: v.expand(8, *v.shape) for n, v in joint.store.initial.items()}, atol=0.0)


def test_apfl_in_between_mixes_parameters_and_trains_the_own_part_inside(tiny: Tiny, tmp_path: Path) -> None:
    alpha, rates = 0.3, {"adapter": 1.0, "norm": 0.1, "head": 0.3}
    clients = make(tiny, tmp_path, "apfl", options={"alpha": alpha}, personal={"epochs": 1, "lr": rates})
    model, group = clients.model, clients.model.group
    turns = play(clients, tmp_path, 1)
    old = {n: v.expand(8, *v.shape) for n, v in clients.store.initial.items()}
    w = {n: torch.from_numpy(np.stack([one[n] for one in turns[0].up.values()])) for n in turns[0].after}
    mixture = model.broadcast(8, None) | {n: alpha * old[n] + (1 - alpha) * w[n] for n in w}
    moved = {n: v.clone() for n, v in mixture.items()}
    train_phase(model, moved, GROUPS, whole(clients), clients.config.personal)
    # d loss / d v = alpha * d loss / d mixture, with one step of the mixture's own gradient just made.
    expected = {n: old[n] + alpha * (moved[n] - mixture[n]) for n in w}
    assert_close(kept(clients), expected)
    assert all(group[name] in {"A", "B", "head"} for name in expected)
    after = last(turns)
    mixed = {n: alpha * kept(clients)[n] + (1 - alpha) * torch.from_numpy(after[n]) for n in after}
    assert_close({n: own(clients, after)[n] for n in mixed}, mixed, atol=1e-6)


def test_pfedme_with_a_whole_step_sends_the_own_copies(tiny: Tiny, tmp_path: Path) -> None:
    for eta, expected in ((0.5, 1.0), (0.25, 0.5)):
        clients = make(tiny, tmp_path, "pfedme", options={"lambda": 2.0, "eta": eta})
        turn = play(clients, tmp_path, 2)[-1]
        theta = {name: value.numpy() for name, value in kept(clients).items()}
        goal = {n: turn.before[n] + expected * (theta[n] - turn.before[n]) for n in theta}
        assert_close(turn.stacked(), goal, atol=1e-6)
        assert differ(turn.stacked(), {n: np.broadcast_to(turn.before[n], v.shape) for n, v in theta.items()})
        assert_close({n: own(clients, turn.after)[n] for n in theta}, theta, atol=0.0)


def test_per_fedavg_takes_its_gradient_one_step_ahead(tiny: Tiny, tmp_path: Path) -> None:
    """Small batches, so that both steps see other records; against two plain steps, one taken back."""
    small, inner = {"batch_size": 4, "epochs": 1}, 0.5
    clients = make(tiny, tmp_path, "per-fedavg", local=small, options={"inner": inner})
    model, settings = clients.model, clients.config.local
    (turn,) = play(clients, tmp_path)
    steps = epochs(clients.examples, range(8), 2, 4, KEY, ("round", 1, 0))
    point = model.broadcast(8)
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert np.array_equal(first.active, second.active)
        ahead = {name: value.clone() for name, value in point.items()}
        train_phase(model, ahead, GROUPS, [first], settings, rule=StepRule(rate=inner))
        further = {name: value.clone() for name, value in ahead.items()}
        train_phase(model, further, GROUPS, [second], settings)
        point = {name: point[name] + further[name] - ahead[name] for name in point}
    assert_close(turn.stacked(), {name: point[name] for name in turn.after})


def test_fedala_starts_between_what_was_kept_and_what_came(tiny: Tiny, tmp_path: Path) -> None:
    """One step on the weights, by hand: W = clip(1 - eta * gradient * (received - kept)), then local training."""
    clients = make(tiny, tmp_path, "fedala", local={"epochs": 1}, options={"eta": 40.0})
    model = clients.model
    first, second = play(clients, tmp_path, 2)
    old = {n: torch.from_numpy(v) for n, v in first.stacked().items()}
    came = {n: torch.from_numpy(v).expand(8, *v.shape) for n, v in first.after.items()}
    there = model.broadcast(8) | {n: v.clone() for n, v in came.items()}
    rates = clients.config.local.model_copy(update={"lr": type(clients.config.local.lr)(adapter=1, norm=1, head=1)})
    train_phase(model, there, GROUPS, whole(clients), rates)
    gradient = {n: came[n] - there[n] for n in came}
    weights = {n: (1 - 40.0 * gradient[n] * (came[n] - old[n])).clamp(0, 1) for n in came}
    assert min(float(w.min()) for w in weights.values()) < 0.5, "the weights hardly moved: nothing would be seen"
    start = model.broadcast(8) | {n: old[n] + (came[n] - old[n]) * weights[n] for n in came}
    train_phase(model, start, GROUPS, whole(clients), clients.config.local)
    assert_close(second.stacked(), {n: start[n] for n in came})
    assert_close({n: own(clients, second.after)[n] for n in came}, second.stacked(), atol=0.0)


# ---------------------------------------------------------------- scaffold


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_the_server_control_is_the_mean_of_the_clients(tiny: Tiny, tmp_path: Path, rate: float) -> None:
    """Over all users after every round, whoever took part; those who did not keep theirs."""
    clients = make(tiny, tmp_path, "scaffold", client_rate=rate, client_sampling="fixed" if rate < 1 else "poisson")
    shared, old = None, kept(clients)
    for _ in range(3):
        (turn,) = play(clients, tmp_path, 1, shared)
        shared, now = turn.after, kept(clients)
        assert len(turn.up) == 8 * rate
        for name, rows in now.items():
            control = shared[name.replace("client_control.", "control.")]
            np.testing.assert_allclose(rows.mean(dim=0), control, atol=1e-6)
            assert np.abs(control).max() > 1e-6
            assert {user for user in range(8) if differ({name: rows[user]}, {name: old[name][user]}, 0)} == set(turn.up)
        old = now


def test_scaffold_drifts_less_than_fedavg_where_users_disagree(tiny: Tiny, tmp_path: Path) -> None:
    """From the second round on the clients' models lie closer together, after the same number of steps."""
    spread = {}
    for name in ("scaffold", "fedavg"):
        clients = opposed(tiny, tmp_path, name, share="head", local={"epochs": 8})
        turn = play(clients, tmp_path, 4)[-1]
        replies = turn.stacked()
        apart = [
            float(np.sum((replies[n] - replies[n].mean(axis=0)) ** 2)) for n in turn.after if n.startswith("head.")
        ]
        spread[name] = sum(apart) ** 0.5
    assert spread["scaffold"] < 0.5 * spread["fedavg"]


# ---------------------------------------------------------------- rolora


def test_rolora_trains_one_factor_in_turn(tiny: Tiny, tmp_path: Path) -> None:
    """By hand: the head in both rounds, B in the first, A in the second, each from what was received."""
    clients = make(tiny, tmp_path, "rolora", local={"epochs": 1})
    for turn, groups in zip(play(clients, tmp_path, 2), (("B", "head"), ("A", "head")), strict=True):
        point = clients.model.broadcast(8, {name: torch.from_numpy(value) for name, value in turn.before.items()})
        train_phase(clients.model, point, groups, whole(clients), clients.config.local)
        assert_close(turn.stacked(), {name: point[name] for name in clients.model.names(groups)})


def test_a_factor_that_nobody_sends_stays_whatever_momentum_the_server_has(tiny: Tiny, tmp_path: Path) -> None:
    server = {"strategy": "FedAvgM", "options": {"server_momentum": 0.9}}
    clients = make(tiny, tmp_path, "rolora", server=server)
    for number, turn in enumerate(play(clients, tmp_path, 4), 1):
        still, moving = ("A", "B") if number % 2 else ("B", "A")
        for name in clients.model.names([still]):
            assert np.array_equal(turn.after[name], turn.before[name])
        for name in clients.model.names([moving]):
            assert differ({name: turn.after[name]}, {name: turn.before[name]})


# ---------------------------------------------------------------- ifca


def opposed(tiny: Tiny, folder: Path, name: str, users: Sequence[int] = range(8), **changes: Any) -> Clients:
    """Of two replies, the same two for every record, even users gave one and odd users the other."""

    def who(examples: Examples) -> Examples:
        candidates = np.tile(np.array([0, 1]), (len(examples.ids), 1))
        odd = np.concatenate([np.concatenate([examples.train[u], examples.test[u]]) for u in range(1, 8, 2)])
        candidates[odd] = [1, 0]
        return listed(users)(replace(examples, candidates=candidates))

    return make(tiny, folder, name, who=who, reuse=Reuse(), **changes)


def test_ifca_finds_groups_that_want_the_opposite(tiny: Tiny, tmp_path: Path) -> None:
    clients = opposed(tiny, tmp_path, "ifca")
    shared = last(play(clients, tmp_path, 3))
    mine = own(clients, shared)
    versions = [clients.layout.version(shared, place) for place in range(2)]
    chosen = []
    for user in range(8):
        fits = [all(np.array_equal(mine[n][user], version[n]) for n in version) for version in versions]
        assert sum(fits) == 1
        chosen.append(fits.index(True))
    assert chosen[::2] == [chosen[0]] * 4
    assert chosen[1::2] == [1 - chosen[0]] * 4
    plain = opposed(tiny, tmp_path, "fedavg")
    theirs = common(plain, last(play(plain, tmp_path, 3)))
    assert (losses(clients, mine) < losses(plain, theirs)).all()


def losses(clients: Clients, parameters: Parameters) -> Tensor:
    """Mean test loss of every user, (users,)."""
    made = scores(clients, parameters)
    found = clients.model.task.loss(made, torch.zeros(len(made)))
    return torch.stack([part.mean() for part in torch.split(found, [len(rows) for rows in clients.examples.test])])


def test_users_who_are_all_alike_take_the_same_model_and_the_other_stays(tiny: Tiny, tmp_path: Path) -> None:
    clients = make(tiny, tmp_path, "ifca", who=alike(2, 8))
    turns = play(clients, tmp_path, 2)
    first, shared = clients.layout.broadcast(), last(turns)
    moved = [differ(clients.layout.version(shared, one), clients.layout.version(first, one), 1e-6) for one in range(2)]
    assert sorted(moved) == [False, True]
    for turn in turns:
        for reply in turn.up.values():
            assert_close(
                clients.layout.version(reply, moved.index(False)),
                clients.layout.version(first, moved.index(False)),
                1e-7,
            )


def test_a_cluster_moves_by_its_share_of_the_round(tiny: Tiny, tmp_path: Path) -> None:
    """The denominator is the number of all clients, as in the paper; that of a cluster would tell who chose it."""
    clients = opposed(tiny, tmp_path, "ifca", users=[0, 1, 2, 4, 6])
    (turn,) = play(clients, tmp_path)
    for place in range(2):
        before = clients.layout.version(turn.before, place)
        replies = [clients.layout.version(reply, place) for reply in turn.up.values()]
        came = [reply for reply in replies if differ(reply, before, 0.0)]
        assert 0 < len(came) < len(replies)
        after = clients.layout.version(turn.after, place)
        moves = {n: sum(reply[n] - before[n] for reply in came) / len(replies) for n in before}
        assert_close(after, {n: before[n] + moves[n] for n in before}, 1e-6)


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_a_method_gets_the_numbers_that_the_configuration_gives_it(tiny: Tiny, name: str) -> None:
    options = {option: value / 2 + 0.25 for option, value in find("methods", name, Method).options.items()}
    everything = {"groups": "adapter+norm+head"}
    assert prepare(tiny(method=name, options=options, personal=everything)).plan.options == options
