import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedpers.errors import DataError, RunDirectoryError
from fedpers.evaluation.per_user import KINDS, pair, summarize, users_table, write_table
from fedpers.evaluation.statistics import (
    compare,
    mean_interval,
    minimum_detectable_effect,
    null_band,
    signed_rank,
    worst_decile,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def simulated(chances: dict[str, float], users: int = 60, seeds: Sequence[int] = (0,), records: int = 40) -> pa.Table:
    """Users whose records are right with the given chance per kind, independently; copies `swap` if chance is -1."""
    draw, rows = rng(5), []
    for seed in seeds:
        for user in range(users):
            n = int(draw.integers(records // 2, records))
            right = {kind: draw.random(n) < chance for kind, chance in chances.items()}
            if chances.get("swap") == -1:
                right["swap"] = right["own"]
            rows += [row(seed, user, kind, hits, right.get("own", hits)) for kind, hits in right.items()]
    return users_table(rows)


def row(seed: int, user: int, kind: str, hits: np.ndarray, own: np.ndarray) -> dict[str, Any]:
    return {
        "seed": seed,
        "user": user,
        "kind": kind,
        "test_records": hits.size,
        "train_records": 3 * hits.size,
        "accuracy": float(hits.mean()),
        "mrr": float(hits.mean() / 2 + 0.5),
        "loss": float(2 - hits.mean()),
        "only_own": int((own & ~hits).sum()),
        "only_other": int((hits & ~own).sum()),
    }


def test_the_interval_covers_the_true_mean() -> None:
    draw, covered = rng(1), 0
    for _ in range(200):
        low, high = mean_interval(draw.exponential(1.0, 60), draw)[1:]
        covered += low <= 1.0 <= high
    assert 0.87 <= covered / 200 <= 0.99


def test_seeds_are_a_factor_of_their_own() -> None:
    draw = rng(2)
    effects = draw.normal(0, 1, (8, 1)) + draw.normal(0, 0.1, (8, 50))
    one, crossed = mean_interval(effects[0], rng()), mean_interval(effects, rng())
    assert crossed.high - crossed.low > 5 * (one.high - one.low)
    assert crossed.mean == pytest.approx(effects.mean())
    assert mean_interval(effects[:1], rng()) == one == mean_interval(effects[0], rng())


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_interval_and_decile_lie_within_the_values(values: list[float]) -> None:
    mean, low, high = mean_interval(values, rng())
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert worst_decile(values) <= mean + 1e-9 <= worst_decile(values, higher_is_better=False) + 2e-9


def test_worst_decile_known_answers() -> None:
    assert worst_decile(np.arange(20)) == 0.5
    assert worst_decile(np.arange(20), higher_is_better=False) == 18.5
    assert worst_decile([3.0, 1.0]) == 1.0
    assert worst_decile([np.arange(10), np.arange(10) + 4]) == 2.0


def test_the_p_value_is_scipys_over_all_users() -> None:
    draw = rng(3)
    own, other = draw.integers(0, 20, 80) / 20, draw.integers(0, 18, 80) / 20
    found = compare(own, other, np.full(80, 3), None, None, rng())
    expected = stats.wilcoxon(np.round(own - other, 12), zero_method="pratt").pvalue
    assert found.p_value == pytest.approx(expected)
    assert (found.n_users, found.n_eligible, found.worst_decile_gain) == (80, 0, None)
    assert compare(own, own, np.full(80, 3), None, None, rng()).p_value == 1.0


@settings(max_examples=40, deadline=None)  # scipy takes its time
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=7).filter(any))
def test_few_people_are_counted_as_scipy_counts_them(gains: list[int]) -> None:
    """With ties and zeros, where scipy goes through all choices of signs, too."""
    expected = stats.wilcoxon(gains, zero_method="pratt").pvalue
    assert signed_rank(np.array(gains, dtype=float)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("people", [13, 14])
def test_where_counting_ends(people: int) -> None:
    gains = np.random.default_rng(people).normal(0.3, 1, people)
    assert signed_rank(gains) == pytest.approx(stats.wilcoxon(gains, zero_method="pratt").pvalue, rel=1e-12)


def test_rounding_dust_neither_helps_nor_harms() -> None:
    found = compare([0.1 + 0.2] * 12, [0.3] * 12, [10] * 12, [0] * 12, [0] * 12, rng())
    assert (found.helped, found.tied, found.harmed, found.p_value) == (0, 12, 0, 1.0)
    assert found.minimum_detectable_effect is None


def test_the_detectable_effect_is_detected_four_times_in_five() -> None:
    draw, n, sd = rng(4), 50, 0.2
    effect = minimum_detectable_effect(np.array([-sd, sd] * (n // 2)) * np.sqrt((n - 1) / n))
    assert effect == pytest.approx(2.8016 * sd / np.sqrt(n), rel=1e-3)
    assert effect is not None
    found = sum(float(stats.ttest_1samp(draw.normal(effect, sd, n), 0).pvalue) < 0.05 for _ in range(1000))
    assert 740 <= found <= 840


def test_lower_is_better_turns_the_gain_around() -> None:
    own, other, records = [1.0, 2.0, 2.5], [2.0, 2.0, 2.0], [10, 10, 10]
    up = compare(own, other, records, None, None, rng())
    down = compare(own, other, records, None, None, rng(), higher_is_better=False)
    assert down.mean_gain == -up.mean_gain
    assert (down.helped, down.tied, down.harmed) == (up.harmed, up.tied, up.helped) == (1, 1, 1)


def exchangeable(draw: np.random.Generator, users: int, lift: float = 0.0) -> tuple[np.ndarray, ...]:
    """Test records, only-own and only-other counts where a discordant record favours own with chance 1/2 + lift."""
    records = draw.integers(5, 40, users)
    discordant = draw.binomial(records, 0.3)
    wins = draw.binomial(discordant, 0.5 + lift)
    return records, wins, discordant - wins


def test_the_null_holds_when_own_and_other_are_exchangeable() -> None:
    draw, inside, banded = rng(6), [], []
    for _ in range(80):
        records, wins, losses = exchangeable(draw, 60)
        found = compare(wins / records, losses / records, records, wins, losses, draw)
        assert found.null_helped is not None
        assert found.null_worst_decile_gain is not None
        assert found.worst_decile_gain is not None
        inside.append(found.null_helped.low <= found.helped <= found.null_helped.high)
        low, high = null_band(records, wins + losses, draw)
        curve = np.sort((wins - losses) / records)
        banded.append(np.mean((low - 1e-6 <= curve) & (curve <= high + 1e-6)))
    assert np.mean(inside) >= 0.9
    assert np.mean(banded) >= 0.92


def test_a_real_effect_leaves_the_null() -> None:
    draw = rng(7)
    records, wins, losses = exchangeable(draw, 120, lift=0.25)
    found = compare(wins / records, losses / records, records, wins, losses, draw)
    assert found.null_helped is not None
    assert found.null_harmed is not None
    assert found.helped > found.null_helped.high
    assert found.harmed < found.null_harmed.low
    assert found.p_value < 0.001
    assert found.ci95[0] > 0
    assert found.n_eligible == (records >= 10).sum() == found.helped + found.tied + found.harmed


def test_the_null_has_its_closed_form() -> None:
    """One discordant record per user: helped is Binomial(users, 1/2), nobody ties."""
    users, ones, zeros = 100, np.ones(100), np.zeros(100)
    found = compare(np.full(users, 0.1), zeros, np.full(users, 10), ones, zeros, rng())
    assert found.null_helped is not None
    assert found.null_worst_decile_gain is not None
    assert found.null_helped.mean == pytest.approx(50, abs=0.5)
    expected = stats.binom.ppf([0.025, 0.975], users, 0.5)
    assert [found.null_helped.low, found.null_helped.high] == pytest.approx(expected, abs=1)
    assert found.null_worst_decile_gain.mean == pytest.approx(-0.1)


def test_numbers_go_to_json() -> None:
    records, wins, losses = exchangeable(rng(8), 30)
    found = compare(wins / records, losses / records, records, wins, losses, rng())
    json.dumps(asdict(found), allow_nan=False)
    assert type(found.helped) is float
    assert type(found.n_eligible) is int


@pytest.mark.parametrize(
    ("own", "other", "records", "only_own", "only_other"),
    [
        ([0.5], [0.5, 0.5], [10, 10], None, None),
        ([np.nan], [0.5], [10], None, None),
        ([], [], [], None, None),
        ([0.5], [0.5], [10], [11], [0]),
        ([0.5], [0.5], [10], [-1], [1]),
        ([0.5], [0.5], [10], [1], None),
    ],
)
def test_impossible_inputs_are_refused(own: Any, other: Any, records: Any, only_own: Any, only_other: Any) -> None:
    with pytest.raises(DataError):
        compare(own, other, records, only_own, only_other, rng())


def test_a_summary_is_complete_and_repeatable() -> None:
    table = simulated({"own": 0.6, "global": 0.5, "local": 0.5, "zero_shot": 0.3, "swap": 0.45})
    summary = summarize(table)
    assert summary == summarize(table)
    assert summary == json.loads(json.dumps(summary, allow_nan=False))
    assert list(summary["metrics"]) == list(KINDS)
    assert list(summary["comparisons"]) == list(KINDS[1:])
    assert summary["helped"] + summary["tied"] + summary["harmed"] == summary["comparisons"]["global"]["n_eligible"]
    assert summary["metrics"]["own"]["mean"] == pytest.approx(0.6, abs=0.05)
    for name in ("no training at all", "the shared model", "training at home alone", "another user's personal state"):
        assert f"The personal model beats {name}" in summary["reading"]
    assert "proves nothing" not in summary["reading"]


def test_one_comparison_has_the_same_numbers_wherever_it_is_made() -> None:
    """A figure compares one pair alone; it must not contradict the summary."""
    table = simulated({"own": 0.6, "global": 0.5, "local": 0.5})
    both = pair(table, "local")
    assert both is not None
    alone = compare(both.own, both.other, both.test_records, both.only_own, both.only_other, rng(0))
    assert summarize(table)["comparisons"]["local"] == asdict(alone) | {"ci95": list(alone.ci95)}


def test_a_gain_that_any_state_gives_is_not_personal() -> None:
    reading = summarize(simulated({"own": 0.6, "global": 0.4, "local": 0.6, "swap": -1}))["reading"]
    assert "beats the shared model" in reading
    assert "does not beat another user's personal state" in reading
    assert "not personal" in reading
    assert "federation did not help beyond training at home" in reading


def test_a_global_model_ruined_by_noise_is_named() -> None:
    summary = summarize(simulated({"own": 0.5, "global": 0.1, "zero_shot": 0.5}))
    assert (
        "the shared model is on average worse than no training at all (noise or over-fitting)"
        in summary["reading"].lower()
    )
    assert "beating it proves nothing" in summary["reading"]
    assert "does not beat no training at all" in summary["reading"]


def test_a_worse_personal_model_is_called_worse() -> None:
    reading = summarize(simulated({"own": 0.3, "global": 0.6}))["reading"]
    assert "is worse than the shared model" in reading


def test_missing_kinds_leave_nothing_invented() -> None:
    without_global = summarize(simulated({"own": 0.5, "local": 0.5}))
    assert (without_global["helped"], without_global["p_value"]) == (None, None)
    assert set(without_global["comparisons"]) == {"local"}
    alone = summarize(simulated({"global": 0.5}))
    assert alone["comparisons"] == {}
    assert "nothing can be compared" in alone["reading"]
    few = summarize(simulated({"own": 0.5, "global": 0.5}, records=8))
    assert few["metrics"]["own"]["worst_decile"] is None
    assert few["comparisons"]["global"]["null_helped"] is None
    nobody = "Nobody has 10 test records, so nobody is counted as helped or harmed."
    assert nobody in few["reading"]
    assert nobody not in summarize(simulated({"own": 0.5, "global": 0.5}))["reading"]


def test_other_metrics_have_no_coin_flip_null() -> None:
    table = simulated({"own": 0.6, "global": 0.4}, seeds=(0, 1))
    loss = summarize(table, "loss", higher_is_better=False)
    assert loss["n_seeds"] == 2
    assert loss["comparisons"]["global"]["null_helped"] is None
    assert loss["comparisons"]["global"]["mean_gain"] == pytest.approx(
        summarize(table)["comparisons"]["global"]["mean_gain"]
    )
    with pytest.raises(DataError, match="no column perplexity"):
        summarize(table, "perplexity")


def test_users_must_be_the_same_under_every_seed() -> None:
    rows = simulated({"own": 0.6, "global": 0.4}, users=5, seeds=(0, 1)).to_pylist()
    with pytest.raises(DataError, match="same users"):
        summarize(users_table(rows[:-2]))
    rows[-1]["only_own"] += 1
    with pytest.raises(DataError, match="do not add up"):
        summarize(users_table(rows))


def test_the_users_table_has_one_schema_and_order() -> None:
    table = simulated({"own": 0.6, "global": 0.4}, users=4, seeds=(0, 1))
    rows = table.to_pylist()
    assert users_table(rows[::-1]).equals(table)
    assert table.column_names == (
        ["seed", "user", "kind", "test_records", "train_records", "accuracy", "mrr", "loss", "only_own", "only_other"]
    )
    assert users_table([]).schema == table.schema
    for broken in (rows + rows[:1], [rows[0] | {"kind": "best"}], [rows[0] | {"text": "x"}], [{"seed": 0}]):
        with pytest.raises(DataError):
            users_table(broken)


def test_tables_are_the_same_bytes_twice(tmp_path: Path) -> None:
    table = simulated({"own": 0.6, "global": 0.4})
    one = write_table(table, tmp_path / "a" / "users.parquet")
    two = write_table(table.replace_schema_metadata({"pandas": "{}"}), tmp_path / "b" / "users.parquet")
    assert one.read_bytes() == two.read_bytes()
    assert pa.parquet.read_table(one).equals(table)
    assert [path.name for path in one.parent.iterdir()] == ["users.parquet"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError):
        write_table(table, tmp_path / "file" / "users.parquet")
