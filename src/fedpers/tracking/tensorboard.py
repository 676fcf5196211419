"""TensorBoard's event files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from fedpers.tracking.base import optional


class Place:
    """Writes one folder of events: `tensorboard --logdir RUN/tracking`."""

    name = "tensorboard"

    def __init__(self) -> None:
        optional("tensorboard", self.name)
        self._board = optional("torch.utils.tensorboard", self.name)

    def start(self, run: str, config: Mapping[str, str], folder: Path) -> int:
        """Begin anew: event files cannot be continued without showing a round twice."""
        shutil.rmtree(folder)
        self._writer = self._board.SummaryWriter(str(folder))
        lines = "\n".join(f"    {key}: {value}" for key, value in config.items())  # indented: shown as it stands
        self._writer.add_text("configuration", f"{run}\n\n{lines}")
        return 0

    def round(self, number: int, numbers: Mapping[str, float]) -> None:
        """Write a point of each curve."""
        for name, value in numbers.items():
            self._writer.add_scalar(f"round/{name}", value, number)
        self._writer.flush()

    def finish(self, numbers: Mapping[str, float], claim: str) -> None:
        """Write each result as a curve of one point, and the claim as a text."""
        for name, value in numbers.items():
            self._writer.add_scalar(f"result/{name}", value, int(numbers["rounds"]))
        self._writer.add_text("claim", claim)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
