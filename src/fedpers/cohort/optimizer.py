"""Opacus's DP optimizer for a cohort: clip per record, add into the owner's sum, add noise per client."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor
from torch.optim import Optimizer

from fedpers.cohort.linear import Owners

Noise = Callable[[int], Sequence[Tensor]]  # step -> standard normal tensors, one per parameter, (clients, out, in)


class CohortDPOptimizer(DPOptimizer):  # type: ignore[misc]
    """DP-SGD (Abadi et al., CCS 2016, Algorithm 1) for all clients of a cohort at once.

    Each parameter is (clients, out, in), each `grad_sample` (records, out, in). Sums are divided by the public
    constant `lot_size`, never by how many records the batch really held.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        owners: Owners,
        noise_multiplier: float,
        max_grad_norm: float,
        lot_size: float,
        noise: Noise,
        per_layer: bool = False,
    ) -> None:
        super().__init__(
            optimizer, noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, expected_batch_size=None,
            loss_reduction="sum",
        )  # fmt: skip
        self.owners, self.lot_size, self.noise, self.per_layer = owners, lot_size, noise, per_layer
        self.steps = 0
        self.drawn = [torch.zeros_like(parameter) for parameter in self.params]  # noise in the gradients of all steps
        self.records = self.clipped = self.nonfinite = 0  # for the simulator's eyes

    def clip_and_accumulate(self) -> None:
        """Clip each record's gradient to `max_grad_norm` and add it to its owner's sum.

        With `per_layer` every array is clipped by itself to max_grad_norm / sqrt(arrays), so the joint norm keeps the
        bound (McMahan et al., ICLR 2018, per-layer clipping).

        A record whose gradient is not finite counts as zero: a rule that looks at this record alone.
        """
        samples = self.grad_samples
        layers = torch.stack([g.flatten(1).norm(dim=1) for g in samples], dim=1)  # (records, arrays)
        norms = layers.norm(dim=1)
        finite = torch.isfinite(norms)
        lengths, bound = norms[:, None].expand_as(layers), self.max_grad_norm
        if self.per_layer:
            lengths, bound = layers, self.max_grad_norm / math.sqrt(len(samples))
        factors = (bound / (lengths + 1e-6)).clamp(max=1.0)
        self.records += len(norms)
        self.clipped += int((factors[finite] < 1.0).any(dim=1).sum())
        broken = int((~finite).sum())
        self.nonfinite += broken
        for parameter, sample, factor in zip(self.params, samples, factors.unbind(dim=1), strict=True):
            kept = sample * factor[:, None, None]
            if broken:
                kept = torch.where(finite[:, None, None], kept, 0.0)
            if parameter.summed_grad is None:
                parameter.summed_grad = torch.zeros_like(parameter)
            parameter.summed_grad.index_add_(0, self.owners.index, kept)

    def accumulate(self) -> None:
        """Take in the per-record gradients of one forward and backward pass; the logical batch goes on."""
        self.signal_skip_step(True)
        self.step()
        self.zero_grad()

    def take(self, other: CohortDPOptimizer) -> None:
        """Add the sums that another lane has of this logical batch, and empty them there."""
        for mine, theirs in zip(self.params, other.params, strict=True):
            if theirs.summed_grad is not None:
                mine.summed_grad = theirs.summed_grad + (0.0 if mine.summed_grad is None else mine.summed_grad)
                theirs.summed_grad = None
        self.records += other.records
        self.clipped += other.clipped
        self.nonfinite += other.nonfinite
        other.records = other.clipped = other.nonfinite = 0

    def finish_batch(self) -> None:
        """End the logical batch: noise, scaling and the wrapped optimizer's step, for empty batches too."""
        for parameter in self.params:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape[1:]))
        self.owners.set(torch.zeros(0, dtype=torch.long, device=self.params[0].device))
        self.step()
        self.zero_grad()
        self.steps += 1

    def add_noise(self) -> None:
        """Add `noise_multiplier * max_grad_norm` times each client's own normal draw to its sum."""
        deviation = self.noise_multiplier * self.max_grad_norm
        noise = self.noise(self.steps) if deviation > 0 else [torch.zeros(()) for _ in self.params]
        for parameter, draw, drawn in zip(self.params, noise, self.drawn, strict=True):
            added = deviation * draw.to(parameter.device)
            parameter.grad = parameter.summed_grad + added
            drawn += added / self.lot_size

    def scale_grad(self) -> None:
        """Divide by the public lot size."""
        for parameter in self.params:
            parameter.grad /= self.lot_size
