"""Where a run's numbers go besides its own files: optional, one file for each place, installed apart."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fedpers.errors import TrackingError

NAMES = ("csv", "mlflow", "tensorboard", "wandb")


def check_names(names: Iterable[str]) -> None:
    """Raise TrackingError for a name that is no tracker's, with the nearest one."""
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TrackingError(f"tracker {name!r}: unknown; {hint}known: {', '.join(NAMES)}.")
