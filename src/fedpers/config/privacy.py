"""What is protected, how strongly, and who is trusted."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from fedpers.config.base import Positive, Rate, Section
from fedpers.privacy.randomness import secret_key


def _epsilon(value: Any) -> Any:
    return math.inf if isinstance(value, str) and value.strip().lower() in {"inf", ".inf", "none"} else value


Epsilon = Annotated[
    float,
    BeforeValidator(_epsilon),
    Field(gt=0),
    PlainSerializer(lambda v: "inf" if math.isinf(v) else v, return_type=float | str, when_used="json"),
]


Unit = Literal["none", "record", "user"]
Trust = Literal["none", "record-local", "user-central", "user-distributed", "user-local"]
HeadPolicy = Literal["method", "frozen", "joint", "split", "split-dp"]
TRUSTS: dict[Unit, tuple[Trust, ...]] = {  # the first is the default
    "none": ("none",),
    "record": ("record-local",),
    "user": ("user-central", "user-distributed", "user-local"),
}


class AdaptiveClipConfig(Section):
    """Adaptive clipping at user level (Andrew et al., NeurIPS 2021): the clip follows a quantile of update norms."""

    quantile: float = Field(0.5, gt=0, lt=1)  # share of updates that should lie within the clip
    rate: Positive = 0.2  # step of the geometric update
    bit_noise: Positive | None = None  # noise deviation on the sum of bits; by default a twentieth of the cohort


class PrivacyConfig(Section):
    """What is protected, how strongly, and who is trusted."""

    unit: Unit = "none"
    trust: Trust | None = None  # by default record-local, or user-central
    epsilon: Epsilon = math.inf
    delta: float = Field(1e-5, gt=0, lt=1)
    clip: Positive | None = None  # L2 bound on one record's gradient or one user's update
    clipping: Literal["flat", "per-layer"] = "flat"  # per-layer: each array to clip/sqrt(arrays), the same joint bound
    adaptive: AdaptiveClipConfig | None = None  # user-central: clip is then the first round's
    head: HeadPolicy = "method"  # what is done about personal groups that move in the rounds
    record_rate: Rate = 0.25  # Poisson rate of records in a local DP-SGD step
    mechanism: Literal["gaussian", "banded"] = "gaussian"  # banded: correlated noise, no sampling amplification
    bands: int | None = Field(None, ge=2)  # of the banded noise; by default the rounds between a client's turns
    honest: Rate = 0.9  # user-distributed: share of a round's clients whose noise has to be enough
    noise_multiplier: Positive | None = None  # given, it is used as it is; by default calibrated to epsilon
    stop: Literal["rounds", "budget"] = "rounds"  # budget: end before the ledger would pass epsilon
    schedule: Literal["constant", "signal"] = "constant"  # signal: less noise when releases hold little but noise
    population: int | None = Field(None, ge=1)  # forecast: what so many registered users would get
    accountant: Literal["pld", "rdp", "prv", "gdp"] = "pld"
    secret: str | None = Field(None, repr=False)

    @model_validator(mode="after")
    def _complete(self) -> PrivacyConfig:
        if self.secret is not None:
            secret_key(self.secret)  # its error does not quote what was given
        if self.unit == "none" and not math.isinf(self.epsilon):
            raise ValueError(
                f"epsilon={self.epsilon} is asked for but unit is none; set privacy.unit to record or user, or "
                "privacy.epsilon=inf"
            )
        if self.unit != "none" and self.clip is None:
            raise ValueError(f"unit={self.unit} needs privacy.clip, the L2 bound on one {self.unit}'s contribution")
        if self.trust is not None and self.trust not in TRUSTS[self.unit]:
            right = next(unit for unit, trusts in TRUSTS.items() if self.trust in trusts)
            raise ValueError(
                f"trust={self.trust} does not go with unit={self.unit}; unit={self.unit} allows "
                f"{' or '.join(TRUSTS[self.unit])}, trust={self.trust} needs privacy.unit={right}"
            )
        if self.stop == "budget" and math.isinf(self.epsilon):
            raise ValueError("stop=budget needs a finite epsilon, the budget to stop at")
        return self

    @property
    def trusted(self) -> Trust:
        """The trust model, with the unit's default where none is given."""
        return self.trust or TRUSTS[self.unit][0]
