"""Which node acts for which user: Flower gives nodes random numbers, and everything here goes by the user's position on
the public list, so that who is drawn does not hang on them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import Message, Metadata, RecordDict
from flwr.app.message import make_message

from fedpers.flower import messages as wire


class Roll:
    """A Flower grid whose node FIRST_NODE + position is whichever node says that it acts for the user there.

    A node keeps the first seat that it takes while it is online; a second one that claims the same seat gets none, and
    a user whose node is not there is as one who does not answer. With SuperNode authentication a node is who it was
    registered as, and then it can lie about its seat alone, which no claim hangs on.

    Args:
        grid: the way to the nodes.
        users: how many are registered.
        patience: seconds to wait for a node that is not there, and for its answer who it is.
    """

    def __init__(self, grid: Any, users: int, patience: float) -> None:
        self.grid, self.users, self.patience = grid, users, patience
        self._seats: dict[int, int] = {}  # user's position -> node
        self._strangers: set[int] = set()

    def get_node_ids(self) -> list[int]:
        """All users' nodes, there or not."""
        return list(range(wire.FIRST_NODE, wire.FIRST_NODE + self.users))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send to the users' nodes that are there; returns their answers, as from FIRST_NODE + position."""
        wanted = {message.metadata.dst_node_id - wire.FIRST_NODE: message for message in messages}
        if not wanted:
            return []
        self.call(sorted(wanted))
        there = {self._seats[user]: message for user, message in wanted.items() if user in self._seats}
        for node, message in there.items():
            message.metadata.dst_node_id = node
        users = {node: user for user, node in self._seats.items()}
        replies = self.grid.send_and_receive(list(there.values()), timeout=timeout) if there else []
        return [
            _renamed(reply, wire.FIRST_NODE + users[reply.metadata.src_node_id])
            for reply in replies
            if reply.metadata.src_node_id in there
        ]

    def call(self, users: Sequence[int]) -> None:
        """Ask nodes that are new who they act for, until these users' are known or patience is over."""
        deadline = time.monotonic() + self.patience
        while True:
            online = set(self.grid.get_node_ids())
            self._seats = {user: node for user, node in self._seats.items() if node in online}
            if new := sorted(online - set(self._seats.values()) - self._strangers):
                self._ask(new)
            if set(users) <= set(self._seats) or time.monotonic() > deadline:
                return
            time.sleep(min(1.0, self.patience))

    def _ask(self, nodes: Sequence[int]) -> None:
        questions = [Message(RecordDict(), node, "query") for node in nodes]
        answers = self.grid.send_and_receive(questions, timeout=self.patience)
        for answer in sorted(answers, key=lambda one: int(one.metadata.src_node_id)):
            node, position = answer.metadata.src_node_id, _position(answer)
            if node in nodes and position is not None and position < self.users and position not in self._seats:
                self._seats[position] = node
            elif node in nodes:
                self._strangers.add(node)


def _position(answer: Message) -> int | None:
    """Read an answer that nobody vouches for."""
    if not answer.has_content() or wire.METRICS not in answer.content.metric_records:
        return None
    position = answer.content.metric_records[wire.METRICS].get(wire.POSITION)
    return position if type(position) is int and position >= 0 else None


def _renamed(reply: Message, node: int) -> Message:
    """Return the same reply as from another node."""
    old = reply.metadata
    new = Metadata(
        old.run_id, old.message_id, node, old.dst_node_id, old.reply_to_message_id, old.group_id, old.created_at,
        old.ttl, old.message_type,
    )  # fmt: skip
    if reply.has_error():
        return make_message(new, error=reply.error)
    return make_message(new, content=reply.content)
