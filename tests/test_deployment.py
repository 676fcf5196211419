"""Flower for real: a SuperLink with SuperNodes, and Ray, give what the cohort grid gives."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpers.cohort.personal_store import PersonalStore
from fedpers.privacy.claim import Claim
from fedpers.privacy.ledger import Ledger
from fedpers.run_directory import RunDirectory
from test_node import OPEN, RECORD, SMALL, Arrays, Make, World, in_cohort, world

__all__ = ["world"]  # the fixture
ROOT = Path(__file__).parents[1]
# What a server hands to nodes: an app of its own, which must not be run where a node has pinned another.
APP = """
[project]
name = "handed-over"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "somebody"
[tool.flwr.app.components]
serverapp = "quick:app"
clientapp = "handed_over:app"
[tool.flwr.app.config]
config = ""
out = ""
people = ""
patience = 60.0
timeout = 60.0
"""
# The server's app, but that it looks for replies at once: Flower's grid does every three seconds.
QUICK = """
import time
from types import SimpleNamespace
from flwr.superlink.grid import http_grid
from fedpers.flower import server_app
http_grid.time = SimpleNamespace(time=time.time, sleep=lambda seconds: time.sleep(0.1))
app = server_app.app
"""
# Two people, of whom one may be left out of a round: each message to a node is a process that imports torch.
TWO: dict[str, Any] = {"data": {**SMALL["data"], "users": 2}, "client_rate": 0.75}


def deployment() -> ModuleType:
    """Import the script."""
    spec = importlib.util.spec_from_file_location("deployment", ROOT / "experiments" / "deployment" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def app_folder(folder: Path, clients: str = "app = None\n") -> Path:
    """Write what a server hands over, with the text of a module for the nodes."""
    (folder / "app").mkdir()
    for name, text in {"pyproject.toml": APP, "quick.py": QUICK, "handed_over.py": clients}.items():
        (folder / "app" / name).write_text(text, encoding="utf-8")
    return folder / "app"


def deploy(patch: pytest.MonkeyPatch, here: World, out: Path, *arguments: object) -> tuple[Arrays, Ledger, Claim]:
    """Run the script; returns what its server ends with."""
    patch.setattr(sys, "argv", list(map(str, ["run.py", here.path, "--out", out, "--timeout", 900, *arguments])))
    deployment().main()
    checkpoint = RunDirectory(out / "server").recover(PersonalStore(out / "unused", 1, {}))
    assert checkpoint is not None
    assert checkpoint.round == here.config.rounds
    claim = Claim.from_json((out / "server" / "claim.json").read_text(encoding="utf-8"))
    return checkpoint.shared, Ledger.load(out / "server" / "ledger.jsonl"), claim


def assert_same(found: tuple[Arrays, Ledger, Claim], expected: tuple[Arrays, Ledger]) -> None:
    """The same people in each round, the same shared arrays; and no claim, where the secret was shared."""
    (shared, ledger, claim), (arrays, one) = found, expected
    assert [line.clients for line in ledger.releases] == [line.clients for line in one.releases]
    assert set(shared) == set(arrays)
    distance = max(_distance(shared[name], array) for name, array in arrays.items())
    assert distance < 1e-5
    assert claim.epsilon == np.inf


def _distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.slow
def test_supernodes_give_what_the_cohort_grid_gives(
    world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS and authentication are on, and the app that the server hands over is left shut."""
    here = world(OPEN, shared=True, method="fedbabu", privacy=RECORD, **TWO)
    trace = tmp_path / "opened"
    app = app_folder(tmp_path, f"open({str(trace)!r}, 'w').close()\napp = None\n")
    (tmp_path / "limits.yaml").write_text("unprotected: true\n", encoding="utf-8")
    out = tmp_path / "out"
    found = deploy(monkeypatch, here, out, "--limits", tmp_path / "limits.yaml", "--app", app)
    assert_same(found, in_cohort(here))
    assert not trace.exists()
    for place in range(2):
        state = out / "nodes" / f"node{place:04d}" / "state"
        asked = [line.round for line in found[1].releases if place in (line.clients or ())]
        answered = [line.round for line in Ledger.load(state / "ledger.jsonl").releases] if state.exists() else []
        assert answered == asked


@pytest.mark.slow
def test_ray_gives_what_the_cohort_grid_gives(world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The app is fedpers' own, in a folder by itself: `flwr` takes longer to look through a checkout than to run."""
    here, app = world(OPEN, shared=True, method="fedper", **TWO), tmp_path / "app"
    app.mkdir()
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, app)
    assert_same(deploy(monkeypatch, here, tmp_path / "out", "--ray", "--app", app), in_cohort(here))


def test_who_a_node_acts_for_is_answered_without_torch() -> None:
    """On a user's machine each message is a process of its own."""
    told = "import sys, fedpers.flower.node_app, fedpers.flower.node_file; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", told], check=True)
