"""Canaries in the production path: who was there is tossed, the run guesses it back, and that bounds epsilon.

Canary users are registered beside the real ones. Each sends a direction of its own, or not, by a fair coin; clipping,
sampling, noise and the ledger are those of any run. The coins are guessed from what the protected sees released, which
is the audit in one run of Steinke, Nasr, Jagielski: Privacy Auditing with One (1) Training Run, NeurIPS 2023,
arXiv:2305.08846. A canary that is out is what the ledger's adjacency makes of it: a user without an update under
zero-out, the opposite update under replace-one.

The claim comes from the ledger that the audited run wrote, never from the configuration. How many coins are guessed is
fixed before the run. Canary records are in `canaries_records`, single releases in
`canaries_mechanism`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpers.audit import user_canary
from fedpers.audit.bounds import Finding
from fedpers.audit.canaries_guessing import (
    Mask,
    audited,
    check_sends,
    choose_rule,
    flat,
    one_run_finding,
    planned_epsilon,
    tossed,
)
from fedpers.cohort.clients import Clients
from fedpers.cohort.layout import layout
from fedpers.cohort.model import CohortModel
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config, result_text
from fedpers.errors import ConfigError
from fedpers.experiment import Experiment, Reuse, build_model, prepare
from fedpers.privacy.guarantee import resolve
from fedpers.privacy.ledger_lines import SENSITIVITY
from fedpers.privacy.mechanisms import clip_update
from fedpers.privacy.randomness import derive, generator, run_keys
from fedpers.privacy.sampling import period
from fedpers.privacy.spending import spent
from fedpers.reporting import Reporter
from fedpers.rounds import federate
from fedpers.run_directory import RunDirectory

Floats = NDArray[np.float32]
Arrays = Mapping[str, Floats]

OVERSHOOT = 10.0  # length of a canary's update in clips: it is the server that has to cut it to one
MOST, LEAST = 2000, 20  # canaries; more take long to make orthogonal, fewer cannot show anything
NUMBERS = 25_000_000  # of all directions together: 100 MB


def user_canary_audit(
    config: Config, *, canaries: int | None = None, reporter: Reporter | None = None, reuse: Reuse | None = None
) -> list[Finding]:
    """Run a user-level configuration with canary users beside the real ones, and guess which of them were in.

    The run is a run of the configuration: rounds, sampling, clip and noise multiplier are the same, and the guarantee
    is resolved for real and canary users together, so that real users weigh less in the mean. Directions are orthogonal
    to each other. What is scored is what the claim covers: the change of the shared model, or, where users do not trust
    the server, their replies. Whoever knows all other users, as the promise allows, takes their known updates off.

    Args:
        config: what to audit; its evaluation and picture are left out. Its secret, if given, fixes all coins.
        canaries: how many; by default as many as can be told apart, up to 2,000.
        reporter: whom to tell about progress.
        reuse: frozen features to share with other runs in this process.

    Returns:
        The one-run bound, and under zero-out the estimate of Andrew et al. (ICLR 2024), which refutes nothing. It takes
        every canary for one that was sent alike, so with client sampling, where one takes part more often than
        another, it only indicates.

    Raises:
        ConfigError: another unit, a method that sends nothing, or a number of canaries that cannot be told apart.
        FedpersError: whatever a run of this configuration would raise.
    """
    config = audited(config, "user canaries", "user")
    reporter = reporter or Reporter()
    experiment = prepare(config, reuse)
    real = len(experiment.examples.users)
    check_sends(experiment)
    model = build_model(experiment, reporter, reuse)
    arrays = layout(config, experiment.plan, model)
    dimension = sum(array.size for array in arrays.broadcast().values())
    count = _how_many(canaries, dimension, real, config.privacy.delta)
    experiment = with_canaries(experiment, count)
    guarantee = experiment.guarantee
    opposite = SENSITIVITY[guarantee.adjacency] == 2
    absent = 0.0 if opposite else _never_asked(config)
    rule = choose_rule(count, planned_epsilon(config, guarantee), absent, config.privacy.delta)
    with TemporaryDirectory(prefix="fedpers-audit-") as folder:
        directory = RunDirectory.create(Path(folder) / "run", config)
        key = derive(directory.secret(), "user canaries")
        included = tossed(key, experiment.examples.users[real:])
        store = PersonalStore(
            directory.private / "rounds", real, layout(experiment.config, experiment.plan, model).kept()
        )
        server_key, clients_key = run_keys(directory.secret(), result_text(config))
        sign = np.where(included, 1.0, -1.0 if opposite else 0.0).astype(np.float32)
        clients = CanaryClients(experiment, model, store, clients_key, orthogonal(count, dimension, key), sign)
        shared, ledger, _ = federate(experiment, clients, directory, server_key, reporter)
        claimed = spent(ledger)
    local = guarantee.trust == "user-local"
    start = {name: model.initial[name].numpy() for name in shared}
    release = (flat(shared) - flat(start))[0].astype(np.float64) - clients.known
    scores = clients.scores if local else clients.directions @ release
    what, numbers = "replies to the server" if local else "shared model", {"users": real, "dimension": dimension}
    name = "one-run, user canaries"
    found = one_run_finding(name, what, "user", claimed, guarantee.delta, scores, included, rule, numbers)
    return [found] if opposite else [found, _estimate(found, scores, included, release)]


class CanaryClients(Clients):
    """The clients of a run, and behind them canary users, who hold no records and send fixed directions."""

    def __init__(
        self, experiment: Experiment, model: CohortModel, store: PersonalStore, secret: bytes, directions: Floats,
        sign: Floats,
    ) -> None:  # fmt: skip
        super().__init__(experiment.config, experiment.plan, experiment.guarantee, model, store, secret)
        self.examples = experiment.examples
        self.real = len(self.examples.users) - len(directions)
        self.directions, self.sign = directions, sign  # (canaries, numbers), (canaries,)
        self.scores = np.zeros(len(directions))  # alignment of each canary's protected replies with its direction
        self.known: Floats | float = 0.0  # what the real users added to the shared model

    def train_round(self, round_number: int, users: Sequence[int], shared: Arrays) -> dict[str, Floats]:
        """Answer for real users as ever, and for the canaries behind them; users are in ascending order."""
        people, asked = [user for user in users if user < self.real], [user for user in users if user >= self.real]
        replies = []
        if people:
            replies.append(super().train_round(round_number, people, shared))
            self._remember(replies[0], shared)
        if asked:
            replies.append(self._canary_replies(round_number, asked, shared))
        return {name: np.concatenate([one[name] for one in replies]) for name in self.shared_names}

    def _canary_replies(self, round_number: int, asked: list[int], shared: Arrays) -> dict[str, Floats]:
        """Protect and send the canaries' updates, with the code that protects a real user's."""
        assert self.guarantee.clip is not None
        places = np.array(asked) - self.real
        updates = OVERSHOOT * self.guarantee.clip * self.sign[places, None] * self.directions[places]
        start = {name: torch.from_numpy(np.array(shared[name])) for name in self.shared_names}
        parameters = {name: value.expand(len(asked), *value.shape).clone() for name, value in start.items()}
        cuts = np.cumsum([array.numel() for array in start.values()])[:-1]
        for name, part in zip(start, np.split(updates, cuts, axis=1), strict=True):
            parameters[name] += torch.from_numpy(part.reshape(parameters[name].shape))
        sent = self._outgoing(asked, round_number, parameters, start)
        moved = flat(sent) - flat({name: np.repeat(start[name].numpy()[None], len(asked), axis=0) for name in sent})
        self.scores[places] += np.einsum("cd,cd->c", self.directions[places], moved)
        return sent

    def _remember(self, replies: Arrays, shared: Arrays) -> None:
        """Add up what the real users contribute, where the shared model is the sum of the means and it may be known.

        With samples of a fixed size the real users of a round would tell how many canaries are in it, and in replies
        that bring their own noise the noise is not known.
        """
        config, guarantee = self.config, self.guarantee
        summed = config.server.strategy == "FedAvg" and not config.server.options and guarantee.trust == "user-central"
        if not summed or config.client_sampling == "fixed":
            return
        assert guarantee.clip is not None
        for place in range(len(next(iter(replies.values())))):
            update = {name: replies[name][place] - shared[name] for name in self.shared_names}
            kept, _ = clip_update(update, guarantee.clip, guarantee.per_layer)
            self.known = self.known + flat(kept)[0] / guarantee.denominator


def with_canaries(experiment: Experiment, count: int) -> Experiment:
    """Register so many users without records behind the real ones, under a guarantee that is resolved for all."""
    examples, none = experiment.examples, np.zeros(0, np.int64)
    users = (*examples.users, *(f"canary/{number}" for number in range(count)))
    extended = replace(
        examples, users=users, train=(*examples.train, *[none] * count), test=(*examples.test, *[none] * count)
    )
    guarantee = resolve(experiment.config, experiment.plan, users=len(users))
    return replace(experiment, examples=extended, guarantee=guarantee)


def orthogonal(count: int, dimension: int, key: bytes) -> Floats:
    """Return uniformly random orthonormal directions (count, dimension): no canary disturbs another's score."""
    drawn = generator(key, "directions").standard_normal((dimension, count), dtype=np.float32)
    base, upper = np.linalg.qr(drawn)
    return np.ascontiguousarray((base * np.sign(np.diag(upper))).T)  # the signs make it uniform (Mezzadri, 2007)


def _estimate(bound: Finding, scores: NDArray[Any], included: Mask, release: NDArray[Any]) -> Finding:
    """The estimate of Andrew et al. from the same run: cosine of each canary that was in with the release.

    The others that were in are orthogonal to it and only make the release longer, so they are taken off: its length is
    what it is along the directions that nobody sent.
    """
    count, dimension, delta = len(scores), len(release), bound.delta
    assert delta is not None
    beyond = max(0.0, float(release @ release - scores @ scores))
    silent = scores[~included]
    variance = (float(silent @ silent) + beyond) / max(1, len(silent) + dimension - count)
    inside = scores[included]
    middle, low, high = user_canary.estimate(
        inside / np.sqrt(inside**2 + (dimension - 1) * variance), dimension, delta
    )  # fmt: skip
    ceiling = user_canary.ceiling(1, dimension, delta)
    return replace(
        bound,
        name="estimate, user canaries (Andrew et al.)",
        empirical=middle,
        ceiling=ceiling,
        kind="estimate",
        verdict="consistent" if ceiling > bound.claimed else "powerless",  # an estimate refutes nothing
        detail=f"Cosines of the {len(inside)} canaries that were in with the change of the shared model, 95% interval "
        f"from their mean {low:.2f} to {high:.2f}; an estimate, no bound.",
        numbers={"low": low, "high": high, "included": float(len(inside)), "dimension": float(dimension)},
    )


def _how_many(asked: int | None, dimension: int, real: int, delta: float) -> int:
    """The number of canaries: no more than orthogonal directions, than memory, and than delta allows users."""
    most = min(dimension, NUMBERS // dimension, math.ceil(1 / delta) - 1 - real)
    count = min(most, MOST) if asked is None else asked
    if not LEAST <= count <= most:
        raise ConfigError(
            f"user canaries: {count} of them, but from {LEAST} to {most} can be used: one for each of the {dimension} "
            f"shared numbers, fewer than 1/delta users with the {real} real ones, and 100 MB; change canaries or "
            "privacy.delta, or share more."
        )
    return count


def _never_asked(config: Config) -> float:
    """Share of the registered users that is expected to be sampled in no round."""
    if config.client_sampling == "cyclic" and config.client_rate < 1:
        return max(0.0, 1 - config.rounds / period(config.client_rate))
    return float((1 - config.client_rate) ** config.rounds)
