"""LaMP 1 to 7, the benchmark of personalized language models, from a folder of its own JSON files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedpers.config import DataConfig, LampConfig
from fedpers.data.base import Federation, Record, Source, choose_users, role
from fedpers.errors import ConfigError, DataError
from fedpers.formats.lamp import FORMS, HuggingFaceTokens, Item, Tokens, asked, prompt, read, retrieve
from fedpers.formats.questions import Person, Question
from fedpers.formats.tables import Skips
from fedpers.models import assets
from fedpers.privacy.randomness import derive, seed_key
from fedpers.sources import assemble

WRITTEN = ("4", "5", "6", "7")  # answers are texts, which may stand inside a longer one
_HISTORY = seed_key(0)


class Lamp(Source):
    """A user is the person of a question; profile items are the training records, questions the test records.

    A profile item becomes a record as in OPPU (Tan et al., EMNLP 2024): its text in the words of the task's questions,
    its tag, score or title as the target; of LaMP-7, whose items are only texts, `tweet:` and the text. LaMP-1 is
    refused: its profiles hold titles and abstracts but no citations, so they hold no example of what is asked.

    An item that holds one of its user's questions and the answer to it is left out and counted. One that holds another
    member's, such as a paper by two, stays, since what a client trains on must not hang on other people's records; how
    many questions that makes easier is among the facts.

    With `data.lamp.retrieve`, training records have items of the same user before their input, of the `history` alone,
    and these are no training records: one record in many prompts would be in many gradients, and a guarantee per record
    would not hold for it. A hash of user and item id puts an item into the history, so that leaving a training record
    out changes neither what is in it nor another record's prompt. Questions are given items of the whole profile.
    """

    about = "LaMP 2 to 7: personal tags, ratings, headlines, titles, subjects and tweets"
    licence = "CC BY-NC-SA 4.0; LaMP-6 needs the Avocado collection's own licence; not downloaded by fedpers"
    citation = "Salemi, Mysore, Bendersky, Zamani: LaMP: When Large Language Models Meet Personalization, ACL 2024"
    split = "profile items are for training, the benchmark's questions for testing"
    tasks = ("rating", "classification", "language-model")

    def load(self, config: DataConfig, key: bytes) -> Federation:
        """Read the files and build the federation of the configured people. Raises DataError or ConfigError."""
        lamp = config.lamp
        if config.path is None:
            raise DataError("data.path is not set; name the folder that holds LaMP's JSON files, or one merged file.")
        if lamp.task == "1":
            raise DataError(
                "data.lamp.task = 1: a profile of LaMP-1 has titles and abstracts but no citations, so there is "
                "nothing to learn a person's citations from; use another task."
            )
        if lamp.split == "user" and config.min_test > 1:
            raise DataError(
                f"data.min_test = {config.min_test}: with data.lamp.split=user each person has one question; set "
                "data.min_test=1."
            )
        skips = Skips(config.skip_bad)
        people = _people(read(Path(config.path), lamp.task, lamp.part, lamp.split == "time", skips), lamp)
        tokens = _tokens(lamp.tokenizer) if lamp.retrieve and lamp.tokenizer else None
        wanted = [user for user in sorted(people) if _part(user) == config.people]
        held = {user: _records(user, people[user], config, tokens) for user in wanted}
        answering = sum(person.answering for person in people.values())
        federation = assemble(
            f"lamp-{lamp.task}", held, config, lambda users, most: choose_users(users, most, key),
            {"skipped_items_with_the_answer": answering, **skips.counts},
        )  # fmt: skip
        facts = _facts(config, federation.users, people, federation.train, sum(skips.counts.values()))
        return replace(federation, facts=facts)


def _part(user: str) -> str:
    return "development" if role(user) == "development" else "federation"


def _words(text: str, answer: str) -> tuple[str, str]:
    return " ".join(text.casefold().split()), " ".join(answer.casefold().split())


def _people(questions: Sequence[Question[Item]], lamp: LampConfig) -> dict[str, Person[Item]]:
    """Put questions of one person together, whose profiles are joined, and leave out items that hold an answer.

    Raises DataError: an item that is not the same in two questions, or dates in a part of one person's items.
    """
    by_user: dict[str, list[Question[Item]]] = defaultdict(list)
    for question in questions:
        by_user[question.user].append(question)
    people = {}
    for user, own in by_user.items():
        items: dict[str, Item] = {}
        for item in (item for question in own for item in question.items):
            if items.setdefault(item.id, item) != item:
                raise DataError("a profile item of one person differs between two of the person's questions.")
        answers = [_words(asked(lamp.task, question.input), question.gold) for question in own]
        kept = [item for item in items.values() if not any(_holds(item, *answer, lamp) for answer in answers)]
        dated = sum(item.date is not None for item in items.values())
        if 0 < dated < len(items):  # one item without a date must not put all the others into another order
            raise DataError(
                f"a person's profile has a date in {dated} of its {len(items)} items; give all of a person's items a "
                "date, or none."
            )
        kept.sort(key=lambda item: item.date or ())
        people[user] = Person(tuple(own), tuple(kept), len(items) - len(kept))
    return people


def _holds(item: Item, text: str, gold: str, lamp: LampConfig) -> bool:
    """Whether an item has a question's text and the answer to it in it; of LaMP-7 the answer alone."""
    held, answer = _words(item.text, item.answer)
    return (lamp.task == "7" or text in held) and (gold == answer or (lamp.task in WRITTEN and gold in answer))


def _history(user: str, person: Person[Item], lamp: LampConfig) -> list[Item]:
    """Return the items that are retrieved from and not trained on, by their ids; those of LaMP-7 have no question."""
    if not lamp.retrieve or lamp.task == "7":
        return []

    def point(item: Item) -> float:
        return int.from_bytes(derive(_HISTORY, "history", user, item.id)[:8], "little") / 2**64

    return [item for item in person.items if point(item) < lamp.history]


def _records(
    user: str, person: Person[Item], config: DataConfig, tokens: Tokens | None
) -> tuple[list[Record], list[Record]]:
    """Return training and test records of one user."""
    lamp, form = config.lamp, FORMS[config.lamp.task]
    history = _history(user, person, lamp)
    told = {item.id for item in history}

    def worded(text: str, memory: Sequence[Item]) -> str:
        if tokens is None:
            return text
        found = retrieve(lamp.task, asked(lamp.task, text), memory, lamp.retrieve, lamp.retriever)
        return prompt(lamp.task, text, found, config.max_tokens, tokens) if found else text

    train, test = [], []
    for item in (item for item in person.items if item.id not in told):
        if lamp.task == "7":
            text = "tweet:"
        elif lamp.form == "text":
            text = item.text
        else:
            text = worded(form.prompt.format(text=item.text), history)
        name = f"{user}/item/{item.id}"
        train.append(Record(name, name, text, item.answer))
    for question in person.questions:
        bare = lamp.form == "text" and lamp.task != "7"
        text = asked(lamp.task, question.input) if bare else worded(question.input, person.items)
        name = f"{user}/question/{question.id}"
        test.append(Record(name, name, text, question.gold))
    return train, test


def _tokens(name: str) -> Tokens:
    import transformers

    try:
        path = str(assets.fetch(name)) if name in assets.ASSETS else name
        return HuggingFaceTokens(transformers.AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.lamp.tokenizer = {name!r}: no tokenizer there ({type(error).__name__}); name the backbone."
        ) from error


def _facts(
    config: DataConfig,
    users: Sequence[str],
    people: Mapping[str, Person[Item]],
    train: Sequence[tuple[Record, ...]],
    skipped: int,
) -> tuple[str, ...]:
    lamp = config.lamp
    owners: dict[tuple[str, str], set[str]] = defaultdict(set)
    for user in users:
        for item in people[user].items:
            owners[_words(item.text, item.answer)].add(user)
    total = sum(len(people[user].items) for user in users)
    twice = sum(len(owners[_words(item.text, item.answer)]) > 1 for user in users for item in people[user].items)
    asked_of = [(user, question) for user in users for question in people[user].questions]
    known = sum(bool(owners.get(_words(asked(lamp.task, q.input), q.gold), set()) - {user}) for user, q in asked_of)
    facts = [
        "a person is a question of its own (user-based split), and an author of two counts as two"
        if lamp.split == "user"
        else "a person is a `user_id` of the files (time-based split)",
        f"{twice} of {total} profile items stand word for word in another member's profile too, and what another "
        "client holds is protected as that client's",
        f"{known} of {len(asked_of)} questions stand with their answer in another member's profile",
        f"{sum(people[user].answering for user in users)} profile items were left out because they hold an answer to "
        "one of the same user's questions, so whether an item is trained on hangs on its user's questions too",
    ]
    if config.skip_bad:
        facts.append(
            f"{skipped} profile items, counted in each question's profile, could not be used and were left out, by "
            "what they hold and, of items of one profile with the same id, all but the first"
        )
    if not all(item.date for user in users for item in people[user].items):
        facts.append("not all profile items have a date, so their order in the file stands for time")
    if lamp.retrieve:
        before = sum(len(_history(user, people[user], lamp)) for user in users)
        facts.append(
            f"{before} profile items shape the prompts of the same user's {sum(map(len, train))} training records, one "
            "item possibly many, and are none themselves: no guarantee per record covers them, one per user does"
        )
    facts.append(
        "who takes part, the caps on records (leaving one out of a capped client's makes room for another) and the "
        "counts in this list come from the raw data"
    )
    return tuple(facts)
