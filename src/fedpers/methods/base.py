"""What a method is: a table of scopes and phases.

The engine, the Flower client, the privacy checker and the documentation all read this one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Literal

from fedpers.config import GROUPS, Config, HeadPolicy
from fedpers.errors import ConfigError


class Scope(StrEnum):
    """Where a parameter group lives."""

    FROZEN = "frozen"  # stays at its public initial value
    SHARED = "shared"  # travels and is aggregated
    PERSONAL = "personal"  # stays with its user


Half = Literal["all", "shared", "head"]
FROZEN, SHARED, PERSONAL = Scope.FROZEN, Scope.SHARED, Scope.PERSONAL


@dataclass(frozen=True)
class Phase:
    """One stretch of local training.

    `train` names the groups that move; the forward pass reads all the others as they are. Phases whose groups are all
    personal, all phases with `own`, and all phases after the last release use the settings under `personal`, the rest
    those under `local`.

    With `own` the phase moves the user's own copies of the groups, kept from round to round beside the shared ones and
    pulled toward the values just received. No other phase reads these copies, so they never shape what is sent.
    """

    train: tuple[str, ...]
    own: bool

    def __init__(self, *train: str, own: bool = False) -> None:
        object.__setattr__(self, "train", train)
        object.__setattr__(self, "own", own)

    def __str__(self) -> str:
        return f"Phase({', '.join(map(repr, self.train))}{', own=True' if self.own else ''})"


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
        for group, scope in cls.scopes.items():
            if not isinstance(scope, Scope):
                raise ConfigError(f"{where}: scope of {group!r} is {scope!r}; use FROZEN, SHARED or PERSONAL.")
        for part, phases in (("round", cls.round), ("finish", cls.finish)):
            if not isinstance(phases, tuple) or not all(isinstance(phase, Phase) for phase in phases):
                raise ConfigError(f'{where}: {part} must be a tuple of phases, such as (Phase("adapter"),).')
            for index, phase in enumerate(phases):
                line = f"{where}: {part}[{index}] = {phase}"
                if phase.own and part == "finish":
                    raise ConfigError(f"{line}: after the last release every copy is the user's own; drop `own`.")
                if not phase.train:
                    raise ConfigError(f"{line} trains nothing; name a group or delete the phase.")
                for group in phase.train:
                    if group not in cls.scopes:
                        raise ConfigError(f"{line} trains the unknown group {group!r}; known: {', '.join(GROUPS)}.")
                    if cls.scopes[group] is FROZEN:
                        raise ConfigError(f"{line} trains {group!r}, which is frozen; change its scope or the phase.")
                    if phase.own and cls.scopes[group] is PERSONAL:
                        raise ConfigError(f"{line}: {group!r} is personal already; own copies are of shared groups.")
        trained = {group for phase in cls.round if not phase.own for group in phase.train}
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
    head: HeadPolicy = "method"  # `privacy.head`: how personal groups are kept from making the claim false

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
        return tuple(g for g in GROUPS if self.scopes[g] is PERSONAL or g in {*finished, *self.twins})

    @property
    def twins(self) -> tuple[str, ...]:
        """The shared groups of which each user trains an own copy beside the shared one, in the rounds."""
        own = {group for phase in self.round if phase.own for group in phase.train}
        return tuple(group for group in GROUPS if group in own)

    @property
    def kept(self) -> tuple[str, ...]:
        """The groups that a user's personal state holds from round to round."""
        return tuple(group for group in GROUPS if group in {*self.groups(PERSONAL), *self.twins})

    @property
    def trained(self) -> tuple[str, ...]:
        """The groups that move at any time."""
        moved = {group for phase in (*self.round, *self.finish) for group in phase.train}
        return tuple(group for group in GROUPS if group in moved)

    @property
    def moves_personal_state(self) -> bool:
        """Whether personal state changes in the rounds, so that it is worth measuring on the way."""
        return any(phase.own or set(phase.train) & set(self.groups(PERSONAL)) for phase in self.round)

    def protected(self, phase: Phase) -> bool:
        """Whether a round phase runs under record-level clipping and noise: all that move what is sent, and by policy
        those of personal groups. Noise-free are phases whose result stays at home for good.
        """
        sends = not phase.own and bool(set(phase.train) & set(self.shared))
        return sends or (not phase.own and self.head in {"joint", "split-dp"})

    def half(self, phase: Phase) -> Half:
        """Which records a round phase trains on."""
        if self.head not in {"split", "split-dp"}:
            return "all"
        return "shared" if set(phase.train) & set(self.shared) else "head"


def plan(name: str, method: type[Method], config: Config) -> Plan:
    """Apply `share`, `personal.groups` and `privacy.head` to a method's table.

    Raises:
        ConfigError: nothing is left of what the method shares, or of a phase that it runs at home, or a policy for
            personal groups that does not fit the table.
    """
    scopes = {g: FROZEN if s is SHARED and g not in config.share else s for g, s in method.scopes.items()}
    if SHARED in method.scopes.values() and SHARED not in scopes.values():
        would = "+".join(g for g in GROUPS if method.scopes[g] is SHARED)
        raise ConfigError(f"share={'+'.join(config.share)}: method {name!r} shares only {would}; set share={would}.")
    moving = {group for group, scope in scopes.items() if scope is not FROZEN}
    # A shared group that is frozen in the rounds may still be tuned at home.
    at_home: set[str] = set(config.personal.groups)
    for phase in (*method.finish, *(phase for phase in method.round if phase.own)):
        if not set(phase.train) & (at_home & moving if phase.own else at_home):
            raise ConfigError(
                f"personal.groups={'+'.join(config.personal.groups)}: leaves nothing of {phase}, which "
                f"method {name!r} runs at home; set personal.groups={'+'.join(phase.train)}."
            )
    rounds = _restrict(method.round, moving, moving & at_home)
    finish = _restrict(method.finish, at_home)
    personal = tuple(group for group in GROUPS if scopes[group] is PERSONAL)
    if config.privacy.head != "method" and SHARED in scopes.values():
        rounds, finish = _apply_policy(config.privacy.head, name, rounds, finish, personal)
    return Plan(name=name, scopes=scopes, round=rounds, finish=finish, head=config.privacy.head)


def _apply_policy(
    policy: HeadPolicy, name: str, rounds: tuple[Phase, ...], finish: tuple[Phase, ...], personal: tuple[str, ...]
) -> tuple[tuple[Phase, ...], tuple[Phase, ...]]:
    """Return round and finish under `privacy.head`; refuse a policy that has nothing to act on."""
    where = f"privacy.head={policy}: method {name!r}"
    in_rounds = tuple(g for g in personal if any(g in phase.train for phase in rounds))
    if not in_rounds:
        raise ConfigError(f"{where} moves no personal group in the rounds; leave privacy.head out.")
    if policy == "frozen":
        others = {str(group) for group in GROUPS if group not in personal}
        kept = _restrict(rounds, others, others)
        late = {group for phase in finish for group in phase.train}
        missing = tuple(group for group in in_rounds if group not in late)
        return kept, (*finish, Phase(*missing)) if missing else finish
    mixed = [phase for phase in rounds if set(phase.train) & set(personal) and set(phase.train) - set(personal)]
    if policy in {"split", "split-dp"} and mixed:
        raise ConfigError(f"{where} trains {mixed[0]} on one half of the records each, but in one step; use fedrep.")
    return rounds, finish


def _restrict(phases: tuple[Phase, ...], allowed: set[str], own: set[str] | None = None) -> tuple[Phase, ...]:
    """Keep the allowed groups of each phase (`own`: of phases that move own copies); drop phases left empty."""
    kept = []
    for phase in phases:
        groups = allowed if own is None or not phase.own else own
        kept.append(Phase(*(group for group in phase.train if group in groups), own=phase.own))
    return tuple(phase for phase in kept if phase.train)
