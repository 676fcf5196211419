"""Flower for real: a SuperLink with SuperNodes, and Ray, give what the cohort grid gives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config
from fedpers.privacy.claim import Claim
from fedpers.privacy.ledger import Ledger
from fedpers.run_directory import RunDirectory
from test_node import OPEN, RECORD, Arrays, Make, World, in_cohort, world

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
serverapp = "fedpers.flower.server_app:app"
clientapp = "handed_over:app"
[tool.flwr.app.config]
config = ""
out = ""
people = ""
patience = 60.0
timeout = 60.0
"""


def deploy(here: World, out: Path, *arguments: object) -> tuple[Arrays, Ledger, Claim]:
    """Run the script in a process of its own; returns what its server ends with."""
    script = ROOT / "experiments" / "deployment" / "run.py"
    command = [sys.executable, script, here.path, "--out", out, "--timeout", 900, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
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
def test_supernodes_give_what_the_cohort_grid_gives(world: Make, tmp_path: Path) -> None:
    """TLS and authentication are on, and the app that the server hands over is left shut."""
    here = world(OPEN, shared=True, method="fedbabu", privacy=RECORD, client_rate=0.6)
    app = tmp_path / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(APP, encoding="utf-8")
    trace = tmp_path / "opened"
    (app / "handed_over.py").write_text(f"open({str(trace)!r}, 'w').close()\napp = None\n", encoding="utf-8")
    (tmp_path / "limits.yaml").write_text("unprotected: true\n", encoding="utf-8")
    out = tmp_path / "out"
    found = deploy(here, out, "--limits", tmp_path / "limits.yaml", "--app", app)
    assert_same(found, in_cohort(here))
    assert not trace.exists()
    for place in range(3):
        state = out / "nodes" / f"node{place:04d}" / "state"
        asked = [line.round for line in found[1].releases if place in (line.clients or ())]
        answered = [line.round for line in Ledger.load(state / "ledger.jsonl").releases] if state.exists() else []
        assert answered == asked


@pytest.mark.slow
def test_ray_gives_what_the_cohort_grid_gives(world: Make, tmp_path: Path) -> None:
    here = world(OPEN, shared=True, method="fedper", client_rate=0.6)
    assert_same(deploy(here, tmp_path / "out", "--ray"), in_cohort(here))


def test_the_core_never_imports_ray(tiny: Callable[..., Config]) -> None:
    modules = "fedpers.simulation, fedpers.flower.server_app, fedpers.flower.node_app, fedpers.flower.node"
    told = f"import sys, {modules}; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", told], check=True)


def test_who_a_node_acts_for_is_answered_without_torch() -> None:
    """On a user's machine each message is a process of its own."""
    told = "import sys, fedpers.flower.node_app, fedpers.flower.node_file; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", told], check=True)
