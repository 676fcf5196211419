"""Every guarantee: the verdict on a method's table, the claim of a run, and the mechanism that the claim speaks of.

Epsilons are computed again here, from the lines of the ledger and by other means than in `fedpers.privacy`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import toeplitz
from scipy.optimize import brentq
from scipy.stats import norm

import fedpers.cohort.clients as clients_module
from conftest import SECRET, opening_fields
from fedpers import simulation
from fedpers.cohort.clients import Clients
from fedpers.config import FAMILY, GROUPS, Config, parse_config
from fedpers.errors import ConfigError, LedgerError, PrivacyRefusal
from fedpers.experiment import Reuse, build_model, prepare
from fedpers.identity import identity
from fedpers.methods.base import FROZEN, PERSONAL, SHARED, Method, Phase
from fedpers.plan import Plan, alias, plan
from fedpers.privacy import user_level
from fedpers.privacy.dataflow import RECORDS, feedback, flows, leaks
from fedpers.privacy.ledger import Ledger, release_hash
from fedpers.privacy.ledger_lines import Opening, Release
from fedpers.privacy.randomness import derive, generator, run_keys, secret_key, seed_key
from fedpers.privacy.refusals import check_setup
from fedpers.privacy.sampling import cohort_size, draw, period
from fedpers.privacy.spending import composed, spent
from fedpers.registry import find, names
from fedpers.reporting import Reporter
from fedpers.run_directory import RunDirectory
from fedpers.simulation import Run, simulate
from test_resume import CRASHES, Crash, assert_same, crash_at, results
from test_sensitivity import KEY, World, changes, initial, length, make_clients, records, somewhere, sums
from test_sensitivity import without_record as less_one

Tiny = Callable[..., Config]
REUSE = Reuse()
DELTA = 1e-3
OTHER_KEY = secret_key("00" * 32)
SHORT: dict[str, Any] = {"evaluation": {"every": 0, "local_only": False}}
USER: dict[str, Any] = {"unit": "user", "clip": 0.3, "delta": DELTA, "secret": SECRET}
RECORD: dict[str, Any] = {"unit": "record", "clip": 0.3, "delta": DELTA, "record_rate": 0.5, "secret": SECRET}


def keys_of(config: Config, secret: bytes) -> tuple[bytes, bytes]:
    """The keys that a run of this configuration makes from a secret."""
    experiment = prepare(config, REUSE)
    return run_keys(secret, identity(experiment, build_model(experiment, Reporter(), REUSE)))


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here looks at them."""
    monkeypatch.setattr(simulation, "learning_curve", lambda *args, **options: None)
    monkeypatch.setattr(simulation, "per_user_gain", lambda *args, **options: None)


def go(config: Config, path: Path, resume: bool = False) -> Run:
    return simulate(config, path, resume=resume, reuse=REUSE)


# ---------------------------------------------------------------- the verdict on a table


FINE = ("A", "B", "A2", "B2", "norm", "head")
FUNCTIONS = ("begin", "gradient", "end")
FAMILIES = {"groups": "adapter+norm+head"}


def tainted(table: Plan) -> bool:
    """Play four rounds and mark what has seen a record without noise; whether a mark reaches something shared.

    A mark stays, whatever is written over it.
    """
    private_heads = table.head in {"joint", "split-dp"}
    marked: set[tuple[str, str]] = set()
    if table.method.clusters and table.shared:
        return True  # which model a user takes is read off the records, and shapes what all of them become

    def where(phase: Phase, group: str) -> tuple[str, str]:
        return group, "own" if phase.own and group in table.twins else table.scopes[group].value

    for _ in range(4):
        for phase in [phase for phase in table.round for _ in range(2)]:  # two steps of each phase
            seen = [where(phase, group) for group in table.scopes if group not in phase.without]
            for group in phase.train:
                target = where(phase, group)
                reads = any(cell in marked for cell in seen if cell[0] != group)
                if target[1] == "shared":
                    # A point between two models is learnt from the records, and nothing is added to it.
                    if reads or phase.blend:
                        return True
                elif reads or target[1] == "own" or not private_heads:
                    marked.add(target)
        kept = {(group, "personal") for group in table.scopes} | {(group, "own") for group in table.twins}
        if table.method.overrides(*FUNCTIONS) and table.shared and marked & kept:
            return True  # these functions see all that is kept and write what is sent
    return False


def table_of(
    scopes: dict[str, Any], phases: Iterable[Phase], privacy: dict[str, Any] | None = None, **more: Any
) -> Plan:
    cls = type("Table", (Method,), {"scopes": scopes, "round": tuple(phases), "options": {"number": 2.0}, **more})
    config = parse_config({"personal": FAMILIES, "share": FAMILIES["groups"], "privacy": privacy or {}})
    return plan("some-table", cls, config)


@st.composite
def tables(draw_from: st.DrawFn) -> tuple[dict[str, Any], list[Phase], dict[str, Any]]:
    """A table that a method may have: what is shared moves in some phase that is not on own copies, or at the end."""
    there = draw_from(st.sets(st.sampled_from(FINE))) | {"A", "B", "head"}
    scopes = {group: draw_from(st.sampled_from([FROZEN, SHARED, PERSONAL])) for group in GROUPS if group in there}
    for first, other in (("A", "B"), ("A2", "B2")):  # which gives the first no gradient if it never moves
        if scopes.get(other) is FROZEN and first in scopes:
            scopes[first] = FROZEN
    moving = [group for group in scopes if scopes[group] is not FROZEN]
    assume(moving)
    keeps = draw_from(st.booleans())
    phases = []
    for train in draw_from(st.lists(st.sets(st.sampled_from(moving), min_size=1), max_size=4)):
        sent = all(scopes[group] is SHARED for group in train)
        kind = draw_from(st.sampled_from(["", "own", "blend"] if keeps else ["", "own"])) if sent else ""
        others = [group for group in scopes if group not in train]
        without = draw_from(st.sets(st.sampled_from(others))) if others else set()
        blend = "number" if kind == "blend" else ""
        phases.append(Phase(*sorted(train), own=kind == "own", blend=blend, without=sorted(without)))
    functions = draw_from(st.sets(st.sampled_from(FUNCTIONS)) | st.just(set()))
    trained = {group for phase in phases if not phase.own for group in phase.train}
    missing = [Phase(group) for group in moving if scopes[group] is SHARED and group not in trained]
    more: dict[str, Any] = {name: classmethod(lambda cls, *given: given[-1]) for name in functions}
    if still := [group for group in moving if scopes[group] is PERSONAL and group not in trained]:
        more["finish"] = (Phase(*still),)
    more |= {"keeps": keeps, "clusters": draw_from(st.sampled_from(["", "", "", "number"]))}
    return scopes, draw_from(st.permutations([*phases, *missing])), more


@settings(max_examples=300, deadline=None)
@given(table=tables(), policy=st.sampled_from(["method", "frozen", "joint", "split", "split-dp"]))
def test_the_graph_agrees_with_playing_the_rounds(table: Any, policy: str) -> None:
    scopes, phases, more = table
    privacy = {**RECORD, "head": policy}
    try:
        made = table_of(scopes, phases, privacy, **more)
    except ConfigError:  # the policy has nothing to act on
        privacy = RECORD
        made = table_of(scopes, phases, privacy, **more)
    assert bool(leaks(made)) == tainted(made)
    beyond = bool(made.method.clusters) or any(phase.blend for phase in made.round)
    assert bool(feedback(made)) <= bool(leaks(made))
    assert beyond or bool(feedback(made)) == bool(leaks(made))
    # no policy for personal groups reaches own copies, choices and blends
    copies = made.method.overrides(*FUNCTIONS) and any(phase.own for phase in made.round)
    if made.head in {"frozen", "joint", "split-dp"} and not beyond and not copies:
        assert not leaks(made)
    for path in leaks(made):
        assert path[0] == RECORDS
        assert path[-1].place == "shared"
    if not made.shared:
        return
    config = parse_config({"privacy": privacy})
    if leaks(made):
        with pytest.raises(PrivacyRefusal):
            check_setup(config, made)
        return
    check_setup(config, made)
    for phase in made.round:  # what the graph calls noised is noised where it runs
        if any(flow.noised and flow.phase == str(phase) for flow in flows(made)):
            assert made.protected(phase)


def test_the_tables_that_are_played_hold_every_way() -> None:
    """Each feature alone turns a sound table into one that leaks: none of them is drawn without effect."""
    scopes = {"B": SHARED, "A": FROZEN, "B2": PERSONAL, "head": SHARED}
    own, phases = Phase("head", own=True), [Phase("B2"), Phase("B", "head", without=("B2",))]
    function = {"begin": classmethod(lambda cls, visit: None)}
    assert not tainted(table_of(scopes, phases))
    assert tainted(table_of(scopes, [Phase("B2"), Phase("B", "head")]))
    assert tainted(table_of(scopes, phases, **function))
    assert tainted(table_of(scopes, phases, clusters="number"))
    assert tainted(table_of(scopes, [*phases, Phase("B", blend="number", without=("B2",))], keeps=True))
    still, tuned = phases[1:], {"finish": (Phase("B2"),)}  # B2 moves after the last release alone
    assert not tainted(table_of(scopes, still, **tuned, **function))
    assert not tainted(table_of(scopes, still, keeps=True, **tuned, **function)), "a copy of what was sent under noise"
    assert not tainted(table_of(scopes, [own, *still], **tuned))
    assert tainted(table_of(scopes, [own, *still], **tuned, **function))


def verdict(config: Config, method: str) -> str:
    try:
        table = plan(method, find("methods", method, Method), config)
        check_setup(config, table)
    except (ConfigError, PrivacyRefusal) as error:
        return type(error).__name__
    return "accepted"


def moved_at_home(table: type[Method]) -> set[str]:
    """Personal groups that move in some round: read off the table, so that a new method needs no line here."""
    return {group for phase in table.round for group in phase.train if table.scopes[group] is PERSONAL}


def fed(table: type[Method]) -> bool:
    """Whether what moves without noise is read where something shared is trained."""
    sends = [phase for phase in table.round if not phase.own and any(table.scopes[g] is SHARED for g in phase.train)]
    heads = any(moved_at_home(table) - set(phase.without) for phase in sends)
    copies = table.overrides(*FUNCTIONS) and any(phase.own for phase in table.round)
    return bool(heads or copies or table.clusters or any(phase.blend for phase in table.round))


def expected_verdict(table: type[Method], unit: str, policy: str) -> str:
    moving = moved_at_home(table)
    if policy != "method" and not (moving and SHARED in table.scopes.values()):
        return "ConfigError"  # nothing for the policy to act on
    if policy == "frozen" and table.scopes["A"] is SHARED and "B" in moving:
        return "ConfigError"  # B at zero gives A no gradient
    if policy in {"split", "split-dp"} and any(moving & set(p.train) and set(p.train) - moving for p in table.round):
        return "ConfigError"  # one step cannot see two halves
    if table.unclaimable or (unit == "user" and table.overrides("combine")):
        return "PrivacyRefusal"
    if policy in {"joint", "split-dp"} and unit == "user":
        return "ConfigError"  # no record-level noise to train under
    return "PrivacyRefusal" if unit == "record" and policy in {"method", "split"} and fed(table) else "accepted"


@pytest.mark.parametrize("policy", ["method", "frozen", "joint", "split", "split-dp"])
@pytest.mark.parametrize("unit", ["record", "user"])
def test_every_method_under_every_head_policy(unit: str, policy: str) -> None:
    privacy = {**(RECORD if unit == "record" else USER), "head": policy}
    config = parse_config({"personal": FAMILIES, "privacy": privacy})
    for method in names("methods"):
        assert verdict(config, method) == expected_verdict(find("methods", method, Method), unit, policy), method


TABLES: dict[str, tuple[dict[str, Any], tuple[Phase, ...], tuple[str, ...]]] = {
    "personal adapter, shared head": ({"adapter": PERSONAL, "head": SHARED}, (Phase("adapter", "head"),), ("A", "B")),
    "personal head, after the shared part": (
        {"adapter": SHARED, "head": PERSONAL}, (Phase("adapter"), Phase("head")), ("head",),
    ),
    "three phases": (
        {"adapter": SHARED, "head": PERSONAL}, (Phase("adapter"), Phase("head"), Phase("adapter")), ("head",),
    ),
    "own copy of the adapter beside a still head": (
        {"adapter": SHARED, "head": FROZEN}, (Phase("adapter", own=True), Phase("adapter")), (),
    ),
    "own copies, three phases": (
        {"adapter": SHARED, "head": SHARED},
        (Phase("head"), Phase("adapter", own=True), Phase("adapter", "head")), (),
    ),
    "an own copy does not cover a moving head": (
        {"adapter": SHARED, "head": PERSONAL}, (Phase("adapter", own=True), Phase("head"), Phase("adapter")), ("head",),
    ),
    "one factor at home": ({"B": SHARED, "A": PERSONAL, "head": FROZEN}, (Phase("A", "B"),), ("A",)),
    "norms at home": (
        {"adapter": SHARED, "norm": PERSONAL, "head": FROZEN}, (Phase("adapter", "norm"),), ("norm",),
    ),
    "a second adapter that is read at its public value": (
        {"adapter": SHARED, "adapter2": PERSONAL, "head": SHARED},
        (Phase("adapter2"), Phase("adapter", "head", without=("adapter2",))), (),
    ),
    "a second adapter that is read as it is, in one phase of two": (
        {"adapter": SHARED, "adapter2": PERSONAL, "head": SHARED},
        (Phase("adapter2"), Phase("adapter", without=("adapter2",)), Phase("head")), ("A2", "B2"),
    ),
    "of two personal groups one is read": (
        {"adapter": SHARED, "norm": PERSONAL, "head": PERSONAL},
        (Phase("norm"), Phase("head", without=("norm",)), Phase("adapter", without=("norm",))), ("head",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_the_verdict_on_somebody_elses_method_is_read_off_its_table(name: str) -> None:
    scopes, phases, expected = TABLES[name]
    table = table_of(scopes, phases)
    assert feedback(table) == expected
    assert not any(state.place == "own copy" for path in leaks(table) for state in path)
    config = parse_config({"privacy": RECORD})
    if expected:
        with pytest.raises(PrivacyRefusal, match="some-table") as refusal:
            check_setup(config, table)
        assert f"personal {alias(expected)}" in str(refusal.value)
        frozen = table_of(scopes, phases, {**RECORD, "head": "frozen"})
        check_setup(parse_config({"privacy": {**RECORD, "head": "frozen"}}), frozen)
        assert [set(phase.train) & set(expected) for phase in frozen.round] == [set() for _ in frozen.round]
        assert expected[0] in {group for phase in frozen.finish for group in phase.train}
    else:
        check_setup(config, table)


def with_method(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    scopes, phases, _ = TABLES[name]
    cls = type("Table", (Method,), {"scopes": scopes, "round": phases})
    monkeypatch.setattr(
        "fedpers.experiment.find",
        lambda kind, wanted, base: cls if kind == "methods" and wanted == "fedavg" else find(kind, wanted, base),
    )


def test_somebody_elses_method_runs_under_the_guarantee_of_its_table(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name says fedavg, the table says otherwise; only the table counts."""
    with_method(monkeypatch, "personal adapter, shared head")
    config = {"method": "fedavg", "rounds": 1, **SHORT}
    with pytest.raises(PrivacyRefusal, match="personal adapter"):
        go(tiny(**config, privacy={**RECORD, "epsilon": 8}), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    allowed = go(tiny(**config, privacy={**USER, "epsilon": 8}), tmp_path / "user")
    assert allowed.claim.epsilon <= 8
    assert "personal adapter without noise, feeding the shared part" in allowed.claim.head_policy
    assert {name.split(".")[0] for name in allowed.shared} == {"head"}
    joint = go(tiny(**config, privacy={**RECORD, "epsilon": 8, "head": "joint"}), tmp_path / "joint")
    assert joint.claim.personal_covered
    assert "personal adapter under the same clipping and noise" in joint.claim.head_policy


def test_personal_models_are_covered_only_where_all_they_are_made_of_is_noised(tiny: Tiny) -> None:
    def covered(**changed: Any) -> bool:
        return prepare(tiny(**changed), REUSE).guarantee.personal_covered

    dp = {**RECORD, "epsilon": 8}
    assert covered(method="fedrep", privacy={**dp, "head": "joint"})
    assert covered(method="fedrep", privacy={**dp, "head": "split-dp"})
    for head, method in (("frozen", "fedrep"), ("method", "fedbabu"), ("method", "ditto"), ("method", "fedavg")):
        assert not covered(method=method, privacy={**dp, "head": head})
    assert not covered(method="fedrep", privacy={**USER, "epsilon": 8})


# ---------------------------------------------------------------- claims, computed again


def analytic(mu: float) -> float:
    """Balle and Wang's Gaussian, solved on its own formula."""
    if mu == 0:
        return 0.0
    return float(brentq(lambda e: norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - DELTA, 0, 200))


def poisson(events: Iterable[tuple[float, float, int]]) -> float:
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3)
    for z, rate, count in events:
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(z)), count)
    return float(accountant.get_epsilon(DELTA))


def fixed_size(z: float, users: int, sample: int, rounds: int) -> float:
    """dp-accounting takes the noise over the replace-one sensitivity, which is two clips."""
    accountant = RdpAccountant(list(range(2, 33)), NeighboringRelation.REPLACE_ONE)
    event = dp_event.SampledWithoutReplacementDpEvent(users, sample, dp_event.GaussianDpEvent(z / 2))
    accountant.compose(event, rounds)
    return min(float(accountant.get_epsilon(DELTA)), analytic(2 * math.sqrt(rounds) / z))


def lines(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    opening, *releases = map(json.loads, (run.path / "ledger.jsonl").read_text().splitlines())
    return opening, releases


def participation(run: Run) -> list[list[int]]:
    """Who took part, round by round, from the private file; the ledger's commitments must open to it."""
    entries = map(json.loads, (run.path / "private" / "participants.jsonl").read_text().splitlines())
    found = {entry["round"]: entry for entry in entries}
    releases = lines(run)[1]
    for release in releases:
        entry = found[release["round"]]
        text = json.dumps([entry["salt"], entry["clients"]])
        assert release["participants"] == hashlib.sha256(text.encode()).hexdigest()
    return [found[release["round"]]["clients"] for release in releases]


def again(run: Run) -> tuple[float, list[float]]:
    """Epsilon of a run and, without amplification, of each user, from ledger and participants alone."""
    opening, releases = lines(run)
    users, noise = opening["population"], [release["noise_multiplier"] for release in releases]
    if opening["trust"] == "user-central" and opening["amplification"] == "clients":
        assert not (run.path / "private" / "participants.jsonl").exists(), "who took part is what amplifies"
        assert {release["participants"] for release in releases} == {""}
        rates = [release["sampling_rate"] for release in releases]
        if opening["filter"]:
            order, epsilon = opening["filter"]["order"], opening["filter"]["epsilon"]
            accountant = RdpAccountant([order], NeighboringRelation.ADD_OR_REMOVE_ONE)
            for z, rate in zip(noise, rates, strict=True):
                accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(z)))
            assert accountant.get_epsilon(DELTA) <= epsilon * (1 + 1e-9)
            return epsilon, []
        if opening["client_sampling"] == "fixed":
            return fixed_size(noise[0], users, round(rates[0] * users), len(noise)), []
        if set(rates) == {1.0}:
            return analytic(math.hypot(*(1 / z for z in noise))), []
        return poisson([(z, rate, 1) for z, rate in zip(noise, rates, strict=True)]), []
    took_part = participation(run)
    if opening["trust"] == "record-local":
        steps, (z,), (rate,) = [0] * users, set(noise), {release["sampling_rate"] for release in releases}
        for release, clients in zip(releases, took_part, strict=True):
            for client in clients:
                steps[client] += max(release["steps"], release["head_steps"])
        own = {n: poisson([(z, rate, n)]) if n else 0.0 for n in set(steps)}
        return max(own.values()), [own[n] for n in steps]
    each = [analytic(float(mu)) for mu in exposures(run)]
    return max(each), each


def exposures(run: Run) -> NDArray[np.float64]:
    """Without amplification: each user's L2 sensitivity over the noise deviation, by dense matrices."""
    opening, releases = lines(run)
    noise, took_part = [release["noise_multiplier"] for release in releases], participation(run)
    clips, count = 2 if opening["trust"] == "user-local" else 1, len(releases)
    first_column = np.array([*(opening["coefficients"] or [1.0]), *[0.0] * count])[:count]
    members = np.array([[float(user in clients) for clients in took_part] for user in range(opening["population"])])
    found = clips * np.linalg.norm(toeplitz(first_column, np.zeros(count)) @ (members / np.array(noise)).T, axis=0)
    if not opening["coefficients"]:
        assert found == pytest.approx([clips * math.sqrt(k) / noise[0] for k in members.sum(axis=1)])
    return np.asarray(found)


SETUPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "central, Poisson": ({"client_rate": 0.6}, {}),
    "central, all": ({}, {}),
    "central, all, in turn": ({"client_sampling": "cyclic"}, {}),  # every round is everybody's turn
    "central, fixed size": ({"client_rate": 0.5, "client_sampling": "fixed"}, {}),
    "central, cyclic": ({"client_rate": 0.4, "client_sampling": "cyclic"}, {}),
    "central, banded, all": ({}, {"mechanism": "banded", "bands": 3}),
    "central, banded, cyclic": ({"client_rate": 0.5, "client_sampling": "cyclic"}, {"mechanism": "banded"}),
    "central, adaptive": ({"client_rate": 0.6}, {"adaptive": {"bit_noise": 2.0}}),
    "central, signal": ({"client_rate": 0.6}, {"schedule": "signal"}),
    "central, per layer": ({}, {"clipping": "per-layer"}),
    "distributed, all": ({}, {"trust": "user-distributed"}),
    "distributed, fixed size": ({"client_rate": 0.5, "client_sampling": "fixed"}, {"trust": "user-distributed"}),
    "distributed, cyclic": ({"client_rate": 0.4, "client_sampling": "cyclic"}, {"trust": "user-distributed"}),
    "local, all": ({}, {"trust": "user-local"}),
    "local, Poisson": ({"client_rate": 0.5}, {"trust": "user-local"}),
    "local, fixed size": ({"client_rate": 0.5, "client_sampling": "fixed"}, {"trust": "user-local"}),
    "local, cyclic": ({"client_rate": 0.4, "client_sampling": "cyclic"}, {"trust": "user-local"}),
}


def check_claim(run: Run, target: float) -> None:
    claim, (opening, releases) = run.claim, lines(run)
    epsilon, each = again(run)
    assert claim.epsilon == pytest.approx(epsilon, rel=2e-3)
    assert claim.epsilon <= target * (1 + 1e-9)
    assert (claim.rounds, claim.delta, claim.amplification) == (len(releases), DELTA, opening["amplification"])
    assert claim.ledger_head == releases[-1]["hash"]
    assert claim.simulated_secagg == (opening["trust"] == "user-distributed")
    assert (claim.per_client is None) == (opening["amplification"] == "clients")
    if claim.per_client is not None:
        spread = (claim.per_client.min, claim.per_client.median, claim.per_client.max)
        assert spread == pytest.approx((min(each), float(np.median(each)), max(each)), rel=2e-3)
    assert "drawn" not in claim.sampler or opening["client_sampling"] == "fixed"


@pytest.mark.parametrize("name", SETUPS)
def test_a_user_level_claim_is_what_its_ledger_adds_up_to(tiny: Tiny, tmp_path: Path, name: str) -> None:
    sampling, privacy = SETUPS[name]
    config = tiny(
        method="fedavg", share="head", rounds=3, privacy={**USER, "epsilon": 6, **privacy}, **sampling, **SHORT
    )
    run = go(config, tmp_path / "run")
    assert run.claim.unit == "user"
    check_claim(run, 6)
    opening, releases = lines(run)
    two_sided = opening["trust"] == "user-local" or (name.startswith("central") and "fixed" in name)
    assert opening["adjacency"].startswith("replace-one" if two_sided else "zero-out")
    assert run.claim.adjacency == opening["adjacency"]
    record = run.claim.record_level
    if two_sided:
        assert record == run.claim.epsilon
    elif name == "central, signal":
        assert record is None
    else:
        assert record is not None
        assert record > 1.2 * run.claim.epsilon
    assert (releases[0]["bit_noise"] == 2.0) == (name == "central, adaptive")
    assert ("the server (trusted" in run.claim.sentence) == name.startswith("central")
    # the noise is the least that is enough for whoever may take part most often
    if name in {"central, all", "local, all", "distributed, all", "central, cyclic", "central, banded, all"}:
        assert run.claim.epsilon == pytest.approx(6, rel=2e-3)


RECORD_SETUPS: dict[str, dict[str, Any]] = {
    "fedbabu": {"method": "fedbabu"},
    "fedbabu, Poisson clients": {"method": "fedbabu", "client_rate": 0.5},
    "fedbabu, clients in turn": {"method": "fedbabu", "client_rate": 0.5, "client_sampling": "cyclic"},
    "fedrep, joint": {"method": "fedrep", "privacy": {"head": "joint"}},
    "fedper, joint": {"method": "fedper", "privacy": {"head": "joint"}},
    "fedrep, split-dp": {"method": "fedrep", "privacy": {"head": "split-dp"}},
    "fedrep, frozen": {"method": "fedrep", "privacy": {"head": "frozen"}},
    "ditto, per layer": {"method": "ditto", "privacy": {"clipping": "per-layer"}},
    "per-fedavg": {"method": "per-fedavg"},
    "scaffold, Poisson clients": {"method": "scaffold", "client_rate": 0.5},
    "rolora": {"method": "rolora"},
    "fedsvd": {"method": "fedsvd"},
    "fedex-lora": {"method": "fedex-lora"},
    "fedsa-lora, joint": {"method": "fedsa-lora", "privacy": {"head": "joint"}},
    "feddpa": {"method": "feddpa"},
}


@pytest.mark.parametrize("name", RECORD_SETUPS)
def test_a_record_level_claim_is_what_its_ledger_adds_up_to(tiny: Tiny, tmp_path: Path, name: str) -> None:
    changed = RECORD_SETUPS[name]
    config = tiny(**{**changed, **SHORT, "privacy": {**RECORD, "epsilon": 6, **changed.get("privacy", {})}})
    run = go(config, tmp_path / "run")
    check_claim(run, 6)
    # 1 epoch at rate 1/2: 2 steps, and two gradients for each of per-fedavg's
    phases = {"fedrep, joint": (4, 0), "per-fedavg": (4, 0), "fedrep, split-dp": (2, 2)}.get(name, (2, 0))
    assert {(line["steps"], line["head_steps"]) for line in lines(run)[1]} == {phases}
    assert run.claim.record_level is None
    assert run.claim.trust == "record-local"
    covered = "joint" in name or "split-dp" in name
    assert ("whoever obtains one user's personal model" in run.claim.protected_against) == covered


def test_a_joint_head_pays_for_both_phases(tiny: Tiny, tmp_path: Path) -> None:
    """Same noise: fedrep's two phases on the same records cost what twice the steps cost."""
    noise = {**RECORD, "noise_multiplier": 1.5, "epsilon": math.inf}
    frozen = go(tiny(method="fedrep", **SHORT, privacy={**noise, "head": "frozen"}), tmp_path / "frozen").claim
    joint = go(tiny(method="fedrep", **SHORT, privacy={**noise, "head": "joint"}), tmp_path / "joint").claim
    halves = go(tiny(method="fedrep", **SHORT, privacy={**noise, "head": "split-dp"}), tmp_path / "halves").claim
    assert joint.epsilon == pytest.approx(poisson([(1.5, 0.5, 8)]), rel=2e-3)
    assert frozen.epsilon == halves.epsilon == pytest.approx(poisson([(1.5, 0.5, 4)]), rel=2e-3)
    assert (joint.steps, frozen.steps, halves.steps) == (8, 4, 4)


# ---------------------------------------------------------------- participation or amplification, never both


@pytest.mark.parametrize(
    ("opening", "release", "message"),
    [
        ({}, {"clients": [0, 1]}, "must not say who took part"),
        ({"amplification": "none"}, None, "only 'clients' is true"),
        ({"trust": "user-local", "adjacency": "replace"}, None, "only 'none' is true"),
        ({"trust": "user-distributed", "honest": 2}, None, "only 'none' is true"),
        ({"client_sampling": "cyclic"}, None, "only 'none' is true"),
        ({"coefficients": [1.0, 0.5]}, None, "only 'none' is true"),
        ({"client_sampling": "cyclic", "amplification": "none"}, {"clients": [0], "sampling_rate": 0.5}, "credits no"),
        ({"client_sampling": "cyclic", "amplification": "none"}, {"clients": None, "sampling_rate": 1.0}, "the list"),
        ({"client_sampling": "fixed"}, None, "replace-one adjacency alone"),
        ({"client_sampling": "poisson", "adjacency": "replace"}, None, "replace-one adjacency alone"),
    ],
)
def test_a_ledger_credits_participation_or_amplification(
    tmp_path: Path, opening: dict[str, Any], release: dict[str, Any] | None, message: str
) -> None:
    replaced = "replace-one: one registered user's records replaced by any others"
    changed = {**opening, "adjacency": replaced} if opening.get("adjacency") else opening
    line = {
        "round": 1, "mechanism": "gaussian", "noise_multiplier": 1.0, "clip": 1.0, "sampling_rate": 0.5, "steps": 1,
        "clients": None, "noise_address": "ab", "release_hash": "0" * 64,
    }  # fmt: skip

    def write() -> None:
        ledger = Ledger.create(tmp_path / "ledger.jsonl", Opening(**opening_fields("user", **changed)))
        if release is not None:
            ledger.append(Release(**{**line, **release}))

    with pytest.raises((LedgerError, PrivacyRefusal), match=message):
        write()


def test_a_record_level_release_without_a_step_is_not_free(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.jsonl", Opening(**opening_fields("record")))
    line = Release(
        round=1, mechanism="none", noise_multiplier=0.0, clip=1.0, sampling_rate=0.5, steps=0, clients=[0],
        noise_address="", release_hash="0" * 64,
    )  # fmt: skip
    with pytest.raises(LedgerError, match="one step or more"):
        ledger.append(line)
    ledger.append(line.model_copy(update={"steps": 1}))
    assert spent(ledger) == math.inf


# ---------------------------------------------------------------- samplers


def test_cyclic_clients_come_back_every_period_and_fixed_samples_have_their_size() -> None:
    users = [f"user-{number}" for number in range(10)]
    for rate in (0.5, 0.4, 0.3, 0.25, 0.1):
        rounds = [draw("cyclic", rate, users, KEY, number).tolist() for number in range(1, 25)]
        assert rounds == [draw("cyclic", rate, users, OTHER_KEY, number).tolist() for number in range(1, 25)]
        for user in range(len(users)):
            turns = [number for number, one in enumerate(rounds) if user in one]
            assert np.diff(turns).tolist() == [period(rate)] * (len(turns) - 1)
            assert turns[0] < period(rate)
        size = cohort_size("fixed", rate, len(users))
        drawn = [draw("fixed", rate, users, KEY, number).tolist() for number in range(1, 200)]
        assert {len(set(one)) for one in drawn} == {size} == {round(rate * 10)}
        counts = np.bincount(np.concatenate(drawn), minlength=10)
        assert counts.min() > 0.5 * counts.mean()
        other = [draw("fixed", rate, users, OTHER_KEY, number).tolist() for number in range(1, 200)]
        assert drawn != other


# ---------------------------------------------------------------- who adds the noise


def flat(arrays: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(arrays[name], np.float64).ravel() for name in sorted(arrays)])


def sent(clients: Clients, number: int, users: Iterable[int], start: dict[str, Any]) -> NDArray[np.float64]:
    """Updates as they are sent, (users, numbers)."""
    replies = clients.train_round(number, list(users), start)
    clients.store.drain()
    count = len(next(iter(replies.values())))
    return np.stack([flat({n: rows[i] - start[n] for n, rows in replies.items()}) for i in range(count)])


def test_noise_shares_of_the_honest_minimum_are_enough(tiny: Tiny, tmp_path: Path) -> None:
    privacy = {**USER, "trust": "user-distributed", "noise_multiplier": 2.0, "honest": 0.5}
    clients = make_clients(prepare(tiny(method="fedavg", privacy=privacy), REUSE), tmp_path / "noised")
    silent = make_clients(prepare(tiny(method="fedavg", privacy=privacy), REUSE), tmp_path / "silent",
                          noise_multiplier=0.0)  # fmt: skip
    assert clients.guarantee.honest == 4
    start = somewhere(clients)
    one_by_one = [sent(clients, n, range(8), start) - sent(silent, n, range(8), start) for n in range(1, 9)]
    noise = np.stack(one_by_one)  # (rounds, users, numbers)
    claimed, shares = 2.0 * clients.guarantee.clip, noise.reshape(-1, noise.shape[-1])  # type: ignore[operator]
    error = 4 / math.sqrt(2 * noise[:, 0].size)  # four standard errors of a deviation
    assert noise[:, :4].sum(axis=1).std() == pytest.approx(claimed, rel=error)
    assert noise.sum(axis=1).std() == pytest.approx(claimed * math.sqrt(2), rel=error)
    assert noise[:, :3].sum(axis=1).std() < claimed * (1 - error)  # the control: one share is missing
    products = np.corrcoef(shares) - np.eye(len(shares))
    assert np.abs(products).max() < 5.5 / math.sqrt(noise.shape[-1])  # every client and every round has its own


def test_a_round_below_the_honest_minimum_is_not_opened(tiny: Tiny, tmp_path: Path) -> None:
    privacy = {**USER, "trust": "user-distributed", "noise_multiplier": 2.0, "honest": 0.5}
    experiment = prepare(tiny(method="fedavg", share="head", privacy=privacy), REUSE)
    few, enough = (
        World(experiment, tmp_path / name, clip=0.3, noise_multiplier=2.0, honest=4) for name in ("few", "enough")
    )
    with pytest.raises(PrivacyRefusal, match=r"3 clients answered, fewer than the 4 .*lower privacy.honest"):
        few.round(1, initial(few), lambda user, arrays: arrays if user < experiment.examples.users[3] else None)
    assert few.ledger.releases == ()
    opened = enough.round(
        1, initial(enough), lambda user, arrays: arrays if user < experiment.examples.users[4] else None
    )
    assert len(opened.replies) == 4
    assert [release.clients for release in enough.ledger.releases] == [list(range(8))], "who was asked is charged"
    for name, mean in opened.mean().items():  # nothing is added by the server; the divisor stays public
        total = sum(arrays[name].astype(np.float64) - opened.before[name] for arrays in opened.replies.values())
        np.testing.assert_allclose(mean, total / 8, atol=1e-6)


@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
def test_a_client_that_trusts_nobody_sends_its_clipped_update_under_its_own_noise(
    tiny: Tiny, tmp_path: Path, clipping: str
) -> None:
    clip, z = 0.05, 3.0
    privacy = {**USER, "clip": clip, "trust": "user-local", "noise_multiplier": z, "clipping": clipping}
    experiment = prepare(tiny(method="fedavg", privacy=privacy), REUSE)
    clients = make_clients(experiment, tmp_path / "local")
    raw = make_clients(experiment, tmp_path / "raw", trust="user-central")
    start = somewhere(clients)
    replies, updates = clients.train_round(2, range(8), start), raw.train_round(2, range(8), start)
    spread = []
    for place, user in enumerate(experiment.examples.users):
        update = {n: (updates[n][place] - start[n]).astype(np.float64) for n in start}
        if clipping == "flat":
            factor = {n: min(1.0, clip / length(update)) for n in update}
        else:
            factor = {n: min(1.0, clip / math.sqrt(len(update)) / np.linalg.norm(update[n])) for n in update}
        assert min(factor.values()) < 1, "nothing is clipped here"
        rng = generator(KEY, "user-noise", 2, user)
        for name in sorted(start):
            noise = z * clip * rng.standard_normal(start[name].shape)
            spread.append(noise.ravel() / clip)
            expected = start[name] + factor[name] * update[name] + noise
            np.testing.assert_allclose(replies[name][place], expected, atol=1e-6)
    assert np.concatenate(spread).std() == pytest.approx(z, rel=0.06)


@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"])
def test_what_the_server_does_to_locally_noised_replies_is_post_processing(
    tiny: Tiny, tmp_path: Path, strategy: str
) -> None:
    privacy = {**USER, "trust": "user-local", "noise_multiplier": 3.0}
    experiment = prepare(tiny(method="fedavg", share="head", privacy=privacy, server={"strategy": strategy}), REUSE)
    world = World(experiment, tmp_path, clip=0.3, noise_multiplier=3.0, honest=None)
    found = world.round(1, initial(world))
    combine = {"FedAvg": np.mean, "FedMedian": np.median}[strategy]
    for name, after in found.after.items():
        stacked = np.stack([arrays[name] for arrays in found.replies.values()]).astype(np.float64)
        np.testing.assert_allclose(after, combine(stacked, axis=0), atol=1e-6)
    (line,) = world.ledger.releases
    assert line.clients == list(range(8))
    named = {f"{1000 + i}/{n}": a for i, one in enumerate(found.replies.values()) for n, a in one.items()}
    assert line.release_hash == release_hash(named)


# ---------------------------------------------------------------- adaptive clipping, budgets, schedules


def crash_and_resume(config: Config, folder: Path, expected: Run, crashes: Iterable[str]) -> None:
    for number, crash in enumerate(crashes):
        with pytest.MonkeyPatch.context() as patch:
            CRASHES[crash](patch)
            with pytest.raises(Crash):
                go(config, folder / f"{number}")
        assert not RunDirectory(folder / f"{number}").finished
        assert_same(results(go(config, folder / f"{number}", resume=True).path), results(expected.path))


CRASH_POINTS = ("first checkpoint, rows not applied", "second release in the ledger, nothing committed")


def test_an_adaptive_clip_is_the_one_on_the_ledger_and_moves_only_afterwards(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, dict[str, Any], Any]] = []
    made = user_level.gaussian_mean

    def watch(updates: Any, *args: Any, **options: Any) -> Any:
        seen.append((updates, options, made(updates, *args, **options)))
        return seen[-1][2]

    z, bits, rate, quantile = 1.2, 2.0, 3.0, 0.3
    privacy = {**USER, "noise_multiplier": z, "adaptive": {"bit_noise": bits, "rate": rate, "quantile": quantile}}
    config = tiny(method="fedavg", share="head", rounds=4, client_rate=0.7, privacy=privacy, **SHORT)
    monkeypatch.setattr(user_level, "gaussian_mean", watch)
    run = go(config, tmp_path / "run")
    monkeypatch.setattr(user_level, "gaussian_mean", made)
    releases = lines(run)[1]
    key = keys_of(config, secret_key(SECRET))[0]
    clips = [release["clip"] for release in releases]
    assert clips[0] == 0.3
    assert max(abs(math.log(b / a)) for a, b in pairwise(clips)) > 0.01
    z_sum = (z**-2 - (2 * bits) ** -2) ** -0.5
    denominator = 0.7 * 8
    for number, ((updates, options, found), release) in enumerate(zip(seen, releases, strict=True), start=1):
        assert (release["noise_multiplier"], release["bit_noise"]) == (z, bits)
        norms = [length(update) for update in updates]

        def by_hand(clip: float, updates: Any = updates, norms: Any = norms, noise: Any = options["noise"]) -> Any:
            kept = sum(flat(u) * min(1.0, clip / n) for u, n in zip(updates, norms, strict=True))
            return (kept + z_sum * clip * flat(noise)) / denominator

        np.testing.assert_allclose(flat(found.mean), by_hand(release["clip"]), atol=1e-6)
        if number < len(clips) and abs(math.log(clips[number] / clips[number - 1])) > 0.01:
            # the control: this round's release is not made with the next round's clip
            assert np.abs(flat(found.mean) - by_hand(clips[number])).max() > 1e-4
        votes = sum(0.5 if n <= release["clip"] else -0.5 for n in norms)
        coin = float(generator(key, "bit-noise", number).standard_normal())
        fraction = (votes + bits * coin) / denominator + 0.5
        assert release["release_hash"] == release_hash({**found.mean, "fraction": np.array(fraction)})
        if number < len(clips):
            assert clips[number] == pytest.approx(release["clip"] * math.exp(-rate * (fraction - quantile)), rel=1e-9)
    crash_and_resume(config, tmp_path, run, CRASH_POINTS)


BUDGETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "central, Poisson": ({"method": "fedavg", "share": "head", "client_rate": 0.6}, USER),
    "central, fixed size": (
        {"method": "fedavg", "share": "head", "client_rate": 0.5, "client_sampling": "fixed"}, {**USER, "epsilon": 30},
    ),
    "local, Poisson": (
        {"method": "fedavg", "share": "head", "client_rate": 0.6}, {**USER, "epsilon": 15, "trust": "user-local"},
    ),
    "record": ({"method": "fedbabu"}, RECORD),
}  # fmt: skip


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_ends_the_run_before_it_is_passed(tiny: Tiny, tmp_path: Path, name: str) -> None:
    changed, privacy = BUDGETS[name]
    privacy = {"epsilon": 8.0, **privacy, "noise_multiplier": 1.1, "stop": "budget"}
    config = tiny(**changed, rounds=40, privacy=privacy, **SHORT)
    run = go(config, tmp_path / "stopped")
    rounds = run.summary["rounds"]
    assert 2 <= rounds < 40
    assert run.claim.rounds == rounds
    assert run.claim.epsilon == pytest.approx(again(run)[0], rel=2e-3)
    assert run.claim.epsilon <= privacy["epsilon"]
    assert run.rounds.column("epsilon").to_pylist()[-1] == run.claim.epsilon
    # one round more, of those that the sampler would have drawn next, would have passed it
    ledger = Ledger.load(run.path / "ledger.jsonl")
    server = keys_of(config, secret_key(SECRET))[0]
    experiment = prepare(config, REUSE)
    drawn = draw(config.client_sampling, config.client_rate, experiment.examples.users, server, rounds + 1)
    last = ledger.releases[-1]
    coming = last.model_copy(
        update={"round": rounds + 1, "clients": None if last.clients is None else sorted(drawn.tolist())}
    )
    assert spent(ledger, coming) > privacy["epsilon"]
    crash_and_resume(config, tmp_path, run, CRASH_POINTS[1:])


def test_a_run_killed_in_its_last_round_stops_there_too(tiny: Tiny, tmp_path: Path) -> None:
    """The ledger already holds the last round that fits: it is replayed, and nothing comes after it."""
    privacy = {**USER, "epsilon": 8.0, "noise_multiplier": 1.1, "stop": "budget"}
    config = tiny(method="fedper", client_rate=0.6, rounds=40, privacy=privacy, **SHORT)
    run = go(config, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, Ledger, "append", run.summary["rounds"], "after")
        with pytest.raises(Crash):
            go(config, tmp_path / "killed")
    assert_same(results(go(config, tmp_path / "killed", resume=True).path), results(run.path))


def test_a_schedule_follows_releases_under_a_filter(tiny: Tiny, tmp_path: Path) -> None:
    """Steps too small to be seen: the noise falls round by round; large ones: it stays. The claim is the filter's."""

    def config(step: float, clip: float, epsilon: float, **changed: Any) -> Config:
        rates = {"adapter": step, "head": step}
        privacy = {**USER, "clip": clip, "epsilon": epsilon, "schedule": "signal"}
        return tiny(method="fedavg", rounds=5, local={"lr": rates}, privacy=privacy, **changed, **SHORT)

    quiet_config = config(1e-6, 1e3, 4, client_rate=0.6)
    quiet, loud = go(quiet_config, tmp_path / "quiet"), go(config(3.0, 0.3, 3000, share="head"), tmp_path / "loud")
    falling, staying = ([line["noise_multiplier"] for line in lines(run)[1]] for run in (quiet, loud))
    assert all(b == pytest.approx(0.8 * a) for a, b in pairwise(falling))
    assert len(falling) >= 3
    assert len(set(staying)) == 1
    for run, epsilon in ((quiet, 4), (loud, 3000)):
        check_claim(run, epsilon)
        assert run.claim.epsilon == epsilon
        assert run.claim.accountant.startswith("Renyi filter")
    assert poisson([(z, 0.6, 1) for z in falling]) < 4.0  # what a filter costs: this number may not be claimed
    crash_and_resume(quiet_config, tmp_path, quiet, CRASH_POINTS)


# ---------------------------------------------------------------- per-layer clipping


def test_per_layer_clipping_keeps_the_joint_bound_for_a_record(tiny: Tiny, tmp_path: Path) -> None:
    clip = 0.02
    privacy = {**RECORD, "clip": clip, "record_rate": 1.0}
    clients = make_clients(prepare(tiny(method="fedavg", privacy=privacy), REUSE), tmp_path, steps=1, denominator=1.0,
                           per_layer=True)  # fmt: skip
    shared = somewhere(clients)
    whole, arrays = sums(clients, shared), len(shared)
    # the shared sum is read off a reply, so the step size has to be divided out
    rates = {n: getattr(clients.config.local.lr, FAMILY[clients.model.group[n]]) for n in shared}
    for user, row in list(records(clients.examples, [1, 4])):
        less = sums(clients, shared, less_one(clients.examples, user, row))
        layers = {n: np.linalg.norm(whole[n][user] - less[n][user]) / rates[n] for n in shared}
        assert max(layers.values()) <= clip / math.sqrt(arrays) * (1 + 1e-4) + 2e-6
        assert math.hypot(*layers.values()) <= clip * (1 + 1e-4) + 2e-6
        assert max(layers.values()) == pytest.approx(clip / math.sqrt(arrays), rel=1e-2), "nothing is clipped here"
        assert np.delete(changes(whole, less), user).max() <= 1e-6


def test_per_layer_clipping_keeps_the_joint_bound_for_a_user(tiny: Tiny, tmp_path: Path) -> None:
    clip = 0.05
    privacy = {**USER, "clip": clip, "noise_multiplier": 1.0, "clipping": "per-layer"}
    experiment = prepare(tiny(method="fedper", privacy=privacy), REUSE)
    full = World(experiment, tmp_path / "all")
    found = full.round(1, initial(full))
    assert found.report.clipped > 0
    for gone in experiment.examples.users[:3]:
        smaller = World(experiment, tmp_path / gone, gone)
        less = smaller.round(1, found.before)
        layers = {n: np.linalg.norm(found.mean()[n].astype(np.float64) - less.mean()[n]) * 8 for n in found.before}
        assert max(layers.values()) <= clip / math.sqrt(len(layers)) * (1 + 1e-4) + 2e-6
        assert 0 < math.hypot(*layers.values()) <= clip * (1 + 1e-4) + 2e-6


# ---------------------------------------------------------------- split data, frozen heads


def split_clients(tiny: Tiny, folder: Path, clip: float, head_step: float) -> Clients:
    privacy = {**RECORD, "clip": clip, "record_rate": 1.0, "head": "split-dp"}
    ones = {"adapter": 1.0, "head": 1.0}
    config = tiny(
        method="fedrep", privacy=privacy, task={"scale": 4.0}, local={"lr": ones},
        personal={"lr": {"adapter": 1.0, "head": head_step}, "l2": 0},
    )  # fmt: skip
    return make_clients(prepare(config, REUSE), folder, steps=1, denominator=1.0)


def test_split_phases_see_disjoint_halves_of_the_records(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = split_clients(tiny, tmp_path, 0.05, 1.0)
    seen: dict[tuple[str, ...], set[int]] = {}
    trained = clients_module.train_phase

    def watch(model: Any, parameters: Any, train: Any, steps: Any, *args: Any, **options: Any) -> Any:
        seen.setdefault(tuple(train), set()).update(row for step in steps for row in step.rows.tolist())
        assert options["protection"] is not None
        return trained(model, parameters, train, steps, *args, **options)

    monkeypatch.setattr(clients_module, "train_phase", watch)
    clients.train_round(1, range(8), somewhere(clients))
    first = {group: set(rows) for group, rows in seen.items()}
    clients.train_round(2, range(8), somewhere(clients))
    assert seen == first, "which half a record is in never changes"
    head, shared = seen["head",], seen["A", "B"]
    assert head & shared == set()
    assert head | shared == {int(row) for rows in clients.examples.train for row in rows}
    assert min(len(head), len(shared)) > 0.3 * len(head | shared)


@pytest.mark.parametrize("half", ["head", "shared"])
def test_one_record_moves_one_phase_of_split_data_by_its_clip(tiny: Tiny, tmp_path: Path, half: str) -> None:
    """With noise off; what the head half does to the shared part goes through the head alone, which has its noise."""
    clip, user = 0.05, 2
    moving, still = (split_clients(tiny, tmp_path / f"{step}", clip, step) for step in (1.0, 1e-9))
    shared = somewhere(moving)
    row = next(int(row) for row in moving.examples.train[user] if row in half_of(moving, half)[user])
    found = []
    for clients in (moving, still):
        whole, heads = sums(clients, shared), personal(clients, shared)
        less = less_one(clients.examples, user, row)
        part, part_heads = sums(clients, shared, less), personal(clients, shared, less)
        found.append((changes(whole, part), changes(heads, part_heads)))
    (sum_moving, head_moving), (sum_still, head_still) = found
    for change in (sum_moving, head_moving, sum_still, head_still):
        assert np.delete(change, user).max() <= 1e-6
    assert head_still.max() <= 1e-6
    if half == "head":
        assert 0.5 * clip < head_moving[user] <= clip * (1 + 1e-4)
        assert sum_still[user] <= 1e-6, "another way than the head"
        assert sum_moving[user] > 1e-5, "the control: a head that moves is read"
    else:
        assert head_moving.max() <= 1e-6
        for change in (sum_moving, sum_still):
            assert 0.5 * clip < change[user] <= clip * (1 + 1e-4)


def half_of(clients: Clients, half: str) -> list[set[int]]:
    phase = next(p for p in clients.plan.round if clients.plan.half(p) == half)
    return [set(rows.tolist()) for rows in clients._half(phase).train]


def personal(clients: Clients, shared: Any, examples: Any = None) -> dict[str, NDArray[np.float64]]:
    """Personal heads after one round from their start, (users, out, in)."""
    kept = clients.examples
    clients.examples = examples or kept
    clients.train_round(1, range(len(kept.users)), shared)
    _, rows = clients.store.drain()
    clients.examples = kept
    return {name: value.astype(np.float64) for name, value in rows.items()}


def test_a_frozen_head_makes_fedrep_the_same_federation_as_fedbabu(tiny: Tiny, tmp_path: Path) -> None:
    """Keys of whole runs depend on the configuration, so the clients are compared, which share a key here."""
    noise = {**RECORD, "noise_multiplier": 2.0}
    sent_by = {}
    for method, head in (("fedrep", "frozen"), ("fedbabu", "method"), ("fedper", "frozen"), ("fedrep", "joint")):
        experiment = prepare(tiny(method=method, privacy={**noise, "head": head}), REUSE)
        clients = make_clients(experiment, tmp_path / f"{method}-{head}")
        start = somewhere(clients)
        sent_by[method, head] = sent(clients, 1, range(8), start), sent(clients, 2, range(8), start)
    expected = sent_by["fedbabu", "method"]
    for other in (("fedrep", "frozen"), ("fedper", "frozen")):
        for one, two in zip(sent_by[other], expected, strict=True):
            np.testing.assert_array_equal(one, two)
    assert np.abs(sent_by["fedrep", "joint"][0] - expected[0]).max() > 1e-4  # the control


# ---------------------------------------------------------------- the seed is public


def streams(keys: Iterable[bytes], config: Config, users: Iterable[str], sizes: list[int]) -> list[NDArray[np.float64]]:
    """All noise that anybody could draw for round 1 with these keys, from addresses that the source code tells."""
    size, found = sum(sizes), []
    for key in keys:
        found.append(generator(key, "user-noise", 1).standard_normal(size))
        local = [generator(key, "user-noise", 1, user).standard_normal(size) for user in users]
        found.append(np.sum(local, axis=0))
        for step in range(math.ceil(1 / config.privacy.record_rate)):
            record = [generator(key, "round", 1, 0, "noise", user, step).standard_normal(size) for user in users]
            found.append(np.sum(record, axis=0))
    return found


@pytest.mark.parametrize("trust", ["user-central", "user-distributed", "user-local", "record-local"])
def test_a_published_seed_does_not_allow_to_subtract_the_noise(tiny: Tiny, tmp_path: Path, trust: str) -> None:
    """Everything public is tried as a key; the release keeps its noise. The secret takes it away at once."""
    private = RECORD if trust == "record-local" else {**USER, "trust": trust}
    private = {**private, "clip": 0.01, "noise_multiplier": 50.0, "secret": None}
    config = tiny(method="fedavg", share="head", rounds=1, privacy=private, **SHORT)
    run = go(config, tmp_path / "run")
    assert "kept by the simulator" in run.claim.secret
    users = prepare(config, REUSE).examples.users
    start = {name: np.zeros_like(array) for name, array in run.shared.items()}
    start["head.agreement.weight"] += 1.0
    moved = flat({name: run.shared[name] - start[name] for name in start})
    sizes = [run.shared[name].size for name in sorted(run.shared)]
    ledger, _ = lines(run)
    exported = [ledger["hash"], *(line["hash"] for line in lines(run)[1]), lines(run)[1][0]["noise_address"]]
    guesses = [seed_key(config.seed), *(seed_key(n) for n in range(20)), *map(bytes.fromhex, exported)]
    guesses += [b"", bytes(32), seed_key(config.seed)[:16]]
    roots = [*guesses, *(key for guess in guesses for key in keys_of(config, guess))]
    roots += [derive(guess, who) for guess in guesses for who in ("server", "clients")]

    def left(keys: Iterable[bytes]) -> float:
        """Share of the release that the best of the streams of these keys leaves, at the best scale."""
        best = 1.0
        for stream in streams(keys, config, users, sizes):
            scale = moved @ stream / (stream @ stream)
            best = min(best, float(np.linalg.norm(moved - scale * stream) / np.linalg.norm(moved)))
        return best

    assert len(roots) > 100
    assert left(roots) > 0.5  # hundreds of directions in 33 dimensions: the best takes a quarter away, by chance
    secret = (run.path / "private" / "secret").read_text().strip()
    keys = keys_of(config, secret_key(secret))
    if trust == "record-local":
        steps = [generator(keys[1], "round", 1, 0, "noise", user, step).standard_normal(sum(sizes))
                 for user in users for step in range(2)]  # fmt: skip
        total = np.sum(steps, axis=0)
        scale = moved @ total / (total @ total)
        assert np.linalg.norm(moved - scale * total) < 0.1 * np.linalg.norm(moved)
    else:
        assert left(keys) < 0.1


# ---------------------------------------------------------------- several runs on the same people


@pytest.mark.parametrize("name", ["central, Poisson", "central, fixed size", "central, signal", "central, banded, all",
                                  "distributed, cyclic", "local, Poisson"])  # fmt: skip
def test_several_runs_together_promise_what_all_their_releases_do(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """A picture's claim states this number, for every sampler and trust that a picture can be drawn with."""
    sampling, privacy = SETUPS[name]
    runs = [
        go(tiny(method=method, share="head", privacy={**USER, **strength, **privacy}, **sampling, **SHORT),
           tmp_path / method)
        for method, strength in (
            [("fedavg", {"epsilon": 2}), ("fedavg-finetune", {"epsilon": 4})]
            if name == "central, signal"
            else [("fedavg", {"noise_multiplier": 4.0}), ("fedavg-finetune", {"noise_multiplier": 2.5})]
        )
    ]  # fmt: skip
    ledgers = [Ledger.load(run.path / "ledger.jsonl") for run in runs]
    together, each = composed(ledgers), [run.claim.epsilon for run in runs]
    assert max(each) <= together
    assert composed(ledgers[:1]) == pytest.approx(each[0], rel=1e-6)
    events = [(line["noise_multiplier"], line["sampling_rate"], 1) for run in runs for line in lines(run)[1]]
    if name == "central, Poisson":
        assert together == pytest.approx(poisson(events), rel=2e-3)
    elif name == "central, signal":
        orders = [lines(run)[0]["filter"]["order"] for run in runs]
        added = [math.log1p(-1 / a) - math.log(DELTA * a) / (a - 1) for a in orders]  # Renyi divergence to epsilon
        budgets = [epsilon - extra for epsilon, extra in zip(each, added, strict=True)]
        assert together == pytest.approx(sum(budgets) + added[int(np.argmin(orders))])
        assert together < sum(each)
    elif name == "central, fixed size":
        assert together == pytest.approx(
            min(fixed_size(2.5, 8, 4, 4), analytic(math.hypot(*(2 / z for z, *_ in events))))
        )
    else:
        assert together == pytest.approx(analytic(float(np.sqrt(sum(exposures(run) ** 2 for run in runs)).max())))


def test_runs_of_different_kinds_are_not_composed(tiny: Tiny, tmp_path: Path) -> None:
    ledgers = []
    for name in ("central, all", "local, all"):
        privacy = {**USER, "epsilon": 4, **SETUPS[name][1]}
        run = go(tiny(method="fedavg", share="head", rounds=1, privacy=privacy, **SHORT), tmp_path / name)
        ledgers.append(Ledger.load(run.path / "ledger.jsonl"))
    with pytest.raises(LedgerError, match="the same trust"):
        composed(ledgers)
