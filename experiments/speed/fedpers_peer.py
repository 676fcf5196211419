"""fedpers on the same batches: its cohort engine, each client with its own noise, and the mean over clients.

    python experiments/speed/fedpers_peer.py --workload FILE --out JSON [--mode dp|none] [--rounds N] [--precision fp32]

What is frozen below the lowest adapter is computed once in a simulation, and its seconds stand in the JSON as `fill`.
Candidates are embedded before, as for the peers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from measure import Clock, Weights, parse
from torch import Tensor
from workload import Workload, configure, load, order

from fedpers.cohort.batching import Step
from fedpers.cohort.gradients import RecordProtection
from fedpers.cohort.lanes import Lanes
from fedpers.cohort.local_training import train_phase
from fedpers.cohort.model import CohortModel
from fedpers.cohort.prefix_cache import Prefix
from fedpers.config import TrainConfig
from fedpers.experiment import build_model, prepare
from fedpers.models.backbone import Backbone
from fedpers.privacy.randomness import generator
from fedpers.reporting import Reporter

BOTH = ("adapter", "head")


def fill(model: CohortModel) -> float:
    """Compute what is frozen below the lowest adapter anew, of training and test records; returns the seconds."""
    began = time.perf_counter()
    Prefix(
        Lanes(model.backbone, Backbone.twin, model.lanes.count),
        model.inputs,
        model.layer,
        model.budget,
        lambda what, done, total: None,
        keep=False,
    )
    return time.perf_counter() - began


def noise_of(model: CohortModel, clients: int, round_number: int) -> Callable[[int], Sequence[Tensor]]:
    """Return each client's own noise by step, drawn by address as a run draws it."""
    shapes = [model.initial[name].shape for name in model.names(BOTH)]
    sizes = [shape.numel() for shape in shapes]

    def noise(step: int) -> list[Tensor]:
        rows = [
            generator(b"benchmark", "noise", round_number, str(user), step).standard_normal(sum(sizes))
            for user in range(clients)
        ]
        parts = torch.split(torch.from_numpy(np.stack(rows).astype(np.float32)), sizes, dim=1)
        return [part.reshape(clients, *shape) for part, shape in zip(parts, shapes, strict=True)]

    return noise


def run_round(
    model: CohortModel, workload: Workload, steps: Sequence[Step], shared: Weights, number: int, private: bool
) -> Weights:
    """Train every client from the shared weights; returns the mean of what they come to."""
    s, clients = workload.settings, len(workload.clients)
    protection = None
    if private:
        protection = RecordProtection(s.clip, s.noise_multiplier, float(s.batch_size), noise_of(model, clients, number))
    weights = model.broadcast(clients, shared)
    settings = TrainConfig.model_validate({"lr": {"adapter": s.lr, "head": s.lr}})
    train_phase(model, weights, BOTH, steps, settings, protection=protection)
    return {name: value.mean(dim=0) for name, value in weights.items()}


def main() -> None:
    """Time rounds."""
    args = parse(__doc__, ("dp", "none"), precision=True)
    workload = load(args.workload)
    config = configure(workload.settings.task, workload.settings.layers, len(workload.clients))
    engine = config.engine.model_copy(update={"threads": args.threads, "precision": args.precision})
    experiment = prepare(config.model_copy(update={"engine": engine}))
    model, steps = build_model(experiment, Reporter()), order(config, experiment.examples)
    with Clock() as clock:
        seconds = fill(model)
        clock.mark()
        shared: Weights = workload.start
        for number in range(1 + args.rounds):
            shared = run_round(model, workload, steps, shared, number, args.mode == "dp")
            clock.mark()
    clock.write(args, "fedpers", {"fill": seconds, "precision": args.precision})


if __name__ == "__main__":
    main()
