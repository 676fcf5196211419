"""What is compared: sizes, privacy levels, the configuration of every run, and the grid that all methods search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from fedpers.config import Config, parse_config
from fedpers.errors import ConfigError, PrivacyRefusal
from fedpers.experiment import method_plan
from fedpers.methods.base import PERSONAL as OWN
from fedpers.methods.base import Phase
from fedpers.plan import Plan
from fedpers.privacy.guarantee import resolve

DELTA = 1e-3  # must stay below one over the users of a federation, which is 1/64 at most
EPOCHS = 1  # passes over a client's records in a phase of a round
STEPS = (1 / 3, 1.0, 3.0)  # factors on the step sizes of a round
HOME = (1.0, 3.0)  # factors on the step sizes of personal state
FINER = (0.2, 1 / 3, 0.6, 1.0, 1.8, 3.0)  # for a method that has one of the two, and nothing else to choose
OPTIONS: Mapping[str, Mapping[str, float]] = {  # what is tried beside a method's own defaults; else half the first one
    "fedala": {"eta": 10.0},
    "fedprox": {"mu": 1.0},
    "ifca": {"clusters": 3.0},
    "pfedme": {"eta": 1.0},
}
CLIPS = (0.1, 0.3, 1.0)
LOCAL = {"adapter": 0.3, "norm": 0.1, "head": 0.03}  # step sizes; the middle of what does well on development users
PERSONAL = {"adapter": 0.03, "norm": 0.01, "head": 0.003}
PULL = 0.5  # personal.l2, as in experiments/tune_chitchat.py


@dataclass(frozen=True)
class Size:
    """How large a comparison is."""

    data: str
    users: int | None  # of each federation; None for all
    records: int
    test_records: int
    tokens: int
    layers: int
    rounds: int
    seeds: int
    epsilons: tuple[float, ...]

    @property
    def levels(self) -> dict[str, float]:
        """Names of the privacy levels, and their epsilons."""
        return {"none" if math.isinf(one) else f"user-eps-{one:g}": one for one in self.epsilons}


SIZES = {
    "tiny": Size("synthetic", 8, 12, 12, 16, 1, 2, 1, (math.inf, 8.0)),
    "default": Size("chitchat", 64, 30, 20, 32, 1, 4, 3, (math.inf, 8.0)),
    "full": Size("chitchat", None, 30, 20, 32, 2, 4, 5, (math.inf, 8.0, 2.0)),
}


def configure(
    size: Size,
    backbone: str,
    method: str,
    *,
    seed: int = 0,
    setting: Mapping[str, Any] | None = None,
    privacy: Mapping[str, Any] | None = None,
    development: bool = False,
) -> Config:
    """Return the configuration of one run.

    Args:
        size: how large.
        backbone: whose top layers are adapted.
        method: its name.
        seed: of people, candidates and initial values.
        setting: a point of the grid: `step` and `home`, factors on step sizes, and `options`.
        privacy: the section of this name; by default none.
        development: on the development users instead of a federation.
    """
    chosen: dict[str, Any] = {"step": 1.0, "home": 1.0, "options": {}} | dict(setting or {})
    local = {family: rate * chosen["step"] for family, rate in LOCAL.items()}
    personal = {family: rate * chosen["home"] for family, rate in PERSONAL.items()}
    people = {"people": "development"} if development else {}
    tree: dict[str, Any] = {
        "name": method,
        "method": method,
        "seed": seed,
        "options": chosen["options"],
        "rounds": size.rounds,
        "data": {
            "name": size.data,
            "users": None if development and size.data != "synthetic" else size.users,
            "max_train": size.records,
            "max_test": size.test_records,
            "max_tokens": size.tokens,
            **({"min_train": 4, "min_test": 3} if size.data == "synthetic" else {}),
            **people,
        },
        "model": {
            "backbone": backbone,
            "adapter": {"layers": size.layers, "rank": 2, "alpha": 4, "targets": ["value"]},
        },
        "local": {"epochs": EPOCHS, "batch_size": 8, "lr": local},
        # All that a method makes personal is personal: a head alone would take their adapters from half the methods.
        "personal": {"batch_size": 8, "lr": personal, "l2": PULL, "groups": "adapter+norm+head"},
        "privacy": dict(privacy or {}),
        # One thread: two runs go on at a time. Large cohorts in small microbatches are the fastest on a CPU.
        "engine": {"threads": 1, "cohort_size": 64, "token_budget": 2048},
        "evaluation": {"every": 0, "local_only": False},
    }
    plan = method_plan(method, parse_config(tree))
    tree["personal"]["epochs"] = EPOCHS if any(_of_personal(plan, phase) for phase in plan.round) else (
        EPOCHS * size.rounds
    )  # fmt: skip
    return parse_config(tree)


def user_level(epsilon: float, clip: float) -> dict[str, Any]:
    """Return the privacy section of a run; nothing for an infinite epsilon."""
    return {} if math.isinf(epsilon) else {"unit": "user", "epsilon": epsilon, "delta": DELTA, "clip": clip}


def rehearsal(size: Size, backbone: str, epsilon: float, clip: float, members: int, others: int) -> dict[str, Any]:
    """Return the privacy section for `others` development users whose mean update gets the noise, per round, that
    `members` of a federation would get at this epsilon.
    """
    planned = configure(size, backbone, "fedavg", privacy=user_level(epsilon, clip))
    noise = resolve(planned, method_plan("fedavg", planned), members).noise_multiplier
    return {"unit": "user", "noise_multiplier": noise * others / members, "delta": DELTA, "clip": clip}


def settings(plan: Plan) -> list[dict[str, Any]]:
    """Return the points that are tried, as many for every method: step sizes, and one thing of the method's own."""
    at_home = bool(plan.finish) or any(_of_personal(plan, phase) for phase in plan.round)
    step = "home" if all(_of_personal(plan, phase) for phase in plan.round) else "step"
    if plan.options:
        first, value = next(iter(plan.method.options.items()))
        second: list[dict[str, Any]] = [{}, {"options": dict(OPTIONS.get(plan.name, {first: value / 2}))}]
    elif at_home and step == "step":
        second = [{"home": factor} for factor in HOME]
    else:
        return [{step: factor} for factor in FINER]
    return [{step: factor, **more} for factor, more in product(STEPS, second)]


def passes(plan: Plan, config: Config) -> float:
    """Return how many gradients a client takes on each of its records, in the rounds and at home."""
    in_rounds = sum(
        (config.personal.epochs if _of_personal(plan, phase) else 1 if phase.blend else config.local.epochs)
        * (2 if phase.inner else 1)
        for number in range(1, config.rounds + 1)
        for phase in plan.round
        if phase.on(number)
    )
    return in_rounds + config.personal.epochs * len(plan.finish)


def refusals(size: Size, backbone: str, methods: list[str], members: int) -> dict[str, dict[str, str]]:
    """Return by privacy level the methods that must not or cannot run, and why. Reads no record."""
    found: dict[str, dict[str, str]] = {level: {} for level in size.levels}
    for level, epsilon in size.levels.items():
        for method in methods:
            try:
                config = configure(size, backbone, method, privacy=user_level(epsilon, CLIPS[0]))
                resolve(config, method_plan(method, config), members)
            except (PrivacyRefusal, ConfigError) as refusal:
                found[level][method] = str(refusal)
    return found


def _of_personal(plan: Plan, phase: Phase) -> bool:
    """Whether a phase of a round trains with the settings under `personal`."""
    return phase.own or all(plan.scopes[group] is OWN for group in phase.train)
