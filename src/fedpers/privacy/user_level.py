"""What the server does at user level, round by round: clip, sum, add noise, divide, and what follows from it.

A round's clip and noise are fixed before its replies are looked at: an adaptive clip and a schedule move them only
from what has been released, so that they are post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.privacy.adaptive_clip import split_noise
from fedpers.privacy.guarantee import SCHEDULE_START, Guarantee
from fedpers.privacy.ledger_lines import Release
from fedpers.privacy.matrix_noise import BandedNoise
from fedpers.privacy.mechanisms import Aggregate, Arrays, gaussian_mean, standard_normals, unflatten
from fedpers.privacy.randomness import derive, fingerprint, generator

SCHEDULE_STEP = 0.8  # factor on the noise when releases hold little but noise


class UserLevelServer:
    """The state of user-level protection on the server: clip and noise multiplier of the round to come.

    Args:
        guarantee: what the run enforces.
        shapes: shape of every shared array.
        group_of: parameter group of an array's name.
        key: the server's secret key.
    """

    def __init__(
        self,
        guarantee: Guarantee,
        shapes: Mapping[str, tuple[int, ...]],
        group_of: Callable[[str], str],
        key: bytes,
    ) -> None:
        assert guarantee.clip is not None
        self.guarantee, self.shapes, self.group_of = guarantee, shapes, group_of
        self._key = key
        self.clip = guarantee.clip
        self.noise_multiplier = guarantee.noise_multiplier * (SCHEDULE_START if guarantee.filter else 1.0)
        self._banded = BandedNoise(np.array(guarantee.bands), self._normals) if guarantee.bands else None

    def planned(self, number: int, participants: Sequence[int]) -> Release:
        """Return the ledger line of the coming round, before it is known what will be released."""
        noised, guarantee = self.noise_multiplier > 0, self.guarantee
        secret = guarantee.amplification == "clients"
        return Release(
            round=number,
            mechanism="gaussian" if noised else "none",
            noise_multiplier=self.noise_multiplier,
            clip=self.clip,
            sampling_rate=guarantee.rate,
            steps=1,
            bit_noise=guarantee.adaptive.bit_noise if guarantee.adaptive else None,
            # Who took part amplifies only while it is secret, so it is not written down then.
            clients=None if secret else list(participants),
            salt="" if secret else derive(self._key, "participants", number).hex(),
            noise_address=fingerprint(self._key, "user-noise", number) if noised else "",
            release_hash="0" * 64,
        )

    def mean(self, number: int, updates: Sequence[Arrays]) -> Aggregate:
        """Return the round's noised mean update. An empty cohort releases noise, too."""
        guarantee = self.guarantee
        common: dict[str, Any] = {"denominator": guarantee.denominator, "per_layer": guarantee.per_layer}
        if guarantee.trust == "user-distributed":  # clipped and noised at the clients; only the sum is looked at
            return gaussian_mean(
                updates, self.shapes, self.group_of, clip=math.inf, noise_multiplier=0.0, noise=None, **common
            )
        multiplier = self.noise_multiplier
        if guarantee.adaptive is not None:
            multiplier = split_noise(multiplier, guarantee.adaptive.bit_noise)
        return gaussian_mean(
            updates, self.shapes, self.group_of, clip=self.clip, noise_multiplier=multiplier,
            noise=self.noise(number) if multiplier > 0 else None, **common,
        )  # fmt: skip

    def noise(self, number: int) -> dict[str, NDArray[np.float64]]:
        """Return a round's noise before it is scaled by noise multiplier and clip."""
        if self._banded is not None:
            return unflatten(self._banded.at(number), self.shapes)
        return standard_normals(self.shapes, generator(self._key, "user-noise", number))

    def advance(self, number: int, released: Aggregate) -> float | None:
        """Set the next round's clip and noise from what was released; returns the noised bit fraction, if any."""
        adaptive, fraction = self.guarantee.adaptive, None
        if adaptive is not None:
            rng = generator(self._key, "bit-noise", number)
            fraction = adaptive.fraction(released.norms, self.clip, self.guarantee.denominator, rng)
            self.clip = adaptive.next_clip(self.clip, fraction)
        if self.guarantee.filter is not None and self._signal_to_noise(released) < 1:
            self.noise_multiplier *= SCHEDULE_STEP
        return fraction

    def state(self) -> dict[str, NDArray[np.float64]]:
        """Return what the coming round depends on and the configuration does not say, for a checkpoint."""
        if self.guarantee.adaptive is None and self.guarantee.filter is None:
            return {}
        return {"clip": np.array([self.clip]), "noise_multiplier": np.array([self.noise_multiplier])}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore what `state` returned."""
        self.clip, self.noise_multiplier = state["clip"].item(), state["noise_multiplier"].item()

    def _normals(self, number: int) -> NDArray[np.float64]:
        size = sum(math.prod(shape) for shape in self.shapes.values())
        return generator(self._key, "user-noise", number).standard_normal(size)

    def _signal_to_noise(self, released: Aggregate) -> float:
        """Estimate squared signal over squared noise from the released mean alone."""
        square = sum(float(np.sum(np.square(a, dtype=np.float64))) for a in released.mean.values())
        size = sum(a.size for a in released.mean.values())
        noise = size * (self.noise_multiplier * self.clip / self.guarantee.denominator) ** 2
        return max(0.0, square - noise) / noise
