"""`fedpers data list` and `describe`: complete, numbers right, and nothing of anybody's in them."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median

import pytest
from matplotlib.image import imread

from conftest import Command
from fedpers import describe
from fedpers.config import load_config
from fedpers.data.base import Source, load
from fedpers.errors import DataError
from fedpers.figures.records import records_per_user
from fedpers.privacy.randomness import seed_key
from fedpers.registry import find, names

pytestmark = pytest.mark.pictures

SMALL = ("data.users=12", "data.min_train=3", "data.max_train=20")


def test_every_source_says_what_it_is_and_fits_a_task_that_exists() -> None:
    for name in names("data"):
        source = find("data", name, Source)  # type: ignore[type-abstract]
        assert all(value for _, value in describe.about(name, source))
        assert set(source.tasks) <= set(names("tasks"))


def test_list_names_every_source(fedpers: Command) -> None:
    code, out, err = fedpers("data", "list")
    assert code == 0
    assert not err
    for name in names("data"):
        assert re.search(rf"^ *{name} ", out, re.MULTILINE)


def test_describe_counts_what_is_there(fedpers: Command, tmp_path: Path) -> None:
    code, out, _ = fedpers("data", "describe", "synthetic", *SMALL, "--out", tmp_path / "figures")
    assert code == 0
    federation = load(load_config(None, ["data.name=synthetic", *SMALL]), seed_key(0))
    train = [len(records) for records in federation.train]
    assert re.search(r"^users +12$", out, re.MULTILINE)
    expected = f"{sum(train):,}; of a user {min(train)} to {max(train)}, median {median(train):g}"
    assert re.search(rf"^training records +{expected}$", out, re.MULTILINE)
    assert re.search(r"^public pool +120 texts$", out, re.MULTILINE)
    assert f"a claim leaves out  {federation.facts[0]}" in out
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert written == ["records_per_user.pdf", "records_per_user.png", "records_per_user.svg"]
    assert all(str(tmp_path / "figures" / name) in out for name in written)


def test_no_id_and_no_text_gets_out(fedpers: Command, tmp_path: Path) -> None:
    _, out, _ = fedpers("data", "describe", "synthetic", *SMALL, "--out", tmp_path)
    federation = load(load_config(None, ["data.name=synthetic", *SMALL]), seed_key(0))
    shown = out.replace(str(tmp_path), "") + (tmp_path / "records_per_user.svg").read_text(encoding="utf-8")
    held = [record for part in (federation.train, federation.test) for records in part for record in records]
    assert not [user for user in federation.users if user in shown]
    assert not [r.id for r in held if r.id in shown or r.target in shown or r.input in shown]


def test_describe_refuses_what_it_cannot_mean(fedpers: Command) -> None:
    code, out, err = fedpers("data", "describe", "syntetic")
    assert (code, out) == (2, "")
    assert "did you mean 'synthetic'" in err
    code, _, err = fedpers("data", "describe", "synthetic", "data.name=chitchat")
    assert code == 2
    assert "data.name is given twice" in err
    code, _, err = fedpers("data", "describe", "synthetic", "data.user=3")
    assert code == 2
    assert "did you mean 'data.users'" in err


def test_equal_counts_are_equal_figures_and_order_tells_nothing(tmp_path: Path) -> None:
    first = records_per_user([5, 300, 20], [1, 40, 9], "made up: 3 users", tmp_path / "a")
    again = records_per_user([300, 20, 5], [9, 1, 40], "made up: 3 users", tmp_path / "b")
    other = records_per_user([300, 20, 6], [9, 1, 40], "made up: 3 users", tmp_path / "c")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert first[1].read_bytes() != other[1].read_bytes()
    assert imread(first[0]).std() > 0.02  # something is drawn


@pytest.mark.parametrize(("train", "test"), [([], []), ([3, 0], [1, 1]), ([3], [0])])
def test_users_without_records_are_no_figure(train: list[int], test: list[int], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="every user needs a record"):
        records_per_user(train, test, "made up", tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_user_is_drawn(tmp_path: Path) -> None:
    assert imread(records_per_user([4], [2], "made up: 1 user", tmp_path)[0]).std() > 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("movielens", r"^users +760$"),
        ("vader", r"^training records +113,960; of a user 20 to 20, median 20$"),
        ("shakespeare", r"^skipped too few records +914$"),
    ],
)
def test_real_sources_are_described(fedpers: Command, name: str, said: str) -> None:
    code, out, _ = fedpers("data", "describe", name)
    assert code == 0
    assert re.search(said, out, re.MULTILINE)


def test_a_configuration_file_is_described(fedpers: Command, tmp_path: Path) -> None:
    """One's own data are looked at with the file that the run will get."""
    config = tmp_path / "mine.yaml"
    config.write_text("data: {name: synthetic, users: 7, max_train: 20}\n", encoding="utf-8")
    code, out, _ = fedpers("data", "describe", config, "data.max_train=16")
    assert code == 0
    (users,) = [line.split()[1] for line in out.splitlines() if line.startswith("users ")]
    assert users == "7"
    assert "to 16" in next(line for line in out.splitlines() if line.startswith("training records"))
