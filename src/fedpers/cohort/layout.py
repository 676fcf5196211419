"""Which arrays travel, which stay: a method's table laid out over the arrays of a model.

Shared arrays travel under their own names; companions as "kind.array"; the versions of a clustered method as
"cluster0.array", "cluster1.array", ... A name tells what an array is, never its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.cohort.model import CohortModel
from fedpers.config import Config
from fedpers.errors import ConfigError
from fedpers.models.adapters import first_factor
from fedpers.plan import Plan
from fedpers.privacy.randomness import generator, seed_key
from fedpers.visit import Arrays, Service

SPREAD = 0.1  # of the first values of a clustered method's models, in units of a factor A's: alike, nobody could choose


@dataclass(frozen=True)
class Layout:
    """The arrays of a run.

    Attributes:
        plan: the method's table.
        initial: public initial value of every array of the model, (out, in).
        group: the parameter group of every array of the model.
        scaling: what the product of LoRA factors is multiplied by.
        key: the public key of initial values.
        rounds: of the whole run.
    """

    plan: Plan
    initial: Mapping[str, Tensor]
    group: Mapping[str, str]
    scaling: float
    key: bytes
    rounds: int

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """Names of the model's shared arrays."""
        return self._named(self.plan.shared)

    @cached_property
    def down(self) -> tuple[str, ...]:
        """Names of all that the server sends."""
        return tuple(sorted(name for array in self.shared for name in self._wire(array)))

    def up(self, number: int) -> tuple[str, ...]:
        """Names of all that a client sends in a round."""
        return tuple(sorted(name for array in self._named(self.plan.sent(number)) for name in self._wire(array)))

    @property
    def clusters(self) -> int:
        """How many versions of the shared arrays there are; 0 where the method has no clusters."""
        option = self.plan.method.clusters
        if not option:
            return 0
        count = int(self.plan.options[option])
        if count < 2 or count != self.plan.options[option]:
            raise ConfigError(f"options.{option} = {self.plan.options[option]:g}: expected a whole number from 2 on.")
        return count

    def broadcast(self) -> Arrays:
        """Return what the server sends first."""
        found = {}
        for array in self.shared:
            first = self.initial[array].numpy()
            for name in self._wire(array):
                value = first
                if name.partition(".")[0] in self.plan.method.travels:
                    value = np.zeros_like(first)
                elif self.clusters:
                    bound = SPREAD / np.sqrt(first.shape[1])
                    value = first + generator(self.key, "initial", name).uniform(-bound, bound, first.shape)
                found[name] = value.astype(np.float32)
        return dict(sorted(found.items()))

    def kept(self) -> dict[str, Tensor]:
        """Return the first values of a user's personal state, (out, in)."""
        kinds = self.plan.method.remembers
        companions = {f"{kind}.{a}": torch.zeros_like(self.initial[a]) for a in self.shared for kind in kinds}
        return self.of(self.plan.kept) | companions

    def of(self, groups: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the public initial values of these groups' arrays, (out, in)."""
        return {name: self.initial[name] for name in self._named(groups)}

    def common(self, arrays: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """Return the shared model that somebody without records would use, by the model's names; the mean of all
        versions of a clustered method.
        """
        if not self.clusters:
            return {name: arrays[name] for name in self.shared if name in arrays}
        return {
            name: np.mean([self.version(arrays, place)[name] for place in range(self.clusters)], axis=0)
            for name in self.shared
        }

    def version(self, arrays: Mapping[str, NDArray[np.float32]], place: int) -> Arrays:
        """Return one version of a clustered method's shared arrays, by the model's names."""
        return {name: arrays[f"cluster{place}.{name}"] for name in self.shared}

    def service(self, number: int, broadcast: Arrays) -> Service:
        """Return what the server functions see in a round."""

        def fresh(name: str) -> NDArray[np.float32]:
            return first_factor(tuple(self.initial[name].shape), self.key, "initial", name, number)

        public = {name: value.numpy() for name, value in self.initial.items()}
        return Service(self.plan.options, number, self.rounds, self.scaling, broadcast, public, fresh)

    def _named(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name, group in self.group.items() if group in groups)

    def _wire(self, array: str) -> list[str]:
        if self.clusters:
            return [f"cluster{place}.{array}" for place in range(self.clusters)]
        return [array, *(f"{kind}.{array}" for kind in self.plan.method.travels)]


def layout(config: Config, plan: Plan, model: CohortModel) -> Layout:
    """Lay a method's table out over a model."""
    return Layout(plan, model.initial, model.group, model.scaling, seed_key(config.seed), config.rounds)
