"""The frontier of a sweep, drawn of its stored tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from fedpers.config import Config
from fedpers.errors import DataError, RunDirectoryError
from fedpers.evaluation.crossed import intervals
from fedpers.figures import sweep_frontier as drawing
from fedpers.figures.sweep_frontier import pareto, sweep_frontier
from fedpers.sweep import pictures
from fedpers.sweep.grid import expand
from fedpers.sweep.pictures import draw
from fedpers.sweep.points import panels
from fedpers.sweep.results import FIXED, RESULTS, USERS
from fedpers.sweep.runner import sweep
from fedpers.sweep_cli import _tables

AXES = {"variant": pa.string(), "privacy_epsilon": pa.string()}
LEVELS = {"inf": ("none", "none", None), "clip": ("user", "user-central", 1e-3), "8": ("user", "user-central", 1e-3)}
Tables = tuple[pa.Table, pa.Table]


def tables(
    methods: Sequence[str] = ("fedavg", "fedper"),
    levels: Sequence[str] = ("inf", "clip", "8", "2", "0.5"),
    seeds: int = 3,
    users: int = 60,
    variants: Sequence[str | None] = (None,),
    units: Mapping[str, str] | None = None,
    metric: str = "accuracy",
    effect: float = 1.0,
) -> Tables:
    """Make up a sweep in which privacy costs, and federation helps at weak privacy."""
    rng, runs, rows = np.random.default_rng(0), [], []
    skill = rng.normal(0, 0.08, users)

    def add(run: dict[str, Any], means: Mapping[str, float]) -> None:
        cost = {"bytes_up": 1000, "bytes_down": 1000, "seconds": 1.0, "n_users": users, "n_rounds": 2}
        runs.append({"data": "chitchat", **cost, "metric": metric, "higher_is_better": effect > 0, **run})
        for kind, mean in means.items():
            values = mean + skill + rng.normal(0, 0.03, users) + rng.normal(0, 0.005)
            which = {name: run.get(name) for name in ("hash", "baseline", "method", "seed", *AXES)} | {
                "data": "chitchat"
            }
            for user, value in enumerate(values):
                counts = {"person": user, "user": user, "test_records": 20, "train_records": 10 + user}
                counts |= {"only_own": 1, "only_other": 1}
                rows.append(which | counts | {"kind": kind, metric: value})

    for variant, method, level, seed in product(variants, methods, levels, range(seeds)):
        epsilon = math.inf if level in {"inf", "clip"} else float(level)
        unit, trust, delta = LEVELS.get(level, LEVELS["8"])
        if units and unit != "none":
            unit = units[method]
            trust = {"user": "user-central", "record": "record-local"}[unit]
        cost = {"inf": 0.0, "clip": 0.02}.get(level, 0.25 / (1 + epsilon))
        own = 0.5 + 0.03 * methods.index(method) * effect - cost * effect
        add(
            {
                "hash": f"{variant} {method} {level} {seed}", "baseline": f"{variant} local {seed}", "method": method,
                "seed": seed, "variant": variant, "privacy_epsilon": level, "unit": unit, "trust": trust,
                "delta": delta,
                "epsilon": epsilon - 0.001 * seed if math.isfinite(epsilon) else epsilon,
                **({"noise_to_update_adapter": 4 / epsilon + seed} if math.isfinite(epsilon) else {}),
                **({"noise_to_update_head": 2 / epsilon} if math.isfinite(epsilon) else {}),
            },
            {"own": own, "global": own - 0.03 * effect, "local": 0.42, "zero_shot": 0.3},
        )  # fmt: skip
    for variant, seed in product(variants, range(seeds)):
        name = f"{variant} local {seed}"
        add(
            {
                "hash": name, "baseline": name, "method": "local", "seed": seed, "variant": variant, "unit": "none",
                "trust": "none", "epsilon": 0.0,
            },
            {"own": 0.42},
        )  # fmt: skip
    which = {
        "hash": pa.string(),
        "baseline": pa.string(),
        "data": pa.string(),
        "method": pa.string(),
        "seed": pa.int64(),
    }
    results = pa.Table.from_pylist(runs, pa.schema([*which.items(), *AXES.items(), *(FIXED.items() - which.items())]))
    counts = dict.fromkeys(("person", "user", "test_records", "train_records", "only_own", "only_other"), pa.int64())
    more = {"kind": pa.string(), metric: pa.float64(), "only_own": pa.int64(), "only_other": pa.int64()}
    names = [*which, *AXES, *(name for name in FIXED if name not in which)]
    return results.select(names), pa.Table.from_pylist(rows, pa.schema(list((which | AXES | counts | more).items())))


def stored(found: Tables, out: Path) -> Path:
    out.mkdir()
    for table, name in zip(found, (RESULTS, USERS), strict=True):
        pq.write_table(table, out / name)
    return out


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tables], list[Axes]]:
    """Return a function that draws without writing, and gives the panels."""
    held: list[Figure] = []
    monkeypatch.setattr(drawing, "save", lambda fig, folder, name: held.append(fig) or [folder / name])

    def made(found: Tables) -> list[Axes]:
        assert sweep_frontier(*found, Path("nowhere")) == [Path("nowhere/sweep_frontier")]
        return [ax for ax in held[-1].axes if ax.get_legend() is not None]

    return made


def rings(ax: Axes) -> list[tuple[float, float]]:
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_markersize() == 13]


def ticks(ax: Axes) -> list[str]:
    return [one.get_text() for one in ax.get_xticklabels()]


# --- what is on the frontier ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epsilons", "utilities", "higher", "expected"),
    [
        ([1, 2, 4], [0.1, 0.2, 0.3], True, [True, True, True]),
        ([1, 2, 4], [0.3, 0.2, 0.3], True, [True, False, False]),  # as good for less privacy is no gain
        ([1, 2, 4], [0.3, 0.2, 0.1], False, [True, True, True]),
        ([1, 2, 4], [0.1, 0.2, 0.3], False, [True, False, False]),
        ([1, 1, 1], [0.2, 0.3, 0.3], True, [False, True, True]),  # two that are alike stand together
        ([0, 1, math.inf], [0.4, 0.3, 0.5], True, [True, False, True]),  # training at home beats noise
        ([math.inf, math.inf], [0.4, 0.5], True, [False, True]),
        ([], [], True, []),
    ],
)
def test_pareto_by_hand(epsilons: list[float], utilities: list[float], higher: bool, expected: list[bool]) -> None:
    assert pareto(epsilons, utilities, higher_is_better=higher) == expected


def test_the_frontier_is_ringed_and_what_local_training_beats_is_not(figure: Callable[[Tables], list[Axes]]) -> None:
    (ax,) = figure(tables())
    assert ticks(ax) == ["0.5", "2", "8", "clip\nonly", "no\nprivacy"]
    best = sorted(rings(ax))
    assert len(best) == 3  # fedper at 2, at 8, and without privacy, which is as good as clipping for no less privacy
    assert all(value > 0.42 for _, value in best)
    (ax,) = figure(tables(effect=-1.0, metric="rmse"))
    assert ax.yaxis_inverted()
    assert "lower is better" in ax.get_ylabel()
    assert len(rings(ax)) == 0  # own models are worse than local-only by this metric


# --- which runs are one point, and which share an axis ----------------------------------------------------------------


def test_points_are_runs_that_differ_in_their_seed() -> None:
    results, users = tables()
    (panel,) = panels(results, users)
    assert (panel.name, panel.unit, panel.trust, panel.delta) == ("chitchat", "user", "user-central", 1e-3)
    assert len(panel.points) == 10
    assert all(len(point.setting.runs) == 3 for point in panel.points)
    private = [point for point in panel.points if point.setting.series == "fedper" and math.isfinite(point.epsilon)]
    assert [point.epsilon for point in private] == [8, 2, 0.5]  # the largest claim
    assert [point.noise_to_update for point in private] == [1.5, 3, 9]  # the median of the larger family
    assert {point.noise_to_update for point in panel.points if math.isinf(point.epsilon)} == {None}
    mine = users.filter(pa.compute.starts_with(users["hash"], "None fedper 2 ")).to_pandas()
    assert private[1].kinds["own"].mean == pytest.approx(mine[mine.kind == "own"].accuracy.mean())
    assert panel.local is not None
    assert panel.local.values.shape == (3, 60)


def test_promises_of_different_units_share_no_axis(figure: Callable[[Tables], list[Axes]]) -> None:
    found = tables(units={"fedavg": "user", "fedper": "record"})
    user, record = panels(*found)
    assert [panel.unit for panel in (user, record)] == ["user", "record"]
    for panel, method in ((user, "fedavg"), (record, "fedper")):
        private = {one.setting.series for one in panel.points if one.setting.level.place[0] < 2}
        assert private == {method}
        assert {one.setting.series for one in panel.points} == {"fedavg", "fedper"}  # without privacy, in both
    assert ["ε per user" in ax.get_xlabel() for ax in figure(found)] == [True, False]


def test_variants_and_other_axes(figure: Callable[[Tables], list[Axes]]) -> None:
    results, users = tables(variants=("few", "more"))
    assert [panel.name for panel in panels(results, users)] == ["chitchat few", "chitchat more"]
    assert len(figure((results, users))) == 2
    axis = {"None fedavg": "head", "None fedper": "adapter"}
    results, users = (
        one.add_column(5, "share", pa.array([axis.get(" ".join(name.split()[:2])) for name in one["hash"].to_pylist()]))
        for one in tables(levels=("inf", "8"))
    )
    (panel,) = panels(results, users)
    assert {point.setting.series for point in panel.points} == {"fedavg, share=head", "fedper, share=adapter"}
    results, users = (
        one.set_column(
            5, "data_users", pa.array(["9" if "fedavg" in name else "5" for name in one["hash"].to_pylist()])
        )
        for one in (results, users)
    )
    assert [panel.name.split(", ")[-1] for panel in panels(results, users)] == ["data_users 9", "data_users 5"]


def test_the_same_person_is_known_under_every_seed() -> None:
    results, users = tables(seeds=5, levels=("8",))
    wide = intervals([panels(results, users)[0].points[0].kinds["own"]])[0]
    strangers = pa.array([row["person"] + 1000 * row["seed"] for row in users.to_pylist()])
    changed = users.set_column(users.column_names.index("person"), "person", strangers)
    own = panels(results, changed)[0].points[0].kinds["own"]
    assert own.people.size == 300
    narrow = intervals([own])[0]
    assert narrow.mean == pytest.approx(wide.mean)
    assert narrow.high - narrow.low < 0.9 * (wide.high - wide.low)  # five times as many people


def test_a_baseline_that_failed_under_a_seed_is_not_compared(figure: Callable[[Tables], list[Axes]]) -> None:
    results, users = tables(methods=["fedavg"])
    gone = [not (row["kind"] == "local" and row["seed"] == 1) for row in users.to_pylist()]
    (ax,) = figure((results, users.filter(pa.array(gone))))
    assert "no local-only runs to compare with" in ax.get_title(loc="left")


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_numbers_that_a_reader_needs_are_there(figure: Callable[[Tables], list[Axes]]) -> None:
    (ax,) = figure(tables())
    heading = ax.get_title(loc="left")
    assert "60 users" in heading
    assert "3 seeds" in heading
    assert "would be detected (80% power)" in " ".join(heading.split())
    assert ax.get_xlabel().startswith("ε per user, δ = 0.001, trust: user-central")
    strip = next(one for one in ax.figure.axes if one.texts and one is not ax)
    assert sorted(one.get_text() for one in strip.texts) == sorted(["1.5", "3", "9"] * 2)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["local-only\n(free)", "zero-shot", "fedavg", "fedper"]
    (ax,) = figure(tables(seeds=1))
    assert "1 seed: intervals cover users alone" in ax.get_title(loc="left")


def test_filled_is_better_than_local_only(figure: Callable[[Tables], list[Axes]]) -> None:
    def filled(ax: Axes) -> int:
        marked = [line for line in ax.lines if line.get_marker() in "os" and line.get_markersize() < 13]
        return sum(len(line.get_xdata()) for line in marked if line.get_markerfacecolor() == line.get_color())

    (ax,) = figure(tables())
    assert filled(ax) == 7  # both methods at 8, with clipping and without privacy, and fedper at 2
    (ax,) = figure(tables(levels=("0.5", "0.25")))
    assert filled(ax) == 0


def test_many_methods_are_drawn_in_several_panels(figure: Callable[[Tables], list[Axes]]) -> None:
    found = tables(methods=[f"method{number}" for number in range(8)], levels=("inf", "2"), seeds=1, users=20)
    first, second = figure(found)
    assert first.get_title(loc="left") == second.get_title(loc="left")
    assert len(rings(first) + rings(second)) == 2  # of all eight, not of each panel's own
    colors = [line.get_color() for line in first.lines if line.get_label().startswith("method")]
    assert len(set(colors)) == 6


@pytest.mark.parametrize("levels", [("inf",), ("clip",), ("2",), ("inf", "2")])
def test_few_levels(levels: Sequence[str], figure: Callable[[Tables], list[Axes]]) -> None:
    (ax,) = figure(tables(levels=levels, seeds=1, users=5))
    assert len(ticks(ax)) == len(levels)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.pictures
def test_drawn_again_from_what_is_stored_it_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "FIGURES", (sweep_frontier,))
    out = stored(tables(), tmp_path / "out")
    first = {path: path.read_bytes() for path in draw(out)}
    assert {path.name for path in first} >= {f"sweep_frontier.{suffix}" for suffix in ("png", "svg", "pdf")}
    pixels = imread(out / "figures" / "sweep_frontier.png")
    assert 0.005 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.6
    stale = out / "figures" / "of_an_earlier_grid.svg"
    stale.write_text("")
    (out / "figures" / "notes.txt").write_text("mine")
    with mpl.rc_context({"font.size": 30}):
        assert {path: path.read_bytes() for path in draw(out)} == first
    assert not stale.exists()
    assert (out / "figures" / "notes.txt").exists()


def test_tables_that_cannot_be_drawn_are_named(tmp_path: Path) -> None:
    results, users = tables(levels=("8",), seeds=1, users=5)
    with pytest.raises(RunDirectoryError, match=r"results\.parquet: there is no such table.*fedpers sweep"):
        draw(tmp_path)
    out = stored((results, users.drop_columns(["person"])), tmp_path / "old")
    with pytest.raises(RunDirectoryError, match=r"users\.parquet: of another version, without person"):
        draw(out)
    with pytest.raises(RunDirectoryError, match=r"results\.parquet: has no rows"):
        draw(stored((results.slice(0, 0), users), tmp_path / "empty"))
    (out / USERS).write_bytes(b"PAR1")
    with pytest.raises(RunDirectoryError, match=r"users\.parquet: cannot be read"):
        draw(out)
    assert not (out / "figures").exists()
    missing = users.set_column(users.column_names.index("accuracy"), "accuracy", pa.nulls(users.num_rows, pa.float64()))
    with pytest.raises(DataError, match="not finite"):
        sweep_frontier(results, missing, tmp_path)


def test_only_training_at_home_is_no_frontier(tmp_path: Path) -> None:
    results, users = tables()
    local = [name == "local" for name in results["method"].to_pylist()]
    assert sweep_frontier(results.filter(pa.array(local)), users, tmp_path) == []


def test_a_sweep_draws_itself(tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(pictures, "FIGURES", (lambda _, __, folder: drawn.append(folder) or [],))
    short = {"rounds": 1, "evaluation": {"every": 0}, "personal": {"epochs": 1}, "data": {"users": 6}}
    base = tiny(**short, method="fedper").model_dump(mode="json")
    done = sweep(expand({"base": base, "product": {"seed": [0, 1]}}), tmp_path / "out")
    assert done.good
    assert drawn == [tmp_path / "out" / "figures"]
    users = pq.read_table(tmp_path / "out" / USERS).to_pandas()
    assert users.groupby("seed").person.nunique().tolist() == [6, 6]
    assert (users.groupby(["seed", "user"]).person.nunique() == 1).all()
    (panel,) = panels(*(pq.read_table(tmp_path / "out" / name) for name in (RESULTS, USERS)))
    assert panel.points[0].kinds["own"].seeds.tolist() == [0, 1]


# --- in the terminal --------------------------------------------------------------------------------------------------


def test_each_variant_has_a_printed_table_of_its_own() -> None:
    results, users = tables(variants=("one", "two"), levels=("inf", "clip", "8"), seeds=2)
    own = users.filter(pc.equal(users["kind"], "own")).group_by("hash").aggregate([("accuracy", "mean")])
    means = dict(zip(own["hash"].to_pylist(), own["accuracy_mean"].to_pylist(), strict=True))
    column = pa.array([means[name] for name in results["hash"].to_pylist()])
    printed = list(_tables(results.set_column(results.column_names.index("own_mean"), "own_mean", column)))
    assert [table.title for table in printed] == [
        f"chitchat {name}: accuracy of own models, mean over 2 seeds" for name in ("one", "two")
    ]
    for name, table in zip(("one", "two"), printed, strict=True):
        cells = [list(found.cells) for found in table.columns]
        assert cells[0] == ["fedavg", "fedper"]
        for level, found in zip(("8", "clip", "inf"), cells[1:], strict=True):  # the most private first
            assert found == [
                f"{np.mean([means[f'{name} {method} {level} {seed}'] for seed in (0, 1)]):.3f}" for method in cells[0]
            ]
        alone = np.mean([means[f"{name} local {seed}"] for seed in (0, 1)])
        assert table.caption == f"training at home alone: {alone:.3f}, nothing released\ntrust: user-central"
