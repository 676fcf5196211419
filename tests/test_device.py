"""A model elsewhere than on the CPU: the same code, the same numbers, and nothing on the wrong side.

A machine need not have a second device: tests/elsewhere.py makes one up, whose tensors do not mix with the CPU's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file

from conftest import SECRET, save_random_tiny_llama
from fedpers.config import Config, dump_config
from fedpers.errors import ConfigError
from fedpers.experiment import build_model, prepare
from fedpers.finished_run import Which, open_run
from fedpers.identity import identity
from fedpers.models.assets import cache_dir
from fedpers.reporting import Reporter
from fedpers.simulation import Run, simulate
from fedpers.try_model import generate

RECORD = {"unit": "record", "epsilon": 8, "delta": 1e-3, "clip": 0.5, "secret": SECRET}
USER = {"unit": "user", "epsilon": 8, "delta": 1e-3, "clip": 0.5, "secret": SECRET}
LLAMA = {"adapter": {"layers": 1, "rank": 2, "alpha": 4, "targets": ["q_proj"]}}
# A method for each road that numbers take: plain sums and clipped ones, layer norms, gates and what they read, clusters
# chosen by losses, a method's own gradients, bounds, inner steps, losses over a vocabulary.
CASES: dict[str, dict[str, Any]] = {
    "fedavg-finetune": {"privacy": RECORD},
    "fedbn": {},
    "feddpa": {"privacy": USER},
    "ifca": {},
    "scaffold": {"privacy": USER, "rounds": 2},  # the first has nothing to correct
    "fedala": {},
    "per-fedavg": {"privacy": RECORD},
    "language-model": {"method": "fedavg-finetune", "task": {"name": "language-model"}, "privacy": RECORD},
}
MIXED = """
import torch, elsewhere

elsewhere.register()
with elsewhere.Dispatch():
    there = torch.ones(2, device="toy")
    assert (there + torch.ones(2).to("toy")).cpu().tolist() == [2, 2]
    try:
        there + torch.ones(2)
    except RuntimeError as error:
        assert "expected all tensors to be on the same device" in str(error)
        print("add")
    try:
        there.numpy()
    except RuntimeError:
        print("numpy")
"""


def elsewhere(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python where the made-up device can be imported."""
    folder = str(Path(__file__).parent)
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": folder}
    )


def files(run: Path) -> dict[str, NDArray[np.float32]]:
    """Return all arrays of a run: shared, kept during the rounds, and final."""
    found = {str(file.relative_to(run)): np.load(file) for file in sorted(run.glob("private/**/*.npy"))}
    return found | load_file(run / "private" / "checkpoint.safetensors")


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ledger without what hangs on the last bits of what was released."""
    found = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in {"hash", "previous", "release_hash"}} for line in found]


def test_runs_elsewhere_are_those_on_the_cpu(tiny: Callable[..., Config], tmp_path: Path) -> None:
    llama = save_random_tiny_llama(tmp_path / "llama")
    here: dict[str, Run] = {}
    arguments: list[object] = []
    for name, changes in CASES.items():
        if name == "language-model":
            changes = changes | {"model": LLAMA | {"backbone": str(llama)}}
        config = tiny(**{"method": name, "rounds": 1, "data": {"users": 4}, **changes})
        here[name] = simulate(config, tmp_path / "here" / name)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(dump_config(config)) | {"privacy": config.privacy.model_dump()}))
        arguments += [file, tmp_path / "there" / name]
    kept = set(cache_dir().glob("features/*"))
    done = elsewhere("-m", "elsewhere", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    for name, run in here.items():
        there = tmp_path / "there" / name
        assert told[str(there)].keys() == {"toy"}, name  # no product was made on the CPU
        assert lines(there) == lines(run.path), name
        arrays = files(run.path)
        assert len(arrays) > 1, name
        for array, value in files(there).items():
            np.testing.assert_allclose(value, arrays[array], rtol=1e-4, atol=1e-5, err_msg=f"{name} {array}")
        mine, theirs = (pq.read_table(path / "users.parquet").to_pydict() for path in (run.path, there))
        for column, values in mine.items():
            if isinstance(values[0], float):
                np.testing.assert_allclose(theirs[column], values, rtol=1e-4, atol=1e-4, err_msg=f"{name} {column}")
            else:
                assert theirs[column] == values, (name, column)
    assert len(set(cache_dir().glob("features/*")) - kept) >= 3  # what the CPU has computed is not read elsewhere
    assert "sensitivity of one record" in told["probe"]
    assert set(told["probe"].values()) == {"consistent"}
    assert told["text"] == generate(here["language-model"].path, "one two three", Which(shared=True), tokens=4)


def test_the_made_up_device_refuses_what_a_real_one_does() -> None:
    done = elsewhere("-c", MIXED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["add", "numpy"]


@pytest.mark.parametrize("device", ["cuda:7", "nowhere", "meta"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_device_that_is_not_there_is_named_before_anything_is_begun(
    tiny: Callable[..., Config], tmp_path: Path, device: str, precision: str
) -> None:
    with pytest.raises(ConfigError, match=f"engine.device={device}: .* set engine.device=cpu"):
        simulate(tiny(engine={"device": device, "precision": precision}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_device_marks_what_a_secret_was_used_for(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny(privacy=RECORD)
    moved = config.model_copy(update={"engine": config.engine.model_copy(update={"device": "cuda"})})
    experiment = prepare(config)
    model = build_model(experiment, Reporter())
    assert identity(experiment, model) != identity(replace(experiment, config=moved), model)


def test_a_finished_run_from_a_device_that_is_not_here_says_where_to_change_it(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    run = simulate(tiny(rounds=1, evaluation={"local_only": False}), tmp_path / "run")
    stored = run.path / "config.yaml"
    stored.write_text(stored.read_text().replace("device: cpu", "device: cuda:7"))
    with pytest.raises(ConfigError, match=r"config\.yaml: engine\.device=cuda:7: .* set engine\.device=cpu"):
        open_run(run.path)
