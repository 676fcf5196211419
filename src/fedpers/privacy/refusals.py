"""Setups that are refused because no amount of noise makes their claim true; none of this needs data.

The numbers in brackets, R1 to R16, name the refusals; `tests/test_refusals.py` has a test for each.
"""

from __future__ import annotations

import math

from fedpers.config import Config
from fedpers.errors import ConfigError, PrivacyRefusal
from fedpers.methods.base import PERSONAL
from fedpers.plan import Plan, alias, starved
from fedpers.privacy.dataflow import feedback, leaks, memories

# Strategies that see only the mean of the replies; under user-level noise they are post-processing of that mean.
OF_THE_MEAN = ("FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi")
# Strategies that look at single replies.
OF_SINGLE_REPLIES = ("Krum", "MultiKrum", "Bulyan", "FedMedian", "FedTrimmedAvg")


def check_setup(config: Config, plan: Plan) -> None:
    """Refuse what cannot be claimed, and options that contradict each other.

    Raises:
        PrivacyRefusal: the setup would give a false claim; the message names the sound ways out.
        ConfigError: options that do not go together or would have no effect.
    """
    _check_accountant(config)
    _check_strategy(config)
    _check_method(config, plan)
    _check_feedback(config, plan)
    _check_sampling(config, plan)
    _check_options(config)


def server_sums(config: Config) -> bool:
    """Whether the server's strategy gets one mean in the place of the clients' replies."""
    privacy = config.privacy
    return privacy.trusted in {"user-central", "user-distributed"} or (
        privacy.unit == "none" and privacy.clip is not None
    )


def _check_accountant(config: Config) -> None:
    """R14: the central limit theorem makes GDP optimistic, by a third in places."""
    name = config.privacy.accountant
    if name == "gdp":
        raise PrivacyRefusal(
            "privacy.accountant = 'gdp' is an approximation that reports less epsilon than is spent (1.10 for 1.64 at "
            "rate 0.001, noise 0.7, 10,000 steps), so it can be no claim; leave privacy.accountant out (pld)."
        )
    if name != "pld":
        raise ConfigError(
            f"privacy.accountant = {name!r} is reported beside every claim as a cross-check and is never the claim; "
            "leave privacy.accountant out (pld)."
        )


def _check_strategy(config: Config) -> None:
    """R16 and R8: what the server's optimizer may see."""
    name = config.server.strategy
    if name in OF_SINGLE_REPLIES:
        if server_sums(config):
            trust = config.privacy.trusted
            why, out = (
                ("privacy.clip makes the server give it one mean", "leave privacy.clip out")
                if trust == "none"
                else (
                    f"user-level privacy with trust {trust} gives it the noised mean alone",
                    "let clients protect what they send (privacy.trust=user-local, or privacy.unit=record)",
                )
            )
            raise PrivacyRefusal(
                f"server.strategy = {name!r} looks at single replies, but {why}; choose one of "
                f"{', '.join(OF_THE_MEAN)}, or {out}."
            )
    elif name not in OF_THE_MEAN:
        raise ConfigError(
            f"server.strategy = {name!r}: expected one of {', '.join(OF_THE_MEAN)}, or, where clients protect what "
            f"they send or nothing is claimed, {', '.join(OF_SINGLE_REPLIES)}."
        )


def _check_method(config: Config, plan: Plan) -> None:
    """What a method does beyond its phases, and who may see it."""
    method, privacy, name = plan.method, config.privacy, plan.name
    if method.unclaimable and privacy.unit != "none":
        raise PrivacyRefusal(
            f"method {name!r} with privacy.unit={privacy.unit} is refused: {method.unclaimable}; no noise that is "
            "planned here covers that. Set privacy.unit=none, or choose another method (`fedpers methods`)."
        )
    if method.overrides("combine") and server_sums(config):
        out = "leave privacy.clip out" if privacy.unit == "none" else "let clients protect what they send"
        ways = "" if privacy.unit == "none" else " (privacy.trust=user-local, or privacy.unit=record)"
        raise PrivacyRefusal(
            f"method {name!r} is refused: its server step looks at single replies, but with privacy.clip and trust "
            f"{privacy.trusted} the server goes on from one clipped and noised mean alone; {out}{ways}."
        )
    if method.everyone and server_sums(config):
        raise PrivacyRefusal(f"method {name!r} takes its own part off the plain mean of all; leave privacy.clip out.")
    if method.clusters and config.server.strategy in OF_SINGLE_REPLIES:
        raise ConfigError(
            f"server.strategy = {config.server.strategy!r}: method {name!r} sends back what a client did not choose "
            f"as it was, which such a rule takes for what most say; choose one of {', '.join(OF_THE_MEAN)}."
        )
    own = method.overrides("combine", "serve") or method.travels or method.everyone
    if own and config.server.strategy != "FedAvg":
        raise ConfigError(
            f"server.strategy = {config.server.strategy!r}: method {name!r} has a server step of its own, which goes "
            "on from the plain mean; leave server.strategy out (FedAvg)."
        )
    if method.sgd and "adam" in {config.local.optimizer, config.personal.optimizer}:
        raise ConfigError(
            f"method {name!r} is for plain gradient steps; set local.optimizer=sgd and personal.optimizer=sgd."
        )
    if method.everyone and config.client_rate < 1:
        raise ConfigError(f"method {name!r} needs every client in every round; set client_rate=1.")
    if plan.turns > 1 and privacy.mechanism == "banded":
        raise ConfigError(
            f"privacy.mechanism=banded: method {name!r} sends other arrays from round to round, and correlated noise "
            "needs the same; leave privacy.mechanism out."
        )


def _check_feedback(config: Config, plan: Plan) -> None:
    """R1 and R2: noise on the shared part covers nothing that flows through state trained without noise."""
    unit, head = config.privacy.unit, config.privacy.head
    if head in {"joint", "split-dp"} and unit != "record":
        raise ConfigError(
            f"privacy.head={head} trains personal groups under record-level noise, but privacy.unit is {unit}; leave "
            "it out. Whole users are protected whatever a personal head does."
        )
    if head != "method" and not plan.shared:
        raise ConfigError(f"privacy.head={head}: method {plan.name!r} shares nothing; leave it out.")
    if unit != "record" or not leaks(plan):
        return
    path = " -> ".join(str(state) for state in leaks(plan)[0])
    groups = feedback(plan)
    if not set(groups) & set(plan.groups(PERSONAL)):
        raise PrivacyRefusal(
            f"method {plan.name!r} with privacy.unit=record is refused ({path}): the noise on a client's steps "
            "does not cover this way from the records into what is sent: one record could change it by more than is "
            "claimed. Protect whole users, where the whole of what a client sends is clipped: privacy.unit=user."
        )
    heads = alias(groups)
    if head == "split":
        raise PrivacyRefusal(
            f"method {plan.name!r} with privacy.head=split and privacy.unit=record is refused ({path}): noise protects "
            f"only the half of the records that the shared {alias(plan.shared)} is trained on; the half behind "
            f"the {heads} gets no guarantee at all. Train that half under noise, too: privacy.head=split-dp."
        )
    babu, tune = "", ""
    if groups == ("head",):
        babu, tune = ", or method=fedbabu", ", or method=fedavg-finetune, which tunes a shared head at home afterwards"
    ways = [
        f"keep the {heads} at its public value until the last release: privacy.head=frozen{babu}",
        f"train the {heads} under the same clipping and noise: privacy.head=joint{tune}",
        f"protect whole users, where a personal {heads} may stay noise-free: privacy.unit=user",
    ]
    if starved(plan.shared, groups):
        del ways[0]
    ways_out = {2: "Two", 3: "Three"}[len(ways)]
    raise PrivacyRefusal(
        f"method {plan.name!r} with privacy.unit=record is refused ({path}): the personal {heads} is trained without "
        f"noise on the same records and feeds the gradients of the shared {alias(plan.shared)}, so one record "
        f"changes the gradients of all the others and the true epsilon is far above the claimed one. {ways_out} sound "
        f"ways out: {'; '.join(f'({number}) {way}' for number, way in enumerate(ways, start=1))}."
    )


def _check_sampling(config: Config, plan: Plan) -> None:
    """R3: an accountant only for the sampler that is really run."""
    privacy, sampling = config.privacy, config.client_sampling
    random = config.client_rate < 1 and sampling == "poisson"
    if privacy.mechanism == "banded" and config.client_rate < 1 and sampling != "cyclic":
        raise PrivacyRefusal(
            f"privacy.mechanism=banded with {sampling} client sampling: correlated noise is accounted for rounds that "
            "are known beforehand, without amplification; set client_sampling=cyclic, or client_rate=1."
        )
    fixed = sampling == "fixed" and config.client_rate < 1
    if privacy.trusted == "user-central" and fixed and memories(plan):
        raise PrivacyRefusal(
            f"client_sampling=fixed with method {plan.name!r}: {alias(memories(plan))} of the "
            "others remembers when they were drawn, and with a fixed number of places that tells who else was, so the "
            "drawing is no longer secret; set client_sampling=poisson, where every coin is its own."
        )
    if privacy.trusted == "user-distributed" and random:
        raise PrivacyRefusal(
            "privacy.trust=user-distributed with Poisson client sampling: the shares of a round with few clients would "
            "add up to too little noise; set client_sampling=fixed or cyclic, or client_rate=1."
        )


def _check_options(config: Config) -> None:
    privacy = config.privacy
    central = privacy.trusted == "user-central"
    special = {
        "privacy.adaptive": privacy.adaptive is not None,
        "privacy.mechanism=banded": privacy.mechanism == "banded",
        "privacy.schedule=signal": privacy.schedule == "signal",
        "privacy.population": privacy.population is not None,
    }
    asked = [name for name, given in special.items() if given]
    if asked and not central:
        raise ConfigError(f"{asked[0]} belongs to privacy.unit=user with trust user-central, not {privacy.trusted}.")
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} are not accounted together; choose one.")
    if asked and asked != ["privacy.mechanism=banded"] and config.client_sampling != "poisson":
        raise ConfigError(f"{asked[0]} goes with Poisson client sampling; leave client_sampling out.")
    if privacy.bands is not None and privacy.unit != "none" and privacy.mechanism != "banded":
        raise ConfigError("privacy.bands shapes banded noise only; set privacy.mechanism=banded, or leave it out.")
    if privacy.population is not None and privacy.stop == "budget":
        raise ConfigError(
            "privacy.population scales the noise down, so privacy.stop=budget would end the run before its first "
            "round; leave privacy.stop out."
        )
    asks = not math.isinf(privacy.epsilon) or privacy.noise_multiplier is not None
    if asked and not asks:
        raise ConfigError(f"{asked[0]} says how noise is used, but there is none; set privacy.epsilon.")
    if privacy.noise_multiplier is not None:
        if privacy.unit == "none":
            raise ConfigError("privacy.noise_multiplier needs privacy.unit record or user.")
        if not math.isinf(privacy.epsilon) and privacy.stop != "budget":
            raise ConfigError(
                f"privacy.noise_multiplier={privacy.noise_multiplier:g} and privacy.epsilon={privacy.epsilon:g}: one "
                "follows from the other; leave one out, or set privacy.stop=budget to end when epsilon is spent."
            )
        if privacy.schedule == "signal" or privacy.population is not None:
            raise ConfigError(f"privacy.noise_multiplier cannot be given with {asked[0]}; give privacy.epsilon.")
