import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pytest
from matplotlib.image import imread

from fedpers.errors import DataError, PrivacyRefusal, RunDirectoryError
from fedpers.evaluation.per_user import users_table
from fedpers.figures.curve import learning_curve
from fedpers.figures.frontier import FrontierCell, frontier
from fedpers.figures.gain import per_user_gain
from fedpers.figures.style import new_figure, save

pytestmark = pytest.mark.pictures

CLAIM = (
    "(ε = 2.0, δ = 1e-05) per record, add/remove one, against the server and the other users; "
    "excludes metrics read by the simulator"
)


def users(number: int = 90, records: int = 40, seeds: int = 1, lift: float = 0.08) -> pa.Table:
    draw, rows = np.random.default_rng(3), []
    for seed in range(seeds):
        sizes = np.random.default_rng(4).integers(records // 5, records, number)
        for user, n in enumerate(sizes):
            both, flips = draw.binomial(n, 0.4), draw.binomial(n, 0.25)
            wins = int(draw.binomial(flips, 0.5 + lift))
            shared = {"seed": seed, "user": user, "test_records": int(n), "train_records": 50, "mrr": 0.5, "loss": 1.0}
            own = min(both + wins, n) / n
            other = own - (2 * wins - flips) / n
            rows.append(shared | {"kind": "own", "accuracy": own, "only_own": 0, "only_other": 0})
            counts = {"only_own": wins, "only_other": int(flips - wins)}
            rows.append(shared | {"kind": "global", "accuracy": other} | counts)
    return users_table(rows)


def rounds(private: bool = True) -> pa.Table:
    number = np.arange(1, 41)
    accuracy = [0.15 + 0.3 * (1 - math.exp(-r / 12)) if r % 4 == 0 else None for r in number.tolist()]
    epsilon = [2.0 * math.sqrt(r / 40) if private else math.inf for r in number.tolist()]
    return pa.table({"round": number, "global_accuracy": pa.array(accuracy, pa.float64()), "epsilon": epsilon})


def cells(unit: str = "record") -> list[FrontierCell]:
    levels = (0.5, 2.0, 8.0, math.inf)
    found = []
    for method, base in (("fedavg-lora", 0.36), ("fedper", 0.4)):
        for step, epsilon in enumerate(levels):
            own, shared = base + 0.025 * step, base - 0.14 + 0.06 * step
            found.append(
                FrontierCell(
                    method,
                    epsilon,
                    1e-5,
                    unit,
                    "against the server and the other users",
                    (own, own - 0.02, own + 0.02),
                    (shared, shared - 0.02, shared + 0.02),
                    (0.39, 0.37, 0.41),
                    0.24,
                )
            )
    return found


def assert_drawn(paths: list[Path]) -> None:
    assert [path.suffix for path in paths] == [".png", ".svg", ".pdf"]
    pixels = imread(paths[0])
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 800
    assert 0.005 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.6


def test_all_figures_are_drawn_and_have_the_same_bytes_twice(tmp_path: Path) -> None:
    written = []
    for part in ("one", "two"):
        place = tmp_path / part
        written.append(
            per_user_gain(users(), CLAIM, place)
            + learning_curve(rounds(), {"zero_shot": 0.24, "local": 0.39, "own": 0.46}, CLAIM, place)
            + frontier(cells(), place, "Privacy and utility, 90 users, 1 seed")
        )
    assert len(written[0]) == 9
    for one, two in zip(*written, strict=True):
        assert one.read_bytes() == two.read_bytes()
    for start in (0, 3, 6):
        _, svg, pdf = found = written[0][start : start + 3]
        assert_drawn(found)
        assert svg.read_text().lstrip().startswith("<?xml")
        assert pdf.read_bytes().startswith(b"%PDF")
        assert b"Date" not in pdf.read_bytes()
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in written[0]}


def test_a_gain_needs_both_kinds_and_users_with_enough_records(tmp_path: Path) -> None:
    assert per_user_gain(users(), CLAIM, tmp_path, against="swap") == []
    assert per_user_gain(users(records=10), CLAIM, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.pictures("png")
@pytest.mark.parametrize("changes", [{"number": 1, "records": 200}, {"seeds": 3}, {"number": 3000}])
def test_gain_from_one_user_to_thousands(tmp_path: Path, changes: dict[str, int]) -> None:
    assert_drawn(per_user_gain(users(**changes), CLAIM, tmp_path))


@pytest.mark.pictures("png")
def test_gain_in_a_metric_without_null(tmp_path: Path) -> None:
    (path, svg, _) = per_user_gain(users(), CLAIM, tmp_path, metric="loss", higher_is_better=False)
    assert path.stat().st_size > 10_000
    assert svg.exists()


@pytest.mark.pictures("png")
def test_curve_without_privacy_or_evaluations(tmp_path: Path) -> None:
    assert_drawn(learning_curve(rounds(private=False), {}, "no privacy", tmp_path))
    nothing = rounds().set_column(1, "global_accuracy", pa.nulls(40, pa.float64()))
    assert learning_curve(nothing, {}, CLAIM, tmp_path / "none") == []
    with pytest.raises(DataError):
        learning_curve(pa.table({"global_accuracy": [0.1]}), {}, CLAIM, tmp_path)


@pytest.mark.pictures("png")
def test_frontier_edges(tmp_path: Path) -> None:
    assert frontier([], tmp_path, "empty") == []
    assert_drawn(frontier(cells()[:1], tmp_path / "one", "one cell"))
    assert_drawn(frontier([cells()[3], cells()[7]], tmp_path / "free", "no privacy only"))
    with pytest.raises(DataError, match="positive"):
        frontier([replace(cells()[0], epsilon=0.0)], tmp_path, "local")
    with pytest.raises(PrivacyRefusal, match="different units"):
        frontier(cells()[:1] + cells("user")[4:], tmp_path, "mixed")


def test_labels_are_text_not_formulas(tmp_path: Path) -> None:
    assert_drawn(learning_curve(rounds(), {}, r"costs $1 to $2, \frac{, a_b^c", tmp_path))


def test_settings_of_the_caller_neither_change_nor_matter(tmp_path: Path) -> None:
    plain = learning_curve(rounds(), {}, CLAIM, tmp_path / "plain")
    with mpl.rc_context({"font.size": 30, "svg.hashsalt": "mine"}):
        before = dict(mpl.rcParams)
        other = learning_curve(rounds(), {}, CLAIM, tmp_path / "other")
        assert dict(mpl.rcParams) == before
    assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in other]


def test_pyplot_is_never_imported() -> None:
    modules = "fedpers.figures.gain, fedpers.figures.curve, fedpers.figures.frontier"
    code = (
        f"import sys, pathlib, tempfile, {modules}\nfrom fedpers.figures.style import new_figure, save, style\n"
        "with style(), tempfile.TemporaryDirectory() as d: save(new_figure(2, 2), pathlib.Path(d), 'x')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="Cannot write"):
        save(new_figure(2, 2), tmp_path / "file", "x")
