"""What the sections of a configuration share: parameter groups by name, numbers within bounds, strictness."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

Family = Literal["adapter", "norm", "head"]
FAMILIES: tuple[Family, ...] = get_args(Family)  # what a configuration names
GROUPS = ("A", "B", "A2", "B2", "gate", "residual", "norm", "head")  # what a method's table may tell apart
PLAIN = ("A", "B", "head")  # the groups that every model has; the others are there where a method uses them
FAMILY = {group: group if group in FAMILIES else "adapter" for group in GROUPS}
ALIASES = {"adapter": ("A", "B"), "adapter2": ("A2", "B2")}


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Replace `adapter` and `adapter2` by their two factors; other names stay as they are."""
    return tuple(dict.fromkeys(group for name in names for group in ALIASES.get(name, (name,))))


def spoken(groups: Iterable[str]) -> tuple[str, ...]:
    """Put both factors of an adapter together again, for texts."""
    found = list(groups)
    for name, pair in ALIASES.items():
        if set(pair) <= set(found):
            found = [name if group == pair[0] else group for group in found if group != pair[1]]
    return tuple(found)


def _groups(value: Any) -> Any:
    return tuple(value.split("+")) if isinstance(value, str) else value


def _join(value: tuple[str, ...]) -> str:
    return "+".join(value)


Groups = Annotated[
    tuple[Family, ...],
    BeforeValidator(_groups),
    PlainSerializer(_join),
    Field(min_length=1),
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)  # an input may be the secret
