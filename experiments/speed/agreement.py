"""Compare what the peers and fedpers compute, before anything is timed; exit code 1 where they differ.

    python experiments/speed/agreement.py --workload FILE [--ray PYTHON] [--pfl PYTHON]

Without noise, for every client: the clipped sums of its first batch, and its weights after an epoch. Without DP the
sums are not clipped, and a difference in them is held against their largest entry where that is above 1. fedpers is its
cohort engine, all clients in one cohort.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from measure import HUGE, Weights, write_sums
from peer_client import MODES
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from workload import Workload, configure, load, order

from fedpers.cohort.batching import Step
from fedpers.cohort.gradients import RecordProtection
from fedpers.cohort.local_training import train_phase
from fedpers.cohort.model import CohortModel
from fedpers.config import TrainConfig
from fedpers.experiment import build_model, prepare
from fedpers.reporting import Reporter

# PyTorch's softmax over 49,152 words is off by 2e-5 of float64 in fp32 where fedpers, in chunks, is off by 2e-6.
TOLERANCE = {"reply": 1e-5, "next": 1e-4}
HERE = Path(__file__).parent


def no_noise(step: int) -> Sequence[Tensor]:
    """Refuse to draw noise."""
    raise AssertionError("noise was drawn")


def of_cohort(model: CohortModel, workload: Workload, steps: Sequence[Step], lr: float, clip: float | None) -> Weights:
    """Train all clients in one cohort; returns their weights (clients, out, in)."""
    lot = float(workload.settings.batch_size)
    protection = RecordProtection(clip, 0.0, lot, no_noise) if clip else None
    weights = model.broadcast(len(workload.clients), workload.start)
    settings = TrainConfig.model_validate({"lr": {"adapter": lr, "head": lr}})
    stats = train_phase(model, weights, ("adapter", "head"), steps, settings, protection=protection)
    if clip:
        print(f"fedpers clips {stats.clipped} of {stats.records} records")
    return {name: value.clone() for name, value in weights.items()}


def write_fedpers(path: Path, source: Path, workload: Workload, private: bool) -> None:
    """Write what the cohort engine computes, in the form of the peers."""
    experiment = prepare(configure(workload.settings.task, workload.settings.layers, len(workload.clients)))
    model, steps = build_model(experiment, Reporter()), order(experiment.config, experiment.examples)
    with safe_open(source, framework="pt") as file:
        rows = file.get_tensor("rows")
    made = torch.cat([torch.from_numpy(s.rows[s.owners == c]) for c in range(len(workload.clients)) for s in steps])
    if not torch.equal(rows, made):
        raise SystemExit("fedpers makes other batches than the file's: write the workload again")
    clip = workload.settings.clip if private else None
    both = [
        of_cohort(model, workload, steps[:1], HUGE, clip),
        of_cohort(model, workload, steps, workload.settings.lr, clip),
    ]
    step, epoch = ([{n: v[c] for n, v in w.items()} for c in range(len(workload.clients))] for w in both)
    write_sums(path, workload, step, epoch, mean=not private)


def peers(args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Yield script, mode and Python of what is to be compared."""
    for mode in args.modes:
        yield "sequential", mode, sys.executable
    if args.ray:
        yield "flower_ray", "hooks", args.ray
    if args.pfl:
        yield "pfl_peer", "none", args.pfl


def difference(ours: Weights, theirs: Weights, part: str) -> tuple[float, float]:
    """Return the largest absolute difference over all clients and arrays, and the largest entry of ours."""
    names = [name for name in ours if name.startswith(part)]
    if set(ours) != set(theirs):
        raise SystemExit("a peer has other arrays")
    return (
        max(float((ours[name] - theirs[name]).abs().max()) for name in names),
        max(float(ours[name].abs().max()) for name in names),
    )


def main() -> None:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--ray", help="Python with flwr[simulation]")
    parser.add_argument("--pfl", help="Python with pfl[pytorch]")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of one client after the other")
    args = parser.parse_args()
    workload, worst = load(args.workload), 0.0
    with tempfile.TemporaryDirectory() as folder:
        ours = {private: Path(folder) / f"fedpers-{private}" for private in (True, False)}
        for private, path in ours.items():
            write_fedpers(path, args.workload, workload, private)
        print(f"{'peer':24s} {'sums: difference':>16s} {'largest':>9s} {'epoch: difference':>17s}")
        for script, mode, python in peers(args):
            path = Path(folder) / f"{script}-{mode}"
            command = [python, str(HERE / f"{script}.py"), "--workload", str(args.workload), "--mode", mode]
            done = subprocess.run([*command, "--threads", "1", "--sums", str(path)], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{script} {mode} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
            reference, found = load_file(ours[mode != "none"]), load_file(path)
            sums, largest = difference(reference, found, "sums.")
            epoch, _ = difference(reference, found, "epoch.")
            print(f"{script + ' ' + mode:24s} {sums:16.1e} {largest:9.2f} {epoch:17.1e}", flush=True)
            worst = max(worst, sums / max(1.0, largest), epoch)
    tolerance = TOLERANCE[workload.settings.task]
    if worst > tolerance:
        raise SystemExit(f"the largest difference is {worst:.1e}, above {tolerance:.0e}")


if __name__ == "__main__":
    main()
