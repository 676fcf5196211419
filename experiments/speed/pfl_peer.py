"""Peer (c): pfl's SimulatedBackend, PyTorchModel and FederatedAveraging. It has no record-level DP, so none is done.

    PYTHON experiments/speed/pfl_peer.py --workload FILE --out JSON [--rounds N]

PYTHON is that of a virtual environment with `pfl[pytorch]` (README.md beside this file).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from measure import HUGE, Clock, Weights, parse, write_sums
from peer_model import NextMessage, PeerModel, Replies, copy_into
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.postprocessor.base import Postprocessor
from torch import Tensor
from workload import Batch, Workload, load

NEVER = 1_000_000  # rounds between evaluations; pfl evaluates in the first round all the same, which warms up here


class Asked(PeerModel):
    """The two methods that pfl asks for."""

    def loss(self, ids: Tensor, mask: Tensor, candidates: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        return self.of_output(self(ids, mask, candidates), targets).mean()

    @torch.no_grad()
    def metrics(self, ids: Tensor, mask: Tensor, candidates: Tensor, targets: Tensor) -> dict[str, Weighted]:
        """Return the loss as pfl wants it."""
        loss = self.loss(ids, mask, candidates, targets).item()
        return {"loss": Weighted(loss * len(targets), len(targets))}


class AskedReplies(Asked, Replies):
    """The peers' model of replies."""


class AskedNextMessage(Asked, NextMessage):
    """The peers' model of the next message."""


class Batches(Dataset):  # type: ignore[misc]
    """A user's batches as they are, each padded to its own longest text; pfl's own would pad all of them alike."""

    def __init__(self, batches: list[Batch], user_id: str) -> None:
        found = [(b.ids, b.mask, b.candidates, b.targets) for b in batches]
        super().__init__(raw_data=tuple(found), user_id=user_id)
        self.records = sum(len(b.targets) for b in batches)

    def __len__(self) -> int:
        return self.records

    def iter(self, batch_size: int | None) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches."""
        yield from self.raw_data


class Rounds(TrainingProcessCallback):  # type: ignore[misc]
    """Marks the ends of rounds."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Mark the end of preparation."""
        self.clock.mark()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Mark the end of a round."""
        self.clock.mark()
        return False, Metrics()


class Kept(Postprocessor):  # type: ignore[misc]
    """Keeps each user's model difference, by fedpers's names."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names
        self.users: dict[int, Weights] = {}

    def postprocess_one_user(self, *, stats: Any, user_context: Any) -> tuple[Any, Metrics]:
        """Keep a copy; changes nothing."""
        self.users[int(user_context.user_id)] = {self.names[n]: value.clone() for n, value in stats.items()}
        return stats, Metrics()


def run(
    workload: Workload, model: Asked, rounds: int, callbacks: list[Rounds], keep: list[Kept], step: bool = False
) -> None:
    """Train as pfl's tutorials do: so many rounds of one epoch, or one of a step with step size HUGE."""
    users = [str(client) for client in range(len(workload.clients))]
    datasets = {user: Batches(workload.clients[int(user)], user) for user in users}
    data = FederatedDataset(datasets.__getitem__, get_user_sampler("minimize_reuse", users))
    copy_into(model.arrays(), workload.start)
    wrapped = PyTorchModel(
        model,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(list(model.arrays().values()), lr=1.0),
    )
    size = workload.settings.batch_size
    settings = NNTrainHyperParams(
        local_batch_size=size,
        local_num_epochs=None if step else 1,
        local_num_steps=1 if step else None,
        local_learning_rate=HUGE if step else workload.settings.lr,
    )
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds, evaluation_frequency=NEVER, train_cohort_size=len(users), val_cohort_size=0
        ),
        SimulatedBackend(training_data=data, val_data=data, postprocessors=keep),
        wrapped,
        settings,
        NNEvalHyperParams(local_batch_size=size),
        callbacks=callbacks,
    )


def compare(workload: Workload, model: Asked, step: bool) -> list[Weights]:
    """Return each client's weights after the first batch, or after the epoch."""
    of = {id(parameter): name for name, parameter in model.arrays().items()}
    kept = Kept({name: of[id(p)] for name, p in model.named_parameters() if p.requires_grad})
    run(workload, model, 1, [], [kept], step)
    return [
        {name: first + kept.users[client][name] for name, first in workload.start.items()}
        for client in range(len(workload.clients))
    ]


def main() -> None:
    """Time rounds, or write what is compared."""
    args = parse(__doc__, ("none",))
    with Clock() as clock:
        workload = load(args.workload)
        model = (AskedReplies if workload.settings.task == "reply" else AskedNextMessage)(workload.settings)
        if args.sums:
            write_sums(args.sums, workload, compare(workload, model, True), compare(workload, model, False), mean=True)
            return
        run(workload, model, 1 + args.rounds, [Rounds(clock)], [])
    clock.write(args, "pfl")


if __name__ == "__main__":
    main()
