"""The ClientApp of the Flower peer; in a module of its own, so that an actor imports it once and keeps its model."""

from __future__ import annotations

from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peer_client import once

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the user named by the node's `partition-id` from the broadcast, as the message's config says."""
    config = message.content.config_records["config"]
    arrays = message.content.array_records["arrays"]
    user = int(str(context.node_config["partition-id"]))
    if config["mode"] != "empty":
        workload, client = once(Path(str(config["workload"])), str(config["mode"]), int(str(config["threads"])))
        batches = workload.clients[user][: int(str(config["batches"]))]
        client.train(arrays.to_torch_state_dict(), batches, float(str(config["lr"])), float(str(config["noise"])))
        arrays = ArrayRecord(client.weights())
    # Every client counts the same, as for the other peers: the key is the one that FedAvg weighs by.
    metrics = MetricRecord({"num-examples": 1, "client": user})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
