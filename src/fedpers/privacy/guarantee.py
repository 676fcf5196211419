"""From what is asked for to noise and clipping.

What comes out here is a plan. The claim itself is computed from the ledger, never from this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedpers.config import Config, Trust, Unit
from fedpers.errors import ConfigError
from fedpers.methods.base import PERSONAL
from fedpers.plan import HALVES, Plan, alias
from fedpers.privacy.adaptive_clip import AdaptiveClip, split_noise
from fedpers.privacy.calibration import calibrate, calibrate_gaussian
from fedpers.privacy.claim import check_delta
from fedpers.privacy.dataflow import feedback, memories
from fedpers.privacy.ledger_lines import (
    ADD_REMOVE,
    REPLACE_ONE,
    SENSITIVITY,
    ZERO_OUT,
    Amplification,
    Filter,
    Opening,
    Release,
    Sampling,
    Secret,
)
from fedpers.privacy.matrix_noise import coefficients, sensitivity
from fedpers.privacy.randomness import derive, fingerprint
from fedpers.privacy.refusals import check_setup, server_sums
from fedpers.privacy.renyi import RdpFilter, calibrate_fixed_size, choose_filter
from fedpers.privacy.sampling import cohort_size, period

SCHEDULE_START = 1.5  # first noise of schedule=signal over the constant noise that fits the filter


@dataclass(frozen=True)
class Guarantee:
    """What the run enforces."""

    unit: Unit
    trust: Trust
    clip: float | None
    noise_multiplier: float  # noise deviation over clip; 0 means clipping alone
    rate: float  # sampling rate that is credited: of users in a round, or of records in a local step; 1 for none
    releases: int  # noised releases that one unit may meet: rounds, or local steps in all rounds
    steps: int  # local DP-SGD steps per round phase (record level)
    delta: float
    denominator: float  # public divisor: expected cohort (user level) or lot size (record level)
    head_policy: str
    adjacency: str
    protected: int  # units that delta is held against
    expected: float  # contributions in one noised sum, if everyone holds as much as allowed
    amplification: Amplification = "none"
    server_sums: bool = False  # the server makes one mean of the replies, before any strategy sees them
    per_layer: bool = False
    adaptive: AdaptiveClip | None = None
    bands: tuple[float, ...] = ()  # coefficients of correlated noise; empty for independent noise
    honest: int | None = None  # clients of a round whose noise shares must be enough
    filter: RdpFilter | None = None  # noise may follow earlier releases
    budget: float = math.inf  # the run ends before the ledger passes it
    phase_steps: tuple[int, int] = (0, 0)  # noised steps of a round on the shared half of the records, on the head half
    personal_covered: bool = False
    population: int | None = None  # a forecast is asked for so many users

    def opening(self, config: Config, shared: Sequence[str], users: int, secret: Secret, key: str = "") -> Opening:
        """Return the ledger's opening line; `key` names the run's keys."""
        return Opening(
            unit=self.unit,
            trust=self.trust,
            adjacency=self.adjacency,
            delta=None if self.unit == "none" else self.delta,
            population=users,
            protected=self.protected,
            method=config.method,
            head_policy=self.head_policy,
            personal_covered=self.personal_covered,
            shared_names=list(shared),
            client_sampling=_sampling(config),
            record_sampling="poisson" if self.unit == "record" and self.rate < 1 else "all",
            amplification=self.amplification,
            coefficients=list(self.bands),
            honest=self.honest,
            filter=None if self.filter is None else Filter(order=self.filter.order, epsilon=self.filter.epsilon),
            simulated_population=self.population,
            secret=secret,
            key=key,
        )

    def release(self, number: int, clients: Sequence[int], key: bytes) -> Release:
        """Return the ledger line of a round in which clients protect what they send, or nobody does, before it is
        known what is sent; `key` makes the salt and the name of the noise, not the noise.
        """
        noised = self.noise_multiplier > 0
        steps, head_steps = self.phase_steps if self.unit == "record" else (1, 0)
        return Release(
            round=number,
            mechanism="gaussian" if noised else "none",
            noise_multiplier=self.noise_multiplier,
            clip=self.clip,
            sampling_rate=self.rate,
            steps=steps,
            head_steps=head_steps,
            clients=list(clients),
            salt=derive(key, "participants", number).hex(),
            noise_address=fingerprint(key, "round", number) if noised else "",
            release_hash="0" * 64,
        )


def resolve(config: Config, plan: Plan, users: int) -> Guarantee:
    """Check the setup and calibrate the noise.

    Args:
        config: the run's configuration.
        plan: the method's table; whether personal state feeds back is read off it.
        users: registered clients, a public number.

    Raises:
        PrivacyRefusal: a combination that cannot be claimed, with the sound ways out; delta too large.
        ConfigError: options that do not go together.
    """
    privacy = config.privacy
    check_setup(config, plan)
    protected = {"none": 1, "user": users, "record": users * config.data.max_train}[privacy.unit]
    if privacy.unit != "none":
        check_delta(privacy.delta, protected)
    sends = bool(plan.shared) and config.rounds > 0
    steps = math.ceil(config.local.epochs / privacy.record_rate) if privacy.unit == "record" else 0
    phase_steps = _phase_steps(plan, steps)
    amplification = _amplification(config)
    rate = {"none": 1.0, "clients": config.client_rate, "records": privacy.record_rate}[amplification]
    releases = {"none": 0, "user": config.rounds, "record": config.rounds * max(phase_steps)}[privacy.unit]
    adjacency = _adjacency(config)
    bands: tuple[float, ...] = ()
    if privacy.mechanism == "banded":
        bands = tuple(coefficients(privacy.bands or max(2, period(config.client_rate))).tolist())
    noise, renyi_filter = 0.0, None
    wanted = privacy.noise_multiplier is not None or not math.isinf(privacy.epsilon)
    if privacy.unit != "none" and wanted and sends:
        if privacy.schedule == "signal":
            renyi_filter, noise = choose_filter(privacy.epsilon, privacy.delta, rate, releases)
        elif privacy.noise_multiplier is not None:
            noise = privacy.noise_multiplier
        else:
            noise = _calibrate(config, users, amplification, rate, releases, adjacency, bands)
    if privacy.population is not None:
        noise *= _forecast_scale(config, users)
    cohort = cohort_size(config.client_sampling, config.client_rate, users)
    adaptive = None
    if privacy.adaptive is not None:
        bits = privacy.adaptive.bit_noise or cohort / 20
        split_noise(noise, bits)  # refuses bits that leave nothing for the sum
        adaptive = AdaptiveClip(privacy.adaptive.quantile, privacy.adaptive.rate, bits)
    return Guarantee(
        unit=privacy.unit,
        trust=privacy.trusted,
        clip=privacy.clip,
        noise_multiplier=noise,
        rate=rate,
        releases=releases if sends else 0,
        steps=steps,
        delta=privacy.delta,
        denominator=float(config.local.batch_size) if privacy.unit == "record" else cohort,
        head_policy=_head_policy(plan, privacy.unit),
        adjacency=adjacency,
        protected=protected,
        expected={"none": 1.0, "user": cohort, "record": privacy.record_rate * config.data.max_train}[privacy.unit],
        amplification=amplification,
        server_sums=server_sums(config),
        per_layer=privacy.clipping == "per-layer",
        adaptive=adaptive,
        bands=bands,
        honest=_honest(config, cohort) if privacy.trusted == "user-distributed" else None,
        filter=renyi_filter,
        budget=privacy.epsilon if privacy.stop == "budget" else math.inf,
        phase_steps=phase_steps,
        personal_covered=privacy.unit == "record" and _covered(plan),
        population=privacy.population,
    )


def _amplification(config: Config) -> Amplification:
    """Whose secret sampling may be credited (R3, R7): one coin of one kind, and never against who knows it."""
    privacy = config.privacy
    if privacy.unit == "record":
        return "records"  # whoever sees a client's replies knows that it took part: local sampling alone amplifies
    central = privacy.trusted == "user-central"
    return "clients" if central and privacy.mechanism == "gaussian" and _sampling(config) != "cyclic" else "none"


def _honest(config: Config, cohort: float) -> int:
    """Fewest clients whose noise shares must be enough: never all, as each client can take off its own share."""
    smallest = math.floor(cohort)
    if smallest < 2:
        raise ConfigError(
            f"privacy.trust=user-distributed with rounds of {smallest} clients: nobody's noise would be left for those "
            "who know their own; raise client_rate or data.users."
        )
    return min(max(1, math.floor(config.privacy.honest * smallest)), smallest - 1)


def _adjacency(config: Config) -> str:
    trust, fixed = config.privacy.trusted, _sampling(config) == "fixed"
    if trust == "user-local" or (trust == "user-central" and fixed):
        return REPLACE_ONE
    return {"none": "none", "record": ADD_REMOVE, "user": ZERO_OUT}[config.privacy.unit]


def _sampling(config: Config) -> Sampling:
    return "all" if config.client_rate == 1 else config.client_sampling


def _calibrate(
    config: Config,
    users: int,
    amplification: Amplification,
    rate: float,
    releases: int,
    adjacency: str,
    bands: Sequence[float],
) -> float:
    """Smallest noise multiplier for the worst participation that the sampler allows."""
    target, delta, rounds = config.privacy.epsilon, config.privacy.delta, config.rounds
    if amplification == "clients" and adjacency == REPLACE_ONE:
        sample = int(cohort_size("fixed", config.client_rate, users))
        return calibrate_fixed_size(target, delta, users, sample, rounds)
    if amplification != "none":
        return calibrate(target, delta, rate, releases)
    every = period(config.client_rate) if config.client_sampling == "cyclic" else 1
    pattern = range(1, rounds + 1, every)  # of the first in turn, who takes part most often
    return calibrate_gaussian(
        target, delta, SENSITIVITY[adjacency] * sensitivity(np.array(bands or [1.0]), pattern, rounds)
    )


def _forecast_scale(config: Config, users: int) -> float:
    """How much less noise gives this cohort the noise on the mean that the larger population would have."""
    population = config.privacy.population
    assert population is not None
    if population < users:
        raise ConfigError(
            f"privacy.population={population} is below the {users} registered users; a forecast is for more of them."
        )
    check_delta(config.privacy.delta, population)
    return users / population


def _phase_steps(plan: Plan, steps: int) -> tuple[int, int]:
    """Noised steps of a round on the records behind the shared part, and on those behind personal groups alone; where
    rounds differ, the most.
    """
    shared, head = 0, 0
    for number in range(plan.turns):
        noised = [phase for phase in plan.round if phase.on(number) and plan.protected(phase)]
        counts = {half: sum(2 if p.inner else 1 for p in noised if plan.half(p) == half) for half in HALVES}
        shared, head = max(shared, counts["all"] + counts["shared"]), max(head, counts["head"])
    return steps * shared, steps * head


def _covered(plan: Plan) -> bool:
    """Whether a personal model is a function of noised values alone."""
    later = plan.finish or plan.twins or plan.method.overrides("home")  # which may read records
    return plan.head in {"joint", "split-dp"} and not later


def _head_policy(plan: Plan, unit: Unit) -> str:
    feeding = set(feedback(plan)) & set(plan.groups(PERSONAL))
    fed = f"personal {alias(feedback(plan))}" if feeding else f"own copies of {alias(feedback(plan))}"
    beside = f"; own copies of {alias(plan.twins)} without noise beside it" if plan.twins else ""
    if not plan.shared:
        return "nothing is shared"
    if plan.method.unclaimable:
        return f"nothing can be claimed of this method: {plan.method.unclaimable}"
    moved = {group for phase in plan.round for group in phase.train}
    moving = alias(tuple(group for group in plan.groups(PERSONAL) if group in moved))
    home = "; tuned at home without noise" if plan.finish or plan.method.overrides("home") else ""
    told = (
        "the update that is sent tells it"
        if unit == "none"
        else "sent only inside an update that is clipped and noised"
    )
    if plan.head == "joint" and unit == "record":
        return f"personal {moving} under the same clipping and noise as the shared part; never sent{beside}{home}"
    if plan.head == "split-dp" and unit == "record":
        other = "under noise on one half of the records, the shared on the other"
        return f"personal {moving} {other}; never sent{beside}{home}"
    if plan.head == "split":
        return f"personal {moving} without noise on one half of the records, the shared part on the other; never sent"
    if feedback(plan):
        return f"{fed} without noise, feeding the shared part; {'never sent' if feeding else told}"
    if held := memories(plan):
        return f"{alias(held)} from earlier rounds, feeding the shared part; {told}"
    if plan.method.clusters:
        return f"each user's choice among the shared models, feeding the one it falls on; {told}"
    if plan.twins:
        return f"own copies of {alias(plan.twins)} beside the shared ones, read by nothing that is sent"
    if moving:
        return f"personal {moving} without noise, read by nothing that is sent"
    if late := tuple(dict.fromkeys(group for phase in plan.finish for group in phase.train)):
        return f"personal {alias(late)} trained after the last release only; never sent"
    return "a personal model made at home from what is received; never sent" if home else "no personal state"
