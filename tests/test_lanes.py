"""Lanes: with two threads a run gives what it gives with one, and nobody gets more than the clip allows."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SECRET, Command
from fedpers.audit.probe import probe as audit
from fedpers.cohort import lanes
from fedpers.cohort.batching import ALIKE, SMALL_PASS, microbatches
from fedpers.cohort.gradients import Gradients
from fedpers.cohort.lanes import Lanes, passes
from fedpers.cohort.model import CohortModel
from fedpers.config import Config, dump_config
from fedpers.experiment import build_model, prepare
from fedpers.privacy.ledger import Ledger
from fedpers.reporting import Reporter
from fedpers.simulation import Run, simulate
from flip import flip

RECORD = {"unit": "record", "epsilon": 4, "delta": 1e-4, "clip": 0.05}
TWO = {"engine": {"threads": 2}}


@pytest.fixture
def shared_out(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Share even the smallest work out; returns the names of the lanes that gradients were made in."""
    seen: set[str] = set()
    run = Gradients._run

    def watched(self: Gradients, *args: Any) -> float:
        if threading.current_thread() is not threading.main_thread():
            seen.add(threading.current_thread().name)
        return run(self, *args)

    monkeypatch.setattr(lanes, "LEAST_WORK", 0.0)
    monkeypatch.setattr(lanes, "LEAST_TOKENS", 16)
    monkeypatch.setattr(Gradients, "_run", watched)
    return seen


@given(
    st.lists(st.integers(1, 300), max_size=120).map(lambda found: np.array(found, dtype=np.int64)),
    st.integers(512, 3000),
)
@settings(max_examples=200, deadline=None)
def test_passes_keep_to_the_budget_and_pad_no_more_than_another_pass_costs(lengths: Any, budget: int) -> None:
    parts = list(microbatches(lengths, budget))
    assert sorted(place for part in parts for place in part.tolist()) == list(range(len(lengths)))
    assert list(np.concatenate([lengths[part] for part in parts] or [lengths])) == sorted(lengths, reverse=True)
    for number, part in enumerate(parts):
        longest, shortest = int(lengths[part].max()), int(lengths[part].min())
        tokens = len(part) * longest
        assert tokens <= budget or len(part) == 1
        if tokens - longest >= SMALL_PASS:  # it would be worth its while without the last one
            assert shortest >= ALIKE * longest
        if number + 1 < len(parts):
            assert tokens >= SMALL_PASS or tokens + longest > budget


@given(
    st.lists(st.integers(1, 60), max_size=80).map(lambda found: np.array(found, dtype=np.int64)),
    st.integers(60, 400),
    st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_passes_hold_each_record_once_and_fill_lanes_alike(lengths: Any, budget: int, count: int) -> None:
    shared = passes(lengths, budget, count)
    flat = [int(place) for lane in shared for part in lane for place in part]
    assert sorted(flat) == list(range(len(lengths)))
    sizes = [[len(part) * int(lengths[part].max()) for part in lane] for lane in shared]
    assert all(size <= budget for lane in sizes for size in lane)
    if shared:
        loads = [sum(lane) for lane in sizes] + [0] * (count - len(sizes))
        assert max(loads) - min(loads) <= max(size for lane in sizes for size in lane)


CASES: dict[str, dict[str, Any]] = {
    "records": {"privacy": RECORD},
    "records, each array clipped by itself": {"privacy": {**RECORD, "clipping": "per-layer"}},
    "users": {"privacy": {"unit": "user", "epsilon": 4, "delta": 1e-4, "clip": 0.05}},
    "personal": {"method": "fedrep", "privacy": {"unit": "none"}},
    "a gate": {"method": "feddpa", "privacy": {"unit": "none"}},
    "control variates": {"method": "scaffold", "privacy": {"unit": "none"}},
    "inner steps": {"method": "per-fedavg", "privacy": RECORD},
}


def run(tiny: Callable[..., Config], out: Path, threads: int, **changes: Any) -> Run:
    engine = {**changes.pop("engine", {}), "threads": threads}
    evaluation = {"every": 0, **changes.pop("evaluation", {})}  # measured at the end alone
    return simulate(tiny(engine=engine, evaluation=evaluation, **changes), out)


@pytest.mark.parametrize("name", CASES)
def test_two_lanes_give_what_one_gives(
    tiny: Callable[..., Config], tmp_path: Path, shared_out: set[str], name: str
) -> None:
    one = run(tiny, tmp_path / "one", 1, **CASES[name])
    assert not shared_out
    two = run(tiny, tmp_path / "two", 2, **CASES[name])
    assert len(shared_out) == 2
    for array, value in one.shared.items():
        np.testing.assert_allclose(two.shared[array], value, atol=1e-5, err_msg=array)
    for column in ("loss", "accuracy"):
        ours, theirs = (found.users[column].to_numpy() for found in (one, two))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert one.claim.label() == two.claim.label()


@pytest.mark.parametrize("changes", [{"privacy": RECORD}, {"method": "fedper", "privacy": {"unit": "none"}}], ids=str)
def test_all_that_makes_it_fast_gives_what_the_plain_road_gives(
    tiny: Callable[..., Config], tmp_path: Path, shared_out: set[str], changes: dict[str, Any]
) -> None:
    """One client after the other in one thread, against everybody mixed in two, tuned; records are made on demand."""
    lazy = {"data": {"users": 12, "lazy": True}, "evaluation": {"users": 6}}
    plain = run(tiny, tmp_path / "plain", 1, engine={"cohort_size": 1}, **lazy, **changes)
    engine = {"cohort_size": 64, "token_budget": 2048, "tune": True}
    fast = run(tiny, tmp_path / "fast", 2, engine=engine, **lazy, **changes)
    keys = [Ledger.load(one.path / "ledger.jsonl").opening.key for one in (plain, fast)]
    assert keys[0] == keys[1]
    for array, value in plain.shared.items():
        np.testing.assert_allclose(fast.shared[array], value, atol=1e-4, err_msg=array)
    np.testing.assert_allclose(fast.users["loss"].to_numpy(), plain.users["loss"].to_numpy(), atol=1e-4)
    assert len(shared_out) >= 2


def test_of_a_language_model_too(
    tiny: Callable[..., Config], tiny_llama: Path, tmp_path: Path, shared_out: set[str]
) -> None:
    model = {"backbone": str(tiny_llama), "adapter": {"layers": 2, "targets": ("q_proj", "v_proj")}}
    changes = {"task": {"name": "language-model"}, "model": model, "privacy": RECORD}
    one, two = (run(tiny, tmp_path / str(threads), threads, **changes) for threads in (1, 2))
    for array, value in one.shared.items():
        np.testing.assert_allclose(two.shared[array], value, atol=1e-5, err_msg=array)
    np.testing.assert_allclose(one.users["loss"].to_numpy(), two.users["loss"].to_numpy(), rtol=1e-4)
    assert len(shared_out) >= 2


def test_the_same_lanes_give_the_same_bytes(tiny: Callable[..., Config], tmp_path: Path, shared_out: set[str]) -> None:
    first, again = (run(tiny, tmp_path / name, 2, privacy=RECORD) for name in ("first", "again"))
    for array, value in first.shared.items():
        assert value.tobytes() == again.shared[array].tobytes()
    assert first.users.equals(again.users)
    assert len(shared_out) >= 2


def test_a_copy_has_weights_of_its_own_and_shares_what_is_frozen(tiny: Callable[..., Config]) -> None:
    model = build_model(prepare(tiny(**TWO)), Reporter())
    twin = model.twin()
    owned = {id(layer.weight) for layer in model.layers.values()}
    ours = {name: value.data_ptr() for name, value in model.named_parameters() if id(value) not in owned}
    theirs = dict(twin.named_parameters())
    assert ours
    assert all(theirs[name].data_ptr() == place for name, place in ours.items())
    assert all(twin.layers[name].weight is not layer.weight for name, layer in model.layers.items())
    assert twin.prefix is model.prefix
    assert twin.candidates is model.candidates


def test_what_goes_wrong_in_a_lane_is_raised(
    tiny: Callable[..., Config], tmp_path: Path, shared_out: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = CohortModel.losses

    def failing(self: CohortModel, *args: Any) -> torch.Tensor:
        if threading.current_thread().name.endswith("_1"):
            raise FloatingPointError("lane 1 broke")
        return losses(self, *args)

    monkeypatch.setattr(CohortModel, "losses", failing)
    with pytest.raises(FloatingPointError, match="lane 1 broke"):
        run(tiny, tmp_path / "run", 2, privacy={"unit": "none"})


def test_each_keeps_the_order_and_uses_every_model() -> None:
    def slow_first(model: list[int], item: int) -> int:
        model.append(item)
        if item == 0:
            while sum(map(len, crew.models)) < 3:  # until another lane has gone ahead
                pass
        return item * item

    crew: Lanes[list[int]] = Lanes([], lambda _: [], 2)
    assert list(crew.each(slow_first, range(5), 1e12)) == [0, 1, 4, 9, 16]
    assert all(crew.models)
    assert list(Lanes([], lambda _: pytest.fail("a copy"), 2).each(lambda _, item: item, [1, 2], 1.0)) == [1, 2]


def probe(fedpers: Command, path: Path, out: Path) -> tuple[int, dict[str, str]]:
    code, _, _ = fedpers("audit", path, "--probe", "--quiet", "--out", out)
    found: dict[str, str] = {}
    for finding in json.loads((out / "audit.json").read_text())["findings"]:
        if found.get(finding["name"]) != "violation":
            found[finding["name"]] = finding["verdict"]
    return code, found


WRONG = {
    "sums that stay in a copy": (
        "fedpers.cohort.optimizer",
        "                theirs.summed_grad = None",
        "                pass",
        "sums of the next step",
    ),
    "sums of a copy that count twice": (
        "fedpers.cohort.optimizer",
        "mine.summed_grad = theirs.summed_grad + (",
        "mine.summed_grad = 2 * theirs.summed_grad + (",
        "sensitivity of one record",
    ),
    "records that are never clipped in a copy": (
        "fedpers.cohort.gradients",
        "                max_grad_norm=given.clip,",
        "                max_grad_norm=given.clip if model is self._lanes[0] else 1e9,",
        "sensitivity of one record",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "engine", [{"precision": "bf16"}, {"prefix": "fp16"}, {"threads": 2, "cohort_size": 64}], ids=str
)
@pytest.mark.parametrize("unit", ["record", "user"])
def test_the_probe_holds_with_each_optimization(
    tiny: Callable[..., Config], shared_out: set[str], engine: dict[str, Any], unit: str
) -> None:
    found = audit(tiny(privacy={**RECORD, "unit": unit}, engine=engine, local={"batch_size": 8}, rounds=3))
    assert {f"sensitivity of one {unit}", "noise", "fresh noise", "accounting"} <= {one.name for one in found}
    assert {one.verdict for one in found} == {"consistent"}


@pytest.mark.parametrize("name", ["honest", *WRONG])
def test_the_probe_holds_with_two_lanes_and_finds_a_wrong_line(
    fedpers: Command, tiny: Callable[..., Config], tmp_path: Path, shared_out: set[str],
    monkeypatch: pytest.MonkeyPatch, name: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    quick = {"evaluation": {"every": 0, "local_only": False}, "rounds": 3}
    config = tiny(privacy=RECORD, local={"batch_size": 8}, engine={"threads": 2}, **quick)
    Path("lanes.yaml").write_text(dump_config(config).replace("privacy:\n", f"privacy:\n  secret: {SECRET}\n"))
    if name != "honest":
        module, line, instead, _ = WRONG[name]
        flip(monkeypatch, importlib.import_module(module), line, instead)
    assert fedpers("run", "lanes.yaml", "--quiet", "--out", "run")[0] == 0
    code, found = probe(fedpers, Path("lanes.yaml"), Path("audit"))
    assert len(shared_out) == 2
    if name == "honest":
        assert code == 0
        assert set(found.values()) == {"consistent"}
        return
    assert code == 1
    assert found[WRONG[name][-1]] == "violation"
