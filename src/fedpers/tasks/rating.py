"""Rating: which number does this user give?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from fedpers.config import TaskConfig
from fedpers.data.base import Federation
from fedpers.errors import ConfigError, DataError
from fedpers.tasks.base import Batch, Examples, Floats, LinearHead, Task, examples_of, where


class RatingHead(LinearHead):
    """Predicts `middle + spread * (scale * <w, x> + b)`, with middle and spread those of `task.low` and `task.high`."""


class Rating(Task):
    """Given a text, predict the number that the user gave it, on a public scale (`task.low` to `task.high`)."""

    metric = "rmse"
    default_scale = 4.0
    higher_is_better = False
    columns = ("rmse", "mae", "loss")

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        if not config.low < config.high:
            raise ConfigError(f"task.low = {config.low:g} is not below task.high = {config.high:g}.")
        self.middle, self.spread = (config.low + config.high) / 2, (config.high - config.low) / 2

    def prepare(self, federation: Federation, key: bytes) -> Examples:
        """Read targets as numbers.

        Raises DataError for a target that is no number, or outside of the scale.
        """
        records, examples = examples_of(federation)
        targets = np.empty(len(records), dtype=np.float32)
        for place, record in enumerate(records):
            try:
                targets[place] = float(record.target)
            except ValueError:
                targets[place] = np.nan
            if not self.config.low <= targets[place] <= self.config.high:
                raise DataError(
                    f"data {federation.source}: the target of {where(records, place)} is no number from "
                    f"{self.config.low:g} to {self.config.high:g}; mend the data, or set task.low and task.high."
                )
        return replace(examples, targets=targets)

    def head(self, width: int) -> nn.Module:
        """Return the rating head; untrained it says the middle of the scale."""
        return RatingHead(width, 1, self.scale)

    def scores(self, head: nn.Module, contexts: Tensor, batch: Batch) -> Tensor:
        """Predictions (rows, 1), in units of the spread around the middle."""
        scores: Tensor = head(contexts)
        return scores

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Half the squared error, in units of the spread, per record."""
        return 0.5 * (scores[:, 0] - (targets.to(scores.dtype) - self.middle) / self.spread).square()

    def metrics(self, scores: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Squared and absolute error of the prediction, which is cut to the scale."""
        predicted = self.middle + self.spread * scores[:, 0].clamp(-1, 1)
        error = predicted - targets
        return {"squared": error.square(), "mae": error.abs(), "loss": self.loss(scores, targets)}

    def public(self) -> dict[str, object]:
        """The scale."""
        return {"low": self.config.low, "high": self.config.high}

    def of_user(self, records: Mapping[str, Floats]) -> dict[str, float]:
        """Root mean squared error of the user's records, mean absolute error, mean loss."""
        return {
            "rmse": float(np.sqrt(records["squared"].mean())),
            "mae": float(records["mae"].mean()),
            "loss": float(records["loss"].mean()),
        }
