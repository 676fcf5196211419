"""Time fedpers and its peers in turns, A B C A B C, and write a table, its JSON and a figure.

    python experiments/speed/run.py OUT [--ray PYTHON] [--pfl PYTHON] [--layers 2 6] [--repeats 2] [--threads 2]

OUT is a private folder: the workloads in it hold real people's texts as token ids. Every process runs one round to
warm up and one that is timed. A peer without its Python is left out and named. The table goes to OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from figure import draw
from workload import Workload, load

HERE = Path(__file__).parent
ROUNDS = 10  # of a simulation, over which what is computed once is spread
WIDTH = 384  # of MiniLM
Found = Mapping[str, Any]


def contestants(args: argparse.Namespace) -> Iterator[tuple[str, str, list[str]]]:
    """Yield name, kind of protection and command of everything that is timed."""
    two = ["--threads", str(args.threads)]
    for kind, mode, theirs in (("dp", "dp", "hooks"), ("none", "none", "none")):
        yield "fedpers", kind, [sys.executable, "fedpers_peer.py", "--mode", mode, *two]
        yield "one process", kind, [sys.executable, "sequential.py", "--mode", theirs, *two]
    if args.ray:  # one thread in each of as many actors was faster than the other way round
        yield "Flower on Ray", "dp", [args.ray, "flower_ray.py", "--mode", "hooks", "--threads", "1"]
    if args.pfl:
        yield "pfl", "none", [args.pfl, "pfl_peer.py", *two]


def time_all(args: argparse.Namespace, layers: int, workload: Path) -> dict[tuple[str, str], list[Found]]:
    """Run everything in turns; returns what each wrote."""
    found: dict[tuple[str, str], list[Found]] = defaultdict(list)
    for turn in range(args.repeats):
        for name, kind, (python, script, *options) in contestants(args):
            out = args.out / f"{layers}-{name.replace(' ', '-')}-{kind}-{turn}.json"
            if not out.exists():  # so that an interrupted comparison goes on
                command = [python, str(HERE / script), "--workload", str(workload), "--out", str(out), *options]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found[name, kind].append(json.loads(out.read_text(encoding="utf-8")))
            print(f"{layers} layers, turn {turn + 1}: {name} ({kind}) {found[name, kind][-1]['rounds']}", flush=True)
    return found


def product_rate(threads: int, rows: int = 2048, seconds: float = 2.0) -> float:
    """Return the FLOP a second of this machine's fp32 products with MiniLM's widest layer, best of many."""
    torch.set_num_threads(threads)
    x, weight = torch.randn(rows, WIDTH), torch.randn(4 * WIDTH, WIDTH)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - began)
    return 2 * rows * WIDTH * 4 * WIDTH / best


def necessary(workload: Workload) -> float:
    """Return the FLOP of a round's products with frozen weights over real tokens alone.

    A block has 12 d^2 of them (query, key, value, output, and 4 d each way). Forward through the adapted blocks, and
    backward through all of them, but in the lowest not into its query, key and value.
    """
    tokens = sum(int(batch.mask.sum()) for batches in workload.clients for batch in batches)
    forward, backward = 12 * workload.settings.layers, 12 * workload.settings.layers - 3
    return 2.0 * tokens * (forward + backward) * WIDTH**2


def rows_of(found: Mapping[tuple[str, str], Sequence[Found]]) -> list[dict[str, Any]]:
    """Return a row for each contestant: medians, and ratios to fedpers over a simulation of ROUNDS rounds."""

    def median(runs: Sequence[Found], key: str) -> float:
        return statistics.median(run[key][0] if isinstance(run[key], list) else run[key] for run in runs)

    rows = []
    for (name, kind), runs in found.items():
        ours = found["fedpers", kind]
        fill = [run.get("fill", 0.0) for run in runs]
        ratios = [
            (theirs.get("fill", 0.0) + ROUNDS * theirs["rounds"][0]) / (mine["fill"] + ROUNDS * mine["rounds"][0])
            for theirs, mine in zip(runs, ours, strict=True)
        ]
        rows.append(
            {
                "name": name, "kind": kind, "seconds": median(runs, "rounds"), "cpu": median(runs, "cpu_rounds"),
                "fill": statistics.median(fill), "peak": median(runs, "peak_bytes"),
                "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
            }
        )  # fmt: skip
    return rows


def table(layers: int, rows: Sequence[Mapping[str, Any]], work: float, rate: float) -> str:
    """Return a table in Markdown."""
    lines = [
        f"**Adapters in the top {layers} of 6 layers**; products {rate / 1e9:.0f} GFLOP/s at best.",
        "",
        "| | DP | s a round | CPU s | once, s | peak MB | "
        f"over {ROUNDS} rounds fedpers is faster by | of the best rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda one: (one["kind"], one["ratio"])):
        faster = "" if row["name"] == "fedpers" else f"{row['ratio']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
        share = f"{100 * work / row['seconds'] / rate:.0f}%"
        cells = [
            row["name"],
            {"dp": "per record"}.get(row["kind"], "none"),
            f"{row['seconds']:.1f}",
            f"{row['cpu']:.1f}",
        ]
        cells += [f"{row['fill']:.1f}", f"{row['peak'] / 1e6:.0f}", faster, share]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Time, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ray", help="Python with flwr[simulation]; see README.md beside this file")
    parser.add_argument("--pfl", help="Python with pfl[pytorch]")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True, mode=0o700)
    for missing in (name for name in ("ray", "pfl") if not getattr(args, name)):
        print(f"--{missing} is not given: that peer is left out")
    texts, drawn = [], {}
    for layers in args.layers:
        path = args.out / f"workload-{layers}"
        if not path.exists():
            command = [sys.executable, str(HERE / "workload.py"), str(path), "--layers", str(layers)]
            subprocess.run(command, check=True)
        rate = product_rate(args.threads)
        drawn[layers] = rows_of(time_all(args, layers, path))
        texts.append(table(layers, drawn[layers], necessary(load(path)), max(rate, product_rate(args.threads))))
    (args.out / "table.md").write_text("\n".join(texts), encoding="utf-8")
    (args.out / "table.json").write_text(json.dumps(drawn, indent=2) + "\n", encoding="utf-8")
    draw(drawn, args.out / "speed.png")
    print("\n".join(texts))


if __name__ == "__main__":
    main()
