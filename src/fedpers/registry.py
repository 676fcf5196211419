"""Finding methods, tasks and data sources by name.

A built-in entry is a module of its package (`fedavg-finetune` lives in `methods/fedavg_finetune.py`) with one subclass
of the base class. A third-party package adds one with a Python entry point in the group `fedpers.methods`,
`fedpers.tasks` or `fedpers.data` that points at such a class. Adding an entry edits no other file.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from typing import TypeVar

from fedpers.errors import ConfigError


def names(kind: str) -> list[str]:
    """Return the sorted names of all entries of a kind ("methods", "tasks" or "data")."""
    package = importlib.import_module(f"fedpers.{kind}")
    built_in = {m.name.replace("_", "-") for m in pkgutil.iter_modules(package.__path__) if m.name not in {"base"}}
    return sorted(built_in | {point.name for point in entry_points(group=f"fedpers.{kind}")})


T = TypeVar("T")
KEYS = {"methods": "method", "tasks": "task.name", "data": "data.name"}  # where the configuration names an entry


def find(kind: str, name: str, base: type[T]) -> type[T]:
    """Return the subclass of `base` registered under `name`.

    Raises:
        ConfigError: no such entry (with the nearest name), or an entry that is not a subclass of `base`.
    """
    for point in entry_points(group=f"fedpers.{kind}"):
        if point.name == name:
            found: object = point.load()
            if not (isinstance(found, type) and issubclass(found, base)):
                raise ConfigError(
                    f"entry point {point.value} of fedpers.{kind}: expected a subclass of {base.__name__}."
                )
            return found
    known = names(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{KEYS[kind]} = {name!r}: unknown; {hint}known: {', '.join(known)}.")
    path = f"fedpers.{kind}.{name.replace('-', '_')}"
    try:
        module = importlib.import_module(path)
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}, line {error.lineno}: {error.msg}; mend the file of {name!r}.") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    found = [c for c in classes if issubclass(c, base)]
    if len(found) != 1:
        raise ConfigError(f"{module.__name__}: expected one subclass of {base.__name__}, found {len(found)}.")
    return found[0]
