"""From a complete ledger to the claim that it proves, in numbers and in one paragraph."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedpers.errors import LedgerError, PrivacyRefusal
from fedpers.privacy.accounting import cross_check
from fedpers.privacy.adversaries import adversaries
from fedpers.privacy.claim import METRICS, TUNING, Claim, check_delta, rounded_up
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import REPLACE_ONE, SHARED, Opening
from fedpers.privacy.spending import record_level, spending

NO_PROTECTION = 50.0


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


def _why_none(claim: Claim) -> str:
    """Say why an epsilon is infinite though one was asked for."""
    if claim.secret == SHARED:
        return "the secret that the noise is made from was shared with whoever receives it, as in a test"
    return "something was released without noise"


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
