"""The one place where messages to and from clients are built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from io import BytesIO

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedpers.errors import PrivacyRefusal

FIRST_NODE = 1000  # node ids of the in-process grid: FIRST_NODE + position of the user; Flower reserves small ones
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"  # the keys that Flower's stock strategies expect
WEIGHT = "num-examples"  # always 1: how many records a user has is private, and every user counts the same
POSITION, CONFIGURATION = "position", "configuration"
CLIENT_FAILED = 1  # the only thing a failing client tells
# What a node tells when it refuses: a fixed code, since an exception's text, which Flower would send, could quote a
# record. That it refuses can hang on its records all the same, and no claim covers it.
UNKNOWN, MALFORMED, OTHER_CONFIGURATION, ROUND_REFUSED, BUDGET_SPENT, LIMITS = range(101, 107)
REASONS = {
    CLIENT_FAILED: "client failed",
    UNKNOWN: "nothing is answered to this kind of message",
    MALFORMED: "the message is not what this run sends",
    OTHER_CONFIGURATION: "the node runs another configuration",
    ROUND_REFUSED: "the node answers each round once, in order, and none beyond the run",
    BUDGET_SPENT: "the node's privacy budget is spent",
    LIMITS: "beyond the limits of the node's owner",
}
NO_ANSWER = "no answer"  # for the codes that Flower itself gives

Arrays = Mapping[str, NDArray[np.float32]]


class Refused(Exception):
    """A node does not answer; the server is told the code alone, the text is for the node's owner."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class BadReply(PrivacyRefusal):
    """A reply that no client of this run sends. `reason` is one of a few fixed texts; the message may say more, and
    quote names that the reply holds.
    """

    def __init__(self, reason: str, more: str = "") -> None:
        super().__init__(f"a reply with {reason}: {more or 'it must hold the shared arrays in their shapes alone'}.")
        self.reason = reason


def to_record(arrays: Arrays, allowed: Sequence[str]) -> ArrayRecord:
    """Build an ArrayRecord of exactly the allowed names.

    Raises:
        PrivacyRefusal: another set of names; personal or frozen arrays must never enter a message (refusal R11).
    """
    if set(arrays) != set(allowed):
        extra = sorted(set(arrays) ^ set(allowed))
        raise PrivacyRefusal(f"a message must hold exactly the shared arrays; in question: {', '.join(extra)}.")
    record = ArrayRecord()
    for name in sorted(allowed):  # one by one: from a dictionary, Flower makes each array twice
        record[name] = _pack(np.ascontiguousarray(arrays[name]))
    return record


def from_record(record: ArrayRecord) -> dict[str, NDArray[np.float32]]:
    """Read the arrays of a record as fp32."""
    return {name: _unpack(array) for name, array in record.items()}


@lru_cache(maxsize=1024)
def _header(shape: tuple[int, ...]) -> bytes:
    """What `numpy.save` writes before the fp32 numbers of an array. It is most of a small message's cost."""
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _pack(array: NDArray[np.float32]) -> Array:
    """Make what `Array(array)` makes."""
    if array.dtype != np.float32:
        return Array(array)
    return Array("float32", array.shape, "numpy.ndarray", _header(array.shape) + array.astype("<f4").tobytes())


def _unpack(array: Array) -> NDArray[np.float32]:
    """Read an array as fp32, with Flower where it is not as `_pack` makes it."""
    try:
        return _numbers(array, array.shape).astype(np.float32)
    except Refused:
        read: NDArray[np.float32] = array.numpy().astype(np.float32, copy=False)
        return read


def reply(message: Message, arrays: Arrays, allowed: Sequence[str]) -> Message:
    """A client's answer to a training message: shared arrays and the constant weight, nothing else."""
    content = RecordDict({ARRAYS: to_record(arrays, allowed), METRICS: MetricRecord({WEIGHT: 1})})
    return Message(content, reply_to=message)


def metrics_reply(message: Message, metrics: Mapping[str, float]) -> Message:
    """A client's answer to an evaluation message."""
    return Message(RecordDict({METRICS: MetricRecord({WEIGHT: 1, **metrics})}), reply_to=message)


def failure(message: Message, code: int = CLIENT_FAILED) -> Message:
    """A failed client's answer: a fixed code, never the exception's text, which could quote private data."""
    return Message(Error(code=code, reason=REASONS[code]), reply_to=message)


def position_reply(message: Message, position: int) -> Message:
    """A node's answer to who it acts for: the user's place on the public list."""
    return Message(RecordDict({METRICS: MetricRecord({POSITION: position})}), reply_to=message)


def round_of(message: Message) -> int:
    """The server's round number in a message."""
    config = message.content[CONFIG]
    assert isinstance(config, ConfigRecord)
    number = config["server-round"]
    assert isinstance(number, int)
    return number


def asked(message: Message) -> tuple[int, str | None]:
    """Read what a node is asked: the round and, if it is told, which configuration the server runs.

    Raises:
        Refused: anything else in the message; nothing that a server says may change what a node does.
    """
    content = message.content if message.has_content() else RecordDict()
    config = content.get(CONFIG)
    if set(content) != {ARRAYS, CONFIG} or not isinstance(config, ConfigRecord):
        raise Refused(MALFORMED, "a message holds arrays and a configuration, and nothing else")
    number, configuration = config.get("server-round"), config.get(CONFIGURATION)
    if set(config) - {"server-round", CONFIGURATION} or type(number) is not int or number < 1:
        raise Refused(MALFORMED, "a message tells the round and the configuration's hash, and nothing else")
    if configuration is not None and type(configuration) is not str:
        raise Refused(MALFORMED, "the configuration's hash is a text")
    return number, configuration


def read_arrays(message: Message, expected: Arrays) -> dict[str, NDArray[np.float32]]:
    """Read the arrays of a message that nobody vouches for: finite fp32 numbers under the names and in the shapes of
    `expected`. Nothing is made of other bytes.

    Raises:
        Refused: any other arrays.
    """
    record = message.content[ARRAYS]
    if not isinstance(record, ArrayRecord) or set(record) != set(expected):
        raise Refused(MALFORMED, "other arrays than those that travel down")
    return {name: _read(record[name], expected[name].shape) for name in sorted(expected)}


def _read(array: Array, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Take one array's numbers if they are finite, too."""
    numbers = _numbers(array, shape)
    if not np.isfinite(numbers).all():
        raise Refused(MALFORMED, "an array with numbers that are not finite")
    return numbers


def _numbers(array: Array, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Take one array's numbers if its bytes are those that fedpers sends: no header is believed."""
    header = _header(shape)
    if array.stype != "numpy.ndarray" or len(array.data) != len(header) + 4 * math.prod(shape):
        raise Refused(MALFORMED, "an array of another kind or size")
    if array.data[: len(header)] != header:
        raise Refused(MALFORMED, "an array of another shape or type")
    return np.frombuffer(array.data, "<f4", offset=len(header)).reshape(shape)


def arrays_of(message: Message) -> ArrayRecord:
    """The arrays in a message."""
    record = message.content[ARRAYS]
    assert isinstance(record, ArrayRecord)
    return record


def shared_of(message: Message, expected: Arrays, finite: bool) -> dict[str, NDArray[np.float32]]:
    """Read a training reply: exactly the shared arrays in their shapes, the constant weight, and nothing else; with
    `finite` finite numbers alone.

    Raises:
        BadReply: a weight other than 1 (one user would count beyond the clip, refusal R8), metrics of a user
            (private, refusal R12), or other arrays (refusal R11).
    """
    content = message.content
    record, metrics = content.get(ARRAYS), content.get(METRICS)
    if set(content) != {ARRAYS, METRICS} or not isinstance(record, ArrayRecord):
        raise BadReply("other records than arrays and metrics")
    if not isinstance(metrics, MetricRecord) or metrics.get(WEIGHT) != 1:
        raise BadReply(
            f"a {WEIGHT} other than 1",
            "how many records a user has is private, and a user with a larger weight would move the mean beyond the "
            "clip; send the constant 1",
        )
    if extra := sorted({*metrics} - {WEIGHT}):
        raise BadReply(
            "metrics",
            f"in question: {', '.join(extra)}. What a single user measures is private and stays on the simulator's "
            "own channel",
        )
    if extra := sorted({*record} ^ {*expected}):
        raise BadReply("other names than the shared arrays", f"in question: {', '.join(extra)}")
    take = _read if finite else _numbers
    try:
        return {name: take(record[name], array.shape) for name, array in expected.items()}
    except Refused as refused:
        raise BadReply(str(refused)) from None


def nbytes(arrays: Mapping[str, NDArray[np.float32] | tuple[int, ...]]) -> int:
    """Payload of one message in bytes: fp32 numbers."""
    shapes = (a if isinstance(a, tuple) else a.shape for a in arrays.values())
    return 4 * sum(math.prod(shape) for shape in shapes)
