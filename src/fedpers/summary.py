"""The headline numbers of a run, as they stand in its summary.json."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedpers.config import FAMILIES
from fedpers.experiment import Experiment
from fedpers.privacy.claim import Claim

_RESULT = (
    "metric", "higher_is_better", "metrics", "helped", "tied", "harmed", "p_value", "comparisons", "reading",
)  # fmt: skip


def headline(
    experiment: Experiment, claim: Claim, result: dict[str, Any], history: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """Return the summary; its `seconds` are the one wall time among the files that are compared between runs."""
    return {
        "name": experiment.config.name,
        "task": experiment.config.task.name,
        "method": experiment.config.method,
        "users": len(experiment.examples.users),
        "rounds": len(history),
        "claim": claim.label(),
        **{key: result[key] for key in _RESULT},
        "noise_to_update": _noise_to_update(history),
        "aggregation_error": _median(history, "aggregation_error"),
        "effective_rank": history[-1]["effective_rank"] if history else None,
        "skipped": experiment.federation.counts,
        "nonfinite": sum(row["records_nonfinite"] + row["updates_nonfinite"] for row in history),
        "bytes_up": sum(row["bytes_up"] for row in history),
        "bytes_down": sum(row["bytes_down"] for row in history),
        "seconds": seconds,
    }


def _noise_to_update(history: list[dict[str, Any]]) -> dict[str, float]:
    """Median over rounds of the noise's norm over the noise-free mean update's, per shared family.

    Not for methods whose functions bend what is noised in the steps of records.
    """
    ratios = {
        group: [row[f"noise_{group}"] / row[f"signal_{group}"] for row in history if row[f"signal_{group}"]]
        for group in FAMILIES
    }
    return {group: float(np.median(found)) for group, found in ratios.items() if found}


def _median(history: list[dict[str, Any]], column: str) -> float | None:
    """Median over the rounds that have a value."""
    found = [row[column] for row in history if row[column] is not None]
    return float(np.median(found)) if found else None
