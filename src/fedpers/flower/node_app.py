"""The ClientApp of a node: what `flwr run` starts, on Ray or on a user's own machine, where each message may be a
process of its own. Who the node acts for is answered before anything heavy is imported.
"""

from __future__ import annotations

import logging
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpers.flower import messages as wire

if TYPE_CHECKING:
    from fedpers.config import Config
    from fedpers.data import Federation
    from fedpers.flower.node_file import Place


class NodeApp(ClientApp):  # type: ignore[misc]
    """Answers every message itself: Flower would send the text of an exception, and runs what a message names."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer, or refuse with a fixed code; why is in the node's own log."""
        try:
            return _respond(message, context)
        except wire.Refused as refused:
            logging.getLogger("fedpers").warning("refused (%d): %s", refused.code, refused)
            return wire.failure(message, refused.code)
        except Exception:
            logging.getLogger("fedpers").exception("a message could not be answered")
            return wire.failure(message)


app = NodeApp()


def _respond(message: Message, context: Context) -> Message:
    kind = message.metadata.message_type
    if kind == "query":
        return wire.position_reply(message, _position(context))
    if kind not in {"train", "evaluate"}:
        raise wire.Refused(wire.UNKNOWN, "a message of a kind that no fedpers server sends")
    from fedpers.flower import node

    return (node.train if kind == "train" else node.evaluate)(message, _place(context))


def _owner_file(context: Context) -> Path | None:
    """Return the owner's file; None on Ray, where one simulator owns all nodes."""
    own = context.node_config.get("node")
    if own is not None:
        return Path(str(own))
    if "ray" in sys.modules:
        return None
    # Without this a server could name data and configuration, in the settings that come along with its messages.
    raise wire.Refused(wire.LIMITS, "this node has no owner's file: start it with --node-config 'node=\"FILE\"'")


def _position(context: Context) -> int:
    from fedpers.flower.node_file import owned

    path = _owner_file(context)
    return int(context.node_config["partition-id"]) if path is None else owned(path)[2]


def _place(context: Context) -> Place:
    from fedpers.flower.node_file import Limits, Place, place_of

    path = _owner_file(context)
    if path is not None:
        return place_of(path)
    position = int(context.node_config["partition-id"])
    config, federation = _simulated(str(context.run_config["config"]))
    state = Path(str(context.run_config["out"])) / "nodes" / f"{position:05d}"
    return Place(config, federation.of((position,)), position, state, Limits(unprotected=True))


@lru_cache(maxsize=1)  # an actor of Ray answers for many nodes
def _simulated(path: str) -> tuple[Config, Federation]:
    from fedpers.config import load_config
    from fedpers.data import load
    from fedpers.privacy.randomness import seed_key

    config = load_config(path)
    return config, load(config, seed_key(config.seed))
