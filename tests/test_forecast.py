"""A forecast for a larger federation: computed from the ledger, worded and drawn as what it is, never a claim."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from pydantic import ValidationError

import fedpers.figures.frontier as drawing
from conftest import SECRET, opening_fields
from fedpers import simulation
from fedpers.config import Config
from fedpers.errors import ConfigError, FedpersError, LedgerError, PrivacyRefusal
from fedpers.experiment import Reuse, prepare
from fedpers.figures.frontier import FrontierCell, frontier
from fedpers.privacy.accounting import GaussianEvent, epsilon
from fedpers.privacy.calibration import calibrate
from fedpers.privacy.claim import Claim, rounded_up
from fedpers.privacy.forecast import Forecast, forecast_from
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import ADJACENCIES, SHARED, Opening, Release
from fedpers.public import export_public
from fedpers.simulation import Run, simulate

Tiny = Callable[..., Config]
REUSE = Reuse()
DELTA, POPULATION, RATE = 1e-6, 100_000, 0.6
SHORT: dict[str, Any] = {"evaluation": {"every": 0, "local_only": False}}
ASKED: dict[str, Any] = {
    "unit": "user", "clip": 0.3, "delta": DELTA, "epsilon": 4, "population": POPULATION, "secret": SECRET,
}  # fmt: skip


def config(tiny: Tiny, **changes: Any) -> Config:
    privacy = {**ASKED, **changes.pop("privacy", {})}
    return tiny(**{"method": "fedavg", "share": "head", "client_rate": RATE, **SHORT, **changes, "privacy": privacy})


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "learning_curve", lambda *args, **options: None)
    monkeypatch.setattr(simulation, "per_user_gain", lambda *args, **options: None)


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path, without_figures: None) -> Run:
    return simulate(config(tiny), tmp_path / "run", reuse=REUSE)


# ---------------------------------------------------------------- numbers


def test_the_noise_on_the_mean_is_that_of_the_larger_federation(tiny: Tiny) -> None:
    supposed = calibrate(4, DELTA, RATE, 2)
    few, many = (prepare(config(tiny, privacy={"population": n}), REUSE).guarantee for n in (POPULATION, 8))
    assert many.noise_multiplier == supposed, "a forecast for the users of the run is what they get"
    for guarantee, population in ((few, POPULATION), (many, 8)):
        on_the_mean = guarantee.noise_multiplier * 0.3 / guarantee.denominator
        assert guarantee.denominator == pytest.approx(RATE * 8)
        assert on_the_mean == pytest.approx(supposed * 0.3 / (RATE * population))


def test_both_epsilons_are_computed_from_the_noise_on_the_ledger(run: Run) -> None:
    releases = Ledger.load(run.path / "ledger.jsonl").releases
    assert len(releases) == 2
    (z,) = {release.noise_multiplier for release in releases}
    forecast = run.forecast
    assert forecast is not None
    assert forecast.epsilon == epsilon([GaussianEvent(z * POPULATION / 8, RATE, 2)], DELTA)
    assert 0.99 * 4 < forecast.epsilon <= 4
    assert run.claim.epsilon == epsilon([GaussianEvent(z, RATE, 2)], DELTA)
    assert 1e6 < run.claim.epsilon < math.inf, "hardly any noise is on the mean of eight users"
    assert run.claim.sigma == z
    assert forecast.noise_multiplier == pytest.approx(z * POPULATION / 8)
    assert (forecast.cohort, forecast.sampling_rate, forecast.rounds) == (RATE * POPULATION, RATE, 2)
    assert (forecast.population, forecast.simulated_users, forecast.delta) == (POPULATION, 8, DELTA)
    assert run.rounds.column("epsilon").to_pylist()[-1] == run.claim.epsilon


def line(**changes: Any) -> Release:
    fields: dict[str, Any] = {
        "round": 1, "mechanism": "gaussian", "noise_multiplier": 0.01, "clip": 1.0, "sampling_rate": 0.25, "steps": 1,
        "clients": None, "noise_address": "ab", "release_hash": "0" * 64,
    }  # fmt: skip
    return Release(**{**fields, **changes})


def test_noise_that_changed_is_forecast_as_it_was(tmp_path: Path) -> None:
    ledger = Ledger.create(
        tmp_path / "ledger.jsonl", Opening(**opening_fields("user", simulated_population=50_000, delta=DELTA))
    )
    ledger.append(line())
    ledger.append(line(round=2, noise_multiplier=0.004, sampling_rate=0.5, noise_address="cd"))
    found = forecast_from(ledger)
    assert found is not None
    events = [GaussianEvent(0.01 * 500, 0.25, 1), GaussianEvent(0.004 * 500, 0.5, 1)]
    assert found.epsilon == epsilon(events, DELTA)
    assert (found.noise_multiplier, found.sampling_rate) == (None, None)


def test_a_shared_secret_leaves_nothing_to_forecast(tmp_path: Path) -> None:
    fields = opening_fields("user", simulated_population=50_000, delta=DELTA) | {"secret": SHARED}
    ledger = Ledger.create(tmp_path / "ledger.jsonl", Opening(**fields))
    ledger.append(line())
    found = forecast_from(ledger)
    assert found is not None
    assert found.epsilon == math.inf


def test_one_release_without_noise_leaves_nothing_to_forecast(tmp_path: Path) -> None:
    ledger = Ledger.create(
        tmp_path / "ledger.jsonl", Opening(**opening_fields("user", simulated_population=50_000, delta=DELTA))
    )
    assert forecast_from(ledger) is None, "nothing was released"
    ledger.append(line())
    ledger.append(line(round=2, mechanism="none", noise_multiplier=0.0, noise_address=""))
    found = forecast_from(ledger)
    assert found is not None
    assert found.epsilon == math.inf
    assert "ε = ∞" in found.sentence
    assert Forecast.from_json(found.to_json()) == found


# ---------------------------------------------------------------- what it may be taken for


def test_a_forecast_is_no_claim_and_is_written_apart(run: Run, tmp_path: Path) -> None:
    forecast = run.forecast
    assert forecast is not None
    assert not issubclass(type(forecast), Claim)
    written = json.loads((run.path / "forecast.json").read_text())
    assert Forecast.from_json((run.path / "forecast.json").read_text()) == forecast
    assert written["epsilon"] == forecast.epsilon
    with pytest.raises(LedgerError):
        Claim.from_json(forecast.to_json())
    with pytest.raises(ValidationError):
        Forecast.from_json(run.claim.to_json())
    assert forecast.label().startswith(f"forecast for {POPULATION:,} users")
    assert forecast.sentence.startswith(f"Forecast for {POPULATION:,} users, not a claim")
    assert "The 8 users of this run have what its claim says." in forecast.sentence
    copied = export_public(run.path, tmp_path / "public")
    assert {"claim.json", "forecast.json"} <= set(copied)


def test_nothing_that_is_claimed_says_the_number_of_the_forecast(run: Run) -> None:
    assert run.forecast is not None
    shown = {rounded_up(run.forecast.epsilon), f"{run.forecast.epsilon:.4f}", f"ε = {run.forecast.epsilon:.2f}"}
    claimed = [(run.path / "claim.json").read_text(), (run.path / "summary.json").read_text(), run.claim.label()]
    for text in [*claimed, run.claim.sentence]:
        assert not any(f"ε = {number}" in text or f"{number} " in text for number in shown)
        assert f"{POPULATION:,}" not in text
        assert "forecast" not in text.lower()
    assert f"ε = {rounded_up(run.claim.epsilon)}" in run.claim.label()
    assert run.summary["claim"] == run.claim.label()


def test_a_finished_run_is_read_back_with_its_forecast(run: Run, tiny: Tiny, tmp_path: Path) -> None:
    assert simulate(config(tiny), run.path, resume=True, reuse=REUSE).forecast == run.forecast
    plain = simulate(
        config(tiny, privacy={"population": None, "delta": 1e-3}), tmp_path / "plain", reuse=REUSE
    )  # fmt: skip
    assert plain.forecast is None
    assert not (plain.path / "forecast.json").exists()
    assert plain.claim.epsilon <= 4


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"privacy": {"population": 7}}, ConfigError, "population=7 is below the 8 registered users"),
        ({"privacy": {"delta": 1e-5}}, PrivacyRefusal, "100000 protected units .*choose delta well below 1e-05"),
        (
            {"privacy": {"epsilon": "inf"}},
            ConfigError,
            "privacy.population says how noise is used.*set privacy.epsilon",
        ),
        ({"privacy": {"trust": "user-local"}}, ConfigError, "belongs to privacy.unit=user with trust user-central"),
        ({"privacy": {"unit": "record"}}, ConfigError, "belongs to privacy.unit=user"),
        ({"client_sampling": "fixed"}, ConfigError, "goes with Poisson client sampling; leave client_sampling out"),
        ({"privacy": {"schedule": "signal"}}, ConfigError, "not accounted together"),
        ({"privacy": {"stop": "budget"}}, ConfigError, "end the run before its first round"),
        ({"privacy": {"epsilon": "inf", "noise_multiplier": 1.0}}, ConfigError, "give privacy.epsilon"),
    ],
)
def test_a_forecast_that_cannot_be_made(
    tiny: Tiny, changes: dict[str, Any], error: type[FedpersError], why: str
) -> None:
    with pytest.raises(error, match=why):
        prepare(config(tiny, **changes), REUSE)
    prepare(config(tiny), REUSE)
    prepare(config(tiny, privacy={"population": 8, "delta": 1e-3}), REUSE)


def test_delta_is_held_against_the_larger_population_of_the_ledger_too(tmp_path: Path) -> None:
    fields = opening_fields("user", simulated_population=POPULATION, delta=1e-5)
    ledger = Ledger.create(tmp_path / "a.jsonl", Opening(**fields))
    ledger.append(line())
    with pytest.raises(PrivacyRefusal, match="100000 protected units"):
        forecast_from(ledger)
    other = {"client_sampling": "fixed", "adjacency": ADJACENCIES["user-central"][1], "delta": DELTA}
    ledger = Ledger.create(tmp_path / "b.jsonl", Opening(**{**fields, **other}))
    ledger.append(line())
    with pytest.raises(LedgerError, match="Poisson client sampling"):
        forecast_from(ledger)


# ---------------------------------------------------------------- the picture


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from here on."""
    figures: list[Figure] = []
    saved = drawing.save

    def keep(figure: Figure, *args: Any) -> list[Path]:
        figures.append(figure)
        return saved(figure, *args)

    monkeypatch.setattr(drawing, "save", keep)
    return figures


def solid(figure: Figure) -> set[str]:
    """Colours of the solid lines between two points or more."""
    return {
        to_hex(line.get_color())
        for line in figure.axes[0].get_lines()
        if len(np.asarray(line.get_xdata())) > 1 and line.get_linestyle() in {"-", "solid"}
    }


def cell(epsilon: float, forecast: str | None) -> FrontierCell:
    ranges = dict.fromkeys(("own", "local"), (0.5, 0.4, 0.6))
    return FrontierCell(
        "fedper", epsilon, 1e-6, "user", "trust: user-central", global_=(0.45, 0.4, 0.5), zero_shot=0.3,
        forecast=forecast, **ranges,
    )  # fmt: skip


def test_a_forecast_is_drawn_dashed_and_worded(tmp_path: Path, drawn: list[Figure]) -> None:
    words = "forecast for 100,000 users"
    frontier([cell(e, words) for e in (1.0, 2.0)], tmp_path / "forecast", "a")
    frontier([cell(e, None) for e in (1.0, 2.0)], tmp_path / "claim", "a")
    supposed, claimed = drawn
    assert words in supposed.axes[0].get_xlabel()
    assert "no guarantee for the users of these runs" in supposed.axes[0].get_xlabel()
    assert "forecast" not in claimed.axes[0].get_xlabel()
    assert solid(claimed) - solid(supposed), "the personal line of a claim is solid, of a forecast it is not"


def test_a_picture_of_forecasts_says_so(tiny: Tiny, tmp_path: Path, drawn: list[Figure], without_figures: None) -> None:
    picture = {"methods": ["fedavg"], "epsilons": [4, "inf"]}
    found = simulate(config(tiny, frontier=picture, evaluation={"every": 0}), tmp_path / "run", reuse=REUSE)
    assert found.forecast is not None
    (figure,) = drawn
    axes = figure.axes[0]
    assert f"forecast for {POPULATION:,} users: no guarantee" in axes.get_xlabel()
    places = {text.get_text(): place for text, place in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)}
    assert places["4"] == pytest.approx(math.log10(found.forecast.epsilon))
    assert found.claim.epsilon > 1e6
    assert found.claim.excluded[-1].startswith("1 further runs on the same people")
