"""Choose step sizes, pull and clip on the development users: people outside the federation and the public pool.

    python experiments/tune_chitchat.py [--adapter]

Prints mean accuracy over the 41 development users for each setting. The noise of the user-level part is scaled so that
its size beside the mean update is what 228 users at epsilon 8 would meet. With --adapter the step size of the adapter
is searched too (about ten minutes); without it all contexts are encoded once and the search takes two or three.
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
from fedpers.privacy.accounting import GaussianEvent, epsilon
from fedpers.privacy.calibration import calibrate
from fedpers.simulation import simulate

FEDERATION, DEVELOPMENT = 228, 41  # users
DELTA, ROUNDS = 1e-5, 10
PERSONAL = {"epochs": 10, "l2": 0.5, "lr": {"head": 0.01}}


def measure(reuse: Reuse, **changes: Any) -> dict[str, float]:
    """Run one setting in a throw-away directory; returns mean accuracy per model kind and the noise ratio."""
    tree = {
        "data": {"people": "development"},
        "share": "head",
        "evaluation": {"every": 0, "local_only": False},
        **changes,
    }
    with tempfile.TemporaryDirectory() as folder:
        summary = simulate(parse_config(tree), Path(folder) / "run", reuse=reuse).summary
    means = {kind: found["mean"] for kind, found in summary["metrics"].items()}
    return means | {"noise/update": summary["noise_to_update"].get("head", float("nan"))}


def show(what: str, found: dict[str, float]) -> None:
    """Print one setting."""
    print(f"{what:58s}", "  ".join(f"{kind} {value:.3f}" for kind, value in found.items()), flush=True)


def main() -> None:
    """Search part by part: what is trained at home, what is shared, then the clip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", action="store_true", help="also search the adapter's step size")
    adapter = parser.parse_args().adapter
    reuse = Reuse()
    for epochs, lr, l2 in product((5, 15), (0.001, 0.003, 0.01, 0.03), (0.01, 0.3, 3.0)):
        personal = {"epochs": epochs, "l2": l2, "lr": {"head": lr}}
        show(f"at home: epochs={epochs} lr.head={lr} l2={l2}", measure(reuse, method="local", personal=personal))
    for epochs, lr in product((1, 3), (0.003, 0.01, 0.03)):
        local = {"epochs": epochs, "lr": {"head": lr}}
        show(
            f"shared head: epochs={epochs} lr.head={lr}", measure(reuse, rounds=ROUNDS, local=local, personal=PERSONAL)
        )
    scaled = calibrate(8, DELTA, 1.0, ROUNDS) * DEVELOPMENT / FEDERATION
    target = epsilon([GaussianEvent(scaled, 1.0, ROUNDS)], DELTA)
    for clip, epochs in product((0.03, 0.1, 0.3), (1, 3)):
        local = {"epochs": epochs, "lr": {"head": 0.01}}
        privacy = {"unit": "user", "epsilon": target, "delta": DELTA, "clip": clip}
        runs = [measure(reuse, rounds=ROUNDS, local=local, personal=PERSONAL, privacy=privacy) for _ in range(3)]
        mean = {kind: float(np.mean([run[kind] for run in runs])) for kind in runs[0]}
        show(f"shared head, user level, 3 secrets: clip={clip} epochs={epochs}", mean)
    for lr in (0.01, 0.03, 0.1, 0.3) if adapter else ():
        local = {"lr": {"head": 0.01, "adapter": lr}}
        found = measure(reuse, share="adapter+head", rounds=6, local=local, personal=PERSONAL)
        show(f"shared adapter and head: lr.adapter={lr}", found)


if __name__ == "__main__":
    main()
