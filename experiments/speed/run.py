"""Time fedpers and its peers in turns, A B C A B C, and write a table, its JSON and a figure.

    python experiments/speed/run.py OUT [--ray PYTHON] [--pfl PYTHON] [--workloads 1 2 3] [--repeats 2] [--threads 2]

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figure import draw
from workload import IGNORED, Workload, load

HERE = Path(__file__).parent
ROUNDS = 10  # of a simulation, over which what is computed once is spread
Found = Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """What the workload file is made of, and what its products with frozen weights are."""

    task: str
    layers: int  # with an adapter
    users: int
    title: str
    width: int
    into: int  # weights of query, key and value of one block
    rest: int  # weights of its other products
    words: int = 0  # of the vocabulary, where there is one to predict


MINILM = {"width": 384, "into": 3 * 384**2, "rest": 9 * 384**2}
SMOLLM = {"width": 576, "into": 576 * (576 + 2 * 192), "rest": 576 * (576 + 3 * 1536), "words": 49_152}
WORKLOADS = {
    1: Size("reply", 2, 64, "MiniLM ranks replies, adapters in the top 2 of 6 layers, 64 people", **MINILM),
    2: Size("reply", 6, 64, "MiniLM ranks replies, adapters in all 6 layers, 64 people", **MINILM),
    3: Size(
        "next", 1, 4, "SmolLM2-135M writes the next message, adapters in the top 1 of 30 layers, 4 people", **SMOLLM
    ),
}


def contestants(args: argparse.Namespace, number: int) -> Iterator[tuple[str, str, list[str]]]:
    """Yield name, kind of protection and command of everything that is timed."""
    two = ["--threads", str(args.threads)]
    for kind, mode, theirs in (("dp", "dp", "hooks"), ("none", "none", "none")):
        yield "fedpers", kind, [sys.executable, "fedpers_peer.py", "--mode", mode, *two]
        yield "one process", kind, [sys.executable, "sequential.py", "--mode", theirs, *two]
    if args.ray:  # one thread in each of as many actors was faster than the other way round
        yield "Flower on Ray", "dp", [args.ray, "flower_ray.py", "--mode", "hooks", "--threads", "1"]
    if args.pfl and number == 1:  # it evaluates everybody before its first round, which takes minutes
        yield "pfl", "none", [args.pfl, "pfl_peer.py", *two]


def time_all(args: argparse.Namespace, number: int, workload: Path) -> dict[tuple[str, str], list[Found]]:
    """Run everything in turns; returns what each wrote."""
    found: dict[tuple[str, str], list[Found]] = defaultdict(list)
    for turn in range(args.repeats):
        for name, kind, (python, script, *options) in contestants(args, number):
            out = args.out / f"{number}-{name.replace(' ', '-')}-{kind}-{turn}.json"
            if not out.exists():  # so that an interrupted comparison goes on
                command = [python, str(HERE / script), "--workload", str(workload), "--out", str(out), *options]
                with out.with_suffix(".log").open("w", encoding="utf-8") as log:  # Flower and Ray say much
                    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=log)
            found[name, kind].append(json.loads(out.read_text(encoding="utf-8")))
            seconds = found[name, kind][-1]["rounds"]
            print(f"workload {number}, turn {turn + 1}: {name} ({kind}) {seconds}", flush=True)
    return found


def product_rate(threads: int, width: int, rows: int = 2048, seconds: float = 4.0) -> float:
    """Return the FLOP a second of this machine's fp32 products with a block's widest layer.

    Products on all threads go on beside each other, one on each, as was never slower than one on all of them.
    """
    torch.set_num_threads(1)
    flop = 2 * rows * width * 4 * width

    def one(_: int) -> float:
        torch.set_num_threads(1)
        x, weight = torch.randn(rows, width), torch.randn(4 * width, width)
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            for _ in range(5):
                torch.nn.functional.linear(x, weight)
            best = min(best, (time.perf_counter() - began) / 5)
        return flop / best

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(one, range(threads)))


def necessary(workload: Workload, size: Size) -> float:
    """Return the FLOP of a round's products with frozen weights over real tokens alone.

    Forward through the adapted blocks, and backward through all of them, but in the lowest not into its query, key and
    value. Of a language model also the scores of all words for each token to predict, and their gradient.
    """
    batches = [batch for client in workload.clients for batch in client]
    tokens = sum(int(batch.mask.sum()) for batch in batches)
    predicted = sum(int((batch.targets != IGNORED).sum()) for batch in batches) if size.words else 0
    blocks = 2 * size.layers * (size.into + size.rest) - size.into
    return 2.0 * (tokens * blocks + 2 * predicted * size.words * size.width)


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


def table(size: Size, rows: Sequence[Mapping[str, Any]], work: float, rate: float) -> str:
    """Return a table in Markdown."""
    lines = [
        f"**{size.title}**: {work / 1e12:.2f} TFLOP of necessary products; products at best {rate / 1e9:.0f} GFLOP/s.",
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
    parser.add_argument("--workloads", type=int, nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True, mode=0o700)
    for missing in (name for name in ("ray", "pfl") if not getattr(args, name)):
        print(f"--{missing} is not given: that peer is left out")
    texts, drawn = [], {}
    for number in args.workloads:
        size, path = WORKLOADS[number], args.out / f"workload-{number}"
        if not path.exists():
            options = ["--task", size.task, "--layers", str(size.layers), "--users", str(size.users)]
            subprocess.run([sys.executable, str(HERE / "workload.py"), str(path), *options], check=True)
        rate = product_rate(args.threads, size.width)
        drawn[size.title] = rows_of(time_all(args, number, path))
        rate = max(rate, product_rate(args.threads, size.width))
        texts.append(table(size, drawn[size.title], necessary(load(path), size), rate))
    (args.out / "table.md").write_text("\n".join(texts), encoding="utf-8")
    (args.out / "table.json").write_text(json.dumps(drawn, indent=2) + "\n", encoding="utf-8")
    draw(drawn, args.out / "speed.png")
    print("\n".join(texts))


if __name__ == "__main__":
    main()
