"""From replies to the next broadcast, as a method's table and server functions say; and what that costs in accuracy.

Nothing here clips or adds noise: what it is given has been protected already, or is looked at by the simulator alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpers.cohort.layout import Layout
from fedpers.errors import ConfigError
from fedpers.models.array_names import Pair, pairs
from fedpers.models.lora_algebra import aggregation_error, effective_rank
from fedpers.visit import Arrays, mean


@dataclass(frozen=True)
class Diagnosis:
    """What averaging does to the products of LoRA factors, seen by the simulator alone.

    Attributes:
        error: norm of mean(B A) - what the server makes of it, over the norm of mean(B A), of the replies as they
            arrive (with the noise of clients that add their own), before the server clips, adds noise or lets an
            optimizer go on from their mean; the mean over the adapted modules.
        rank: effective rank of the next broadcast's update, the mean over the adapted modules.
    """

    error: float | None
    rank: float


def combine(layout: Layout, replies: Sequence[Arrays], broadcast: Arrays, number: int) -> Arrays:
    """Make one reply out of many, by the method's own rule if it has one, else their mean; all that travels down."""
    method = layout.plan.method
    if method.overrides("combine"):
        made = method.combine(list(replies), layout.service(number, broadcast))
        return {**broadcast, **_checked(layout, "combine", made, broadcast)}
    return {**broadcast, **mean(replies)}


def serve(layout: Layout, arrays: Arrays, broadcast: Arrays, number: int) -> Arrays:
    """Return the next broadcast from what the server's strategy has made of the replies.

    What clients did not send in this round stays as it was, whatever momentum an optimizer holds for it.
    """
    method = layout.plan.method
    moved = set(layout.down) if method.overrides("combine") else set(layout.up(number))
    arrays = {name: arrays[name] if name in moved else broadcast[name] for name in broadcast}
    if method.overrides("serve"):
        made = method.serve(arrays, layout.service(number, broadcast))
        arrays = {**arrays, **_checked(layout, "serve", made, broadcast)}
    return {name: np.asarray(arrays[name], dtype=np.float32) for name in broadcast}


def _checked(layout: Layout, function: str, made: object, broadcast: Arrays) -> Arrays:
    """Return what a method's server function has made, or say what is wrong with it."""
    where = f"method {layout.plan.name!r}: {function}"
    if not isinstance(made, Mapping):
        raise ConfigError(
            f"{where} returned {type(made).__name__}; it must return arrays by name, such as mean(replies)."
        )
    if unknown := sorted(set(map(str, made)) - set(broadcast)):
        raise ConfigError(
            f"{where} returned {unknown[0]!r}, which does not travel; known: {', '.join(sorted(broadcast))}."
        )
    for name, value in made.items():
        if (shape := np.shape(value)) != broadcast[name].shape:
            raise ConfigError(f"{where} returned {name!r} of shape {shape}; expected {broadcast[name].shape}.")
    return dict(made)


def diagnose(
    layout: Layout, replies: Sequence[Arrays], broadcast: Arrays, after: Arrays, number: int
) -> Diagnosis | None:
    """Compare what the clients say on average with what the server makes of it, before its own noise and clipping.

    Args:
        layout: the run's arrays.
        replies: what each client sends.
        broadcast: what they started from.
        after: the next broadcast, noised where the run adds noise.
        number: the round.
    """
    known = {name: value.numpy() for name, value in layout.initial.items()}
    # A reply that is not finite counts as zero on the server; here it says nothing.
    replies = [one for one in replies if all(np.isfinite(array).all() for array in one.values())]
    modules = [pair for pair in pairs(known) if _visible(layout, pair)]
    if not replies or not modules or layout.clusters:
        return None
    quiet = serve(layout, combine(layout, replies, broadcast, number), broadcast, number)
    errors, ranks = [], []
    for pair in modules:
        sent = [known | broadcast | dict(one) for one in replies]
        lora_A, lora_B = (np.stack([one[name] for one in sent]) for name in (pair.A, pair.B))
        base = broadcast.get(pair.residual, 0.0)
        made = _product(known | quiet, pair) + (quiet.get(pair.residual, 0.0) - base) / layout.scaling
        errors.append(aggregation_error(lora_A, lora_B, made))  # nan for products that cancel
        ranks.append(_rank(known | after, pair, after.get(pair.residual), layout.scaling))
    known_errors = [error for error in errors if not np.isnan(error)]
    return Diagnosis(float(np.mean(known_errors)) if known_errors else None, float(np.mean(ranks)))


def _visible(layout: Layout, pair: Pair) -> bool:
    """Whether the server knows both factors of a module: sent, or public; and at least one that moves."""
    place = [layout.plan.scopes[layout.group[name]].value for name in (pair.A, pair.B)]
    return "personal" not in place and "shared" in place


def _product(arrays: Mapping[str, NDArray[np.float32]], pair: Pair) -> NDArray[np.float64]:
    return arrays[pair.B].astype(np.float64) @ arrays[pair.A].astype(np.float64)


def _rank(
    arrays: Mapping[str, NDArray[np.float32]], pair: Pair, residual: NDArray[np.float32] | None, scaling: float
) -> float:
    if residual is None:
        return effective_rank(arrays[pair.A], arrays[pair.B])
    whole = (_product(arrays, pair) + residual / scaling).astype(np.float32)
    return effective_rank(whole, np.eye(len(whole), dtype=np.float32))
