"""What the canary audits share: the configuration they run, the coins, how many are guessed, and the bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpers.audit.bounds import Finding, guess, one_run_bound, one_run_ceiling, verdict
from fedpers.config import Config, EvaluationConfig
from fedpers.errors import ConfigError, DataError
from fedpers.experiment import Experiment
from fedpers.privacy.accounting import GaussianEvent, epsilon
from fedpers.privacy.guarantee import Guarantee
from fedpers.privacy.ledger_lines import SENSITIVITY
from fedpers.privacy.randomness import derive, secret_key, uniforms

Mask = NDArray[np.bool_]

CONFIDENCE = 0.95
MARGIN = 1.25  # ceiling over claim that is wanted: a violation can then be shown with some guesses wrong
SEEN = 0.9  # share of the canaries that are expected to be in and seen; by chance there are fewer


@dataclass(frozen=True)
class Rule:
    """How the coins are guessed, fixed before the run.

    Attributes:
        guesses: how many, an even number; the others are left open.
        both: half of the guesses are IN, for the highest scores, and half OUT, for the lowest; if not, all are IN.
        confidence: of the bound.
    """

    guesses: int
    both: bool
    confidence: float

    def correct(self, scores: NDArray[Any], included: Mask) -> int:
        """Return how many guesses are right; both arrays are (canaries,). Raises DataError for an infinite score."""
        if self.both:
            return guess(scores, included, self.guesses)
        if not np.isfinite(scores).all():
            raise DataError("canaries: a score is not finite; a run that diverged has no score to rank.")
        return int(included[np.argsort(scores, kind="stable")[-self.guesses :]].sum())


def audited(config: Config, what: str, unit: str) -> Config:
    """Return the configuration to run in an audit: nothing is measured on the way, and a given secret is not reused.

    Raises:
        ConfigError: `privacy.unit` is another one.
    """
    if config.privacy.unit != unit:
        raise ConfigError(f"{what}: privacy.unit is {config.privacy.unit}; this audit is of privacy.unit={unit}.")
    privacy = config.privacy
    if privacy.secret is not None:  # the same noise on the run itself and on its audit would show their difference
        privacy = privacy.model_copy(update={"secret": derive(secret_key(privacy.secret), "audit", what).hex()})
    plain = EvaluationConfig(every=0, local_only=False)
    return config.model_copy(update={"privacy": privacy, "evaluation": plain, "frontier": None})


def check_sends(experiment: Experiment) -> None:
    """Raise ConfigError where no message leaves, so that there is nothing to audit, or messages of another kind."""
    if not experiment.plan.shared or not experiment.config.rounds:
        raise ConfigError(
            f"canaries: method {experiment.plan.name!r} with rounds={experiment.config.rounds} sends nothing; choose "
            "a method that shares a group, and one round or more."
        )
    if not experiment.plan.plain:
        raise ConfigError(
            f"canaries: method {experiment.plan.name!r} does more with what clients send than to average it, and these "
            "canaries read plain replies; `fedpers audit --probe` checks it, and so would canaries under fedavg."
        )


def tossed(key: bytes, ids: Sequence[str]) -> Mask:
    """Return who is in, (ids,): a fair private coin by id."""
    return np.asarray(uniforms(key, ("coins",), ids)[:, 0] < 0.5)


def flat(arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Return arrays (out, in) or (clients, out, in) as rows (clients, numbers), in the order of the sorted names."""
    parts = [arrays[name] for name in sorted(arrays)]
    return np.concatenate([part.reshape(1 if part.ndim == 2 else len(part), -1) for part in parts], axis=1)


def planned_epsilon(config: Config, guarantee: Guarantee) -> float:
    """About what the run will claim, known before it: decides how many coins are guessed, and nothing else."""
    asked = config.privacy.epsilon
    if math.isfinite(asked) and config.privacy.population is None:
        return asked
    event = GaussianEvent(guarantee.noise_multiplier, guarantee.rate, guarantee.releases)
    return epsilon([event], guarantee.delta, replace_one=SENSITIVITY[guarantee.adjacency] == 2)


def choose_rule(
    canaries: int, planned: float, absent: float, delta: float, confidence: float = CONFIDENCE
) -> Rule:  # fmt: skip
    """Choose how many coins to guess, before the run: a fifth, or as many as put the ceiling well above the claim.

    The fewest guesses are the surest ones; more raise what can be shown at most.

    Args:
        canaries: number of coins.
        planned: about what will be claimed.
        absent: share of the canaries that is expected never to be asked. What is out and what was never asked look
            alike, so if that is one canary or more, only IN is guessed, and of no more than are expected to be seen.
        delta: of claim and bound.
        confidence: of the bound.
    """
    both = canaries * absent < 1
    most = canaries if both else math.floor(SEEN * canaries * (1 - absent) / 2)
    for fifths in range(1, 6):
        guesses = max(2, 2 * (fifths * most // 10))
        if one_run_ceiling(guesses, canaries, delta, confidence) >= MARGIN * planned:
            break
    return Rule(guesses, both, confidence)


def one_run_finding(
    name: str, what: str, unit: str, claimed: float, delta: float, scores: NDArray[Any], included: Mask, rule: Rule,
    numbers: Mapping[str, float] | None = None,
) -> Finding:  # fmt: skip
    """Guess the coins from the scores (canaries,) and hold the bound that follows against the claim."""
    canaries, guesses, confidence = len(included), rule.guesses, rule.confidence
    correct = rule.correct(scores, included)
    lower = one_run_bound(correct, guesses, canaries, delta, confidence)
    ceiling = one_run_ceiling(guesses, canaries, delta, confidence)
    return Finding(
        name=name,
        what=what,
        unit=unit,
        claimed=claimed,
        delta=delta,
        empirical=lower,
        ceiling=ceiling,
        kind="bound",
        verdict=verdict(claimed, lower, ceiling),
        detail=f"{canaries} canaries, each in by a fair coin, in one run of the production path: {correct} of "
        f"{guesses} guesses right, {'as many IN as OUT' if rule.both else 'all IN'}; {confidence:.1%} confidence.",
        numbers={
            "canaries": float(canaries),
            "guesses": float(guesses),
            "correct": float(correct),
            "separation": _separation(scores, included),
            **{key: float(value) for key, value in (numbers or {}).items()},
        },
    )


def _separation(scores: NDArray[Any], included: Mask) -> float:
    """Distance of the canaries that were in from the others, in deviations of these.

    For one unsampled Gaussian release it estimates sensitivity over noise deviation.
    """
    inside, outside = scores[included], scores[~included]
    distance, spread = float(inside.mean() - outside.mean()), float(outside.std())
    return distance / spread if spread > 0 else math.copysign(math.inf, distance)
