"""The client side: one function answers messages, for a cohort in this process or for one node elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from flwr.app import Message

from fedpers.cohort.clients import Clients
from fedpers.evaluation.models import shared_metrics
from fedpers.flower import messages as wire

Report = Callable[[Exception], None]


def answer(clients: Clients, users: Sequence[int], messages: Sequence[Message], report: Report) -> list[Message]:
    """Answer one round's messages to these users, in their order.

    A failure is told to the server as a fixed code, and as it is to `report`, the simulator's own channel.
    """
    if not messages:
        return []
    try:
        shared = wire.from_record(wire.arrays_of(messages[0]))
        if messages[0].metadata.message_type.startswith("evaluate"):
            # Raw metrics of single users are private; they travel only where nothing is claimed.
            return measured(clients, users, messages, shared, clients.guarantee.unit == "none")
        return trained(clients, users, messages, shared)
    except Exception as error:
        report(error)
        return [wire.failure(message) for message in messages]


def trained(clients: Clients, users: Sequence[int], messages: Sequence[Message], shared: wire.Arrays) -> list[Message]:
    """Train a round for these users from the shared arrays, (out, in) by name, and answer the messages that ask it."""
    number = wire.round_of(messages[0])
    clients.model.present(users)
    replies, allowed = clients.train_round(number, users, shared), clients.layout.up(number)
    return [
        wire.reply(message, {name: np.array(rows[place]) for name, rows in replies.items()}, allowed)
        for place, message in enumerate(messages)
    ]


def measured(
    clients: Clients, users: Sequence[int], messages: Sequence[Message], shared: wire.Arrays, tell: bool
) -> list[Message]:
    """Answer evaluation messages; the metrics themselves travel only where `tell` says so."""
    found = shared_metrics(clients, users, shared) if tell else [{} for _ in users]
    return [wire.metrics_reply(message, one) for message, one in zip(messages, found, strict=True)]
