"""Made-up people for tests and first steps: each user likes one topic, and replies about it more often than others."""

from __future__ import annotations

import numpy as np

from fedpers.config import DataConfig
from fedpers.data.base import Federation, PublicText, Record, Source
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

    def load(self, config: DataConfig, key: bytes) -> Federation:
        """Make the federation; users differ in how many records they have, within the configured caps."""
        users = tuple(f"{config.people}-user-{number:05d}" for number in range(config.users or DEFAULT_USERS))
        topics = tuple(TOPICS)
        train, test = [], []
        for user in users:
            rng = generator(key, "synthetic", user)
            own = topics[rng.integers(len(topics))]
            counts = (
                int(rng.integers(config.min_train, config.max_train + 1)),
                int(rng.integers(config.min_test, config.max_test + 1)),
            )
            made = [self._record(user, number, own, topics, rng) for number in range(sum(counts))]
            train.append(tuple(made[: counts[0]]))
            test.append(tuple(made[counts[0] :]))
        rng = generator(key, "synthetic", "pool")
        pool = tuple(
            PublicText(f"pool/{number}", f"pool/{number}", _sentence(topics[rng.integers(len(topics))], rng))
            for number in range(POOL)
        )
        return Federation(
            source="synthetic",
            users=users,
            train=tuple(train),
            test=tuple(test),
            pool=pool,
            pool_authors=frozenset({"pool"}),
            partners=tuple(frozenset() for _ in users),
            facts=("the people of this federation are made up",),
        )

    def _record(self, user: str, number: int, own: str, topics: tuple[str, ...], rng: np.random.Generator) -> Record:
        asked = topics[rng.integers(len(topics))]
        about = own if rng.random() < LOYALTY else asked
        name = f"{user}/{number}"
        return Record(name, name, _sentence(asked, rng), _sentence(about, rng))


def _sentence(topic: str, rng: np.random.Generator) -> str:
    return " ".join(rng.choice(TOPICS[topic], size=int(rng.integers(2, 7))))
