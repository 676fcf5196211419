"""The claim: its numbers come from the whole ledger, and its words say for whom and against whom."""

import json
import math
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from conftest import opening_fields
from fedpers.config import Unit
from fedpers.errors import ConfigError, LedgerError, PrivacyRefusal
from fedpers.privacy import spending
from fedpers.privacy.accounting import GaussianEvent, epsilon
from fedpers.privacy.claim import TUNING, Claim, check_delta
from fedpers.privacy.claiming import claim_from
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import Opening, Release

EXCLUDED = ["metrics that the simulator reads", TUNING]
DELTA = 1e-5


def ledger_of(directory: Path, unit: Unit, releases: list[dict[str, Any]], **changes: Any) -> Ledger:
    special = {
        "population": 6,
        "protected": 6,
        "head_policy": "frozen at its public start, tuned after the last release",
        "shared_names": ["adapter"],
    }
    ledger = Ledger.create(directory / "ledger.jsonl", Opening(**opening_fields(unit, **{**special, **changes})))
    for number, special in enumerate(releases, start=1):
        noised = special.get("mechanism", "none" if unit == "none" else "gaussian") == "gaussian"
        line: dict[str, Any] = {
            "round": number,
            "mechanism": "gaussian" if noised else "none",
            "noise_multiplier": 1.0 if noised else 0.0,
            "clip": 0.5 if noised else None,
            "sampling_rate": 0.25 if noised else 1.0,
            "steps": 1 if unit == "user" else 20,
            "clients": None if unit == "user" else [0, 1],
            "noise_address": f"{number:064x}" if noised else "",
            "release_hash": f"{number:064x}",
        }
        ledger.append(Release(**{**line, **special}))
    return ledger


def claim(ledger: Ledger, rounds: int | None = None) -> Claim:
    return claim_from(ledger, expected_rounds=rounds, excluded=EXCLUDED)


def spent(*events: tuple[float, float, int]) -> float:
    return epsilon([GaussianEvent(*event) for event in events], DELTA)


# ---------------------------------------------------------------- numbers


def test_user_level_composes_all_rounds(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, "user", [{}] * 20)
    made = claim(ledger, 20)
    assert made.epsilon == spending.spent(ledger) == spent((1.0, 0.25, 20))
    assert (made.steps, made.rounds, made.q, made.sigma, made.clip) == (20, 20, 0.25, 1.0, 0.5)
    assert made.per_client is None
    assert made.cross_check["prv"] == pytest.approx(made.epsilon, abs=0.02)
    assert made.cross_check["rdp"] > made.epsilon
    assert not made.secure_rng
    assert not made.simulated_secagg


def test_the_accountant_is_not_reset_between_rounds(tmp_path: Path) -> None:
    """S1 of the reference: an accountant built anew each round reports one round's epsilon three times."""
    made = claim(ledger_of(tmp_path, "record", [{}] * 3), 3)
    reset = spent((1.0, 0.25, 20))
    assert made.epsilon == spent((1.0, 0.25, 60))
    assert made.epsilon > 1.4 * reset  # the negative control: the wrong number is far away


def test_changing_noise_is_composed_as_it_was(tmp_path: Path) -> None:
    releases = [{"noise_multiplier": 1.0}, {"noise_multiplier": 2.0, "clip": 1.0}, {"sampling_rate": 0.5}]
    made = claim(ledger_of(tmp_path, "user", releases))
    assert made.epsilon == spent((1.0, 0.25, 1), (2.0, 0.25, 1), (1.0, 0.5, 1))
    assert (made.q, made.sigma, made.clip) == (None, None, None)
    assert "as in the ledger" in made.sampler


def test_record_level_is_the_largest_client(tmp_path: Path) -> None:
    """Own steps only, at the record rate; no amplification by client sampling; idle clients spent nothing."""
    clients = [[0, 1], [0, 1, 2], [0], []]
    made = claim(ledger_of(tmp_path, "record", [{"clients": who} for who in clients]), 4)
    own = [spent((1.0, 0.25, 20 * rounds)) for rounds in (3, 2, 1)] + [0.0] * 3
    assert made.epsilon == max(own)
    assert made.per_client is not None
    assert made.per_client.model_dump() == {"min": 0.0, "median": median(own), "max": max(own)}
    assert made.steps == 60
    assert made.rounds == 4
    naive = spent((1.0, 0.25 * 0.25, 20 * 4))  # R7: client rate times record rate, over all rounds
    assert made.epsilon > 1.5 * naive


def test_record_level_with_different_noise_per_client(tmp_path: Path) -> None:
    """The client with most steps is not the one that spent most."""
    releases: list[dict[str, Any]] = [
        {"clients": [0, 1, 2, 3, 4, 5]},
        {"clients": [0], "noise_multiplier": 8.0, "steps": 50},
        {"clients": [1], "noise_multiplier": 0.8, "steps": 1},
    ]
    made = claim(ledger_of(tmp_path, "record", releases))
    own = [spent((1.0, 0.25, 20), (8.0, 0.25, 50)), spent((1.0, 0.25, 20), (0.8, 0.25, 1)), spent((1.0, 0.25, 20))]
    assert own[1] > own[0] > own[2]
    assert made.epsilon == own[1]
    assert made.steps == 21
    assert made.per_client is not None
    assert made.per_client.model_dump() == {"min": own[2], "median": own[2], "max": own[1]}


def test_many_clients_are_fast(tmp_path: Path) -> None:
    people = 400
    releases = [{"clients": list(range(number, people)), "steps": 3} for number in range(30)]
    ledger = ledger_of(tmp_path, "record", releases, population=1_000_000)
    start = time.perf_counter()
    made = claim(ledger, 30)
    assert time.perf_counter() - start < 5
    assert made.epsilon == spent((1.0, 0.25, 90))
    assert made.per_client is not None
    assert made.per_client.median == 0.0


def test_full_participation_is_the_analytic_gaussian(tmp_path: Path) -> None:
    releases = [{"sampling_rate": 1.0, "noise_multiplier": 4.0}] * 50
    made = claim(ledger_of(tmp_path, "user", releases, client_sampling="all"))
    assert made.epsilon == pytest.approx(8.59587, abs=1e-4)
    assert made.accountant.startswith("analytic Gaussian")
    assert made.sampler == "none: every user every time"


@pytest.mark.parametrize("unit", ["user", "record"])
def test_one_release_without_noise_is_no_guarantee(tmp_path: Path, unit: Unit) -> None:
    made = claim(ledger_of(tmp_path, unit, [{}, {"mechanism": "none", "clip": 0.5}, {}]))
    assert made.epsilon == math.inf
    assert made.label() == "no privacy (ε = ∞)"
    assert made.protected_against == []
    assert made.sentence.startswith("ε = ∞ and δ = 1e-05 for one")
    assert "clipping alone is no privacy" in made.sentence
    if unit == "record":
        assert made.per_client is not None
        assert made.per_client.model_dump() == {"min": 0.0, "median": 0.0, "max": math.inf}


def test_unit_none(tmp_path: Path) -> None:
    made = claim(ledger_of(tmp_path, "none", [{}, {}]), 2)
    assert (made.epsilon, made.delta, made.cross_check) == (math.inf, None, {})
    assert made.label() == "no privacy (ε = ∞)"
    assert made.sentence.startswith("No privacy is claimed: none was asked for, so nothing bounds")
    assert "no guarantee" in made.sentence
    assert "clipped" not in made.sentence


@pytest.mark.parametrize("unit", ["none", "record", "user"])
def test_nothing_released(tmp_path: Path, unit: Unit) -> None:
    made = claim(ledger_of(tmp_path, unit, []), 0)
    assert made.epsilon == 0
    assert made.label() == "nothing released (ε = 0)"
    assert made.sentence.startswith("ε = 0")
    assert "nothing that was computed from private data left a client" in made.sentence


# ---------------------------------------------------------------- no claim from an incomplete ledger


def test_a_missing_round_leaves_nothing_to_claim(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"incomplete.*round 2"):
        claim(ledger_of(tmp_path, "user", [{}, {"round": 3}]))


@pytest.mark.parametrize("unit", ["none", "record", "user"])
def test_too_few_or_too_many_rounds(tmp_path: Path, unit: Unit) -> None:
    ledger = ledger_of(tmp_path, unit, [{}, {}])
    with pytest.raises(LedgerError, match=r"incomplete.*round 3"):
        claim(ledger, 3)
    with pytest.raises(LedgerError, match="holds 2 rounds, but"):
        claim(ledger, 1)
    assert claim(ledger, 2).rounds == 2


def test_a_late_start_is_a_gap(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="round 1"):
        claim(ledger_of(tmp_path, "user", [{"round": 2}]))


def test_releases_of_an_interrupted_run_count(tmp_path: Path) -> None:
    whole = ledger_of(tmp_path, "user", [{}] * 3)
    rewound = Ledger.rewind(whole.path, 2)
    with pytest.raises(LedgerError, match="2 releases of an interrupted run"):
        claim(rewound, 1)
    for release in rewound.pending:
        rewound.append(release)
    assert claim(rewound, 3) == claim(whole, 3)


def test_more_clients_than_registered(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="only 6 are registered"):
        claim(ledger_of(tmp_path, "record", [{"clients": list(range(7))}]))


# ---------------------------------------------------------------- delta


@pytest.mark.parametrize("delta", [0.01, 0.02, 0.5])
def test_delta_of_one_over_the_protected_or_more_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyRefusal, match="published"):
        check_delta(delta, 100)
    check_delta(0.0099, 100)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_delta_outside_its_range(delta: float) -> None:
    with pytest.raises(ConfigError):
        check_delta(delta, 100)


@pytest.mark.parametrize("unit", ["user", "record"])
def test_a_claim_checks_delta(tmp_path: Path, unit: Unit) -> None:
    with pytest.raises(PrivacyRefusal):
        claim(ledger_of(tmp_path, unit, [{}], protected=100_000))


# ---------------------------------------------------------------- words


def test_user_level_words(tmp_path: Path) -> None:
    made = claim(ledger_of(tmp_path, "user", [{}] * 20))
    assert made.protected_against == ["other clients", "recipients of the shared model"]
    assert any("server" in who for who in made.not_protected_against)
    assert any("personal model" in who for who in made.not_protected_against)
    assert made.adjacency.startswith("zero-out")
    assert made.label() == f"user-level (ε = {math.ceil(made.epsilon * 100) / 100:.2f}, δ = 1e-05), trusted server"
    assert made.sentence.startswith("ε = ")
    for words in ("δ = 1e-05 for one user", "not a record-level number", "trusted", "not cryptographically", "one run"):
        assert words in made.sentence
    for excluded in EXCLUDED:
        assert excluded in made.sentence
    assert "secret" in made.sampler


def test_record_level_words(tmp_path: Path) -> None:
    made = claim(ledger_of(tmp_path, "record", [{}]))
    assert made.protected_against == [
        "the server (as long as it asks each client once a round, and in no round that the ledger lacks)",
        "other clients",
        "recipients of the shared model",
    ]
    assert any("that the user takes part" in who for who in made.not_protected_against)
    assert made.adjacency.startswith("add/remove")
    assert made.label().startswith("record-level (ε = ")
    assert "for one record" in made.sentence
    assert "Poisson: each record independently with probability 0.25" in made.sampler


def test_a_secret_in_the_configuration_is_said(tmp_path: Path) -> None:
    made = claim(ledger_of(tmp_path, "user", [{}], secret="given in the configuration"))
    assert any("configuration" in who for who in made.not_protected_against)
    assert "configuration" in made.sentence


def test_a_rounded_epsilon_still_holds(tmp_path: Path) -> None:
    made = claim(ledger_of(tmp_path, "user", [{}]))
    for value, shown in ((7.9701, "7.98"), (7.98, "7.98"), (0.0001, "0.01"), (12.0, "12.00")):
        assert f"(ε = {shown}," in made.model_copy(update={"epsilon": value}).label()


def test_a_note_is_added(tmp_path: Path) -> None:
    made = claim_from(
        ledger_of(tmp_path, "user", [{}]), expected_rounds=1, excluded=[TUNING], population_note="A note."
    )
    assert "A note." in made.sentence


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("unit", ["none", "record", "user"])
@pytest.mark.parametrize("mechanism", ["none", "gaussian"])
def test_json_round_trip(tmp_path: Path, unit: Unit, mechanism: str) -> None:
    rate = {"sampling_rate": 1.0} if unit == "none" else {}
    made = claim(ledger_of(tmp_path, unit, [{"mechanism": mechanism, **rate}]))
    text = made.to_json()
    assert Claim.from_json(text) == made
    plain = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    if mechanism == "none":
        assert plain["epsilon"] == "inf"
    assert plain["ledger_head"] == made.ledger_head
    assert {"secure_rng", "simulated_secagg", "secret", "per_client", "head_policy"} <= set(plain)


def test_the_claim_is_tied_to_its_ledger(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, "user", [{}])
    before = claim(ledger)
    assert before.ledger_head == ledger.head == Ledger.load(ledger.path).head
    ledger.append(ledger.releases[0].model_copy(update={"round": 2, "noise_address": "2" * 64}))
    assert claim(ledger).ledger_head != before.ledger_head
