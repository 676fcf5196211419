"""What all peers have in common: their command line, their clock, what they write, and what is compared."""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor
from workload import Workload

HUGE = 2.0**12  # step size of what is compared: the step dwarfs the rounding of the weights that it is added to
Weights = Mapping[str, Tensor]


def parse(about: str | None, modes: Sequence[str], threads: int = 2, precision: bool = False) -> argparse.Namespace:
    """Read the command line that all peers share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, required=True, help="the file that workload.py wrote")
    parser.add_argument("--rounds", type=int, default=1, help="timed rounds, after one that warms up")
    parser.add_argument("--out", type=Path, help="JSON with seconds and memory")
    parser.add_argument("--sums", type=Path, help="compare instead of timing: safetensors for agreement.py")
    parser.add_argument("--mode", choices=modes, default=modes[0])
    parser.add_argument("--threads", type=int, default=threads, help="of a training process")
    if precision:
        parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    if not (args.out or args.sums):
        parser.error("one of --out and --sums is needed")
    args.workload = args.workload.resolve()
    torch.set_num_threads(args.threads)
    return args


def alive() -> list[psutil.Process]:
    """Return this process and all that it started."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def total(read: Callable[[psutil.Process], float]) -> float:
    """Add up a number over this process and all that it started."""
    found = 0.0
    for process in alive():
        try:
            found += read(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended between being listed and being looked at
    return found


def cpu_seconds() -> float:
    """Return the seconds of CPU that this process and its children have used: they vary less on a busy machine."""
    return total(lambda process: sum(process.cpu_times()[:2]))


@dataclass
class Clock:
    """Marks the ends of rounds and watches the memory of this process and its children; a context manager."""

    marks: list[tuple[float, float]] = field(default_factory=lambda: [(time.perf_counter(), cpu_seconds())])
    peak: float = 0.0  # bytes, shared pages divided among their users (PSS), looked at once a second

    def __enter__(self) -> Clock:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def mark(self) -> None:
        """A round ends here; the first mark is the end of preparation."""
        self.marks.append((time.perf_counter(), cpu_seconds()))

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self.peak = max(self.peak, total(lambda process: process.memory_full_info().pss))

    def write(self, args: argparse.Namespace, peer: str, more: Mapping[str, object] | None = None) -> None:
        """Write the JSON; seconds of preparation, of the first round, and of each timed one, and what else there is."""
        wall, cpu = (np.diff(marks).tolist() for marks in zip(*self.marks, strict=True))
        found = {
            "peer": peer, "mode": args.mode, "threads": args.threads, "rounds": wall[2:], "cpu_rounds": cpu[2:],
            "warm_up": wall[1], "start": wall[0], "peak_bytes": int(self.peak), "torch": version("torch"),
            **(more or {}),
        }  # fmt: skip
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(found))


def write_sums(path: Path, workload: Workload, step: Sequence[Weights], epoch: Sequence[Weights], mean: bool) -> None:
    """Write what is compared, (clients, out, in) by name.

    Args:
        path: where.
        workload: what was run.
        step: each client's weights after its first batch with step size HUGE on the mean and no noise.
        epoch: each client's weights after one epoch with the workload's step size and no noise.
        mean: whether a batch was divided by its own size, not by the workload's batch size.
    """
    size = workload.settings.batch_size
    divisors = torch.tensor([len(batches[0].targets) if mean else size for batches in workload.clients])
    arrays = {}
    for name, first in workload.start.items():
        moved = first - torch.stack([weights[name] for weights in step])
        arrays[f"sums.{name}"] = moved * divisors[:, None, None] / HUGE
        arrays[f"epoch.{name}"] = torch.stack([weights[name] for weights in epoch])
    save_file(arrays, path)
