"""Choose step sizes, pull and clip for ratings on development users: people outside the federation.

    python experiments/tune_ratings.py [--data movielens] [--members 830]

Prints mean RMSE over the development users for each setting, the shared head alone. The noise of the user-level part is
scaled so that its size beside the mean update is what a federation of so many members at epsilon 8 would meet.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from fedpers.config import parse_config
from fedpers.experiment import Reuse
from fedpers.privacy.calibration import calibrate
from fedpers.simulation import simulate

DELTA, ROUNDS = 1e-5, 10


def measure(data: str, reuse: Reuse, **changes: Any) -> dict[str, float]:
    """Run one setting in a throw-away directory; returns mean RMSE per model kind, and users."""
    tree = {
        "data": {"name": data, "people": "development", "max_train": 60, "max_test": 40, "max_tokens": 32},
        "task": {"name": "rating", "low": -4, "high": 4} if data == "vader" else {"name": "rating"},
        "share": "head",
        "rounds": ROUNDS,
        "evaluation": {"every": 0, "local_only": False},
        **changes,
    }
    with tempfile.TemporaryDirectory() as folder:
        summary = simulate(parse_config(tree), Path(folder) / "run", reuse=reuse).summary
    return {kind: found["mean"] for kind, found in summary["metrics"].items()} | {"users": summary["users"]}


def show(what: str, found: dict[str, float]) -> None:
    """Print one setting."""
    print(f"{what:58s}", "  ".join(f"{kind} {value:.4f}" for kind, value in found.items()), flush=True)


def main() -> None:
    """Search part by part: what is shared, what is tuned at home after it, then the clip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="movielens", choices=("movielens", "vader"))
    parser.add_argument("--members", type=int, default=830, help="of the federation whose noise is rehearsed")
    asked = parser.parse_args()
    reuse, users = Reuse(), 0.0
    shared: dict[float, float] = {}
    for epochs, lr in product((1, 3), (0.01, 0.03, 0.1, 0.3)):
        local = {"epochs": epochs, "lr": {"head": lr}}
        found = measure(asked.data, reuse, method="fedavg", local=local)
        shared[found["global"]], users = lr, found["users"]
        show(f"shared head: epochs={epochs} lr.head={lr}", found)
    local = {"epochs": 3, "lr": {"head": shared[min(shared)]}}
    for epochs, lr, l2 in product((5, 15), (0.003, 0.01, 0.03, 0.1), (0.03, 0.3, 3.0)):
        personal = {"epochs": epochs, "l2": l2, "lr": {"head": lr}}
        found = measure(asked.data, reuse, method="fedavg-finetune", local=local, personal=personal)
        show(f"at home after it: epochs={epochs} lr.head={lr} l2={l2}", found)
    noise = calibrate(8, DELTA, 1.0, ROUNDS) * users / asked.members
    for clip in (0.1, 0.3, 1.0, 3.0):
        privacy = {"unit": "user", "noise_multiplier": noise, "delta": DELTA, "clip": clip}
        runs = [measure(asked.data, reuse, method="fedavg", local=local, privacy=privacy) for _ in range(3)]
        mean = {kind: float(np.mean([run[kind] for run in runs])) for kind in runs[0]}
        show(f"shared head, user level, 3 secrets: clip={clip}", mean)


if __name__ == "__main__":
    main()
