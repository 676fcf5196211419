"""A few rounds of the production path on a small slice of a federation, to be run again with one thing changed.

Everything here is what `fedpers run` uses: `prepare`, `Clients`, `FedpersStrategy`, `CohortGrid`, the ledger. Only the
people are fewer, and an address of a coin never changes when a record or a user is taken away.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from numpy.typing import NDArray
from torch import Tensor

from fedpers.cohort.clients import Clients
from fedpers.cohort.layout import layout
from fedpers.cohort.model import CohortModel
from fedpers.cohort.optimizer import Noise as StepNoise
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config, result_text
from fedpers.data import Record
from fedpers.experiment import Experiment, build_model, prepare
from fedpers.flower import messages as wire
from fedpers.flower.cohort_grid import CohortGrid
from fedpers.flower.strategy import FedpersStrategy
from fedpers.methods.base import Phase
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import Release
from fedpers.privacy.mechanisms import Aggregate
from fedpers.privacy.randomness import Part, generator, run_keys, secret_key, seed_key
from fedpers.privacy.sampling import draw
from fedpers.privacy.user_level import UserLevelServer
from fedpers.reporting import Reporter
from fedpers.tasks.base import Examples

Arrays = dict[str, NDArray[np.float32]]
Noise = dict[str, NDArray[np.float64]]
USERS, RECORDS, SPREAD = 12, 8, 0.05  # slice of the federation; deviation of a broadcast from the initial values


def slice_of(config: Config) -> Config:
    """Return the configuration on a few people with a few records each, evaluated by nobody."""
    data = config.data.model_copy(
        update={
            "users": min(config.data.users or USERS, USERS),
            "max_train": min(config.data.max_train, max(RECORDS, config.data.min_train)),
            "max_test": config.data.min_test,
            "lazy": False,
        }
    )
    privacy = config.privacy
    changes: dict[str, Any] = {"delta": min(privacy.delta, 1e-4)}
    if privacy.adaptive is not None:  # few users can hide their bits behind much noise only
        changes["adaptive"] = privacy.adaptive.model_copy(update={"bit_noise": max(privacy.adaptive.bit_noise or 0, 5)})
    if privacy.stop == "budget":
        changes |= {"stop": "rounds", "epsilon": math.inf if privacy.noise_multiplier else privacy.epsilon}
    privacy = privacy.model_copy(update=changes)
    return config.model_copy(
        update={"data": data, "privacy": privacy, "frontier": None, "client_rate": max(config.client_rate, 0.5)}
    )


@dataclass
class Trace:
    """What the server did in some rounds, and what it would have done without noise."""

    broadcasts: list[Arrays] = field(default_factory=list)  # before the first round, and after each
    noised: list[Arrays] = field(default_factory=list)  # mean updates
    clean: list[Arrays] = field(default_factory=list)  # of the same replies, without noise
    releases: tuple[Release, ...] = ()
    replies: list[dict[int, Arrays]] = field(default_factory=list)  # by position of the user


class _Watched(FedpersStrategy):
    """The production strategy, with its sums looked at from inside the simulator."""

    trace: Trace
    shift: Noise | None = None  # added to the noise of a round, in units of noise multiplier times clip

    def _synthetic_reply(self, number: int, asked: Sequence[int], received: Sequence[Arrays]) -> Message:
        server = self._server()
        if self.shift is not None:
            setattr(server, "noise", _shifted(server.noise, self.shift))  # noqa: B010 - a method
        server.shapes = {n: self._broadcast[n].shape for n in self.layout.up(number)}
        updates = [{n: one[n] - self._broadcast[n] for n in one} for one in received]
        self.trace.clean.append(self._clean(server, number, updates).mean)
        message = super()._synthetic_reply(number, asked, received)
        after = wire.from_record(wire.arrays_of(message))
        moved = self.trace.clean[-1]
        self.trace.noised.append({name: after[name] - self._broadcast[name] for name in moved})
        return message

    def _clean(self, server: UserLevelServer, number: int, updates: Sequence[Arrays]) -> Aggregate:
        quiet = UserLevelServer(self.guarantee, server.shapes, server.group_of, self._secret)
        quiet.clip, quiet.noise_multiplier = server.clip, 0.0
        return quiet.mean(number, updates)


def _shifted(noise: Callable[[int], Noise], shift: Noise) -> Callable[[int], Noise]:
    return lambda number: {name: one + shift[name] for name, one in noise(number).items()}


class Bench:
    """The slice, its model, and runs of it.

    Args:
        config: a configuration; its people are cut down by `slice_of`.
        folder: for stores and ledgers.
        reporter: whom to tell about progress.
    """

    def __init__(self, config: Config, folder: Path, reporter: Reporter | None = None) -> None:
        self.config, self.folder, self.reporter = config, folder, reporter or Reporter()
        self.experiment = prepare(config)
        self.secret = secret_key(config.privacy.secret)
        self.server_key, self.clients_key = run_keys(self.secret, result_text(config))
        self._made = 0
        self._rebuilt: tuple[Experiment, CohortModel] | None = None

    @cached_property
    def model(self) -> CohortModel:
        """The slice's model."""
        return build_model(self.experiment, self.reporter)

    @cached_property
    def busy(self) -> int:
        """How many rounds to pass over so that in the next one several clients take part."""
        config, users = self.config, self.experiment.examples.users
        sizes = (len(draw(config.client_sampling, config.client_rate, users, self.server_key, n)) for n in count(1))
        return next(passed for passed, size in enumerate(sizes) if size >= min(4, len(users) // 2))

    def start(self) -> Arrays:
        """Return a broadcast off the initial values, so that every factor has a gradient."""
        rng = generator(seed_key(0), "audit", "broadcast")
        first = layout(self.config, self.experiment.plan, self.model).broadcast()
        return {n: (a + SPREAD * rng.standard_normal(a.shape)).astype(np.float32) for n, a in first.items()}

    def clients(
        self,
        changes: Mapping[str, Any] | None = None,
        *,
        phases: Sequence[tuple[int, Phase]] | None = None,
        examples: Examples | None = None,
        world: Experiment | None = None,
    ) -> Clients:
        """Return clients as a run makes them, with changes to the guarantee, other phases, examples or people."""
        experiment = world or self.experiment
        model = self.model if world is None else self._model_of(world)
        plan = experiment.plan
        self._made += 1
        initial = layout(experiment.config, plan, model).kept()
        store = PersonalStore(self.folder / f"store-{self._made}", len(experiment.examples.users), initial)
        guard = replace(experiment.guarantee, **(changes or {}))
        clients = Clients(experiment.config, plan, guard, model, store, self.clients_key)
        clients.examples = examples or experiment.examples
        clients.phases = clients.phases if phases is None else phases
        return clients

    def rounds(
        self, clients: Clients, number: int, *, shift: Noise | None = None, start: Arrays | None = None, first: int = 0
    ) -> Trace:
        """Run rounds after the `first` ones through Flower's messages and the ledger."""
        users, ledger = clients.examples.users, self._ledger(clients)
        strategy = _Watched(
            self.config, clients.guarantee, users, ledger, self.server_key, clients.layout, first_round=first
        )
        strategy.trace, strategy.shift = Trace(broadcasts=[start or self.start()]), shift
        grid = _Recording(clients, strategy.trace)

        def after(number: int, arrays: ArrayRecord) -> None:
            if number:
                strategy.trace.broadcasts.append(wire.from_record(arrays))
                clients.store.apply(*clients.store.drain())

        initial = wire.to_record(strategy.trace.broadcasts[0], clients.shared_names)
        logging.getLogger("flwr").setLevel(logging.ERROR)
        strategy.start(grid, initial, num_rounds=number, train_config=ConfigRecord(), evaluate_fn=after)
        strategy.trace.releases = ledger.releases
        self.ledger = ledger
        return strategy.trace

    def sampled(self, count: int) -> list[int]:
        """Return how many clients the strategy asks in each of many rounds; nobody trains."""
        clients = self.clients()
        ledger = self._ledger(clients)
        strategy = FedpersStrategy(
            self.config, clients.guarantee, clients.examples.users, ledger, self.server_key, clients.layout
        )
        record, grid = wire.to_record(self.start(), clients.shared_names), CohortGrid(clients)
        return [len(list(strategy.configure_train(n, record, ConfigRecord(), grid))) for n in range(1, count + 1)]

    def _ledger(self, clients: Clients) -> Ledger:
        self._made += 1
        place = self.folder / f"ledger-{self._made}"
        place.mkdir()
        users = len(clients.examples.users)
        opening = clients.guarantee.opening(self.config, clients.shared_names, users, "given in the configuration")
        return Ledger.create(place / "ledger.jsonl", opening)

    def without(self, user: int, record: Record | None = None) -> Experiment:
        """Return the experiment as if a user had no training records, or one record less, from the raw records on."""
        federation = self.experiment.federation
        train = list(federation.train)
        train[user] = tuple(one for one in train[user] if record is not None and one is not record)
        federation = replace(federation, train=tuple(train))
        examples = self.experiment.task.prepare(federation, seed_key(self.config.seed))
        return replace(self.experiment, federation=federation, examples=examples)

    def _model_of(self, world: Experiment) -> CohortModel:
        if self._rebuilt is None or self._rebuilt[0] is not world:
            self._rebuilt = world, build_model(world, self.reporter)
        return self._rebuilt[1]


class _Recording(CohortGrid):
    def __init__(self, clients: Clients, trace: Trace) -> None:
        super().__init__(clients)
        self._trace = trace

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)
        self._trace.replies.append(
            {m.metadata.src_node_id - wire.FIRST_NODE: wire.from_record(wire.arrays_of(m)) for m in replies}
        )
        return replies


def flat(arrays: dict[str, Any]) -> NDArray[np.float64]:
    """Lay arrays out as one vector, by name."""
    parts = [np.asarray(arrays[name], dtype=np.float64).ravel() for name in sorted(arrays)]
    return np.concatenate(parts) if parts else np.zeros(0)


def watch_noise(clients: Clients) -> set[tuple[Part, ...]]:
    """Return a set that will hold the round, the place of the phase and the step of every noise that is drawn."""
    seen: set[tuple[Part, ...]] = set()
    made = clients.step_noise

    def watched(cohort: list[int], phase: Phase, address: tuple[Part, ...]) -> StepNoise:
        noise = made(cohort, phase, address)

        def drawn(step: int) -> Sequence[Tensor]:
            seen.add((*address[1:], step))
            return noise(step)

        return drawn

    setattr(clients, "step_noise", watched)  # noqa: B010 - a method
    return seen
