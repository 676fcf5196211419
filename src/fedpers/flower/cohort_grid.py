"""A Flower Grid that runs in this process and hands all messages of a round to the cohort engine at once."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedpers.cohort.clients import Clients
from fedpers.flower.client_app import answer
from fedpers.flower.messages import FIRST_NODE

_RUN_ID = 1


class CohortGrid(Grid):  # type: ignore[misc]
    """Every user is a node, with the node id FIRST_NODE + position of the user."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self.failure: Exception | None = None  # the simulator's own channel
        self._replies: dict[str, Message] = {}
        # Flower needs to know who builds messages. This is private API, kept in this one place.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, _RUN_ID, 1

    def set_run(self, run: Run) -> None:
        """Not used: there is one run."""

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(_RUN_ID)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Build a message (Flower's deprecated way, kept because the base class asks for it)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All users' nodes."""
        return range(FIRST_NODE, FIRST_NODE + len(self.clients.examples.users))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Answer all messages of a round; nothing waits, so `timeout` has no effect.

        Raises:
            Exception: what a client raised. In a simulation a failing client is a bug to see, not a drop-out to hide.
        """
        del timeout
        # Messages with the same content go through one pass; a strategy may also tell different nodes different things.
        alike: dict[tuple[str, int], list[Message]] = {}
        for message in sorted(messages, key=lambda message: message.metadata.dst_node_id):
            alike.setdefault((message.metadata.message_type, id(message.content)), []).append(message)
        replies: list[Message] = []
        for listed in alike.values():
            users = [message.metadata.dst_node_id - FIRST_NODE for message in listed]
            replies += answer(self.clients, users, listed, self._report)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return replies

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Answer messages at once and keep the replies for `pull_messages`."""
        self._replies = {f"reply-{number}": reply for number, reply in enumerate(self.send_and_receive(messages))}
        return list(self._replies)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return and forget the replies that were pushed."""
        return [self._replies.pop(identifier) for identifier in message_ids if identifier in self._replies]

    def _report(self, error: Exception) -> None:
        self.failure = error
