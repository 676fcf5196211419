"""The user's own files: formats, the split, what is refused, what is counted and what is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpers.config import Config, TaskConfig, load_config
from fedpers.data import Federation, load
from fedpers.data.base import role
from fedpers.errors import DataError
from fedpers.formats.split import late, partners
from fedpers.formats.tables import Bad, as_text, as_time
from fedpers.privacy.randomness import seed_key
from fedpers.tasks.base import Task
from fedpers.tasks.classification import Classification
from fedpers.tasks.rating import Rating
from fedpers.tasks.reply_ranking import ReplyRanking

Row = dict[str, Any]
MEMBERS = [name for name in (f"u{n}" for n in range(40)) if role(name) == "federation"]
POOLED = [name for name in (f"u{n}" for n in range(400)) if role(name) == "pool"]
TUNED = [name for name in (f"u{n}" for n in range(400)) if role(name) == "development"]


def people(users: Sequence[str], records: int = 10) -> list[Row]:
    """Rows of all users in turn, as a log file has them."""
    return [
        {"user": user, "input": f"in {user} {n}", "target": f"out {user} {n}"} for n in range(records) for user in users
    ]


def jsonl(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def federation(path: object, *overrides: str) -> Federation:
    given = ["data.name=files", f"data.path={path}", "data.min_train=2", "data.min_test=1", *overrides]
    return load(load_config(None, given), seed_key(0))


def texts(found: Federation) -> dict[str, tuple[list[str], list[str]]]:
    parts = zip(found.users, found.train, found.test, strict=True)
    return {user: ([r.target for r in train], [r.target for r in test]) for user, train, test in parts}


def test_all_formats_give_the_same_federation(tmp_path: Path) -> None:
    rows = people(MEMBERS[:5])
    rows[3]["input"] = 'quotes " and, commas\nand lines: é'
    one = federation(jsonl(tmp_path / "a.jsonl", rows))
    table = pa.Table.from_pylist(rows)
    folder = tmp_path / "parts"
    folder.mkdir()
    pa.parquet.write_table(table.slice(0, 20), folder / "1.parquet")
    pa.parquet.write_table(table.slice(20), folder / "2.parquet")
    pa.csv.write_csv(table, tmp_path / "a.csv")
    pa.csv.write_csv(table, tmp_path / "a.tsv", pa.csv.WriteOptions(delimiter="\t"))
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:  # what `datasets` saves
        stream.write_table(table)
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as whole:
        whole.write_table(table)
    assert len(one.users) == 5
    files = [tmp_path / name for name in ("a.csv", "a.tsv", "a.arrow", "b.arrow")]
    for path in (folder, f"{folder}/*.parquet", *files):
        other = federation(path)
        assert (other.users, other.train, other.test) == (one.users, one.train, one.test), path


@pytest.mark.slow
def test_a_data_set_by_the_hubs_library_and_one_that_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a folder for a data set of the hub, which is how this needs no network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = people(MEMBERS[:3])
    (tmp_path / "set").mkdir()
    one = federation(jsonl(tmp_path / "set" / "train.jsonl", rows))
    for name in (f"hub:{tmp_path / 'set'}", f"hub:{tmp_path / 'set'}:train"):
        two = federation(name)
        assert (two.users, two.train, two.test) == (one.users, one.train, one.test)
    with pytest.raises(DataError, match="cannot be loaded"):
        federation(f"hub:{tmp_path / 'set'}:nosuch")
    with pytest.raises(DataError, match="no column 'author'"):
        federation(f"hub:{tmp_path / 'set'}", "data.columns.user=author")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    saved = federation(tmp_path / "saved")
    assert (saved.users, saved.train, saved.test) == (one.users, one.train, one.test)


def test_without_a_time_the_order_in_the_file_counts_and_with_one_the_time(tmp_path: Path) -> None:
    rows = people(MEMBERS[:2])
    for number, row in enumerate(rows):
        row["when"] = f"2020-01-{20 - number:02d}"  # the other way round
    path = jsonl(tmp_path / "a.jsonl", rows)
    user = MEMBERS[0]
    by_order, by_time = federation(path), federation(path, "data.columns.time=when")
    assert texts(by_order)[user][1] == [f"out {user} {n}" for n in (7, 8, 9)]
    assert texts(by_time)[user][1] == [f"out {user} {n}" for n in (2, 1, 0)]
    assert texts(by_time)[user][0] == [f"out {user} {n}" for n in (9, 8, 7, 6, 5, 4, 3)]
    assert any("the order in the files" in fact for fact in by_order.facts)
    assert any(fact.endswith("told apart by time") for fact in by_time.facts)
    capped = texts(federation(path, "data.max_train=3", "data.max_test=2"))[user]
    assert capped == ([f"out {user} {n}" for n in (4, 5, 6)], [f"out {user} {n}" for n in (7, 8)])  # closest in time
    assert len(texts(federation(path, "data.test_share=0.5"))[user][1]) == 5


def test_times_of_every_kind_sort_alike() -> None:
    moment = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
    for value in ("2024-05-06T07:08:09Z", "2024-05-06 07:08:09", "2024-05-06T09:08:09+02:00", moment):
        assert as_time(value) == ("date", moment.timestamp())
    assert as_time(date(2024, 5, 6)) == as_time("2024-05-06")
    assert as_time(12) == as_time("12.0") == ("number", 12.0)
    for value in ("yesterday", "", None, float("nan"), "inf", True, [1]):
        with pytest.raises(Bad, match="neither a number nor ISO 8601"):
            as_time(value)


def test_nanoseconds_and_zones_of_parquet_are_read(tmp_path: Path) -> None:
    rows = people(MEMBERS[:1])
    table = pa.Table.from_pylist(rows)
    ticks = pa.array([10**18 + 7 * (10 - n) * 10**9 + 1 for n in range(10)], pa.timestamp("ns", tz="UTC"))
    pa.parquet.write_table(table.append_column("time", ticks), tmp_path / "a.parquet")
    found = federation(tmp_path / "a.parquet", "data.columns.time=time")
    assert texts(found)[MEMBERS[0]][1] == [f"out {MEMBERS[0]} {n}" for n in (2, 1, 0)]


def test_cells_become_text() -> None:
    assert [as_text(cell, "x") for cell in (4, 4.0, 4.5, " 4 ", True, -0.0)] == ["4", "4", "4.5", "4", "True", "0"]
    for cell, kind in ((None, "empty_x"), ("  ", "empty_x"), (float("nan"), "empty_x"), (["4"], "odd_x"),
                       ({"a": 1}, "odd_x"), ("\ud800", "not_unicode")):  # fmt: skip
        with pytest.raises(Bad) as refused:
            as_text(cell, "x")
        assert refused.value.kind == kind


def test_a_conversation_is_on_one_side_for_all_its_users(tmp_path: Path) -> None:
    """Early in one history and late in the other, so that a cut per user would split it."""
    one, two, three = MEMBERS[:3]
    rows = [{**row, "talk": f"{one}{n}"} for n, row in enumerate(people([one], 8))]
    rows += [{"user": one, "input": "shared", "target": "mine", "talk": "both"}]
    rows += [{"user": two, "input": "mine", "target": "shared", "talk": "both"}]
    rows += [{**row, "talk": f"{two}{n}"} for n, row in enumerate(people([two], 8))]
    rows += [{**row, "talk": f"{three}{n}"} for n, row in enumerate(people([three], 8))]
    found = federation(jsonl(tmp_path / "a.jsonl", rows), "data.columns.conversation=talk")
    sides = {
        user: ["both" in {r.conversation for r in part} for part in (train, test)]
        for user, train, test in zip(found.users, found.train, found.test, strict=True)
    }
    assert sides[one] == sides[two] == [True, False]
    place = {user: number for number, user in enumerate(found.users)}
    assert found.partners[place[one]] == {place[two]}
    assert found.partners[place[three]] == frozenset()
    total = sum(map(len, found.train))
    assert any(fact.startswith(f"2 of {total} training records belong to a conversation") for fact in found.facts)


@given(
    st.dictionaries(st.text(min_size=1, max_size=2), st.lists(st.integers(0, 30), min_size=1, unique=True), max_size=6),
    st.floats(0.05, 0.95),
)
def test_late_is_the_mean_position(histories: dict[str, list[int]], test_from: float) -> None:
    named = {user: [str(one) for one in held] for user, held in histories.items()}
    found = late(named, test_from)
    for one in {name for held in named.values() for name in held}:
        places = [(held.index(one) + 0.5) / len(held) for held in named.values() if one in held]
        assert (one in found) == (sum(places) / len(places) > test_from)
    assert late(named, 0.0) == {name for held in named.values() for name in held}
    assert partners([], {}) == ()


def test_who_takes_part_hangs_on_the_id_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", people([*MEMBERS[:4], *POOLED[:3], *TUNED[:2]]))
    everybody = federation(path)
    assert set(everybody.users) == {*MEMBERS[:4], *POOLED[:3]}
    assert (everybody.pool, everybody.pool_authors) == ((), frozenset())
    assert set(federation(path, "data.people=development").users) == set(TUNED[:2])
    pooled = federation(path, "data.pool=true")
    assert set(pooled.users) == set(MEMBERS[:4])
    assert pooled.pool_authors == set(POOLED[:3])
    assert {text.text for text in pooled.pool} == {f"out {user} {n}" for user in POOLED[:3] for n in range(10)}
    assert any("the targets of 3 people outside" in fact for fact in pooled.facts)
    assert len(federation(path, "data.users=2").users) == 2


def test_columns_are_named_in_the_configuration_and_an_input_may_be_absent(tmp_path: Path) -> None:
    number = next(n for n in range(40) if role(str(n)) == "federation")
    rows = [{"author": number, "words": f"text {n}", "key": f"k{n}"} for n in range(10)]
    names = "{user: author, input: null, target: words, id: key}"
    found = federation(jsonl(tmp_path / "a.jsonl", rows), f"data.columns={names}")
    assert found.users == (str(number),)
    assert [record.id for record in found.train[0]] == [f"{number}/k{n}" for n in range(7)]
    assert {record.input for record in found.train[0]} == {""}
    default = federation(jsonl(tmp_path / "b.jsonl", rows), "data.columns={user: author, input: words, target: key}")
    assert [record.target for record in default.train[0]] == [f"k{n}" for n in range(7)]
    assert all(record.id.startswith(f"{number}/") and record.id.endswith("-1") for record in default.train[0])


def test_a_training_record_that_holds_the_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    one, two = MEMBERS[:2]
    rows = people([one, two])
    last = next(row for row in reversed(rows) if row["user"] == one)
    rows.insert(0, {**last, "input": f"  {last['input'].upper()} "})
    rows.insert(1, {**last, "user": two})
    found = federation(jsonl(tmp_path / "a.jsonl", rows))
    assert found.counts["skipped_repeats_of_test_records"] == 1
    assert last["target"] not in texts(found)[one][0]
    assert last["target"] in texts(found)[two][0]  # what a client trains on does not hang on others
    assert any(fact.startswith("1 training records were left out because they repeat") for fact in found.facts)


def test_records_that_two_members_hold_are_told_with_their_number(tmp_path: Path) -> None:
    one, two = MEMBERS[:2]
    rows = people([one, two])
    rows[:0] = [{"user": user, "input": "same", "target": "same"} for user in (one, two)]
    found = federation(jsonl(tmp_path / "a.jsonl", rows))
    assert any(fact.startswith(f"2 of {sum(map(len, found.train))} training records stand") for fact in found.facts)


SECRET_WORDS = "nobody shall read this"


@pytest.mark.parametrize(
    ("bad", "said", "kind"),
    [
        (b'{"user": "a", "input": "nobody shall read this"', "not valid JSON, column", "broken_json"),
        (b'["nobody shall read this"]', "a list, not an object", "broken_json"),
        (b"nobody shall read this", "not valid JSON, column 1", "broken_json"),
        (
            b'{"user": "a", "input": "nobody shall read this \xff", "target": "x"}',
            "not UTF-8 at its byte 48",
            "not_utf8",
        ),
        (b'{"user": " ", "input": "nobody shall read this", "target": "x"}', "the user is empty", "empty_user"),
        (b'{"user": "a", "input": "", "target": "nobody shall read this"}', "the input is empty", "empty_input"),
        (b'{"user": "a", "input": "nobody shall read this", "target": null}', "the target is empty", "empty_target"),
        (b'{"user": "a", "input": "nobody shall read this", "target": ["x"]}', "the target holds a list", "odd_target"),
        (b'{"user": "a", "input": "nobody shall read this", "target": "\\ud800"}', "not valid Unicode", "not_unicode"),
    ],
)
def test_bad_lines_are_refused_with_file_and_line_or_counted(tmp_path: Path, bad: bytes, said: str, kind: str) -> None:
    path = jsonl(tmp_path / "mine.jsonl", people(MEMBERS[:2]))
    clean = federation(path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:5], bad, b"", *lines[5:]]))
    with pytest.raises(DataError, match=said) as refused:
        federation(path)
    assert str(refused.value).startswith("mine.jsonl, line 6: ")
    assert SECRET_WORDS not in str(refused.value)
    assert str(tmp_path) not in str(refused.value)
    skipped = federation(path, "data.skip_bad=true")
    assert skipped.counts[f"skipped_{kind}"] == 1
    assert (skipped.users, skipped.train, skipped.test) == (clean.users, clean.train, clean.test)


@pytest.mark.parametrize(
    ("change", "said", "kind"),
    [
        ({"when": "someday"}, "line 21: the time is neither a number", "time_not_parsed"),
        ({"key": "1"}, "line 21: the id of this record is that of an earlier one of the same user", "duplicate_id"),
        ({"talk": None}, "line 21: the conversation is empty", "empty_conversation"),
    ],
)
def test_bad_times_ids_and_conversations(tmp_path: Path, change: Row, said: str, kind: str) -> None:
    rows = people(MEMBERS[:2])
    rows = [{**row, "when": "2020-01-01", "key": n, "talk": f"t{n}"} for n, row in enumerate(rows)]
    rows.append({**rows[-1], "key": 99, **change})
    path = jsonl(tmp_path / "a.jsonl", rows)
    columns = ("data.columns.time=when", "data.columns.id=key", "data.columns.conversation=talk")
    with pytest.raises(DataError, match=said):
        federation(path, *columns)
    skipped = federation(path, *columns, "data.skip_bad=true")
    assert skipped.counts[f"skipped_{kind}"] == 1
    assert any(fact.startswith("1 rows of the files could not be used") for fact in skipped.facts)


def test_times_of_both_kinds_are_refused_even_where_rows_may_be_left_out(tmp_path: Path) -> None:
    """Else the first row of the file would decide which rows of all other users count."""
    rows = [{**row, "when": "2020-01-01"} for row in people(MEMBERS[:2])]
    for place in (0, len(rows) - 1):
        mixed = [{**row, "when": 12} if at == place else row for at, row in enumerate(rows)]
        path = jsonl(tmp_path / f"{place}.jsonl", mixed)
        for overrides in ((), ("data.skip_bad=true",)):
            with pytest.raises(DataError, match=r"line \d+: the time is a number where .* write all times"):
                federation(path, "data.columns.time=when", *overrides)


def test_ids_are_a_users_own(tmp_path: Path) -> None:
    """Two users may have the same ids, also where a user's name and an id run together in another way."""
    one = MEMBERS[0]
    two = next(f"{one}/{n}" for n in range(40) if role(f"{one}/{n}") == "federation")
    last = two.removeprefix(f"{one}/")
    rows = [{**row, "key": row["target"].split()[-1]} for row in people([one, two])]
    rows.append({"user": one, "input": "x", "target": "y", "key": f"{last}/3"})  # two's id 3, were names not told apart
    found = federation(jsonl(tmp_path / "a.jsonl", rows), "data.columns.id=key")
    assert found.users == (one, two)
    assert sum(len(part) for half in (found.train, found.test) for part in half) == 21
    assert found.test[0][-1].target == "y"


@pytest.mark.parametrize("columns", [(), ("data.columns.time=when",), ("data.columns.conversation=talk",)])
def test_leaving_a_row_out_renames_no_other_and_changes_no_others_candidates(
    tmp_path: Path, columns: tuple[str, ...]
) -> None:
    rows = [
        {**row, "when": f"2020-01-{1 + place // 5:02d}", "talk": f"talk {place}"}
        for place, row in enumerate(people([*MEMBERS[:2], *POOLED[:3]], 8))
    ]
    rows.insert(9, dict(rows[0]))  # identical rows, not beside each other
    rows.insert(12, dict(rows[0]))
    pooled = ("data.pool=true", *columns)
    full = named(federation(jsonl(tmp_path / "full.jsonl", rows), *pooled))
    assert len(full) == len(rows)
    for place, row in enumerate(rows):
        found = federation(jsonl(tmp_path / "less.jsonl", [*rows[:place], *rows[place + 1 :]]), *pooled)
        less = named(found)
        (gone,) = set(full) - set(less)
        assert set(less) < set(full)
        assert full[gone][0] == row["target"]
        assert gone.endswith("-3" if row == rows[0] else "-1")  # of identical rows the last
        same = [name for name in less if row["user"] in MEMBERS or less[name][1] == ()]
        assert all(less[name] == full[name] for name in same)


def test_a_row_number_as_id_hangs_on_other_records(tmp_path: Path) -> None:
    """The control of the test before: renamed records have other candidates."""
    rows = people([MEMBERS[0], *POOLED[:3]], 8)
    options = ("data.pool=true", "data.columns.id=key")
    candidates = []
    for kept in (rows, rows[1:]):  # the first is a member's
        numbered = [{**row, "key": number} for number, row in enumerate(kept)]
        found = named(federation(jsonl(tmp_path / "a.jsonl", numbered), *options))
        candidates.append({text: others for text, others in found.values() if others})
    assert len(candidates[1]) == 7
    assert all(candidates[1][text] != candidates[0][text] for text in candidates[1])


def named(found: Federation) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return by id what a record says and, of members' records, the candidates to rank, the truth first."""
    task = ReplyRanking(TaskConfig(name="reply-ranking", candidates=5))
    examples = task.prepare(found, seed_key(0))
    ranked = {
        name: tuple(examples.texts[at] for at in row)
        for name, row in zip(examples.ids, examples.candidates, strict=True)
    }
    return {name: (said[0], said) for name, said in ranked.items()} | {one.id: (one.text, ()) for one in found.pool}


def test_a_broken_csv_is_told_by_row_or_line_without_its_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    rows = [f"{MEMBERS[0]},in {n},out {n}" for n in range(10)]
    path.write_text("\n".join(["user,input,target", *rows[:3], SECRET_WORDS, *rows[3:]]))
    with pytest.raises(DataError, match=r"mine.csv, row 5 with the header as row 1: 1 cells where") as refused:
        federation(path)
    assert SECRET_WORDS not in str(refused.value)
    assert federation(path, "data.skip_bad=true").counts["skipped_broken_row"] == 1
    path.write_text("\n".join(["user,input,target", *rows[:3], f"{MEMBERS[0]},,out", *rows[3:]]))
    with pytest.raises(DataError, match=r"mine.csv, row 4: the input is empty"):
        federation(path)
    path.write_bytes("\n".join(["user,input,target", *rows]).encode() + b"\nu,\xff,x")
    for overrides in ((), ("data.skip_bad=true",)):
        with pytest.raises(DataError, match=r"mine.csv, line 12: not UTF-8"):
            federation(path, *overrides)
    path.write_text(f"{SECRET_WORDS},in,out\n")  # no header: what stands there may be anybody's text
    with pytest.raises(DataError, match=r"mine.csv: data.columns.user: no column 'user' among the 3 there") as refused:
        federation(path)
    assert SECRET_WORDS not in str(refused.value)


def test_absent_and_odd_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.path is not set"):
        load(load_config(None, ["data.name=files"]), seed_key(0))
    with pytest.raises(DataError, match="nothing there"):
        federation(tmp_path / "none.jsonl")
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"a\.xlsx: not a file that ends in"):
        federation(tmp_path / "a.xlsx")
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"a\.parquet: not a valid parquet file"):
        federation(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no usable record"):
        federation(tmp_path / "a.jsonl")
    rows = people(MEMBERS[:2])
    with pytest.raises(DataError, match=r"b.jsonl, line 1: data.columns.user: no column 'author' .*set it to null"):
        federation(jsonl(tmp_path / "b.jsonl", rows), "data.columns.user=author")
    with pytest.raises(DataError, match=r"b.jsonl: data.columns.user: no line has a column 'author'"):
        federation(tmp_path / "b.jsonl", "data.columns.user=author", "data.skip_bad=true")
    with pytest.raises(DataError, match="no user has enough records"):
        federation(tmp_path / "b.jsonl", "data.min_train=50", "data.max_train=50")


def test_a_column_is_told_by_its_key(tmp_path: Path) -> None:
    rows = [{"user": user, "text": f"in {n}", "stars": n % 5} for user in MEMBERS[:2] for n in range(10)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    columns = "data.columns={input: text, target: star}"
    for name in ("a.jsonl, line 1", "a.parquet"):
        found = f"{name}: data.columns.target: no column 'star' among the 3 there (nearest: 'stars'); name the column"
        with pytest.raises(DataError, match=re.escape(found)) as refused:
            federation(tmp_path / name.partition(",")[0], columns)
        assert "null" not in str(refused.value)  # a target cannot be made up
    with pytest.raises(DataError, match=r"a.jsonl: data.columns.target: no line has a column 'star'"):
        federation(path, columns, "data.skip_bad=true")
    with pytest.raises(DataError, match=r"data.columns.id: no column ''"):
        federation(path, "data.columns={input: text, target: stars, id: ''}")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Rating(TaskConfig(name="rating", low=0, high=4)), "is no number from 0 to 4"),
        (
            Classification(TaskConfig(name="classification", labels=tuple("01234"))),
            "the targets of 1 records are not among task.labels",
        ),
    ],
)
def test_a_task_tells_a_bad_target_by_file_and_line(tmp_path: Path, task: Task, said: str) -> None:
    """Rows of other users come before, so the number of the record in the federation is not that of the line."""
    rows = [{"user": user, "input": f"in {n}", "target": n % 5} for n in range(10) for user in MEMBERS[:3]]
    rows[10]["target"] = SECRET_WORDS
    found = federation(jsonl(tmp_path / "mine.jsonl", rows))
    with pytest.raises(DataError, match=said) as refused:
        task.prepare(found, seed_key(0))
    assert "the record at mine.jsonl, line 11" in str(refused.value)
    assert SECRET_WORDS not in str(refused.value)


def test_places_name_no_record(tmp_path: Path) -> None:
    """Moving a file's rows changes places alone: users, ids and coins stay, and the federations are equal."""
    rows = people(MEMBERS[:3])
    one = federation(jsonl(tmp_path / "a.jsonl", rows))
    path = tmp_path / "b.jsonl"
    path.write_text("\n\n" + jsonl(path, rows).read_text(encoding="utf-8"), encoding="utf-8")
    two = federation(path)
    assert (one.train, one.test) == (two.train, two.test)
    assert hash(one.train) == hash(two.train)
    assert (one.train[0][0].place, two.train[0][0].place) == ("a.jsonl, line 1", "b.jsonl, line 3")


def test_facts_name_no_person_no_text_and_no_folder(tmp_path: Path) -> None:
    rows = [{**row, "talk": f"talk {n}"} for n, row in enumerate(people([*MEMBERS[:4], *POOLED[:2]]))]
    found = federation(jsonl(tmp_path / "a.jsonl", rows), "data.columns.conversation=talk", "data.pool=true")
    for said in found.facts:
        assert str(tmp_path) not in said
        assert not any(word in said.split() for word in (*found.users, *found.pool_authors))
        assert "out u" not in said


@pytest.mark.slow
def test_a_run_on_own_files(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Own ratings in a file: users love or hate what a word says, and a personal head learns whose is whose."""
    from fedpers.simulation import simulate

    words = ("soup", "goal", "song", "beach")
    rows = [
        {"user": user, "text": words[n % 4], "stars": 5 if n % 4 == place % 4 else 1}
        for place, user in enumerate(MEMBERS[:8])
        for n in range(24)
    ]
    for number, row in enumerate(rows):  # a word of its own makes each text another one
        row["text"] += f" {number}"
    data = {
        "name": "files", "path": str(jsonl(tmp_path / "a.jsonl", rows)), "users": None, "min_train": 4, "min_test": 3,
        "columns": {"user": "user", "input": "text", "target": "stars"},
    }  # fmt: skip
    run = simulate(tiny(data=data, task={"name": "rating"}, personal={"epochs": 20}), tmp_path / "run")
    rmse = {model: found["mean"] for model, found in run.summary["metrics"].items()}
    assert rmse["own"] < 0.5 < 1.0 < min(rmse["global"], rmse["swap"], rmse["zero_shot"])


def test_the_configurations_of_the_page_are_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "your_own_data.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in page.split("```yaml\n")[1:]]
    assert len(blocks) == 4
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        assert load_config(path).data.path is not None
