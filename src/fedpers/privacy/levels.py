"""The same privacy at another level: what the cells of a picture or a sweep have in common with the run they vary."""

from __future__ import annotations

import math
from typing import Any

from fedpers.config import PrivacyConfig
from fedpers.errors import ConfigError
from fedpers.privacy.randomness import derive, secret_key

_NOISE_OFF: dict[str, Any] = {  # what says how noise is used; where there is none, it says nothing
    "epsilon": math.inf, "adaptive": None, "mechanism": "gaussian", "bands": None, "noise_multiplier": None,
    "stop": "rounds", "schedule": "constant", "population": None,
}  # fmt: skip


def unprotected(privacy: PrivacyConfig) -> PrivacyConfig:
    """Return no privacy at all: neither noise nor clipping, unit none."""
    return privacy.model_copy(update={"unit": "none", "trust": None, "clip": None, "head": "method", **_NOISE_OFF})


def clipped_only(privacy: PrivacyConfig) -> PrivacyConfig:
    """Return the same clipping without noise, which promises nothing: what clipping alone costs.

    Raises:
        ConfigError: nothing is clipped.
    """
    if privacy.unit == "none" or privacy.clip is None:
        raise ConfigError("clipping without noise needs privacy.unit record or user, and privacy.clip.")
    return privacy.model_copy(update=_NOISE_OFF)


def with_own_secret(privacy: PrivacyConfig, name: str) -> PrivacyConfig:
    """Return the same with a secret that is derived for one cell from the given one; without one, each run has its own.

    No noise is used twice for different releases.
    """
    if privacy.secret is None:
        return privacy
    return privacy.model_copy(update={"secret": derive(secret_key(privacy.secret), "cell", name).hex()})
