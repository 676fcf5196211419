"""The claim: what a ledger proves, for whom, against whom.

A claim is derived from a ledger and from nothing else (`claiming`), so it cannot promise more than what was released
allows. It always names unit, adjacency, adversary, delta, sampler, accountant and what it leaves out.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fedpers.config import TRUSTS, Trust, Unit
from fedpers.errors import ConfigError, LedgerError, PrivacyRefusal
from fedpers.privacy.ledger_lines import ADJACENCIES, REPLACE_ONE
from fedpers.privacy.spending import Epsilon, PerClient

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


def rounded_up(value: float) -> str:
    """Two decimals, never less than the value: a rounded claim must still hold."""
    return str(Decimal(repr(value)).quantize(Decimal("0.01"), rounding=ROUND_CEILING))
