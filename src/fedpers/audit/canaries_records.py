"""Canary records in clients' data: the audit in one run where single records are protected.

Some made-up records of public words are given to every client, each of them in or out of the run by a fair coin; then
the coins are guessed as in `canaries`. The attacker is the server: it sees every reply, and, as the promise of one
record allows, knows all records but the canaries. It takes the expected sum of the known gradients off a client's
update and asks how much of a canary's clipped gradient is in the rest. Who was in a batch stays secret.

Adding or removing one record changes what one client sends by no more than the ledger says, and what others send only
through that. So all clients' canaries are coins of one mechanism, and the claim is the largest epsilon of any client.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from fedpers.audit.bounds import Finding, corrected
from fedpers.audit.canaries_guessing import (
    CONFIDENCE,
    Mask,
    audited,
    check_sends,
    choose_rule,
    flat,
    one_run_finding,
    planned_epsilon,
    tossed,
)
from fedpers.audit.membership import record_losses
from fedpers.cohort.clients import Arrays, Clients
from fedpers.cohort.layout import layout
from fedpers.cohort.local_training import step_size
from fedpers.cohort.model import CohortModel
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config, LearningRates, result_text
from fedpers.data import Federation
from fedpers.data.base import Record
from fedpers.errors import ConfigError
from fedpers.experiment import Experiment, build_model, prepare
from fedpers.privacy.guarantee import Guarantee, resolve
from fedpers.privacy.randomness import derive, generator, run_keys, seed_key
from fedpers.privacy.spending import spent
from fedpers.reporting import Reporter
from fedpers.rounds import federate
from fedpers.run_directory import RunDirectory
from fedpers.tasks.base import Examples

Floats = NDArray[np.float64]

WHAT = "one-run, record canaries"
USERS = 40  # enough for clients to differ; each further one costs its training
LEAST = 20  # canaries; fewer cannot show anything
WORDS = 8  # of a canary's input
# Noise over the claimed noise that the server counts with: the first is best where the claim is true, the second where
# there is hardly any noise.
ASSUMED = {"noise as claimed": 1.0, "hardly any noise": 0.03}
SMALLEST = 1e-3  # noise multiplier where none is claimed


def record_canary_audit(
    config: Config, *, canaries: int = 1000, users: int = USERS, reporter: Reporter | None = None
) -> list[Finding]:
    """Run a record-level configuration with canary records among its clients' records, and guess which were in.

    The run is a run of the configuration on fewer users, each with the same number of canaries. Three scores are
    tried and corrected for: what the server sees of a canary's gradient in the replies, counting with the noise that is
    claimed or with hardly any, and how much the final shared model improved on it.

    Args:
        config: what to audit; its evaluation and picture are left out. Its secret, if given, fixes all coins.
        canaries: about how many, shared out evenly.
        users: at most so many users.
        reporter: whom to tell about progress.

    Raises:
        ConfigError: another unit, a method that sends nothing, or too few canaries.
        FedpersError: whatever a run of this configuration would raise.
    """
    config = audited(config, "record canaries", "record")
    reporter = reporter or Reporter()
    if canaries < LEAST:
        raise ConfigError(f"record canaries: {canaries} cannot show anything; use {LEAST} or more.")
    data = config.data.model_copy(update={"users": min(users, config.data.users or users)})
    config = config.model_copy(update={"data": data})
    experiment = prepare(config)
    check_sends(experiment)
    each = max(1, round(canaries / len(experiment.federation.users)))
    experiment = with_canaries(experiment, each)
    examples, guarantee = experiment.examples, experiment.guarantee
    rows = np.concatenate([held[-each:] for held in examples.train])
    level = corrected(CONFIDENCE, len(ASSUMED) + 1)
    absent = _never_sampled(config, guarantee)
    rule = choose_rule(len(rows), planned_epsilon(config, guarantee), absent, guarantee.delta, level)
    model = build_model(experiment, reporter)
    with TemporaryDirectory(prefix="fedpers-audit-") as folder:
        directory = RunDirectory.create(Path(folder) / "run", config)
        included = tossed(derive(directory.secret(), "record canaries"), [examples.ids[row] for row in rows])
        server_key, clients_key = run_keys(directory.secret(), result_text(config))
        clients = WatchedClients(experiment, model, directory.private, clients_key, included)
        shared, ledger, _ = federate(experiment, clients, directory, server_key, reporter)
        claimed = spent(ledger)
    final = {name: torch.from_numpy(array) for name, array in shared.items()}
    before, after = (record_losses(model, model.broadcast(1, one), [rows]) for one in ({}, final))
    numbers = {"users": len(examples.users), "canaries_each": each}
    tried = [(f"{WHAT}, {name}", "replies to the server", clients.scores(name)) for name in ASSUMED]
    tried.append((f"{WHAT}, gain in loss", "shared model", before - after))
    return [
        one_run_finding(name, what, "record", claimed, guarantee.delta, scores, included, rule, numbers)
        for name, what, scores in tried
    ]


class WatchedClients(Clients):
    """The clients of a run on the records that are in, with a server that scores every canary on what it gets."""

    def __init__(self, experiment: Experiment, model: CohortModel, folder: Path, secret: bytes, included: Mask) -> None:
        examples, plan = experiment.examples, experiment.plan
        initial = layout(experiment.config, plan, model).kept()
        users = len(examples.users)
        store = PersonalStore(folder / "rounds", users, initial)
        super().__init__(experiment.config, plan, experiment.guarantee, model, store, secret)
        self.each = len(included) // users
        inside = [np.append(np.full(len(rows) - self.each, True), coins)
                  for rows, coins in zip(examples.train, included.reshape(users, -1), strict=True)]  # fmt: skip
        self.examples = replace(
            examples, train=tuple(rows[kept] for rows, kept in zip(examples.train, inside, strict=True))
        )
        self._single = Gradients(self, examples, folder / "single")
        self._evidence = {name: np.zeros((users, self.each)) for name in ASSUMED}
        self._overlap = {name: np.zeros((users, self.each, self.each)) for name in ASSUMED}

    def train_round(self, round_number: int, users: Sequence[int], shared: Arrays) -> dict[str, NDArray[np.float32]]:
        """Train as ever; then let the server look at what the clients replied."""
        replies = super().train_round(round_number, users, shared)
        scale = {name: self.guarantee.denominator / self._rate(name) for name in self.shared_names}
        sums = flat({name: (shared[name] - replies[name]) * scale[name] for name in self.shared_names})
        for user, total in zip(users, sums.astype(np.float64), strict=True):
            self._look(user, total, self._single.of(user, shared).astype(np.float64))
        return replies

    def _rate(self, name: str) -> float:
        return step_size(self.config.local, self.model.group[name])

    def _look(self, user: int, total: Floats, gradients: Floats) -> None:
        """Take a reply in: `total` (numbers,) is the noised sum of its steps, `gradients` (records, numbers) clipped.

        Given the coins it is taken for Gaussian: the expected sum, noise, and that each record is in some batches only.
        """
        guarantee, known = self.guarantee, len(gradients) - self.each
        assert guarantee.clip is not None
        times = guarantee.rate * guarantee.steps  # how often a record is expected in a round's batches
        spread = np.full(len(gradients), math.sqrt(times * (1 - guarantee.rate)))
        spread[known:] /= math.sqrt(2)  # half of the canaries are in
        signals = times * gradients[known:]
        rest = total - times * gradients[:known].sum(axis=0) - signals.sum(axis=0) / 2
        batches = spread[:, None] * gradients
        for name, part in ASSUMED.items():
            noise = part * max(guarantee.noise_multiplier, SMALLEST) * guarantee.clip * math.sqrt(guarantee.steps)
            inner = noise**2 * np.eye(len(batches)) + batches @ batches.T
            # Inverse covariance by Woodbury's identity.
            both = np.column_stack([rest, signals.T])
            weighed = (both - batches.T @ np.linalg.solve(inner, batches @ both)) / noise**2
            self._evidence[name][user] += signals @ weighed[:, 0]
            self._overlap[name][user] += signals @ weighed[:, 1:]

    def scores(self, name: str) -> Floats:
        """Expected coin of each canary less one half, (canaries,): linear least squares with all replies so far.

        A client's coins, with their prior variance of 1/4, are estimated together: that tells canaries with similar
        gradients apart.
        """
        precision = self._overlap[name] + 4 * np.eye(self.each)
        return np.asarray(np.linalg.solve(precision, self._evidence[name][..., None]).ravel())


class Gradients:
    """Clipped gradients of single records by the production engine: one step of size 1 on each alone, without noise.

    Personal groups are at their initial values: where they move, under noise, the score is a little off.
    """

    def __init__(self, clients: Clients, examples: Examples, folder: Path) -> None:
        config, model = clients.config, clients.model
        plain = {"optimizer": "sgd", "lr": LearningRates(adapter=1.0, norm=1.0, head=1.0)}
        config = config.model_copy(update={"local": config.local.model_copy(update=plain)})
        guarantee = replace(clients.guarantee, steps=1, rate=1.0, denominator=1.0, noise_multiplier=0.0)
        initial = clients.layout.kept()
        rows = np.concatenate(examples.train)
        self._edges = np.cumsum([0, *map(len, examples.train)])
        store = PersonalStore(folder, len(rows), initial)
        self._clients = Clients(config, clients.plan, guarantee, model, store, b"no coin and no noise is drawn")
        self._clients.examples = replace(  # the same table with one user per record
            examples, users=tuple(examples.ids[row] for row in rows), train=tuple(rows[:, None]), test=()
        )

    def of(self, user: int, shared: Arrays) -> NDArray[np.float32]:
        """Return the gradients of a user's records at these shared arrays, (records, numbers)."""
        places = range(self._edges[user], self._edges[user + 1])
        replies = self._clients.train_round(1, places, shared)
        self._clients.store.drain()
        return flat({name: shared[name] - reply for name, reply in replies.items()})


def with_canaries(experiment: Experiment, each: int) -> Experiment:
    """Append so many canary records to every user's training records; test records are left out.

    A client then holds so many records more, which the guarantee knows (delta is held against all records).
    """
    config, key = experiment.config, seed_key(experiment.config.seed)
    federation = experiment.federation
    federation = replace(
        federation,
        train=tuple(
            (*held, *(_canary(federation, key, f"canary/{user}/{number}") for number in range(each)))
            for user, held in zip(federation.users, federation.train, strict=True)
        ),
        test=((),) * len(federation.users),
    ).check()
    data = config.data.model_copy(update={"max_train": config.data.max_train + each})
    guarantee = resolve(config.model_copy(update={"data": data}), experiment.plan, len(federation.users))
    examples = experiment.task.prepare(federation, key)
    return replace(experiment, federation=federation, examples=examples, guarantee=guarantee)


def _canary(federation: Federation, key: bytes, name: str) -> Record:
    """A record that nobody wrote: shuffled words of the public pool, and a pool text that has nothing to do with them.

    No model has learnt it, so its gradient is long.
    """
    rng, pool = generator(key, "canary", name), federation.pool
    if not pool:
        raise ConfigError(
            f"data {federation.source}: record canaries are made of the words of a public pool, which is empty here."
        )
    words = [word for place in rng.integers(len(pool), size=WORDS) for word in pool[place].text.split()]
    shuffled = [words[place] for place in rng.permutation(len(words))[:WORDS]]
    return Record(name, name, " ".join(shuffled), pool[int(rng.integers(len(pool)))].text)


def _never_sampled(config: Config, guarantee: Guarantee) -> float:
    """Share of the records that is expected in no batch of any round."""
    asked = config.client_rate
    return float((1 - asked + asked * (1 - guarantee.rate) ** guarantee.steps) ** config.rounds)
