"""Very many registered users: who takes part is drawn without looking at them, and no records are made in vain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from scipy import stats

from conftest import Command
from fedpers import simulation
from fedpers.audit.command import audit
from fedpers.cohort.clients import Clients
from fedpers.cohort.layout import layout
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config
from fedpers.data import load
from fedpers.data.synthetic import Synthetic
from fedpers.errors import ConfigError
from fedpers.evaluation import models as evaluation
from fedpers.experiment import build_model, prepare
from fedpers.identity import identity
from fedpers.population import OnDemand, sample
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.randomness import seed_key
from fedpers.privacy.sampling import draw
from fedpers.reporting import Reporter
from fedpers.run_directory import RunDirectory
from fedpers.simulation import simulate

Tiny = Callable[..., Config]
KEY, OTHER_KEY = seed_key(1), seed_key(2)
MILLION = 1_000_000
SURE = 1e-6  # a chance failure of a statistical check is this unlikely
USER = {"unit": "user", "delta": 1e-7, "clip": 0.5, "noise_multiplier": 1.0}


def drawn(rate: float, users: int, number: int, key: bytes = KEY) -> list[int]:
    return draw("poisson", rate, OnDemand(users, _unread), key, number).tolist()


def _unread(user: int) -> Any:
    raise AssertionError("a user was looked at")


# ---------------------------------------------------------------- who takes part


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.5, 0.97])
def test_each_place_is_drawn_with_the_rate_and_independently(rate: float) -> None:
    users, rounds = 40, 4000
    hit = np.zeros((rounds, users))
    for number in range(rounds):
        hit[number, drawn(rate, users, number)] = 1
    # Cohort sizes are binomial: their mean and their variance.
    sizes = hit.sum(axis=1)
    limit = stats.norm.isf(SURE)
    assert abs(sizes.mean() - rate * users) < limit * np.sqrt(users * rate * (1 - rate) / rounds)
    assert sizes.var() == pytest.approx(users * rate * (1 - rate), rel=0.15)
    # Each place alike: chi-square of the counts by place.
    spread = rounds * rate * (1 - rate)
    assert ((hit.sum(axis=0) - rounds * rate) ** 2).sum() / spread < stats.chi2.isf(SURE, users)
    # Pairs, in a round and from one round to the next: correlations are those of chance.
    pairs = np.corrcoef(hit.T)[np.triu_indices(users, 1)] * np.sqrt(rounds)
    assert np.abs(pairs).max() < stats.norm.isf(SURE / len(pairs))
    later = np.corrcoef(hit[1:].ravel(), hit[:-1].ravel())[0, 1] * np.sqrt(hit[1:].size)
    assert abs(later) < limit


def test_gaps_between_clients_are_geometric() -> None:
    rate, found = 0.01, np.array(drawn(0.01, 2_000_000, 1))
    gaps = np.diff(found) - 1
    edges = np.array([0, 10, 30, 60, 100, 150, 250, np.inf])
    expected = len(gaps) * -np.diff((1 - rate) ** edges)
    counts = np.histogram(gaps, edges)[0]
    assert ((counts - expected) ** 2 / expected).sum() < stats.chi2.isf(SURE, len(expected) - 1)


def test_rates_at_the_edges() -> None:
    assert drawn(1.0, 5, 1) == [0, 1, 2, 3, 4]
    assert drawn(1e-300, MILLION, 1) == drawn(5e-324, MILLION, 1) == []
    assert drawn(1 - 2**-53, 1000, 1) == list(range(1000))
    assert drawn(0.5, 0, 1) == []
    found = drawn(0.999, 20_000, 1)
    assert found == sorted(set(found))
    assert set(found) < set(range(20_000))
    assert len(found) == pytest.approx(19_980, abs=40)
    assert 850 < len(drawn(1e-6, 10**9, 1)) < 1150


def test_nobody_else_changes_who_takes_part() -> None:
    """What is drawn hangs on key, round and place: not on ids, nor on users who come after."""
    named = draw("poisson", 0.3, [f"a{n}" for n in range(500)], KEY, 3).tolist()
    assert named == draw("poisson", 0.3, [f"b{n * n}" for n in range(500)], KEY, 3).tolist()
    assert named == [user for user in drawn(0.3, 50_000, 3) if user < 500]
    assert named != drawn(0.3, 500, 4)
    assert named != drawn(0.3, 500, 3, OTHER_KEY)


def test_measured_users_are_drawn_in_public() -> None:
    assert list(sample(7, None, KEY)) == list(sample(7, 9, KEY)) == list(range(7))
    one = list(sample(MILLION, 500, KEY))
    assert one == sorted(set(one)) == list(sample(MILLION, 500, KEY)) != list(sample(MILLION, 500, OTHER_KEY))
    assert all(0 <= user < MILLION for user in one)
    assert np.mean(one) == pytest.approx(MILLION / 2, rel=0.15)


# ---------------------------------------------------------------- records made when they are needed


def test_records_on_demand_are_those_of_a_whole_federation(tiny: Tiny) -> None:
    config = tiny(data={"users": 30})
    whole, lazy = load(config, KEY), load(tiny(data={"users": 30, "lazy": True}), KEY)
    assert tuple(lazy.users) == whole.users
    assert (tuple(lazy.train), tuple(lazy.test), lazy.pool) == (whole.train, whole.test, whole.pool)
    some = lazy.of([4, 17])
    assert some.train[17] == whole.train[17]
    assert (list(some.people), len(some.users)) == ([4, 17], 30)
    with pytest.raises(KeyError):
        some.train[5]
    with pytest.raises(IndexError):
        lazy.train[30]


def clients_of(config: Config, folder: Path) -> Clients:
    experiment = prepare(config)
    model = build_model(experiment, Reporter())
    kept = layout(config, experiment.plan, model).kept()
    store = PersonalStore(folder, len(experiment.examples.users), kept)
    return Clients(config, experiment.plan, experiment.guarantee, model, store, KEY)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "fedper"},  # head and adapter
        {"method": "linear-probe"},  # no adapter: contexts are kept
        {"method": "feddpa"},  # a gate reads features, two adapters
        {"method": "fedbn"},  # norms
        {"method": "centralized"},
        {"method": "feddpa", "privacy": {"unit": "record", "epsilon": 8.0, "delta": 1e-4, "clip": 0.5,
                                         "head": "split-dp"}},  # halves of the records
        {"method": "fedper", "task": {"name": "language-model"}},
    ],
    ids=str,
)  # fmt: skip
def test_clients_do_the_same_with_records_on_demand(
    tiny: Tiny, tiny_llama: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    if "task" in changes:
        changes = changes | {"model": {"backbone": str(tiny_llama), "adapter": {"targets": ["q_proj"]}}}
    whole = clients_of(tiny(**changes, data={"users": 12}, evaluation={"users": 6}), tmp_path / "whole")
    lazy = clients_of(tiny(**changes, data={"users": 12, "lazy": True}, evaluation={"users": 6}), tmp_path / "lazy")
    shared = whole.layout.broadcast()
    rng = np.random.default_rng(0)
    shared = {
        name: (array + 0.1 * rng.standard_normal(array.shape)).astype(np.float32) for name, array in shared.items()
    }
    for number, users in ((1, [1, 5, 11]), (2, [0, 5])):
        lazy.model.present(users)
        assert list(lazy.model.examples.people) == users
        one, other = whole.train_round(number, users, shared), lazy.train_round(number, users, shared)
        assert one.keys() == other.keys()
        for name in one:
            moved = np.abs(one[name] - shared[name]).max()
            assert moved > 0
            np.testing.assert_allclose(one[name], other[name], atol=1e-3 * moved)
        for clients in (whole, lazy):
            clients.store.apply(*clients.store.drain())
    measured = list(prepare(whole.config).measured)
    found = []
    for clients in (whole, lazy):
        kinds = {"global": evaluation.common(clients.model, clients.layout.common(shared), "shared"),
                 "own": evaluation.own(clients, shared, clients.store)}  # fmt: skip
        found.append(evaluation.measure(clients.model, measured, kinds).kinds)
    for kind in found[0]:
        np.testing.assert_allclose(found[0][kind]["loss"], found[1][kind]["loss"], rtol=1e-4)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts how often a user's records are made, and how often anything of a user is read."""
    counts = {"made": 0, "read": 0}
    made, read = Synthetic._records, OnDemand.__getitem__

    def making(*arguments: Any) -> Any:
        counts["made"] += 1
        return made(*arguments)

    def reading(self: OnDemand[Any], place: Any) -> Any:
        counts["read"] += 1
        return read(self, place)

    monkeypatch.setattr(Synthetic, "_records", making)
    monkeypatch.setattr(OnDemand, "__getitem__", reading)
    monkeypatch.setattr(simulation, "learning_curve", lambda *args, **options: None)
    monkeypatch.setattr(simulation, "per_user_gain", lambda *args, **options: None)
    return counts


def large(tiny: Tiny, users: int, asked: int = 20, **changes: Any) -> Config:
    return tiny(
        **{"method": "fedper", "privacy": USER, "data": {"users": users, "lazy": True}, "client_rate": asked / users,
           "evaluation": {"users": 12}} | changes
    )  # fmt: skip


def test_a_million_users_cost_what_takes_part(tiny: Tiny, tmp_path: Path, counted: dict[str, int]) -> None:
    found = {}
    for users in (2000, MILLION):
        counted.update(made=0, read=0)
        run = simulate(large(tiny, users), tmp_path / str(users))
        asked = sum(run.rounds["clients"].to_pylist())
        assert asked > 10
        assert counted["made"] <= asked + 12 * (run.summary["rounds"] + 3) + 10  # at the end: own, local, measured
        found[users] = counted["read"] / (asked + 36)
        store = run.path / "private" / "rounds"
        assert len(np.load(store / "written.npy", mmap_mode="r")) == users
        assert run.summary["users"] == users
        assert run.users.num_rows == 12 * len(pc.unique(run.users["kind"]))
    assert found[MILLION] < 1.5 * found[2000]
    on_disk = sum(file.stat().st_blocks * 512 for file in (tmp_path / str(MILLION)).rglob("*") if file.is_file())
    assert on_disk < 8e6 < sum(file.stat().st_size for file in store.iterdir())


def test_a_run_with_records_on_demand_resumes_to_the_same_bytes(
    tiny: Tiny, tmp_path: Path, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = large(tiny, 5000, rounds=3)
    whole = simulate(config, tmp_path / "whole")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        commit = RunDirectory.commit
        patch.setattr(RunDirectory, "commit", lambda self, *args: commit(self, *args) if args[0].round < 2 else stop())
        with pytest.raises(KeyboardInterrupt):
            simulate(config, tmp_path / "killed")
    simulate(config, tmp_path / "killed", resume=True)
    for name in ("users.parquet", "rounds.parquet", "claim.json", "ledger.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (whole.path / name).read_bytes()
    assert Ledger.load(whole.path / "ledger.jsonl").opening.population == 5000


def test_a_run_is_named_by_what_makes_its_records(tiny: Tiny) -> None:
    """So that a secret which is given twice makes other noise for other people."""

    def name(config: Config) -> str:
        experiment = prepare(config)
        model = build_model(experiment, Reporter())
        model.present([7])
        return identity(experiment, model)

    one = large(tiny, 100)
    assert name(one) == name(one) != name(large(tiny, 101, client_rate=one.client_rate))
    assert name(one) != name(large(tiny, 100, seed=3))


# ---------------------------------------------------------------- measuring some


def test_measuring_some_users_gives_what_measuring_all_says_of_them(
    tiny: Tiny, tmp_path: Path, counted: dict[str, int]
) -> None:
    every = simulate(tiny(method="fedper"), tmp_path / "every").users
    config = tiny(method="fedper", evaluation={"users": 3})
    some = simulate(config, tmp_path / "some")
    chosen = list(prepare(config).measured)
    assert len(chosen) == 3
    assert sorted(set(some.users["user"].to_pylist())) == chosen
    swap = prepare(config).swap
    assert swap is not None
    assert all(swap[user] in chosen and swap[user] != user for user in chosen)
    for kind in ("own", "global", "local", "zero_shot"):
        both = [
            table.filter((pc.field("kind") == kind) & pc.field("user").isin(chosen))["loss"].to_numpy()
            for table in (every, some.users)
        ]
        np.testing.assert_allclose(*both, rtol=1e-5)


def test_members_who_were_not_measured_have_no_own_model(
    tiny: Tiny, tmp_path: Path, counted: dict[str, int], fedpers: Command
) -> None:
    config = tiny(method="fedper", evaluation={"users": 3})
    run = simulate(config, tmp_path / "run")
    chosen = list(prepare(config).measured)
    data = tmp_path / "records.jsonl"
    data.write_text('{"input": "bread soup", "target": "cake tea"}\n')
    score = ["score", run.path, "--data", data, "--user"]
    assert fedpers(*score, f"number:{chosen[0]}")[0] == 0
    code, _, error = fedpers(*score, f"number:{next(user for user in range(8) if user not in chosen)}")
    assert code != 0
    assert "only 3 of 8 members were measured" in " ".join(error.split())


# ---------------------------------------------------------------- refusals


def test_what_needs_everybody_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set evaluation\.users"):
        prepare(tiny(data={"lazy": True}))
    with pytest.raises(ConfigError, match="reads the records of all users at once"):
        prepare(tiny(data={"lazy": True, "name": "files", "path": "none.jsonl"}))
    with pytest.raises(ConfigError, match="lazy=true with drift"):
        tiny(data={"lazy": True, "drift": 0.5})
    with pytest.raises(ConfigError, match="--probe"):
        audit(large(tiny, 50), tmp_path / "audit")
