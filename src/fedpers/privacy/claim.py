"""The claim: what a ledger proves, for whom, against whom, in numbers and in one paragraph.

A claim is derived from a ledger and from nothing else, so it cannot promise more than what was released allows. It
always names unit, adjacency, adversary, delta, sampler, accountant and what it leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fedpers.config import TRUSTS, Trust, Unit
from fedpers.errors import ConfigError, LedgerError, PrivacyRefusal
from fedpers.privacy.accounting import cross_check
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import ADJACENCIES, EACH_ITS_OWN, REPLACE_ONE, SHARED, Opening
from fedpers.privacy.spending import Epsilon, PerClient, record_level, spending

NO_PROTECTION = 50.0
METRICS = "the metrics and figures of this run, which the simulator measures without noise"
TUNING = "the choice of hyper-parameters, as far as it was made by looking at these people"


class Claim(BaseModel):
    """A privacy statement.

    Attributes:
        unit: record, user or none: what one protected thing is.
        trust: Who adds the noise: record-local, user-central, user-distributed, user-local or none.
        adjacency: What two neighbouring data sets are.
        protected_against: Whom the claim holds against.
        not_protected_against: Whom or what it does not cover.
        epsilon: Upper bound; infinity where there is no guarantee, 0 where nothing was released.
        delta: Its delta; None for unit none.
        accountant: Which computation gave epsilon.
        cross_check: Epsilon by other accountants; never the claim.
        sampler: How the protected unit is sampled, in words.
        amplification: Whose secret sampling is credited: clients, records or none.
        mechanism: The noise, in words.
        q: Sampling rate of all noised releases; None without any, or if it changed during the run.
        sigma: Noise multiplier, likewise.
        clip: L2 bound of one unit's contribution to any release, likewise.
        steps: Composed noisy steps: rounds for unit user, those of the client with the largest epsilon for unit record.
        rounds: Number of releases.
        per_client: Spread over clients where each client's own releases count, otherwise None.
        record_level: Epsilon for one record that a user-level claim implies, at two clips; None where not computed.
        head_policy: How heads are trained.
        personal_covered: Whether the claim holds for whoever obtains a personal model, too.
        excluded: What the accounting leaves out.
        secure_rng: Whether noise came from a cryptographic generator: never, in a simulator.
        simulated_secagg: Whether the claim leans on a simulated secure aggregation.
        secret: Where the key of the noise comes from.
        ledger_head: Hash of the last ledger line; ties the claim to one ledger.
        sentence: All of this in one paragraph.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Unit
    trust: Trust
    adjacency: str
    protected_against: list[str]
    not_protected_against: list[str]
    epsilon: Epsilon
    delta: float | None
    accountant: str
    cross_check: dict[str, Epsilon]
    sampler: str
    amplification: str
    mechanism: str
    q: float | None
    sigma: float | None
    clip: float | None
    steps: int
    rounds: int
    per_client: PerClient | None
    record_level: Epsilon | None
    head_policy: str
    personal_covered: bool
    excluded: list[str]
    secure_rng: bool = False
    simulated_secagg: bool = False
    secret: str
    ledger_head: str
    sentence: str

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        """Refuse a number under another label than its own (refusal R6), and noise 0 with a finite epsilon (R5)."""
        if self.trust not in TRUSTS[self.unit] or self.adjacency not in ADJACENCIES[self.trust]:
            raise PrivacyRefusal(
                f"a claim with unit {self.unit!r}, trust {self.trust!r} and adjacency {self.adjacency!r}: an epsilon "
                "holds for the unit and adjacency that it was computed for and is no other unit's; a user-level "
                "epsilon for records is `record_level`."
            )
        if (self.delta is None) != (self.unit == "none") or not (self.accountant and self.sampler):
            raise PrivacyRefusal("a claim must name delta, sampler and accountant; without them epsilon means nothing.")
        if self.sigma == 0 and self.epsilon < math.inf:
            raise PrivacyRefusal("a claim of noise multiplier 0 with a finite epsilon: without noise it is infinite.")
        return self

    def to_json(self) -> str:
        """Indented JSON; an infinite epsilon is the string "inf"."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read back what `to_json` wrote; raises LedgerError for anything else."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            places = sorted({".".join(map(str, item["loc"])) or "the whole" for item in error.errors()[:3]})
        raise LedgerError(f"claim.json is damaged, in {', '.join(places)}; restore it from a copy.")

    def label(self) -> str:
        """Short form for the axis of a figure, with epsilon rounded up."""
        if self.rounds == 0:
            return "nothing released (ε = 0)"
        if self.epsilon == math.inf:
            return "no privacy (ε = ∞)"
        who = {
            "user-central": "trusted server",
            "user-distributed": "simulated secure aggregation",
            "user-local": "untrusted server",
            "record-local": "untrusted server",
        }[self.trust]
        adjacency = ", replace-one" if self.adjacency == REPLACE_ONE else ""
        return f"{self.unit}-level{adjacency} (ε = {rounded_up(self.epsilon)}, δ = {self.delta:g}), {who}"


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
            f"privacy.delta: delta {delta:g} with {protected} protected units would allow one of them to be published "
            f"as it is; choose delta well below {1 / protected:g}, for example {0.1 / protected:.0e}."
        )


def claim_from(
    ledger: Ledger,
    *,
    expected_rounds: int | None,
    excluded: Sequence[str],
    population_note: str = "",
    of_node: bool = False,
) -> Claim:
    """Derive the claim that a complete ledger proves (reference: section 2.1 and table 2.5).

    Args:
        ledger: The whole ledger of a run.
        expected_rounds: How many releases the run made, one per round, empty rounds included; None if unknown.
        excluded: What the accounting leaves out, such as metrics that the simulator reads and tuning.
        population_note: A sentence to add, for example on who counts as registered.
        of_node: Whether it is one node's own ledger, which has no line for rounds in which it was not asked.

    Raises:
        LedgerError: A round is missing, or lines of an interrupted run have not been replayed.
        PrivacyRefusal: Delta is too large for the number of protected users or records (R13).
    """
    opening, releases = ledger.opening, ledger.releases
    if not of_node:
        _check_complete(ledger, expected_rounds)
    if opening.delta is not None:
        check_delta(opening.delta, opening.protected)
        if TUNING not in excluded:
            raise PrivacyRefusal(
                "a claim must say that the choice of hyper-parameters is left out of it, unless that was paid for, "
                "which nothing here can know (refusal R15); add `claim.TUNING` to `excluded`."
            )
    found = spending(opening, releases)
    noised = [release for release in releases if release.mechanism == "gaussian"]
    clips = {release.clip for release in releases if release.clip is not None}
    rates = {release.sampling_rate for release in noised}
    against, not_against = adversaries(opening, found.total)
    claim = Claim(
        unit=opening.unit,
        trust=opening.trust,
        adjacency=opening.adjacency,
        protected_against=against,
        not_protected_against=not_against,
        epsilon=found.total,
        delta=opening.delta,
        accountant=found.accountant,
        cross_check=cross_check(found.events, opening.delta) if opening.delta is not None and found.events else {},
        sampler=_sampler(opening, rates),
        amplification=opening.amplification,
        mechanism=_mechanism(opening, {release.bit_noise for release in noised}),
        q=_single(rates),
        sigma=_single({release.noise_multiplier for release in noised}),
        clip=_single(clips),
        steps=sum(event.count for event in found.events if event.noise_multiplier)
        if opening.unit == "record"
        else len(noised),
        rounds=len(releases),
        per_client=found.per_client,
        record_level=record_level(opening, releases),
        head_policy=opening.head_policy,
        personal_covered=opening.personal_covered,
        excluded=list(excluded),
        simulated_secagg=opening.trust == "user-distributed",
        secret=opening.secret,
        ledger_head=ledger.head,
        sentence="",
    )
    sentences = _sentences(claim, bool(clips), population_note, of_node)
    return claim.model_copy(update={"sentence": " ".join(sentences)})


def reread(claim: Claim, ledger: Ledger) -> Claim:
    """Derive a claim that was read from a file anew from its ledger, before it is shown or passed on.

    Raises:
        LedgerError: the ledger is another one than the claim was made from, or gives another claim.
        PrivacyRefusal: what the claim leaves out was taken off it.
    """
    if METRICS not in claim.excluded:
        raise PrivacyRefusal("the claim on file no longer says that metrics are left out of it; run again.")
    if ledger.head != claim.ledger_head:
        raise LedgerError(
            f"{ledger.path}: its last line is not the one that the claim beside it was made from; one of them was "
            "edited or cut. Restore them from a copy, or run again in a new directory."
        )
    found = claim_from(ledger, expected_rounds=claim.rounds, excluded=claim.excluded)
    if found.sentence != claim.sentence or not math.isclose(found.epsilon, claim.epsilon, rel_tol=1e-6):
        raise LedgerError(
            f"{ledger.path} gives epsilon {found.epsilon:.6g} and another claim than the one beside it, which says "
            f"{claim.epsilon:.6g}; restore it from a copy, or run again in a new directory."
        )
    return found


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


def _single(values: set[float]) -> float | None:
    return next(iter(values)) if len(values) == 1 else None


def _mechanism(opening: Opening, bit_noise: set[float | None]) -> str:
    if opening.coefficients:
        return f"Gaussian, correlated over {len(opening.coefficients)} rounds (banded square root factorization)"
    if opening.filter is not None:
        return "Gaussian, noise set from earlier releases under a Renyi filter"
    if bit_noise - {None}:
        return "Gaussian, clip follows a noised quantile (Andrew et al., 2021)"
    return "Gaussian"


def _sampler(opening: Opening, rates: set[float]) -> str:
    if opening.unit == "none":
        return "not accounted"
    if opening.unit == "record":
        if opening.record_sampling == "all":
            return "none: every record every time"
        return (
            f"Poisson: each record independently with probability {_rate(rates)}; no amplification by client sampling"
        )
    if opening.client_sampling == "all":
        return "none: every user every time"
    drawn = {
        "poisson": "Poisson: each user independently",
        "fixed": "a fixed number of users, drawn without replacement",
        "cyclic": "users in turn, in a public order",
    }[opening.client_sampling]
    if opening.amplification == "none":
        return f"{drawn}; no amplification, the rounds in which a user took part count"
    return f"{drawn} with probability {_rate(rates)}; who takes part is secret"


def _rate(rates: set[float]) -> str:
    return f"{_single(rates):g}" if len(rates) == 1 else "as in the ledger"


_HONEST_SERVER = "the server (as long as it asks each client once a round, and in no round that the ledger lacks)"
_SILENCE = "what a client's failure to answer tells, or the time that its answer takes"


def adversaries(opening: Opening, total: float) -> tuple[list[str], list[str]]:
    """Whom a claim holds against, and whom or what it does not cover (reference: table 2.5).

    Args:
        opening: the ledger's opening line.
        total: epsilon of all releases together; infinity covers nobody.
    """
    others, personal = (
        ["other clients", "recipients of the shared model"],
        "whoever obtains or queries a user's personal model",
    )
    fixed = opening.amplification == "clients" and opening.client_sampling == "fixed"
    if total == math.inf:
        return [], ["the server", *others, personal]
    if opening.unit == "none":
        return ["the server", *others], [personal]
    whole = "conclusions about a user as a whole: that the user takes part, or what all records have in common"
    against, not_against = {
        "user-central": (
            others[1:] if fixed else others,
            [
                "the server (trusted: it sees raw updates)",
                # whoever knows its own draw knows something of the others', as the places are counted
                *(["other clients, who know whether they were drawn"] if fixed else []),
            ],
        ),
        "user-distributed": (
            [
                f"the server (if it sees sums only, here simulated, and {opening.honest} clients a round are honest)",
                f"other clients (if {opening.honest} clients a round beside them are honest)",
                others[1],
            ],
            ["a server that sees single messages, or fewer honest clients"],
        ),
        "user-local": ([_HONEST_SERVER, *others], [_SILENCE]),
        "record-local": ([_HONEST_SERVER, *others], [_SILENCE, whole]),
    }[opening.trust]
    against, not_against = list(against), list(not_against)
    if opening.personal_covered:
        against.append("whoever obtains one user's personal model")
    else:
        not_against.append(personal)
    if opening.secret == EACH_ITS_OWN and opening.trust in {"user-local", "record-local"}:
        only = "only a node whose Flower commands are fedpers' own leaves it shut"
        not_against.append(f"a server whose app a node runs (Flower hands it over; {only})")
    if opening.secret == "given in the configuration":
        not_against.append("whoever reads the configuration: it holds the secret that the noise is made from")
    return against, not_against


def _why_none(claim: Claim) -> str:
    """Say why an epsilon is infinite though one was asked for."""
    if claim.secret == SHARED:
        return "the secret that the noise is made from was shared with whoever receives it, as in a test"
    return "something was released without noise"


def rounded_up(value: float) -> str:
    """Two decimals, never less than the value: a rounded claim must still hold."""
    return str(Decimal(repr(value)).quantize(Decimal("0.01"), rounding=ROUND_CEILING))


def _sentences(claim: Claim, clipped: bool, population_note: str, of_node: bool) -> list[str]:
    delta = "" if claim.delta is None else f" and δ = {claim.delta:g}"
    unit = {"none": "anything", "record": "one record", "user": "one user"}[claim.unit]
    if claim.rounds == 0:
        sentences = [
            f"ε = 0{delta} for {unit}: nothing that was computed from private data left a client, so there is nothing "
            "to account."
        ]
    elif claim.epsilon == math.inf:
        told = "nothing bounds what the releases tell"
        sentences = [
            f"No privacy is claimed: {'this node adds no noise' if of_node else 'none was asked for'}, so {told}; "
            "no guarantee (ε = ∞)."
            if claim.unit == "none"
            else f"ε = ∞{delta} for {unit}: {_why_none(claim)}, so {told}; no guarantee."
        ]
        if clipped:
            sentences.append("Contributions were clipped, but clipping alone is no privacy.")
    else:
        *others, last = claim.protected_against
        sentences = [f"ε = {rounded_up(claim.epsilon)}{delta} for {unit} ({claim.adjacency})."]
        if claim.epsilon > NO_PROTECTION:
            sentences.append(f"An ε above {NO_PROTECTION:g} protects nobody in any useful sense.")
        sentences.append(
            f"What {', '.join(others)} and {last} see of this run tells them no more about {unit} than ε and δ allow."
        )
        if claim.mechanism != "Gaussian":
            sentences.append(f"Noise: {claim.mechanism}.")
        if claim.unit == "user":
            implied = (
                ""
                if claim.record_level is None
                else f" (for one record ε = {rounded_up(claim.record_level)} at the same δ)"
            )
            twice = f"This is not a record-level number: one changed record counts with twice the clip{implied}."
            replaced = "It holds for one changed record of a user, too: any records may take the place of others."
            sentences.append(replaced if claim.adjacency == REPLACE_ONE else twice)
        if claim.per_client is not None and claim.unit == "user":
            low, middle = rounded_up(claim.per_client.min), rounded_up(claim.per_client.median)
            sentences.append(f"Over users ε is {low} at the least and {middle} in the median, by their participation.")
        if claim.simulated_secagg:
            sentences.append("The secure aggregation is simulated: no protocol hides single messages here.")
    sentences.append(f"Not protected against: {'; '.join(claim.not_protected_against)}.")
    if claim.excluded:
        sentences.append(f"Left out of the accounting: {'; '.join(claim.excluded)}.")
    if population_note:
        sentences.append(population_note)
    if claim.rounds and claim.epsilon < math.inf:
        sentences.append(
            "The noise is simulated in floating point, and noise and client sampling are drawn by a generator that is "
            "not cryptographically secure. The claim "
            "covers this one run and holds only while its secret stays secret; further runs on the same data add up."
        )
    return sentences
