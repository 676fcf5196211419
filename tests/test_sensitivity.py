"""The sensitivity probe: one record or one user is taken away, every coin stays, and what is released is compared.

The bound is the whole promise of DP-SGD and DP-FedAvg, so it is measured on the production path, with controls that
have to break it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message
from numpy.typing import NDArray
from torch import Tensor

from conftest import SECRET
from fedpers.cohort.batching import epochs, poisson
from fedpers.cohort.clients import Clients
from fedpers.cohort.layout import layout
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config
from fedpers.errors import PrivacyRefusal
from fedpers.experiment import Experiment, Reuse, build_model, method_plan, prepare
from fedpers.flower import messages as wire
from fedpers.flower.cohort_grid import CohortGrid
from fedpers.flower.strategy import FedpersStrategy, RoundReport
from fedpers.models.array_names import family_of
from fedpers.plan import Plan
from fedpers.privacy.dataflow import leaks
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import Opening
from fedpers.privacy.mechanisms import clip_update
from fedpers.privacy.randomness import generator, secret_key, seed_key, uniforms
from fedpers.privacy.refusals import check_setup
from fedpers.privacy.sampling import draw
from fedpers.registry import names
from fedpers.reporting import Reporter
from fedpers.tasks.base import Examples
from fedpers.tasks.reply_ranking import ReplyRanking

Tiny = Callable[..., Config]
Arrays = dict[str, NDArray[np.float32]]
KEY = secret_key(SECRET)
UNBOUNDED = 1e9
REUSE = Reuse()  # what a test changes in a model, it changes through monkeypatch


@pytest.fixture
def tiny(tiny: Tiny) -> Tiny:
    """One thread (faster for tiny models), step size 1 for every group."""

    def make(**changes: Any) -> Config:
        rates = {"adapter": 1.0, "head": 1.0}
        local = {"batch_size": 4, "lr": rates, **changes.pop("local", {})}
        personal = {"lr": rates, "batch_size": 4, "epochs": 2, **changes.pop("personal", {})}
        engine = {"threads": 1, **changes.pop("engine", {})}
        task = {"candidates": 4, "scale": 4.0}
        return tiny(engine=engine, local=local, personal=personal, **{"task": task, **changes})

    return make


def make_clients(
    experiment: Experiment,
    folder: Path,
    *,
    plan: Plan | None = None,
    reuse: Reuse | None = REUSE,
    **guarantee: Any,
) -> Clients:
    """Clients as a run makes them; `guarantee` overrides single fields of what was resolved."""
    plan = plan or experiment.plan
    model = build_model(experiment, Reporter(), reuse)
    first = layout(experiment.config, plan, model).kept()
    store = PersonalStore(folder, len(experiment.examples.users), first)
    guard = replace(experiment.guarantee, **guarantee)
    clients = Clients(experiment.config, plan, guard, model, store, KEY)
    clients.examples = experiment.examples
    return clients


def somewhere(clients: Clients, spread: float = 0.2) -> Arrays:
    """Shared arrays off their initial values, so that every factor has a gradient."""
    rng = np.random.default_rng(11)
    return {
        name: (value + spread * rng.standard_normal(value.shape)).astype(np.float32)
        for name, value in clients.layout.broadcast().items()
    }


def without_record(examples: Examples, user: int, row: int) -> Examples:
    train = list(examples.train)
    train[user] = train[user][train[user] != row]
    return replace(examples, train=tuple(train))


def sums(clients: Clients, shared: Arrays, examples: Examples | None = None) -> dict[str, NDArray[np.float64]]:
    """What all clients' single step adds up, read off their replies, (users, out, in); step sizes are 1."""
    kept = clients.examples
    clients.examples = examples or kept
    replies = clients.train_round(1, range(len(kept.users)), shared)
    clients.store.drain()  # the next probe starts from the same personal state
    clients.examples = kept
    lot = clients.guarantee.denominator
    return {name: (shared[name].astype(np.float64) - reply) * lot for name, reply in replies.items()}


def changes(full: Mapping[str, NDArray[np.float64]], less: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """L2 norm of the change of each user's whole sum."""
    squares = [np.square(full[name] - less[name]).reshape(len(full[name]), -1).sum(axis=1) for name in full]
    return np.asarray(np.sqrt(np.sum(squares, axis=0)))


def records(examples: Examples, users: Sequence[int]) -> Iterator[tuple[int, int]]:
    return ((user, int(row)) for user in users for row in examples.train[user])


def record_level(config: Config, folder: Path, plan: Plan | None = None, **guarantee: Any) -> Clients:
    """Clients at record level, one step of clipping without noise."""
    clients = make_clients(prepare(config), folder, plan=plan, **{"steps": 1, "denominator": 1.0, **guarantee})
    assert clients.guarantee.unit == "record"
    assert clients.guarantee.noise_multiplier == 0
    return clients


RECORD = {"unit": "record", "clip": UNBOUNDED, "record_rate": 1.0}


# ---------------------------------------------------------------- one record


@pytest.mark.parametrize(
    ("method", "share"),
    [("fedavg", "adapter+head"), ("fedbabu", "adapter+head"), ("fedavg", "adapter"), ("fedavg", "head")],
)
def test_one_record_moves_its_clients_sum_by_its_clipped_gradient_and_no_other_sum(
    tiny: Tiny, tmp_path: Path, method: str, share: str
) -> None:
    clients = record_level(tiny(method=method, share=share, privacy=RECORD), tmp_path)
    assert {family_of(name) for name in clients.shared_names} == (
        {"adapter"} if method == "fedbabu" else set(share.split("+"))
    )
    shared, users = somewhere(clients), [0, 5]
    whole = sums(clients, shared)
    norms = {  # with an endless clip the change is the record's own gradient
        (user, row): changes(whole, sums(clients, shared, without_record(clients.examples, user, row)))[user]
        for user, row in records(clients.examples, users)
    }
    clip = float(np.median(list(norms.values())))
    assert min(norms.values()) < 0.98 * clip < 1.02 * clip < max(norms.values())
    clients.guarantee = replace(clients.guarantee, clip=clip)
    whole = sums(clients, shared)
    for (user, row), norm in norms.items():
        change = changes(whole, sums(clients, shared, without_record(clients.examples, user, row)))
        assert change[user] <= clip * (1 + 1e-5)
        assert change[user] == pytest.approx(min(norm, clip), rel=1e-4)
        assert np.delete(change, user).max() <= 1e-6


def test_a_record_whose_coin_fell_out_moves_nothing_and_no_coin_depends_on_it(tiny: Tiny, tmp_path: Path) -> None:
    clip = 0.05
    clients = record_level(tiny(method="fedavg", privacy={**RECORD, "clip": clip}), tmp_path, rate=0.5)
    shared, examples = somewhere(clients), clients.examples
    address = ("round", 1, 0)
    (step,) = poisson(examples, range(len(examples.users)), 1, 0.5, KEY, address)
    whole = sums(clients, shared)
    seen = set()
    for user, row in records(examples, [1, 2]):
        less = without_record(examples, user, row)
        (other,) = poisson(less, range(len(examples.users)), 1, 0.5, KEY, address)
        assert other.rows.tolist() == [r for r in step.rows.tolist() if r != row]
        change = changes(whole, sums(clients, shared, less))
        inside = row in step.rows
        seen.add(inside)
        assert change[user] == pytest.approx(clip if inside else 0.0, abs=2e-6)
        assert np.delete(change, user).max() <= 1e-6
    assert seen == {True, False}


def test_the_bound_holds_from_the_raw_records_on(tiny: Tiny, tmp_path: Path) -> None:
    """The record never existed: candidates, frozen features and coins of a second, separate preparation."""
    clip = 0.05
    config = tiny(method="fedavg", privacy={**RECORD, "clip": clip})
    experiment = prepare(config)
    clients = make_clients(experiment, tmp_path / "all", steps=1, denominator=1.0)
    shared = somewhere(clients)
    whole = sums(clients, shared)
    for user, place in [(3, 0), (6, 2)]:
        smaller = drop_record(experiment, user, place)
        others = make_clients(smaller, tmp_path / f"{user}", reuse=None, steps=1, denominator=1.0)
        change = changes(whole, sums(others, shared))
        assert 0.99 * clip < change[user] <= clip * (1 + 1e-5)
        assert np.delete(change, user).max() <= 2e-6


def drop_record(experiment: Experiment, user: int, place: int) -> Experiment:
    federation = experiment.federation
    train = list(federation.train)
    train[user] = train[user][:place] + train[user][place + 1 :]
    federation = replace(federation, train=tuple(train))
    examples = experiment.task.prepare(federation, seed_key(experiment.config.seed))
    return replace(experiment, federation=federation, examples=examples)


@pytest.mark.parametrize("method", names("methods"))
def test_every_method_that_is_accepted_at_record_level_keeps_the_bound(tiny: Tiny, tmp_path: Path, method: str) -> None:
    clip = 0.05
    config = tiny(method=method, privacy={**RECORD, "clip": clip}, personal={"groups": "adapter+head"})
    plan = method_plan(method, config)
    if leaks(plan) or plan.method.unclaimable:
        with pytest.raises(PrivacyRefusal):
            check_setup(config, plan)
        return
    # A step after a step composes, and single ones are measured; one of no size leaves the next where it was.
    plan = replace(plan, options={**plan.options, **{phase.inner: 0.0 for phase in plan.round if phase.inner}})
    clients = record_level(config, tmp_path, plan=plan)
    if not plan.shared:
        assert sums(clients, {}) == {}
        return
    assert len([phase for phase in plan.round if phase.on(1) and plan.protected(phase)]) == 1
    shared = somewhere(clients)
    trained = set(clients.layout.shared)  # companions are made of what these have become

    def look(examples: Examples | None = None) -> dict[str, NDArray[np.float64]]:
        return {name: found for name, found in sums(clients, shared, examples).items() if name in trained}

    whole = look()
    for user, row in records(clients.examples, [4]):
        change = changes(whole, look(without_record(clients.examples, user, row)))
        assert 0.9 * clip < change[user] <= clip * (1 + 1e-5)
        assert np.delete(change, user).max() <= 1e-6


def forced_fedrep(tiny: Tiny, folder: Path, head_rate: float) -> float:
    """The refused combination, behind the refusal's back: its largest change over clip."""
    clip = 0.05
    accepted = tiny(
        method="fedbabu", privacy={**RECORD, "clip": clip}, personal={"lr": {"adapter": 1.0, "head": head_rate}}
    )
    plan = method_plan("fedrep", accepted)
    with pytest.raises(PrivacyRefusal):
        check_setup(accepted, plan)
    clients = record_level(accepted, folder, plan=plan)
    assert [phase.train for phase in clients.plan.round] == [("head",), ("A", "B")]
    shared = somewhere(clients)
    whole = sums(clients, shared)
    found = [
        changes(whole, sums(clients, shared, without_record(clients.examples, user, row)))[user]
        for user, row in records(clients.examples, [0, 1, 4])
    ]
    return float(max(found)) / clip


def test_control_a_noise_free_personal_head_breaks_the_record_level_bound(tiny: Tiny, tmp_path: Path) -> None:
    assert forced_fedrep(tiny, tmp_path / "still", head_rate=1e-9) <= 1 + 1e-5
    assert forced_fedrep(tiny, tmp_path / "moving", head_rate=100.0) > 1.2


class BatchMean(ReplyRanking):
    """What `reduction="mean"` does to Opacus: every record's gradient depends on how many are in the pass."""

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        return super().loss(scores, targets) / len(scores)


class BatchWeighted(ReplyRanking):
    """The record with the largest loss makes all the others small, as one long text does in a mean over tokens."""

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        losses = super().loss(scores, targets)
        return losses / losses.detach().max() ** 12


def test_control_a_batch_mean_loss_lets_one_record_move_the_sums_of_others(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = record_level(tiny(method="fedavg", privacy=RECORD), tmp_path)
    shared = somewhere(clients)
    user, row = next(records(clients.examples, [1]))
    less = without_record(clients.examples, user, row)
    honest = changes(sums(clients, shared), sums(clients, shared, less))
    monkeypatch.setattr(clients.model, "task", BatchMean(clients.config.task))
    leaking = changes(sums(clients, shared), sums(clients, shared, less))
    assert np.delete(honest, user).max() <= 1e-6
    assert np.delete(leaking, user).max() > 1e-3


def test_control_a_loss_weighted_by_the_batch_breaks_the_bound(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(method="fedavg", share="head", privacy=RECORD, engine={"cohort_size": 1})
    clients = record_level(config, tmp_path)
    shared = somewhere(clients)
    pairs = list(records(clients.examples, [0, 2]))

    def largest(clip: float) -> float:
        clients.guarantee = replace(clients.guarantee, clip=clip)
        whole = sums(clients, shared)
        found = max(
            changes(whole, sums(clients, shared, without_record(clients.examples, user, row)))[user]
            for user, row in pairs
        )
        return float(found)

    honest = largest(UNBOUNDED)
    assert largest(honest / 4) <= honest / 4 * (1 + 1e-5)
    monkeypatch.setattr(clients.model, "task", BatchWeighted(config.task))
    assert max(largest(clip) / clip for clip in (1e-3, 1e-2)) > 1.2


# ---------------------------------------------------------------- one user


@dataclass(frozen=True)
class Round:
    """One round on the server."""

    before: Arrays
    after: Arrays
    replies: dict[str, Arrays]  # by user id
    report: RoundReport

    def mean(self) -> Arrays:
        return {name: self.after[name] - self.before[name] for name in self.before}


class World:
    """A server and its clients, some users perhaps taken away; the guarantee is the same in all worlds."""

    def __init__(self, experiment: Experiment, folder: Path, gone: str | None = None, **guarantee: Any) -> None:
        examples = experiment.examples
        kept = [place for place, user in enumerate(examples.users) if user != gone]
        examples = replace(
            examples,
            users=tuple(examples.users[place] for place in kept),
            train=tuple(examples.train[place] for place in kept),
            test=tuple(examples.test[place] for place in kept),
        )
        self.experiment = replace(experiment, examples=examples)
        self.clients = make_clients(self.experiment, folder / "personal", **guarantee)
        self.ledger = Ledger.create(folder / "ledger.jsonl", opening(self.clients))

    def round(
        self, number: int, shared: Arrays, forge: Callable[[str, Arrays], Arrays | None] = lambda _user, arrays: arrays
    ) -> Round:
        """One round through Flower's messages; `forge` may replace a reply, or drop it."""
        users = self.experiment.examples.users
        strategy = FedpersStrategy(
            self.experiment.config, self.clients.guarantee, users, self.ledger, KEY, self.clients.layout,
            first_round=number - 1,
        )  # fmt: skip
        grid = CohortGrid(self.clients)
        record = wire.to_record(shared, self.clients.shared_names)
        messages = {m.metadata.dst_node_id: m for m in strategy.configure_train(1, record, ConfigRecord(), grid)}
        replies: dict[str, Arrays] = {}
        kept: list[Message] = []
        for reply in grid.send_and_receive(messages.values()):
            node = reply.metadata.src_node_id
            user = users[node - wire.FIRST_NODE]
            assert reply.content[wire.METRICS][wire.WEIGHT] == 1, "how many records a user has is private"
            forged = forge(user, wire.from_record(wire.arrays_of(reply)))
            if forged is not None:
                replies[user] = forged
                kept.append(wire.reply(messages[node], forged, self.clients.shared_names))
        arrays, _ = strategy.aggregate_train(1, kept)
        assert arrays is not None
        assert strategy.report is not None
        return Round(shared, wire.from_record(arrays), replies, strategy.report)


def opening(clients: Clients) -> Opening:
    return clients.guarantee.opening(clients.config, clients.shared_names, 8, "given in the configuration")


def user_level(tiny: Tiny, **changed: Any) -> Experiment:
    privacy = {"unit": "user", "clip": 0.5, "delta": 1e-3}
    return prepare(tiny(**{"method": "fedavg", "client_rate": 0.7, "privacy": privacy, **changed}))


def emptied(experiment: Experiment, user: int) -> Experiment:
    """The neighbour by the ledger's adjacency, zero-out: the user stays registered and has nothing."""
    train = list(experiment.examples.train)
    train[user] = train[user][:0]
    return replace(experiment, examples=replace(experiment.examples, train=tuple(train)))


def initial(world: World) -> Arrays:
    return world.clients.layout.broadcast()


def length(arrays: Mapping[str, NDArray[Any]]) -> float:
    return float(np.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in arrays.values())))


def change_of_sum(one: Round, other: Round, denominator: float) -> float:
    mean, less = one.mean(), other.mean()
    return length({name: mean[name].astype(np.float64) - less[name] for name in mean}) * denominator


@pytest.mark.parametrize("method", ["fedavg", "fedper", "fedrep"])
def test_one_user_moves_the_noised_sum_by_no_more_than_the_clip(tiny: Tiny, tmp_path: Path, method: str) -> None:
    """Personal heads stay noise-free here, in the round and over rounds: for every past broadcast the bound holds."""
    experiment = user_level(tiny, method=method, local={"lr": {"adapter": 0.3, "head": 0.3}})
    clip, denominator = 0.12, 0.7 * 8
    world = World(experiment, tmp_path / "all", clip=clip, noise_multiplier=1.0)
    assert world.clients.guarantee.denominator == pytest.approx(denominator)
    first = world.round(1, initial(world))
    second = world.round(2, first.after)
    assert first.report.clipped > 0
    assert {len(first.replies), len(second.replies)} <= set(range(1, 8)), "everyone was sampled"
    for place, gone in enumerate(experiment.examples.users[:5]):
        smaller = World(emptied(experiment, place), tmp_path / gone, clip=clip, noise_multiplier=1.0)
        # The second round of the smaller world reads the same past broadcast: composition is over fixed outputs.
        for number, full in ((1, first), (2, second)):
            less = smaller.round(number, full.before)
            assert set(less.replies) == set(full.replies)
            norm = (
                length({n: full.replies[gone][n] - full.before[n] for n in full.before})
                if gone in full.replies
                else 0.0
            )
            change = change_of_sum(full, less, denominator)
            assert change <= clip * (1 + 1e-5) + 2e-6
            assert change == pytest.approx(min(norm, clip), abs=1e-5)
            for user, arrays in less.replies.items():
                same = full.before if user == gone else full.replies[user]
                for name, array in arrays.items():
                    np.testing.assert_allclose(array, same[name], atol=1e-6)


def test_a_user_without_records_is_a_user_who_is_not_there(tiny: Tiny, tmp_path: Path) -> None:
    for method in ("fedavg", "fedrep"):
        experiment = user_level(tiny, method=method, client_rate=1.0, engine={"cohort_size": 1})
        world = World(experiment, tmp_path / method / "gone", experiment.examples.users[2], noise_multiplier=1.0)
        zeroed = World(emptied(experiment, 2), tmp_path / method / "zeroed", noise_multiplier=1.0)
        one, other = world.round(1, initial(world)), zeroed.round(1, initial(world))
        assert set(other.replies) - set(one.replies) == {experiment.examples.users[2]}
        for name, array in one.after.items():
            np.testing.assert_allclose(other.after[name], array, atol=1e-6)


def test_a_huge_update_counts_as_the_clip_and_one_that_is_not_finite_as_nothing(tiny: Tiny, tmp_path: Path) -> None:
    experiment = user_level(tiny, client_rate=1.0, local={"lr": {"adapter": 100.0, "head": 100.0}})
    clip, denominator, user = 0.5, 8.0, experiment.examples.users[3]
    world = World(experiment, tmp_path / "0", noise_multiplier=1.0)
    start = initial(world)

    def again(name: str, forge: Callable[[str, Arrays], Arrays | None]) -> Round:
        return World(experiment, tmp_path / name, noise_multiplier=1.0).round(1, start, forge)

    full = world.round(1, start)
    norms = {u: length({n: a[n] - start[n] for n in start}) for u, a in full.replies.items()}
    assert min(norms.values()) > 10 * clip
    assert full.report.clipped == 8
    gone = again("gone", lambda u, arrays: None if u == user else arrays)
    assert change_of_sum(full, gone, denominator) == pytest.approx(clip, abs=1e-5)
    for bad in (np.nan, np.inf, -np.inf):

        def spoil(u: str, arrays: Arrays, bad: float = bad) -> Arrays:
            if u == user:
                name = sorted(arrays)[0]
                arrays = {**arrays, name: arrays[name].copy()}
                arrays[name].flat[0] = bad
            return arrays

        spoilt = again(f"{bad}", spoil)
        assert spoilt.report.nonfinite == 1
        assert set(spoilt.replies) == set(full.replies)
        for name, array in gone.after.items():
            np.testing.assert_array_equal(spoilt.after[name], array)


def test_the_noised_mean_is_a_uniform_sum_over_a_constant_whoever_came(tiny: Tiny, tmp_path: Path) -> None:
    """Weights by records, or division by who came, would show here."""
    experiment = user_level(tiny, client_rate=0.7)
    world = World(experiment, tmp_path, noise_multiplier=0.8)
    found = world.round(1, initial(world))
    people = experiment.examples.users
    assert sorted(found.replies) == [people[user] for user in draw("poisson", 0.7, people, KEY, 1)]
    sizes = {len(experiment.examples.train[experiment.examples.users.index(user)]) for user in found.replies}
    assert len(sizes) > 1
    assert len(found.replies) != pytest.approx(0.7 * 8)
    rng = generator(KEY, "user-noise", 1)
    for name in sorted(found.before):
        total = sum(
            clip_update({n: arrays[n] - found.before[n] for n in found.before}, 0.5)[0][name]
            for arrays in found.replies.values()
        )
        expected = (total + 0.8 * 0.5 * rng.standard_normal(found.before[name].shape)) / (0.7 * 8)
        np.testing.assert_allclose(found.mean()[name], expected, atol=1e-6)


@pytest.mark.parametrize("rate", [0.7, 1e-9], ids=["some come", "nobody comes"])
def test_an_empty_cohort_releases_noise_and_is_on_the_ledger(tiny: Tiny, tmp_path: Path, rate: float) -> None:
    experiment = user_level(tiny, client_rate=rate)
    world = World(experiment, tmp_path, noise_multiplier=2.0, denominator=5.6)
    found = world.round(1, initial(world))
    assert (len(found.replies) == 0) == (rate < 0.1)
    assert [release.round for release in world.ledger.releases] == [1]
    assert world.ledger.releases[0].mechanism == "gaussian"
    noise = np.concatenate([array.ravel() for array in found.mean().values()])
    assert noise.std() == pytest.approx(2.0 * 0.5 / 5.6, rel=0.25)
    if rate < 0.1:
        rng = generator(KEY, "user-noise", 1)
        expected = {n: rng.standard_normal(found.before[n].shape) / 5.6 for n in sorted(found.before)}
        for name, array in found.mean().items():
            np.testing.assert_allclose(array, expected[name], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("bound", [1e-3, 0.5, 1e3])
def test_a_clipped_update_is_as_long_as_it_may_be_and_no_longer(bound: float, bad: float) -> None:
    rng = np.random.default_rng(3)
    update = {"a": rng.standard_normal((4, 3)).astype(np.float32), "b": rng.standard_normal((5, 1)).astype(np.float32)}
    norm = length(update)
    kept, reported = clip_update(update, bound)
    assert reported == pytest.approx(norm)
    assert length(kept) == pytest.approx(min(norm, bound))
    assert length(kept) <= bound * (1 + 1e-12)
    zero, reported = clip_update({"a": np.zeros((2, 2), np.float32)}, bound)
    assert reported == 0
    assert length(zero) == 0
    huge, _ = clip_update({"a": np.full((2, 2), 3e38, np.float32)}, bound)
    assert length(huge) == pytest.approx(bound)
    spoilt, reported = clip_update({**update, "b": np.full((5, 1), bad, np.float32)}, bound)
    assert length(spoilt) == 0
    assert reported == float("inf")


# ---------------------------------------------------------------- numbers that are not finite


def poison(clients: Clients, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one record's frozen features NaN, in memory only."""
    model = clients.model
    if model.prefix is None:
        assert model.frozen_contexts is not None
        monkeypatch.setattr(model, "frozen_contexts", model.frozen_contexts.clone())
        model.frozen_contexts[row] = float("nan")
    else:
        flat = np.array(model.prefix.flat)
        flat[model.prefix.offsets[row] : model.prefix.offsets[row + 1]] = np.nan
        monkeypatch.setattr(model.prefix, "flat", flat)


@pytest.mark.parametrize("share", ["adapter+head", "head"])
def test_a_record_whose_gradient_is_not_finite_counts_as_zero(
    tiny: Tiny, tmp_path: Path, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(method="fedavg", share=share, privacy={**RECORD, "clip": 0.5})
    clients = record_level(config, tmp_path)
    shared, user = somewhere(clients), 2
    row = int(clients.examples.train[user][1])
    less = sums(clients, shared, without_record(clients.examples, user, row))
    whole = sums(clients, shared)
    assert changes(whole, less)[user] > 1e-3
    assert clients.stats.nonfinite == 0
    poison(clients, row, monkeypatch)
    spoilt = sums(clients, shared)
    assert clients.stats.nonfinite == 1
    assert clients.nonfinite_updates == 0
    assert all(np.isfinite(array).all() for array in spoilt.values())
    assert changes(spoilt, less).max() <= 1e-6


@pytest.mark.parametrize("method", ["fedavg", "fedrep"])
def test_a_user_whose_training_is_not_finite_still_replies_with_no_update(
    tiny: Tiny, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = user_level(tiny, method=method, client_rate=1.0, local={"lr": {"adapter": 0.1, "head": 0.1}})
    world = World(experiment, tmp_path / "spoilt", noise_multiplier=1.0)
    start, bad = initial(world), 2
    user = experiment.examples.users[bad]
    gone = World(experiment, tmp_path / "gone", user, noise_multiplier=1.0).round(1, start)
    poison(world.clients, int(experiment.examples.train[bad][1]), monkeypatch)
    found = world.round(1, start)
    assert world.clients.nonfinite_updates == 1
    assert set(found.replies) == set(experiment.examples.users)
    for name, array in found.replies[user].items():
        np.testing.assert_array_equal(array, start[name])
    for other in set(found.replies) - {user}:
        assert length({n: found.replies[other][n] - start[n] for n in start}) > 1e-3
        for name, array in found.replies[other].items():
            np.testing.assert_allclose(array, gone.replies[other][name], atol=1e-6)
    for name, array in gone.after.items():
        np.testing.assert_allclose(found.after[name], array, atol=1e-6)
    for name, rows in world.clients.store.read([bad, 3]).items():
        assert torch.equal(rows[0], world.clients.model.initial[name])
        assert not torch.equal(rows[1], world.clients.model.initial[name])


# ---------------------------------------------------------------- coins


def test_taking_a_record_away_moves_no_other_coin_order_or_candidate(tiny: Tiny) -> None:
    experiment = prepare(tiny())
    examples, user, place = experiment.examples, 4, 1
    name = examples.ids[examples.train[user][place]]
    less = drop_record(experiment, user, place).examples
    assert name not in less.ids
    assert len(less.ids) == len(examples.ids) - 1
    users = range(len(examples.users))

    def candidates(of: Examples) -> dict[str, list[str]]:
        return {one: [of.texts[c] for c in row] for one, row in zip(of.ids, of.candidates, strict=True)}

    all_candidates = candidates(examples)
    assert candidates(less) == {one: texts for one, texts in all_candidates.items() if one != name}

    def batches(of: Examples, rate: float) -> list[list[str]]:
        return [[of.ids[row] for row in step.rows] for step in poisson(of, users, 20, rate, KEY, ("round", 1, 0))]

    there = batches(examples, 0.3)
    assert batches(less, 0.3) == [[one for one in batch if one != name] for batch in there]
    assert 0 < sum(name in batch for batch in there) < 20

    def passes(of: Examples, who: int) -> list[list[str]]:
        """Record ids by epoch, in the order of their batches."""
        steps = epochs(of, [who], 3, 2, KEY, ("round", 1, 0))
        flat = [of.ids[row] for step in steps for row in step.rows]
        size = len(of.train[who])
        return [flat[start : start + size] for start in range(0, len(flat), size)]

    orders = passes(examples, user)
    assert len({tuple(one) for one in orders}) == 3, "every epoch has an order of its own"
    assert passes(less, user) == [[one for one in epoch if one != name] for epoch in orders]
    assert passes(less, 5) == passes(examples, 5)


def test_poisson_batches_come_at_their_rate_and_differ_by_round_phase_and_user(tiny: Tiny) -> None:
    examples = prepare(tiny()).examples
    users = range(len(examples.users))
    total = sum(len(rows) for rows in examples.train)

    def rows(*address: str | int) -> list[list[int]]:
        return [step.rows.tolist() for step in poisson(examples, users, 50, 0.3, KEY, address)]

    first = rows("round", 1, 0)
    assert np.mean([len(one) for one in first]) == pytest.approx(0.3 * total, rel=0.1)
    assert len({tuple(one) for one in first}) > 45
    assert first != rows("round", 2, 0)
    assert first != rows("round", 1, 1)
    own = [[(coins < 0.3).nonzero()[0].tolist() for coins in step_coins(examples, user)] for user in (0, 1)]
    shortest = min(len(examples.train[0]), len(examples.train[1]))
    assert [[i for i in one if i < shortest] for one in own[0]] != [[i for i in one if i < shortest] for one in own[1]]


def step_coins(examples: Examples, user: int) -> NDArray[np.float64]:
    ids = [examples.ids[row] for row in examples.train[user]]
    return uniforms(KEY, ("round", 1, 0, "batch", examples.users[user]), ids, 50).T
