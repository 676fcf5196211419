"""Chit-chat challenge: 1,315 real people in 7,168 conversations (Myers, Etchart, Fulda 2020; MIT licence)."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from fedpers.config import DataConfig
from fedpers.data.base import Federation, PublicText, Record, Source, choose_users, role
from fedpers.errors import DataError
from fedpers.formats.split import late, partners
from fedpers.models import assets
from fedpers.sources import FROM_RAW_DATA, Parts, assemble

TEST_FROM = 0.6  # a conversation is for testing if its mean position in the two histories lies beyond
POOL_CAP = 40  # texts per person in the public pool, so that no one talker fills it


@dataclass(frozen=True, slots=True)
class _Turn:
    speaker: str
    text: str


@dataclass(frozen=True, slots=True)
class _Conversation:
    id: str
    start: str
    turns: tuple[_Turn, ...]

    @property
    def speakers(self) -> frozenset[str]:
        return frozenset(turn.speaker for turn in self.turns)


class Chitchat(Source):
    """Each record: the partner's last turn, and what the user really replied.

    A whole conversation is either for training or for testing, for both its speakers: by the mean of its positions in
    the two speakers' histories. A split per user would put a partner's training text into the other's test.
    """

    about = "real chats of 1,315 students with each other"
    licence = "MIT"
    citation = "Myers, Etchart, Fulda: Conversational Scaffolding, ICAART 2020"
    split = "whole conversations, by their mean position in the histories of both speakers"
    tasks = ("reply-ranking", "language-model")

    def load(self, config: DataConfig, key: bytes) -> Federation:
        """Read the asset and build the federation of the configured people."""
        conversations = _read(assets.fetch("chitchat"))
        tested = _late(conversations)
        records: dict[str, Parts] = defaultdict(lambda: ([], []))
        for conversation in conversations:
            for place, (before, turn) in enumerate(zip(conversation.turns, conversation.turns[1:], strict=False)):
                if before.speaker != turn.speaker:
                    record = Record(f"{conversation.id}/{place + 1}", conversation.id, before.text, turn.text)
                    records[turn.speaker][conversation.id in tested].append(record)
        held = {user: parts for user, parts in records.items() if role(user) == config.people}
        found = assemble("chitchat", held, config, lambda users, limit: choose_users(users, limit, key), {})
        pool, authors = _pool(conversations)
        return replace(
            found,
            pool=pool,
            pool_authors=authors,
            partners=partners(found.users, {one.id: one.speakers for one in conversations}),
            facts=_facts(conversations, found, authors),
        )


def _read(path: Path) -> list[_Conversation]:
    """Parse the file, in order of time; messages without text and turns without messages are left out."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read as JSON; run `fedpers assets fetch chitchat --force`.") from error
    conversations = []
    for identifier, item in tree.items():
        turns = []
        for messages in item["messages"]:
            text = " ".join(message["text"].strip() for message in messages).strip()
            if text:
                turns.append(_Turn(messages[0]["sender"], text))
        conversations.append(_Conversation(identifier, item["start"], tuple(turns)))
    return sorted(conversations, key=lambda c: (c.start, c.id))


def _late(conversations: list[_Conversation]) -> set[str]:
    """Return the conversations for testing."""
    history: dict[str, list[str]] = defaultdict(list)
    for conversation in conversations:
        for speaker in sorted(conversation.speakers):
            history[speaker].append(conversation.id)
    return late(history, TEST_FROM)


def _pool(conversations: list[_Conversation]) -> tuple[tuple[PublicText, ...], frozenset[str]]:
    """Return replies by the people whose id puts them outside the federation."""
    taken: dict[str, int] = defaultdict(int)
    pool = []
    for conversation in conversations:
        for place, turn in enumerate(conversation.turns[1:], start=1):
            if role(turn.speaker) == "pool" and taken[turn.speaker] < POOL_CAP:
                taken[turn.speaker] += 1
                pool.append(PublicText(f"{conversation.id}/{place}", conversation.id, turn.text))
    return tuple(pool), frozenset(taken)


def _facts(conversations: list[_Conversation], federation: Federation, authors: frozenset[str]) -> tuple[str, ...]:
    """Say in numbers where a member's words stand outside what the member's own client holds."""
    members = set(federation.users)
    by_id = {conversation.id: conversation for conversation in conversations}
    held = [(user, r) for user, own in zip(federation.users, federation.train, strict=True) for r in own]
    from_member = sum(bool((by_id[r.conversation].speakers - {user}) & members) for user, r in held)
    pooled = [c for c in conversations if c.speakers & authors]
    with_member = sum(bool((c.speakers - authors) & members) for c in pooled)
    return (
        f"a person's words also stand as context in conversation partners' records: {from_member} of {len(held)} "
        "training records quote another member, and what those clients hold is protected as theirs, not as the "
        "quoted person's",
        f"the public pool was written by people outside, yet {with_member} of their {len(pooled)} conversations had a "
        "member as partner, to whom they may have replied",
        FROM_RAW_DATA,
    )
