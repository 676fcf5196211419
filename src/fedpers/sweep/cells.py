"""One run of a sweep: its configuration, its content address, and the local-only baseline that belongs to it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fedpers.config import Config, PrivacyConfig, assign, dump_config, parse_config
from fedpers.errors import ConfigError
from fedpers.privacy.levels import clipped_only, unprotected, with_own_secret

EPSILON, CLIP = "privacy.epsilon", "clip"
AT_HOME = ("seed", "data", "task", "model", "personal", "engine")  # what training at home alone hangs on
Tree = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        coordinates: its value on every axis, as text.
        config: what is run; named by its content address.
        local: the local-only baseline on the same people, of which many cells have the same; None if none is asked for.
    """

    coordinates: Mapping[str, str]
    config: Config
    local: Config | None

    @property
    def address(self) -> str:
        """16 hexadecimal digits of all that is configured, of the secret (by its hash) and of fedpers's version."""
        return self.config.name

    @property
    def baseline(self) -> str | None:
        """Address of the baseline."""
        return self.local.name if self.local else None

    @property
    def label(self) -> str:
        """The cell for people."""
        return label(self.coordinates)


def label(coordinates: Mapping[str, str]) -> str:
    """Coordinates for people."""
    return ", ".join(f"{key}={value}" for key, value in coordinates.items())


def make_cell(base: Tree, changes: Mapping[str, Any], coordinates: Mapping[str, str], where: str) -> Cell:
    """Apply changes, by dotted key, to a base configuration.

    Epsilon `.inf` stands for no privacy at all and `clip` for clipping without noise; a finite one is used as it is.

    Raises:
        ConfigError: what comes out is no configuration.
    """
    where = f"{where} ({label(coordinates)})"
    tree = copy.deepcopy(base)
    standard = base.get("method", Config().method)
    if changes.get("method", standard) != standard:
        tree.pop("options", None)  # they are the base method's own
    level = _level(changes)
    for key, value in changes.items():
        if key != EPSILON or not level:
            assign(tree, key, value, f"{where}: {key}")
    config = parse_config(tree, where)
    local = _addressed(_at_home(config))
    if config.method == "local":
        own = local
    else:
        privacy = _at_level(config.privacy, level, where)
        evaluation = config.evaluation.model_copy(update={"local_only": False})  # it has a cell of its own
        own = _addressed(config.model_copy(update={"privacy": privacy, "evaluation": evaluation}))
    return Cell(coordinates, own, local if config.evaluation.local_only else None)


def no_privacy(epsilon: Any) -> bool:
    """Whether a value on the axis of epsilon is infinity, in any way of writing it that a configuration knows."""
    return str(epsilon).strip().lower().removeprefix(".") in {"inf", "none"}


def _level(changes: Mapping[str, Any]) -> str:
    """Read the value on the axis of epsilon: "inf", CLIP, or nothing for a number, and where there is no such axis."""
    if EPSILON not in changes:
        return ""
    if no_privacy(changes[EPSILON]):
        return "inf"
    return CLIP if str(changes[EPSILON]).strip().lower() == CLIP else ""


def _at_level(privacy: PrivacyConfig, level: str, where: str) -> PrivacyConfig:
    if level == "inf":
        return unprotected(privacy)
    if level == CLIP:
        try:
            return clipped_only(privacy)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    return privacy


def _at_home(config: Config) -> Config:
    """Training at home alone: neither method nor privacy nor anything about the rounds matters to it."""
    kept = {section: getattr(config, section) for section in AT_HOME}
    evaluation = config.evaluation.model_copy(update={"local_only": False, "every": 0})
    secret = PrivacyConfig(secret=config.privacy.secret)
    return Config(method="local", rounds=0, evaluation=evaluation, privacy=secret, **kept)


def _addressed(config: Config) -> Config:
    """Name a configuration by its content, and give it a secret of its own where one is given."""
    config = config.model_copy(update={"name": "cell", "frontier": None})
    content = f"{version('fedpers')}\n{dump_config(config)}"  # without the secret
    privacy = with_own_secret(config.privacy, _digest(content))
    if privacy.secret is not None:
        content += _digest(privacy.secret)
    return config.model_copy(update={"name": _digest(content)[:16], "privacy": privacy})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
