"""From what is asked for to noise and clipping; refuses what would be a false claim.

What comes out here is a plan. The claim itself is computed from the ledger, never from this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedpers.config import Config
from fedpers.errors import ConfigError, PrivacyRefusal
from fedpers.methods.base import Plan
from fedpers.privacy.accounting import calibrate
from fedpers.privacy.claim import check_delta
from fedpers.privacy.ledger import ADJACENCY, TRUST, Trust, Unit

# Strategies that see only the mean of the replies; under user-level noise they are post-processing of that mean.
OF_THE_MEAN = ("FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi")
# Strategies that look at single replies.
OF_SINGLE_REPLIES = ("Krum", "MultiKrum", "Bulyan", "FedMedian", "FedTrimmedAvg")


@dataclass(frozen=True)
class Guarantee:
    """What the run enforces."""

    unit: Unit
    trust: Trust
    clip: float | None
    noise_multiplier: float  # noise deviation over clip; 0 means clipping alone
    rate: float  # Poisson rate of the unit: of users in a round, or of records in a local step
    releases: int  # noised releases that one unit may meet: rounds, or local steps in all rounds
    steps: int  # local DP-SGD steps per round phase (record level)
    delta: float
    denominator: float  # public divisor: expected cohort (user level) or lot size (record level)
    head_policy: str
    adjacency: str
    protected: int  # units that delta is held against
    expected: float  # contributions in one noised sum, if everyone holds as much as allowed

    @property
    def clips_updates(self) -> bool:
        """Whether the server clips whole updates and divides by a constant."""
        return self.unit != "record" and self.clip is not None


def resolve(config: Config, plan: Plan, users: int) -> Guarantee:
    """Check the setup and calibrate the noise.

    Args:
        config: the run's configuration.
        plan: the method's table; whether personal state feeds back is read off it.
        users: registered clients, a public number.

    Raises:
        PrivacyRefusal: a combination that cannot be claimed, with the sound ways out.
        ConfigError: delta too large, or an unknown strategy.
    """
    privacy = config.privacy
    check_setup(config, plan)
    protected = {"none": 1, "user": users, "record": users * config.data.max_train}[privacy.unit]
    if privacy.unit != "none":
        check_delta(privacy.delta, protected)
    phases = len(plan.round)
    steps = math.ceil(config.local.epochs / privacy.record_rate) if privacy.unit == "record" else 0
    rate, releases = {
        "none": (1.0, 0),
        "user": (config.client_rate, config.rounds),
        # Whoever sees a client's replies knows that it took part: local sampling alone amplifies.
        "record": (privacy.record_rate, config.rounds * steps * phases),
    }[privacy.unit]
    sends = bool(plan.shared) and config.rounds > 0
    noise = 0.0
    if privacy.unit != "none" and not math.isinf(privacy.epsilon) and sends:
        noise = calibrate(privacy.epsilon, privacy.delta, rate, releases)
    return Guarantee(
        unit=privacy.unit,
        trust=TRUST[privacy.unit],
        clip=privacy.clip,
        noise_multiplier=noise,
        rate=rate,
        releases=releases if sends else 0,
        steps=steps,
        delta=privacy.delta,
        denominator=float(config.local.batch_size) if privacy.unit == "record" else config.client_rate * users,
        head_policy=_head_policy(plan),
        adjacency=ADJACENCY[privacy.unit],
        protected=protected,
        expected={
            "none": 1.0,
            "user": config.client_rate * users,
            "record": privacy.record_rate * config.data.max_train,
        }[privacy.unit],
    )


def check_setup(config: Config, plan: Plan) -> None:
    """Refuse what no amount of noise makes true; needs no data. Raises as `resolve` does."""
    _check_strategy(config)
    if config.privacy.unit == "record" and plan.feedback:
        raise PrivacyRefusal(_feedback_refusal(plan))


def plan_table(guarantee: Guarantee, sizes: Mapping[str, int]) -> list[dict[str, float | int | str]]:
    """How large the noise is beside the signal, per shared parameter group, before any training.

    `noise_over_clip` is the noise's L2 norm over the clipping bound; `noise_over_best` the same over the largest
    possible sum, reached if every contribution were as long as the bound and pointed the same way. At record level both
    are of one client's step; the server's average over clients lowers the ratio further.
    """
    rows: list[dict[str, float | int | str]] = []
    for group, size in sizes.items():
        ratio = guarantee.noise_multiplier * math.sqrt(size)
        rows.append(
            {
                "group": group,
                "numbers": size,
                "noise_over_clip": ratio,
                "noise_over_best": ratio / guarantee.expected,
            }
        )
    return rows


def _feedback_refusal(plan: Plan) -> str:
    heads = " and ".join(plan.feedback)
    babu = ": method=fedbabu" if plan.feedback == ("head",) else ""
    return (
        f"method {plan.name!r} with privacy.unit=record is refused: the personal {heads} is trained without noise on "
        f"the same records and feeds the gradients of the shared {' and '.join(plan.shared)}, so one record changes "
        "the gradients of all the others and the true epsilon is far above the claimed one. Three sound ways out: "
        f"(1) keep the {heads} at its public value until the last release{babu}; "
        f"(2) train the {heads} under the same clipping and noise and tune it at home afterwards: "
        "method=fedavg-finetune; "
        f"(3) protect whole users, where a personal {heads} may stay noise-free: privacy.unit=user."
    )


def _check_strategy(config: Config) -> None:
    name = config.server.strategy
    if name in OF_SINGLE_REPLIES:
        if config.privacy.unit == "user" or (config.privacy.unit == "none" and config.privacy.clip is not None):
            raise PrivacyRefusal(
                f"server.strategy = {name!r} looks at single replies, but user-level privacy gives it the noised mean "
                f"alone; choose one of {', '.join(OF_THE_MEAN)}, or protect records (privacy.unit=record)."
            )
    elif name not in OF_THE_MEAN:
        raise ConfigError(
            f"server.strategy = {name!r}: expected one of {', '.join(OF_THE_MEAN)}, or without user-level privacy "
            f"{', '.join(OF_SINGLE_REPLIES)}."
        )


def _head_policy(plan: Plan) -> str:
    if not plan.shared:
        return "nothing is shared"
    if plan.feedback:
        return f"personal {' and '.join(plan.feedback)} without noise, feeding the shared part; never sent"
    if plan.personal:
        return f"personal {' and '.join(plan.personal)} trained after the last release only; never sent"
    return "no personal state"
