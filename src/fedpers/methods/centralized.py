"""All records in one place: what federation gives up."""

from fedpers.methods.base import SHARED, Method, Phase


class Centralized(Method):
    """One model, trained on the pooled records of all who take part; not federated, an upper bound for comparison.

    A round is `local.epochs` passes over the pool, so as many gradients of as many records as in a round of fedavg, but
    one after the other.
    """

    cite = "baseline"
    differs = "from fedavg: one trainer sees all records, so nothing is averaged; not federated"
    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head"),)
    pooled = True
    unclaimable = "its one trainer holds everybody's records, so no client's message can be told apart and bounded"
