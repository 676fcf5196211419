"""A device that is not the CPU, for machines that have no other: PyTorch's CPU kernels behind tensors that say "toy".

As on a real device, an operation on tensors of both is refused, and numpy cannot read a tensor that lies there. Numbers
are those of the CPU, so what a run computes there can be held against what it computes here. PyTorch keeps a device for
the rest of a process, so this is run as a program:

    python elsewhere.py CONFIG.yaml OUT [CONFIG.yaml OUT ...]

Prints, as JSON, for each OUT how many matrix products were made on either device; what the first run's probe says; and,
of a language model, some text of its shared model.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu"}
LIBRARY = torch.library.Library("aten", "IMPL")
made: Counter[str] = Counter()


class Toy(torch.Tensor):
    """A tensor on the toy device; `here` is the same on the CPU."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Toy:
        """Wrap a tensor of the CPU."""
        made_up = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), dtype=here.dtype, device=torch.device("toy:0")
        )
        made_up.here = here
        return made_up

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Swap what is wrapped along with `data`, of which PyTorch swaps the shape alone."""
        if function == torch.Tensor.data.__set__:  # made anew each time
            args[0].here = args[1].here
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        return run(function, args, kwargs or {})


def run(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on one device, or a copy between both.

    Raises RuntimeError for tensors on different devices; scalars (tensors without dimensions) may come from the CPU.
    """
    name = function.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    toys = [one for one in tensors if isinstance(one, Toy)]
    target = kwargs.get("device")
    there = bool(toys) if target is None else torch.device(target).type == "toy"
    given = dict(kwargs) | ({"device": torch.device("cpu")} if target is not None else {})
    if name not in {"_to_copy", "copy_"} and toys and any(t.dim() for t in tensors if not isinstance(t, Toy)):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found toy and cpu")
    if name in PRODUCTS:
        made["toy" if there else "cpu"] += 1
    found = function(*tree_map(_here, args), **tree_map(_here, given))
    if name == "copy_":
        return args[0]
    mine = {id(one.here): one for one in toys}  # what is changed in place stays the tensor that it was
    if not there:
        return found
    return tree_map(
        lambda one: (mine[id(one)] if id(one) in mine else Toy(one)) if isinstance(one, torch.Tensor) else one, found
    )


def _here(value: Any) -> Any:
    return value.here if isinstance(value, Toy) else value


def registered(size: Any, stride: Any, **given: Any) -> torch.Tensor:
    """Make a tensor for those of PyTorch's own functions that no mode sees."""
    return Toy(torch.empty_strided(size, stride, dtype=given.get("dtype")))


def copied(source: torch.Tensor, to: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy for the same functions."""
    _here(to).copy_(_here(source))
    return to


class Dispatch(TorchDispatchMode):
    """Sees operations that make tensors of nothing, too."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        return run(function, args, kwargs or {})


def register() -> None:
    """Make the device known to PyTorch."""
    _setup_privateuseone_for_python_backend("toy")
    LIBRARY.impl("empty_strided", registered, "PrivateUse1")
    LIBRARY.impl("_copy_from", copied, "PrivateUse1")


def main(arguments: list[str]) -> None:
    """Run configurations on the toy device."""
    from matplotlib.figure import Figure

    from fedpers import simulation
    from fedpers.audit.probe import probe
    from fedpers.config import load_config
    from fedpers.finished_run import Which
    from fedpers.identity import identity
    from fedpers.try_model import generate

    register()
    Figure.savefig = lambda self, where, **options: where.write(b"a picture, undrawn")
    found: dict[str, Any] = {}
    with Dispatch():
        for name, out in zip(arguments[::2], arguments[1::2], strict=True):
            made.clear()
            config = load_config(Path(name), ["engine.device=toy"])
            # A given secret makes other noise on another device; to be comparable it has to be the same here.
            here = load_config(Path(name))
            simulation.identity = lambda experiment, model, here=here: identity(replace(experiment, config=here), model)
            run = simulation.simulate(config, Path(out))
            found[out] = dict(made)
            if "probe" not in found:
                found["probe"] = {one.name: one.verdict for one in probe(config)}
            if run.config.task.name == "language-model":
                found["text"] = generate(Path(out), "one two three", Which(shared=True), tokens=4)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
