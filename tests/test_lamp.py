"""LaMP: its files, its prompts, its metrics, and a federation of its people."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from fedpers.config import Config, load_config
from fedpers.data import Federation, load
from fedpers.data.base import role
from fedpers.errors import ConfigError, DataError
from fedpers.evaluation.lamp_metrics import number_of, score, score_files
from fedpers.formats.lamp import FORMS, HuggingFaceTokens, Item, Task, asked, prompt, read, retrieve
from fedpers.formats.lamp_example import write_example
from fedpers.formats.tables import Skips
from fedpers.privacy.randomness import seed_key

TASKS = get_args(Task)
USER_SPLIT = ("data.name=lamp", "data.min_train=4", "data.min_test=1")


class Words:
    """Tokens that are words."""

    def length(self, text: str) -> int:
        return len(text.split())

    def cut(self, text: str, most: int) -> tuple[str, int]:
        words = text.split()[:most]
        return " ".join(words), len(words)


def federation(folder: Path, task: str, *overrides: str) -> Federation:
    return load(
        load_config(None, [*USER_SPLIT, f"data.path={folder}", f"data.lamp.task={task}", *overrides]), seed_key(0)
    )


def edit(file: Path, change: Callable[[Any], None]) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["user", "time"])
def test_generated_files_have_the_benchmarks_form(tmp_path: Path, task: Task, split: Any) -> None:
    write_example(tmp_path, task, users=4, items=6, split=split)
    assert {file.name for file in tmp_path.iterdir()} == {
        "train_questions.json", "train_outputs.json", "dev_questions.json", "dev_outputs.json", "test_questions.json",
    }  # fmt: skip
    fields = {
        "1": {"title", "abstract"}, "2": {"description", "tag"}, "2-news": {"text", "title", "category"},
        "3": {"text", "score"}, "4": {"title", "text"}, "5": {"title", "abstract"}, "6": {"text", "title"},
        "7": {"text"},
    }[task]  # fmt: skip
    dated = {"date"} if split == "time" else set()
    for question in json.loads((tmp_path / "dev_questions.json").read_text()):
        assert set(question) == {"id", "input", "profile"} | ({"user_id"} if dated else set())
        assert all(set(item) == {"id"} | fields | dated for item in question["profile"])
    outputs = json.loads((tmp_path / "dev_outputs.json").read_text())
    assert outputs["task"] == f"LaMP_{task[0]}"
    assert all(set(gold) == {"id", "output"} for gold in outputs["golds"])
    questions = read(tmp_path, task, "dev", split == "time", Skips(False))
    assert len({question.user for question in questions}) == 4
    assert all(len(question.items) == 6 and asked(task, question.input) for question in questions)


def test_people_differ_between_parts_of_the_user_split_and_return_in_the_time_split(tmp_path: Path) -> None:
    for split, same in (("user", False), ("time", True)):
        write_example(tmp_path / split, "3", users=5, split=split)  # type: ignore[arg-type]
        people = [{q.user for q in read(tmp_path / split, "3", p, same, Skips(False))} for p in ("train", "dev")]
        assert (people[0] == people[1]) is same
        assert bool(people[0] & people[1]) is same


@pytest.mark.parametrize("task", ["2", "3", "4", "7"])
def test_a_planted_signal_is_found_in_the_own_profile_and_not_in_anothers(tmp_path: Path, task: Task) -> None:
    """A nearest neighbour by shared words answers for its user, and does worse with another user's profile."""
    write_example(tmp_path, task, users=40, items=40)
    made = federation(tmp_path, task)
    users = range(len(made.users))

    def answer(user: int, text: str) -> str:
        words = set(text.split())
        return max(made.train[user], key=lambda one: len(words & set(one.input.split()))).target

    def hit(owner: int, user: int) -> bool:
        record = made.test[user][0]
        said, truth = answer(owner, record.input), record.target
        if task == "3":
            return (said > "3") == (truth > "3")
        return said.split()[0] == truth.split()[0]

    own = sum(hit(user, user) for user in users) / len(users)
    other = sum(hit((user + 1) % len(users), user) for user in users) / len(users)
    assert own > 0.9
    assert other < 0.7


def test_profiles_become_training_records_in_the_words_of_the_questions(tmp_path: Path) -> None:
    for task in TASKS[1:]:
        write_example(tmp_path / task, task, users=12, items=8)
        made = federation(tmp_path / task, task)
        assert made.users
        assert all(role(user) != "development" for user in made.users)
        for train, test in zip(made.train, made.test, strict=True):
            assert len(test) == 1
            before = FORMS[task].prompt.split("{text}")[0] if task != "7" else "tweet:"
            assert all(record.input.startswith(before) for record in train)
            assert all("{" not in record.input and record.target for record in (*train, *test))
    bare = federation(tmp_path / "3", "3", "data.lamp.form=text")
    assert not any("review:" in record.input for record in (*bare.train[0], *bare.test[0]))


def test_lamp_1_is_refused_with_its_reason(tmp_path: Path) -> None:
    write_example(tmp_path, "1", users=4)
    with pytest.raises(DataError, match="no citations"):
        federation(tmp_path, "1")


def test_items_that_hold_the_answer_are_counted_and_others_answers_are_told(tmp_path: Path) -> None:
    write_example(tmp_path, "4", users=12, items=8)
    clean = federation(tmp_path, "4")
    assert clean.counts["skipped_items_with_the_answer"] == 0
    leaked, other = clean.users[0], clean.users[1]
    golds = {one["id"]: one["output"] for one in json.loads((tmp_path / "dev_outputs.json").read_text())["golds"]}

    def leak(tree: Any) -> None:
        by_id = {question["id"][:-2]: question for question in tree}
        question = by_id[leaked[:-2]]
        text = f"Before it. {question['input'].partition(': ')[2].upper()}  And after."
        question["profile"].append({"id": "held", "text": text, "title": golds[question["id"]]})
        question["profile"].append({"id": "not", "text": text, "title": "another title"})
        same = {"id": "coauthor", "text": asked("4", question["input"]), "title": golds[question["id"]]}
        by_id[other[:-2]]["profile"].append(same)

    edit(tmp_path / "dev_questions.json", leak)
    made = federation(tmp_path, "4")
    assert made.counts["skipped_items_with_the_answer"] == 1
    assert any(fact.startswith("1 profile items were left out because they hold an answer") for fact in made.facts)
    ids = {record.id for held in made.train for record in held}
    assert f"{leaked}/item/not" in ids
    assert f"{leaked}/item/held" not in ids
    assert f"{other}/item/coauthor" in ids  # what a client trains on does not hang on others
    assert any(fact.startswith("1 of ") and "another member's profile" in fact for fact in made.facts)


def test_the_leak_check_of_tweets_and_of_labels(tmp_path: Path) -> None:
    for task, same in (("7", True), ("3", True), ("3", False)):
        folder = tmp_path / f"{task}{same}"
        write_example(folder, task, users=6, items=8)  # type: ignore[arg-type]
        golds = json.loads((folder / "dev_outputs.json").read_text())["golds"]

        def leak(tree: Any, task: Any = task, same: bool = same, golds: Any = golds) -> None:
            for question, gold in zip(tree, golds, strict=True):
                item = {"id": "held", "text": asked(task, question["input"])}
                if task == "7":
                    item["text"] = f"RT {gold['output']}"
                else:
                    item["score"] = gold["output"] if same else str(6 - int(gold["output"]))
                question["profile"].append(item)

        edit(folder / "dev_questions.json", leak)
        assert federation(folder, task).counts["skipped_items_with_the_answer"] == (6 if same else 0)


def test_the_time_split_joins_a_persons_questions_and_sorts_by_date(tmp_path: Path) -> None:
    write_example(tmp_path, "3", users=6, items=10, split="time")
    edit(tmp_path / "dev_questions.json", lambda tree: [question["profile"].reverse() for question in tree])
    made = federation(tmp_path, "3", "data.lamp.split=time", "data.min_test=2")
    for user, train, test in zip(made.users, made.train, made.test, strict=True):
        assert [record.id for record in train] == [f"{user}/item/{user}{place:03d}" for place in range(10)]
        assert len(test) == 2
    assert not any("date" in fact and "order in the file" in fact for fact in made.facts)
    write_example(tmp_path / "user", "3", users=6)
    assert any("order in the file" in fact for fact in federation(tmp_path / "user", "3").facts)
    with pytest.raises(DataError, match=r"dev_questions.json, question 1: the user_id is empty"):
        federation(tmp_path / "user", "3", "data.lamp.split=time")


def test_a_merged_file_gives_the_same_people(tmp_path: Path) -> None:
    write_example(tmp_path, "2", users=8)
    questions = json.loads((tmp_path / "dev_questions.json").read_text())
    golds = {one["id"]: one["output"] for one in json.loads((tmp_path / "dev_outputs.json").read_text())["golds"]}
    merged = tmp_path / "merged.json"
    merged.write_text(json.dumps([{**question, "output": golds[question["id"]]} for question in questions]))
    one, two = federation(tmp_path, "2"), federation(merged, "2")
    assert (one.users, one.train, one.test) == (two.users, two.train, two.test)


def _drop(tree: Any) -> None:
    del tree[1]["input"]


def _twice(tree: Any) -> None:
    tree[2]["id"] = tree[0]["id"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop, r"dev_questions.json, question 2: the input is empty"),
        (_twice, r"(1 questions have the id|question 3)"),
        (lambda tree: tree[1].update(input="Who am I?"), r"question 2: the input is not in the form of LaMP-2"),
        (lambda tree: tree[3].update(profile="none"), r"question 4: not an object with id, input and a list"),
        (lambda tree: tree[0]["profile"][2].update(tag="musical"), r"question 1, profile item 3: the tag is none of"),
        (lambda tree: tree[0]["profile"][2].update(description=" "), r"profile item 3: the description is empty"),
        (lambda tree: tree[0]["profile"][2].update(tag=["comedy"]), r"profile item 3: the tag holds a list"),
        (
            lambda tree: tree[0]["profile"][1].update(id=tree[0]["profile"][0]["id"]),
            r"item 2: the id is that of an ear",
        ),
        (lambda tree: tree[0]["profile"][1].update(date="May 4th"), r"profile item 2: the date is not YYYY-MM-DD"),
        (lambda tree: tree.pop(), r"dev_outputs.json: 1 answers belong to no question"),
    ],
)
def test_bad_input_is_refused_with_its_place_and_without_its_text(tmp_path: Path, change: Any, said: str) -> None:
    write_example(tmp_path, "2", users=4, items=5)
    edit(tmp_path / "dev_questions.json", change)
    with pytest.raises(DataError, match=said) as refused:
        federation(tmp_path, "2")
    assert str(tmp_path) not in str(refused.value)
    assert "musical" not in str(refused.value)
    assert "May" not in str(refused.value)


def test_bad_items_may_be_left_out_and_counted_but_not_bad_questions(tmp_path: Path) -> None:
    write_example(tmp_path, "2", users=4, items=8)

    def spoil(tree: Any) -> None:
        tree[0]["profile"][0]["tag"] = "musical"
        tree[0]["profile"][1]["tag"] = None
        tree[1]["profile"][1]["tag"] = ""

    edit(tmp_path / "dev_questions.json", spoil)
    made = federation(tmp_path, "2", "data.skip_bad=true")
    assert any(fact.startswith("3 profile items, counted in each question's profile") for fact in made.facts)
    assert (made.counts["skipped_unknown_label"], made.counts["skipped_empty_tag"]) == (1, 2)
    assert sum(map(len, made.train)) == len(made.users) * 8 - 3
    edit(tmp_path / "dev_questions.json", _drop)
    with pytest.raises(DataError, match="question 2"):
        federation(tmp_path, "2", "data.skip_bad=true")


def test_broken_files_are_told_with_their_line(tmp_path: Path) -> None:
    write_example(tmp_path, "3", users=3, items=4)
    outputs = tmp_path / "dev_outputs.json"
    whole = outputs.read_bytes()
    lines = whole.splitlines()
    outputs.write_bytes(b"\n".join([*lines[:4], b"oops", *lines[4:]]))
    with pytest.raises(DataError, match=r"dev_outputs.json, line 5, column 1: not valid JSON"):
        federation(tmp_path, "3")
    outputs.write_bytes(b"\n".join([*lines[:4], b'"\xff"', *lines[4:]]))
    with pytest.raises(DataError, match=r"dev_outputs.json, line 5: not UTF-8"):
        federation(tmp_path, "3")
    outputs.write_bytes(whole.replace(b"LaMP_3", b"LaMP_4"))
    with pytest.raises(DataError, match="another task than LaMP_3"):
        federation(tmp_path, "3")
    outputs.unlink()
    with pytest.raises(DataError, match=r"dev_outputs.json: cannot be read"):
        federation(tmp_path, "3")
    with pytest.raises(DataError, match=r"data.min_test = 5: .* set data.min_test=1"):
        federation(tmp_path, "3", "data.min_test=5")


def item(text: str, answer: str, searched: str | None = None) -> Item:
    return Item(text, text, answer, searched or text, None)


def test_prompts_are_worded_as_the_benchmark_words_them() -> None:
    two = [item("a b", "X"), item("c", "Y")]
    expected = {
        "2": 'the tag for the movie: "a b" is "X" , and the tag for the movie: "c" is "Y" . Q',
        "2-news": 'the category for the article: "a b" is "X" , and the category for the article: "c" is "Y" . Q',
        "3": 'X is the score for "a b" , and Y is the score for "c" . Q',
        "4": '"X" is the title for "a b" , and "Y" is the title for "c" . Q',
        "5": '"X" is a title for "a b" , and "Y" is a title for "c" . Following the given patterns Q',
        "6": '"X" is the title for "a b" , and "Y" is the title for "c" . Q',
        "7": '"X" , and "Y"  are written by a person. Following the given patterns Q',
    }
    for task, worded in expected.items():
        assert prompt(task, "Q", two, 200, Words()) == worded  # type: ignore[arg-type]
        assert prompt(task, "Q", two, 6, Words()) == "Q"  # type: ignore[arg-type]  # no room for any item
    cited = prompt("1", 'the title "T", which', [item("x", "Own one"), item("y", "Own two")], 100, Words())
    assert cited == 'the title, and "Own one", and "Own two" "T", which'


def test_the_tokens_are_shared_evenly_and_what_is_left_over_goes_on() -> None:
    """Limit 44, question 4: room 40; each (40 - 1 - 2) // 2 = 18, of which `X is the score for " "` takes 7."""
    long = " ".join("w" * 50)
    question = "q q q q"
    shown = prompt("3", question, [item(long, "1"), item(long, "5")], 44, Words())
    assert [part.count("w") for part in shown.split(", and ")] == [11, 11]
    shown = prompt("3", question, [item("w w", "1"), item(long, "5")], 44, Words())
    assert [part.count("w") for part in shown.split(", and ")] == [2, 11 + 9]
    assert shown.endswith(f". {question}")
    # A question longer than 60% of the limit counts as 60% of it, as in the benchmark.
    shown = prompt("3", " ".join("q" * 100), [item(long, "1")], 50, Words())
    assert shown.count("w") == 50 - 30 - 1 - 7


def test_prompts_keep_to_the_limit_by_a_real_tokenizer(random_tiny_bert: Path) -> None:
    import transformers

    tokens = HuggingFaceTokens(transformers.AutoTokenizer.from_pretrained(random_tiny_bert))
    items = [item(" ".join(["soup", "bread"] * 40), str(1 + place)) for place in range(3)]
    shown = prompt("3", "review: goal team", items, 120, tokens)
    assert 90 < tokens.length(shown) <= 120
    assert shown.count("is the score for") == 3


def test_retrievers_rank_as_the_benchmark_does() -> None:
    items = [item("far away things", "1"), item("bread and soup", "2"), item("soup soup soup and bread", "3")]
    items += [item(f"filler number {place}", "4") for place in range(5)]
    found = retrieve("3", "soup", items, 2, "bm25")
    assert [one.answer for one in found] == ["3", "2"]
    # BM25Okapi by hand for two documents of eight that hold "soup": idf = ln((8 - 2 + .5) / (2 + .5)).
    lengths = [len(one.searched.split()) for one in items]
    mean, idf = sum(lengths) / 8, math.log(6.5 / 2.5)
    by_hand = [idf * n * 2.5 / (n + 1.5 * (0.25 + 0.75 * lengths[place] / mean)) for n, place in ((1, 1), (3, 2))]
    import rank_bm25

    got = rank_bm25.BM25Okapi([one.searched.split() for one in items]).get_scores(["soup"])
    assert got[[1, 2]] == pytest.approx(by_hand)
    assert retrieve("3", "soup", items, 3, "recency") == items[:-4:-1]
    assert retrieve("3", "unheard of", items, 1, "bm25") == items[:1]  # ties: the earlier
    assert retrieve("3", "soup", [], 3, "bm25") == []
    assert asked("1", FORMS["1"].prompt.format(text="own", first="ref a", second="ref b")) == "ref a ref b"


def test_retrieved_items_are_no_training_records(tmp_path: Path, random_tiny_bert: Path) -> None:
    """A record in the prompts of others would be in many gradients."""
    write_example(tmp_path, "3", users=8, items=12)
    made = federation(
        tmp_path, "3", "data.lamp.retrieve=2", f"data.lamp.tokenizer={random_tiny_bert}", "data.max_tokens=200",
        "data.lamp.history=0.5",
    )  # fmt: skip
    questions = {question.user: question for question in read(tmp_path, "3", "dev", False, Skips(False))}
    for user, train, test in zip(made.users, made.train, made.test, strict=True):
        items = questions[user].items
        trained = {record.id.removeprefix(f"{user}/item/") for record in train}
        assert [one.id for one in items if one.id in trained] == [record.id.split("/")[-1] for record in train]
        for record in train:
            before = record.input.partition("What is the score")[0]
            assert before.count("is the score for") == min(2, len(items) - len(train))
            assert not any(f'"{one.text}"' in before for one in items if one.id in trained)
        assert test[0].input.count("is the score for") == 2
    history = 12 * len(made.users) - sum(map(len, made.train))
    assert 0.2 < history / (12 * len(made.users)) < 0.8
    assert any(fact.startswith(f"{history} profile items shape the prompts") for fact in made.facts)
    with pytest.raises(ConfigError, match=r"retrieve > 0 needs data\.lamp\.tokenizer"):
        federation(tmp_path, "3", "data.lamp.retrieve=2")
    with pytest.raises(ConfigError, match="no tokenizer there"):
        federation(tmp_path, "3", "data.lamp.retrieve=2", f"data.lamp.tokenizer={tmp_path}")


@pytest.mark.parametrize("retriever", ["bm25", "recency"])
def test_leaving_a_training_record_out_changes_no_other(tmp_path: Path, random_tiny_bert: Path, retriever: str) -> None:
    write_example(tmp_path, "3", users=3, items=12)
    options = (
        "data.lamp.retrieve=2", f"data.lamp.tokenizer={random_tiny_bert}", "data.max_tokens=200", "data.min_train=1",
        f"data.lamp.retriever={retriever}",
    )  # fmt: skip
    questions = tmp_path / "dev_questions.json"
    whole = json.loads(questions.read_text())
    full = federation(tmp_path, "3", *options)
    user = full.users[0]
    place = next(n for n, question in enumerate(whole) if question["id"] == user)
    trained = {record.id for record in full.train[0]}
    assert 2 <= len(trained) <= 10
    for item in whole[place]["profile"]:
        tree = json.loads(json.dumps(whole))
        tree[place]["profile"].remove(item)
        questions.write_text(json.dumps(tree))
        less = federation(tmp_path, "3", *options)
        name = f"{user}/item/{item['id']}"
        assert less.train[1:] == full.train[1:]
        assert {record.id for record in less.train[0]} == trained - {name}  # the history is no other one either
        if name in trained:
            assert less.train[0] == tuple(record for record in full.train[0] if record.id != name)


def test_dates_in_a_part_of_a_profile_are_refused(tmp_path: Path) -> None:
    write_example(tmp_path, "3", users=6, items=8)

    def date(tree: Any, items: int) -> None:
        for number, item in enumerate(tree[0]["profile"][:items]):
            item["date"] = f"2020-01-{20 - number}"

    edit(tmp_path / "dev_questions.json", lambda tree: date(tree, 7))
    for overrides in ((), ("data.skip_bad=true",)):
        with pytest.raises(DataError, match=r"a date in 7 of its 8 items; give all"):
            federation(tmp_path, "3", *overrides)
    edit(tmp_path / "dev_questions.json", lambda tree: date(tree, 8))  # all of one person's, none of the others'
    found = federation(tmp_path, "3")
    orders = {u: [record.id for record in train] for u, train in zip(found.users, found.train, strict=True)}
    dated = json.loads((tmp_path / "dev_questions.json").read_text())[0]["id"]
    assert all(ids == sorted(ids, reverse=user == dated) for user, ids in orders.items())


def test_accuracy_and_macro_f1_over_the_fixed_labels() -> None:
    """By hand: [1] has 1 right, 1 given wrongly; [2] has 1 right; one prediction has a wrong form."""
    answers = {"a": "[1]", "b": "[2]", "c": "[2]", "d": "[1]"}
    said = {"a": "[1]", "b": " [2]\n", "c": "[1]", "d": "the first"}
    assert score("1", said, answers) == pytest.approx({"accuracy": 0.5, "f1": (2 / 4 + 2 / 3) / 2})
    # LaMP-2: thirteen labels that nobody gave count as zero each.
    tags = {"a": "comedy", "b": "action"}
    assert score("2", tags, tags) == pytest.approx({"accuracy": 1.0, "f1": 2 / 15})
    assert score("2", {"a": "Comedy", "b": "none"}, tags) == {"accuracy": 0.0, "f1": 0.0}
    with pytest.raises(DataError, match="1 are none of the 15 labels"):
        score("2", tags, {"a": "comedy", "b": "musical"})


def test_ratings_fall_back_to_the_farther_end() -> None:
    assert [number_of("five stars", truth) for truth in ("1", "2", "3", "4", "5")] == [5, 5, 5, 1, 1]
    assert [number_of(said, "4") for said in ("4.5", " 2 ", "100", "nan", "inf", "")] == [4.5, 2, 100, 1, 1, 1]
    answers = {"a": "5", "b": "3", "c": "2"}
    got = score("3", {"a": "4", "b": "no idea", "c": "2"}, answers)  # errors 1, 2, 0
    assert got == pytest.approx({"MAE": 1.0, "RMSE": math.sqrt(5 / 3)})


def test_rouge_by_hand() -> None:
    """`the soup was good` and `good the soup`: all three words in common, `the soup` in order."""
    answers = {"a": "The soup was good!", "b": "running"}
    got = score("4", {"a": "good, the soup", "b": "runs"}, answers)  # no stemming
    assert got == pytest.approx({"rouge-1": (2 * 3 / 7) / 2, "rouge-L": (2 * 2 / 7) / 2})
    assert score("7", {"a": ""}, {"a": "words"}) == {"rouge-1": 0.0, "rouge-L": 0.0}


def test_prediction_files_are_scored_and_ids_have_to_match(tmp_path: Path) -> None:
    write_example(tmp_path, "3", users=5, items=4)
    answers = tmp_path / "dev_outputs.json"
    assert score_files(answers, answers, "3") == {"MAE": 0.0, "RMSE": 0.0}
    predictions = tmp_path / "said.json"
    predictions.write_text(answers.read_text())
    edit(predictions, lambda tree: tree["golds"].pop())
    with pytest.raises(DataError, match="1 questions have none, and 0 are of no question"):
        score_files(predictions, answers, "3")
    edit(predictions, lambda tree: tree["golds"].append(tree["golds"][0]))
    with pytest.raises(DataError, match="output 5: the id is that of an earlier one"):
        score_files(predictions, answers, "3")


def test_labels_are_those_of_the_benchmark() -> None:
    assert {task: len(form.labels) for task, form in FORMS.items()} == Counter(
        {"1": 2, "2": 15, "2-news": 15, "3": 5, "4": 0, "5": 0, "6": 0, "7": 0}
    )
    assert all(label in FORMS[task].prompt for task in ("2", "2-news") for label in FORMS[task].labels)


@pytest.mark.slow
def test_a_run_on_generated_ratings(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """From LaMP's files to personal ratings that fit their person better than another's do."""
    from fedpers.simulation import simulate

    write_example(tmp_path / "lamp", "3", users=32, items=40)
    data = {
        "name": "lamp", "path": str(tmp_path / "lamp"), "users": None, "min_train": 4, "min_test": 1,
        "max_train": 40, "max_test": 1, "max_tokens": 32, "lamp": {"task": 3, "form": "text"},
    }  # fmt: skip
    personal = {"epochs": 30, "optimizer": "adam", "lr": {"head": 0.05}}
    run = simulate(tiny(data=data, task={"name": "rating"}, personal=personal), tmp_path / "run")
    rmse = {model: found["mean"] for model, found in run.summary["metrics"].items()}
    assert rmse["own"] < 0.8 * rmse["swap"]
    assert rmse["own"] < rmse["zero_shot"]
