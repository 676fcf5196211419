"""A file that cannot be used is told with its line, and hides none of the others."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fedpers.methods
from fedpers import cli, registry
from fedpers.errors import ConfigError
from fedpers.methods import Method

Add = Callable[[str, str], Path]
GOOD = '''"""A method."""
from fedpers.methods import SHARED, Method, Phase


class Mine(Method):
    """One for all."""

    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head"),)
'''


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Put a file beside the built-in methods."""
    places = [*fedpers.methods.__path__, str(tmp_path)]
    monkeypatch.setattr(fedpers.methods, "__path__", places)
    monkeypatch.setattr(fedpers.methods.__spec__, "submodule_search_locations", places)

    def put(name: str, text: str) -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        return path

    yield put
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(f"fedpers.methods.{path.stem}", None)


BROKEN = {
    "a module that is not there": (
        "import no_such_module",
        "line 9: ModuleNotFoundError: No module named 'no_such_mod",
    ),
    "a name that is not there": ("AVERAGE", "line 9: NameError: name 'AVERAGE' is not defined"),
    "a wrong call": ("Phase(into=1)", "line 9: TypeError: "),
    "no Python": ("def", "line 9: "),
    "a table that contradicts itself": (
        "class Odd(Method):\n    scopes = {}",
        "method Odd: scopes must also name adapter",
    ),
    "two methods": (
        "class Other(Mine):\n    pass",
        "expected one subclass of Method, found Mine, Other; one file each",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_used(
    add: Add, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    line, says = BROKEN[case]
    path = add("broken_one", f"{GOOD}\n{line}\n".replace("\n\n\nclass Mine", "\nclass Mine"))
    with pytest.raises(ConfigError) as refusal:
        registry.find("methods", "broken-one", Method)
    assert says in str(refusal.value)
    assert str(path) in str(refusal.value) or "fedpers.methods.broken_one" in str(refusal.value)
    assert set(registry.broken("methods", Method)) == {"broken-one"}
    every = ["--guarantees", "--markdown"] if case == "two methods" else []  # asks each check about each method
    monkeypatch.setattr(sys, "argv", ["fedpers", "methods", *every])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    out, err = capsys.readouterr()
    assert "fedavg" in out
    if every:
        assert "broken-one" not in out
        assert "broken-one cannot be used: " in err
    else:
        assert re.search(r"broken-one +cannot be used", out)


def test_a_whole_file_is_found(add: Add) -> None:
    add("my_own", GOOD)
    assert registry.find("methods", "my-own", Method).summary() == "One for all."
    assert "my-own" in registry.names("methods")


@pytest.mark.parametrize("name", ["MyOwn", "my-own"])
def test_a_file_that_no_name_can_be_made_of(add: Add, name: str) -> None:
    add(name, GOOD)
    with pytest.raises(ConfigError, match=rf"{name}\.py: a file is named like its entry, in small letters"):
        registry.names("methods")
