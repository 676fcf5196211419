"""One release of the production mechanism, many times over, with a canary and without it.

Without sampling and without training epsilon is known exactly, so this finds noise that is too small, a clip that does
not hold, or a divisor that tells something, at the price of saying nothing about a whole run. The sides are told apart
by the two-sample audit (see `bounds.two_sample_bound`) and by its Gaussian form, which is tight here: a claim of one
Gaussian release is a claim of a Gaussian trade-off curve.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpers.audit.bounds import Finding, corrected, two_sample_bound, two_sample_ceiling, verdict
from fedpers.audit.canaries_guessing import CONFIDENCE
from fedpers.cohort.linear import Owners
from fedpers.cohort.optimizer import CohortDPOptimizer
from fedpers.errors import ConfigError
from fedpers.privacy.accounting import gaussian_epsilon
from fedpers.privacy.calibration import calibrate_gaussian
from fedpers.privacy.guarantee import Guarantee
from fedpers.privacy.ledger_lines import SENSITIVITY
from fedpers.privacy.mechanisms import clip_update, noise_share
from fedpers.privacy.randomness import derive, generator, secret_key
from fedpers.privacy.user_level import UserLevelServer

Scores = NDArray[np.float64]
Sides = tuple[float, Scores, Scores]  # noise multiplier; scores with the canary and without it, (runs,) each

NUMBERS = 4  # in the release
OVERSHOOT = 10.0  # length of the canary in clips: the mechanism has to cut it
AUDITED = 3.0  # epsilon of the release that is audited where that of the configuration is beyond the audit's reach
HONEST = 2  # clients whose shares make up the noise


def mechanism_audit(guarantee: Guarantee, *, runs: int = 20_000, secret: bytes | None = None) -> list[Finding]:
    """Bound the epsilon of one unsampled release of the mechanism that a guarantee runs.

    At user level this is the server's noised mean (`UserLevelServer`), or what clients send where they add the noise;
    at record level one step of `CohortDPOptimizer`, every run a client of one cohort. Where the release of the
    configuration has an epsilon beyond the ceiling, the same mechanism is audited with more noise, and the finding says
    with how much.

    Args:
        guarantee: of the configuration, see `guarantee.resolve`.
        runs: with the canary, and as many without; half of them choose a threshold.
        secret: 32 bytes from which every run derives a key of its own; fresh by default.

    Returns:
        Two bounds that hold together: Clopper-Pearson's, and its Gaussian form.

    Raises:
        ConfigError: nothing is protected, the guarantee has no noise, or fewer than 100 runs.
    """
    if guarantee.unit == "none" or guarantee.noise_multiplier <= 0:
        raise ConfigError("mechanism audit: this configuration adds no noise; set privacy.unit and privacy.epsilon.")
    if runs < 100:
        raise ConfigError(f"mechanism audit: {runs} runs show nothing; use 100 or more, 20,000 to see much.")
    delta, level = guarantee.delta, corrected(CONFIDENCE, 2)
    sensitivity = SENSITIVITY[guarantee.adjacency]
    ceiling = two_sample_ceiling(runs - runs // 2, delta, level)
    configured = gaussian_epsilon(sensitivity / guarantee.noise_multiplier, delta)
    if configured >= ceiling:
        more = calibrate_gaussian(AUDITED, delta, sensitivity)
        guarantee = replace(guarantee, noise_multiplier=more, adaptive=None)  # bits have noise for the configured one
    key = secret or secret_key(None)
    run = _record_level if guarantee.unit == "record" else _user_level
    noise, present, absent = run(guarantee, runs, key)
    claimed = gaussian_epsilon(sensitivity / noise, delta)
    found = []
    for gaussian in (False, True):
        lower = two_sample_bound(present, absent, delta, level, gaussian)
        top = two_sample_ceiling(runs - runs // 2, delta, level, gaussian)
        found.append(
            Finding(
                name=f"two-sample, {'Gaussian form' if gaussian else 'Clopper-Pearson'}",
                what="mechanism",
                unit=guarantee.unit,
                claimed=claimed,
                delta=delta,
                empirical=lower,
                ceiling=top,
                kind="bound",
                verdict=verdict(claimed, lower, top),
                detail=f"One release without sampling at noise multiplier {noise:.4g} (a release of the configuration "
                f"has epsilon {configured:.2f}), {runs} runs with a canary and {runs} without; {level:.1%} confidence.",
                numbers={"runs": float(runs), "noise_multiplier": noise, "configured": configured},
            )
        )
    return found


def _user_level(guarantee: Guarantee, runs: int, key: bytes) -> Sides:
    """Noise multiplier that the ledger would state, and the releases along the canary's direction, in clips."""
    assert guarantee.clip is not None
    direction = _direction(key)
    canary = OVERSHOOT * guarantee.clip * direction
    other = -canary if SENSITIVITY[guarantee.adjacency] == 2 else None
    release = _server_sum if guarantee.trust == "user-central" else _client_sum
    sides = []
    for name, update in (("in", canary), ("out", other)):
        released = [release(guarantee, derive(key, name, run), update) for run in range(runs)]
        sides.append(np.stack(released) @ direction.astype(np.float64) / guarantee.clip)
    return _server(guarantee, key).planned(1, []).noise_multiplier, sides[0], sides[1]


def _server(guarantee: Guarantee, key: bytes) -> UserLevelServer:
    return UserLevelServer(guarantee, {"head": (NUMBERS,)}, lambda _name: "head", key)


def _server_sum(guarantee: Guarantee, key: bytes, update: NDArray[np.float32] | None) -> Scores:
    """What a trusted server releases of a cohort of one user, or of nobody."""
    mean = _server(guarantee, key).mean(1, [] if update is None else [{"head": update}]).mean["head"]
    return np.asarray(mean, dtype=np.float64) * guarantee.denominator


def _client_sum(guarantee: Guarantee, key: bytes, update: NDArray[np.float32] | None) -> Scores:
    """What one client, or as few as have to be honest, send together: clipped updates with their noise."""
    assert guarantee.clip is not None
    honest = 1 if guarantee.trust == "user-local" else HONEST
    sent = np.zeros(NUMBERS) if update is None else clip_update({"head": update}, guarantee.clip)[0]["head"]
    for client in range(honest):
        rng = generator(key, "user-noise", client)
        share = noise_share({"head": (NUMBERS,)}, guarantee.clip, guarantee.noise_multiplier, honest, rng)
        sent = sent + share["head"]
    return sent


def _record_level(guarantee: Guarantee, runs: int, key: bytes) -> Sides:
    """Noise multiplier, and one step's sums of as many clients along the canary's direction, in clips.

    Clients of the first half hold the canary alone, the others nothing.
    """
    assert guarantee.clip is not None
    parameter = nn.Parameter(torch.zeros(2 * runs, 1, NUMBERS))
    owners = Owners()

    def noise(_step: int) -> list[torch.Tensor]:
        draws = [generator(key, "noise", client).standard_normal((1, NUMBERS)) for client in range(2 * runs)]
        return [torch.from_numpy(np.stack(draws).astype(np.float32))]

    optimizer = CohortDPOptimizer(
        torch.optim.SGD([parameter], lr=1.0), owners=owners, noise_multiplier=guarantee.noise_multiplier,
        max_grad_norm=guarantee.clip, lot_size=guarantee.denominator, noise=noise, per_layer=guarantee.per_layer,
    )  # fmt: skip
    direction = _direction(key)
    owners.set(torch.arange(runs))
    canary = torch.from_numpy(OVERSHOOT * guarantee.clip * direction)
    setattr(parameter, "grad_sample", canary.expand(runs, 1, NUMBERS).clone())  # noqa: B010 - where Opacus looks
    optimizer.accumulate()
    optimizer.finish_batch()
    sums = -parameter.detach().numpy()[:, 0].astype(np.float64) * guarantee.denominator
    scores = sums @ direction.astype(np.float64) / guarantee.clip
    return guarantee.noise_multiplier, scores[:runs], scores[runs:]


def _direction(key: bytes) -> NDArray[np.float32]:
    drawn = generator(key, "direction").standard_normal(NUMBERS)
    return np.asarray(drawn / np.linalg.norm(drawn), dtype=np.float32)
