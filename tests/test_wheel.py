"""What is installed from a built wheel, without the checkout: commands, a run, its page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpers.config import Config, dump_config

ROOT = Path(__file__).parents[1]
# One process for all of it, since it reads torch and compiles what has just been unpacked.
EVERYTHING = """
import importlib, json, pkgutil, runpy, sys
place, *commands = sys.argv[1:]
import fedpers
for one in pkgutil.walk_packages(fedpers.__path__, "fedpers."):
    if not one.name.endswith("__main__"):
        importlib.import_module(one.name)
for command in commands:
    sys.argv[1:] = json.loads(command)
    try:
        runpy.run_module("fedpers", run_name="__main__", alter_sys=True)
    except SystemExit as left:
        if left.code:
            sys.exit(f"{command}: exit code {left.code}")
ours = {name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "fedpers"}
elsewhere = [name for name, file in ours.items() if not file.startswith(place)]
sys.exit(f"imported {elsewhere}" if elsewhere else "ray is imported" if "ray" in sys.modules else 0)
"""
COMMANDS = (["--help"], ["methods"], ["run", "tiny.yaml", "--out", "run"], ["report", "run"])


@pytest.mark.slow
def test_a_built_wheel_is_whole(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """All modules come from it, none brings ray along, and a run and its page need nothing else of the checkout."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--disable-pip-version-check", "-w", tmp_path]
    subprocess.run([*pip, ROOT], check=True)
    (wheel,) = tmp_path.glob("fedpers-*.whl")
    place, source = tmp_path / "installed", ROOT / "src"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    wanted = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    held = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert wanted <= held
    assert {name.split("/")[0].split("-")[0] for name in held} == {"fedpers"}, "no tests, no configurations"

    (tmp_path / "tiny.yaml").write_text(dump_config(tiny(method="fedper", rounds=1)), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(place)}  # before the checkout, which is installed editable
    program = [sys.executable, "-P", "-c", EVERYTHING, str(place), *map(json.dumps, COMMANDS)]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "personalize" in done.stdout
    assert "fedavg-finetune" in done.stdout
    assert "<script" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
