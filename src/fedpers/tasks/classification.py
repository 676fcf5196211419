"""Classification: which label does this user give?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpers.config import TaskConfig
from fedpers.data.base import Federation
from fedpers.errors import ConfigError, DataError
from fedpers.tasks.base import Batch, Examples, Floats, LinearHead, Task, examples_of, where


class ClassificationHead(LinearHead):
    """Scores label k, in the order of `task.labels`, by `scale * <w_k, x> + b_k`."""


class Classification(Task):
    """Given a text, predict the user's label for it, out of the public list `task.labels`."""

    metric = "accuracy"
    default_scale = 4.0
    columns = ("accuracy", "macro_f1", "loss")

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        if len(set(config.labels)) < 2 or len(set(config.labels)) != len(config.labels):
            raise ConfigError("task.labels must list two labels or more, each once; they are public.")

    def prepare(self, federation: Federation, key: bytes) -> Examples:
        """Find targets among the labels. Raises DataError for one that is not there; no label is made of the data."""
        records, examples = examples_of(federation)
        place = {label: number for number, label in enumerate(self.config.labels)}
        if unknown := [number for number, record in enumerate(records) if record.target not in place]:
            raise DataError(
                f"data {federation.source}: the targets of {len(unknown)} records are not among task.labels, the first "
                f"that of {where(records, unknown[0])}; add the label, or mend the data."
            )
        targets = np.array([place[record.target] for record in records], dtype=np.float32)
        return replace(examples, targets=targets)

    def head(self, width: int) -> nn.Module:
        """Return the head; untrained it scores all labels alike."""
        return ClassificationHead(width, len(self.config.labels), self.scale)

    def scores(self, head: nn.Module, contexts: Tensor, batch: Batch) -> Tensor:
        """Scores (rows, labels)."""
        scores: Tensor = head(contexts)
        return scores

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Softmax cross-entropy, per record."""
        return functional.cross_entropy(scores, targets.long(), reduction="none")

    def metrics(self, scores: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """The label with the largest score; where several have it, or it is no number, none (-1), which is wrong."""
        most = scores.max(dim=1, keepdim=True).values
        single = (scores == most).sum(dim=1) == 1
        predicted = torch.where(single, scores.argmax(dim=1), -1)
        return {
            "accuracy": (predicted == targets.long()).float(),
            "predicted": predicted.float(),
            "truth": targets,
            "loss": self.loss(scores, targets),
        }

    def public(self) -> dict[str, object]:
        """The labels, in order."""
        return {"labels": list(self.config.labels)}

    def of_user(self, records: Mapping[str, Floats]) -> dict[str, float]:
        """Accuracy, mean loss, and the F1 score averaged over the labels that the user gave or was predicted to."""
        predicted, truth = records["predicted"], records["truth"]
        found = []
        for label in sorted({*truth, *predicted[predicted >= 0]}):
            right = float(((predicted == label) & (truth == label)).sum())
            found.append(2 * right / float((predicted == label).sum() + (truth == label).sum()))
        return {
            "accuracy": float(records["accuracy"].mean()),
            "macro_f1": float(np.mean(found)),
            "loss": float(records["loss"].mean()),
        }
