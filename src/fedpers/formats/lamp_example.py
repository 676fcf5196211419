"""Small files in LaMP's exact form, about made-up people whose answers depend on who they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedpers.data.synthetic import TOPICS
from fedpers.formats.lamp import FORMS, Task

PARTS = ("train", "dev", "test")  # as LaMP gives them out; the test part has no outputs
QUESTIONS = 2  # of a user of the time-based split


def write_example(
    folder: Path, task: Task, users: int = 30, items: int = 24, seed: int = 0, split: Literal["user", "time"] = "user"
) -> None:
    """Write `{train,dev,test}_questions.json` and `{train,dev}_outputs.json` of made-up people into a folder.

    Each person has one of four topics at heart. LaMP-3: texts about it are scored 4 or 5, others 1 or 2. LaMP-1: the
    right reference is the one about it. LaMP-2: each person has another tag for each topic. LaMP-4 to 6: titles begin
    with a word that is the person's own. LaMP-7: so do tweets, and the question is the tweet without that word.

    Args:
        folder: is made if it is absent.
        task: which LaMP.
        users: people in each part; those of different parts are different people, but for the time-based split.
        items: profile items of a person.
        seed: of all draws.
        split: user: a question is a person. time: two questions of each `user_id`, and items have a `date`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(PARTS):
        questions, golds = [], []
        for user in range(users):
            name = str(user if split == "time" else 1000 * (number + 1) + user)
            person = _Person(task, np.random.default_rng([seed, int(name)]))
            profile = [{"id": f"{name}{place:03d}", **person.item()} for place in range(items)]
            if split == "time":
                profile = [
                    {**item, "date": f"2020-{1 + place // 28:02d}-{1 + place % 28:02d}"}
                    for place, item in enumerate(profile)
                ]
            person.rng = np.random.default_rng([seed, int(name), number])  # the same profile, other questions
            for place in range(QUESTIONS if split == "time" else 1):
                identifier = f"{name}{number}{place}"
                text, answer = person.question()
                owner = {"user_id": name} if split == "time" else {}
                questions.append({"id": identifier, **owner, "input": text, "profile": profile})
                golds.append({"id": identifier, "output": answer})
        _write(folder / f"{part}_questions.json", questions)
        if part != "test":
            _write(folder / f"{part}_outputs.json", {"task": f"LaMP_{task[0]}", "golds": golds})


class _Person:
    def __init__(self, task: Task, rng: np.random.Generator) -> None:
        self.task, self.form, self.rng = task, FORMS[task], rng
        self.topics = tuple(TOPICS)
        self.heart = int(rng.integers(len(self.topics)))
        self.word = str(rng.choice(TOPICS[self.topics[self.heart]]))
        labels = self.form.labels
        self.tags: list[str] = [labels[int(place)] for place in rng.permutation(4)] if len(labels) >= 4 else []

    def item(self) -> dict[str, Any]:
        """Return the fields of one profile item, without its id."""
        topic, text = self._text()
        answer = self._answer(topic, text)
        if self.task == "7":
            return {"text": answer}
        fields = {self.form.text: text, self.form.answer: answer}
        if "title" in self.form.searched and "title" not in fields:
            fields["title"] = " ".join(text.split()[:2])
        return fields

    def question(self) -> tuple[str, str]:
        """Return a question's input and the answer."""
        topic, text = self._text()
        if self.task != "1":
            return self.form.prompt.format(text=text), self._answer(topic, text)
        away = (self.heart + 1 + int(self.rng.integers(len(self.topics) - 1))) % len(self.topics)
        right = int(self.rng.integers(2))
        both = [self._words(self.heart), self._words(away)][:: 1 if right == 0 else -1]
        return self.form.prompt.format(text=text, first=both[0], second=both[1]), self.form.labels[right]

    def _text(self) -> tuple[int, str]:
        topic = self.heart if self.task == "1" else int(self.rng.integers(len(self.topics)))
        return topic, self._words(topic)

    def _words(self, topic: int) -> str:
        words: Sequence[str] = TOPICS[self.topics[topic]]
        return " ".join([str(word) for word in self.rng.choice(words, size=6)])

    def _answer(self, topic: int, text: str) -> str:
        if self.task == "3":
            return str((4 if topic == self.heart else 1) + int(self.rng.integers(2)))
        if self.tags and self.task != "1":
            return self.tags[topic]
        rest = text if self.task == "7" else " ".join(text.split()[:3])
        return f"{self.word} {rest}"


def _write(file: Path, tree: object) -> None:
    file.write_text(json.dumps(tree, indent=1), encoding="utf-8")
