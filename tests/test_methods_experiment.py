"""The comparison of all methods: its statistics, and its command on made-up people."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from scipy import stats

from conftest import SECRET
from fedpers import simulation
from fedpers.errors import DataError, PrivacyRefusal
from fedpers.evaluation.comparison import Score, Scores, against, by_person, holm, reading
from fedpers.experiment import method_plan, prepare
from fedpers.figures.methods import Estimate, Panel, forest
from fedpers.registry import names
from fedpers.run_directory import RunDirectory

HERE = Path(__file__).parents[1] / "experiments" / "methods"
sys.path.insert(0, str(HERE))
import grid  # noqa: E402
import run as command  # noqa: E402

TINY = grid.SIZES["tiny"]
PEOPLE = [f"p{number:03d}" for number in range(60)]


def scores(values: np.ndarray, people: list[str] = PEOPLE, seed: int = 0) -> Scores:
    return {seed: {person: Score(float(value), 20) for person, value in zip(people, values, strict=True)}}


# Statistics


def test_holm_is_the_step_down_procedure() -> None:
    """Against the definition: go up the sorted p-values, and stop at the first that its own Bonferroni keeps."""
    draw = np.random.default_rng(0)
    for _ in range(50):
        p = draw.choice([*draw.uniform(0, 0.2, 6), 0.01, 0.01, 1.0], size=8)
        corrected = holm(p.tolist())
        for level in (0.01, 0.05, 0.2, 0.6):
            rejected: set[int] = set()
            for place, index in enumerate(np.argsort(p, kind="stable")):
                if p[index] * (len(p) - place) >= level:
                    break
                rejected.add(int(index))
            assert {i for i, one in enumerate(corrected) if one < level} == rejected
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    with pytest.raises(DataError, match="between 0 and 1"):
        holm([0.1, math.nan])


def test_the_detectable_difference_is_found_in_four_of_five_experiments() -> None:
    """Simulated: with the true gain at the stated size, the paired t test at level / m rejects with 80% power."""
    draw, methods, found, tried = np.random.default_rng(1), 5, 0, 400
    base = draw.normal(0, 0.05, len(PEOPLE))
    others = {f"m{i}": scores(draw.normal(0, 0.05, len(PEOPLE))) for i in range(methods - 1)}
    versus = against({"new": scores(base), **others}, scores(np.zeros(len(PEOPLE))))["new"]
    assert versus.detectable is not None
    z = stats.norm.ppf(1 - 0.05 / methods / 2) + stats.norm.ppf(0.8)
    assert versus.detectable == pytest.approx(z * base.std(ddof=1) / math.sqrt(len(PEOPLE)))
    for _ in range(tried):
        gains = draw.normal(versus.detectable, base.std(ddof=1), len(PEOPLE))
        found += stats.ttest_1samp(gains, 0).pvalue < 0.05 / methods
    assert 0.72 < found / tried < 0.86


def test_a_person_counts_once_and_verdicts_need_every_seed() -> None:
    draw = np.random.default_rng(2)
    reference = {seed: scores(draw.uniform(0.4, 0.6, 60), seed=seed)[seed] for seed in range(2)}

    def shifted(*gains: float) -> Scores:
        return {
            seed: {p: Score(one.value + gains[seed] + draw.normal(0, 0.01), 20) for p, one in reference[seed].items()}
            for seed in range(2)
        }

    methods = {"up": shifted(0.05, 0.05), "down": shifted(-0.05, -0.05), "torn": shifted(0.15, -0.05)}
    found = against({**methods, "same": reference}, reference)
    verdicts = {name: one.verdict for name, one in found.items()}
    none = "no difference found"
    assert verdicts == {"up": "better", "down": "worse", "torn": none, "same": none}
    assert found["torn"].p_corrected < 0.05  # the test over people alone would have called it better
    assert found["same"].detectable is None
    assert found["up"].p_value == stats.wilcoxon(
        np.round(by_person(methods["up"])[1] - by_person(reference)[1], 12), zero_method="pratt"
    ).pvalue  # fmt: skip
    said = reading(found, "fedavg")
    assert said.startswith("Of 4 methods held against fedavg, 1 better (up) and 1 worse (down); for 2 no difference")
    assert reading({"same": found["same"]}, "fedavg") == "None of 1 methods could be told apart from fedavg."
    people, values, _ = by_person({0: {"a": Score(1.0, 9), "b": Score(0.0, 9)}, 1: {"a": Score(0.0, 9)}})
    assert (people, values.tolist()) == (["a", "b"], [0.5, 0.0])


def test_other_people_or_records_are_not_compared() -> None:
    reference = scores(np.full(60, 0.5))
    for other in (
        scores(np.full(60, 0.5), [*PEOPLE[1:], "stranger"]),
        scores(np.full(60, 0.5), seed=1),
        {0: {person: Score(0.5, 19) for person in PEOPLE}},
    ):
        with pytest.raises(DataError, match="not measured on the people"):
            against({"other": other}, reference)


@pytest.mark.pictures
def test_the_picture_has_a_row_for_everyone(tmp_path: Path) -> None:
    rows = {"fedavg": Estimate(0.5, 0.4, 0.6, None), "ditto": Estimate(0.6, 0.5, 0.7, "better")}
    panels = [
        Panel("no privacy", {**rows, "flora": Estimate(0.4, 0.3, 0.5, "worse")}, {"fedavg": 0.5, "local": 0.45}, []),
        Panel("user-level", rows, {"fedavg": 0.5, "zero_shot": 0.4}, ["flora"]),
    ]
    written = forest(panels, tmp_path, "title")
    assert [path.name for path in written] == ["methods.png", "methods.svg", "methods.pdf"]
    assert all(path.stat().st_size > 5000 for path in written)
    again = forest(panels, tmp_path / "again", "title")
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in again]
    assert forest([], tmp_path / "none", "title") == []


# What is run


def test_every_method_gets_as_many_settings_and_only_its_own_options() -> None:
    for name in names("methods"):
        plan = method_plan(name, grid.configure(TINY, "unused", name))
        tried = grid.settings(plan)
        configs = [grid.configure(TINY, "unused", name, setting=one, development=True) for one in tried]
        assert len({config.model_dump_json() for config in configs}) == 6, name
        for config in configs:
            assert config.data.people == "development"
            assert set(config.options) <= set(plan.method.options)


def test_passes_count_what_clients_do() -> None:
    def counted(name: str) -> float:
        config = grid.configure(TINY, "unused", name)
        return grid.passes(method_plan(name, config), config)

    rounds = TINY.rounds
    assert counted("fedavg") == counted("local") == rounds  # as much at home as in all rounds
    assert counted("fedavg-finetune") == counted("ditto") == counted("fedrep") == 2 * rounds
    assert counted("per-fedavg") == 3 * rounds  # two gradients a step, then at home
    assert counted("rolora") == rounds  # one of two phases in each round


def test_the_search_meets_the_noise_that_the_federation_will() -> None:
    """Noise on the mean update, deviation times clip over the clients, is the same for 41 and for 64 people."""
    size = grid.SIZES["default"]
    planned = grid.configure(size, "unused", "fedavg", privacy=grid.user_level(8, 0.1))
    noise = grid.resolve(planned, method_plan("fedavg", planned), 64).noise_multiplier
    section = grid.rehearsal(size, "unused", 8, 0.1, 64, 41)
    assert section["noise_multiplier"] / 41 == pytest.approx(noise / 64)
    assert section["clip"] == 0.1


def test_refused_methods_are_listed_with_the_reason_that_a_run_gives() -> None:
    refused = grid.refusals(TINY, "unused", names("methods"), 8)
    assert refused["none"] == {}
    assert {"centralized", "flora", "fedex-lora"} <= refused["user-eps-8"].keys()
    assert not {"fedavg", "local", "ditto"} & refused["user-eps-8"].keys()
    for method, reason in refused["user-eps-8"].items():
        with pytest.raises(PrivacyRefusal) as refusal:
            prepare(grid.configure(TINY, "unused", method, privacy=grid.user_level(8, 0.1)))
        assert str(refusal.value) == reason


# The command


Call = Callable[..., str]


@pytest.fixture(scope="module")
def call(random_tiny_bert: Path, feature_cache: Path) -> Iterator[Call]:
    """Run the command in this process; returns table.md."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPERS_CACHE", str(feature_cache))
        for figure in ("learning_curve", "per_user_gain"):  # of single runs; other tests look at them
            patch.setattr(simulation, figure, lambda *given, **options: None)

        def run(out: Path) -> str:
            arguments = ["--size", "tiny", "--seeds", "1", "--methods", "fedavg,local,flora", "--processes", "1"]
            given = ["run.py", *arguments, "--backbone", str(random_tiny_bert), "--out", str(out), "--secret", SECRET]
            patch.setattr(sys, "argv", given)
            command.main()
            return (out / "table.md").read_text("utf-8")

        yield run


@pytest.fixture(scope="module")
def finished(call: Call, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison") / "out"
    call(out)
    return out


def timeless(out: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k != "seconds"} for row in pq.read_table(out / "methods.parquet").to_pylist()
    ]


def test_the_command_writes_table_figure_and_refusals(finished: Path) -> None:
    rows = {(row["level"], row["method"]): row for row in timeless(finished)}
    assert rows.keys() == {(level, m) for level in TINY.levels for m in ("fedavg", "local", "flora")} - {
        ("user-eps-8", "flora")
    }  # fmt: skip
    private = rows["user-eps-8", "fedavg"]
    assert 0 < private["epsilon"] <= 8
    assert math.isinf(rows["none", "fedavg"]["epsilon"])
    assert rows["user-eps-8", "local"]["epsilon"] == 0
    assert private["noise_to_update_head"] > 0
    assert private["bytes_up"] > 0
    assert rows["none", "flora"]["bytes_down"] > rows["none", "flora"]["bytes_up"]  # a whole matrix goes down
    refused = json.loads((finished / "refused.json").read_text("utf-8"))["user-eps-8"]
    text = (finished / "table.md").read_text("utf-8")
    assert list(refused) == ["flora"]
    assert refused["flora"] in text
    assert "user-level (ε = 8.00, δ = 0.001), trusted server: " in text
    assert (finished / "figures" / "methods.svg").exists()


def test_the_table_is_what_the_runs_say(finished: Path) -> None:
    """Own accuracy, gain and test of one method, computed again from the runs' own files."""
    found = {}
    for method in ("fedavg", "local"):
        users = pq.read_table(finished / "runs" / f"{method}-none-seed0" / "users.parquet").to_pylist()
        found[method] = np.array([row["accuracy"] for row in users if row["kind"] == "own"])
    row = next(row for row in timeless(finished) if (row["level"], row["method"]) == ("none", "local"))
    assert row["own"] == pytest.approx(found["local"].mean())
    assert row["gain_over_fedavg"] == pytest.approx((found["local"] - found["fedavg"]).mean())
    p = stats.wilcoxon(np.round(found["local"] - found["fedavg"], 12), zero_method="pratt").pvalue
    assert row["p_fedavg"] == pytest.approx(p)


def test_choices_are_made_on_development_people_before_any_federation(finished: Path) -> None:
    chosen = json.loads((finished / "chosen.json").read_text("utf-8"))
    searched = sorted((finished / "search").iterdir())
    for path in searched:
        assert yaml.safe_load((path / "config.yaml").read_text("utf-8"))["data"]["people"] == "development"
    members = prepare(grid.configure(TINY, "unused", "fedavg")).examples.users
    held = [finished / "chosen.json", *(f for path in searched for f in path.rglob("*") if f.is_file())]
    assert not [file for file in held for member in members if member.encode() in file.read_bytes()]
    decided = (finished / "chosen.json").stat().st_mtime_ns
    assert all((path / "config.yaml").stat().st_mtime_ns > decided for path in (finished / "runs").iterdir())
    for method, one in chosen.items():
        ranks = []
        for number in range(6):
            users = pq.read_table(finished / "search" / f"{method}-setting{number}" / "users.parquet").to_pylist()
            ranks.append(np.mean([row["mrr"] for row in users if row["kind"] == "own"]))
        best = one["tried"]["settings"][int(np.argmax(ranks))]
        assert one["setting"] == best["setting"]
        run = yaml.safe_load((finished / "runs" / f"{method}-none-seed0" / "config.yaml").read_text("utf-8"))
        family = "personal" if method == "local" else "local"
        base = grid.PERSONAL if method == "local" else grid.LOCAL
        factor = best["setting"]["home" if method == "local" else "step"]
        assert run[family]["lr"]["head"] == pytest.approx(base["head"] * factor)
    assert chosen["local"]["clip"] == {}  # nothing leaves, so nothing is clipped


def test_a_killed_command_continues_to_the_same_table(
    finished: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies in the second run of the comparison, between two rounds; the search was done before."""
    out = tmp_path / "out"
    shutil.copytree(finished / "search", out / "search")
    commit, runs = RunDirectory.commit, []

    def dying(self: RunDirectory, *arguments: Any) -> None:
        commit(self, *arguments)
        runs.append(self.path)
        if len({path for path in runs if path.parent.name == "runs"}) == 2:
            raise RuntimeError("killed")

    monkeypatch.setattr(RunDirectory, "commit", dying)
    with pytest.raises(RuntimeError, match="killed"):
        call(out)
    monkeypatch.setattr(RunDirectory, "commit", commit)
    assert not (out / "table.md").exists()
    begun = [path for path in (out / "runs").iterdir() if not (path / "summary.json").exists()]
    assert len(begun) == 1
    call(out)
    assert timeless(out) == timeless(finished)
    assert (out / "chosen.json").read_text("utf-8") == (finished / "chosen.json").read_text("utf-8")


@pytest.mark.slow
def test_workers_end_with_the_command(random_tiny_bert: Path, feature_cache: Path, tmp_path: Path) -> None:
    """Killed without a chance to clean up, the command leaves no worker behind that writes into its runs."""
    arguments = ["--size", "tiny", "--methods", "fedavg", "--backbone", str(random_tiny_bert), "--out", str(tmp_path)]
    environment = {**os.environ, "FEDPERS_CACHE": str(feature_cache)}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "run.py"), *arguments], env=environment, stdout=subprocess.DEVNULL
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not list(tmp_path.glob("search/*/config.yaml")):  # in the middle of a run
        assert process.poll() is None
        time.sleep(0.2)
    workers = [int(one) for one in children.read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workers) >= 2
    deadline = time.monotonic() + 60
    while any(_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
