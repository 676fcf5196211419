"""The gradients of a step: passes over its records, each record clipped under DP, added up in the first lane."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor

from fedpers.cohort.batching import Index, Step
from fedpers.cohort.lanes import passes, worth
from fedpers.cohort.model import CohortModel
from fedpers.cohort.optimizer import CohortDPOptimizer, Noise

_VECTOR = 1  # tokens that a record counts for, of which one vector is read


@dataclass(frozen=True)
class RecordProtection:
    """DP-SGD inside the client: what one record can do to a step's sum, and the noise that hides it."""

    clip: float  # L2 bound on a record's gradient, over all trained arrays jointly
    noise_multiplier: float  # noise deviation over clip; 0 clips without noise
    lot_size: float  # public divisor of every sum
    noise: Noise
    per_layer: bool = False  # clip each trained array to clip/sqrt(arrays) instead: the same joint bound


@dataclass(frozen=True)
class Contexts:
    """What the records of all steps are read as, where nothing that shapes it moves."""

    encoded: Tensor  # (different records, ...)
    places: Sequence[Index]  # of each step's records in it, (records,)


class Gradients:
    """Makes the gradients of steps of one phase; a context, as Opacus's hooks are on the model for its duration.

    Attributes:
        private: the DP optimizer, whose `finish_batch` makes the step; None without record-level protection.
    """

    def __init__(
        self,
        model: CohortModel,
        moving: Sequence[str],
        optimizer: torch.optim.Optimizer,
        protection: RecordProtection | None,
        steps: Sequence[Step],
        contexts: Contexts | None,
    ) -> None:
        """Share the work out where a step has enough of it.

        Args:
            model: loaded with the weights that move.
            moving: names of the arrays that move.
            optimizer: over the model's weights in the order of `moving`.
            protection: clipping and noise; None without.
            steps: the logical batches, and whose records they hold.
            contexts: of their records, where nothing that shapes them moves.
        """
        self._moving, self._protection, self._steps, self._contexts = moving, protection, steps, contexts
        self._open = ExitStack()
        self._lanes = [model]
        tokens = max((int(model.lengths[step.rows].sum()) for step in steps), default=0)
        if contexts is None and worth(model.effort(tokens)):
            self._lanes = list(model.lanes.models)  # before hooks are on the first, or they would be copied
        self._private: list[CohortDPOptimizer | None] = []  # of each lane
        with ExitStack() as undo:
            undo.push(self._open)
            for lane in self._lanes:
                if lane is not model:
                    for name, layer in lane.layers.items():
                        layer.weight.requires_grad_(name in moving)
                        layer.weight.grad = None
                    # It holds a lane's sums and never steps.
                    optimizer = torch.optim.SGD([lane.layers[name].weight for name in moving], lr=0.0)
                self._take(lane, optimizer)
            undo.pop_all()  # nothing went wrong: hooks stay until the end
        self.private = self._private[0]

    def _take(self, model: CohortModel, optimizer: torch.optim.Optimizer) -> None:
        """Put Opacus's hooks on a lane's model."""
        given = self._protection
        model.per_record(given is not None)
        if given is None:
            self._private.append(None)
            return
        self._open.callback(GradSampleHooks(model, loss_reduction="sum").cleanup)
        self._open.callback(model.per_record, False)
        self._open.callback(_forget, model)
        self._private.append(
            CohortDPOptimizer(
                optimizer,
                owners=model.owners,
                noise_multiplier=given.noise_multiplier,
                max_grad_norm=given.clip,
                lot_size=given.lot_size,
                noise=given.noise,
                per_layer=given.per_layer,
            )
        )

    def __enter__(self) -> Gradients:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks off."""
        self._open.close()

    def step(self, number: int) -> float:
        """Leave a step's sum over records in the first lane's weights or optimizer; returns the sum of losses."""
        model = self._lanes[0]
        for copy in self._lanes[1:]:
            copy.follow(model)
        shared = passes(self._lengths(number), model.budget, len(self._lanes))
        with warnings.catch_warnings():
            # The head may read features that need no gradient: its hooks see outputs alone, as Opacus needs.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses = model.lanes.together(lambda lane: self._run(lane, number, shared[lane]), len(shared))
        for lane in range(1, len(shared)):
            self._add(lane)
        return sum(losses)

    def _lengths(self, number: int) -> Index:
        """How much each record of a step takes, in tokens; (records,)."""
        rows = self._steps[number].rows
        if self._contexts is not None and self._contexts.encoded.dim() == 2:  # a vector is left of all of its tokens
            return np.full(len(rows), _VECTOR)
        return self._lanes[0].lengths[rows]

    def _run(self, lane: int, number: int, parts: Sequence[Index]) -> float:
        model, private, step = self._lanes[lane], self._private[lane], self._steps[number]
        fixed = self._contexts
        weights, total = model.on_device(step.weights), 0.0
        for part in parts:
            rows, owners = step.rows[part], torch.from_numpy(step.owners[part])
            if fixed is None:
                context = model.contexts(rows, owners)
            else:
                context = fixed.encoded.index_select(0, model.on_device(fixed.places[number][part]))
            losses = model.losses(context, rows, owners)
            if private is None:
                (losses * weights[model.on_device(part)]).sum().backward()  # type: ignore[no-untyped-call]
            else:
                losses.sum().backward()  # type: ignore[no-untyped-call]
                private.accumulate()
            total += float(losses.detach().nansum())
        return total

    def _add(self, lane: int) -> None:
        """Add a lane's sums to the first one's, and empty them."""
        private, other = self._private[0], self._private[lane]
        if private is not None and other is not None:
            private.take(other)
            return
        for name in self._moving:
            theirs = self._lanes[lane].layers[name].weight
            mine = self._lanes[0].layers[name].weight
            if theirs.grad is not None:
                mine.grad = theirs.grad if mine.grad is None else mine.grad + theirs.grad
                theirs.grad = None


def _forget(model: CohortModel) -> None:
    """Drop what Opacus's hooks keep between a forward and a backward pass, where a pass broke in between."""
    for layer in model.layers.values():
        for name in ("activations", "max_batch_len"):
            layer.__dict__.pop(name, None)
