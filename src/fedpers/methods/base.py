"""What a method is: a table of scopes and phases, and a few functions where a table does not say it all.

The engine, the Flower client, the privacy checker and the documentation all read this one table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import CodeType
from typing import ClassVar, Literal

from torch import Tensor

from fedpers.config import ALIASES, GROUPS, PLAIN, Family, expand, spoken
from fedpers.errors import ConfigError
from fedpers.visit import Arrays, Service, Tensors, Visit


class Scope(StrEnum):
    """Where a parameter group lives."""

    FROZEN = "frozen"  # stays at its public initial value
    SHARED = "shared"  # travels and is aggregated
    PERSONAL = "personal"  # stays with its user


FROZEN, SHARED, PERSONAL = Scope.FROZEN, Scope.SHARED, Scope.PERSONAL


@dataclass(frozen=True)
class Phase:
    """One stretch of local training.

    `train` names the groups that move; the forward pass reads all the others as they are, but for those in `without`,
    which it reads at their public initial values. Phases whose groups are all personal, all phases with `own`, and all
    phases after the last release use the settings under `personal`, the rest those under `local`.

    Attributes:
        train: groups; `adapter` and `adapter2` stand for both factors of an adapter.
        own: move the user's own copies of shared groups, kept from round to round beside the shared ones and pulled
            toward the values just received. No other phase reads these copies, so they never shape what is sent.
        without: groups that are read at their public initial values.
        pull: the option that holds the strength of an L2 pull toward the values received; of own copies without it
            (and without `mix`) that is `personal.l2`.
        mix: of own copies: the model that is trained is option * own + (1 - option) * shared.
        inner: the option that holds the step, in units of the step size, after which a gradient is taken; the gradient
            is then applied from before that step (first-order MAML), so a phase makes two noised steps for each one.
        blend: the option that holds the step size with which, element by element, a point between the copy kept at
            home and the value received is learnt, starting at the latter.
        gate: the option that holds the second adapter's weight in this phase, for every input.
        turn: run in rounds with this remainder only: (remainder, divisor).
    """

    train: tuple[str, ...]
    own: bool
    without: tuple[str, ...]
    pull: str
    mix: str
    inner: str
    blend: str
    gate: str
    turn: tuple[int, int]

    def __init__(
        self,
        *train: str,
        own: bool = False,
        without: Sequence[str] = (),
        pull: str = "",
        mix: str = "",
        inner: str = "",
        blend: str = "",
        gate: str = "",
        turn: tuple[int, int] = (0, 1),
    ) -> None:
        values = {"train": _ordered(train), "own": own, "without": _ordered(without), "pull": pull, "mix": mix,
                  "inner": inner, "blend": blend, "gate": gate, "turn": turn}  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        words = [repr(group) for group in spoken(self.train)]
        for name in ("own", "without", "pull", "mix", "inner", "blend", "gate", "turn"):
            if (value := getattr(self, name)) != getattr(Phase(), name):
                words.append(f"{name}={spoken(value) if name == 'without' else value!r}")
        return f"Phase({', '.join(words)})"

    def only(self, groups: Collection[str]) -> Phase:
        """Return the same phase on those of its groups alone."""
        return Phase(
            *(group for group in self.train if group in groups), own=self.own, without=self.without, pull=self.pull,
            mix=self.mix, inner=self.inner, blend=self.blend, gate=self.gate, turn=self.turn,
        )  # fmt: skip

    def on(self, number: int) -> bool:
        """Whether a round runs this phase."""
        remainder, divisor = self.turn
        return number % divisor == remainder


def _ordered(names: Sequence[str]) -> tuple[str, ...]:
    """Expand group names, in one order however they are given; unknown ones, to be refused by the method, come last."""
    groups = expand(names)
    return (*(group for group in GROUPS if group in groups), *(group for group in groups if group not in GROUPS))


FUNCTIONS = ("begin", "gradient", "end", "home", "combine", "serve")


class Method:
    """Base of all methods. Subclasses set the table; the docstring cites the paper, its first line is the summary."""

    scopes: ClassVar[Mapping[str, Scope]] = {}
    round: ClassVar[tuple[Phase, ...]] = ()  # run by each client that takes part in a round, before it replies
    finish: ClassVar[tuple[Phase, ...]] = ()  # run once by every client, after the last release
    cite: ClassVar[str] = ""  # authors, venue and year
    differs: ClassVar[str] = ""  # in one line, from its nearest neighbour
    options: ClassVar[Mapping[str, float]] = {}  # the method's own numbers and their defaults; `options` sets them
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}  # least and largest value of options; else from 0 on
    keeps: ClassVar[bool] = False  # a user keeps an own copy of the shared groups as it trained them last
    travels: ClassVar[tuple[str, ...]] = ()  # kinds of companions of every shared array that travel with it, first zero
    remembers: ClassVar[tuple[str, ...]] = ()  # kinds of companions that stay with their user, first zero
    clusters: ClassVar[str] = ""  # the option with the number of shared models of which each user takes the best
    needs: ClassVar[tuple[Family, ...]] = ()  # families that `share` must not leave out
    serves: ClassVar[tuple[str, ...]] = ()  # shared groups that the server sets and no client sends
    link: ClassVar[Literal["linear", "sigmoid"]] = "linear"  # from the gate's output to the second adapter's weight
    sgd: ClassVar[bool] = False  # whether its arithmetic holds for plain gradient steps alone
    pooled: ClassVar[bool] = False  # one trainer holds all records: not federated
    everyone: ClassVar[bool] = False  # whether every client has to take part in every round
    unclaimable: ClassVar[str] = ""  # why no privacy claim can be made, whatever the noise

    def __init_subclass__(cls) -> None:
        """Refuse a table that contradicts itself, when it is defined."""
        _check_scopes(cls)
        scopes = {name: scope for given, scope in cls.scopes.items() for name in expand([given])}
        cls.scopes = {group: scopes[group] for group in GROUPS if group in scopes}
        _check_phases(cls)
        _check_rest(cls)

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]

    # Functions of the client; each may change the visit in place. Every client stands in a row of its own along the
    # first axis of all tensors, and no row may read another: that is checked before a private run.

    @classmethod
    def begin(cls, visit: Visit) -> None:
        """Change what the phases start from."""

    @classmethod
    def gradient(cls, visit: Visit, name: str, weights: Tensors, gradient: Tensor) -> Tensor:
        """Return the gradient to step with, of a shared one of the `weights` that a phase moves; called after clipping
        and noise.
        """
        return gradient

    @classmethod
    def end(cls, visit: Visit) -> None:
        """Change what is sent (`visit.local`) or remembered, after the phases."""

    @classmethod
    def home(cls, visit: Visit) -> None:
        """Make `visit.local` the user's own model, after the last release: own copies where there are any."""
        visit.local.update({name: visit.own[name] for name in visit.shared if visit.own is not visit.local})

    # Functions of the server.

    @classmethod
    def combine(cls, replies: list[Arrays], service: Service) -> Arrays:
        """Make the next values of what travels out of single replies, in the place of their mean.

        A method with this function is refused where only a noised sum of the replies is looked at.
        """
        raise NotImplementedError

    @classmethod
    def serve(cls, arrays: Arrays, service: Service) -> Arrays:
        """Return the next broadcast from the averaged (and noised) arrays: post-processing."""
        return arrays

    @classmethod
    def functions(cls) -> list[str]:
        """What the method does beyond its table of phases, as text that changes with it."""
        beyond = (cls.keeps, cls.travels, cls.remembers, cls.clusters, cls.serves, cls.link, cls.pooled)
        own = [f"{one} {_code(getattr(cls, one).__func__.__code__)}" for one in FUNCTIONS if cls.overrides(one)]
        return [repr(beyond), *own]

    @classmethod
    def overrides(cls, *functions: str) -> bool:
        """Whether the method has one of these functions of its own."""
        return any(getattr(cls, one).__func__ is not getattr(Method, one).__func__ for one in functions)


def _code(code: CodeType) -> str:
    """A function's code as text that is the same in every process; what it calls is not followed."""
    constants = [_code(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _check_scopes(cls: type[Method]) -> None:
    where = f"method {cls.__name__}"
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


def _check_phases(cls: type[Method]) -> None:
    where = f"method {cls.__name__}"
    for part, phases in (("round", cls.round), ("finish", cls.finish)):
        if not isinstance(phases, tuple) or not all(isinstance(phase, Phase) for phase in phases):
            raise ConfigError(f'{where}: {part} must be a tuple of phases, such as (Phase("adapter"),).')
        for index, phase in enumerate(phases):
            line = f"{where}: {part}[{index}] = {phase}"
            if phase.own and part == "finish":
                raise ConfigError(f"{line}: after the last release every copy is the user's own; drop `own`.")
            if not phase.train:
                raise ConfigError(f"{line} trains nothing; name a group or delete the phase.")
            for group in (*phase.train, *phase.without):
                if group not in cls.scopes:
                    known = ", ".join(spoken(cls.scopes))
                    raise ConfigError(f"{line} names the group {group!r}, which scopes do not; there: {known}.")
            for group in phase.train:
                if cls.scopes[group] is FROZEN:
                    raise ConfigError(f"{line} trains {group!r}, which is frozen; change its scope or the phase.")
                if phase.own and cls.scopes[group] is PERSONAL:
                    raise ConfigError(f"{line}: {group!r} is personal already; own copies are of shared groups.")
                if group in phase.without:
                    raise ConfigError(f"{line} trains {group!r} and reads it at its initial value; drop one of them.")
            for option in (phase.pull, phase.mix, phase.inner, phase.blend, phase.gate):
                if option and option not in cls.options:
                    raise ConfigError(f'{line} reads the option {option!r}; add it to options = {{"{option}": ...}}.')
            if phase.mix and not phase.own:
                raise ConfigError(f"{line}: mix is of own copies; add own=True.")
            if phase.blend and not cls.keeps:
                raise ConfigError(f"{line} blends with what the user kept; add keeps = True.")
            if not 0 <= phase.turn[0] < phase.turn[1]:
                raise ConfigError(f"{line}: turn is (remainder, divisor) with 0 <= remainder < divisor.")


def _check_rest(cls: type[Method]) -> None:
    where = f"method {cls.__name__}"
    if cls.clusters and cls.clusters not in cls.options:
        raise ConfigError(f"{where}: clusters = {cls.clusters!r} names no option; add it to options.")
    for group in cls.serves:
        if cls.scopes.get(group) is not SHARED:
            raise ConfigError(f"{where}: serves names {group!r}, which is not shared; change its scope.")
    if cls.pooled and not cls.unclaimable:
        raise ConfigError(
            f"{where}: pooled gives one trainer everybody's records, so nothing can be claimed; add unclaimable = "
            '"why no claim can be made".'
        )
    trained = {group for phase in cls.round if not phase.own for group in phase.train}
    moved = cls.overrides("end", "combine")
    for group, scope in cls.scopes.items():
        if scope is SHARED and group not in {*trained, *cls.serves} and not moved:
            raise ConfigError(f"{where}: {group!r} is shared but no round phase trains it; it would never change.")
