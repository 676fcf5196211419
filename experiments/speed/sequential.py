"""Peer (b): one process, one client after the other; the model is built and made private once, by PEFT and Opacus.

python experiments/speed/sequential.py --workload FILE --out JSON [--mode hooks|ghost|none] [--rounds N]
"""

from __future__ import annotations

from measure import HUGE, Clock, Weights, parse, write_sums
from peer_client import MODES, Client, once
from workload import Workload


def run_round(workload: Workload, client: Client, shared: Weights) -> Weights:
    """Train every client from the shared weights; returns the mean of what they come to."""
    totals = {name: value.new_zeros(value.shape) for name, value in shared.items()}
    for batches in workload.clients:
        client.train(shared, batches, workload.settings.lr, workload.settings.noise_multiplier)
        for name, parameter in client.arrays.items():
            totals[name] += parameter.detach()
    return {name: total / len(workload.clients) for name, total in totals.items()}


def compare(workload: Workload, client: Client, first: bool) -> list[Weights]:
    """Return each client's weights without noise: after the first batch, or after the epoch."""
    found: list[Weights] = []
    for batches in workload.clients:
        client.train(workload.start, batches[:1] if first else batches, HUGE if first else workload.settings.lr, 0.0)
        found.append(client.weights())
    return found


def main() -> None:
    """Time rounds, or write what is compared."""
    args = parse(__doc__, MODES)
    with Clock() as clock:
        workload, client = once(args.workload, args.mode, args.threads)
        if args.sums:
            step, epoch = compare(workload, client, True), compare(workload, client, False)
            write_sums(args.sums, workload, step, epoch, mean=args.mode == "none")
            return
        clock.mark()
        shared: Weights = workload.start
        for _ in range(1 + args.rounds):
            shared = run_round(workload, client, shared)
            clock.mark()
    clock.write(args, "sequential")


if __name__ == "__main__":
    main()
