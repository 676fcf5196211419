"""The refusals R1 to R16: each says why and what to do, and what it says to do is accepted.

Through the roads that users take: `prepare`, `simulate`, messages to the server, `claim_from`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

import fedpers.privacy.ledger as ledger_module
from conftest import SECRET, opening_fields
from fedpers import simulation
from fedpers.cohort.clients import Clients
from fedpers.config import Config
from fedpers.errors import ConfigError, FedpersError, LedgerError, PrivacyRefusal
from fedpers.experiment import Experiment, Reuse, prepare
from fedpers.flower import messages as wire
from fedpers.flower.cohort_grid import CohortGrid
from fedpers.flower.strategy import FedpersStrategy
from fedpers.methods.base import PERSONAL, SHARED, Method, Phase
from fedpers.privacy.accounting import GaussianEvent, epsilon
from fedpers.privacy.claim import METRICS, TUNING, Claim
from fedpers.privacy.claiming import claim_from
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import Opening, Release
from fedpers.privacy.refusals import OF_SINGLE_REPLIES, OF_THE_MEAN
from fedpers.registry import find
from fedpers.simulation import Run, simulate
from fedpers.tasks.reply_ranking import ReplyRanking
from test_resume import Crash, crash_at
from test_sensitivity import KEY, make_clients, somewhere

Tiny = Callable[..., Config]
REUSE = Reuse()
DELTA = 1e-3
SHORT: dict[str, Any] = {"evaluation": {"every": 0, "local_only": False}}
USER: dict[str, Any] = {"unit": "user", "clip": 0.3, "delta": DELTA, "noise_multiplier": 2.0, "secret": SECRET}
RECORD: dict[str, Any] = {**USER, "unit": "record", "record_rate": 0.5}


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here looks at them."""
    monkeypatch.setattr(simulation, "learning_curve", lambda *args, **options: None)
    monkeypatch.setattr(simulation, "per_user_gain", lambda *args, **options: None)


def go(config: Config, path: Path, resume: bool = False) -> Run:
    return simulate(config, path, resume=resume, reuse=REUSE)


def changed(settings: dict[str, Any], out: str) -> dict[str, Any]:
    """Settings after taking a way out, such as `privacy.head=frozen, client_rate=1`; a value of None leaves it out."""
    found = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    for part in out.split(", "):
        key, _, text = part.partition("=")
        value = None if text == "None" else json.loads(text) if text[:1].isdigit() else text
        section, _, leaf = key.rpartition(".")
        (found.setdefault(section, {}) if section else found)[leaf] = value
    return found


def refused(tiny: Tiny, settings: dict[str, Any], error: type[FedpersError], why: str, ways: dict[str, str]) -> None:
    """Assert a refusal before anything is done, and that its message names each way out, which is then taken."""
    with pytest.raises(error, match=why) as refusal:
        prepare(tiny(**settings), REUSE)
    for words, out in ways.items():
        assert words in str(refusal.value)
        prepare(tiny(**changed(settings, out)), REUSE)


# ---------------------------------------------------------------- R1, R2, R3: what the table and the sampler say


@pytest.mark.parametrize("method", ["fedrep", "fedper"])
def test_r1_a_noise_free_head_under_record_level_noise(tiny: Tiny, tmp_path: Path, method: str) -> None:
    settings = {"method": method, "privacy": RECORD}
    why = "personal head is trained without noise on the same records and feeds the gradients of the shared adapter"
    refused(tiny, settings, PrivacyRefusal, why, {
        "privacy.head=frozen": "privacy.head=frozen",
        "method=fedbabu": "method=fedbabu",
        "privacy.head=joint": "privacy.head=joint",
        "method=fedavg-finetune": "method=fedavg-finetune",
        "privacy.unit=user": "privacy.unit=user",
    })  # fmt: skip
    with pytest.raises(PrivacyRefusal):
        go(tiny(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_r1_a_head_on_the_other_half_of_the_records(tiny: Tiny) -> None:
    settings = {"method": "fedrep", "privacy": {**RECORD, "head": "split"}}
    why = "only the half of the records .* gets no guarantee at all"
    refused(tiny, settings, PrivacyRefusal, why, {"privacy.head=split-dp": "privacy.head=split-dp"})


def test_r2_any_other_state_at_home_that_feeds_what_is_shared(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local LoRA adapter under a shared head, as in methods that share one factor and keep the other."""

    class LocalAdapter(Method):
        """Personal adapter, shared head."""

        scopes = {"adapter": PERSONAL, "head": SHARED}
        round = (Phase("adapter"), Phase("head"))

    def found(kind: str, name: str, base: Any) -> Any:
        return LocalAdapter if kind == "methods" and name == "fedavg" else find(kind, name, base)

    monkeypatch.setattr("fedpers.experiment.find", found)
    why = r"the records -> personal A -> shared head\).*the personal adapter is trained without noise"
    refused(tiny, {"method": "fedavg", "privacy": RECORD}, PrivacyRefusal, why, {
        "privacy.head=frozen": "privacy.head=frozen",
        "privacy.head=joint": "privacy.head=joint",
        "privacy.unit=user": "privacy.unit=user",
    })  # fmt: skip


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("fedala", "records -> shared A"),  # the blend reads the records
        ("ifca", "records -> the choice among the shared models -> shared A"),
        ("pfedme", "records -> own copy A -> shared A"),
    ],
)
def test_r2_a_way_that_no_freezing_closes(tiny: Tiny, method: str, way: str) -> None:
    settings = {"method": method, "privacy": RECORD, "personal": {"groups": "adapter+head"}}
    why = rf"method '{method}' with privacy.unit=record is refused \(the {way}\).*one record could change it by more"
    refused(tiny, settings, PrivacyRefusal, why, {"privacy.unit=user": "privacy.unit=user"})


def test_r1_a_factor_whose_other_half_would_be_zero(tiny: Tiny) -> None:
    """Frozen B gives A no gradient, so that way out is neither offered nor taken."""
    why = r"method 'fedsa-lora' with privacy.unit=record is refused \((?!.*frozen).*Two sound ways out"
    refused(tiny, {"method": "fedsa-lora", "privacy": RECORD}, PrivacyRefusal, why, {
        "privacy.head=joint": "privacy.head=joint", "privacy.unit=user": "privacy.unit=user",
    })  # fmt: skip
    frozen = {"method": "fedsa-lora", "privacy": {**RECORD, "head": "frozen"}}
    with pytest.raises(ConfigError, match="would keep B at zero in the rounds, so that the shared A gets no gradient"):
        prepare(tiny(**frozen))


# ---------------------------------------------------------------- what a method does beyond its phases


@pytest.mark.parametrize("privacy", [RECORD, USER, {**USER, "trust": "user-local"}, {**USER, "noise_multiplier": None}],
                         ids=["record", "user-central", "user-local", "without noise"])  # fmt: skip
@pytest.mark.parametrize("method", ["centralized", "fedalt", "flora", "hetlora"])
def test_a_method_of_which_nothing_can_be_claimed(tiny: Tiny, method: str, privacy: dict[str, Any]) -> None:
    reason = find("methods", method, Method).unclaimable
    why = f"method '{method}' with privacy.unit={privacy['unit']} is refused: {reason}"
    out = "privacy.unit=none, privacy.noise_multiplier=None, privacy.clip=None, privacy.delta=0.001, privacy.trust=None"
    refused(tiny, {"method": method, "privacy": privacy}, PrivacyRefusal, why, {
        "Set privacy.unit=none": out,
        "choose another method": "method=fedavg",
    })  # fmt: skip


@pytest.mark.parametrize("method", ["fedex-lora", "sdflora"])
def test_a_server_step_on_single_replies_where_the_server_sums(tiny: Tiny, method: str) -> None:
    why = f"method '{method}' is refused: its server step looks at single replies"
    local = {"privacy.trust=user-local": "privacy.trust=user-local"}
    if method == "fedex-lora":  # the other has a private adapter that feeds back
        local["privacy.unit=record"] = "privacy.unit=record, privacy.trust=None"
    for trust in ("user-central", "user-distributed"):
        settings = {"method": method, "privacy": {**USER, "trust": trust}}
        refused(tiny, settings, PrivacyRefusal, f"{why}.*trust {trust}", local)
    clipped = {"method": method, "privacy": {"clip": 0.3}}
    refused(tiny, clipped, PrivacyRefusal, why, {"leave privacy.clip out": "privacy.clip=None"})


@pytest.mark.parametrize("method", ["fedex-lora", "fedsvd", "reptile", "scaffold"])
def test_a_server_optimizer_under_a_server_step_of_the_methods_own(tiny: Tiny, method: str) -> None:
    for strategy in ("FedAdam", "FedMedian"):
        why = f"server.strategy = '{strategy}': method '{method}' has a server step of its own"
        refused(tiny, {"method": method, "server": {"strategy": strategy}}, ConfigError, why,
                {"leave server.strategy out (FedAvg)": "server.strategy=FedAvg"})  # fmt: skip
    prepare(tiny(method="fedprox", server={"strategy": "FedAdam"}), REUSE)


@pytest.mark.parametrize("section", ["local", "personal"])
@pytest.mark.parametrize("method", ["scaffold", "hetlora"])
def test_adam_where_the_arithmetic_is_of_plain_steps(tiny: Tiny, method: str, section: str) -> None:
    settings = {"method": method, section: {"optimizer": "adam"}}
    refused(tiny, settings, ConfigError, f"method '{method}' is for plain gradient steps", {
        "set local.optimizer=sgd and personal.optimizer=sgd": "local.optimizer=sgd, personal.optimizer=sgd",
    })  # fmt: skip


def test_a_method_that_needs_everybody(tiny: Tiny) -> None:
    for sampling in ("poisson", "fixed", "cyclic"):
        settings = {"method": "fedalt", "client_rate": 0.5, "client_sampling": sampling}
        refused(tiny, settings, ConfigError, "method 'fedalt' needs every client in every round",
                {"set client_rate=1": "client_rate=1"})  # fmt: skip


def test_correlated_noise_for_what_is_sent_in_turns(tiny: Tiny) -> None:
    settings = {"method": "rolora", "privacy": {**USER, "mechanism": "banded"}}
    refused(tiny, settings, ConfigError, "method 'rolora' sends other arrays from round to round",
            {"leave privacy.mechanism out": "privacy.mechanism=gaussian"})  # fmt: skip
    prepare(tiny(**{**settings, "method": "fedit"}), REUSE)


@pytest.mark.parametrize(
    ("method", "what"),
    [("scaffold", "the client_control companions"), ("fedala", "a copy of what was sent last"), ("fedper", "head"),
     ("fedsa-lora", "B and head")],
)  # fmt: skip
def test_r3_places_of_a_fixed_number_under_memories_of_having_had_one(tiny: Tiny, method: str, what: str) -> None:
    settings = {"method": method, "client_rate": 0.5, "client_sampling": "fixed", "privacy": USER}
    refused(tiny, settings, PrivacyRefusal, f"client_sampling=fixed with method '{method}': {what} of the others",
            {"client_sampling=poisson": "client_sampling=poisson"})  # fmt: skip
    prepare(tiny(**{**settings, "method": "feddpa"}), REUSE)  # its personal adapter shapes nothing that is sent


def test_r3_a_sampler_that_the_accounting_does_not_cover(tiny: Tiny, tmp_path: Path) -> None:
    banded = {"client_rate": 0.5, "privacy": {**USER, "mechanism": "banded"}}
    cyclic_or_all = {
        "client_sampling=cyclic": "client_sampling=cyclic",
        "client_rate=1": "client_rate=1",
    }
    refused(tiny, banded, PrivacyRefusal, "without amplification", cyclic_or_all)
    fixed = {**banded, "client_sampling": "fixed"}
    refused(tiny, fixed, PrivacyRefusal, "banded with fixed client sampling", cyclic_or_all)
    shares = {"client_rate": 0.5, "privacy": {**USER, "trust": "user-distributed"}}
    refused(tiny, shares, PrivacyRefusal, "too little noise", {
        "client_sampling=fixed or cyclic": "client_sampling=fixed",
        "or cyclic": "client_sampling=cyclic",
        "client_rate=1": "client_rate=1",
    })  # fmt: skip
    fields = opening_fields("record", record_sampling="fixed")
    with pytest.raises(PrivacyRefusal, match="draw records by Poisson sampling"):
        Ledger.create(tmp_path / "ledger.jsonl", Opening(**fields))
    Ledger.create(tmp_path / "ledger.jsonl", Opening(**{**fields, "record_sampling": "poisson"}))


# ---------------------------------------------------------------- R4 to R7: what may be claimed


def claim(ledger: Ledger, rounds: int | None = None) -> Claim:
    return claim_from(ledger, expected_rounds=rounds, excluded=[METRICS, TUNING])


def test_r4_a_ledger_that_is_not_whole(tiny: Tiny, tmp_path: Path) -> None:
    run = go(tiny(method="fedavg", share="head", rounds=3, privacy=USER, **SHORT), tmp_path / "run")
    path = run.path / "ledger.jsonl"
    lines = path.read_text().splitlines()
    assert claim(Ledger.load(path), 3) == claim(Ledger.load(path)), "whole as it is"

    def rewritten(kept: list[str]) -> Ledger:
        path.write_text("".join(line + "\n" for line in kept))
        return Ledger.load(path)

    with pytest.raises(LedgerError, match=r"incomplete: .* has no line for round 3, so nothing can be claimed"):
        claim(rewritten(lines[:-1]), 3)
    with pytest.raises(LedgerError, match="a line was edited, removed or moved"):
        rewritten([*lines[:2], lines[3]])
    less_noise = lines[2].replace('"noise_multiplier":2.0', '"noise_multiplier":8.0')
    assert less_noise != lines[2]
    with pytest.raises(LedgerError, match="edited, its hash does not match"):
        rewritten([*lines[:2], less_noise, lines[3]])
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(LedgerError, match="2 releases of an interrupted run are not replayed"):
        claim(Ledger.rewind(path, 2))
    assert claim(Ledger.load(path), 3).epsilon == run.claim.epsilon


@pytest.mark.parametrize(
    "privacy",
    [USER, {**USER, "trust": "user-local"}, {**USER, "trust": "user-distributed"}, RECORD],
    ids=["user-central", "user-local", "user-distributed", "record-local"],
)
def test_r5_no_noise_is_no_privacy(tiny: Tiny, tmp_path: Path, privacy: dict[str, Any]) -> None:
    """Clipping is on, noise is not; only infinity may be said, at whatever trust."""
    config = tiny(method="fedavg", share="head", privacy={**privacy, "noise_multiplier": None}, **SHORT)
    run = go(config, tmp_path / "run")
    made = run.claim
    assert made.epsilon == math.inf
    assert made.protected_against == []
    assert made.label() == run.summary["claim"] == "no privacy (ε = ∞)"
    assert "clipping alone is no privacy" in made.sentence
    assert set(made.cross_check.values()) <= {math.inf}
    assert made.record_level in {None, math.inf}
    with pytest.raises(PrivacyRefusal, match="without noise it is infinite"):
        Claim.model_validate({**made.model_dump(), "sigma": 0.0, "epsilon": 3.0})
    assert Claim.model_validate({**made.model_dump(), "sigma": 0.0}).epsilon == math.inf


def test_r6_a_number_under_the_label_of_another_unit(tiny: Tiny, tmp_path: Path) -> None:
    made = go(tiny(method="fedavg", share="head", client_rate=0.6, privacy=USER, **SHORT), tmp_path / "run").claim
    fields = made.model_dump()
    for other in (
        {"unit": "record"},
        {"unit": "record", "trust": "record-local"},
        {"trust": "user-local"},
        {"adjacency": "add/remove: one record of one user is there or not"},
    ):
        with pytest.raises(PrivacyRefusal, match="no other unit's; a user-level epsilon for records is `record_level`"):
            Claim.model_validate({**fields, **other})
    for missing in ({"delta": None}, {"sampler": ""}, {"accountant": ""}):
        with pytest.raises(PrivacyRefusal, match="must name delta, sampler and accountant"):
            Claim.model_validate({**fields, **missing})
    # what the message points to: the same releases, at two clips
    replaced = epsilon([GaussianEvent(2.0, 0.6, 2)], DELTA, replace_one=True)
    assert made.record_level == replaced
    assert made.record_level > 1.3 * made.epsilon
    assert "not a record-level number" in made.sentence


def test_r7_client_and_record_rates_are_never_multiplied(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(method="fedbabu", client_rate=0.5, rounds=4, privacy=RECORD, **SHORT)
    assert prepare(config, REUSE).guarantee.rate == 0.5  # of records
    run = go(config, tmp_path / "run")
    took_part = [json.loads(line)["clients"] for line in (run.path / "private/participants.jsonl").open()]
    most = max(sum(user in clients for clients in took_part) for user in range(8))
    assert run.claim.epsilon == epsilon([GaussianEvent(2.0, 0.5, 2 * most)], DELTA)
    naive = epsilon([GaussianEvent(2.0, 0.5 * 0.5, 2 * 4)], DELTA)
    assert run.claim.epsilon > 1.2 * naive
    assert run.claim.q == 0.5
    assert "no amplification by client sampling" in run.claim.sampler
    with pytest.raises(PrivacyRefusal, match="only 'records' is true there"):
        Ledger.create(tmp_path / "ledger.jsonl", Opening(**opening_fields("record", amplification="clients")))
    # users pay for every local step with one coin of theirs: user level has one step per release
    ledger = Ledger.create(tmp_path / "ledger.jsonl", Opening(**opening_fields("user")))
    line = Release(
        round=1, mechanism="gaussian", noise_multiplier=1.0, clip=1.0, sampling_rate=0.5, steps=3, clients=None,
        noise_address="ab", release_hash="0" * 64,
    )  # fmt: skip
    with pytest.raises(LedgerError, match="one noised step per release"):
        ledger.append(line)


# ---------------------------------------------------------------- R8, R11, R12: what a reply may hold


class Server:
    """One round up to the replies, which a test may forge."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self.clients = make_clients(experiment, folder / "personal")
        opening = self.clients.guarantee.opening(
            experiment.config, self.clients.shared_names, 8, "given in the configuration"
        )
        self.ledger = Ledger.create(folder / "ledger.jsonl", opening)
        users = experiment.examples.users
        self.strategy = FedpersStrategy(
            experiment.config, self.clients.guarantee, users, self.ledger, KEY, self.clients.layout
        )
        grid = CohortGrid(self.clients)
        record = wire.to_record(somewhere(self.clients), self.clients.shared_names)
        asked = {m.metadata.dst_node_id: m for m in self.strategy.configure_train(1, record, ConfigRecord(), grid)}
        self.replies = list(grid.send_and_receive(asked.values()))
        self.first = asked[self.replies[0].metadata.src_node_id]

    def with_reply(self, arrays: dict[str, Any], metrics: dict[str, float]) -> None:
        """Let the first client answer something else."""
        record = wire.to_record(arrays, sorted(arrays))
        content = RecordDict({wire.ARRAYS: record, wire.METRICS: MetricRecord(metrics)})
        forged = Message(content, reply_to=self.first)
        self.strategy.aggregate_train(1, [forged, *self.replies[1:]])


FORGED: dict[str, tuple[str, dict[str, float], str]] = {
    "r8, a weight": ("", {wire.WEIGHT: 5}, "num-examples other than 1.*beyond the clip; send the constant 1"),
    "r8, no weight": ("", {}, "num-examples other than 1"),
    "r11, a foreign name": ("head.secret.weight", {wire.WEIGHT: 1}, "in question: head.secret.weight"),
    "r11, a missing name": ("-", {wire.WEIGHT: 1}, "in question: head"),
    "r12, a metric": ("", {wire.WEIGHT: 1, "accuracy": 0.5}, "in question: accuracy.* simulator's own channel"),
}


@pytest.mark.parametrize("privacy", [{}, USER, {**USER, "trust": "user-local"}, RECORD],
                         ids=["none", "user-central", "user-local", "record-local"])  # fmt: skip
@pytest.mark.parametrize("name", FORGED)
def test_r8_r11_r12_a_reply_that_holds_more_than_shared_arrays(
    tiny: Tiny, tmp_path: Path, name: str, privacy: dict[str, Any]
) -> None:
    extra, metrics, why = FORGED[name]
    server = Server(prepare(tiny(method="fedavg", share="head", privacy=privacy), REUSE), tmp_path)
    arrays = wire.from_record(wire.arrays_of(server.replies[0]))
    if extra == "-":
        del arrays[sorted(arrays)[0]]
    elif extra:
        arrays[extra] = np.zeros((1, 2), np.float32)
    with pytest.raises(PrivacyRefusal, match=why):
        server.with_reply(arrays, metrics)
    assert server.ledger.releases == (), "nothing was released"
    server.with_reply(wire.from_record(wire.arrays_of(server.replies[0])), {wire.WEIGHT: 1})  # the way out
    assert len(server.ledger.releases) == 1


def test_r11_a_client_cannot_even_send_a_personal_name(tiny: Tiny, tmp_path: Path) -> None:
    clients = make_clients(prepare(tiny(method="fedper", privacy=USER), REUSE), tmp_path)
    arrays = {name: clients.model.initial[name].numpy() for name in clients.model.names(("adapter", "head"))}
    heads = set(arrays) - set(clients.shared_names)
    assert heads
    with pytest.raises(PrivacyRefusal, match="exactly the shared arrays") as refusal:
        wire.to_record(arrays, clients.shared_names)
    assert all(name in str(refusal.value) for name in heads)
    wire.to_record({name: arrays[name] for name in clients.shared_names}, clients.shared_names)


# ---------------------------------------------------------------- R9: one noise, one release


@pytest.mark.parametrize("privacy", [USER, {**USER, "trust": "user-local"}, RECORD],
                         ids=["user-central", "user-local", "record-local"])  # fmt: skip
def test_r9_a_resumed_round_replays_its_release_and_no_other_under_the_same_noise(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, privacy: dict[str, Any]
) -> None:
    config = tiny(method="fedavg", share="head", rounds=2, privacy=privacy, **SHORT)
    whole = go(config, tmp_path / "whole")
    for name in ("same", "other"):
        with monkeypatch.context() as patch:
            crash_at(patch, Ledger, "append", 2, "after")
            with pytest.raises(Crash):
                go(config, tmp_path / name)
        assert len((tmp_path / name / "ledger.jsonl").read_text().splitlines()) == 3
    resumed = go(config, tmp_path / "same", resume=True)  # the same hash: allowed, one line
    assert (resumed.path / "ledger.jsonl").read_bytes() == (whole.path / "ledger.jsonl").read_bytes()
    assert resumed.claim == whole.claim

    trained = Clients.train_round

    def otherwise(self: Clients, *args: Any) -> Any:
        return {name: rows + np.float32(0.01) for name, rows in trained(self, *args).items()}

    before = (tmp_path / "other" / "ledger.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Clients, "train_round", otherwise)
        with pytest.raises(LedgerError, match=r"round 2: the replay differs .* in release_hash.*another secret"):
            go(config, tmp_path / "other", resume=True)
        assert (tmp_path / "other" / "ledger.jsonl").read_bytes() == before
        assert not (tmp_path / "other" / "claim.json").exists()
        another = {**privacy, "secret": "ab" * 32}
        fresh = go(tiny(method="fedavg", share="head", rounds=2, privacy=another, **SHORT), tmp_path / "fresh")
    addresses = [
        {release.noise_address for release in Ledger.load(run.path / "ledger.jsonl").releases} for run in (whole, fresh)
    ]
    assert len(addresses[0] | addresses[1]) == 4


def test_r9_an_address_that_was_used_is_not_used_again(tiny: Tiny, tmp_path: Path) -> None:
    run = go(tiny(method="fedavg", share="head", privacy=USER, **SHORT), tmp_path / "run")
    ledger = Ledger.load(run.path / "ledger.jsonl")
    copied = ledger.releases[0].model_copy(update={"round": 3})
    with pytest.raises(LedgerError, match="noise key reuse: round 1 drew its noise from the same address"):
        ledger.append(copied)
    with pytest.raises(LedgerError, match="rounds must grow"):
        ledger.append(copied.model_copy(update={"round": 1, "noise_address": "cd" * 32}))
    ledger.append(copied.model_copy(update={"noise_address": "ab" * 32}))
    assert ledger_module.Ledger.load(ledger.path).head == ledger.head


# ---------------------------------------------------------------- R10: records that see each other


class Coupled(ReplyRanking):
    """The mean over a batch in which every record weighs by its share, like a mean over all tokens."""

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        losses = super().loss(scores, targets)
        return losses / losses.detach().sum()


@pytest.mark.parametrize("privacy", [USER, RECORD], ids=["user", "record"])
def test_r10_a_loss_that_couples_the_records_of_a_batch(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, privacy: dict[str, Any]
) -> None:
    config = tiny(method="fedavg", share="head", rounds=1, privacy=privacy, **SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(
            "fedpers.experiment.find",
            lambda kind, name, base: Coupled if kind == "tasks" else find(kind, name, base),
        )
        with pytest.raises(PrivacyRefusal, match=r"loss changes with the other records.*use a loss per record"):
            simulate(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        unclaimed = tiny(method="fedavg", share="head", rounds=1, **SHORT)
        assert simulate(unclaimed, tmp_path / "unclaimed").claim.epsilon == math.inf
    assert go(config, tmp_path / "run").claim.epsilon < math.inf  # the way out: the loss per record


# ---------------------------------------------------------------- R13 to R16


def test_r13_a_delta_that_would_let_somebody_be_published(tiny: Tiny) -> None:
    user = {"privacy": {**USER, "delta": 1 / 8}}
    refused(tiny, user, PrivacyRefusal, "with 8 protected units .*choose delta well below 0.125",
            {"well below 0.125": "privacy.delta=0.0125"})  # fmt: skip
    record = {"method": "fedbabu", "privacy": {**RECORD, "delta": 1 / 96}}  # 8 users with 12 records at most
    refused(tiny, record, PrivacyRefusal, "with 96 protected units", {"delta well below": "privacy.delta=0.001"})


def test_r13_holds_for_a_claim_too(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.jsonl", Opening(**opening_fields("user", delta=0.01)))
    with pytest.raises(PrivacyRefusal, match="100 protected units"):
        claim(ledger)


def test_r14_an_accountant_that_reports_too_little(tiny: Tiny) -> None:
    settings = {"privacy": {**USER, "accountant": "gdp"}}
    refused(tiny, settings, PrivacyRefusal, "reports less epsilon than is spent",
            {"leave privacy.accountant out (pld)": "privacy.accountant=pld"})  # fmt: skip
    for name in ("rdp", "prv"):
        settings = {"privacy": {**USER, "accountant": name}}
        refused(tiny, settings, ConfigError, "never the claim", {"(pld)": "privacy.accountant=pld"})


def test_r15_a_claim_without_a_word_on_tuning(tiny: Tiny, tmp_path: Path) -> None:
    run = go(tiny(method="fedavg", share="head", rounds=1, privacy=USER, **SHORT), tmp_path / "run")
    ledger = Ledger.load(run.path / "ledger.jsonl")
    with pytest.raises(PrivacyRefusal, match=r"add `claim.TUNING` to `excluded`"):
        claim_from(ledger, expected_rounds=1, excluded=[METRICS])
    made = claim_from(ledger, expected_rounds=1, excluded=[METRICS, TUNING])
    for said in (made, run.claim):
        assert TUNING in said.excluded
        assert TUNING in said.sentence


@pytest.mark.parametrize("rule", OF_SINGLE_REPLIES)
def test_r16_rules_on_single_replies_see_none_where_the_server_sums(tiny: Tiny, rule: str) -> None:
    why = f"'{rule}' looks at single replies, but user-level privacy"
    for privacy in (USER, {**USER, "trust": "user-distributed"}):
        refused(tiny, {"method": "fedavg", "server": {"strategy": rule}, "privacy": privacy}, PrivacyRefusal, why, {
            "privacy.trust=user-local": "privacy.trust=user-local",
            "privacy.unit=record": "privacy.unit=record, privacy.trust=None",
            **{name: f"server.strategy={name}" for name in OF_THE_MEAN},
        })  # fmt: skip
    clipped = {"method": "fedavg", "server": {"strategy": rule}, "privacy": {"clip": 0.3}}
    refused(tiny, clipped, PrivacyRefusal, "privacy.clip makes the server give it one mean",
            {"leave privacy.clip out": "privacy.clip=None", "FedAdam": "server.strategy=FedAdam"})  # fmt: skip
    for privacy in ({}, RECORD, {**USER, "trust": "user-local"}):
        prepare(tiny(method="fedavg", server={"strategy": rule}, privacy=privacy), REUSE)


# ---------------------------------------------------------------- options that contradict each other


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str, dict[str, str]]] = {
    "adaptive without a trusted server": (
        {"privacy": {**USER, "trust": "user-local", "adaptive": {"bit_noise": 2.0}}},
        "privacy.adaptive belongs to privacy.unit=user with trust user-central", {"user-central": "privacy.trust=None"},
    ),
    "two at once": (
        {"privacy": {**USER, "mechanism": "banded", "adaptive": {"bit_noise": 2.0}}},
        "privacy.adaptive and privacy.mechanism=banded are not accounted together",
        {"choose one": "privacy.adaptive=None"},
    ),
    "a schedule of given noise": (
        {"privacy": {**USER, "schedule": "signal"}}, "cannot be given with privacy.schedule=signal",
        {"give privacy.epsilon": "privacy.noise_multiplier=None, privacy.epsilon=8"},
    ),
    "noise given twice": (
        {"privacy": {**USER, "epsilon": 8}}, "one follows from the other",
        {"leave one out": "privacy.epsilon=inf", "privacy.stop=budget": "privacy.stop=budget"},
    ),
    "bands of independent noise": (
        {"privacy": {**USER, "bands": 3}}, "privacy.bands shapes banded noise only",
        {"privacy.mechanism=banded": "privacy.mechanism=banded", "leave it out": "privacy.bands=None"},
    ),
    "a forecast with a budget": (
        {"privacy": {**USER, "noise_multiplier": None, "epsilon": 8, "population": 900, "stop": "budget"}},
        "would end the run before its first round", {"leave privacy.stop out": "privacy.stop=rounds"},
    ),
    "joint heads without record-level noise": (
        {"method": "fedrep", "privacy": {**USER, "head": "joint"}}, "privacy.unit is user",
        {"leave it out": "privacy.head=method"},
    ),
    "a policy for nothing": (
        {"method": "fedavg", "privacy": {**RECORD, "head": "frozen"}}, "moves no personal group in the rounds",
        {"leave privacy.head out": "privacy.head=method"},
    ),
    "two halves in one step": (
        {"method": "fedper", "privacy": {**RECORD, "head": "split-dp"}}, "but in one step", {"fedrep": "method=fedrep"},
    ),
    "bits that use up the guarantee": (
        {"privacy": {**USER, "adaptive": {"bit_noise": 0.5}}}, "the smallest value that works .* is 1.0001",
        {"1.0001": "privacy.adaptive=None"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_options_that_contradict_each_other(tiny: Tiny, name: str) -> None:
    settings, why, ways = CONTRADICTIONS[name]
    refused(tiny, settings, ConfigError, why, ways)


def test_the_smallest_noise_on_bits_that_is_named_works(tiny: Tiny) -> None:
    found = prepare(tiny(privacy={**USER, "adaptive": {"bit_noise": 1.0001}}), REUSE).guarantee
    assert found.adaptive is not None
    assert found.adaptive.bit_noise == 1.0001
