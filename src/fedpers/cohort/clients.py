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
from fedpers.cohort.gradients import RecordProtection
from fedpers.cohort.layout import layout
from fedpers.cohort.local_training import Stats, train_phase
from fedpers.cohort.model import CohortModel, Parameters
from fedpers.cohort.optimizer import Noise
from fedpers.cohort.personal_store import PersonalStore
from fedpers.cohort.rules import step_rule, unmoved
from fedpers.cohort.visits import Choice, arrive, clone, leave, repeat
from fedpers.config import Config, LearningRates, TrainConfig
from fedpers.methods.base import PERSONAL, Method, Phase
from fedpers.plan import Plan
from fedpers.population import OnDemand
from fedpers.privacy.guarantee import Guarantee
from fedpers.privacy.mechanisms import clip_update, noise_share
from fedpers.privacy.randomness import Part, generator, seed_key, uniforms
from fedpers.tasks.base import Examples
from fedpers.visit import Visit

Arrays = Mapping[str, NDArray[np.float32]]
_HALVES = seed_key(0)  # which half of split data a record is in is public


class Clients:
    """Runs a method's phases for cohorts of users. A cohort of one is still a cohort."""

    def __init__(
        self, config: Config, plan: Plan, guarantee: Guarantee, model: CohortModel, store: PersonalStore, secret: bytes
    ) -> None:
        self.config, self.plan, self.guarantee = config, plan, guarantee
        self.model, self.store = model, store
        self._examples: Examples | None = None
        self._secret = secret
        self.layout = layout(config, plan, model)
        self.shared_names = self.layout.down
        self.phases: Sequence[tuple[int, Phase]] = tuple(enumerate(plan.round))  # with their places in the addresses
        self.stats = Stats()  # the simulator's own channel
        self.nonfinite_updates = 0
        self.noise: dict[str, Tensor] = {}  # of the clients' own making in the last round, added up over them

    @property
    def examples(self) -> Examples:
        """The records that are trained on: the model's, unless others are set."""
        return self.model.examples if self._examples is None else self._examples

    @examples.setter
    def examples(self, examples: Examples) -> None:
        self._examples = examples

    def train_round(self, round_number: int, users: Sequence[int], shared: Arrays) -> dict[str, NDArray[np.float32]]:
        """Run the round's phases for users; returns what they send, (users, out, in) for each name that travels up.

        New personal state is staged in the store. An update that is not finite is sent as no update at all.
        """
        if self.plan.method.pooled:
            return self._pooled_round(round_number, users, shared)
        names, method = self.layout.up(round_number), self.plan.method
        wire = {name: torch.from_numpy(np.array(shared[name])) for name in self.shared_names}
        replies: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
        self.noise = {}
        for cohort in self._cohorts(users):
            kept = self.store.read(cohort)
            visit, chosen = self._arrive(round_number, cohort, wire, kept)
            local, memory = clone(visit.local), clone(visit.memory)
            own = local if visit.own is visit.local else clone(visit.own)
            method.begin(visit)
            if not method.overrides("end"):
                local = clone(visit.local)  # sent as it is if training breaks
            for index, phase in self.phases:
                if phase.on(round_number):
                    found = self._train(visit, cohort, phase, ("round", round_number, index))
                    self.stats.add(found)
                    if not method.overrides("gradient", "end"):  # which may make anything of it
                        self._note({name: value.sum(dim=0) for name, value in found.noise.items() if name in names})
            # What stays at home and broke is no reason to send nothing: what is sent must not depend on it.
            if visit.own is not visit.local:
                torn = _broken(visit.own)
                self.nonfinite_updates += int(torn.sum())
                _reset(torn, (visit.own, own))
            personal = {n: local[n] for n in self.model.names(self.plan.groups(PERSONAL))}
            worn = _broken({n: visit.local[n] for n in personal or local})
            _reset(worn, (visit.local, personal))
            if method.keeps:
                visit.own.update({name: visit.local[name].clone() for name in visit.shared})
            method.end(visit)
            bad = _broken(visit.local | visit.memory)
            self.nonfinite_updates += int((bad | worn).sum())
            _reset(bad, (visit.local, local), (visit.memory, memory), *([(visit.own, own)] if method.keeps else []))
            self.store.stage(cohort, self._state(visit))
            reply = leave(visit, wire, chosen, names)
            if self.guarantee.unit != "record":  # under record-level noise it may not be told who has none
                _still(reply, wire, [not len(self.examples.train[user]) for user in cohort])
            for name, sent in self._outgoing(cohort, round_number, reply, wire).items():
                replies[name].append(sent)
        return {name: np.concatenate(parts) for name, parts in replies.items()}

    def _pooled_round(self, number: int, users: Sequence[int], shared: Arrays) -> dict[str, NDArray[np.float32]]:
        """Train one model on the records of all; everyone answers with it."""
        rows = np.concatenate([self.examples.train[user] for user in users])
        pooled = replace(self.examples, users=("everyone",), train=(rows,), test=(rows[:0],))
        trainer = Clients(
            self.config, replace(self.plan, method=Method), self.guarantee, self.model, self.store, self._secret
        )
        trainer.examples, trainer.stats = pooled, self.stats
        replies = trainer.train_round(number, [0], shared)
        self.nonfinite_updates += trainer.nonfinite_updates
        return {name: np.repeat(reply, len(users), axis=0) for name, reply in replies.items()}

    def _state(self, visit: Visit) -> Parameters:
        """Return what stays with the users."""
        personal = self.model.names(self.plan.groups(PERSONAL))
        held = visit.own | {name: visit.local[name] for name in personal} | visit.memory
        return {name: held[name] for name in self.store.arrays}

    def _outgoing(
        self, cohort: list[int], round_number: int, reply: Parameters, wire: Mapping[str, Tensor]
    ) -> dict[str, NDArray[np.float32]]:
        """Return what the cohort's clients send, (clients, out, in): where a client does not trust the server alone,
        its clipped update with its own noise, or its share of the noise.
        """
        sent = {name: value.numpy() for name, value in reply.items()}
        guarantee = self.guarantee
        if guarantee.trust not in {"user-local", "user-distributed"}:
            return sent
        assert guarantee.clip is not None
        shapes = {name: tuple(wire[name].shape) for name in sent}
        result = {name: np.repeat(wire[name].numpy()[None], len(cohort), axis=0) for name in sent}
        for place, user in enumerate(cohort):
            update = {name: sent[name][place] - result[name][place] for name in sent}
            clipped, _ = clip_update(update, guarantee.clip, guarantee.per_layer)
            rng = generator(self._secret, "user-noise", round_number, self.examples.users[user])
            noise = noise_share(shapes, guarantee.clip, guarantee.noise_multiplier, guarantee.honest or 1, rng)
            for name in sent:
                result[name][place] += (clipped[name] + noise[name]).astype(np.float32)
            self._note({name: torch.from_numpy(value.astype(np.float32)) for name, value in noise.items()})
        return result

    def _note(self, noise: Mapping[str, Tensor]) -> None:
        """Remember noise for the simulator's eyes."""
        for name, value in noise.items():
            self.noise[name] = self.noise[name] + value if name in self.noise else value

    def own(
        self, users: Sequence[int], shared: Arrays, personal: PersonalStore | None
    ) -> Iterator[tuple[list[int], Parameters]]:
        """Yield cohorts and their own models as they are now, without further training.

        `personal` holds the state from the rounds; None starts at the public initial values.
        """
        for cohort, visit in self._at_home(users, shared, personal):
            yield cohort, visit.local

    def finish(
        self, users: Sequence[int], shared: Arrays, personal: PersonalStore | None
    ) -> Iterator[tuple[list[int], Parameters]]:
        """Train at home after the last release; yields cohorts and their own models, as `own` does."""
        for cohort in self._cohorts(users):
            self.model.present(cohort, keep=True)
            ((_, visit),) = self._at_home(cohort, shared, personal)
            before = clone(visit.local)
            for index, phase in enumerate(self.plan.finish):
                self._train(visit, cohort, phase, ("finish", index), at_home=True)
            bad = _broken(visit.local)
            self.nonfinite_updates += int(bad.sum())
            _reset(bad, (visit.local, before))
            yield cohort, visit.local

    def _at_home(
        self, users: Sequence[int], shared: Arrays, personal: PersonalStore | None
    ) -> Iterator[tuple[list[int], Visit]]:
        wire = {name: torch.from_numpy(np.array(value)) for name, value in shared.items()}
        first = self.layout.kept()
        for cohort in self._cohorts(users):
            kept = personal.read(cohort) if personal is not None else repeat(first, len(cohort))
            visit, _ = self._arrive(0, cohort, wire, kept)
            self.plan.method.home(visit)
            yield cohort, visit

    def _arrive(
        self, number: int, cohort: list[int], wire: Mapping[str, Tensor], kept: Parameters
    ) -> tuple[Visit, Choice | None]:
        return arrive(self.config, self.layout, self.model, self.examples, number, cohort, wire, kept)

    def with_plan(self, plan: Plan) -> Clients:
        """The same clients under another method's table; the same random numbers make the two comparable."""
        return Clients(self.config, plan, self.guarantee, self.model, self.store, self._secret)

    def _cohorts(self, users: Sequence[int]) -> Iterator[list[int]]:
        size = self.config.engine.cohort_size
        for start in range(0, len(users), size):
            yield list(users[start : start + size])

    def _train(
        self, visit: Visit, cohort: list[int], phase: Phase, address: tuple[Part, ...], at_home: bool = False
    ) -> Stats:
        personal = at_home or phase.own or all(self.plan.scopes[group] is PERSONAL for group in phase.train)
        settings: TrainConfig = self.config.personal if personal else self.config.local
        examples = self.examples if at_home else self._half(phase)
        if phase.blend:
            step = self.plan.options[phase.blend]
            rates = LearningRates.model_construct(adapter=step, norm=step, head=step)  # it may be 0
            settings = settings.model_copy(update={"optimizer": "sgd", "lr": rates, "epochs": 1})
        double = 2 if phase.inner else 1
        protection = None
        if self.guarantee.unit == "record" and not at_home and self.plan.protected(phase):
            count = double * self.guarantee.steps
            steps = poisson(examples, cohort, count, self.guarantee.rate, self._secret, address)
            protection = self._protection(cohort, phase, address)
        else:
            steps = epochs(examples, cohort, double * settings.epochs, settings.batch_size, self._secret, address)
        if not (personal or phase.blend):
            visit.steps += sum((torch.from_numpy(step.active).float() for step in steps), torch.zeros(len(cohort)))
        names = self.model.names(phase.train)
        weights = visit.own if phase.own else visit.local
        read = weights | unmoved(self.plan, self.model, phase, len(cohort))
        share = self.plan.options[phase.mix] if phase.mix else 1.0
        if share == 0.0:
            return Stats()  # a part of no weight has no gradient
        if phase.mix:
            read |= {n: share * visit.own[n] + (1 - share) * visit.local[n] for n in names}
        strength = self.plan.options[phase.pull] if phase.pull else self.config.personal.l2 if personal else 0.0
        rule = step_rule(self.plan, self.model, visit, phase, settings, strength, at_home)
        stats = train_phase(self.model, read, phase.train, steps, settings, rule=rule, protection=protection)
        for name in names:
            weights[name] = read[name]
            if phase.mix:
                weights[name] = (read[name] - (1 - share) * visit.local[name]) / share
        return stats

    def _half(self, phase: Phase) -> Examples:
        """The examples that a round phase may train on: all, or one half of each user's, by record id alone."""
        half = self.plan.half(phase)
        if half == "all":
            return self.examples
        whole = self.examples.train
        coins = uniforms(_HALVES, ("half",), self.examples.ids)[:, 0] < 0.5
        behind_head = coins if half == "head" else ~coins
        halves = OnDemand(len(whole), lambda user: whole[user][behind_head[whole[user]]])
        return replace(self.examples, train=halves)

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


def _reset(bad: Tensor, *undo: tuple[Parameters, Parameters]) -> None:
    """Undo what clients did whose numbers are not finite; the others are not touched."""
    for values, before in undo:
        for name in before:
            values[name][bad] = before[name][bad]


def _still(reply: Parameters, wire: Mapping[str, Tensor], nothing: Sequence[bool]) -> None:
    """Let clients without records send what they received: taking a user's records away then moves a sum by one clip,
    whatever a method's functions do.
    """
    none = torch.tensor(nothing)
    for name in reply if none.any() else ():
        reply[name] = torch.where(none[:, None, None], wire[name], reply[name])


def _broken(values: Parameters) -> Tensor:
    """Which clients have a number that is not finite, (clients,)."""
    return torch.stack([~torch.isfinite(value).flatten(1).all(dim=1) for value in values.values()]).any(dim=0)
