"""LongLaMP's rows and prompts (Kumar et al., arXiv 2407.11016), as its data set on the Hugging Face hub has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet

from fedpers.errors import DataError
from fedpers.formats.questions import Question
from fedpers.formats.tables import LINES, Bad, Skips, as_text, find_files
from fedpers.privacy.randomness import derive, seed_key

Task = Literal["abstract", "review", "topic"]
ENDINGS = (".json", *LINES, ".parquet")
_IDS = seed_key(0)


@dataclass(frozen=True, slots=True)
class Form:
    """How one task names and words things."""

    user: str  # field of a row that says whose it is; no two tasks have the same
    told: tuple[str, ...]  # fields of a profile item that stand in its prompt
    answer: str  # field of a profile item that holds what the person wrote
    prompt: str  # a profile item as a question
    year: str | None = None  # field of a profile item that says when it was written


FORMS: dict[Task, Form] = {
    "abstract": Form("name", ("title",), "abstract", 'Generate an abstract for the title "{title}"', "year"),
    "review": Form(
        "reviewerId", ("overall", "description", "summary"), "reviewText",
        'Generate the review text written by a reviewer who has a given an overall rating of "{overall}" for a product '
        'with description "{description}". The summary of the review text is "{summary}".',
    ),
    "topic": Form("author", ("summary",), "content", "Generate the content for a reddit post {summary}"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a profile as a question and its answer; `id` is a hash of both, which no other record shapes."""

    id: str
    input: str
    answer: str
    year: int | None


def read(path: str, skips: Skips) -> tuple[Task, list[Question[Item]]]:
    """Read all rows of a JSON list, of JSONL or Parquet files, a folder of them or a pattern.

    Which task they are of is told by the field that holds the user.

    Raises:
        DataError: files that are absent or broken (with the line), rows without LongLaMP's fields, of two tasks or
            without an input or an output; and, unless `skips` allows it, a profile item that cannot be used.
    """
    task: Task | None = None
    questions = []
    for file in find_files(path, ENDINGS):
        for place, row in _rows(file):
            try:
                task = task or _task(row)
                questions.append(_question(row, task, skips, place))
            except Bad as bad:  # a benchmark without some of its questions is another one
                raise DataError(f"{place}: {bad.said}; use the files as LongLaMP gives them out.") from None
    if task is None:
        raise DataError(f"data.path = {path!r}: there is no row in the files.")
    return task, questions


def _task(row: Any) -> Task:
    fields = set(row) if isinstance(row, dict) else set()
    found: list[Task] = [task for task, form in FORMS.items() if form.user in fields]
    if len(found) != 1:
        wanted = ", ".join(f"{form.user} ({task})" for task, form in FORMS.items())
        raise Bad("question", f"{len(found)} of the fields that say whose a row is, expected one of {wanted}")
    return found[0]


def _question(row: Any, task: Task, skips: Skips, place: str) -> Question[Item]:
    form = FORMS[task]
    if missing := _missing(row, (form.user, "input", "output", "profile")):
        raise Bad("question", f"no field {missing}, which a row of the {task} task has")
    if not isinstance(row["profile"], list):
        raise Bad("question", f"the profile is a {type(row['profile']).__name__}, not a list of items")
    user, text, gold = (as_text(row[field], field) for field in (form.user, "input", "output"))
    items = []
    for number, tree in enumerate(row["profile"], start=1):
        try:
            items.append(_item(tree, task))
        except Bad as bad:
            skips.add(bad, f"{place}, profile item {number}")
    return Question(_said(text, gold), user, text, gold, tuple(items))


def _item(tree: Any, task: Task) -> Item:
    form = FORMS[task]
    if missing := _missing(tree, (*form.told, form.answer)):
        raise Bad("profile_item", f"no field {missing}, which a profile item of the {task} task has")
    told = {field: _shown(tree[field], field) for field in form.told}
    answer = as_text(tree[form.answer], form.answer)
    text = form.prompt.format(**told).strip()
    year = tree.get(form.year) if form.year else None
    try:
        return Item(_said(text, answer), text, answer, None if year is None else int(year))
    except (TypeError, ValueError):
        raise Bad("time_not_parsed", f"the {form.year} is no whole number") from None


def _missing(tree: Any, fields: tuple[str, ...]) -> str:
    """Return the first field that an object lacks, or ""; anything but an object lacks all of them."""
    return next((field for field in fields if not isinstance(tree, dict) or field not in tree), "")


def _shown(value: Any, field: str) -> str:
    """Return what stands in a prompt: a number as it is written, and nothing for an empty text."""
    if isinstance(value, str) and not value.strip():
        return ""
    text = as_text(value, field)
    return text if isinstance(value, str) else str(value)  # the benchmark's prompts say 5.0 of a number that is one


def _said(text: str, answer: str) -> str:
    return derive(_IDS, "longlamp", text, answer).hex()[:32]


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a file."""
    kind = file.suffix.lower()
    try:
        if kind == ".parquet":
            yield from _parquet(file)
        elif kind == ".json":
            trees = _parsed(file.read_bytes(), file.name)
            if not isinstance(trees, list):
                raise DataError(f"{file.name}: a {type(trees).__name__}, not a list of rows.")
            yield from ((f"{file.name}, row {number}", tree) for number, tree in enumerate(trees, start=1))
        else:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        place = f"{file.name}, line {number}"
                        yield place, _parsed(line, place)
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read ({error.strerror or type(error).__name__}).") from error


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        number = 0
        with pa.parquet.ParquetFile(file) as source:
            for batch in source.iter_batches(batch_size=64):  # a row holds a whole profile
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file.name}, row {number}", row
    except pa.ArrowInvalid as error:
        raise DataError(f"{file.name}: not a valid Parquet file.") from error


def _parsed(raw: bytes, place: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 at its byte {error.start + 1}.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON (its line {error.lineno}, column {error.colno}).") from None
    except RecursionError:
        raise DataError(f"{place}: not valid JSON (nested too deep).") from None
