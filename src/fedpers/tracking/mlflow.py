"""MLflow: a store of files in the run directory, or the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from fedpers.tracking.base import optional

EXPERIMENT = "fedpers"


class Place:
    """One MLflow run. Its id is kept in the folder, so that a resumed run continues it."""

    name = "mlflow"

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # from 3.13 on it has to be asked for
        self._entities = optional("mlflow.entities", self.name)
        self._tracking = optional("mlflow.tracking", self.name)

    def start(self, run: str, config: Mapping[str, str], folder: Path) -> int:
        """Create the run, or find it again."""
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "store").resolve().as_uri()
        self._client, remembered, self._done = self._tracking.MlflowClient(uri), folder / "run_id", False
        if remembered.exists():
            self._run = remembered.read_text(encoding="utf-8")
            self._client.update_run(self._run, status="RUNNING")
            return max((point.step for point in self._client.get_metric_history(self._run, "round")), default=0)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        known = self._client.get_experiment_by_name(name)
        place = self._client.create_experiment(name) if known is None else known.experiment_id
        self._run = self._client.create_run(place, run_name=run).info.run_id  # not `mlflow.start_run`: that notes paths
        for key, value in config.items():
            self._client.log_param(self._run, key, value)
        remembered.write_text(self._run, encoding="utf-8")
        return 0

    def round(self, number: int, numbers: Mapping[str, float]) -> None:
        """Log the round, its number last: where that is missing, the round is logged again."""
        self._log({**numbers, "round": number}, number)

    def finish(self, numbers: Mapping[str, float], claim: str) -> None:
        """Log the results under names of their own, and the claim as a tag."""
        self._log({f"result/{name}": value for name, value in numbers.items()}, int(numbers["rounds"]))
        self._client.set_tag(self._run, "claim", claim)
        self._done = True

    def close(self) -> None:
        """Say how it ended."""
        self._client.set_terminated(self._run, "FINISHED" if self._done else "KILLED")

    def _log(self, numbers: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        points = [self._entities.Metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._run, metrics=points)
