"""Checks of the mechanism itself: what one record or one user can do, and whether the noise is what the ledger says.

Every check runs the production path twice with the same coins and one thing changed, and compares what is released.
They are no statistics on epsilon: a check either holds or shows a bug, at the configuration it was run for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedpers.audit.bench import Arrays, Bench, Trace, flat, slice_of, watch_noise
from fedpers.audit.bounds import Finding
from fedpers.audit.checks import SURE, check, noise_checks
from fedpers.audit.recount import recount
from fedpers.cohort.clients import Clients
from fedpers.config import Config, LearningRates
from fedpers.methods.base import Phase
from fedpers.privacy.adaptive_clip import split_noise
from fedpers.privacy.mechanisms import clip_update
from fedpers.reporting import Reporter

STILL, DRIFT = 100.0, 0.25  # a lot so large that weights hardly move in a step, and how far sums may drift for it
ROUNDS, SAMPLED_ROUNDS = 3, 60


def probe(config: Config, reporter: Reporter | None = None) -> list[Finding]:
    """Check sensitivity, noise and accounting of a configuration on a slice of its people.

    Returns one finding of kind "check" for each; its `claimed` is what is allowed and `empirical` what was measured.

    Raises:
        FedpersError: the configuration itself is refused, or cannot be run.
    """
    config = slice_of(config)
    if config.privacy.unit == "record":  # step size 1, so that a reply is the step's noised sum
        plain = {"optimizer": "sgd", "lr": LearningRates(adapter=1.0, norm=1.0, head=1.0)}
        config = config.model_copy(
            update={
                "local": config.local.model_copy(update=plain),
                "personal": config.personal.model_copy(update=plain),
            }
        )
    with TemporaryDirectory() as folder:
        bench = Bench(config, Path(folder), reporter)
        unit = config.privacy.unit
        if not bench.experiment.plan.shared:
            return [check("nothing is shared", unit, "release", 0.0, 0.0, "No message leaves, so none is checked.")]
        if unit == "none":
            return [check("no guarantee", unit, "release", 0.0, 0.0, "Nothing is claimed, so nothing is checked.")]
        if unit == "record":
            found = [*_record_sensitivity(bench), *_record_noise(bench)]
        else:
            found = [*_user_sensitivity(bench), *_sampler(bench), *_user_noise(bench)]
        return [*found, *recount(bench.ledger)]


def violations(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings that show a claim to be false."""
    return [finding for finding in findings if finding.verdict == "violation"]


# ---------------------------------------------------------------- one record


def _record_phases(bench: Bench) -> Iterator[tuple[Phase, list[tuple[int, Phase]], range]]:
    """Each noised phase, after the phases before it that run without noise (earlier noised ones compose), and the
    rounds that run it.
    """
    plan, before = bench.experiment.plan, list[tuple[int, Phase]]()
    for index, phase in enumerate(plan.round):
        if plan.protected(phase):
            # Of a pair of noised steps each is looked at as one of its own, and a phase that rests in some rounds too.
            plain = Phase(*phase.train, without=phase.without, pull=phase.pull, gate=phase.gate)
            yield plain, [*before, (index, plain)], range(phase.turn[0] or phase.turn[1], 100, phase.turn[1])
        elif not phase.own:
            before.append((index, phase))


def _one_step(bench: Bench, clients: Clients, phase: Phase, number: int) -> NDArray[np.float64]:
    """What one step of every client adds up in the groups of a phase, (users, numbers)."""
    start = bench.start()
    users = range(len(clients.examples.users))
    replies = clients.train_round(number, users, start)
    kept, rows = clients.store.drain()
    initial = {name: value.numpy() for name, value in clients.layout.kept().items()}
    moved = {name: start[name][None] - reply for name, reply in replies.items()}
    moved |= {name: initial[name][None] - row for name, row in rows.items() if name not in replies}
    names = [name for name in clients.model.names(phase.train) if name in moved]
    assert kept == list(users) or not rows
    return np.concatenate([moved[n].reshape(len(users), -1).astype(np.float64) for n in sorted(names)], axis=1)


def _record_sensitivity(bench: Bench) -> list[Finding]:
    """Take one record away, from the raw data on for one and from the rows for more: only its owner's sum may move."""
    clip, examples = bench.experiment.guarantee.clip, bench.experiment.examples
    assert clip is not None
    found = []
    for phase, phases, (number, *_) in _record_phases(bench):
        quiet = {"noise_multiplier": 0.0, "steps": 1, "denominator": 1.0, "rate": 1.0}
        whole = _one_step(bench, bench.clients(quiet, phases=phases), phase, number)
        own, others = 0.0, 0.0
        for user in range(0, len(examples.users), 3):
            for row in examples.train[user][:2]:
                train = list(examples.train)
                train[user] = train[user][train[user] != row]
                clients = bench.clients(quiet, phases=phases, examples=replace(examples, train=tuple(train)))
                change = np.linalg.norm(_one_step(bench, clients, phase, number) - whole, axis=1) / clip
                own, others = _largest(own, change[user]), _largest(others, *np.delete(change, user))
        user = len(examples.users) - 1
        world = bench.without(user, bench.experiment.federation.train[user][0])
        change = np.linalg.norm(
            _one_step(bench, bench.clients(quiet, phases=phases, world=world), phase, number) - whole, axis=1
        )
        own, others = _largest(own, change[user] / clip), _largest(others, *(np.delete(change, user) / clip))
        what = f"{phase}"
        found += [
            check("sensitivity of one record", "record", what, 1.0, own,
                     "Largest change of its owner's sum of one step when one record is taken away, in clips."),
            check("one record, other clients", "record", what, 0.0, others,
                     "Largest change of any other client's sum when one record is taken away, in clips."),
            check("sums of the next step", "record", what, DRIFT, _carried(bench, phase, phases, number),
                     "How far the next step's sums of the same records lie from a step's, relative to them, at nearly "
                     "the same weights: what one step leaves behind would count again under the next one's noise."),
        ]  # fmt: skip
    return found


def _carried(bench: Bench, phase: Phase, phases: list[tuple[int, Phase]], number: int) -> float:
    """The largest difference of any client between the sums of two steps in a row, relative to the first's."""
    still = {"noise_multiplier": 0.0, "denominator": STILL, "rate": 1.0}
    index, _ = phases[-1]  # without a pull, which grows with each step
    phases = [*phases[:-1], (index, Phase(*phase.train, without=phase.without, gate=phase.gate))]
    one, two = (
        STILL * _one_step(bench, bench.clients({**still, "steps": steps}, phases=phases), phase, number)
        for steps in (1, 2)
    )
    first = np.linalg.norm(one, axis=1)
    assert bench.experiment.guarantee.clip is not None
    apart = np.linalg.norm(two - 2 * one, axis=1) / np.maximum(first, bench.experiment.guarantee.clip)
    return float(apart.max())


def _record_noise(bench: Bench) -> list[Finding]:
    """One step with noise, less the same without: standard normal, and another one for each client, round and phase."""
    guarantee = bench.experiment.guarantee
    clients = bench.clients()
    seen = watch_noise(clients)
    bench.rounds(clients, ROUNDS, start=bench.start())  # a ledger of the production path
    line = bench.ledger.releases[0]
    assert line.clip is not None
    draws = []
    for phase, phases, rounds in _record_phases(bench):
        common, last = {"steps": 1, "denominator": 1.0}, phases[-1:]
        for number in rounds[:2]:
            noisy = _one_step(bench, bench.clients(common, phases=last), phase, number)
            quiet = {**common, "noise_multiplier": 0.0}
            draws += list(noisy - _one_step(bench, bench.clients(quiet, phases=last), phase, number))
        draws += [
            line.noise_multiplier * line.clip * draw for draw in _later_step(bench.clients(), rounds[0], *last[0])
        ]
    more = max(sum(one.round == at for at, *_ in seen) - one.steps - one.head_steps for one in bench.ledger.releases)
    return [
        check("steps on the ledger", "record", "round", 0.0, float(max(more, 0)),
                 "Noised steps that a client makes in a round beyond those that its ledger line pays for."),
        *noise_checks("record", draws, line.noise_multiplier * line.clip, guarantee.noise_multiplier > 0),
    ]  # fmt: skip


def _later_step(clients: Clients, number: int, index: int, phase: Phase) -> list[NDArray[np.float64]]:
    """The noise of the second step of a round, by client; the first step's is in the replies that were measured."""
    cohort = list(range(len(clients.examples.users)))
    arrays = clients.step_noise(cohort, phase, ("round", number, index))(1)
    return [np.concatenate([np.asarray(a[user], dtype=np.float64).ravel() for a in arrays]) for user in cohort]


# ---------------------------------------------------------------- one user


def _user_sensitivity(bench: Bench) -> list[Finding]:
    """Leave one user without records: the clean sum moves by a clip, and the broadcast by what noise could do."""
    guarantee, config = bench.experiment.guarantee, bench.config
    start = bench.start()
    summed = guarantee.server_sums
    quiet = {} if guarantee.trust == "user-central" else {"noise_multiplier": 0.0}  # else noise is in the replies
    everyone = bench.rounds(bench.clients(quiet), 1, start=start, first=bench.busy)
    took_part = sorted(everyone.replies[0])
    worlds = [(took_part[0], True), *((user, False) for user in took_part[1:4])]
    moved, coupled, allowed = 0.0, 0.0, float(2 if guarantee.trust == "user-local" else 1)
    for user, raw in worlds:
        train = list(bench.experiment.examples.train)
        train[user] = train[user][:0]
        changed: dict[str, Any] = {"examples": replace(bench.experiment.examples, train=tuple(train))}
        if raw:
            changed = {"world": bench.without(user)}
        less = bench.rounds(bench.clients(quiet, **changed), 1, start=start, first=bench.busy)
        assert everyone.releases[0].clip is not None
        scale = guarantee.denominator / everyone.releases[0].clip if summed else 1 / everyone.releases[0].clip
        moved = _largest(moved, scale * _distance(everyone, less, summed))
        if guarantee.trust == "user-central":
            multiplier = everyone.releases[0].noise_multiplier
            if everyone.releases[0].bit_noise is not None:
                multiplier = split_noise(multiplier, everyone.releases[0].bit_noise)
            if multiplier > 0:
                shift = _difference(everyone.clean[0], less.clean[0], scale / multiplier)
                moved_on = bench.clients(quiet, **changed)
                again = bench.rounds(moved_on, 1, start=start, shift=shift, first=bench.busy)
                step = np.linalg.norm(flat(everyone.broadcasts[1]) - flat(start))
                gap = np.linalg.norm(flat(again.broadcasts[1]) - flat(everyone.broadcasts[1]))
                coupled = _largest(coupled, float(gap / step))
    found = [
        check("sensitivity of one user", "user", "sum" if summed else "reply", allowed, moved,
                 "Largest change when one user has no records any more, in clips, everything else being equal."),
    ]  # fmt: skip
    if guarantee.trust == "user-central":
        found.append(
            check("one user at the broadcast", "user", config.server.strategy, 0.0, coupled,
                     "Broadcasts with and without a user, the noise making up for the difference of the sums, relative "
                     "to the step: equal exactly if the server's optimizer sees nothing but the noised mean.")
        )  # fmt: skip
    return found


def _largest(*values: float) -> float:
    """Return the largest, and no number where one is none: Python's `max` would pass over it."""
    return float(np.max(values))


def _distance(everyone: Trace, less: Trace, summed: bool) -> float:
    """How far one round's clean mean, or any single reply, moved."""
    if summed:
        return float(np.linalg.norm(flat(everyone.clean[0]) - flat(less.clean[0])))
    replies = zip(everyone.replies[0].values(), less.replies[0].values(), strict=True)
    return _largest(*(float(np.linalg.norm(flat(one) - flat(other))) for one, other in replies))


def _difference(one: Arrays, other: Arrays, scale: float) -> dict[str, NDArray[np.float64]]:
    return {name: scale * (np.asarray(one[name], dtype=np.float64) - other[name]) for name in one}


def _user_noise(bench: Bench) -> list[Finding]:
    """Some rounds' noise, less the clean mean: standard normal in units of the ledger, and fresh in each round."""
    guarantee = bench.experiment.guarantee
    trace = bench.rounds(bench.clients(), ROUNDS, start=bench.start())
    if guarantee.trust == "user-central":
        rows = []
        for noised, clean, line in zip(trace.noised, trace.clean, trace.releases, strict=True):
            assert line.clip is not None
            multiplier = (
                line.noise_multiplier if line.bit_noise is None else split_noise(line.noise_multiplier, line.bit_noise)
            )
            noise = (flat(noised) - flat(clean)) * guarantee.denominator
            rows.append(noise / (multiplier * line.clip) if multiplier else noise)
        # C Y = Z: what is released is Y, what is fresh is Z
        bands = np.array(guarantee.bands or (1.0,))
        draws = [np.tensordot(bands[: t + 1], np.array(rows[t::-1][: len(bands)]), 1) for t in range(len(rows))]
        return noise_checks("user", draws, 1.0, trace.releases[0].noise_multiplier > 0)
    draws = [row for number in (1, 2) for row in _reply_noise(bench, number)]
    line = trace.releases[0]
    assert line.clip is not None
    expected = line.noise_multiplier * line.clip / math.sqrt(guarantee.honest or 1)
    return noise_checks("user", draws, expected, line.noise_multiplier > 0)


def _reply_noise(bench: Bench, number: int) -> Iterator[NDArray[np.float64]]:
    """Replies less what the same clients would send if they clipped their updates and added nothing."""
    start, clip = bench.start(), bench.experiment.guarantee.clip
    assert clip is not None
    noisy, clean = bench.clients(), bench.clients({"noise_multiplier": 0.0})
    users = range(len(noisy.examples.users))
    sent, quiet = noisy.train_round(number, users, start), clean.train_round(number, users, start)
    for user in users:
        update = {name: quiet[name][user] - start[name] for name in quiet}
        kept, _ = clip_update(update, clip, bench.experiment.guarantee.per_layer)
        yield flat({name: sent[name][user] - start[name] - kept[name] for name in sent})


def _sampler(bench: Bench) -> list[Finding]:
    """Count whom the strategy asks over many rounds, where secret sampling is credited."""
    guarantee, users = bench.experiment.guarantee, len(bench.experiment.examples.users)
    if guarantee.amplification != "clients" or guarantee.rate == 1 or bench.config.client_sampling != "poisson":
        return []
    asked = sum(bench.sampled(SAMPLED_ROUNDS)) / (SAMPLED_ROUNDS * users)
    spread = math.sqrt(guarantee.rate * (1 - guarantee.rate) / (SAMPLED_ROUNDS * users))
    off = abs(asked - guarantee.rate) / spread
    limit = float(stats.norm.isf(SURE))
    return [
        check("client sampling", "user", f"{SAMPLED_ROUNDS} rounds", limit, off,
              "How far the share of clients that are asked is from the rate that is credited, in standard deviations.",
              {"asked": asked, "rate": guarantee.rate}, holds=off <= limit)
    ]  # fmt: skip
