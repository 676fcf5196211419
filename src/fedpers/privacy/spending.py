"""From the lines of a ledger to epsilon: whose events count, how they compose, and by which accountant."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, PlainSerializer

from fedpers.errors import LedgerError
from fedpers.privacy.accounting import GaussianEvent, epsilon, gaussian_epsilon
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import SHARED, Opening, Release
from fedpers.privacy.matrix_noise import sensitivity
from fedpers.privacy.renyi import RdpFilter, fixed_size_epsilon

# JSON has no infinity; "inf" is what float() reads back
Epsilon = Annotated[float, PlainSerializer(lambda value: "inf" if value == math.inf else value, when_used="json")]


class PerClient(BaseModel):
    """Spread of epsilon over all registered clients; a client that never took part has 0."""

    model_config = ConfigDict(frozen=True)

    min: Epsilon
    median: Epsilon
    max: Epsilon


@dataclass(frozen=True)
class Spending:
    """What a ledger's releases add up to.

    `events` are those behind `total`, where they are (Poisson sub-sampled) Gaussians of sensitivity one clip.
    """

    total: float
    accountant: str
    events: tuple[GaussianEvent, ...] = ()
    per_client: PerClient | None = None


class BudgetSpent(Exception):
    """The next round would pass the budget, so the rounds end here; not an error."""


def spending(opening: Opening, releases: Sequence[Release]) -> Spending:
    """Compose a ledger's releases.

    Raises:
        LedgerError: lines that the accountant cannot compose, or noise that passes the filter.
    """
    if opening.delta is None:
        return Spending(math.inf if releases else 0.0, "none: nothing is claimed")
    if opening.secret == SHARED and releases:
        return Spending(math.inf, "none: whoever receives a release knows its noise, too")
    if not releases:
        nothing = None if opening.amplification == "clients" else _spread([0.0])
        return Spending(0.0, "none: nothing to compose", per_client=nothing)
    if opening.unit == "record":
        return _by_records(opening, releases, opening.delta)
    if any(release.mechanism == "none" for release in releases):
        return Spending(math.inf, "none: something was released without noise")
    if opening.amplification == "none":
        return _by_participation(opening, releases, opening.delta)
    if opening.filter is not None:
        return _by_filter(opening, releases, opening.delta)
    if opening.client_sampling == "fixed":
        return _by_fixed_size(opening, releases, opening.delta)
    events = tuple(_event(release) for release in releases)
    return Spending(epsilon(events, opening.delta), _accountant(events), events)


def spent(ledger: Ledger, coming: Release | None = None) -> float:
    """Epsilon of what the ledger holds so far, and of a coming release with it; the claim is made at the end."""
    return spending(ledger.opening, [*ledger.releases, *([coming] if coming else [])]).total


def check_budget(ledger: Ledger, coming: Release, budget: float) -> None:
    """Raise BudgetSpent if the coming release would pass the budget, or the ledger's filter."""
    opening = ledger.opening
    if opening.filter is not None:
        if not _filter(opening).allows([_event(release) for release in (*ledger.releases, coming)]):
            raise BudgetSpent
    elif not math.isinf(budget) and spent(ledger, coming) > budget:
        raise BudgetSpent


def kind(opening: Opening) -> tuple[Hashable, ...]:
    """What user-level runs have in common whose releases can be composed."""
    fields = ("unit", "trust", "adjacency", "client_sampling", "amplification", "delta", "population")
    return (*(getattr(opening, name) for name in fields), opening.filter is None, opening.secret == SHARED)


def composed(ledgers: Sequence[Ledger], people: Sequence[Hashable] = ()) -> float:
    """Epsilon of several user-level runs of one `kind` on the same users together, at their delta: an upper bound.

    Args:
        ledgers: the runs.
        people: for each run, something equal where its users' numbers stand for the same people, by default all are.
            Runs whose numbers do not are composed as if the most exposed users of each were one person.

    Raises:
        LedgerError: runs of another unit, or of different kinds.
    """
    openings = [ledger.opening for ledger in ledgers]
    opening, delta = openings[0], openings[0].delta
    if len(set(map(kind, openings))) != 1 or opening.unit != "user" or delta is None:
        raise LedgerError("only user-level runs with the same trust, sampling, schedule and delta are composed.")
    releases = [release for ledger in ledgers for release in ledger.releases]
    if not releases:
        return 0.0
    if opening.secret == SHARED or any(release.mechanism == "none" for release in releases):
        return math.inf
    if opening.amplification == "none":  # each user's Gaussians are one, with the root of the summed squares
        totals: defaultdict[Hashable, defaultdict[int, float]] = defaultdict(lambda: defaultdict(float))
        for ledger, who in zip(ledgers, people or [None] * len(ledgers), strict=True):
            for user, mu in _exposures(ledger.opening, ledger.releases, opening.sensitivity).items():
                totals[who][user] += mu**2
        squares = (max(found.values(), default=0.0) for found in totals.values())
        return gaussian_epsilon(math.sqrt(math.fsum(squares)), delta)
    if opening.filter is not None:
        filters = [_filter(one) for one in openings]
        # A Renyi divergence grows with its order, so at the smallest order every filter's budget still holds.
        lowest = min(filters, key=lambda one: one.order)
        return math.fsum(one.budget for one in filters) + lowest.epsilon - lowest.budget
    if opening.client_sampling == "fixed":  # the least noise and the most clients for all, or no amplification
        rate = max(release.sampling_rate for release in releases)
        least = min(releases, key=lambda release: release.noise_multiplier).model_copy(update={"sampling_rate": rate})
        unamplified = gaussian_epsilon(2 * math.hypot(*(1 / release.noise_multiplier for release in releases)), delta)
        return min(_by_fixed_size(opening, [least] * len(releases), delta).total, unamplified)
    return epsilon([_event(release) for release in releases], delta)


def record_level(opening: Opening, releases: Sequence[Release]) -> float | None:
    """Epsilon for one record that a user-level ledger implies, or None where it is not computed (refusal R6).

    One changed record turns a user's update into another one, which counts as two clips where the user-level number
    counts one. It is never the user-level epsilon itself.
    """
    if opening.unit != "user" or opening.delta is None or not releases or opening.filter is not None:
        return None
    if opening.secret == SHARED or any(release.mechanism == "none" for release in releases):
        return math.inf
    if opening.sensitivity == 2:
        return spending(opening, releases).total
    if opening.amplification == "clients":
        return epsilon([_event(release) for release in releases], opening.delta, replace_one=True)
    return gaussian_epsilon(2 * max(_exposures(opening, releases, 1).values(), default=0.0), opening.delta)


def _event(release: Release) -> GaussianEvent:
    # noise 0 is how the accountant knows a release without protection; it has at least one step
    return GaussianEvent(release.noise_multiplier, release.sampling_rate, max(release.steps, 1))


def _filter(opening: Opening) -> RdpFilter:
    assert opening.filter is not None
    assert opening.delta is not None
    return RdpFilter(order=opening.filter.order, epsilon=opening.filter.epsilon, delta=opening.delta)


def _by_filter(opening: Opening, releases: Sequence[Release], delta: float) -> Spending:
    """Noise that depends on earlier releases: the filter's epsilon, whatever was spent of it."""
    found = _filter(opening)
    if not found.allows([_event(release) for release in releases]):
        raise LedgerError("the releases pass the ledger's Renyi filter, so its epsilon does not hold for them.")
    return Spending(found.epsilon, f"Renyi filter of order {found.order:g} (Feldman and Zrnic, 2021)")


def _by_fixed_size(opening: Opening, releases: Sequence[Release], delta: float) -> Spending:
    multipliers = {release.noise_multiplier for release in releases}
    rates = {release.sampling_rate for release in releases}
    if len(multipliers) != 1 or len(rates) != 1:
        raise LedgerError("fixed-size client sampling is accounted with one noise multiplier and one rate.")
    sample = max(1, round(rates.pop() * opening.population))
    total = fixed_size_epsilon(multipliers.pop(), opening.population, sample, len(releases), delta)
    return Spending(total, f"RDP, sampling without replacement (dp-accounting {version('dp-accounting')}), replace-one")


def _by_participation(opening: Opening, releases: Sequence[Release], delta: float) -> Spending:
    """No sampling is credited: each user's own rounds count, and the largest epsilon is everyone's."""
    exposures = _exposures(opening, releases, opening.sensitivity)
    values = list(exposures.values()) + [0.0] * (opening.population - len(exposures))
    by_value = {value: gaussian_epsilon(value, delta) for value in set(values)}
    spread = _spread([by_value[value] for value in values])
    noise = "banded noise, sensitivity of the real participation" if opening.coefficients else "real participation"
    return Spending(
        spread.max, f"analytic Gaussian (Balle and Wang, 2018), {noise}, no amplification", per_client=spread
    )


def _exposures(opening: Opening, releases: Sequence[Release], clips: int) -> dict[int, float]:
    """Sensitivity over noise deviation of all releases together, for each user that took part."""
    rounds: defaultdict[int, list[Release]] = defaultdict(list)
    for release in releases:
        for client in release.clients or ():
            rounds[client].append(release)
    if len(rounds) > opening.population:
        raise LedgerError(f"{len(rounds)} clients took part, but only {opening.population} are registered.")
    if not opening.coefficients:
        return {
            client: clips * math.sqrt(sum(release.noise_multiplier**-2 for release in own))
            for client, own in rounds.items()
        }
    multipliers = {release.noise_multiplier for release in releases}
    if len(multipliers) != 1:
        raise LedgerError("banded noise is accounted with one noise multiplier for all rounds.")
    noise = multipliers.pop()
    patterns = {client: tuple(release.round for release in own) for client, own in rounds.items()}
    bands = np.array(opening.coefficients)
    moved = {pattern: sensitivity(bands, pattern, len(releases)) for pattern in set(patterns.values())}
    return {client: clips * moved[pattern] / noise for client, pattern in patterns.items()}


def _spread(values: Sequence[float]) -> PerClient:
    return PerClient(min=min(values), median=float(np.median(values)), max=max(values))


def _by_records(opening: Opening, releases: Sequence[Release], delta: float) -> Spending:
    """Each client's own steps at the record rate; the largest counts, since clients' records are disjoint.

    No amplification by client sampling: the server knows who sent something. With split data each record meets the
    steps of its own half alone, so the half with more of them counts (parallel composition).
    """
    halves = [_histories(opening, releases, half) for half in ("steps", "head_steps")]
    found = [_by_histories(opening, half, delta) for half in halves if any(half)]  # () is a client without steps
    found = found or [_by_histories(opening, halves[0], delta)]
    return max(found, key=lambda one: one.total)


def _histories(opening: Opening, releases: Sequence[Release], half: str) -> Counter[tuple[GaussianEvent, ...]]:
    """How many clients share each history of steps on one half of their records."""
    steps: defaultdict[int, Counter[tuple[float, float]]] = defaultdict(Counter)
    for release in releases:
        for client in release.clients or ():
            event = (release.noise_multiplier, release.sampling_rate)
            steps[client][event] += getattr(release, half)
    idle = opening.population - len(steps)
    if idle < 0:
        raise LedgerError(f"{len(steps)} clients sent something, but only {opening.population} are registered.")
    found = Counter(tuple(GaussianEvent(z, q, n) for (z, q), n in sorted(own.items()) if n) for own in steps.values())
    if idle:
        found[()] += idle
    return found


def _by_histories(opening: Opening, sizes: Counter[tuple[GaussianEvent, ...]], delta: float) -> Spending:
    histories = list(sizes)
    if len({(event.noise_multiplier, event.sampling_rate) for history in histories for event in history}) <= 1:
        histories.sort(key=lambda history: sum(event.count for event in history))  # epsilon grows with the count
    else:
        histories.sort(key=lambda history: epsilon(history, delta))
    ends = list(accumulate(sizes[history] for history in histories))

    def at(rank: int) -> tuple[GaussianEvent, ...]:
        return histories[bisect_right(ends, rank)]

    last = opening.population - 1
    low, middle, other_middle, high = (epsilon(at(rank), delta) for rank in (0, last // 2, (last + 1) // 2, last))
    spread = PerClient(min=low, median=(middle + other_middle) / 2, max=high)
    return Spending(high, _accountant(at(last)), at(last), spread)


def _accountant(events: Sequence[GaussianEvent]) -> str:
    if not events or any(event.noise_multiplier == 0 for event in events):
        return "none: nothing to compose"
    if all(event.sampling_rate == 1 for event in events):
        return "analytic Gaussian (Balle and Wang, 2018), add/remove"
    return f"PLD (dp-accounting {version('dp-accounting')}), add/remove"
