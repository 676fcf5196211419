"""The figures of a sweep beside its frontier, drawn of hand-made tables, and the statistics that are in them."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray

from conftest import draw_only
from fedpers.audit.bounds import Finding
from fedpers.audit.stored import read_findings
from fedpers.errors import DataError, RunDirectoryError
from fedpers.evaluation.crossed import Crossed
from fedpers.evaluation.per_user import pair
from fedpers.evaluation.statistics import null_band, sign_flip_band
from fedpers.evaluation.tails import FEW, MANY, decile, decile_of_equals, gap, resampled, thirds
from fedpers.figures.audit import claimed_and_found_of_runs
from fedpers.figures.sweep_cost import cost
from fedpers.figures.sweep_curves import learning_curves
from fedpers.figures.sweep_facets import MOST_MARKS, sample
from fedpers.figures.sweep_gains import sorted_gains
from fedpers.figures.sweep_records import gain_by_records, groups
from fedpers.figures.sweep_tail import worst_and_gap
from fedpers.sweep.pictures import AUDITS, draw
from fedpers.sweep.results import FIXED, RESULTS, USERS

Tables = tuple[pa.Table, pa.Table]
LEVELS = {"inf": ("none", "none", None), "clip": ("user", "user-central", 1e-3), "8": ("user", "user-central", 1e-3)}
ALL: tuple[Callable[[pa.Table, pa.Table, Path], list[Path]], ...] = (
    sorted_gains, worst_and_gap, gain_by_records, cost,
)  # fmt: skip


def tables(
    methods: Sequence[str] = ("fedavg", "fedper", "ditto"),
    levels: Sequence[str] = ("inf", "clip", "8", "1"),
    seeds: int = 2,
    users: int = 80,
    metric: str = "accuracy",
    records: int = 40,
) -> Tables:
    """Make up a sweep: noise costs, personal models win, and those with few training records gain most from others."""
    rng, runs, rows = np.random.default_rng(0), [], []
    test, train = rng.integers(records // 3, records, users), np.round(np.exp(rng.normal(3, 0.8, users))) + 1
    skill = rng.normal(0, 0.06, users)
    higher = metric == "accuracy"

    def measure(mean: NDArray[np.float64] | float) -> NDArray[np.float64]:
        found = rng.binomial(test, np.clip(mean + skill, 0.02, 0.98)) / test
        return found if higher else 1.5 - found

    def add(run: dict[str, Any], kinds: dict[str, NDArray[np.float64]]) -> None:
        runs.append(
            {"data": "chitchat", "metric": metric, "higher_is_better": higher, "n_users": users, "n_rounds": 10} | run
        )
        which = {name: run.get(name) for name in ("hash", "baseline", "method", "seed", "privacy_epsilon")}
        for kind, values in kinds.items():
            difference = np.round((kinds["own"] - values) * test).astype(int)
            for user in range(users):
                both = int(min(3, test[user] - abs(difference[user])) // 2)  # right under one only, and the reverse
                counted = kind != "local" and higher
                rows.append(which | {
                    "data": "chitchat", "kind": kind, "person": user, "user": user, metric: float(values[user]),
                    "test_records": int(test[user]), "train_records": int(train[user]),
                    "only_own": (both + max(0, difference[user])) * (kind != "own") if counted else None,
                    "only_other": (both + max(0, -difference[user])) * (kind != "own") if counted else None,
                })  # fmt: skip

    home = {seed: measure(0.3 + 0.05 * np.log(train / train.mean())) for seed in range(seeds)}
    for (number, method), level, seed in product(enumerate(methods), levels, range(seeds)):
        unit, trust, delta = LEVELS.get(level, LEVELS["8"])
        epsilon = math.inf if level in {"inf", "clip"} else float(level)
        price = {"inf": 0.0, "clip": 0.02}.get(level, 0.12 / math.sqrt(epsilon) if math.isfinite(epsilon) else 0.0)
        shared = measure(0.42 - price)
        own = shared if method == "fedavg" else measure(0.45 - price / 2 + 0.03 * number)
        add(
            {
                "hash": f"{method} {level} {seed}", "baseline": f"local {seed}", "method": method, "seed": seed,
                "privacy_epsilon": level, "unit": unit, "trust": trust, "delta": delta, "epsilon": epsilon,
                "bytes_up": (number + 1) * 3_000_000 + seed * 100_000, "bytes_down": (number + 1) * 3_000_000,
                "seconds": 20.0 * (number + 1) + 3 * seed, "claim": "made up",
            },
            {"own": own, "global": shared, "local": home[seed], "zero_shot": measure(0.2)},
        )  # fmt: skip
    for seed in range(seeds):
        name = f"local {seed}"
        run = {
            "hash": name, "baseline": name, "method": "local", "seed": seed, "unit": "none", "trust": "none",
            "epsilon": 0.0, "bytes_up": 0, "bytes_down": 0, "seconds": 6.0, "n_rounds": 0, "claim": "made up",
        }  # fmt: skip
        add(run, {"own": home[seed]})
    which = {"hash": pa.string(), "baseline": pa.string(), "data": pa.string(), "method": pa.string()}
    which |= {"seed": pa.int64(), "privacy_epsilon": pa.string()}
    counts = dict.fromkeys(("person", "user", "test_records", "train_records", "only_own", "only_other"), pa.int64())
    return (
        pa.Table.from_pylist(runs, pa.schema(list((which | FIXED).items()))),
        pa.Table.from_pylist(
            rows, pa.schema(list((which | counts | {"kind": pa.string(), metric: pa.float64()}).items()))
        ),
    )


def rounds(results: pa.Table) -> dict[str, pa.Table]:
    found = {}
    for number, run in enumerate(results["hash"].to_pylist()):
        x = np.arange(1, 11)
        values = [0.2 + 0.02 * number * (1 - math.exp(-one / 4)) if one % 2 == 0 else None for one in x.tolist()]
        columns = {"round": x, "own_accuracy": pa.nulls(10, pa.float64())}
        found[run] = pa.table(columns | {"global_accuracy": pa.array(values, pa.float64())})
    return found


def finding(**changes: Any) -> Finding:
    fields = {
        "name": "one-run", "what": "shared model", "unit": "user", "claimed": 8.0, "delta": 1e-3, "empirical": 1.2,
        "ceiling": 4.5, "kind": "bound", "verdict": "powerless", "detail": "made up", "numbers": {"tpr": 0.5},
    }  # fmt: skip
    return Finding(**fields | changes)


# --- bands ------------------------------------------------------------------------------------------------------------


def inside(curve: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]) -> float:
    """Share of ranks at which a sorted curve lies in its band, whose edges are kept in single precision."""
    ordered = np.sort(curve)
    return float(((ordered >= low - 1e-6) & (ordered <= high + 1e-6)).mean())


def test_noise_lies_in_the_band_of_sign_flips_and_an_effect_leaves_it() -> None:
    rng, noise, effect = np.random.default_rng(0), [], []
    for _ in range(40):
        spread = rng.uniform(0.02, 0.2, 150)
        gains = rng.normal(0, spread)
        noise.append(inside(gains, *sign_flip_band(gains, rng)))
        shifted = gains + 0.1
        effect.append(inside(shifted, *sign_flip_band(shifted, rng)))
    assert 0.92 < np.mean(noise) < 0.99
    assert np.mean(effect) < 0.3


def test_noise_lies_in_the_band_of_coin_flips_and_an_effect_leaves_it() -> None:
    rng, noise, effect = np.random.default_rng(0), [], []
    for _ in range(40):
        records = rng.integers(10, 60, 150)
        discordant = rng.binomial(records, 0.4)
        low, high = null_band(records, discordant, rng)
        noise.append(inside((2 * rng.binomial(discordant, 0.5) - discordant) / records, low, high))
        effect.append(inside((2 * rng.binomial(discordant, 0.7) - discordant) / records, low, high))
    assert 0.92 < np.mean(noise) < 0.99
    assert np.mean(effect) < 0.4


def test_flipped_signs_make_a_symmetric_band_and_leave_ties_alone() -> None:
    gains = np.array([0.3, 0.0, -0.1, 0.0, 0.2])
    low, high = sign_flip_band(gains, np.random.default_rng(0))
    np.testing.assert_allclose(low, -high[::-1], atol=1e-6)
    assert (low[2], high[2]) == (pytest.approx(-0.1), pytest.approx(0.1))  # of five the middle one is 0.1 or a tie
    assert [band.tolist() for band in sign_flip_band(np.zeros(3), np.random.default_rng(0))] == [[0.0] * 3] * 2


def test_a_baseline_without_counts_is_paired_all_the_same() -> None:
    _, users = tables(methods=["fedper"], levels=["8"], seeds=1)
    both = pair(users.filter(pc.equal(users["hash"], "fedper 8 0")), "local")
    assert both is not None
    assert both.only_own is None
    wrong = users.set_column(users.column_names.index("only_own"), "only_own", pa.array([0] * users.num_rows))
    with pytest.raises(DataError, match="add up"):
        pair(wrong.filter(pc.equal(wrong["hash"], "fedper 8 0")), "global")


# --- tails ------------------------------------------------------------------------------------------------------------


def test_the_worst_decile_by_hand() -> None:
    values = np.array([np.arange(20.0), np.full(20, np.nan)])
    assert decile(values) == 0.5
    assert decile(values, higher_is_better=False) == 18.5
    values[1, :10] = 4.0
    assert decile(values) == (0.5 + 4.0) / 2
    assert math.isnan(decile(np.full((2, 3), np.nan)))


def test_equals_have_a_worst_decile_far_below_their_mean() -> None:
    rng = np.random.default_rng(0)
    records = np.full((2, 500), 20.0)
    records[1, 400:] = np.nan
    chance = decile_of_equals(0.5, records, rng)
    measured = decile(rng.binomial(20, 0.5, (2, 500)) / 20)
    assert chance == pytest.approx(measured, abs=0.02)
    assert chance < 0.35
    assert decile_of_equals(1.0, records, rng) == 1.0
    served_badly = np.concatenate([np.full(450, 0.55), np.full(50, 0.1)])  # the same mean, or about
    assert decile(rng.binomial(20, served_badly, (2, 500)) / 20) < chance - 0.1  # not what chance makes


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], [FEW, FEW, 0, 0, MANY, MANY]),
        ([5, 5, 5, 5], [0, 0, 0, 0]),
        ([3, 9, 9, 9, 9, 9], [FEW, MANY, MANY, MANY, MANY, MANY]),  # most are at the largest number that is read
        ([1, 1, 1, 1, 1, 8], [FEW, FEW, FEW, FEW, FEW, MANY]),
        ([2, 2, 2, 2, 7, 9], [FEW, FEW, FEW, FEW, MANY, MANY]),
    ],
)
def test_thirds_never_part_equals(train: list[int], expected: list[int]) -> None:
    assert thirds(np.array([train], dtype=float))[0].tolist() == expected


def test_the_gap_has_the_sign_of_who_is_better_off() -> None:
    values, marks = np.array([[0.2, 0.4, 0.9, 0.7]]), np.array([[FEW, FEW, MANY, MANY]])
    assert gap(values, marks) == pytest.approx(0.5)
    assert gap(values, marks, higher_is_better=False) == pytest.approx(-0.5)
    assert math.isnan(gap(values, np.zeros((1, 4), dtype=np.int64)))


def test_an_interval_of_a_gap_covers_and_one_without_seeds_does_not() -> None:
    rng, covered, without = np.random.default_rng(0), [], []
    marks = np.tile(np.repeat([FEW, MANY], 20), (6, 1)).astype(np.int64)
    for _ in range(30):
        values = rng.normal(0, 0.05, (6, 40)) + rng.normal(0, 0.2, (6, 1)) * (marks == MANY)  # no gap but by seed
        _, low, high = resampled(gap, values, marks, rng)
        covered.append(low <= 0 <= high)
        _, low, high = resampled(gap, values.mean(axis=0, keepdims=True), marks[:1], rng)
        without.append(low <= 0 <= high)
    assert np.mean(covered) > 0.8
    assert np.mean(without) < 0.6


# --- gain by records --------------------------------------------------------------------------------------------------


def test_groups_hold_everybody_once_and_part_no_equals() -> None:
    rng = np.random.default_rng(0)
    records = rng.integers(1, 30, 200).astype(float)
    gains = Crossed(np.array([0, 1]), np.arange(200), np.tile(records / 100, (2, 1)))
    found = list(groups(records, gains))
    assert sum(size for _, size, _ in found) == 200
    assert len(found) == 6
    middles = [middle for middle, _, _ in found]
    assert middles == sorted(middles)
    assert all(mean.low <= middle / 100 + 0.02 and mean.high >= middle / 100 - 0.02 for middle, _, mean in found)
    [(middle, size, mean)] = groups(np.full(200, 7.0), gains)
    assert (middle, size) == (7.0, 200)
    assert mean.mean == pytest.approx(gains.mean)


def test_of_very_many_users_a_sample_is_drawn() -> None:
    rng = np.random.default_rng(0)
    assert sample(MOST_MARKS, rng).tolist() == list(range(MOST_MARKS))
    some = sample(MOST_MARKS + 1, rng)
    assert (len(set(some.tolist())), some.max() <= MOST_MARKS) == (MOST_MARKS, True)


# --- drawn ------------------------------------------------------------------------------------------------------------


def assert_drawn(paths: list[Path], names: Sequence[str]) -> None:
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in names for kind in ("png", "svg", "pdf")]
    for path in paths[::3]:
        pixels = imread(path)
        assert 0.005 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.6


NAMES = ["gains_over_global", "gains_over_local", "worst_and_gap", "gain_by_records", "cost"]


def all_drawn(folder: Path, metric: str) -> list[Path]:
    found = tables(methods=["fedavg", "fedper"], levels=["inf", "8"], users=40, metric=metric)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that the font lacks is a warning
        paths = [path for figure in ALL for path in figure(*found, folder)]
    assert_drawn(paths, NAMES)
    return paths


@pytest.mark.pictures
def test_all_are_drawn_with_the_same_bytes_twice_and_every_letter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = all_drawn(tmp_path / "one", "accuracy")
    draw_only(monkeypatch, "png")  # test_figures.py compares the bytes of the other kinds, which are saved alike
    second = all_drawn(tmp_path / "two", "accuracy")
    assert [one.read_bytes() for one in first[::3]] == [two.read_bytes() for two in second[::3]]


@pytest.mark.pictures("png")
def test_an_error_is_drawn_as_well(tmp_path: Path) -> None:
    all_drawn(tmp_path, "rmse")


@pytest.mark.pictures("png")
def test_a_method_without_personal_state_is_compared_with_local_alone(tmp_path: Path) -> None:
    found = tables(methods=["fedavg"], levels=["8"], seeds=1)
    assert_drawn(sorted_gains(*found, tmp_path), ["gains_over_local"])


@pytest.mark.parametrize("users", [pytest.param(1, marks=pytest.mark.pictures("png")), 14])
def test_few_users(tmp_path: Path, users: int) -> None:
    found = tables(methods=["fedper"], levels=["inf", "8"], users=users)
    for figure in ALL:
        assert figure(*found, tmp_path)


def test_nobody_with_enough_test_records_is_no_picture(tmp_path: Path) -> None:
    found = tables(methods=["fedper"], levels=["8"], records=9)
    assert sorted_gains(*found, tmp_path) == worst_and_gap(*found, tmp_path) == []


@pytest.mark.pictures("png")
def test_a_method_that_was_not_run_at_a_level_leaves_a_hole(tmp_path: Path) -> None:
    results, users = tables(methods=["fedper", "ditto"], levels=["8", "1"], seeds=1)
    left = pc.invert(pc.equal(results["hash"], "ditto 1 0"))
    assert_drawn(sorted_gains(results.filter(left), users, tmp_path)[:3], ["gains_over_global"])


@pytest.mark.pictures
def test_curves_are_drawn_where_all_seeds_have_one(tmp_path: Path) -> None:
    results, users = tables(levels=["8", "1"])
    curves = rounds(results)
    assert_drawn(learning_curves(results, users, curves, tmp_path), ["learning_curves"])
    assert learning_curves(results, users, {}, tmp_path) == []
    lacking = {run: table for run, table in curves.items() if not run.endswith(" 1")}
    assert learning_curves(results, users, lacking, tmp_path) == []


@pytest.mark.pictures
def test_audits_of_several_runs_are_drawn_from_what_was_stored(tmp_path: Path) -> None:
    findings = [finding(), finding(claimed=math.inf, ceiling=math.nan, numbers={"x": math.nan}), finding(kind="attack")]
    (tmp_path / "audit.json").write_text(json.dumps({"findings": [one.to_dict() for one in findings], "seconds": 1.0}))
    stored = read_findings(tmp_path / "audit.json")
    assert [one.to_dict() for one in stored] == [one.to_dict() for one in findings]
    assert stored[1].claimed == math.inf
    assert math.isnan(stored[1].ceiling)
    assert_drawn(claimed_and_found_of_runs({"a": stored, "b": stored[:1]}, tmp_path, "made up"), ["audit"])
    assert claimed_and_found_of_runs({"a": [finding(kind="estimate")]}, tmp_path, "made up") == []
    (tmp_path / "audit.json").write_text('{"findings": [{"name": "old"}]}')
    with pytest.raises(RunDirectoryError, match="another version"):
        read_findings(tmp_path / "audit.json")


def test_a_sweep_draws_rounds_and_audits_that_lie_there(tmp_path: Path) -> None:
    results, users = tables(methods=["fedper"], levels=["8"])
    for table, name in ((results, RESULTS), (users, USERS)):
        pq.write_table(table, tmp_path / name)
    plain = {path.stem for path in draw(tmp_path)}
    for run, table in rounds(results).items():
        (tmp_path / "cells" / run).mkdir(parents=True)
        pq.write_table(table, tmp_path / "cells" / run / "rounds.parquet")
    folder = tmp_path / AUDITS / "fedper 8 1"
    folder.mkdir(parents=True)
    (folder / "audit.json").write_text(json.dumps({"findings": [finding().to_dict()]}))
    assert {path.stem for path in draw(tmp_path)} - plain == {"learning_curves", "audit"}
    assert plain >= {
        "sweep_frontier",
        "gains_over_global",
        "gains_over_local",
        "worst_and_gap",
        "gain_by_records",
        "cost",
    }
