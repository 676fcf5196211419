"""How many clients train together and how long a pass is: found by trying, on the people and the machine at hand."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from fedpers.cohort.batching import epochs
from fedpers.cohort.gradients import RecordProtection
from fedpers.cohort.local_training import train_phase
from fedpers.cohort.model import CohortModel
from fedpers.config import Config
from fedpers.config.run import EngineConfig
from fedpers.plan import Plan
from fedpers.privacy.randomness import seed_key

BUDGETS = (512, 1024, 2048, 4096)  # padded tokens of a pass
SIZES = (16, 64, 256)  # clients of a cohort
PEOPLE, STEPS = 256, 2  # whom it is tried on, and how many steps each makes
REPEATS = 2  # of which the faster counts: others on the machine only ever slow a try down
WORTH = 0.95  # of the time of what is set already: less is noise


@dataclass(frozen=True)
class Choice:
    """What was chosen, and the seconds of each try, by the number that was tried."""

    token_budget: int
    cohort_size: int
    budgets: dict[int, float]
    sizes: dict[int, float]

    def to_json(self) -> str:
        """Return text for a file; JSON has no numbers as keys, so they become strings."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def apply(self, config: Config) -> Config:
        """Return the configuration with what was chosen."""
        sizes = {"token_budget": self.token_budget, "cohort_size": self.cohort_size}
        return config.model_copy(update={"engine": config.engine.model_copy(update=sizes)})


def from_json(text: str) -> Choice:
    """Read what `Choice.to_json` wrote. Raises ValueError or KeyError for a damaged text."""
    tree = json.loads(text)
    EngineConfig(token_budget=tree["token_budget"], cohort_size=tree["cohort_size"])  # within their bounds
    tried = ({int(size): float(seconds) for size, seconds in tree[key].items()} for key in ("budgets", "sizes"))
    return Choice(int(tree["token_budget"]), int(tree["cohort_size"]), *tried)


def tune(model: CohortModel, plan: Plan, config: Config) -> Choice:
    """Train some people for a few steps, each time from the public initial values, and keep what is fastest.

    Nothing of this is released or kept but the choice and its times. They hang on how long people's texts are, so they
    belong to the private part of a run.
    """
    people = [user for user in model.examples.people if len(model.examples.train[user])][:PEOPLE]
    groups = sorted({group for phase in (*plan.round, *plan.finish) for group in phase.train} - {"residual"})
    engine = config.engine

    def seconds(budget: int, size: int, users: Sequence[int]) -> float:
        model.budget = budget
        began = time.perf_counter()
        for start in range(0, len(users), size):
            cohort = users[start : start + size]
            steps = epochs(model.examples, cohort, 1, config.local.batch_size, seed_key(config.seed), ("tune",))[:STEPS]
            weights = model.broadcast(len(cohort))
            protection = None
            if config.privacy.unit == "record":
                protection = RecordProtection(config.privacy.clip or 1.0, 0.0, 1.0, _no_noise)
            train_phase(model, weights, groups, steps, config.local, protection=protection)
        return time.perf_counter() - began

    before = model.budget
    try:
        seconds(engine.token_budget, engine.cohort_size, people[: engine.cohort_size])  # the first is slower
        some = people[: min(64, len(people))]
        budgets = dict.fromkeys(sorted({engine.token_budget, *BUDGETS}), np.inf)
        for _ in range(REPEATS):
            budgets |= {one: min(best, seconds(one, len(some), some)) for one, best in budgets.items()}
        budget = _best(budgets, engine.token_budget)
        possible = {size for size in SIZES if size < len(people)}
        sizes = dict.fromkeys(sorted({engine.cohort_size, *possible}), np.inf)
        for _ in range(REPEATS):
            sizes |= {one: min(best, seconds(budget, one, people)) for one, best in sizes.items()}
    finally:
        model.budget = before
    return Choice(budget, _best(sizes, engine.cohort_size), budgets, sizes)


def _best(tried: dict[int, float], given: int) -> int:
    fastest = min(tried, key=lambda one: tried[one])
    return fastest if tried[fastest] < WORTH * tried[given] else given


def _no_noise(step: int) -> Sequence[torch.Tensor]:
    raise AssertionError("noise is drawn for nothing that is released, and tuning releases nothing")
