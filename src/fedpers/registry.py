"""Finding methods, tasks and data sources by name.

A built-in entry is a module of its package (`fedavg-finetune` lives in `methods/fedavg_finetune.py`) with one subclass
of the base class. A third-party package adds one with a Python entry point in the group `fedpers.methods`,
`fedpers.tasks` or `fedpers.data` that points at such a class. Adding an entry edits no other file. A class that lives
in a notebook or a script is added by `register`, for as long as the process runs.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, TypeVar

from fedpers.errors import ConfigError

if TYPE_CHECKING:
    from fedpers.config import Config

KEYS = {"methods": "method", "tasks": "task.name", "data": "data.name"}  # where the configuration names an entry
BASES = {"methods": "Method", "tasks": "Task", "data": "Source"}  # each in the module `base` of its package
_registered: dict[tuple[str, str], type] = {}  # by kind and name

T = TypeVar("T")


def entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Return what installed packages add."""
    return _installed(group, tuple(sys.path))


@cache
def _installed(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Look through all packages once for each path they are found on: 17 ms each time would be most of a lookup."""
    del path
    return tuple(metadata.entry_points(group=group))


def names(kind: str) -> list[str]:
    """Return the sorted names of all entries of a kind ("methods", "tasks" or "data")."""
    registered = {name for of, name in _registered if of == kind}
    return sorted(_built_in(kind) | registered | {point.name for point in entry_points(group=f"fedpers.{kind}")})


def register(name: str, entry: type, kind: str = "methods") -> None:
    """Let configurations in this process use a class under a name, such as a method defined in a notebook.

    A class replaces an earlier one of the same name and module, so that a notebook's cell can be run again.

    Args:
        name: small letters, digits and hyphens.
        entry: a subclass of `Method`, `Task` or `Source`.
        kind: "methods", "tasks" or "data".

    Raises:
        ConfigError: a kind that does not exist, a class that is not of the kind, a name that cannot be one, or one that
            something else has.
    """
    if kind not in BASES:
        raise ConfigError(f"register({name!r}): kind = {kind!r}; expected one of {', '.join(BASES)}.")
    base = getattr(importlib.import_module(f"fedpers.{kind}.base"), BASES[kind])
    if not (isinstance(entry, type) and issubclass(entry, base)):
        raise ConfigError(f"register({name!r}): expected a subclass of {BASES[kind]}, found {entry!r}.")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ConfigError(f"register({name!r}): a name is small letters and digits with hyphens between, as my-method.")
    before = _registered.get((kind, name))
    same = before is not None and (before.__module__, before.__qualname__) == (entry.__module__, entry.__qualname__)
    if not same and name in names(kind):
        raise ConfigError(f"register({name!r}): another of fedpers.{kind} has this name; choose a new one.")
    _registered[kind, name] = entry


def find(kind: str, name: str, base: type[T]) -> type[T]:
    """Return the subclass of `base` registered under `name`.

    Raises:
        ConfigError: no such entry (with the nearest name), one that cannot be loaded, or one that is not a subclass of
            `base`.
    """
    if (kind, name) in _registered and issubclass(_registered[kind, name], base):
        return _registered[kind, name]
    for point in entry_points(group=f"fedpers.{kind}"):
        if point.name == name:
            return _load(kind, point, base)
    _check_known(kind, name, KEYS[kind])
    path = f"fedpers.{kind}.{name.replace('-', '_')}"
    with _told(path):
        module = importlib.import_module(path)
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    found = [c for c in classes if issubclass(c, base)]
    if len(found) != 1:
        said = ", ".join(c.__name__ for c in found) or "none"
        raise ConfigError(f"{module.__name__}: expected one subclass of {base.__name__}, found {said}; one file each.")
    return found[0]


def check_named(*configs: Config) -> None:
    """Raise ConfigError unless there are entries of all the names in these configurations; imports none of them."""
    named: dict[tuple[str, str, str], None] = {}
    for config in configs:
        given = {"methods": config.method, "tasks": config.task.name, "data": config.data.name}
        named |= {(kind, name, KEYS[kind]): None for kind, name in given.items()}
        drawn = config.frontier.methods if config.frontier else ()
        named |= {("methods", name, "frontier.methods"): None for name in drawn}
    for kind, name, key in named:
        _check_known(kind, name, key)


def _check_known(kind: str, name: str, key: str) -> None:
    known = names(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{key} = {name!r}: unknown; {hint}known: {', '.join(known)}.")


def source_of(entry: type) -> str:
    """Return the text of the file that defines a class; of one that no file defines, as in a notebook, nothing."""
    try:
        return inspect.getsource(sys.modules[entry.__module__])
    except (OSError, TypeError):
        return ""


def broken(kind: str, base: type[object]) -> dict[str, ConfigError]:
    """Return the entries of a kind that cannot be loaded, and why."""
    found = {}
    for name in names(kind):
        try:
            find(kind, name, base)
        except ConfigError as error:
            found[name] = error
    return found


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Tell whatever goes wrong while somebody's module is loaded, with the line of their file."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except SyntaxError as error:
        raise ConfigError(f"{where}: {error.filename}, line {error.lineno}: {error.msg}; mend it there.") from error
    except Exception as error:  # a module may do anything when it is loaded
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
        place = f"{frames[-1].filename}, line {frames[-1].lineno}: " if len(frames) > 1 else ""
        raise ConfigError(f"{where}: {place}{type(error).__name__}: {error}; mend it there.") from error


def _built_in(kind: str) -> set[str]:
    """Names of the modules of a package; each has to be one that a name can be made of."""
    package = importlib.util.find_spec(f"fedpers.{kind}")  # not imported: a wrong name is told before torch is there
    assert package is not None
    files = [one.name for one in pkgutil.iter_modules(package.submodule_search_locations) if one.name != "base"]
    if odd := [file for file in files if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", file)]:
        raise ConfigError(
            f"fedpers.{kind}: {odd[0]}.py: a file is named like its entry, in small letters and digits with _ for -; "
            "rename it."
        )
    return {file.replace("_", "-") for file in files}


def _load(kind: str, point: EntryPoint, base: type[T]) -> type[T]:
    """Load a third party's class; whatever is wrong with it is told with the name of its entry point."""
    where = f"entry point {point.name} = {point.value} of fedpers.{kind}"
    if point.name in _built_in(kind):
        raise ConfigError(f"{where}: fedpers itself has this name, and which of both ran would be a guess; rename it.")
    with _told(where):
        found: object = point.load()
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{where}: expected a subclass of {base.__name__}, found {found!r}.")
    return found
