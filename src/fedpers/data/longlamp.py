"""LongLaMP, the benchmark of long personal texts, from your own copy of its files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedpers.config import DataConfig
from fedpers.data.base import Federation, Record, Source, choose_users
from fedpers.errors import DataError
from fedpers.formats.longlamp import FORMS, Item, Task, read
from fedpers.formats.questions import Person, Question
from fedpers.formats.tables import Skips
from fedpers.sources import FROM_RAW_DATA, Parts, assemble, is_among


class LongLamp(Source):
    """Profile items are a user's training records, the rows' inputs and outputs the test records.

    Three of the four tasks, told apart by the field that names the user. All rows have `input`, `output` and `profile`.
    Abstract generation: `name`, items with title, abstract and year. Product review writing: `reviewerId`, items with
    overall, description, summary and reviewText. Topic writing: `author`, items with summary and content. These names
    and the inputs' wording are those of public programs that load `LongLaMP/LongLaMP` from the Hugging Face hub, some
    of which quote the benchmark's code; the benchmark's own files were not at hand. Email completion is not read: it is
    made from the licensed Avocado collection, and nothing that could be checked shows its rows.

    A profile item becomes a record in the words of the task's inputs; inputs of the abstract task also list items to
    use, which profiles do not have. The files of the user and of the temporal setting have the same rows: people come
    from the files named, all rows of one user together, items that are the same once. An item whose text has one of its
    user's answers in it is left out and counted.
    """

    about = "LongLaMP: personal abstracts, product reviews and posts"
    licence = "that of the benchmark, and of the collections it was made from; not downloaded by fedpers"
    citation = "Kumar et al.: LongLaMP: A Benchmark for Personalized Long-form Text Generation, arXiv 2407.11016, 2024"
    split = "profile items are for training, the benchmark's rows for testing"
    tasks = ("language-model",)

    def load(self, config: DataConfig, key: bytes) -> Federation:
        """Read the files and build the federation of the configured people. Raises DataError."""
        if config.path is None:
            raise DataError("data.path is not set; name LongLaMP's files: JSON, JSONL, Parquet, a folder or a pattern.")
        skips = Skips(config.skip_bad)
        task, questions = read(config.path, skips)
        people = _people(questions)
        held = {user: _records(user, person) for user, person in people.items() if is_among(config.people, user)}
        counts = {
            "skipped_items_with_the_answer": sum(person.answering for person in people.values()),
            "skipped_repeated_rows": len(questions) - sum(len(person.questions) for person in people.values()),
            **skips.counts,
        }
        made = assemble(f"longlamp-{task}", held, config, lambda users, most: choose_users(users, most, key), counts)
        return replace(made, facts=_facts(task, config, made.users, people, sum(skips.counts.values())))


def _people(questions: Sequence[Question[Item]]) -> dict[str, Person[Item]]:
    """Put rows of one person together, whose profiles are joined, and leave out items that hold an answer."""
    by_user: dict[str, dict[str, Question[Item]]] = defaultdict(dict)
    for question in questions:
        by_user[question.user].setdefault(question.id, question)
    people = {}
    for user, own in by_user.items():
        items = list({item.id: item for question in own.values() for item in question.items}.values())
        answers = [_words(question.gold) for question in own.values()]
        kept = [item for item in items if not any(answer in _words(item.answer) for answer in answers)]
        if _dated(items):
            kept.sort(key=lambda item: item.year or 0)
        people[user] = Person(tuple(own.values()), tuple(kept), len(items) - len(kept))
    return people


def _dated(items: Sequence[Item]) -> bool:
    """Whether all items have a year; one without must not put all the others into another order."""
    return all(item.year is not None for item in items)


def _words(text: str) -> str:
    return f" {' '.join(text.casefold().split())} "  # words stand between spaces, so that none is found in another


def _records(user: str, person: Person[Item]) -> Parts:
    """Return training and test records of one user."""

    def record(kind: str, identifier: str, text: str, target: str) -> Record:
        name = f"{user}/{kind}/{identifier}"
        return Record(name, name, text, target)

    return (
        [record("item", item.id, item.input, item.answer) for item in person.items],
        [record("question", question.id, question.input, question.gold) for question in person.questions],
    )


def _facts(
    task: Task, config: DataConfig, users: Sequence[str], people: Mapping[str, Person[Item]], skipped: int
) -> tuple[str, ...]:
    """Say in numbers what a claim leaves out."""
    members = [people[user] for user in users]
    owners: dict[str, int] = defaultdict(int)
    for person in members:
        for answer in {_words(item.answer) for item in person.items}:
            owners[answer] += 1
    items = [item for person in members for item in person.items]
    twice = sum(owners[_words(item.answer)] > 1 for item in items)
    known = sum(bool(owners.get(_words(question.gold))) for person in members for question in person.questions)
    facts = [
        f"a person is what `{FORMS[task].user}` says, so two people of one name count as one",
        f"{twice} of {len(items)} profile items stand word for word in another member's profile too, and what another "
        "client holds is protected as that client's",
        f"the answers to {known} of {sum(len(person.questions) for person in members)} questions stand in another "
        "member's profile",
        f"{sum(person.answering for person in members)} profile items were left out because they hold an answer to one "
        "of the same user's questions, so whether an item is trained on hangs on its user's questions too",
    ]
    if not all(_dated(person.items) for person in members):
        facts.append("where not all items of a profile have a year, their order in the file stands for time")
    if config.skip_bad:
        facts.append(
            f"{skipped} profile items, counted in each row's profile, could not be used and were left out, by what "
            "they hold"
        )
    return (*facts, FROM_RAW_DATA)
