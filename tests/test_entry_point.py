"""Methods that live elsewhere: in an installed package with an entry point, or registered by the running program."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from conftest import Command
from fedpers import registry
from fedpers.config import Config, dump_config
from fedpers.data.synthetic import Synthetic
from fedpers.errors import ConfigError
from fedpers.experiment import method_plan
from fedpers.methods import SHARED, Method, Phase
from fedpers.methods.fedprox import FedProx

Tiny = Callable[..., Config]
CONTRIBUTING = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
(METHOD,) = (block for block in re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL) if "(Method)" in block)
(ENTRY,) = re.findall(r"```toml\n(.*?)```", CONTRIBUTING, re.DOTALL)
PYPROJECT = """[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "{name}"
version = "0.1"
{entry}
[tool.setuptools]
packages = ["{name}"]
"""


def install(folder: Path, name: str, entry: str, module: str) -> Path:
    """Let pip install a package of one module, `my_method`, made of two texts; returns what to put on the path."""
    source, target = folder / "source", folder / "installed"
    (source / name).mkdir(parents=True)
    (source / "pyproject.toml").write_text(PYPROJECT.format(name=name, entry=entry), encoding="utf-8")
    (source / name / "__init__.py").touch()
    (source / name / "my_method.py").write_text(module, encoding="utf-8")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def test_an_installed_package_adds_a_method(
    tiny: Tiny, tmp_path: Path, fedpers: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package that CONTRIBUTING shows."""
    monkeypatch.syspath_prepend(install(tmp_path, "my_package", ENTRY, METHOD))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "tiny.yaml").write_text(dump_config(tiny()), encoding="utf-8")
    code, shown, _ = fedpers("methods")
    assert code == 0
    lines = shown.splitlines()
    (place,) = (number for number, line in enumerate(lines) if line.split()[:1] == ["my-method"])
    column = lines[place].index("One model")
    told = " ".join(line[column:].strip() for line in lines[place : place + 6])
    assert told.startswith("One model for all, trained under a pull toward the values received; then each user tunes ")
    assert "this file, 2026" in told
    assert "Differs from fedprox: the head is tuned at home afterwards." in told
    run = tmp_path / "run"
    asked = ("run", tmp_path / "tiny.yaml", "method=my-method", "options.mu=0.5")
    code, _, told = fedpers(*asked, "--out", run, "--quiet")
    assert (code, told) == (0, "")
    assert "method: my-method\n" in (run / "config.yaml").read_text(encoding="utf-8")
    assert '"method":"my-method"' in (run / "ledger.jsonl").read_text(encoding="utf-8").replace(" ", "")


BROKEN_ENTRY = '[project.entry-points."fedpers.methods"]\nbroken = "broken_package.my_method:MyMethod"'


def test_a_broken_one_is_refused_with_the_line_to_change(
    tiny: Tiny, tmp_path: Path, fedpers: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = METHOD.replace('"head": SHARED', '"heads": SHARED')
    assert module != METHOD
    monkeypatch.syspath_prepend(install(tmp_path, "broken_package", BROKEN_ENTRY, module))
    (tmp_path / "tiny.yaml").write_text(dump_config(tiny()), encoding="utf-8")
    code, _, told = fedpers("run", tmp_path / "tiny.yaml", "method=broken", "--out", tmp_path / "run")
    assert code == 2
    assert told.startswith(
        "fedpers: entry point broken = broken_package.my_method:MyMethod of fedpers.methods: method "
    )
    assert "MyMethod: scopes['heads'] names an unknown group; known: adapter," in told
    assert not (tmp_path / "run").exists()
    code, _, told = fedpers("run", tmp_path / "tiny.yaml", "rounds=1", "--out", tmp_path / "other", "--quiet")
    assert (code, told) == (0, "")  # nobody else's run is stopped by it
    _, shown, told = fedpers("methods")
    assert "scopes['heads']" in " ".join((shown + told).split())


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("theirs", "not_installed.module:Method", r"No module named 'not_installed'"),
        ("theirs", "fedpers.methods.fedprox:FedProxy", r"no attribute 'FedProxy'"),
        ("theirs", "fedpers.plan:Plan", r"expected a subclass of Method, found <class 'fedpers\.plan\.Plan'>"),
        ("theirs", "fedpers.methods.fedprox", r"expected a subclass of Method, found <module"),
        ("theirs", "wrong_syntax:Theirs", r"wrong_syntax\.py, line 2: .*; mend it there"),
        ("fedavg", "fedpers.methods.fedprox:FedProx", r"fedpers itself has this name, .* rename it"),
    ],
)
def test_what_is_wrong_with_an_entry_point_is_told_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, why: str
) -> None:
    (tmp_path / "wrong_syntax.py").write_text("x = 1\nclass Theirs(:\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint(name, value, "fedpers.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: (point,) if group == point.group else ())
    with pytest.raises(ConfigError, match=rf"^entry point {name} = {re.escape(value)} of fedpers\.methods: .*{why}"):
        registry.find("methods", name, Method)


class Mine(Method):
    """Shares the head alone."""

    scopes = {"adapter": SHARED, "head": SHARED}
    round = (Phase("adapter", "head"),)


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@pytest.mark.usefixtures("empty")
def test_a_registered_class_is_found_like_any_other(tiny: Tiny, fedpers: Command) -> None:
    assert "mine" not in registry.names("methods")
    registry.register("mine", Mine)
    assert "mine" in registry.names("methods")
    assert registry.find("methods", "mine", Method) is Mine
    assert method_plan("mine", tiny(method="mine")).shared == ("A", "B", "head")
    assert "mine" in fedpers("methods")[1]
    registry.register("mine", Mine, kind="methods")  # a cell that is run again
    registry.register("made-up", Synthetic, kind="data")
    assert "made-up" in registry.names("data")
    assert "made-up" not in registry.names("methods")


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("mine", FedProx), r"another of fedpers\.methods has this name"),
        (("fedavg", Mine), r"another of fedpers\.methods has this name"),
        (("fedavg-finetune", Mine), r"another of fedpers\.methods has this name"),
        (("not-one", int), r"expected a subclass of Method, found <class 'int'>"),
        (("not-one", Mine()), r"expected a subclass of Method"),
        (("not-one", Mine, "tasks"), r"expected a subclass of Task"),
        (("not-one", Mine, "method"), r"kind = 'method'; expected one of methods, tasks, data"),
        (("../mine", Mine), r"a name is small letters and digits"),
        (("my_method", Mine), r"a name is small letters and digits"),
    ],
)
def test_what_cannot_be_registered_is_refused(arguments: tuple[Any, ...], why: str) -> None:
    registry.register("mine", Mine)
    with pytest.raises(ConfigError, match=rf"register\('{re.escape(arguments[0])}'\): .*{why}"):
        registry.register(*arguments)
    assert set(registry._registered) == {("methods", "mine")}


@pytest.mark.usefixtures("empty")
def test_a_name_that_a_package_has_cannot_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", "fedpers.methods.fedprox:FedProx", "fedpers.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: (point,) if group == point.group else ())
    with pytest.raises(ConfigError, match="another of"):
        registry.register("theirs", Mine)
    assert registry.find("methods", "theirs", Method) is FedProx
