"""Made-up users for records that have none. Who gets a record depends on that record and on public settings alone.

The usual partitioners shuffle records or cut counts, so leaving one record out moves others from user to user, and no
epsilon that is counted per record or per user holds. Here each record throws a coin of its own, drawn by its id.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedpers.config import PartitionConfig
from fedpers.formats.tables import Bad
from fedpers.privacy.randomness import derive, generator, order, seed_key, uniforms

Shares = NDArray[np.float64]  # (users,), the probability of each to get a record
_KEPT = 256  # labels whose shares are kept


def dealer(config: PartitionConfig) -> Callable[[str, str], tuple[str, float]]:
    """Return the function from a record's id and label to its user and to a number that it may be ordered by.

    The number, uniform in [0, 1), is for records without a time: files are often sorted by label.

    - iid: each user has the same probability.
    - dirichlet: a label's probabilities over the users are one draw from Dirichlet(alpha, ..., alpha), as in Yurochkin
      et al. (ICML 2019) and flwr-datasets. Hsu, Qi, Brown (arXiv 1909.06335, 2019) draw each user's probabilities over
      the labels instead; then how many records of a label a user gets would hang on how many there are. Users differ in
      size here, too.
    - pathological: a user owns at most `classes` labels, as in McMahan et al. (AISTATS 2017), and a label's owners have
      the same probability. There sorted records are cut into shards; here a shuffled deck of public labels is dealt.

    The function raises Bad for a label that is not in the public list of a pathological partition.
    """
    key = derive(seed_key(config.seed), "partition")
    owned = _hands(config, key) if config.by == "pathological" else {}

    @lru_cache(maxsize=_KEPT)
    def until(label: str) -> Shares:
        if config.by == "dirichlet":
            shares = generator(key, "label", label).dirichlet(np.full(config.users, config.alpha))
        elif config.by == "iid":
            shares = np.ones(config.users)
        elif label in owned:
            shares = owned[label]
        else:
            raise Bad("unknown_label", "the target is not among data.partition.labels")
        summed: Shares = shares.cumsum()
        summed /= summed[-1]  # the last is 1, so every coin falls below
        return summed

    def deal(identifier: str, label: str) -> tuple[str, float]:
        coin, place = uniforms(key, ("record",), [identifier], 2)[0]
        return f"partition-{int(until(label).searchsorted(coin, side='right')):05d}", float(place)

    return deal


def _hands(config: PartitionConfig, key: bytes) -> dict[str, Shares]:
    """Deal each user `classes` cards of a deck in which all labels come once before any comes again.

    So each label has an owner, all have about as many, and users whose hand spans two rounds of the deck may hold one
    label twice. Returns by label who owns it, (users,) of 0 and 1.
    """
    deck: list[str] = []
    while len(deck) < config.users * config.classes:
        deck += [config.labels[at] for at in order(key, ("deck", len(deck)), config.labels)]
    owned = {label: np.zeros(config.users) for label in config.labels}
    for card in range(config.users * config.classes):
        owned[deck[card]][card // config.classes] = 1.0
    return owned


def described(config: PartitionConfig) -> str:
    """Say how users are made up and what that leaves out of a claim."""
    how = {
        "iid": "each with the same probability",
        "dirichlet": f"each label by shares that were drawn from a Dirichlet distribution with alpha {config.alpha:g}",
        "pathological": f"each label among its owners, with at most {config.classes} labels to a user",
    }[config.by]
    return (
        f"the users are made up: records were dealt to {config.users} by a public partition ({how}), so a claim about "
        "a user is about no real person, what one person wrote may stand with several users, and which labels a user "
        "gets with which probability is public; of rows that say the same, leaving out any one takes away the "
        "last one's record"
    )
