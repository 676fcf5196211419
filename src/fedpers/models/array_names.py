"""What arrays are called: a name tells which parameter group an array belongs to, never its shape.

LoRA factors have PEFT's keys; other arrays start with what they are, as in `head.*` or `norm.<module>.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fedpers.config import FAMILY
from fedpers.errors import ConfigError

SECOND = "second"  # PEFT's name of the second adapter; the first is "default"
HEAD = "head."
GATE = "gate.weight"
STARTS = ("base_model.", HEAD, "norm.", "residual.", "gate.")  # base_model: PEFT's keys
FACTOR = re.compile(rf"base_model\.(?:.+\.)?lora_([AB])(\.{SECOND})?\.weight")


class Pair(NamedTuple):
    """The array names of one LoRA module."""

    module: str  # its path in the PeftModel
    A: str
    B: str
    residual: str


def array_name(module: str) -> str:
    """Return the array name of a layer from its module name in the PeftModel.

    For a LoRA factor it is the key in PEFT's adapter file, with the second adapter's name kept.
    """
    if module.endswith(".residual"):
        return f"residual.{module.removesuffix('.residual')}.weight"
    if ".lora_" in module:
        return f"{module.removesuffix('.default')}.weight"
    return f"norm.{module}.weight"


def base_name(name: str) -> str:
    """Strip what an array's companion, such as `control.<name>` or `cluster3.<name>`, has before the array's name."""
    rest = name.partition(".")[2]
    return rest if rest.startswith(STARTS) and not name.startswith(STARTS) else name


def group_of(name: str) -> str:
    """Return the parameter group, one of config.GROUPS, of an array or of a companion of it; shapes play no part.

    Raises:
        ConfigError: a name that no model gives.
    """
    base = base_name(name)
    for group in ("head", "norm", "residual", "gate"):
        if base.startswith(f"{group}."):
            return group
    if found := FACTOR.fullmatch(base):
        return found[1] + ("2" if found[2] else "")
    raise ConfigError(f"array {name!r}: belongs to no parameter group; names start with {', '.join(STARTS)}.")


def family_of(name: str) -> str:
    """Return what a configuration calls the array's group: adapter, norm or head."""
    return FAMILY[group_of(name)]


def second(name: str) -> str:
    """Return the second adapter's array in the place of one of the first's."""
    return f"{name.removesuffix('.weight')}.{SECOND}.weight"


def rank_index(name: str, factor: Tensor) -> Tensor:
    """Number a factor's ranks, along the rows of an A and the columns of a B; broadcasts to (clients, out, in)."""
    axis = 1 if group_of(name) == "A" else 2
    index = torch.arange(factor.shape[axis])
    return index[None, :, None] if axis == 1 else index[None, None, :]


def pairs(names: Iterable[str]) -> list[Pair]:
    """Return the LoRA modules of which at least one factor of the first adapter is among `names`, sorted.

    The names in a pair are base names, whether or not they are among `names`: a method may share one factor only.
    """
    bases = [base_name(name) for name in names]
    modules = {base.rpartition(".lora_")[0] for base in bases if group_of(base) in {"A", "B"}}
    return [Pair(m, f"{m}.lora_A.weight", f"{m}.lora_B.weight", f"residual.{m}.weight") for m in sorted(modules)]
