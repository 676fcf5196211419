"""A node acts for one user and trusts no server: it trains under its owner's limits and enters what it sends into a
ledger of its own, which outlives the process.

A message changes nothing but the shared arrays that training starts from: configuration, clipping, noise and steps are
the node's own, and the secret of its noise is drawn here and never leaves. The order is: check, train, write the ledger
line, write the personal state, send. A node that is stopped before the line has sent nothing; after it, the round is
paid for and is not answered again.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from flwr.app import Message

from fedpers.cohort.clients import Clients
from fedpers.cohort.layout import layout
from fedpers.cohort.personal_store import OwnStore
from fedpers.config import Config, result_text
from fedpers.errors import PrivacyRefusal
from fedpers.experiment import Experiment, build_model, prepare
from fedpers.flower import messages as wire
from fedpers.flower.client_app import measured, trained
from fedpers.flower.node_file import Limits, Place
from fedpers.privacy.claim import TUNING, Claim, claim_from
from fedpers.privacy.guarantee import Guarantee
from fedpers.privacy.ledger import Ledger, release_hash
from fedpers.privacy.ledger_lines import EACH_ITS_OWN, SHARED, Release, Secret
from fedpers.privacy.randomness import fingerprint, run_keys, secret_key
from fedpers.privacy.spending import BudgetSpent, check_budget
from fedpers.reporting import Reporter
from fedpers.run_directory import Checkpoint, RunDirectory

ALONE = "what this user's other runs, on other nodes or before, have told"
TRUSTED = "The server is trusted to clip what this node sends and to add noise, which its own claim is about."
TOLD = "the raw metrics of this user that the node's owner allows it to send"


def configuration_hash(config: Config) -> str:
    """Name a configuration, for a server and its nodes to see that they run the same."""
    return hashlib.sha256(result_text(config).encode()).hexdigest()


def check_away(experiment: Experiment) -> None:
    """Refuse what needs everybody's records, or a protocol that is not here, where clients are elsewhere.

    Raises:
        PrivacyRefusal: trust user-distributed, or a method that trains on pooled records.
    """
    if experiment.guarantee.trust == "user-distributed":
        raise PrivacyRefusal(
            "privacy.trust=user-distributed needs a secure aggregation, which is simulated and not built: a real "
            "server would see single messages with too little noise; set privacy.trust=user-local, or user-central."
        )
    if experiment.plan.method.pooled:
        raise PrivacyRefusal(
            f"method {experiment.plan.name!r} trains on the records of all users together, which no server of nodes "
            "has; choose another method (`fedpers methods`)."
        )


def train(message: Message, place: Place) -> Message:
    """Answer a training message.

    Raises:
        Refused: the message, the round, the budget or the owner's limits forbid it; nothing has been released.
    """
    number, configuration = wire.asked(message)
    experiment = _experiment(place, configuration)
    with _alone(place.state):
        node = Node(experiment, place)
        coming = node.check(number)
        shared = wire.read_arrays(message, node.clients.layout.broadcast())
        (reply,) = trained(node.clients, [place.position], [message], shared)
        sent = wire.from_record(wire.arrays_of(reply))
        node.ledger.append(coming.model_copy(update={"release_hash": release_hash(sent)}))
        node.commit(number)
    return reply


def evaluate(message: Message, place: Place) -> Message:
    """Answer an evaluation message: with this user's raw metrics if the owner allows it, else with nothing."""
    _, configuration = wire.asked(message)
    if not place.limits.metrics:
        return wire.metrics_reply(message, {})
    experiment = _experiment(place, configuration)
    with _alone(place.state):
        node = Node(experiment, place)
        shared = wire.read_arrays(message, node.clients.layout.broadcast())
        return measured(node.clients, [place.position], [message], shared, True)[0]


class Node:
    """What answers one message: clients of one user, with the ledger and the personal state that lie in the node's
    directory. Made anew for each message, which may come to a new process.
    """

    def __init__(self, experiment: Experiment, place: Place) -> None:
        config = place.config
        self.experiment, self.place = experiment, place
        self.guarantee = own_guarantee(experiment.guarantee)
        known = RunDirectory(place.state).started
        self.directory = (RunDirectory.reopen if known else RunDirectory.create)(place.state, config)
        model = build_model(experiment, Reporter())
        arrays = layout(config, experiment.plan, model)
        store = OwnStore(self.directory.private / "rounds", arrays.kept())
        self.directory.recover(store)
        self.key = _client_key(config, self.directory, place)
        self.clients = Clients(config, experiment.plan, experiment.guarantee, model, store, self.key)
        self.ledger = self._ledger()

    def check(self, number: int) -> Release:
        """Return the ledger line of a round, but for what is sent.

        Raises:
            Refused: the round was answered already or is none of this run's, or the budget or a limit forbids it.
        """
        done, limits = self.ledger.releases, self.place.limits
        if number > self.place.config.rounds or (done and number <= done[-1].round):
            raise wire.Refused(wire.ROUND_REFUSED, f"round {number}, after round {done[-1].round if done else 0}")
        if limits.max_rounds is not None and len(done) >= limits.max_rounds:
            raise wire.Refused(wire.LIMITS, f"{len(done)} rounds are answered, and the owner allows no more")
        coming = self.guarantee.release(number, [0], self.key)
        try:
            check_budget(self.ledger, coming, min(limits.epsilon, self.guarantee.budget))
        except BudgetSpent:
            raise wire.Refused(wire.BUDGET_SPENT, f"round {number} would pass the budget") from None
        return coming

    def commit(self, number: int) -> None:
        """Make the round's personal state final, and say what has been released so far."""
        rows = self.clients.store.drain()
        state = Checkpoint(number, len(self.ledger), self.ledger.head, shared={}, strategy={}, history=[])
        self.directory.commit(state, *rows, self.clients.store)
        self.directory.write_text("claim.json", self.claim().to_json())

    def claim(self) -> Claim:
        """Return what this node's ledger proves, whatever its server says."""
        limits = self.place.limits
        left_out = [ALONE, TUNING, *([TOLD] if limits.metrics else [])]
        note = limits.sentence()
        if self.guarantee is not self.experiment.guarantee and self.experiment.guarantee.unit != "none":
            note = f"{TRUSTED} {note}"
        return claim_from(self.ledger, expected_rounds=None, excluded=left_out, population_note=note, of_node=True)

    def _ledger(self) -> Ledger:
        """Open the node's ledger, or begin it; a torn last line was never sent and is cut off.

        Raises:
            Refused: it was begun for another configuration, other records or another model.
        """
        config, path = self.place.config, self.directory.ledger
        origin: Secret = EACH_ITS_OWN if config.privacy.secret is None else SHARED
        opening = self.guarantee.opening(config, self.clients.shared_names, 1, origin, fingerprint(self.key, "run"))
        if not self.directory.has_ledger():
            return Ledger.create(path, opening)
        ledger = Ledger.rewind(path, path.read_bytes().count(b"\n"))
        if ledger.opening != opening:
            raise wire.Refused(wire.OTHER_CONFIGURATION, "this node's state was begun for another run or other records")
        return ledger


def own_guarantee(guarantee: Guarantee) -> Guarantee:
    """Return what a node itself enforces; where the server is to clip and add noise, that is nothing."""
    if guarantee.trust in {"record-local", "user-local"}:
        return guarantee
    return replace(
        guarantee, unit="none", trust="none", adjacency="none", amplification="none", clip=None, noise_multiplier=0.0,
        rate=1.0, bands=(), filter=None, adaptive=None, budget=math.inf, population=None, personal_covered=False,
    )  # fmt: skip


def check_limits(config: Config, guarantee: Guarantee, limits: Limits) -> None:
    """Hold what a node is to enforce against what its owner allows.

    Raises:
        Refused: it is beyond a limit.
    """
    noise, clip = guarantee.noise_multiplier, guarantee.clip
    steps = sum(guarantee.phase_steps) if guarantee.unit == "record" else 1
    quiet = noise == 0 or config.privacy.secret is not None  # whoever knows the secret can take the noise off
    problems = {
        "what is sent would have no noise of this node's, and the owner does not allow that": quiet
        and not limits.unprotected,
        f"noise multiplier {noise:g}": limits.min_noise is not None and noise < limits.min_noise,
        f"clip {clip}": limits.max_clip is not None and (clip is None or clip > limits.max_clip),
        f"{steps} noised steps in a round": limits.max_steps is not None and steps > limits.max_steps,
    }
    if found := [problem for problem, holds in problems.items() if holds]:
        raise wire.Refused(wire.LIMITS, "; ".join(found))


def _experiment(place: Place, configuration: str | None) -> Experiment:
    """Prepare the node's own configuration, if the server runs the same and the owner allows it."""
    config = place.config
    if configuration is not None and configuration != configuration_hash(config):
        raise wire.Refused(wire.OTHER_CONFIGURATION, "the server runs another configuration than this node's copy")
    experiment = prepare(config, federation=place.federation)
    check_away(experiment)
    check_limits(config, own_guarantee(experiment.guarantee), place.limits)
    return experiment


def _client_key(config: Config, directory: RunDirectory, place: Place) -> bytes:
    """Return the key of this node's noise and batches: other records under the same secret have another one.

    A secret that is given is a test's, and makes what the simulator makes of it.
    """
    text = result_text(config)
    if config.privacy.secret is not None:
        return run_keys(secret_key(config.privacy.secret), text)[1]
    own = (place.federation.users[place.position], place.federation.train[place.position])
    return run_keys(directory.secret(), text + repr(own))[1]


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Answer one message at a time, and let nobody else read what is written."""
    state.parent.mkdir(parents=True, exist_ok=True)
    before = os.umask(0o077)
    try:
        with state.with_name(f"{state.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    finally:
        os.umask(before)
