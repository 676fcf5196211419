"""What a method is: a table of scopes and phases.

The engine, the Flower client, the privacy checker and the documentation all read this one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from fedpers.config import GROUPS, Config
from fedpers.errors import ConfigError


class Scope(StrEnum):
    """Where a parameter group lives."""

    FROZEN = "frozen"  # stays at its public initial value
    SHARED = "shared"  # travels and is aggregated
    PERSONAL = "personal"  # stays with its user


FROZEN, SHARED, PERSONAL = Scope.FROZEN, Scope.SHARED, Scope.PERSONAL


@dataclass(frozen=True)
class Phase:
    """One stretch of local training.

    `train` names the groups that move; the forward pass reads all the others as they are. Phases whose groups are all
    personal, and all phases after the last release, use the settings under `personal`, the rest those under `local`.
    """

    train: tuple[str, ...]

    def __init__(self, *train: str) -> None:
        object.__setattr__(self, "train", train)


class Method:
    """Base of all methods. Subclasses set the table; the docstring cites the paper, its first line is the summary."""

    scopes: ClassVar[Mapping[str, Scope]] = {}
    round: ClassVar[tuple[Phase, ...]] = ()  # run by each client that takes part in a round, before it replies
    finish: ClassVar[tuple[Phase, ...]] = ()  # run once by every client, after the last release

    def __init_subclass__(cls) -> None:
        """Refuse a table that contradicts itself, when it is defined."""
        where = f"method {cls.__name__}"
        if set(cls.scopes) != set(GROUPS):
            raise ConfigError(f"{where}: scopes must name exactly the groups {', '.join(GROUPS)}.")
        for part, phases in (("round", cls.round), ("finish", cls.finish)):
            for index, phase in enumerate(phases):
                line = f"{where}: {part}[{index}] = Phase{phase.train}"
                if not phase.train:
                    raise ConfigError(f"{line} trains nothing; name a group or delete the phase.")
                for group in phase.train:
                    if group not in cls.scopes:
                        raise ConfigError(f"{line} trains the unknown group {group!r}; known: {', '.join(GROUPS)}.")
                    if cls.scopes[group] is FROZEN:
                        raise ConfigError(f"{line} trains {group!r}, which is frozen; change its scope or the phase.")
        trained = {group for phase in cls.round for group in phase.train}
        for group, scope in cls.scopes.items():
            if scope is SHARED and group not in trained:
                raise ConfigError(f"{where}: {group!r} is shared but no round phase trains it; it would never change.")

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]


@dataclass(frozen=True)
class Plan:
    """A method's table after the configuration has been applied (`share`, `personal.groups`)."""

    name: str
    scopes: Mapping[str, Scope]
    round: tuple[Phase, ...]
    finish: tuple[Phase, ...]

    def groups(self, scope: Scope) -> tuple[str, ...]:
        """Return the groups with this scope, in a fixed order."""
        return tuple(group for group in GROUPS if self.scopes[group] is scope)

    @property
    def shared(self) -> tuple[str, ...]:
        """The groups that travel."""
        return self.groups(SHARED)

    @property
    def personal(self) -> tuple[str, ...]:
        """The groups of which each user keeps an own copy, during the rounds or after them."""
        finished = {group for phase in self.finish for group in phase.train}
        return tuple(g for g in GROUPS if self.scopes[g] is PERSONAL or g in finished)

    @property
    def trained(self) -> tuple[str, ...]:
        """The groups that move at any time."""
        moved = {group for phase in (*self.round, *self.finish) for group in phase.train}
        return tuple(group for group in GROUPS if group in moved)

    @property
    def feedback(self) -> tuple[str, ...]:
        """Personal groups that shape what is shared: trained in some round, and read when a shared group is trained.

        A forward pass reads every group, so a personal group that moves in the rounds always feeds back. Groups that
        move only after the last release never do.
        """
        moved = {group for phase in self.round for group in phase.train}
        return tuple(group for group in self.groups(PERSONAL) if group in moved) if self.shared else ()


def plan(name: str, method: type[Method], config: Config) -> Plan:
    """Apply `share` and `personal.groups` to a method's table.

    Raises:
        ConfigError: nothing is left of what the method shares, or of a phase that it runs at home.
    """
    scopes = {g: FROZEN if s is SHARED and g not in config.share else s for g, s in method.scopes.items()}
    if SHARED in method.scopes.values() and SHARED not in scopes.values():
        would = "+".join(g for g in GROUPS if method.scopes[g] is SHARED)
        raise ConfigError(f"share={'+'.join(config.share)}: method {name!r} shares only {would}; set share={would}.")
    moving = {group for group, scope in scopes.items() if scope is not FROZEN}
    # A shared group that is frozen in the rounds may still be tuned at home.
    for phase in method.finish:
        if not set(phase.train) & set(config.personal.groups):
            raise ConfigError(
                f"personal.groups={'+'.join(config.personal.groups)}: leaves nothing of Phase{phase.train}, which "
                f"method {name!r} runs at home; set personal.groups={'+'.join(phase.train)}."
            )
    return Plan(
        name=name,
        scopes=scopes,
        round=_restrict(method.round, moving),
        finish=_restrict(method.finish, set(config.personal.groups)),
    )


def _restrict(phases: tuple[Phase, ...], allowed: set[str]) -> tuple[Phase, ...]:
    kept = (tuple(group for group in phase.train if group in allowed) for phase in phases)
    return tuple(Phase(*train) for train in kept if train)
