"""Cold start: people who were in no round, the same ones at each number of records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from conftest import Stages
from fedpers import registry
from fedpers.cold_start import cold_start, strangers
from fedpers.config import Config
from fedpers.data.base import load
from fedpers.errors import ConfigError, RunDirectoryError
from fedpers.finished_run import Finished, open_run
from fedpers.privacy.randomness import seed_key
from fedpers.simulation import Run, simulate
from test_tasks import Rated

Tiny = Callable[..., Config]


@pytest.fixture(autouse=True)
def _sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {("data", "rated"): Rated})


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Run:
    """A finished run on 4 of the 40 made-up raters, every other of whom gives large numbers."""
    data = {"name": "rated", "users": 4, "min_train": 8}
    return simulate(tiny(method="fedavg-finetune", rounds=1, data=data, task={"name": "rating"}), tmp_path / "run")


def test_more_records_make_a_better_model_of_somebody_new(run: Run, tmp_path: Path) -> None:
    stages = Stages()
    curve = cold_start(run.path, tmp_path / "out", counts=(8, 0, 2), reporter=stages)
    assert stages.told["records of somebody new"] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [point.records for point in curve.points] == [0, 2, 8]
    assert curve.people == 36
    own = [point.means["own"].mean for point in curve.points]
    assert own[0] == pytest.approx(curve.shared), "nothing to fit to: the shared model"
    assert own[2] < own[1] < own[0], "RMSE falls"
    assert curve.points[0].means["local"].mean == pytest.approx(curve.zero_shot)
    gain, low, high, p = curve.points[2].over_shared
    assert gain == pytest.approx(own[0] - own[2])
    assert low <= gain <= high
    assert p < 0.01
    table = pq.read_table(tmp_path / "out" / "cold_start.parquet").to_pandas()
    assert len(table) == 3 * 2 * 36
    np.testing.assert_allclose(table[(table.kind == "own") & (table.records == 8)]["rmse"].mean(), own[2])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "cold_start.parquet", "cold_start.json", "cold_start.pdf", "cold_start.png", "cold_start.svg",
    }  # fmt: skip


def test_nobody_of_the_run_is_among_them(run: Run) -> None:
    found: Finished = open_run(run.path)
    federation = strangers(found, 8, None)
    members = load(found.config, seed_key(found.config.seed)).users
    assert len(members) == 4
    assert not set(members) & set(federation.users)
    assert all(len(rows) >= 8 for rows in federation.train)
    assert strangers(found, 8, 3).users == federation.users[:3]


def test_people_held_out_are_there_also_where_all_take_part(tiny: Tiny, tmp_path: Path) -> None:
    data = {"name": "rated", "users": None, "held_out": 5, "min_train": 8}
    made = simulate(tiny(method="fedavg-finetune", rounds=1, data=data, task={"name": "rating"}), tmp_path / "all")
    assert len(strangers(open_run(made.path), 8, None).users) == 5


def test_whose_records_a_change_brought_in_is_nobody_new(tiny: Tiny, tmp_path: Path) -> None:
    data = {"name": "rated", "users": 4, "drift": 0.5, "min_train": 8}
    made = simulate(tiny(method="fedavg-finetune", rounds=1, data=data, task={"name": "rating"}), tmp_path / "changed")
    found = open_run(made.path)
    federation, new = load(found.config, seed_key(found.config.seed)), strangers(found, 8, None)
    held = {record.id for part in (federation.train, federation.test) for rows in part for record in rows}
    assert len(new.users) == 40 - 4 - 4
    assert not held & {record.id for part in (new.train, new.test) for rows in part for record in rows}
    assert all(record.id.startswith(user) for user, rows in zip(new.users, new.train, strict=True) for record in rows)


def test_what_cannot_be_measured_is_refused(run: Run, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nobody is left: the run had 4 of 40 people, and no other has 99 training"):
        cold_start(run.path, tmp_path / "out", counts=(0, 99))
    with pytest.raises(ConfigError, match="expected numbers from 0 on"):
        cold_start(run.path, tmp_path / "out", counts=(-1,))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(RunDirectoryError, match="exists already"):
        cold_start(run.path, tmp_path / "out")
    fixed = simulate(
        tiny(method="fedavg", rounds=1, data={"name": "rated", "users": 4}, task={"name": "rating"}), tmp_path / "fixed"
    )
    with pytest.raises(ConfigError, match=r"keeps nothing personal; say --groups head"):
        cold_start(fixed.path, tmp_path / "new", counts=(0, 2))
    assert cold_start(fixed.path, tmp_path / "new", counts=(0, 2), groups=("head",)).people > 30
