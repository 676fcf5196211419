"""Which node acts for which user: Flower gives nodes random numbers, and everything here goes by the user's position on
the public list, so that who is drawn does not hang on them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.app import Message, Metadata, RecordDict
from flwr.app.message import make_message

from fedpers.errors import DataError
from fedpers.flower import messages as wire


class Roll:
    """A Flower grid whose node FIRST_NODE + position is whichever node says that it acts for the user there.

    Where the public list holds the nodes' keys, a seat is its key's, as the SuperLink tells it of each node, and nobody
    else can take it. Else a node is believed: it keeps the first seat that it takes while it is online, and a second
    one that claims the same seat gets none. A user whose node is not there is as one who does not answer.

    Args:
        grid: the way to the nodes.
        users: how many are registered.
        patience: seconds to wait for a node that is not there, and for its answer who it is.
        keys: the users' nodes' public keys, in the order of the list.

    Raises:
        DataError: keys that are not one for each user, each another.
    """

    def __init__(self, grid: Any, users: int, patience: float, keys: Sequence[str] = ()) -> None:
        self.grid, self.users, self.patience = grid, users, patience
        self._places = {_pem(key): place for place, key in enumerate(keys)}
        if keys and not len(self._places) == len(keys) == users:
            raise DataError("the public list of people has to hold one key for each user, each another, or no keys.")
        self._seats: dict[int, int] = {}  # user's position -> node
        self._strangers: set[int] = set()

    def get_node_ids(self) -> list[int]:
        """All users' nodes, there or not."""
        return list(range(wire.FIRST_NODE, wire.FIRST_NODE + self.users))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send to the users' nodes that are there; returns their answers, as from FIRST_NODE + position.

        What answers another message than this one is too late, and no answer.
        """
        wanted = {message.metadata.dst_node_id - wire.FIRST_NODE: message for message in messages}
        if not wanted:
            return []
        self.call(sorted(wanted))
        there = {self._seats[user]: message for user, message in wanted.items() if user in self._seats}
        for node, message in there.items():
            message.metadata.dst_node_id = node
            # Flower does not hold an answer's sender against its key: what is answered must not be guessed by others.
            message.metadata.group_id = secrets.token_hex(16)
        users = {node: user for user, node in self._seats.items()}
        replies = self.grid.send_and_receive(list(there.values()), timeout=timeout) if there else []
        return [
            _renamed(reply, wire.FIRST_NODE + users[reply.metadata.src_node_id])
            for reply in replies
            if (asked := there.get(reply.metadata.src_node_id)) is not None
            and reply.metadata.reply_to_message_id == asked.metadata.message_id  # which the grid gave it
        ]

    def call(self, users: Sequence[int]) -> None:
        """Find who the nodes act for, until these users' are known or patience is over."""
        deadline = time.monotonic() + self.patience
        while True:
            if self._places:
                self._seats = {
                    self._places[node.public_key]: node.node_id
                    for node in self.grid.get_nodes()
                    if node.public_key in self._places
                }
            else:
                self._believe()
            if set(users) <= set(self._seats) or time.monotonic() > deadline:
                return
            time.sleep(min(1.0, self.patience))

    def _believe(self) -> None:
        """Ask nodes that are new who they act for."""
        online = set(self.grid.get_node_ids())
        self._seats = {user: node for user, node in self._seats.items() if node in online}
        if new := sorted(online - set(self._seats.values()) - self._strangers):
            self._ask(new)

    def _ask(self, nodes: Sequence[int]) -> None:
        questions = [Message(RecordDict(), node, "query") for node in nodes]
        answers = self.grid.send_and_receive(questions, timeout=self.patience)
        for answer in sorted(answers, key=lambda one: int(one.metadata.src_node_id)):
            node, position = answer.metadata.src_node_id, _position(answer)
            if node in nodes and position is not None and position < self.users and position not in self._seats:
                self._seats[position] = node
            elif node in nodes:
                self._strangers.add(node)


def _pem(key: str) -> bytes:
    """Return a public key, the line of a `.pub` file, as Flower tells it."""
    try:
        return load_ssh_public_key(key.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DataError(
            "the public list of people holds a key that is none; take the lines of the nodes' .pub files."
        ) from error


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
