"""Is a method's table whole, and does it agree with itself? Asked when the class is defined.

It is no module of `fedpers.methods`, where each module is a method.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from fedpers.config import ALIASES, FAMILIES, GROUPS, PLAIN, expand, spoken
from fedpers.errors import ConfigError
from fedpers.phase import FROZEN, PERSONAL, SHARED, Phase, Scope

if TYPE_CHECKING:
    from fedpers.methods.base import Method

CLIENT = ("begin", "gradient", "end", "home")
FUNCTIONS = (*CLIENT, "combine", "serve")
WORDS = ("cite", "differs", "clusters", "unclaimable")
LISTS = ("travels", "remembers", "needs", "serves")
SWITCHES = ("keeps", "sgd", "pooled", "everyone")
Link = Literal["linear", "sigmoid"]  # from the gate's output to the second adapter's weight
OF_A_PHASE = ("pull", "mix", "inner", "blend", "gate")  # what names an option


def check(cls: type[Method], base: type[Method]) -> None:
    """Refuse a table that contradicts itself.

    Args:
        cls: the method.
        base: the class whose attributes a table sets.

    Raises:
        ConfigError: names the method, the line, and the change that mends it.
    """
    where = f"method {cls.__name__}"
    _check_names(cls, base, where)
    _check_kinds(cls, where)
    _check_scopes(cls, where)
    scopes = {group: scope for given, scope in cls.scopes.items() for group in expand([given])}
    for part, phases in (("round", cls.round), ("finish", cls.finish)):
        for index, phase in enumerate(phases):
            _check_phase(cls, scopes, phase, part, f"{where}: {part}[{index}] = {phase}")
    _check_rest(cls, scopes, where)
    _check_movement(cls, scopes, where)


def _check_names(cls: type[Method], base: type[Method], where: str) -> None:
    """A misspelt name would be another attribute, which nobody reads."""
    known = [name for name in vars(base) if not name.startswith("_")]
    for name in vars(cls):
        near = difflib.get_close_matches(name, known, 1, cutoff=0.8)
        if name not in known and not name.startswith("_") and near:
            raise ConfigError(
                f"{where}: {name!r} is nothing that a method has; did you mean {near[0]!r}? (A helper of your own: "
                f"call it _{name}.)"
            )
    for name in FUNCTIONS:
        if name in vars(cls) and not isinstance(vars(cls)[name], classmethod):
            raise ConfigError(
                f"{where}: {name} must be a class method; write @classmethod above `def {name}(cls, ...)`."
            )


def _check_kinds(cls: type[Method], where: str) -> None:
    for part, phases in (("round", cls.round), ("finish", cls.finish)):
        if isinstance(phases, Phase):
            raise ConfigError(f"{where}: {part} must be a tuple of phases; a comma is missing: {part} = ({phases},).")
        if not isinstance(phases, tuple) or not all(isinstance(phase, Phase) for phase in phases):
            raise ConfigError(f'{where}: {part} must be a tuple of phases, such as (Phase("adapter"),).')
    for name in LISTS:
        value = getattr(cls, name)
        if isinstance(value, str):
            raise ConfigError(f'{where}: {name} must be a tuple; a comma is missing: {name} = ("{value}",).')
        if not isinstance(value, tuple) or not all(isinstance(one, str) for one in value):
            raise ConfigError(f'{where}: {name} = {value!r}; expected a tuple of names, such as ("one",).')
    for name in WORDS:
        if not isinstance(value := getattr(cls, name), str):
            raise ConfigError(f"{where}: {name} = {value!r}; expected text.")
    for name in SWITCHES:
        if not isinstance(value := getattr(cls, name), bool):
            raise ConfigError(f"{where}: {name} = {value!r}; expected True or False.")
    if cls.link not in get_args(Link):
        raise ConfigError(f"{where}: link = {cls.link!r}; expected one of {', '.join(get_args(Link))}.")
    for name in ("options", "ranges"):
        if not isinstance(getattr(cls, name), Mapping):
            raise ConfigError(f'{where}: {name} must map names to numbers, such as options = {{"mu": 0.1}}.')
    for name, value in cls.options.items():
        if not isinstance(name, str) or isinstance(value, bool) or not _finite(value):
            raise ConfigError(f"{where}: options[{name!r}] = {value!r}; expected a finite number, its default.")
    for name, limits in cls.ranges.items():
        if name not in cls.options:
            raise ConfigError(f"{where}: ranges names {name!r}, which is no option; add it to options.")
        if not isinstance(limits, tuple) or len(limits) != 2:
            raise ConfigError(f"{where}: ranges[{name!r}] = {limits!r}; expected (least, largest).")
        if not limits[0] <= cls.options[name] <= limits[1]:
            raise ConfigError(f"{where}: options[{name!r}] = {cls.options[name]!r} lies outside of ranges, {limits!r}.")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _check_scopes(cls: type[Method], where: str) -> None:
    if not isinstance(cls.scopes, Mapping):
        raise ConfigError(
            f'{where}: scopes must map groups to scopes, such as {{"adapter": SHARED, "head": PERSONAL}}.'
        )
    seen: dict[str, str] = {}
    for given, scope in cls.scopes.items():
        if not isinstance(scope, Scope):
            raise ConfigError(f"{where}: scope of {given!r} is {scope!r}; use FROZEN, SHARED or PERSONAL.")
        for group in expand([given]):
            if group not in GROUPS:
                known = ", ".join((*ALIASES, *GROUPS))
                raise ConfigError(f"{where}: scopes[{given!r}] names an unknown group; known: {known}.")
            if group in seen:
                raise ConfigError(
                    f"{where}: scopes name {group!r} twice, as {seen[group]!r} and as {given!r}; a group has one scope."
                )
            seen[group] = given
    if missing := spoken(g for g in PLAIN if g not in seen):
        raise ConfigError(f"{where}: scopes must also name {', '.join(missing)}; FROZEN leaves a group as it is.")


def _check_phase(cls: type[Method], scopes: Mapping[str, Scope], phase: Phase, part: str, line: str) -> None:
    if phase.own and part == "finish":
        raise ConfigError(f"{line}: after the last release every copy is the user's own; drop `own`.")
    if not phase.train:
        raise ConfigError(f"{line} trains nothing; name a group or delete the phase.")
    for group in (*phase.train, *phase.without):
        if group not in scopes:
            known = ", ".join(spoken(scopes))
            raise ConfigError(f"{line} names the group {group!r}, which scopes do not; there: {known}.")
    for group in phase.train:
        if scopes[group] is FROZEN:
            raise ConfigError(f"{line} trains {group!r}, which is frozen; change its scope or the phase.")
        if phase.own and scopes[group] is PERSONAL:
            raise ConfigError(f"{line}: {group!r} is personal already; own copies are of shared groups.")
        if group in phase.without:
            raise ConfigError(f"{line} trains {group!r} and reads it at its initial value; drop one of them.")
    for word in OF_A_PHASE:
        option = getattr(phase, word)
        if not isinstance(option, str):
            raise ConfigError(
                f'{line}: {word} names an option, whose value runs can set; write {word}="{word}" and '
                f'options = {{"{word}": {option!r}}}.'
            )
        if option and option not in cls.options:
            raise ConfigError(f'{line} reads the option {option!r}; add it to options = {{"{option}": ...}}.')
    if phase.mix and not phase.own:
        raise ConfigError(f"{line}: mix is of own copies; add own=True.")
    if phase.blend and not cls.keeps:
        raise ConfigError(f"{line} blends with what the user kept; add keeps = True.")
    if not 0 <= phase.turn[0] < phase.turn[1]:
        raise ConfigError(f"{line}: turn is (remainder, divisor) with 0 <= remainder < divisor.")


def _check_rest(cls: type[Method], scopes: Mapping[str, Scope], where: str) -> None:
    if cls.clusters and cls.clusters not in cls.options:
        raise ConfigError(f"{where}: clusters = {cls.clusters!r} names no option; add it to options.")
    for family in cls.needs:
        if family not in FAMILIES:
            raise ConfigError(f"{where}: needs names {family!r}; `share` knows {', '.join(FAMILIES)}.")
    for group in cls.serves:
        if scopes.get(group) is not SHARED:
            raise ConfigError(f"{where}: serves names {group!r}, which is not shared; change its scope.")
    if cls.pooled and not cls.unclaimable:
        raise ConfigError(
            f"{where}: pooled gives one trainer everybody's records, so nothing can be claimed; add unclaimable = "
            '"why no claim can be made".'
        )


def _check_movement(cls: type[Method], scopes: Mapping[str, Scope], where: str) -> None:
    """Every group that is not frozen has to move at some time, by a phase or a function."""
    trained = set(_trained(cls.round, own=False))
    late = {*_trained(cls.round, own=True), *_trained(cls.finish, own=False)}
    for group, scope in scopes.items():
        if scope is SHARED and group not in {*trained, *cls.serves} and not cls.overrides("end", "combine"):
            raise ConfigError(f"{where}: {group!r} is shared but no round phase trains it; it would never change.")
        if scope is PERSONAL and group not in {*trained, *late} and not cls.overrides(*CLIENT):
            raise ConfigError(
                f"{where}: {group!r} is personal but no phase trains it; it would stay at its public initial value: "
                "name it in a phase, or make it FROZEN."
            )
    for A, B in (("A", "B"), ("A2", "B2")):
        if A in {*trained, *late} and scopes.get(B) is FROZEN and not cls.overrides("begin"):
            raise ConfigError(
                f"{where}: {B!r} is frozen at its initial value, zero, so {A!r} gets no gradient; train {B!r} and "
                f"freeze {A!r}."
            )


def _trained(phases: tuple[Phase, ...], own: bool) -> Iterator[str]:
    """Groups that move, of phases of own copies or of all the others."""
    return (group for phase in phases if phase.own == own for group in phase.train)
