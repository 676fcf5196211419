"""What the files of LaMP and LongLaMP have in common: questions of people, each with the person's profile."""

from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")  # one item of a profile


@dataclass(frozen=True, slots=True)
class Question(Generic[Item]):
    """One question of one person, with the answer and the person's profile, in the order of the file."""

    id: str
    user: str
    input: str
    gold: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Person(Generic[Item]):
    """What is known of one user: questions, and profile items in order of time without those that hold an answer."""

    questions: tuple[Question[Item], ...]
    items: tuple[Item, ...]
    answering: int  # items that were left out because they hold an answer
