"""A clip that follows a quantile of the users' update norms, estimated under the same user-level guarantee.

Andrew, Thakkar, McMahan, Ramaswamy: Differentially Private Learning with Adaptive Clipping, NeurIPS 2021,
arXiv:1905.03871, Algorithm 1 and Theorem 1. Each user also says whether its update was shorter than the clip; the
noised count of these bits moves the clip. Sum and count together are one Gaussian mechanism, whose noise multiplier is
the configured one, as the noise on the sum is raised to make room for the count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedpers.errors import ConfigError


def split_noise(noise_multiplier: float, bit_noise: float) -> float:
    """Noise multiplier of the sum, so that it and the bits together have `noise_multiplier` (Theorem 1).

    z_delta = (z^-2 - (2 bit_noise)^-2)^-1/2: a user moves the sum by at most the clip and the count by at most 1/2,
    so together by sqrt(z_delta^-2 + (2 bit_noise)^-2) = 1/z noise deviations. No noise (z = 0) stays no noise.

    Args:
        noise_multiplier: z of the joint release.
        bit_noise: noise deviation on the count of bits, in users.

    Raises:
        ConfigError: the bits alone use up the guarantee, 2 bit_noise <= z.
    """
    if noise_multiplier == 0:
        return 0.0
    if not 2 * bit_noise > noise_multiplier:  # also for nan
        smallest = (math.floor(noise_multiplier / 2 * 1e4) + 1) / 1e4
        raise ConfigError(
            f"privacy.adaptive.bit_noise = {bit_noise}: the bits alone use up noise multiplier {noise_multiplier:.6g}; "
            f"the smallest value that works (to four decimals) is {smallest:.4f}, a twentieth of the cohort is usual."
        )
    return noise_multiplier / math.sqrt(1 - (noise_multiplier / (2 * bit_noise)) ** 2)


def joint_noise(z_delta: float, bit_noise: float) -> float:
    """Noise multiplier of the sum and the bits together, (z_delta^-2 + (2 bit_noise)^-2)^-1/2; undoes `split_noise`.

    Zero, no guarantee, when either is without noise.
    """
    if z_delta == 0 or bit_noise == 0:
        return 0.0
    return z_delta / math.hypot(1, z_delta / (2 * bit_noise))


@dataclass(frozen=True)
class AdaptiveClip:
    """How the clip follows the norms.

    Args:
        quantile: fraction of the users whose update should stay unclipped, in (0, 1).
        rate: step of the geometric update: an estimate that is off by 1 changes the clip by a factor exp(rate).
        bit_noise: noise deviation on the count of bits, in users.
    """

    quantile: float
    rate: float
    bit_noise: float

    def fraction(self, norms: Sequence[float], clip: float, denominator: float, rng: np.random.Generator) -> float:
        """Noised estimate of the fraction of users whose update is no longer than `clip`; it may leave [0, 1].

        A user adds 1/2 or -1/2, which halves the sensitivity of a 0/1 bit and needs no count of the cohort. A norm of
        exactly 0 (no records) or one that is not finite adds 0, as an absent user does: so zeroing a user out moves
        the sum by 1/2 at most. Absent users count as undecided, so a cohort below the denominator pulls towards 1/2.

        Args:
            norms: of the updates of the cohort, before clipping.
            clip: bound of this round.
            denominator: public constant, sampling rate times the number of registered users; never the cohort's size.
            rng: the stream of this round's bit noise, used for nothing else.
        """
        counted = [norm for norm in norms if 0 < norm < math.inf]
        bits = sum(0.5 if norm <= clip else -0.5 for norm in counted)
        return (bits + self.bit_noise * float(rng.standard_normal())) / denominator + 0.5

    def next_clip(self, clip: float, fraction: float) -> float:
        """Clip of the next round: clip * exp(-rate * (fraction - quantile)), post-processing of the noised fraction.

        What is clipped is float32, so the result stays among the positive normal numbers of float32: this keeps a
        runaway clip finite and positive and binds nothing else.
        """
        info = np.finfo(np.float32)
        log = math.log(clip) - self.rate * (fraction - self.quantile)
        return math.exp(min(max(log, math.log(float(info.tiny))), math.log(float(info.max))))
