"""What the same method would give among many more people: a forecast, which is no claim about anybody.

A run of few users whose noise is scaled down to what a larger cohort would need shows the utility that the larger
federation could have (as the benchmarks of pfl-research do; Granqvist et al., NeurIPS 2024, arXiv:2404.06430). The
users of the run get no such guarantee: their claim is computed from the noise that was really added.
"""

from __future__ import annotations

import math
from typing import Self

from pydantic import BaseModel, ConfigDict

from fedpers.errors import LedgerError
from fedpers.privacy.accounting import GaussianEvent, epsilon
from fedpers.privacy.claim import check_delta, rounded_up
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import SHARED
from fedpers.privacy.spending import Epsilon


class Forecast(BaseModel):
    """A what-if statement on a larger federation.

    Attributes:
        population: Registered users that are supposed.
        cohort: Clients per round that this would take, on average.
        epsilon: What such a run would claim for each of them, at `delta`.
        noise_multiplier: Noise deviation over clip that it would add to its sum.
        simulated_users: Registered users of this run, whom the forecast does not protect.
        sentence: All of this in words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    population: int
    cohort: float
    epsilon: Epsilon
    delta: float
    noise_multiplier: float | None
    sampling_rate: float | None
    rounds: int
    simulated_users: int
    sentence: str

    def to_json(self) -> str:
        """Indented JSON."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read back what `to_json` wrote."""
        return cls.model_validate_json(text)

    def label(self) -> str:
        """Short form for figures; says what it is in its first word."""
        return f"forecast for {self.population:,} users (ε = {rounded_up(self.epsilon)}, δ = {self.delta:g})"


def forecast_from(ledger: Ledger) -> Forecast | None:
    """Return the forecast that a ledger's releases allow, or None where none was asked for or nothing was released.

    Raises:
        LedgerError: the releases are not those of a user-level run with Poisson sampling.
        PrivacyRefusal: delta is too large for the supposed population.
    """
    opening, releases = ledger.opening, ledger.releases
    if opening.simulated_population is None or not releases:
        return None
    if opening.delta is None or opening.amplification != "clients" or opening.client_sampling not in {"poisson", "all"}:
        raise LedgerError("a forecast needs user-level releases with Poisson client sampling.")
    population, scale = opening.simulated_population, opening.simulated_population / opening.population
    check_delta(opening.delta, population)
    events = [GaussianEvent(r.noise_multiplier * scale, r.sampling_rate, 1) for r in releases]
    supposed = math.inf if opening.secret == SHARED else epsilon(events, opening.delta)
    noises, rates = {event.noise_multiplier for event in events}, {event.sampling_rate for event in events}
    rate = rates.pop() if len(rates) == 1 else None
    bound = "∞" if supposed == math.inf else rounded_up(supposed)
    return Forecast(
        population=population,
        cohort=(rate or 0.0) * population,
        epsilon=supposed,
        delta=opening.delta,
        noise_multiplier=noises.pop() if len(noises) == 1 else None,
        sampling_rate=rate,
        rounds=len(releases),
        simulated_users=opening.population,
        sentence=(
            f"Forecast for {population:,} users, not a claim: with so many, {(rate or 0.0) * population:,.0f} of them "
            f"in a round on average, the same method with the same noise on its mean would promise ε = {bound}, δ = "
            f"{opening.delta:g} for one user. The {opening.population} users of this run have what its claim says."
        ),
    )
