"""A cohort model's arrays as files that PEFT reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpers.cohort.layout import Layout
from fedpers.cohort.model import CohortModel
from fedpers.models import adapters
from fedpers.models.array_names import GATE, group_of
from fedpers.models.backbone import public_name


def save_versions(
    model: CohortModel, layout: Layout, directory: Path, shared: Mapping[str, NDArray[np.float32]]
) -> None:
    """Write the shared arrays as `save_shared` does and, where there are several models, each one beside them."""
    save_shared(model, directory, layout.common(shared))
    for version in range(layout.clusters):
        save_shared(model, directory.with_name(f"cluster{version}"), layout.version(shared, version))


def save_shared(model: CohortModel, directory: Path, arrays: Mapping[str, NDArray[np.float32]]) -> None:
    """Write arrays as standard PEFT files with the head beside them.

    Where some factors of the first adapter are given, the others are written at their public initial values, or
    PEFT could not load them.
    """
    if any(group_of(name) in {"A", "B"} for name in arrays):
        arrays = {**{name: first.numpy() for name, first in model.initial_of(["adapter"]).items()}, **arrays}
    description = {
        "task": type(model.task).__name__,
        "backbone": public_name(model.backbone.name),
        "pooling": model.task.reads,
        "apply": (model.head.__doc__ or "").strip().partition("\n")[0],
        "scale": model.task.scale,
        **model.task.public(),
    }
    if GATE in arrays:
        description["link"] = model.link
    inner = str(model.backbone.model.base_model_prefix) if model.task.causal else ""
    adapters.save(directory, arrays, model.lora, description, inner)
