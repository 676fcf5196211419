"""Telling training from testing by time, so that nothing that belongs together lies on both sides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence


def late(histories: Mapping[str, Sequence[str]], test_from: float) -> set[str]:
    """Return the conversations for testing: those whose mean position in all their users' histories lies late.

    A conversation is on one side for all its users; a cut for each user alone would put one user's training text into
    another's test.

    Args:
        histories: each user's conversations in order of time, each once.
        test_from: the position from which on they are for testing, between 0 and 1; a history's i-th conversation of n
            is at (i + 1/2) / n.
    """
    positions: dict[str, list[float]] = defaultdict(list)
    for held in histories.values():
        for place, identifier in enumerate(held):
            positions[identifier].append((place + 0.5) / len(held))
    return {identifier for identifier, found in positions.items() if sum(found) / len(found) > test_from}


def partners(users: Sequence[str], groups: Mapping[str, frozenset[str]]) -> tuple[frozenset[int], ...]:
    """Return for each user the positions of the users that share a conversation; `groups`: who is in which."""
    place = {user: index for index, user in enumerate(users)}
    met: list[set[int]] = [set() for _ in users]
    for group in groups.values():
        inside = [place[user] for user in group if user in place]
        for user in inside:
            met[user].update(other for other in inside if other != user)
    return tuple(frozenset(others) for others in met)
