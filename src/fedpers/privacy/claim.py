"""The claim: what a ledger proves, for whom, against whom, in numbers and in one paragraph.

A claim is derived from a ledger and from nothing else, so it cannot promise more than what was released allows. It
always names unit, adjacency, adversary, delta, sampler, accountant and what it leaves out.
"""

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal
from importlib.metadata import version
from itertools import accumulate
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, PlainSerializer

from fedpers.errors import ConfigError, LedgerError, PrivacyRefusal
from fedpers.privacy.accounting import GaussianEvent, cross_check, epsilon
from fedpers.privacy.ledger import Ledger, Opening, Release

# JSON has no infinity; "inf" is what float() reads back
Epsilon = Annotated[float, PlainSerializer(lambda value: "inf" if value == math.inf else value, when_used="json")]


class PerClient(BaseModel):
    """Spread of epsilon over all registered clients; a client that never took part has 0."""

    model_config = ConfigDict(frozen=True)

    min: Epsilon
    median: Epsilon
    max: Epsilon


class Claim(BaseModel):
    """A privacy statement.

    Attributes:
        unit: record, user or none: what one protected thing is.
        trust: Who adds the noise: record-local, user-central or none.
        adjacency: What two neighbouring data sets are.
        protected_against: Whom the claim holds against.
        not_protected_against: Whom or what it does not cover.
        epsilon: Upper bound; infinity where there is no guarantee, 0 where nothing was released.
        delta: Its delta; None for unit none.
        accountant: Which computation gave epsilon.
        cross_check: Epsilon by other accountants; never the claim.
        sampler: How the protected unit is sampled, in words.
        q: Sampling rate of all noised releases; None without any, or if it changed during the run.
        sigma: Noise multiplier, likewise.
        clip: L2 bound of one unit's contribution to any release, likewise.
        steps: Composed noisy steps: rounds for unit user, those of the client with the largest epsilon for unit record.
        rounds: Number of releases.
        per_client: Spread over clients for unit record, otherwise None.
        head_policy: How heads are trained.
        excluded: What the accounting leaves out.
        secure_rng: Whether noise came from a cryptographic generator: never, in a simulator.
        simulated_secagg: Whether the claim leans on a simulated secure aggregation: never, so far.
        secret: Where the key of the noise comes from.
        ledger_head: Hash of the last ledger line; ties the claim to one ledger.
        sentence: All of this in one paragraph.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: str
    trust: str
    adjacency: str
    protected_against: list[str]
    not_protected_against: list[str]
    epsilon: Epsilon
    delta: float | None
    accountant: str
    cross_check: dict[str, Epsilon]
    sampler: str
    q: float | None
    sigma: float | None
    clip: float | None
    steps: int
    rounds: int
    per_client: PerClient | None
    head_policy: str
    excluded: list[str]
    secure_rng: bool = False
    simulated_secagg: bool = False
    secret: str
    ledger_head: str
    sentence: str

    def to_json(self) -> str:
        """Indented JSON; an infinite epsilon is the string "inf"."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read back what `to_json` wrote."""
        return cls.model_validate_json(text)

    def label(self) -> str:
        """Short form for the axis of a figure, with epsilon rounded up."""
        if self.rounds == 0:
            return "nothing released (ε = 0)"
        if self.epsilon == math.inf:
            return "no privacy (ε = ∞)"
        who = {"user": "trusted server", "record": "untrusted server"}[self.unit]
        return f"{self.unit}-level (ε = {rounded_up(self.epsilon)}, δ = {self.delta:g}), {who}"


def check_delta(delta: float, protected: int) -> None:
    """Refuse a delta that would allow to publish one of the protected users or records outright (refusal R13).

    Args:
        delta: Target delta.
        protected: Number of users (unit user), or of records that they may hold together (unit record).

    Raises:
        ConfigError: `delta` is not in (0, 1).
        PrivacyRefusal: `delta` is 1 / `protected` or more.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be in (0, 1), not {delta}.")
    if delta >= 1 / protected:
        raise PrivacyRefusal(
            f"delta {delta:g} with {protected} protected units would allow one of them to be published as it is; "
            f"choose delta well below {1 / protected:g}."
        )


def claim_from(
    ledger: Ledger, *, expected_rounds: int | None, excluded: Sequence[str], population_note: str = ""
) -> Claim:
    """Derive the claim that a complete ledger proves (reference: section 2.1 and table 2.5).

    Args:
        ledger: The whole ledger of a run.
        expected_rounds: How many releases the run made, one per round, empty rounds included; None if unknown.
        excluded: What the accounting leaves out, such as metrics that the simulator reads and tuning.
        population_note: A sentence to add, for example on who counts as registered.

    Raises:
        LedgerError: A round is missing, or lines of an interrupted run have not been replayed.
        PrivacyRefusal: Delta is too large for the number of protected users or records (R13).
    """
    opening, releases = ledger.opening, ledger.releases
    _check_complete(ledger, expected_rounds)
    if opening.delta is not None:
        check_delta(opening.delta, opening.protected)
    total, events, per_client = _spent(opening, releases)
    noised = [release for release in releases if release.mechanism == "gaussian"]
    clips = {release.clip for release in releases if release.clip is not None}
    rates = {release.sampling_rate for release in noised}
    against, not_against = _adversaries(opening, total)
    claim = Claim(
        unit=opening.unit,
        trust=opening.trust,
        adjacency=opening.adjacency,
        protected_against=against,
        not_protected_against=not_against,
        epsilon=total,
        delta=opening.delta,
        accountant=_accountant(events),
        cross_check={} if opening.delta is None else cross_check(events, opening.delta),
        sampler=_sampler(opening, rates),
        q=_single(rates),
        sigma=_single({release.noise_multiplier for release in noised}),
        clip=_single(clips),
        steps=sum(event.count for event in events if event.noise_multiplier > 0),
        rounds=len(releases),
        per_client=per_client,
        head_policy=opening.head_policy,
        excluded=list(excluded),
        secret=opening.secret,
        ledger_head=ledger.head,
        sentence="",
    )
    return claim.model_copy(update={"sentence": " ".join(_sentences(claim, bool(clips), population_note))})


def spent(ledger: Ledger) -> float:
    """Epsilon of what the ledger holds so far, for the progress line; the claim is made at the end."""
    return _spent(ledger.opening, ledger.releases)[0]


def composed(ledgers: Sequence[Ledger]) -> float:
    """Epsilon of several user-level runs on the same users together, at the first one's delta."""
    delta = ledgers[0].opening.delta
    if delta is None or any(ledger.opening.unit != "user" for ledger in ledgers):
        raise LedgerError("only user-level runs are composed.")
    return epsilon([_event(release) for ledger in ledgers for release in ledger.releases], delta)


def _check_complete(ledger: Ledger, expected_rounds: int | None) -> None:
    """An unwritten release is an unaccounted one, so a gap leaves nothing to claim (refusal R4)."""
    if ledger.pending:
        raise LedgerError(f"incomplete: {len(ledger.pending)} releases of an interrupted run are not replayed yet.")
    rounds = [release.round for release in ledger.releases]
    missing = sorted(set(range(1, max([expected_rounds or 0, *rounds]) + 1)) - set(rounds))
    if missing:
        raise LedgerError(f"incomplete: {ledger.path} has no line for round {missing[0]}, so nothing can be claimed.")
    if expected_rounds is not None and len(rounds) > expected_rounds:
        raise LedgerError(f"{ledger.path} holds {len(rounds)} rounds, but the run says that it made {expected_rounds}.")


def _event(release: Release) -> GaussianEvent:
    # noise 0 is how the accountant knows a release without protection; it has at least one step
    return GaussianEvent(release.noise_multiplier, release.sampling_rate, max(release.steps, 1))


def _spent(opening: Opening, releases: Sequence[Release]) -> tuple[float, tuple[GaussianEvent, ...], PerClient | None]:
    """Epsilon, the events behind it, and its spread over clients."""
    if opening.delta is None:
        return (math.inf if releases else 0.0), (), None
    if opening.unit == "user":
        events = tuple(_event(release) for release in releases)
        return epsilon(events, opening.delta), events, None
    return _spent_by_records(opening, releases, opening.delta)


def _spent_by_records(
    opening: Opening, releases: Sequence[Release], delta: float
) -> tuple[float, tuple[GaussianEvent, ...], PerClient]:
    """Each client's own steps at the record rate; the largest counts, since clients' records are disjoint.

    No amplification by client sampling: the server knows who sent something.
    """
    steps: defaultdict[int, Counter[tuple[float, float]]] = defaultdict(Counter)
    for release in releases:
        event = _event(release)
        for client in release.clients or ():
            steps[client][event.noise_multiplier, event.sampling_rate] += event.count
    idle = opening.population - len(steps)
    if idle < 0:
        raise LedgerError(f"{len(steps)} clients sent something, but only {opening.population} are registered.")
    sizes = Counter(tuple(GaussianEvent(z, q, n) for (z, q), n in sorted(own.items())) for own in steps.values())
    if idle:
        sizes[()] = idle
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
    return high, at(last), PerClient(min=low, median=(middle + other_middle) / 2, max=high)


def _single(values: set[float]) -> float | None:
    return next(iter(values)) if len(values) == 1 else None


def _accountant(events: Sequence[GaussianEvent]) -> str:
    if not events or any(event.noise_multiplier == 0 for event in events):
        return "none: nothing to compose"
    if all(event.sampling_rate == 1 for event in events):
        return "analytic Gaussian (Balle and Wang, 2018), add/remove"
    return f"PLD (dp-accounting {version('dp-accounting')}), add/remove"


def _sampler(opening: Opening, rates: set[float]) -> str:
    if opening.unit == "none":
        return "not accounted"
    sampling = opening.client_sampling if opening.unit == "user" else opening.record_sampling
    secrecy = "who takes part is secret" if opening.unit == "user" else "no amplification by client sampling"
    if sampling == "all":
        return f"none: every {opening.unit} every time"
    rate = f"{_single(rates):g}" if len(rates) == 1 else "as in the ledger"
    return f"Poisson: each {opening.unit} independently with probability {rate}; {secrecy}"


def _adversaries(opening: Opening, total: float) -> tuple[list[str], list[str]]:
    """Whom the numbers hold against, and whom not (reference: table 2.5)."""
    everyone = ["the server", "other clients", "recipients of the shared model"]
    personal = "whoever obtains or queries a user's personal model"
    if total == math.inf:
        return [], [*everyone, personal]
    if opening.unit == "none":
        return everyone, [personal]
    if opening.unit == "user":
        against, not_against = everyone[1:], ["the server (trusted: it sees raw updates)", personal]
    else:
        whole = "conclusions about a user as a whole: that the user takes part, or what all records have in common"
        against = ["the server (as long as it asks each client once a round)", *everyone[1:]]
        not_against = [personal, whole]
    if opening.secret == "given in the configuration":
        not_against.append("whoever reads the configuration: it holds the secret that the noise is made from")
    return against, not_against


def rounded_up(value: float) -> str:
    """Two decimals, never less than the value: a rounded claim must still hold."""
    return str(Decimal(repr(value)).quantize(Decimal("0.01"), rounding=ROUND_CEILING))


def _sentences(claim: Claim, clipped: bool, population_note: str) -> list[str]:
    delta = "" if claim.delta is None else f" and δ = {claim.delta:g}"
    unit = {"none": "no unit", "record": "one record", "user": "one user"}[claim.unit]
    if claim.rounds == 0:
        sentences = [
            f"ε = 0{delta} for {unit}: nothing that was computed from private data left a client, so there is nothing "
            "to account."
        ]
    elif claim.epsilon == math.inf:
        cause = "no privacy was asked for" if claim.unit == "none" else "something was released without noise"
        sentences = [f"ε = ∞{delta} for {unit}: {cause}, so nothing bounds what the releases tell; no guarantee."]
        if clipped:
            sentences.append("Contributions were clipped, but clipping alone is no privacy.")
    else:
        *others, last = claim.protected_against
        sentences = [
            f"ε = {rounded_up(claim.epsilon)}{delta} for {unit} ({claim.adjacency}).",
            f"What {', '.join(others)} and {last} see of this run tells them no more about {unit} than ε and δ allow.",
        ]
        if claim.unit == "user":
            sentences.append("This is not a record-level number: one changed record counts with twice the clip.")
    sentences.append(f"Not protected against: {'; '.join(claim.not_protected_against)}.")
    if claim.excluded:
        sentences.append(f"Left out of the accounting: {'; '.join(claim.excluded)}.")
    if population_note:
        sentences.append(population_note)
    if 0 < claim.epsilon < math.inf:
        sentences.append(
            "The noise is simulated in floating point by a generator that is not cryptographically secure. The claim "
            "covers this one run and holds only while its secret stays secret; further runs on the same data add up."
        )
    return sentences
