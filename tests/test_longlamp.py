"""LongLaMP: its files, a federation of its people, and the metrics of long texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import nltk
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from nltk.translate.meteor_score import single_meteor_score

from fedpers.config import load_config
from fedpers.data import Federation, load
from fedpers.errors import ConfigError, DataError
from fedpers.evaluation import text_metrics
from fedpers.evaluation.lamp_metrics import score
from fedpers.evaluation.text_metrics import meteor, rouge
from fedpers.formats.longlamp import FORMS, Task, read
from fedpers.formats.longlamp_example import write_example
from fedpers.formats.tables import Skips
from fedpers.privacy.randomness import seed_key

TASKS: tuple[Task, ...] = get_args(Task)
Rows = list[dict[str, Any]]


def federation(path: Path, *overrides: str) -> Federation:
    given = ["data.name=longlamp", f"data.path={path}", "data.min_train=4", "data.min_test=1", *overrides]
    return load(load_config(None, given), seed_key(0))


def edited(file: Path, change: Callable[[Rows], None]) -> Path:
    """Write the example's rows, changed, beside it."""
    rows = json.loads(file.read_text())
    change(rows)
    other = file.with_name(f"other{file.suffix}")
    other.write_text(json.dumps(rows))
    return other


@pytest.fixture
def example(tmp_path: Path) -> Path:
    write_example(tmp_path / "abstract.json", "abstract", users=12, items=8)
    return tmp_path / "abstract.json"


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("task", TASKS)
def test_generated_rows_have_the_fields_of_the_benchmark(tmp_path: Path, task: Task) -> None:
    write_example(tmp_path / "rows.jsonl", task, users=4, items=6, rows=2)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    user = {"abstract": "name", "review": "reviewerId", "topic": "author"}[task]
    fields = {
        "abstract": {"id", "title", "abstract", "year"}, "topic": {"id", "author", "summary", "content"},
        "review": {"overall", "description", "summary", "reviewText"},
    }[task]  # fmt: skip
    assert len(rows) == 8
    for row in rows:
        assert set(row) == {user, "input", "output", "profile"}
        assert all(set(item) == fields for item in row["profile"])
        assert row["input"].startswith("Generate ")


@pytest.mark.parametrize("task", TASKS)
def test_json_jsonl_parquet_and_a_folder_of_parts_are_the_same_people(tmp_path: Path, task: Task) -> None:
    made = []
    for ending in (".json", ".jsonl", ".parquet"):
        write_example(tmp_path / ending[1:] / f"all{ending}", task, users=12, items=8)
        made.append(federation(tmp_path / ending[1:] / f"all{ending}"))
    table = pq.read_table(tmp_path / "parquet" / "all.parquet")
    for part in range(3):
        (tmp_path / "parts").mkdir(exist_ok=True)
        pq.write_table(table.slice(4 * part, 4), tmp_path / "parts" / f"val-0000{part}-of-00003.parquet")
    made += [federation(tmp_path / "parts"), federation(tmp_path / "parts" / "val-*.parquet")]
    assert made[0].users
    assert made[0].source == f"longlamp-{task}"
    assert all(one == made[0] for one in made[1:])


def test_an_item_is_worded_as_the_inputs_and_its_text_is_the_target(tmp_path: Path) -> None:
    expected = {
        "abstract": 'Generate an abstract for the title "{title}"',
        "topic": "Generate the content for a reddit post {summary}",
        "review": 'Generate the review text written by a reviewer who has a given an overall rating of "{overall}" for '
        'a product with description "{description}". The summary of the review text is "{summary}".',
    }
    answers = {"abstract": "abstract", "topic": "content", "review": "reviewText"}
    for task in TASKS:
        file = tmp_path / f"{task}.json"
        write_example(file, task, users=12, items=8)
        rows = {row[FORMS[task].user]: row for row in json.loads(file.read_text())}
        made = federation(file)
        for user, train, test in zip(made.users, made.train, made.test, strict=True):
            told = [(expected[task].format(**item), item[answers[task]]) for item in rows[user]["profile"]]
            assert [(record.input, record.target) for record in train] == told
            assert [(record.input, record.target) for record in test] == [(rows[user]["input"], rows[user]["output"])]


def test_a_number_is_worded_as_it_is_written_and_an_empty_summary_is_none(tmp_path: Path) -> None:
    write_example(tmp_path / "review.json", "review", users=1, items=4)

    def change(rows: Rows) -> None:
        rows[0]["profile"][0] |= {"overall": 5.0, "summary": ""}

    _, (question,) = read(str(edited(tmp_path / "review.json", change)), Skips(False))
    assert 'rating of "5.0" for' in question.items[0].input
    assert question.items[0].input.endswith('text is "".')


# ---------------------------------------------------------------- people


@pytest.mark.parametrize("task", TASKS)
def test_a_planted_signal_is_in_the_own_profile_and_not_in_anothers(tmp_path: Path, task: Task) -> None:
    """Words of a user's profile are found in what the user writes, those of somebody with another topic are not."""
    write_example(tmp_path / "rows.json", task, users=16, items=16)
    made = federation(tmp_path / "rows.json")
    words = [{word for record in train for word in record.target.split()} for train in made.train]

    def near(owner: int, user: int) -> float:
        target = made.test[user][0].target.split()
        return sum(word in words[owner] for word in target) / len(target)

    heart = [int(user.removeprefix("person")) % 4 for user in made.users]
    own = [near(user, user) for user in range(len(made.users))]
    others = [near(o, u) for u in range(len(heart)) for o in range(len(heart)) if heart[o] != heart[u]]
    assert min(own) > 0.8
    assert sum(others) / len(others) < 0.7


def test_rows_of_one_user_are_one_person_and_equal_items_one_record(example: Path, tmp_path: Path) -> None:
    write_example(tmp_path / "two.json", "abstract", users=12, items=8, rows=2)
    made = federation(tmp_path / "two.json")
    assert all((len(train), len(test)) == (8, 2) for train, test in zip(made.train, made.test, strict=True))
    repeated = federation(edited(example, lambda rows: rows.append(rows[0])))
    assert repeated.counts["skipped_repeated_rows"] == 1
    assert (repeated.users, repeated.test) == (federation(example).users, federation(example).test)


def test_record_ids_hang_on_no_other_record(example: Path) -> None:
    """Coins and batches are drawn by them: leaving an item out must rename none."""
    whole, user = federation(example), federation(example).users[0]

    def change(rows: Rows) -> None:
        next(row for row in rows if row["name"] == user)["profile"].pop(2)

    less = federation(edited(example, change))
    assert less.train[0] == (*whole.train[0][:2], *whole.train[0][3:])
    assert less.train[1:] == whole.train[1:]
    assert less.users == whole.users


def test_years_order_items_and_where_one_lacks_the_file_does(example: Path) -> None:
    def turned(rows: Rows) -> None:
        for row in rows:
            row["profile"].reverse()

    def undated(rows: Rows) -> None:
        turned(rows)
        for row in rows:
            row["profile"][3]["year"] = None

    assert federation(edited(example, turned)).train == federation(example).train
    made = federation(edited(example, undated))
    assert made.train[0] == federation(example).train[0][::-1]
    assert any("their order in the file stands for time" in fact for fact in made.facts)
    assert not any("stands for time" in fact for fact in federation(example).facts)


def test_an_item_that_holds_the_answer_is_left_out_counted_and_told(example: Path) -> None:
    clean, leaked = federation(example), federation(example).users[1]
    assert clean.counts["skipped_items_with_the_answer"] == 0

    def leak(rows: Rows) -> None:
        row = next(row for row in rows if row["name"] == leaked)
        row["profile"].append(
            {"id": "x", "title": "t", "year": 2000, "abstract": f"Before.  {row['output'].upper()} !"}
        )
        row["profile"].append({"id": "y", "title": "t", "year": 2000, "abstract": row["output"][:-2]})
        other = next(row for row in rows if row["name"] == clean.users[0])
        other["profile"].append({"id": "z", "title": "t", "year": 2000, "abstract": row["output"]})

    made = federation(edited(example, leak))
    assert made.counts["skipped_items_with_the_answer"] == 1
    assert [len(train) for train in made.train[:3]] == [9, 9, 8]
    assert any(fact.startswith("1 profile items were left out because they hold an answer") for fact in made.facts)
    assert any(fact.startswith("the answers to 1 of") for fact in made.facts)


def test_development_users_are_nobody_of_the_federation(tmp_path: Path) -> None:
    write_example(tmp_path / "rows.json", "topic", users=60, items=4)
    made, others = federation(tmp_path / "rows.json"), federation(tmp_path / "rows.json", "data.people=development")
    assert len(made.users) + len(others.users) == 60
    assert others.users
    assert not set(made.users) & set(others.users)


# ---------------------------------------------------------------- what cannot be used


BROKEN: dict[str, tuple[Callable[[Rows], None], str]] = {
    "nobody's": (
        lambda rows: rows[2].pop("name"),
        r"other.json, row 3: no field name, which a row of the abstract task",
    ),
    "first nobody's": (
        lambda rows: rows[0].pop("name"),
        r"row 1: 0 of the fields that say whose .* name \(abstract\), reviewerId \(review\), author \(topic\)",
    ),
    "no profile": (lambda rows: rows[1].pop("profile"), r"row 2: no field profile"),
    "a profile that is a text": (lambda rows: rows[1].update(profile="secret"), r"the profile is a str, not a list"),
    "no output": (lambda rows: rows[1].update(output=" "), r"row 2: the output is empty"),
    "no object": (lambda rows: rows.insert(3, "secret"), r"row 4: no field name"),  # type: ignore[arg-type]
    "another task's item": (
        lambda rows: rows[1]["profile"].insert(1, {"summary": "secret", "content": "secret"}),
        r"row 2, profile item 2: no field title, which a profile item of the abstract task has; mend it, or",
    ),
    "an empty item": (
        lambda rows: rows[1]["profile"][4].update(abstract=None),
        r"profile item 5: the abstract is empty",
    ),
    "an odd year": (lambda rows: rows[1]["profile"][4].update(year="secret"), r"item 5: the year is no whole number"),
    "nothing": (lambda rows: rows.clear(), r"there is no row in the files"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_used_is_told_with_its_place_and_no_word_of_it(example: Path, what: str) -> None:
    change, said = BROKEN[what]
    with pytest.raises(DataError, match=said) as found:
        federation(edited(example, change))
    assert "secret" not in str(found.value)


def test_bad_items_may_be_left_out_but_rows_may_not(example: Path) -> None:
    made = federation(edited(example, BROKEN["an empty item"][0]), "data.skip_bad=true")
    assert made.counts["skipped_empty_abstract"] == 1
    assert any(fact.startswith("1 profile items, counted in each row's profile, could not be") for fact in made.facts)
    with pytest.raises(DataError, match="row 2: the output is empty; use the files as LongLaMP gives them out"):
        federation(edited(example, BROKEN["no output"][0]), "data.skip_bad=true")


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    cases = {
        "a.json": (b"{}", "a.json: a dict, not a list of rows"),
        "b.json": (b'[{"name": "secret"', "b.json: not valid JSON"),
        "c.jsonl": (b'{"name": \xff}', "c.jsonl, line 1: not UTF-8 at its byte 10"),
        "d.jsonl": (b'\n{"name" "secret"}\n', "d.jsonl, line 2: not valid JSON"),
        "e.parquet": (b"secret", "e.parquet: not a valid Parquet file"),
        "f.txt": (b"secret", "f.txt: not a file that ends in .json, .jsonl"),
    }
    for name, (content, said) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=said) as found:
            federation(tmp_path / name)
        assert "secret" not in str(found.value)
    with pytest.raises(DataError, match=r"data\.path is not set"):
        load(load_config(None, ["data.name=longlamp"]), seed_key(0))
    with pytest.raises(DataError, match="expected a name that ends in"):
        write_example(tmp_path / "rows.csv", "topic")


def test_a_table_whose_items_lack_a_field_is_refused_as_rows_are(tmp_path: Path) -> None:
    row = {"author": "a", "input": "Generate", "output": "text", "profile": [{"summary": "s", "text": "t"}]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet, row 1, profile item 1: no field content, which a profile item"):
        federation(tmp_path / "rows.parquet")


# ---------------------------------------------------------------- metrics


HYPOTHESIS = "It is a guide to action which ensures that the military always obeys the commands of the party"
REFERENCE = "It is a guide to action that ensures that the military will forever heed Party commands"


class _Synonyms:
    """Stands where nltk's WordNet reader does: `car` and `wagon` mean the same."""

    def ensure_loaded(self) -> None:
        return

    def synsets(self, word: str) -> list[Any]:
        lemma = type("Lemma", (), {"name": lambda self: "wagon"})()
        return [type("Synset", (), {"lemmas": lambda self: [lemma]})()] if word == "car" else []


def without_wordnet(patch: pytest.MonkeyPatch) -> None:
    """Let nltk look for its data where there are none, whatever this machine has."""
    patch.setattr(nltk.data, "path", [])
    patch.setattr(nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader))


def test_meteor_by_hand_without_synonyms(monkeypatch: pytest.MonkeyPatch) -> None:
    without_wordnet(monkeypatch)
    pairs = [
        ("the cats sat", "the cat sat"),
        ("a b x d", "a b c d"),
        ("", "words"),
        ("none", "of them"),
        ("Cat", "cat"),
    ]
    ((name, found),) = meteor(pairs).items()
    assert name == "meteor_exact_stem"
    # P = R = 1, one chunk of 3 matches; P = R = 3/4, two chunks of 3; nothing; nothing; one chunk of 1
    assert found == pytest.approx([1 - 0.5 / 27, 0.75 * (1 - 0.5 * (2 / 3) ** 3), 0.0, 0.0, 0.5])
    (recall,) = meteor([("a b", "a b c d")])[name]  # P = 1, R = 1/2: F = PR / (0.9 P + 0.1 R)
    assert recall == pytest.approx(0.5 / 0.95 * (1 - 0.5 / 8))


def test_meteor_is_nltks_and_its_name_says_whether_synonyms_count(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("a red car", "a red wagon"), (HYPOTHESIS, REFERENCE)]
    split = [[text.split() for text in pair] for pair in pairs]
    monkeypatch.setattr(nltk.corpus, "wordnet", _Synonyms())
    found = meteor(pairs)
    assert set(found) == {"meteor"}
    with_synonyms = [single_meteor_score(truth, said, wordnet=_Synonyms()) for said, truth in split]
    assert found["meteor"] == pytest.approx(with_synonyms)
    assert found["meteor"][0] == pytest.approx(1 - 0.5 / 27)
    assert found["meteor"][1] == pytest.approx(0.6944, abs=1e-4), "the value in nltk's documentation"

    without_wordnet(monkeypatch)
    bare = meteor(pairs)
    assert set(bare) == {"meteor_exact_stem"}
    assert bare["meteor_exact_stem"][0] == pytest.approx(2 / 3 * (1 - 0.5 / 8)), "a car is no wagon any more"


def test_punctuation_is_no_part_of_a_word() -> None:
    ((value,),) = meteor([("cat .", "cat.")]).values()
    assert value == pytest.approx(1 - 0.5 / 8)


def test_rouge_of_a_pair_is_what_lamp_averages() -> None:
    pairs = [("a b c", "a c d e"), ("x", "x")]
    found = rouge(pairs)
    assert found["rouge-1"] == pytest.approx([4 / 7, 1.0])
    said, true = ({str(n): pair[side] for n, pair in enumerate(pairs)} for side in (0, 1))
    assert score("4", said, true) == pytest.approx({name: sum(one) / 2 for name, one in found.items()})


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(text_metrics.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"METEOR needs nltk; run `pip install nltk==3\.10\.4`"):
        meteor(())
    with pytest.raises(ConfigError, match=r"ROUGE needs rouge-score; run `pip install rouge-score==0\.1\.2`"):
        rouge(())
