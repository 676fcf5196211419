"""What a method is: a table of scopes and phases, and a few functions where a table does not say it all.

The engine, the Flower client, the privacy checker and the documentation all read this one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import CodeType
from typing import ClassVar

from torch import Tensor

from fedpers.config import GROUPS, Family, expand
from fedpers.method_table import FUNCTIONS, Link, check
from fedpers.phase import FROZEN, PERSONAL, SHARED, Phase, Scope
from fedpers.visit import Arrays, Service, Tensors, Visit

__all__ = ["FROZEN", "PERSONAL", "SHARED", "Method", "Phase", "Scope"]


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
    link: ClassVar[Link] = "linear"  # from the gate's output to the second adapter's weight
    sgd: ClassVar[bool] = False  # whether its arithmetic holds for plain gradient steps alone
    pooled: ClassVar[bool] = False  # one trainer holds all records: not federated
    everyone: ClassVar[bool] = False  # whether every client has to take part in every round
    unclaimable: ClassVar[str] = ""  # why no privacy claim can be made, whatever the noise

    def __init_subclass__(cls) -> None:
        """Refuse a table that contradicts itself, when it is defined."""
        check(cls, Method)
        scopes = {name: scope for given, scope in cls.scopes.items() for name in expand([given])}
        cls.scopes = {group: scopes[group] for group in GROUPS if group in scopes}

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
