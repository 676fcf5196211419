"""Cohort size and token budget by measurement: chosen once, kept for when the run is resumed, and of no effect else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedpers import simulation
from fedpers.cohort import tuning
from fedpers.cohort.clients import Clients
from fedpers.cohort.tuning import Choice, from_json, tune
from fedpers.config import Config, result_text
from fedpers.errors import PrivacyRefusal, RunDirectoryError
from fedpers.experiment import build_model, prepare
from fedpers.identity import identity
from fedpers.public import export_public
from fedpers.reporting import Reporter
from fedpers.simulation import simulate

RECORD = {"unit": "record", "epsilon": 4, "delta": 1e-4, "clip": 0.05}
TUNED = {"engine": {"tune": True}}


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the cohorts that were trained in rounds."""
    seen: list[int] = []
    cut = Clients._cohorts

    def watched(self: Clients, users: Any) -> Any:
        for cohort in cut(self, users):
            seen.append(len(cohort))
            yield cohort

    monkeypatch.setattr(Clients, "_cohorts", watched)
    return seen


@pytest.mark.parametrize("privacy", [RECORD, {"unit": "none"}], ids=["record", "none"])
def test_a_tuned_run_gives_what_another_gives(
    tiny: Callable[..., Config], tmp_path: Path, privacy: dict[str, Any]
) -> None:
    plain = simulate(tiny(privacy=privacy), tmp_path / "plain")
    tuned = simulate(tiny(privacy=privacy, **TUNED), tmp_path / "tuned")
    for name, value in plain.shared.items():
        np.testing.assert_allclose(tuned.shared[name], value, atol=1e-5)
    assert result_text(plain.config) == result_text(tuned.config)  # so that noise is drawn by the same keys
    choice = from_json((tmp_path / "tuned" / "private" / "engine.json").read_text())
    assert set(choice.budgets) >= {512, 1024, 2048, 4096}
    assert all(0 < seconds < 60 for seconds in choice.budgets.values())
    assert not (tmp_path / "plain" / "private" / "engine.json").exists()


def test_a_choice_is_kept_when_the_run_is_resumed(
    tiny: Callable[..., Config], tmp_path: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(*args: Any) -> Any:
        raise Stop

    config = tiny(privacy=RECORD, **TUNED)
    with monkeypatch.context() as patch:
        patch.setattr(simulation, "federate", stop)
        patch.setattr(simulation, "tune", lambda *_: Choice(512, 3, {512: 1.0}, {3: 1.0}))
        with pytest.raises(Stop):
            simulate(config, tmp_path / "run")
    monkeypatch.setattr(simulation, "tune", lambda *_: pytest.fail("it was chosen again"))
    simulate(config, tmp_path / "run", resume=True)
    assert set(sizes) == {3, 2}  # of 8 people


def test_a_damaged_choice_is_told(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny(privacy={"unit": "none"}, **TUNED)
    simulate(config, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "private" / "engine.json").write_text('{"token_budget": 512')
    with pytest.raises(RunDirectoryError, match=r"engine\.json is damaged"):
        simulate(config, tmp_path / "run", resume=True)


def test_what_is_given_stays_unless_something_is_clearly_faster(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = prepare(tiny(privacy=RECORD, engine={"token_budget": 2048}))
    model = build_model(experiment, Reporter())
    moments = iter(np.arange(1000.0))  # every try takes a second
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: next(moments))
    found = tune(model, experiment.plan, experiment.config)
    assert (found.token_budget, found.cohort_size) == (2048, experiment.config.engine.cohort_size)
    assert model.budget == 2048
    assert tuning._best({512: 0.9, 2048: 1.0}, 2048) == 512
    assert tuning._best({512: 0.96, 2048: 1.0}, 2048) == 2048


def test_what_was_chosen_stays_private(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In no configuration that an export of the run, or of a cell of its picture, holds."""
    monkeypatch.setattr(simulation, "tune", lambda *_: Choice(1024, 3, {1024: 0.123456}, {3: 0.654321}))
    user = {"unit": "user", "epsilon": 4, "delta": 1e-4, "clip": 0.05}
    picture = {"methods": ["fedavg"], "epsilons": [2.0]}
    run = simulate(tiny(method="fedavg", privacy=user, frontier=picture, **TUNED), tmp_path / "run")
    assert run.config.engine.token_budget == 512
    for place in (run.path, run.path / "frontier" / "fedavg-eps-2"):
        out = tmp_path / f"public-{place.name}"
        export_public(place, out)
        engine = yaml.safe_load((out / "config.yaml").read_text())["engine"]
        assert (engine["cohort_size"], engine["token_budget"], engine["tune"]) == (4, 512, True)
        assert not any(b"0.123456" in file.read_bytes() for file in out.rglob("*") if file.is_file())
    assert '"token_budget": 1024' in (run.path / "frontier" / "fedavg-eps-2" / "private" / "engine.json").read_text()


def test_with_a_given_secret_what_is_rounded_is_not_cut_by_the_clock(tiny: Callable[..., Config]) -> None:
    config = tiny(privacy=RECORD, engine={"tune": True, "prefix": "fp16"})
    with pytest.raises(PrivacyRefusal, match=r"privacy\.secret with engine\.tune"):
        build_model(prepare(config), Reporter())
    cut = [tiny(privacy=RECORD, engine={"prefix": "fp16", "cohort_size": size}) for size in (2, 3)]
    experiments = [prepare(one) for one in cut]
    names = [identity(one, build_model(one, Reporter())) for one in experiments]
    assert names[0] != names[1], "rounded results show how the work was cut, so the noise must be another"


@pytest.mark.parametrize("text", ['{"token_budget": 512, "cohort_size": 0, "budgets": {}, "sizes": {}}', "[]", "{}"])
def test_a_choice_out_of_bounds_is_damaged(tiny: Callable[..., Config], tmp_path: Path, text: str) -> None:
    directory = simulation.RunDirectory.create(tmp_path / "run", tiny())
    (directory.private / "engine.json").write_text(text)
    with pytest.raises(RunDirectoryError, match="damaged"):
        directory.tuned(lambda: pytest.fail("chosen again"))
