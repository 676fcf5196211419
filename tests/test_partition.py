"""Made-up users: how they differ, and that where a record goes hangs on no other record."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpers.config import PartitionConfig, load_config
from fedpers.data import Federation, load
from fedpers.data.base import role
from fedpers.errors import ConfigError, DataError
from fedpers.formats.partition import dealer
from fedpers.formats.tables import Bad
from fedpers.privacy.randomness import seed_key

Row = dict[str, Any]
LABELS = ("bad", "fair", "good")
WAYS = (
    "{by: iid, users: 3}",
    "{by: dirichlet, users: 3, alpha: 1.0}",
    "{by: pathological, users: 3, classes: 2, labels: [bad, fair, good]}",
)


def dealt(config: PartitionConfig, labels: Sequence[str], records: int) -> dict[str, Counter[str]]:
    """Return by label how many of so many records each user got."""
    deal = dealer(config)
    return {label: Counter(deal(f"{label}/{n}", label)[0] for n in range(records)) for label in labels}


def table(records: int = 60) -> list[Row]:
    """Rows in order of their labels, as many data sets have them."""
    rows = [{"input": f"text {n}", "target": LABELS[n % 3]} for n in range(records)]
    return sorted(rows, key=lambda row: str(row["target"]))


def partitioned(path: Path, rows: Sequence[Row], way: str, *overrides: str, seed: int = 0) -> Federation:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = ["data.name=files", f"data.path={path}", "data.columns.user=null", f"data.partition={way}"]
    given += ["data.min_train=1", "data.min_test=1", "data.max_train=999", "data.max_test=999", *overrides]
    return load(load_config(None, given), seed_key(seed))


def owners(found: Federation) -> dict[str, tuple[str, str]]:
    """Return by record id its user and its input."""
    parts = zip(found.users, found.train, found.test, strict=True)
    return {one.id: (user, one.input) for user, train, test in parts for one in (*train, *test)}


@pytest.mark.parametrize("alpha", [0.01, 0.05, 1.0, 100.0, 1e6])
def test_dirichlet_shares_are_as_uneven_as_alpha_says(alpha: float) -> None:
    """The sum of squared shares of a symmetric Dirichlet of n parts is (alpha + 1) / (n alpha + 1) on average.

    From counts it is estimated without bias by how often two records of a label have one user.
    """
    users, labels, records = 20, 300, 60
    found = dealt(PartitionConfig(by="dirichlet", users=users, alpha=alpha), [f"l{n}" for n in range(labels)], records)
    together = [sum(n * (n - 1) for n in held.values()) / (records * (records - 1)) for held in found.values()]
    standard_error = float(np.std(together)) / labels**0.5
    assert abs(np.mean(together) - (alpha + 1) / (users * alpha + 1)) < 4 * standard_error
    assert set().union(*found.values()) == {f"partition-{n:05d}" for n in range(users)}


def test_iid_users_get_about_as_many_records_of_each_label() -> None:
    users, records = 10, 4000
    for held in dealt(PartitionConfig(by="iid", users=users), LABELS, records).values():
        counts = np.array([held[f"partition-{n:05d}"] for n in range(users)])
        assert counts.sum() == records
        assert ((counts - records / users) ** 2 / (records / users)).sum() < 33.7  # chi-squared, 9 degrees, 1e-4


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 12), st.integers(0, 99))
def test_pathological_users_own_few_labels_and_every_label_has_owners(
    users: int, classes: int, count: int, seed: int
) -> None:
    labels = tuple(f"l{n}" for n in range(max(classes, min(count, users * classes))))
    config = PartitionConfig(by="pathological", users=users, classes=classes, labels=labels, seed=seed)
    found = dealt(config, labels, 40)
    owned: dict[str, set[str]] = defaultdict(set)
    for label, held in found.items():
        assert held.total() == 40
        for user in held:
            owned[user].add(label)
    assert max(map(len, owned.values())) <= classes
    rounds = users * classes / len(labels)
    assert all(len(held) <= np.ceil(rounds) for held in found.values())  # no label has many owners
    if len(labels) % classes == 0 and rounds <= 2:  # so few that 40 records find all of them
        assert all(len(found[label]) >= np.floor(rounds) for label in labels)


def test_a_label_goes_to_its_owners_alike_and_the_order_of_the_list_is_nothing() -> None:
    config = PartitionConfig(by="pathological", users=6, classes=1, labels=LABELS)
    for held in dealt(config, LABELS, 2000).values():
        assert len(held) == 2
        assert all(abs(count - 1000) < 100 for count in held.values())
    turned = config.model_copy(update={"labels": LABELS[::-1]})
    assert dealt(turned, LABELS, 30) == dealt(config, LABELS, 30)
    with pytest.raises(Bad, match=r"the target is not among data\.partition\.labels"):
        dealer(config)("x", "awful")


@pytest.mark.parametrize("way", WAYS)
def test_leaving_a_row_out_moves_and_renames_no_other(tmp_path: Path, way: str) -> None:
    rows = table()
    full = owners(partitioned(tmp_path / "a.jsonl", rows, way))
    assert len(full) == len(rows)
    assert len({user for user, _ in full.values()}) == 3
    for place in range(len(rows)):
        less = owners(partitioned(tmp_path / "a.jsonl", [*rows[:place], *rows[place + 1 :]], way))
        gone = {name for name in full if full[name][1] == rows[place]["input"]}
        assert less == {name: full[name] for name in full if name not in gone}


@pytest.mark.parametrize("way", WAYS)
def test_of_identical_rows_it_is_nothing_which_one_is_left_out(tmp_path: Path, way: str) -> None:
    rows = table()
    same = [0, 7, 30]
    for place in same:
        rows[place] = dict(rows[0])
    found = [partitioned(tmp_path / "a.jsonl", [*rows[:place], *rows[place + 1 :]], way) for place in same]
    assert all((one.users, one.train, one.test) == (found[0].users, found[0].train, found[0].test) for one in found)
    other = partitioned(tmp_path / "a.jsonl", [*rows[:1], *rows[2:]], way)
    assert (other.train, other.test) != (found[0].train, found[0].test)


def test_a_row_number_as_id_moves_others(tmp_path: Path) -> None:
    """The control: renumbered records throw other coins."""
    users = []
    for rows in (table(), table()[1:]):
        numbered = [{**row, "key": number} for number, row in enumerate(rows)]
        found = owners(partitioned(tmp_path / "a.jsonl", numbered, WAYS[0], "data.columns.id=key"))
        users.append({text: user for user, text in found.values()})
    moved = [text for text, user in users[1].items() if users[0][text] != user]
    assert len(moved) > len(users[1]) / 3


def test_labels_on_both_sides_though_the_file_is_sorted_by_them_and_time_where_there_is_one(tmp_path: Path) -> None:
    rows = [{**row, "when": n} for n, row in enumerate(table(300))]
    without = partitioned(tmp_path / "a.jsonl", rows, WAYS[0])
    for train, test in zip(without.train, without.test, strict=True):
        assert {one.target for one in train} == {one.target for one in test} == set(LABELS)
    assert any("a coin for each record, since no column holds the time" in fact for fact in without.facts)
    timed = partitioned(tmp_path / "a.jsonl", rows, WAYS[0], "data.columns.time=when")
    for train, test in zip(timed.train, timed.test, strict=True):
        assert "bad" not in {one.target for one in test}  # the first third of the file
        assert "bad" in {one.target for one in train}


def test_the_partition_hangs_on_its_own_seed_and_roles_on_the_made_up_ids(tmp_path: Path) -> None:
    """Else a development user under one seed of the run would hold a member's records under another."""
    way, path, rows = "{by: iid, users: 50, seed: %d}", tmp_path / "a.jsonl", table(900)
    members = partitioned(path, rows, way % 0)
    tuned = partitioned(path, rows, way % 0, "data.people=development")
    assert all(role(user) == "development" for user in tuned.users)
    assert not any(role(user) == "development" for user in members.users)
    assert len(owners(members)) + len(owners(tuned)) == 900
    again = partitioned(path, rows, way % 0, seed=1)
    assert owners(again) == owners(members)
    other = owners(partitioned(path, rows, way % 1))
    assert set(other) & set(owners(tuned))


def test_a_claim_is_told_that_users_are_made_up(tmp_path: Path) -> None:
    for way, said in zip(WAYS, ("same probability", "with alpha 1", "at most 2 labels"), strict=True):
        facts = partitioned(tmp_path / "a.jsonl", table(), way).facts
        (fact,) = [one for one in facts if "no real person" in one]
        assert said in fact
        assert "dealt to 3" in fact


def test_a_label_outside_the_list_and_an_id_that_comes_twice_are_told_by_line(tmp_path: Path) -> None:
    rows: list[Row] = [{**row, "key": n} for n, row in enumerate(table())]
    path = tmp_path / "a.jsonl"
    odd = [*rows[:4], {**rows[4], "target": "awful"}, *rows[5:]]
    with pytest.raises(DataError, match=r"a.jsonl, line 5: the target is not among data.partition.labels; mend"):
        partitioned(path, odd, WAYS[2])
    assert partitioned(path, odd, WAYS[2], "data.skip_bad=true").counts["skipped_unknown_label"] == 1
    twice = [*rows, {**rows[0], "input": "another"}]  # whoever the user is
    with pytest.raises(DataError, match=r"a.jsonl, line 61: the id of this record is that of an earlier one; mend"):
        partitioned(path, twice, WAYS[0], "data.columns.id=key")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("data.columns.user=null",), "columns.user=null and partition go together"),
        (("data.partition={by: iid, users: 3}",), "columns.user=null and partition go together"),
        (("data.partition={by: even, users: 3}",), "data.partition.by = 'even'"),
        (("data.partition={by: iid}",), "data.partition.users"),
        (("data.partition={by: dirichlet, users: 3, alpha: 0}",), "data.partition.alpha = 0"),
        (("data.partition={by: pathological, users: 3}",), "labels must list 2 labels (classes) or more"),
        (
            ("data.partition={by: pathological, users: 3, labels: [a, b, b]}",),
            "labels must list 2 labels (classes) or more, each once",
        ),
        (
            ("data.partition={by: pathological, users: 1, classes: 2, labels: [1, 2, 3]}",),
            "users=1 with classes=2 labels each leave some of the 3 labels to nobody",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(None, ["data.name=files", *overrides])


def test_a_repeated_id_is_refused_even_where_bad_rows_may_be_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [{"key": str(number % 9), "input": f"text {number}", "target": "yes"} for number in range(10)]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    changes = ["data.name=files", f"data.path={file}", "data.skip_bad=true", "data.columns={user: null, id: key}"]
    config = load_config(None, [*changes, "data.partition={by: iid, users: 3}"])
    # Which made-up user holds the earlier row is no business of the user who would lose the later one.
    with pytest.raises(DataError, match=r"line 10: the id .* leaves no such row out"):
        load(config, seed_key(0))
