"""What a guarantee comes to, before any training: how large the noise is, and what the numbers leave open."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fedpers.config import Config
from fedpers.privacy.adaptive_clip import split_noise
from fedpers.privacy.guarantee import SCHEDULE_START, Guarantee
from fedpers.privacy.matrix_noise import error_factor
from fedpers.privacy.sampling import period


def plan_table(guarantee: Guarantee, sizes: Mapping[str, int]) -> list[dict[str, float | int | str]]:
    """How large the noise is beside the signal, per shared parameter group, before any training.

    `noise_over_clip` is the noise's L2 norm over the clipping bound; `noise_over_best` the same over the largest
    possible sum, reached if every contribution were as long as the bound and pointed the same way. At record level both
    are of one client's step, with trust user-local of one client's reply; the server's average over clients lowers the
    ratio further.
    """
    alone = guarantee.trust == "user-local"
    rows: list[dict[str, float | int | str]] = []
    for group, size in sizes.items():
        ratio = guarantee.noise_multiplier * math.sqrt(size)
        rows.append(
            {
                "group": group,
                "numbers": size,
                "noise_over_clip": ratio,
                "noise_over_best": ratio / (1.0 if alone else guarantee.expected),
            }
        )
    return rows


def plan_notes(guarantee: Guarantee, config: Config) -> list[str]:
    """What the numbers of a plan leave open, in sentences."""
    notes = []
    if guarantee.bands:
        every = period(config.client_rate) if config.client_sampling == "cyclic" else 1
        patterns = [range(1, config.rounds + 1, every)]
        factor = error_factor(np.array(guarantee.bands), patterns, config.rounds)
        better = "less" if factor < 1 else "more, so independent noise is the better choice,"
        notes.append(
            f"{len(guarantee.bands)} bands: the error of the sums over rounds is {factor:.2f} times that of "
            f"independent noise without amplification; {better} at the same epsilon."
        )
    if guarantee.adaptive is not None:
        update = split_noise(guarantee.noise_multiplier, guarantee.adaptive.bit_noise)
        notes.append(
            f"Adaptive clip: it follows the {guarantee.adaptive.quantile:g} quantile of update norms from "
            f"{guarantee.clip} on; noise multiplier {update:.4f} on the update, deviation "
            f"{guarantee.adaptive.bit_noise:g} on the count of bits."
        )
    if guarantee.per_layer:
        notes.append("Per-layer clipping: each array to clip / sqrt(arrays); the joint bound is the clip.")
    if not math.isinf(guarantee.budget):
        notes.append(
            f"The rounds end before the ledger would pass epsilon {guarantee.budget:g}, {config.rounds} at most."
        )
    if guarantee.trust in {"user-local", "record-local"}:
        notes.append(
            "The noise below is that of one client's message or step; the mean over a round's clients has less, by the "
            "root of their number."
        )
    if guarantee.filter is not None:
        notes.append(
            f"Renyi filter of order {guarantee.filter.order:g}: noise starts at {SCHEDULE_START:g} times the "
            "multiplier above and falls while releases hold little but noise; the rounds end when the filter is full."
        )
    if guarantee.amplification == "none" and guarantee.unit == "user":
        notes.append(
            "Calibrated to a user who takes part as often as the sampler allows; the claim counts real rounds."
        )
    if guarantee.population is not None:
        notes.append(
            f"Noise for a forecast of {guarantee.population:,} users, {config.client_rate * guarantee.population:,.0f} "
            "in a round, scaled down to this cohort: the claim of this run will be far above the target."
        )
    return notes
