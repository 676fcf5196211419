"""How cost grows: with clients in a round, records of a client, adapted layers, and registered users.

    python experiments/speed/scaling.py OUT [--threads 2]

Made-up people whose records are made when they are needed, MiniLM with LoRA of rank 8 on query and value, clipping and
noise for each record. Every point is a process of its own, so its peak of memory is its own. Writes OUT/scaling.md,
.json, .png and .svg.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BASE = {"clients": 64, "records": 8, "layers": 2, "users": 10_000}
CURVES: dict[str, tuple[int, ...]] = {
    "clients": (64, 256, 1024, 4096),
    "records": (4, 8, 16, 32, 64),
    "layers": (1, 2, 3, 4, 5, 6),
    "users": (1_000, 10_000, 100_000, 1_000_000),
}
LABELS = {
    "clients": "clients in a round",
    "records": "training records of a client",
    "layers": "adapted layers of 6",
    "users": "registered users",
}


def measure(clients: int, records: int, layers: int, users: int, threads: int) -> dict[str, float]:
    """Run one round of so many clients; returns seconds and peak of memory in bytes."""
    from fedpers.cohort.clients import Clients
    from fedpers.cohort.layout import layout
    from fedpers.cohort.personal_store import PersonalStore
    from fedpers.config import load_config
    from fedpers.experiment import build_model, prepare
    from fedpers.population import sample
    from fedpers.privacy.randomness import seed_key
    from fedpers.reporting import Reporter

    changes = [
        "method=fedavg", "share=adapter+head", "data.name=synthetic", "data.lazy=true", f"data.users={users}",
        f"data.min_train={records}", f"data.max_train={records}", "data.min_test=2", "data.max_test=2",
        f"model.adapter={{layers: {layers}, rank: 8, alpha: 16}}", "evaluation={users: 2, local_only: false}",
        f"client_rate={clients / users}", f"engine.threads={threads}",
        "privacy={unit: record, clip: 1.0, noise_multiplier: 1.0, delta: 1.0e-9}",
    ]  # fmt: skip
    config = load_config(None, changes)
    experiment = prepare(config)
    model = build_model(experiment, Reporter())
    with tempfile.TemporaryDirectory() as folder:
        store = PersonalStore(Path(folder), users, layout(config, experiment.plan, model).kept())
        who = Clients(config, experiment.plan, experiment.guarantee, model, store, seed_key(0))
        shared = who.layout.broadcast()
        asked = {turn: sample(users, clients, seed_key(turn)) for turn in (1, 2)}
        marks = [time.perf_counter()]
        for number, people in asked.items():  # the first warms up
            few = people if number == 2 else people[: min(64, clients)]
            marks.append(time.perf_counter())
            model.present(few)
            marks.append(time.perf_counter())
            who.train_round(number, few, shared)
            marks.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"present": marks[-2] - marks[-3], "train": marks[-1] - marks[-2], "peak": peak}


def table(found: dict[str, dict[int, dict[str, float]]]) -> str:
    """Return the points as tables in Markdown."""
    lines = []
    for what, points in found.items():
        lines += [
            f"| {LABELS[what]} | records made and frozen layers, s | training, s | peak MB |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {value:,} | {one['present']:.1f} | {one['train']:.1f} | {one['peak'] / 1e6:.0f} |"
            for value, one in points.items()
        ]
        lines.append("")
    return "\n".join(lines)


def draw(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Draw seconds and memory of all curves."""
    from fedpers.figures.style import BLUE, GREY, new_figure, save, style, title

    with style():
        fig = new_figure(7.2, 5.4)
        for place, (ax, (what, points)) in enumerate(zip(fig.subplots(2, 2).flat, found.items(), strict=True)):
            seconds = [one["present"] + one["train"] for one in points.values()]
            ax.plot(list(points), seconds, "o-", color=BLUE, label="seconds")
            ax.plot(list(points), [one["peak"] / 1e9 for one in points.values()], "s--", color=GREY, label="peak, GB")
            ax.set_xlabel(LABELS[what])
            if what != "layers":
                ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xticks(list(points), [f"{value:,}" for value in points], minor=False)
            ax.set_ylim(0.5, 500)
            ax.set_yticks([1, 10, 100], ["1", "10", "100"])
            ax.minorticks_off()
            if place == 0:
                ax.legend(loc="upper left")
        title(fig, "Cost of one round")
        save(fig, path.parent, path.stem)


def main() -> None:
    """Measure all points, or one in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        args.out.write_text(json.dumps(measure(**args.point, threads=args.threads)), encoding="utf-8")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for what, values in CURVES.items():
        found[what] = {}
        for value in values:
            point: dict[str, Any] = {**BASE, what: value}
            point["users"] = max(point["users"], 2 * point["clients"])
            path = args.out / f"{'-'.join(str(point[key]) for key in BASE)}.json"
            if not path.exists():
                options = ["--threads", str(args.threads), "--point", json.dumps(point)]
                subprocess.run([sys.executable, __file__, str(path), *options], check=True)
            found[what][value] = json.loads(path.read_text(encoding="utf-8"))
            print(what, value, found[what][value], flush=True)
    (args.out / "scaling.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (args.out / "scaling.md").write_text(table(found), encoding="utf-8")
    draw(found, args.out / "scaling.png")


if __name__ == "__main__":
    main()
