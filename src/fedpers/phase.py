"""Where parameter groups live, and what moves them: the words of a method's table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from fedpers.config import GROUPS, expand, spoken


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
            (and without `mix`) that is `personal.l2`. Nobody sends a personal group: it is pulled toward its public
            initial value.
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
