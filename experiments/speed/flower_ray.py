"""Peer (a): Flower's simulation on Ray, its FedAvg, and a ClientApp with PEFT and Opacus.

    PYTHON experiments/speed/flower_ray.py --workload FILE --out JSON [--mode hooks|ghost|none|empty] [--rounds N]

PYTHON is that of a virtual environment with `flwr[simulation]` (README.md beside this file). The machine's cores are
shared out among actors of `--threads` threads each. Mode `empty` answers with the broadcast: Flower's own cost.
"""

from __future__ import annotations

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from argparse import Namespace
from collections.abc import Callable, Iterable

import torch
from flower_client import app
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from measure import HUGE, Clock, Weights, parse, write_sums
from peer_client import MODES
from workload import Workload, load

ALL = 1_000_000  # batches: more than anybody has


class Complete(FedAvg):
    """FedAvg that ends the run where a client failed, which Flower only logs, and that can keep the replies."""

    def __init__(self, clients: int, keep: bool = False) -> None:
        super().__init__(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        self.clients, self.keep = clients, keep
        self.kept: list[Weights] = []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the replies of all clients."""
        found = list(replies)
        if len(found) != self.clients or any(reply.has_error() for reply in found):
            raise RuntimeError("a client failed: its error is in the log above")
        if self.keep:
            found.sort(key=lambda reply: int(str(reply.content.metric_records["metrics"]["client"])))
            self.kept = [reply.content.array_records["arrays"].to_torch_state_dict() for reply in found]
        return super().aggregate_train(server_round, found)


def config(args: Namespace, lr: float, noise: float, batches: int = ALL) -> ConfigRecord:
    """Return what every client is told."""
    return ConfigRecord(
        {
            "workload": str(args.workload), "mode": args.mode, "threads": args.threads,
            "lr": lr, "noise": noise, "batches": batches,
        }
    )  # fmt: skip


def time_rounds(args: Namespace, workload: Workload, clock: Clock, grid: Grid) -> None:
    """Run the rounds; Flower calls `evaluate_fn` before the first and after each."""

    def end_of_round(_round: int, _arrays: ArrayRecord) -> None:
        clock.mark()

    s = workload.settings
    Complete(len(workload.clients)).start(
        grid, ArrayRecord(dict(workload.start)), num_rounds=1 + args.rounds,
        train_config=config(args, s.lr, s.noise_multiplier), evaluate_fn=end_of_round,
    )  # fmt: skip


def compare(args: Namespace, workload: Workload, grid: Grid) -> None:
    """Run one round without noise on each client's first batch and one on its epoch, and write what came out."""

    def replies(told: ConfigRecord) -> list[Weights]:
        strategy = Complete(len(workload.clients), keep=True)
        strategy.start(grid, ArrayRecord(dict(workload.start)), num_rounds=1, train_config=told)
        return strategy.kept

    step, epoch = replies(config(args, HUGE, 0.0, 1)), replies(config(args, workload.settings.lr, 0.0))
    write_sums(args.sums, workload, step, epoch, mean=args.mode == "none")


def simulate(users: int, threads: int, work: Callable[[Grid], None]) -> None:
    """Run `work` as the main function of a ServerApp."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        work(grid)

    cores = os.cpu_count() or 1
    backend = {
        "client_resources": {"num_cpus": threads, "num_gpus": 0.0},
        "init_args": {"num_cpus": cores, "include_dashboard": False},
    }
    run_simulation(server_app=server, client_app=app, num_supernodes=users, backend_config=backend)


def main() -> None:
    """Time rounds, or write what is compared."""
    args = parse(__doc__, (*MODES, "empty"), threads=1)
    torch.set_num_threads(1)  # of the server
    with Clock() as clock:
        workload = load(args.workload)
        users = len(workload.clients)
        if args.sums:
            simulate(users, args.threads, lambda grid: compare(args, workload, grid))
            return
        simulate(users, args.threads, lambda grid: time_rounds(args, workload, clock, grid))
    clock.write(args, "flower-ray")


if __name__ == "__main__":
    main()
