"""Federations: who is where, what is disjoint, where candidates come from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedpers.config import Config, load_config
from fedpers.data import Federation, PublicText, Record, load
from fedpers.data.base import role
from fedpers.errors import ConfigError, DataError
from fedpers.privacy.randomness import seed_key
from fedpers.tasks.reply_ranking import ReplyRanking

KEY = seed_key(0)


def small(users: int = 6) -> Federation:
    return load(load_config(None, ["data.name=synthetic", f"data.users={users}"]), KEY)


def test_checks_find_what_would_make_results_or_claims_false() -> None:
    honest = small()
    leak = replace(honest, test=(honest.train[0][:1], *honest.test[1:]))
    with pytest.raises(DataError, match="appears twice"):
        leak.check()
    first = honest.train[0][0]
    other_side = Record("elsewhere", first.conversation, "their side", "of one conversation")
    with pytest.raises(DataError, match="conversations are in train and in test"):
        replace(honest, test=(*honest.test[:-1], (*honest.test[-1], other_side))).check()
    with pytest.raises(DataError, match="every epsilon false"):
        replace(honest, pool_authors=frozenset({honest.users[2]})).check()
    with pytest.raises(DataError, match="no user has enough records"):
        replace(honest, users=()).check()
    assert honest.check() is honest


def test_role_depends_on_the_id_alone_and_fills_the_shares() -> None:
    roles = [role(f"person-{number}") for number in range(20_000)]
    assert roles == [role(f"person-{number}") for number in range(20_000)]
    assert abs(roles.count("pool") / 20_000 - 0.08) < 0.01
    assert abs(roles.count("development") / 20_000 - 0.12) < 0.01


def test_candidates_are_public_distinct_and_never_the_truth_again() -> None:
    federation = small()
    config = load_config(None, ["task.candidates=8"])
    examples = ReplyRanking(config.task).prepare(federation, KEY)
    public = {text.text for text in federation.pool}
    records = {r.id: r for part in (federation.train, federation.test) for held in part for r in held}
    for row, name in enumerate(examples.ids):
        texts = [examples.texts[index] for index in examples.candidates[row]]
        assert texts[0] == records[name].target
        assert len({text.casefold() for text in texts}) == len(texts) == 8
        assert set(texts[1:]) <= public
    again = ReplyRanking(config.task).prepare(federation, seed_key(1))
    assert not np.array_equal(again.candidates, examples.candidates)  # the seed draws them


def test_candidates_avoid_the_record_s_own_conversation_and_small_pools_are_refused() -> None:
    federation = small()
    record = federation.train[0][0]
    own = tuple(PublicText(f"own/{n}", record.conversation, f"said in the same talk {n}") for n in range(300))
    task = ReplyRanking(load_config(None, ["task.candidates=8"]).task)
    examples = task.prepare(replace(federation, pool=federation.pool + own), KEY)
    row = examples.ids.index(record.id)
    texts = [examples.texts[index] for index in examples.candidates[row]]
    assert not any(text.startswith("said in the same talk") for text in texts)
    with pytest.raises(DataError, match=r"too few for 8 candidates, which need 32; lower task\.candidates"):
        task.prepare(replace(federation, pool=federation.pool[:20]), KEY)
    alike = tuple(PublicText(f"p/{n}", f"p/{n}", "always the same") for n in range(100))
    with pytest.raises(DataError, match="too few distinct texts"):
        task.prepare(replace(federation, pool=alike), KEY)


def test_a_tie_counts_against_the_truth() -> None:
    import torch

    task = ReplyRanking(load_config(None, []).task)
    scores = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [float("nan"), 0.0, 0.0], [0.0, 1.0, 2.0]])
    found = task.metrics(scores, torch.zeros(len(scores)))
    assert found["accuracy"].tolist() == [0, 1, 0, 0]
    assert found["mrr"].tolist() == pytest.approx([1 / 2, 1, 1 / 3, 1 / 3])


def test_unknown_source_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"data\.name = 'chitchatt': unknown; did you mean 'chitchat'"):
        load(load_config(None, ["data.name=chitchatt"]), KEY)


@pytest.fixture(scope="module")
def chats() -> dict[str, Federation]:
    """The real federation and the development users; texts stay in memory."""

    def config(*overrides: str) -> Config:
        return load_config(None, [*overrides])

    return {
        "federation": load(config(), KEY),
        "development": load(config("data.people=development"), KEY),
        "other seed": load(config("data.users=20"), seed_key(5)),
    }


@pytest.mark.slow
def test_real_people_are_apart(chats: dict[str, Federation]) -> None:
    federation, development = chats["federation"], chats["development"]
    assert len(federation.users) == 228
    assert len(development.users) == 41
    groups = [set(federation.users), set(development.users), set(federation.pool_authors)]
    assert all(not a & b for place, a in enumerate(groups) for b in groups[place + 1 :])
    assert federation.pool == development.pool  # public, and the same for everybody
    assert set(chats["other seed"].users) <= set(federation.users)  # no seed moves anybody into the federation
    for user in range(len(federation.users)):
        assert 15 <= len(federation.train[user]) <= 60
        assert 5 <= len(federation.test[user]) <= 40


@pytest.mark.slow
def test_real_conversations_have_one_split_for_both_speakers(chats: dict[str, Federation]) -> None:
    federation = chats["federation"]
    train = {r.conversation for held in federation.train for r in held}
    test = {r.conversation for held in federation.test for r in held}
    assert not train & test
    assert len(train) > 500
    speakers: dict[str, set[int]] = {}
    for part in (federation.train, federation.test):
        for user, held in enumerate(part):
            for record in held:
                speakers.setdefault(record.conversation, set()).add(user)
    both = [sorted(users) for users in speakers.values() if len(users) == 2]
    assert len(both) > 100  # both sides of many conversations are in the federation ...
    assert all(b in federation.partners[a] and a in federation.partners[b] for a, b in both)  # ... and known as such
