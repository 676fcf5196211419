"""Made-up people for tests and first steps: each user likes one topic, and replies about it more often than others."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fedpers.config import DataConfig
from fedpers.data.base import Federation, PublicText, Record, Source
from fedpers.population import OnDemand
from fedpers.privacy.randomness import generator

TOPICS = {
    "food": ("bread", "soup", "apple", "cheese", "rice", "salt", "cake", "tea"),
    "sport": ("ball", "run", "goal", "team", "race", "swim", "coach", "score"),
    "music": ("song", "drum", "piano", "band", "tune", "choir", "dance", "concert"),
    "travel": ("train", "beach", "hotel", "map", "flight", "island", "road", "ticket"),
}
DEFAULT_USERS = 40
LOYALTY = 0.7  # how often a reply is about the user's own topic rather than the partner's
POOL = 120


class Synthetic(Source):
    """Conversations of two turns made of words from four topics; nothing in them is anybody's data."""

    about = "made-up people, each with a favourite topic"
    licence = "none needed: drawn from the seed"
    citation = "fedpers"
    split = "the first records drawn are for training, the rest for testing"
    tasks = ("reply-ranking", "language-model")
    lazy = True

    def load(self, config: DataConfig, key: bytes) -> Federation:
        """Make the federation; users differ in how many records they have, within the configured caps."""
        size, topics = config.users or DEFAULT_USERS, tuple(TOPICS)
        users = OnDemand(size, lambda number: f"{config.people}-user-{number:05d}")

        @lru_cache(maxsize=1)  # training and test records of a user are asked for one after the other
        def made(number: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
            return self._records(users[number], config, key)

        rng = generator(key, "synthetic", "pool")
        pool = tuple(
            PublicText(f"pool/{number}", f"pool/{number}", _sentence(topics[rng.integers(len(topics))], rng))
            for number in range(POOL)
        )
        everybody = Federation(
            source="synthetic",
            users=users,
            train=OnDemand(size, lambda number: made(number)[0]),
            test=OnDemand(size, lambda number: made(number)[1]),
            pool=pool,
            pool_authors=frozenset({"pool"}),
            partners=OnDemand(size, lambda _: frozenset()),
            facts=("the people of this federation are made up",),
            lazy=inspect.getsource(sys.modules[__name__]),
        )
        if config.lazy:
            return everybody
        train, test = zip(*map(made, range(size)), strict=True)
        partners = tuple(everybody.partners)
        return replace(everybody, users=tuple(users), train=train, test=test, partners=partners, lazy="")

    def _records(self, user: str, config: DataConfig, key: bytes) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
        """Make a user's training and test records, which hang on the seed and the user's id alone."""
        topics = tuple(TOPICS)
        rng = generator(key, "synthetic", user)
        own = topics[rng.integers(len(topics))]
        cut = int(rng.integers(config.min_train, config.max_train + 1))
        held = int(rng.integers(config.min_test, config.max_test + 1))
        made = [self._record(user, number, own, topics, rng) for number in range(cut + held)]
        return tuple(made[:cut]), tuple(made[cut:])

    def _record(self, user: str, number: int, own: str, topics: tuple[str, ...], rng: np.random.Generator) -> Record:
        asked = topics[rng.integers(len(topics))]
        about = own if rng.random() < LOYALTY else asked
        name = f"{user}/{number}"
        return Record(name, name, _sentence(asked, rng), _sentence(about, rng))


def _sentence(topic: str, rng: np.random.Generator) -> str:
    return " ".join(rng.choice(TOPICS[topic], size=int(rng.integers(2, 7))))
