"""LaMP's JSON files and prompts (Salemi, Mysore, Bendersky, Zamani: LaMP, ACL 2024).

The inputs, the words around retrieved items, the tokens they may take and the retrievers follow the benchmark's code
(`LaMP/prompts/prompts.py` and `rank_profiles.py` of LaMP-Benchmark/LaMP), so that its files and its prompts fit.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from fedpers.errors import ConfigError, DataError
from fedpers.formats.questions import Question
from fedpers.formats.tables import Bad, Skips, as_text

Task = Literal["1", "2", "2-news", "3", "4", "5", "6", "7"]

TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
    "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
)  # fmt: skip
CATEGORIES = (
    "travel", "education", "parents", "style & beauty", "entertainment", "food & drink", "science & technology",
    "business", "sports", "healthy living", "women", "politics", "crime", "culture & arts", "religion",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """How one task words things; `{text}` and `{answer}` are filled in."""

    prompt: str  # a question's input
    marker: str  # the question's text follows its first occurrence
    text: str  # profile field that plays the question's text; of LaMP-7 there is none
    answer: str  # profile field that plays the answer
    shown: str  # a retrieved item
    joined: str  # all retrieved items and the question
    searched: tuple[str, ...]  # profile fields that a retriever compares with the question
    labels: tuple[str, ...] = ()


_BEFORE, _PATTERN = "{items}. {input}", "{items}. Following the given patterns {input}"
_TITLE = '"{answer}" is the title for "{text}" '
FORMS: dict[Task, Form] = {
    "1": Form(
        'For an author who has written the paper with the title "{text}", which reference is related? Just answer with '
        '[1] or [2] without explanation. [1]: "{first}" [2]: "{second}"',
        "", "abstract", "title", '"{answer}"', "", ("title", "abstract"), ("[1]", "[2]"),
    ),
    "2": Form(
        "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
        f"explanation. tags: [{', '.join(TAGS)}] description: {{text}}",
        "description:", "description", "tag", 'the tag for the movie: "{text}" is "{answer}" ', _BEFORE,
        ("description",), TAGS,
    ),
    "2-news": Form(
        "Which category does this article relate to among the following categories? Just answer with the category name "
        f"without further explanation. categories: [{', '.join(CATEGORIES)}] article: {{text}}",
        "article:", "text", "category", 'the category for the article: "{text}" is "{answer}" ', _BEFORE,
        ("title", "text"), CATEGORIES,
    ),
    "3": Form(
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
        "further explanation. review: {text}",
        "review:", "text", "score", '{answer} is the score for "{text}" ', _BEFORE, ("text",),
        ("1", "2", "3", "4", "5"),
    ),
    "4": Form(
        "Generate a headline for the following article: {text}",
        "article:", "text", "title", _TITLE, _BEFORE, ("title", "text"),
    ),
    "5": Form(
        "Generate a title for the following abstract of a paper: {text}",
        "paper:", "abstract", "title", '"{answer}" is a title for "{text}" ', _PATTERN, ("title", "abstract"),
    ),
    "6": Form("Generate a subject for the following email: {text}", ":", "text", "title", _TITLE, _BEFORE, ("text",)),
    "7": Form(
        "Paraphrase the following tweet without any explanation before or after it: {text}",
        ":", "", "text", '"{answer}" ',
        "{items} are written by a person. Following the given patterns {input}", ("text",),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a profile."""

    id: str
    text: str
    answer: str
    searched: str
    date: tuple[int, ...] | None


class Tokens(Protocol):
    """Counts and cuts texts as a tokenizer does."""

    def length(self, text: str) -> int:
        """Return the number of tokens."""

    def cut(self, text: str, most: int) -> tuple[str, int]:
        """Return the text's first tokens, at most so many, and how many they are."""


class HuggingFaceTokens:
    """A transformers tokenizer; special tokens count, as in the benchmark."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def length(self, text: str) -> int:
        """Return the number of tokens, special ones among them."""
        return len(self._tokenizer(text)["input_ids"])

    def cut(self, text: str, most: int) -> tuple[str, int]:
        """Cut and decode."""
        ids = self._tokenizer(text, max_length=most, truncation=True)["input_ids"]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)), len(ids)


def asked(task: Task, question: str) -> str:
    """Return a question's text without the benchmark's own words: what a retriever compares with a profile.

    Of LaMP-1 that is the two references. Returns "" for an input that is not in the task's form.
    """
    if task == "1":
        return " ".join(question.split('"')[3:6:2])
    _, found, after = question.partition(FORMS[task].marker)
    return after.strip() if found else ""


def read(path: Path, task: Task, part: str, by_time: bool, skips: Skips) -> list[Question[Item]]:
    """Read `{part}_questions.json` and `{part}_outputs.json` of a folder, or one merged file.

    Raises:
        DataError: files that are absent, not UTF-8 or not JSON (with the line), or not in LaMP's form; answers that do
            not fit the questions; and, unless `skips` allows it, a profile item that cannot be used.
    """
    if path.is_file():
        listed, golds = _json(path), None
        name = path.name
    else:
        name = f"{part}_questions.json"
        listed, golds = _json(path / name), read_outputs(path / f"{part}_outputs.json", task)
    if not isinstance(listed, list):
        raise DataError(f"{name}: a {type(listed).__name__}, not a list of questions.")
    questions: list[Question[Item]] = []
    for number, tree in enumerate(listed, start=1):
        place = f"{name}, question {number}"
        try:
            if not isinstance(tree, dict) or not isinstance(tree.get("profile"), list):
                raise Bad("question", "not an object with id, input and a list `profile`")
            identifier = as_text(tree.get("id"), "id")
            gold = tree.get("output") if golds is None else golds.get(identifier)
            question = Question(
                id=identifier,
                user=as_text(tree.get("user_id"), "user_id") if by_time else identifier,
                input=as_text(tree.get("input"), "input"),
                gold=as_text(gold, "output"),
                items=_items(tree["profile"], task, by_time, skips, place),
            )
            form = FORMS[task]
            if form.labels and question.gold not in form.labels:
                raise Bad("unknown_label", f"the output is none of the {len(form.labels)} labels of LaMP-{task}")
            if not asked(task, question.input):
                raise Bad("question", f"the input is not in the form of LaMP-{task}")
        except Bad as bad:  # a benchmark without some of its questions is another one
            raise DataError(f"{place}: {bad.said}; use the files as LaMP gives them out.") from None
        questions.append(question)
    ids = [question.id for question in questions]
    if len(set(ids)) != len(ids):
        raise DataError(f"{name}: {len(ids) - len(set(ids))} questions have the id of an earlier one.")
    if golds is not None and (extra := set(golds) - set(ids)):
        raise DataError(f"{part}_outputs.json: {len(extra)} answers belong to no question in {name}.")
    return questions


def read_outputs(file: Path, task: Task) -> dict[str, str]:
    """Return the outputs by question id: answers, or predictions, which have the same form. Raises DataError."""
    tree = _json(file)
    named = tree.get("task") if isinstance(tree, dict) else None
    if not isinstance(named, str) or not isinstance(tree.get("golds"), list):
        raise DataError(f"{file.name}: not an object with `task` and a list `golds`.")
    if named[:6] != f"LaMP_{task[0]}":
        raise DataError(f"{file.name}: it is of another task than LaMP_{task[0]}; set data.lamp.task.")
    found: dict[str, str] = {}
    for number, one in enumerate(tree["golds"], start=1):
        if not isinstance(one, dict) or not {"id", "output"} <= set(one):
            raise DataError(f"{file.name}, output {number}: not an object with id and output.")
        identifier = str(one["id"])
        if identifier in found:
            raise DataError(f"{file.name}, output {number}: the id is that of an earlier one.")
        found[identifier] = "" if one["output"] is None else str(one["output"])
    return found


def _json(file: Path) -> Any:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read ({error.strerror}); data.path names LaMP's folder.") from None
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{file.name}, line {line}: not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{file.name}, line {error.lineno}, column {error.colno}: not valid JSON.") from None
    except (ValueError, RecursionError):
        raise DataError(f"{file.name}: a number of thousands of digits, or lists in lists without end.") from None


def _items(profile: Sequence[Any], task: Task, by_time: bool, skips: Skips, place: str) -> tuple[Item, ...]:
    """Return the usable items of one profile."""
    found: dict[str, Item] = {}
    for number, tree in enumerate(profile, start=1):
        try:
            if not isinstance(tree, dict):
                raise Bad("profile_item", f"a {type(tree).__name__}, not an object")
            item = _item(tree, FORMS[task], task, by_time)
            if item.id in found:
                raise Bad("duplicate_id", "the id is that of an earlier item")
            found[item.id] = item
        except Bad as bad:
            skips.add(bad, f"{place}, profile item {number}")
    return tuple(found.values())


def _item(tree: dict[str, Any], form: Form, task: Task, by_time: bool) -> Item:
    answer = as_text(tree.get(form.answer), form.answer)
    if task != "1" and form.labels and answer not in form.labels:
        raise Bad("unknown_label", f"the {form.answer} is none of the {len(form.labels)} labels of LaMP-{task}")
    date = None
    if by_time or tree.get("date") is not None:
        try:
            date = tuple(int(piece) for piece in str(tree.get("date")).split("-"))
        except ValueError:
            raise Bad("time_not_parsed", "the date is not YYYY-MM-DD") from None
    text = as_text(tree.get(form.text), form.text) if form.text else ""
    searched = " ".join(as_text(tree.get(field), field) for field in form.searched)
    return Item(as_text(tree.get("id"), "id"), text, answer, searched, date)


def retrieve(task: Task, question: str, items: Sequence[Item], most: int, retriever: str) -> list[Item]:
    """Return at most `most` items for a question's text, the best first; `items` in order of time.

    bm25: BM25Okapi on words between white space, as the benchmark ranks; of equal scores the earlier item. recency: the
    latest, newest first. Raises ConfigError when the library for BM25 is absent.
    """
    if not items:
        return []
    if retriever == "recency":
        return list(items[::-1][:most])
    try:
        library: Any = importlib.import_module("rank_bm25")
    except ImportError:
        raise ConfigError(
            "data.lamp.retriever=bm25 needs rank-bm25; run `pip install rank-bm25==0.2.2`, or use retriever=recency."
        ) from None
    scores = library.BM25Okapi([item.searched.split() for item in items]).get_scores(question.split())
    return [items[place] for place in np.argsort(-scores, kind="stable")[:most]]


def prompt(task: Task, question: str, items: Sequence[Item], limit: int, tokens: Tokens) -> str:
    """Put retrieved items before a question's input, each cut so that all of it has about `limit` tokens.

    As in the benchmark, the question counts with at most 60% of the limit, the rest is shared evenly among the items,
    and what one item leaves over goes to the next; where that leaves an item no room, the question counts with less,
    and with no room at all it stands alone. The words around an item count as they are shown; the benchmark counts one
    less for LaMP-5 and one for LaMP-7, so there its prompts may be a word or two longer.
    """
    for share in (0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0):
        room = limit - min(tokens.length(question), int(share * limit))
        shown = _shown(task, items, room, tokens)
        if shown and task == "1":
            place = question.find("title") + len("title")
            return f"{question[:place]}, and {', and '.join(shown)}{question[place:]}"
        if shown:
            return FORMS[task].joined.format(items=", and ".join(shown), input=question)
    return question


def _shown(task: Task, items: Sequence[Item], room: int, tokens: Tokens) -> list[str]:
    """Return the items as the benchmark words them, or none if one of them has no room."""
    form = FORMS[task]
    said = form.joined.replace("{items}", "").replace("{input}", "").strip(". ")
    own = 0 if task == "1" else 1 + (tokens.length(said) if said else 0)
    each = (room - own - 2 * (len(items) - 1)) // max(1, len(items))
    left = 0
    shown = []
    for item in items:
        cuts_answer = task in ("1", "7")  # there the answer is the text that is shown
        empty = form.shown.format(text=" ", answer="" if cuts_answer else item.answer)
        needed = 2 if task == "1" else tokens.length(empty)
        if each + left - needed < 1:
            return []
        text, used = tokens.cut(item.answer if cuts_answer else item.text, each + left - needed)
        left += each - used - needed
        shown.append(form.shown.format(text=text, answer=text if cuts_answer else item.answer))
    return shown
