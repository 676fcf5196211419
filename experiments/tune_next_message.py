"""Choose step sizes of next-message language modelling on 12 development users, people outside the federation.

    python experiments/tune_next_message.py

Prints mean loss over these people for each setting; about fifteen minutes on two cores. A step that is right for three
rounds may diverge in five, so what is chosen is tried on five rounds, with the training at home after them.
"""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from fedpers.config import load_config
from fedpers.experiment import Reuse
from fedpers.simulation import simulate

PEOPLE = (
    "data.people=development",
    "data.users=12",
    "data.min_train=20",
    "evaluation.local_only=false",
    "evaluation.every=0",
)


def show(reuse: Reuse, what: str, **changes: Any) -> None:
    """Run one setting in a throw-away directory and print it."""
    settings = [*PEOPLE, *(f"{key}={value}" for key, value in changes.items())]
    with tempfile.TemporaryDirectory() as folder:
        summary = simulate(
            load_config("configs/next_message.yaml", settings), Path(folder) / "run", reuse=reuse
        ).summary
    means = "  ".join(f"{kind} {found['mean']:.4f}" for kind, found in summary["metrics"].items())
    print(f"{what:58s}", means, flush=True)


def main() -> None:
    """The shared part on three rounds, then five rounds and what is trained at home."""
    reuse = Reuse()
    for adapter, head in product((0.1, 0.3, 1.0), (0.03, 0.3)):
        rates = {"local.lr.adapter": adapter, "local.lr.head": head}
        show(reuse, f"3 rounds: adapter {adapter} head {head}", method="fedavg", rounds=3, **rates)
    for shared, (adapter, head) in product((0.3, 1.0), ((0.1, 0.03), (0.3, 0.03), (0.3, 0.1))):
        rates = {"local.lr.adapter": shared, "local.lr.head": 0.1}
        rates |= {"personal.lr.adapter": adapter, "personal.lr.head": head}
        show(reuse, f"5 rounds: adapter {shared}; at home adapter {adapter} head {head}", rounds=5, **rates)


if __name__ == "__main__":
    main()
