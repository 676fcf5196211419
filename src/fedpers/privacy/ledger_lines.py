"""What the lines of a ledger say, and which of them contradict each other.

An opening line states what is promised before anything is released; each further line is one round's release.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedpers.config import TRUSTS, Trust, Unit
from fedpers.errors import LedgerError, PrivacyRefusal

Sampling = Literal["poisson", "all", "fixed", "cyclic"]
Amplification = Literal["none", "clients", "records"]
EACH_ITS_OWN: Final = "drawn by the server and by each node for itself"
SHARED: Final = "shared by all sides, as in a test"  # nothing is claimed then
Secret = Literal[
    "kept by the simulator",
    "given in the configuration",
    "drawn by the server and by each node for itself",
    "shared by all sides, as in a test",
]

ZERO_OUT = "zero-out: one registered user's records replaced by none (the number of registered users is public)"
REPLACE_ONE = "replace-one: one registered user's records replaced by any others"
ADD_REMOVE = "add/remove: one record of one user is there or not"
# How far one unit moves a release, in clips: 1 if it is there or is nothing, 2 if another takes its place. Nothing else
# may be written into a ledger: the adjacency decides how much noise a number needs.
SENSITIVITY: dict[str, int] = {"none": 0, ADD_REMOVE: 1, ZERO_OUT: 1, REPLACE_ONE: 2}
ADJACENCIES: dict[Trust, tuple[str, ...]] = {
    "none": ("none",),
    "record-local": (ADD_REMOVE,),
    "user-central": (ZERO_OUT, REPLACE_ONE),
    "user-distributed": (ZERO_OUT,),
    "user-local": (REPLACE_ONE,),
}

_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Filter(_Line):
    """A Renyi filter: the noise may depend on earlier releases, and epsilon is what the filter was set to."""

    order: Annotated[_Number, Field(gt=1)]
    epsilon: Annotated[_Number, Field(gt=0)]


class Opening(_Line):
    """What is promised before anything is released.

    Attributes:
        unit: What one protected thing is: a record, a user, or none (no protection).
        trust: Who adds the noise and who therefore need not be trusted.
        adjacency: One of `ADJACENCIES[trust]`; says how many clips one unit can move a release (`SENSITIVITY`).
        delta: Target delta of the claim; None exactly when `unit` is none.
        population: Number of registered users, public.
        protected: Number that delta is held against (delta < 1 / protected): the registered users for unit user, the
            most records that they may hold together for unit record.
        method: Name of the personalization method.
        head_policy: How personal state is trained, in words; copied into the claim.
        personal_covered: Whether personal models, too, are functions of protected values only.
        shared_names: The only names that releases may hold.
        client_sampling: How a round's clients are drawn: independently with one rate (poisson), every one (all), a
            number fixed beforehand (fixed), or in turn in a public order (cyclic).
        record_sampling: The same for a step's records (poisson or all).
        amplification: Whose secret sampling is credited; "none" counts the rounds in which a user really took part.
        coefficients: First column of the noise's Toeplitz matrix (banded noise); empty for independent noise.
        honest: Fewest clients of a round whose noise shares must be enough (user-distributed), else None.
        filter: Renyi filter where noise depends on earlier releases, else None.
        simulated_population: Population that a forecast is asked for, else None.
        secret: Where the key of the noise comes from.
        key: Name of the run's keys, which tells nothing of them; another for other people, records, weights or tables.
    """

    unit: Unit
    trust: Trust
    adjacency: str
    delta: Annotated[float, Field(gt=0, lt=1)] | None
    population: Annotated[int, Field(ge=1)]
    protected: Annotated[int, Field(ge=1)]
    method: str
    head_policy: str
    personal_covered: bool = False
    shared_names: list[str]
    client_sampling: Sampling
    record_sampling: Sampling
    amplification: Amplification
    coefficients: list[_Number] = []
    honest: Annotated[int, Field(ge=1)] | None = None
    filter: Filter | None = None
    simulated_population: Annotated[int, Field(ge=1)] | None = None
    secret: Secret
    key: Annotated[str, Field(pattern=r"^[0-9a-f]*$")] = ""

    @property
    def sensitivity(self) -> int:
        """How many clips one unit can move a release."""
        return SENSITIVITY[self.adjacency]

    @property
    def participation_is_secret(self) -> bool:
        """Whether who took part must not be written down, because the accounting leans on its secrecy."""
        return self.amplification == "clients"


class Release(_Line):
    """One round's release of the shared state.

    Attributes:
        round: Round number, from 1; one line per round, also when nobody took part.
        mechanism: gaussian, or none where no noise was added.
        noise_multiplier: Noise standard deviation divided by `clip`, of everything that is released in this round
            together (with adaptive clipping: update and bits); 0.0 exactly for mechanism none.
        clip: L2 bound of one unit's contribution; None where nothing was clipped.
        sampling_rate: Sampling rate that the accounting credits, of clients (unit user) or records (unit record); 1.0
            without any.
        steps: Noisy steps that each client of this round composed (unit record); 1 for unit user.
        head_steps: Noisy steps on the other half of the records, of personal groups (unit record, split data).
        bit_noise: Noise deviation on the sum of the bits that steer an adaptive clip; None without one.
        participants: SHA-256 over salt and list of who took part; "" where that is secret.
        noise_address: Hex digest of the address of the noise's random stream; "" exactly for mechanism none.
        release_hash: SHA-256 of the released bytes, see `release_hash`.
        clients: Who took part. Kept beside the ledger, in a private file, not in its lines.
        salt: Makes `participants` impossible to guess; kept with `clients`.
    """

    round: Annotated[int, Field(ge=1)]
    mechanism: Literal["gaussian", "none"]
    noise_multiplier: Annotated[_Number, Field(ge=0)]
    clip: Annotated[_Number, Field(gt=0)] | None
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=0)]
    head_steps: Annotated[int, Field(ge=0)] = 0
    bit_noise: Annotated[_Number, Field(gt=0)] | None = None
    noise_address: Annotated[str, Field(pattern=r"^[0-9a-f]*$")]
    release_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    clients: Annotated[list[int] | None, Field(exclude=True)]
    salt: Annotated[str, Field(exclude=True)] = ""

    @field_validator("clients")
    @classmethod
    def _sorted(cls, clients: list[int] | None) -> list[int] | None:
        """The order in which clients answer is chance, and a replay must write the same line."""
        return None if clients is None else sorted(clients)

    @property
    def participants(self) -> str:
        """The commitment to `clients` that stands in the ledger."""
        if self.clients is None:
            return ""
        return hashlib.sha256(json.dumps([self.salt, self.clients]).encode()).hexdigest()


def check_opening(opening: Opening) -> None:
    """Raise unless the parts of an opening belong together.

    Raises:
        LedgerError: Unit, trust, adjacency, delta or amplification contradict each other.
        PrivacyRefusal: The sampler is not one that is accounted (refusal R3).
    """
    if opening.trust not in TRUSTS[opening.unit] or opening.adjacency not in ADJACENCIES[opening.trust]:
        raise LedgerError(
            f"unit {opening.unit} with trust {opening.trust!r} and adjacency {opening.adjacency!r}: they do not belong "
            f"together; unit {opening.unit} has trust {' or '.join(TRUSTS[opening.unit])}."
        )
    if (opening.delta is None) != (opening.unit == "none"):
        raise LedgerError(f"unit {opening.unit} with delta {opening.delta}: delta belongs to units record and user.")
    sampling = opening.record_sampling if opening.unit == "record" else opening.client_sampling
    if opening.unit == "record" and sampling not in {"poisson", "all"}:
        raise PrivacyRefusal(
            "unit record with samples of a fixed size: the accountant covers Poisson sampling (or taking all) only; "
            "draw records by Poisson sampling."
        )
    expected: tuple[Amplification, ...] = ("none",)
    if opening.unit == "record":
        expected = ("records",)
    elif opening.trust == "user-central" and not opening.coefficients and opening.client_sampling != "cyclic":
        expected = ("clients",)
    if opening.amplification not in expected:
        raise PrivacyRefusal(
            f"amplification by sampling {opening.amplification} with trust {opening.trust}, {opening.client_sampling} "
            f"clients and {'banded' if opening.coefficients else 'independent'} noise: only {expected[0]!r} is true "
            "there. Whoever knows who takes part gains nothing from the drawing, and correlated noise covers none."
        )
    fixed = opening.amplification == "clients" and sampling == "fixed"
    if fixed != (opening.trust == "user-central" and opening.adjacency == REPLACE_ONE):
        raise PrivacyRefusal(
            f"{opening.client_sampling} client sampling with adjacency {opening.adjacency!r}: samples of a fixed size "
            "are accounted for replace-one adjacency alone, all others for zero-out; take replace-one, or Poisson "
            "sampling."
        )
    if (opening.honest is not None) != (opening.trust == "user-distributed"):
        raise LedgerError("an honest minimum belongs to trust user-distributed, and to no other.")
    if (opening.filter is not None or opening.coefficients) and opening.trust != "user-central":
        raise LedgerError("a filter or banded noise belongs to trust user-central.")


def release_problem(release: Release, opening: Opening) -> str | None:
    """What is wrong with a release under this opening, or None."""
    noised = release.mechanism == "gaussian"
    if noised != (release.noise_multiplier > 0) or noised != (release.noise_address != ""):
        return "mechanism gaussian needs a noise multiplier above 0 and a noise address, mechanism none neither"
    if noised and (release.clip is None or release.steps + release.head_steps < 1):
        return "mechanism gaussian needs a clip and one step or more"
    if opening.participation_is_secret and release.clients is not None:
        return "the accounting leans on secret participation, so the ledger must not say who took part"
    if not opening.participation_is_secret and release.clients is None:
        return "needs the list of clients that took part"
    if release.clients is not None and len(set(release.clients)) != len(release.clients):
        return "a client is listed twice"
    if opening.unit == "record" and release.steps + release.head_steps < 1:
        return "unit record has one step or more per release; without one it would count as nothing"
    if opening.unit == "user" and (release.steps != 1 or release.head_steps):
        return "unit user has one noised step per release"
    credited = opening.record_sampling if opening.unit == "record" else opening.client_sampling
    if credited == "all" and release.sampling_rate != 1:
        return f"sampling rate {release.sampling_rate}, but the opening says that every {opening.unit} takes part"
    if opening.amplification == "none" and release.sampling_rate != 1:
        return f"sampling rate {release.sampling_rate}, but the opening credits no sampling"
    if release.bit_noise is not None and opening.trust != "user-central":
        return "an adaptive clip belongs to trust user-central"
    return None
