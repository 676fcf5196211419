"""The one place where messages to and from clients are built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedpers.errors import PrivacyRefusal

FIRST_NODE = 1000  # node ids of the in-process grid: FIRST_NODE + position of the user; Flower reserves small ones
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"  # the keys that Flower's stock strategies expect
WEIGHT = "num-examples"  # always 1: how many records a user has is private, and every user counts the same
CLIENT_FAILED = 1  # the only thing a failing client tells

Arrays = Mapping[str, NDArray[np.float32]]


def to_record(arrays: Arrays, allowed: Sequence[str]) -> ArrayRecord:
    """Build an ArrayRecord of exactly the allowed names.

    Raises:
        PrivacyRefusal: another set of names; personal or frozen arrays must never enter a message (refusal R11).
    """
    if set(arrays) != set(allowed):
        extra = sorted(set(arrays) ^ set(allowed))
        raise PrivacyRefusal(f"a message must hold exactly the shared arrays; in question: {', '.join(extra)}.")
    return ArrayRecord({name: Array(np.ascontiguousarray(arrays[name])) for name in sorted(allowed)})


def from_record(record: ArrayRecord) -> dict[str, NDArray[np.float32]]:
    """Read the arrays of a record as fp32."""
    return {name: array.numpy().astype(np.float32, copy=False) for name, array in record.items()}


def reply(message: Message, arrays: Arrays, allowed: Sequence[str]) -> Message:
    """A client's answer to a training message: shared arrays and the constant weight, nothing else."""
    content = RecordDict({ARRAYS: to_record(arrays, allowed), METRICS: MetricRecord({WEIGHT: 1})})
    return Message(content, reply_to=message)


def metrics_reply(message: Message, metrics: Mapping[str, float]) -> Message:
    """A client's answer to an evaluation message."""
    return Message(RecordDict({METRICS: MetricRecord({WEIGHT: 1, **metrics})}), reply_to=message)


def failure(message: Message) -> Message:
    """A failed client's answer: a fixed code, never the exception's text, which could quote private data."""
    return Message(Error(code=CLIENT_FAILED, reason="client failed"), reply_to=message)


def round_of(message: Message) -> int:
    """The server's round number in a message."""
    config = message.content[CONFIG]
    assert isinstance(config, ConfigRecord)
    number = config["server-round"]
    assert isinstance(number, int)
    return number


def arrays_of(message: Message) -> ArrayRecord:
    """The arrays in a message."""
    record = message.content[ARRAYS]
    assert isinstance(record, ArrayRecord)
    return record


def shared_of(message: Message, expected: Arrays) -> dict[str, NDArray[np.float32]]:
    """Read a training reply: exactly the shared arrays in their shapes, the constant weight, and nothing else.

    Raises:
        PrivacyRefusal: a weight other than 1 (one user would count beyond the clip, refusal R8), metrics of a user
            (private, refusal R12), or other arrays (refusal R11).
    """
    metrics = {name: value for record in message.content.metric_records.values() for name, value in record.items()}
    if metrics.pop(WEIGHT, None) != 1:
        raise PrivacyRefusal(
            f"a reply with a {WEIGHT} other than 1: how many records a user has is private, and a user with a larger "
            "weight would move the mean beyond the clip; send the constant 1."
        )
    arrays = from_record(arrays_of(message))
    if metrics or {n: a.shape for n, a in arrays.items()} != {n: a.shape for n, a in expected.items()}:
        extra = sorted({*metrics, *(set(arrays) ^ set(expected))})
        raise PrivacyRefusal(
            f"a reply must hold the shared arrays in their shapes and nothing else; in question: {', '.join(extra)}. "
            "What a single user measures is private and stays on the simulator's own channel."
        )
    return arrays


def nbytes(arrays: Mapping[str, NDArray[np.float32] | tuple[int, ...]]) -> int:
    """Payload of one message in bytes: fp32 numbers."""
    shapes = (a if isinstance(a, tuple) else a.shape for a in arrays.values())
    return 4 * sum(math.prod(shape) for shape in shapes)
