"""A node acts for one user and trusts no server: it trains under its owner's limits and enters what it sends into a
ledger of its own, which outlives the process.

A message names the round and the shared arrays that training starts from, and changes nothing else: configuration,
clipping, noise and steps are the node's own, and the secret of its noise is drawn here and never leaves. The order is:
check, train, write the ledger line, write the personal state, send. A node that is stopped before the line has sent
nothing; after it, the round is paid for and is not answered again.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from flwr.app import Message

from fedpers.cohort.clients import Clients
from fedpers.cohort.layout import layout
from fedpers.cohort.personal_store import OwnStore
from fedpers.config import Config, result_text
from fedpers.errors import PrivacyRefusal, RunDirectoryError
from fedpers.experiment import Experiment, build_model, prepare
from fedpers.flower import messages as wire
from fedpers.flower.client_app import measured, trained
from fedpers.flower.node_file import Limits, Place
from fedpers.privacy.claim import TUNING, Claim
from fedpers.privacy.claiming import claim_from
from fedpers.privacy.guarantee import Guarantee
from fedpers.privacy.ledger import Ledger, release_hash
from fedpers.privacy.ledger_lines import EACH_ITS_OWN, SHARED, Release, Secret
from fedpers.privacy.randomness import derive, fingerprint, run_keys
from fedpers.privacy.spending import BudgetSpent, check_budget
from fedpers.reporting import Reporter
from fedpers.run_directory import Checkpoint, RunDirectory

ALONE = "what this user's other runs, on other nodes, before, or from a copy of this node's state, have told"
TRUSTED = "The server is trusted to clip what this node sends and to add noise, which its own claim is about."


def configuration_hash(config: Config, secret: Secret) -> str:
    """Name a configuration and where its keys come from, for a server and its nodes to see that they run the same.

    Nodes that share a secret behind the back of a server would make its claim false.
    """
    return hashlib.sha256(f"{secret}\n{result_text(config)}".encode()).hexdigest()


def origin(directory: RunDirectory, config: Config) -> Secret:
    """Say where the keys come from: of a run that was begun its own secret counts, which a later configuration may not
    name any more.
    """
    given = config.privacy.secret is not None
    if directory.started:
        given = directory.secret_origin() == "given in the configuration"
    return SHARED if given else EACH_ITS_OWN


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
    with alone(place.state):
        node = Node(experiment, place)
        coming = node.check(number)
        shared = wire.read_arrays(message, node.clients.layout.broadcast())
        (reply,) = trained(node.clients, [place.position], [message], shared)
        sent = wire.from_record(wire.arrays_of(reply))
        node.ledger.append(coming.model_copy(update={"release_hash": release_hash(sent)}))
        node.commit(number)
    return reply


def evaluate(message: Message, place: Place) -> Message:
    """Answer an evaluation message: with this user's raw metrics where the owner allows it and this node adds no noise
    that they would undo, else with nothing.
    """
    _, configuration = wire.asked(message)
    if not place.limits.metrics:
        return wire.metrics_reply(message, {})
    experiment = _experiment(place, configuration)
    if own_guarantee(experiment.guarantee).unit != "none":
        return wire.metrics_reply(message, {})
    with alone(place.state):
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
        self.secret = origin(self.directory, config)
        self.key = _client_key(self.directory, place)
        # A state that was restored from a copy answers a round again, and then must not draw the same noise: it would
        # cancel. A secret that is given is a test's, and makes what the simulator makes of it.
        key = self.key if self.secret == SHARED else derive(self.key, secrets.token_hex(16))
        self.clients = Clients(config, experiment.plan, experiment.guarantee, model, store, key)
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
            check_budget(self.ledger, coming, min(limits.epsilon, self.guarantee.budget, self._asked_for()))
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
        left_out = [ALONE, TUNING, *self.place.federation.facts]
        note = limits.sentence()
        if self.guarantee is not self.experiment.guarantee and self.experiment.guarantee.unit != "none":
            note = f"{TRUSTED} {note}"
        return claim_from(self.ledger, expected_rounds=None, excluded=left_out, population_note=note, of_node=True)

    def _asked_for(self) -> float:
        """The configuration's epsilon, beyond which a server could ask for more rounds than were planned."""
        promised = self.guarantee.unit != "none" and self.secret != SHARED
        return self.place.config.privacy.epsilon if promised else math.inf

    def _ledger(self) -> Ledger:
        """Open the node's ledger, or begin it; a torn last line was never sent and is cut off.

        Raises:
            Refused: it was begun for another configuration or other records.
        """
        config, path, key = self.place.config, self.directory.ledger, fingerprint(self.key, "run")
        opening = self.guarantee.opening(config, self.clients.shared_names, 1, self.secret, key)
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


def check_limits(guarantee: Guarantee, secret: Secret, limits: Limits) -> None:
    """Hold what a node is to enforce against what its owner allows.

    Raises:
        Refused: it is beyond a limit.
    """
    noise, clip = guarantee.noise_multiplier, guarantee.clip
    steps = sum(guarantee.phase_steps) if guarantee.unit == "record" else 1
    quiet = noise == 0 or secret == SHARED  # whoever knows the secret can take the noise off
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
    secret = origin(RunDirectory(place.state), config)
    if configuration is not None and configuration != configuration_hash(config, secret):
        raise wire.Refused(wire.OTHER_CONFIGURATION, "the server runs another configuration than this node's copy")
    experiment = prepare(config, federation=place.federation)
    check_away(experiment)
    check_limits(own_guarantee(experiment.guarantee), secret, place.limits)
    return experiment


def _client_key(directory: RunDirectory, place: Place) -> bytes:
    """Return the key of this node's run: other records under the same secret have another one, but in a test."""
    text = result_text(place.config)
    if origin(directory, place.config) == EACH_ITS_OWN:
        text += repr((place.federation.users[place.position], place.federation.train[place.position]))
    return run_keys(directory.secret(), text)[1]


@contextmanager
def alone(state: Path, patience: float = math.inf) -> Iterator[None]:
    """Be the only process that works on a directory, and let nobody else read what is written.

    Raises:
        RunDirectoryError: another one still does after `patience` seconds.
    """
    state.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(state.with_name(f"{state.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise RunDirectoryError(f"{state}: another process works on it; end that one first.") from error
                time.sleep(0.05)
        before = os.umask(
            0o077
        )  # under the lock: it is the whole process's, and threads would leave each other's behind
        try:
            yield
        finally:
            os.umask(before)
    finally:
        os.close(descriptor)
