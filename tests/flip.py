"""Change one line of the program while it runs: negative controls attack the production path, not a copy of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest


def flip(monkeypatch: pytest.MonkeyPatch, module: ModuleType, line: str, instead: str, **helpers: Any) -> None:
    """Replace one line of a module's source in the functions that are already loaded, until the test ends.

    The functions keep their identity, so everybody who imported them runs the changed line. `helpers` are names that
    the new line may use. Fails unless the line stands exactly once in the source and in the body of some function.
    """
    source = Path(inspect.getsourcefile(module) or "").read_text(encoding="utf-8")
    assert source.count(line) == 1, f"{source.count(line)} times in {module.__name__}: {line}"
    assert "\n" not in line.strip("\n")
    assert "\n" not in instead.strip("\n")
    for name, helper in helpers.items():
        monkeypatch.setattr(module, name, helper, raising=False)
    changed = dict(_codes(compile(source.replace(line, instead), module.__file__ or "", "exec")))
    flipped = 0
    for function in _functions(module):
        new = changed.get(_place(function.__code__))
        if new is not None and new != function.__code__:
            monkeypatch.setattr(function, "__code__", new)
            flipped += 1
    assert flipped, f"no loaded function of {module.__name__} holds: {line}"


def _place(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno  # a property's getter and setter have one name


def _codes(code: CodeType) -> Iterator[tuple[tuple[str, int], CodeType]]:
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield _place(const), const
            yield from _codes(const)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    held: list[Any] = list(vars(module).values())
    held += [member for one in held if inspect.isclass(one) for member in vars(one).values()]
    for member in held:
        for function in _unwrapped(member):
            if function.__module__ == module.__name__:
                yield function


def _unwrapped(member: Any) -> Iterator[FunctionType]:
    parts: list[Callable[..., Any] | None] = [member]
    if isinstance(member, property):
        parts = [member.fget]
    elif isinstance(member, classmethod | staticmethod):
        parts = [member.__func__]
    for part in parts:
        inner = inspect.unwrap(part) if callable(part) else part
        if isinstance(inner, FunctionType):
            yield inner
