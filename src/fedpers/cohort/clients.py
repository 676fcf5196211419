"""The clients: what is run for users when a message arrives, for many users at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.cohort.batching import epochs, poisson
from fedpers.cohort.local_training import RecordProtection, Stats, train_phase
from fedpers.cohort.model import CohortModel, Parameters
from fedpers.cohort.optimizer import Noise
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config
from fedpers.methods.base import PERSONAL, Phase, Plan
from fedpers.privacy.guarantee import Guarantee
from fedpers.privacy.mechanisms import clip_update, noise_share
from fedpers.privacy.randomness import Part, generator, seed_key, uniforms
from fedpers.tasks.base import Examples

Arrays = Mapping[str, NDArray[np.float32]]
_HALVES = seed_key(0)  # which half of split data a record is in is public


class Clients:
    """Runs a method's phases for cohorts of users. A cohort of one is still a cohort."""

    def __init__(
        self, config: Config, plan: Plan, guarantee: Guarantee, model: CohortModel, store: PersonalStore, secret: bytes
    ) -> None:
        self.config, self.plan, self.guarantee = config, plan, guarantee
        self.model, self.examples, self.store = model, model.examples, store
        self._secret = secret
        self.shared_names = model.names(plan.shared)
        self.phases: Sequence[tuple[int, Phase]] = tuple(enumerate(plan.round))  # with their places in the addresses
        self.stats = Stats()  # the simulator's own channel
        self.nonfinite_updates = 0

    def train_round(self, round_number: int, users: Sequence[int], shared: Arrays) -> dict[str, NDArray[np.float32]]:
        """Run the round's phases for users; returns what they send, (users, out, in) for each shared name.

        New personal state is staged in the store. An update that is not finite is sent as no update at all.
        """
        start = {name: torch.from_numpy(np.array(shared[name])) for name in self.shared_names}
        replies: dict[str, list[NDArray[np.float32]]] = {name: [] for name in self.shared_names}
        for cohort in self._cohorts(users):
            kept = self.store.read(cohort)
            personal = {name: value for name, value in kept.items() if name not in self.shared_names}
            parameters = self.model.broadcast(len(cohort), start) | personal
            # with the user's own copies of shared groups, where the method keeps any
            copies = self.model.broadcast(len(cohort), start) | kept if self.plan.twins else parameters
            before, before_copies = _clone(parameters), _clone(copies)
            received = self.model.broadcast(len(cohort), start)
            for index, phase in self.phases:
                address = ("round", round_number, index)
                if phase.own:
                    self.stats.add(self._train(copies, cohort, phase, address, anchors=received))
                else:
                    self.stats.add(self._train(parameters, cohort, phase, address))
            self._reset_nonfinite(parameters, before)
            self._reset_nonfinite(copies, before_copies)
            self.store.stage(cohort, {name: (parameters if name in personal else copies)[name] for name in kept})
            for name, sent in self._outgoing(cohort, round_number, parameters, received).items():
                replies[name].append(sent)
        return {name: np.concatenate(parts) for name, parts in replies.items()}

    def _outgoing(
        self, cohort: list[int], round_number: int, parameters: Parameters, received: Parameters
    ) -> dict[str, NDArray[np.float32]]:
        """Return what the cohort's clients send, (clients, out, in): where a client does not trust the server alone,
        its clipped update with its own noise, or its share of the noise.
        """
        sent = {name: parameters[name].numpy() for name in self.shared_names}
        guarantee = self.guarantee
        if guarantee.trust not in {"user-local", "user-distributed"}:
            return sent
        assert guarantee.clip is not None
        shapes = {name: tuple(self.model.initial[name].shape) for name in self.shared_names}
        result = {name: np.array(received[name].numpy()) for name in self.shared_names}
        for place, user in enumerate(cohort):
            update = {name: sent[name][place] - result[name][place] for name in sent}
            clipped, _ = clip_update(update, guarantee.clip, guarantee.per_layer)
            rng = generator(self._secret, "user-noise", round_number, self.examples.users[user])
            noise = noise_share(shapes, guarantee.clip, guarantee.noise_multiplier, guarantee.honest or 1, rng)
            for name in sent:
                result[name][place] += (clipped[name] + noise[name]).astype(np.float32)
        return result

    def finish(
        self, users: Sequence[int], shared: Arrays, personal: PersonalStore | None
    ) -> Iterator[tuple[list[int], Parameters]]:
        """Train at home after the last release; yields cohorts and their own models.

        `personal` holds the state from the rounds; None starts at the public initial values (the local-only baseline).
        """
        start = {name: torch.from_numpy(np.array(value)) for name, value in shared.items()}
        for cohort in self._cohorts(users):
            parameters = self.model.broadcast(len(cohort), start)
            if personal is not None:
                parameters.update(personal.read(cohort))
            before = _clone(parameters)
            for index, phase in enumerate(self.plan.finish):
                self._train(parameters, cohort, phase, ("finish", index), at_home=True)
            self._reset_nonfinite(parameters, before)
            yield cohort, parameters

    def with_plan(self, plan: Plan) -> Clients:
        """The same clients under another method's table; the same random numbers make the two comparable."""
        return Clients(self.config, plan, self.guarantee, self.model, self.store, self._secret)

    def _cohorts(self, users: Sequence[int]) -> Iterator[list[int]]:
        size = self.config.engine.cohort_size
        for start in range(0, len(users), size):
            yield list(users[start : start + size])

    def _train(
        self,
        parameters: Parameters,
        cohort: list[int],
        phase: Phase,
        address: tuple[Part, ...],
        at_home: bool = False,
        anchors: Parameters | None = None,
    ) -> Stats:
        personal = at_home or phase.own or all(self.plan.scopes[group] is PERSONAL for group in phase.train)
        settings = self.config.personal if personal else self.config.local
        examples = self.examples if at_home else self._half(phase)
        protection = None
        if self.guarantee.unit == "record" and not at_home and self.plan.protected(phase):
            steps = poisson(examples, cohort, self.guarantee.steps, self.guarantee.rate, self._secret, address)
            protection = self._protection(cohort, phase, address)
        else:
            steps = epochs(examples, cohort, settings.epochs, settings.batch_size, self._secret, address)
        pull = None
        if personal and self.config.personal.l2 > 0:
            if anchors is None:
                anchors = parameters if at_home else self.model.broadcast(len(cohort))
            pull = (self.config.personal.l2, {name: anchors[name].clone() for name in self.model.names(phase.train)})
        return train_phase(self.model, parameters, phase.train, steps, settings, pull=pull, protection=protection)

    def _half(self, phase: Phase) -> Examples:
        """The examples that a round phase may train on: all, or one half of each user's, by record id alone."""
        half = self.plan.half(phase)
        if half == "all":
            return self.examples
        coins = uniforms(_HALVES, ("half",), self.examples.ids)[:, 0] < 0.5
        behind_head = coins if half == "head" else ~coins
        return replace(self.examples, train=tuple(rows[behind_head[rows]] for rows in self.examples.train))

    def step_noise(self, cohort: list[int], phase: Phase, address: tuple[Part, ...]) -> Noise:
        """Return the standard normal noise of a phase by step, one tensor (clients, out, in) for each trained array."""
        shapes = [self.model.initial[name].shape for name in self.model.names(phase.train)]

        def noise(step: int) -> list[Tensor]:
            draws = [
                generator(self._secret, *address, "noise", self.examples.users[user], step).standard_normal(
                    sum(math.prod(shape) for shape in shapes)
                )
                for user in cohort
            ]
            flat = torch.from_numpy(np.stack(draws).astype(np.float32))
            parts = torch.split(flat, [math.prod(shape) for shape in shapes], dim=1)
            return [part.reshape(len(cohort), *shape) for part, shape in zip(parts, shapes, strict=True)]

        return noise

    def _protection(self, cohort: list[int], phase: Phase, address: tuple[Part, ...]) -> RecordProtection:
        assert self.guarantee.clip is not None
        return RecordProtection(
            clip=self.guarantee.clip,
            noise_multiplier=self.guarantee.noise_multiplier,
            lot_size=self.guarantee.denominator,
            noise=self.step_noise(cohort, phase, address),
            per_layer=self.guarantee.per_layer,
        )

    def _reset_nonfinite(self, parameters: Parameters, before: Parameters) -> None:
        """Undo a client's whole training if any number of it is not finite; the others are not touched."""
        bad = torch.zeros(len(next(iter(parameters.values()))), dtype=torch.bool)
        for value in parameters.values():
            bad |= ~torch.isfinite(value).flatten(1).all(dim=1)
        if bad.any():
            self.nonfinite_updates += int(bad.sum())
            for name, value in parameters.items():
                value[bad] = before[name][bad]


def _clone(parameters: Parameters) -> Parameters:
    return {name: value.clone() for name, value in parameters.items()}
