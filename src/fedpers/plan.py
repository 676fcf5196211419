"""A method's table after the configuration has been applied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from fedpers.config import FAMILY, GROUPS, PLAIN, Config, HeadPolicy, expand, spoken
from fedpers.errors import ConfigError
from fedpers.methods.base import FROZEN, PERSONAL, SHARED, Method, Phase, Scope

Half = Literal["all", "shared", "head"]
HALVES: tuple[Half, ...] = get_args(Half)


@dataclass(frozen=True)
class Plan:
    """A method's table after the configuration has been applied (`share`, `personal.groups`, `options`)."""

    name: str
    scopes: Mapping[str, Scope]
    round: tuple[Phase, ...]
    finish: tuple[Phase, ...]
    head: HeadPolicy = "method"  # `privacy.head`: how personal groups are kept from making the claim false
    method: type[Method] = Method
    options: Mapping[str, float] = field(default_factory=dict)

    def groups(self, scope: Scope) -> tuple[str, ...]:
        """Return the groups with this scope, in a fixed order."""
        return tuple(group for group in GROUPS if self.scopes.get(group) is scope)

    @property
    def shared(self) -> tuple[str, ...]:
        """The groups that travel."""
        return self.groups(SHARED)

    def sent(self, number: int) -> tuple[str, ...]:
        """The groups that clients send in a round; the server sends all that are shared."""
        moved = _sendable(self.method, tuple(phase for phase in self.round if phase.on(number)))
        return tuple(group for group in self.shared if group in moved and group not in self.method.serves)

    @property
    def turns(self) -> int:
        """After how many rounds what is sent repeats itself."""
        return math.lcm(*(phase.turn[1] for phase in self.round))

    @property
    def personal(self) -> tuple[str, ...]:
        """The groups of which each user has an own value at the end, from the rounds or from after them."""
        own = {*self.groups(PERSONAL), *self.twins, *(group for phase in self.finish for group in phase.train)}
        if self.method.clusters or self.method.overrides("home"):
            own |= set(self.shared)
        return tuple(group for group in GROUPS if group in own)

    @property
    def twins(self) -> tuple[str, ...]:
        """The shared groups of which each user keeps an own copy beside the shared one, in the rounds."""
        own = {group for phase in self.round if phase.own for group in phase.train}
        if self.method.keeps:
            own |= set(self.shared)
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
    def beyond(self) -> tuple[str, ...]:
        """The groups that the model must have beyond those of every model."""
        return tuple(group for group in GROUPS if group in self.scopes and group not in PLAIN)

    @property
    def plain(self) -> bool:
        """Whether clients send in every round just what they trained of all that is shared, to be averaged."""
        method = self.method
        functions = method.overrides("begin", "gradient", "end", "combine", "serve")
        beyond = method.travels or method.clusters or method.serves or method.pooled or self.turns > 1
        return not functions and not beyond and not any(phase.inner or phase.blend for phase in self.round)

    @property
    def moves_personal_state(self) -> bool:
        """Whether personal models change in the rounds, so that they are worth measuring on the way."""
        return bool(self.method.clusters) or any(
            phase.own or set(phase.train) & {*self.groups(PERSONAL), *self.twins} for phase in self.round
        )

    def protected(self, phase: Phase) -> bool:
        """Whether a round phase runs under record-level clipping and noise: all that move what is sent, and by policy
        those of personal groups. Noise-free are phases whose result stays at home for good.
        """
        sends = not phase.own and bool(set(phase.train) & set(self.shared))
        return (sends or (not phase.own and self.head in {"joint", "split-dp"})) and not phase.blend

    def half(self, phase: Phase) -> Half:
        """Which records a round phase trains on."""
        if self.head not in {"split", "split-dp"}:
            return "all"
        return "shared" if set(phase.train) & set(self.shared) else "head"


def plan(name: str, method: type[Method], config: Config) -> Plan:
    """Apply `share`, `personal.groups`, `options` and `privacy.head` to a method's table.

    Raises:
        ConfigError: nothing is left of what the method shares, or of a phase that it runs at home, an option that it
            does not have, or a policy for personal groups that does not fit the table.
    """
    scopes = {g: FROZEN if s is SHARED and FAMILY[g] not in config.share else s for g, s in method.scopes.items()}
    if SHARED in method.scopes.values() and SHARED not in scopes.values():
        would = "+".join(dict.fromkeys(FAMILY[g] for g in GROUPS if method.scopes.get(g) is SHARED))
        raise ConfigError(f"share={'+'.join(config.share)}: method {name!r} shares only {would}; set share={would}.")
    if missing := [family for family in method.needs if family not in config.share]:
        raise ConfigError(
            f"share={'+'.join(config.share)}: method {name!r} is about the {' and '.join(missing)}, which this leaves "
            f"out; set share={'+'.join((*missing, *config.share))}."
        )
    moving = {group for group, scope in scopes.items() if scope is not FROZEN}
    # A shared group that is frozen in the rounds may still be tuned at home.
    at_home = {group for group in GROUPS if FAMILY[group] in config.personal.groups}
    for phase in (*method.finish, *(phase for phase in method.round if phase.own)):
        if not set(phase.train) & (at_home & moving if phase.own else at_home):
            raise ConfigError(
                f"personal.groups={'+'.join(config.personal.groups)}: leaves nothing of {phase}, which "
                f"method {name!r} runs at home; set "
                f"personal.groups={'+'.join(dict.fromkeys(FAMILY[group] for group in phase.train))}."
            )
    rounds = _restrict(method.round, moving, moving & at_home)
    if stuck := [
        group for group in GROUPS if group in _sendable(method, method.round) & moving - _sendable(method, rounds)
    ]:
        groups = "+".join(dict.fromkeys(FAMILY[group] for phase in method.round for group in phase.train))
        raise ConfigError(
            f"personal.groups={'+'.join(config.personal.groups)}: method {name!r} moves what it shares by training own "
            f"copies, which are of these groups alone, so the shared {alias(tuple(stuck))} would never change; set "
            f"personal.groups={groups}, or share={'+'.join(config.personal.groups)}."
        )
    finish = _restrict(method.finish, at_home)
    personal = tuple(group for group in GROUPS if scopes.get(group) is PERSONAL)
    if config.privacy.head != "method" and SHARED in scopes.values():
        shared = tuple(group for group in GROUPS if scopes.get(group) is SHARED)
        rounds, finish = _apply_policy(config.privacy.head, name, rounds, finish, personal, shared)
    return Plan(name, scopes, rounds, finish, config.privacy.head, method, _options(name, method, config))


def _sendable(method: type[Method], phases: tuple[Phase, ...]) -> set[str]:
    """The groups that phases move and a client may send; own copies only where `end` sends what they have become."""
    return {group for phase in phases if not phase.own or method.overrides("end") for group in phase.train}


def starved(shared: tuple[str, ...], frozen: tuple[str, ...]) -> bool:
    """Whether a shared A would get no gradient, since its B stays at the initial value, zero."""
    return "A" in shared and "B" in frozen


def _options(name: str, method: type[Method], config: Config) -> dict[str, float]:
    """Return the method's numbers; refuse one that it does not have, or out of range."""
    if unknown := sorted(set(config.options) - set(method.options)):
        known = ", ".join(f"{option}={value:g}" for option, value in method.options.items()) or "none"
        raise ConfigError(f"options.{unknown[0]}: method {name!r} has no such number; its options: {known}.")
    found = {**method.options, **config.options}
    for option, value in found.items():
        most = 1.0 if any(option in (phase.mix, phase.gate) for phase in method.round) else math.inf
        least, most = method.ranges.get(option, (0.0, most))
        if not least <= value <= most:
            allowed = f"a number from {least:g} " + ("on" if math.isinf(most) else f"to {most:g}")
            raise ConfigError(f"options.{option} = {value:g}: method {name!r} expects {allowed}.")
    return found


def _apply_policy(
    policy: HeadPolicy,
    name: str,
    rounds: tuple[Phase, ...],
    finish: tuple[Phase, ...],
    personal: tuple[str, ...],
    shared: tuple[str, ...],
) -> tuple[tuple[Phase, ...], tuple[Phase, ...]]:
    """Return round and finish under `privacy.head`; refuse a policy that has nothing to act on."""
    where = f"privacy.head={policy}: method {name!r}"
    in_rounds = tuple(g for g in personal if any(g in phase.train for phase in rounds))
    if not in_rounds:
        raise ConfigError(f"{where} moves no personal group in the rounds; leave privacy.head out.")
    if policy == "frozen" and starved(shared, in_rounds):
        raise ConfigError(
            f"{where} would keep B at zero in the rounds, so that the shared A gets no gradient and moves by noise "
            "alone; choose another policy, or a method that shares B (ffa-lora, fedavg)."
        )
    if policy == "frozen":
        others = {group for group in GROUPS if group not in personal}
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
    kept = (phase.only(allowed if own is None or not phase.own else own) for phase in phases)
    return tuple(phase for phase in kept if phase.train)


def alias(groups: tuple[str, ...]) -> str:
    """Groups in words."""
    return " and ".join(spoken(groups))


def encodes(groups: tuple[str, ...]) -> bool:
    """Whether any of these groups shapes how a context is encoded."""
    return any(group != "head" for group in expand(groups))
