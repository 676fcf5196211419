"""One client of the peers with DP-SGD by Opacus, as its manual shows; a process builds its model once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine
from peer_model import Criterion, copy_into, make
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from workload import Batch, Settings, Workload, load

warnings.filterwarnings("ignore", message="Full backward hook is firing")
warnings.filterwarnings("ignore", message="Secure RNG turned off")
MODES = ("hooks", "ghost", "none")


class Client:
    """Model, optimizer and criterion, made private in the given mode; reset to the broadcast before each training."""

    def __init__(self, settings: Settings, mode: str, seed: int = 0) -> None:
        """Build them; `mode` is Opacus's grad_sample_mode, or "none" for plain SGD; `seed` is the noise's."""
        self.settings, self.mode = settings, mode
        plain = make(settings)
        self.arrays = plain.arrays()
        self.module: Any = plain
        self.criterion: Any = Criterion(plain, "mean" if mode == "none" else "sum")
        self.optimizer: Any = torch.optim.SGD(list(self.arrays.values()), lr=settings.lr)
        if mode != "none":
            size = settings.batch_size
            self.module, self.optimizer, *rest = PrivacyEngine(accountant="rdp").make_private(
                module=plain, optimizer=self.optimizer, criterion=self.criterion, grad_sample_mode=mode,
                data_loader=DataLoader(TensorDataset(torch.zeros(size, 1)), batch_size=size), poisson_sampling=False,
                noise_multiplier=settings.noise_multiplier, max_grad_norm=settings.clip, loss_reduction="sum",
                noise_generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
            if mode == "ghost":
                self.criterion = rest[0]

    def train(self, start: Mapping[str, Tensor], batches: Sequence[Batch], lr: float, noise: float) -> None:
        """Train from `start` through the batches with step size `lr` on the mean; what came out is in `arrays`."""
        copy_into(self.arrays, start)
        private = self.mode != "none"
        if private:
            self.optimizer.noise_multiplier = noise
        for group in self.optimizer.param_groups:
            group["lr"] = lr / self.settings.batch_size if private else lr  # Opacus steps on the sum
        for batch in batches:
            self.optimizer.zero_grad()
            self.criterion(self.module(batch.ids, batch.mask, batch.candidates), batch.targets).backward()
            self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the trained weights."""
        return {name: parameter.detach().clone() for name, parameter in self.arrays.items()}


@cache
def once(path: Path, mode: str, threads: int, seed: int = 0) -> tuple[Workload, Client]:
    """Load the workload and build the client, once in a process."""
    torch.set_num_threads(threads)
    workload = load(path)
    return workload, Client(workload.settings, mode, seed)
