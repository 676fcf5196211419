"""Method files that slip: what would make a claim false is refused or has no effect, whoever wrote the file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import fedpers
from conftest import SECRET
from fedpers import registry
from fedpers.cohort.clients import Clients
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config
from fedpers.errors import ConfigError, PrivacyRefusal
from fedpers.experiment import Reuse, build_model, method_plan, prepare
from fedpers.identity import identity
from fedpers.methods import SHARED, Method, Phase, Visit
from fedpers.privacy.randomness import secret_key
from fedpers.reporting import Reporter
from fedpers.simulation import simulate
from fedpers.visit import mean

Tiny = Callable[..., Config]
USER = {"unit": "user", "epsilon": 8, "delta": 1e-3, "clip": 0.1, "secret": SECRET}
RECORD = {"unit": "record", "epsilon": 8, "delta": 1e-3, "clip": 0.1, "secret": SECRET}
TABLE: dict[str, Any] = {"scopes": {"adapter": SHARED, "head": SHARED}, "round": (Phase("adapter", "head"),)}


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered here is not for other tests."""
    monkeypatch.setattr(registry, "_registered", {})


def offer(name: str, **parts: Any) -> str:
    """Register a method made of the plain table and some parts."""
    fedpers.register(name, type(name, (Method,), {**TABLE, "__module__": __name__, **parts}))
    return name


def scaled_by_everyone(cls: type[Method], visit: Visit) -> None:
    for name in visit.shared:
        step = visit.local[name] - visit.received[name]
        visit.local[name] = visit.received[name] + step / step.norm()


def scaled_by_oneself(cls: type[Method], visit: Visit) -> None:
    for name in visit.shared:
        step = visit.local[name] - visit.received[name]
        visit.local[name] = visit.received[name] + step / step.norm(dim=(1, 2), keepdim=True).clamp(min=1e-9)


def corrected_by_everyone(cls: type[Method], visit: Visit, name: str, weights: Any, gradient: Any) -> Any:
    return gradient - gradient.mean(dim=0, keepdim=True)


@pytest.mark.parametrize("privacy", [USER, RECORD])
@pytest.mark.parametrize(
    ("which", "function"),
    [("end", scaled_by_everyone), ("begin", scaled_by_everyone), ("gradient", corrected_by_everyone)],
)
def test_a_function_that_mixes_clients_is_refused(
    tiny: Tiny, privacy: dict[str, Any], which: str, function: Any
) -> None:
    name = offer("mixes", **{which: classmethod(function)})
    experiment = prepare(tiny(method=name, privacy=privacy))
    with pytest.raises(PrivacyRefusal, match=f"method 'mixes': {which} of one client changes with the others"):
        build_model(experiment, Reporter())
    build_model(prepare(tiny(method=name)), Reporter())  # nothing is claimed


def test_a_function_along_the_other_axes_is_allowed(tiny: Tiny) -> None:
    name = offer("scales", end=classmethod(scaled_by_oneself))
    build_model(prepare(tiny(method=name, privacy=USER)), Reporter())


def half_way(cls: type[Method], visit: Visit) -> None:
    visit.local.update({name: 0.5 * visit.local[name] for name in visit.shared})


@pytest.mark.parametrize(("privacy", "still"), [({}, True), (USER, True), (RECORD, False)])
def test_a_user_without_records_sends_what_came(
    tiny: Tiny, tmp_path: Path, privacy: dict[str, Any], still: bool
) -> None:
    """Else taking a user's records away would move a sum by two clips, while one is accounted for. Under record-level
    noise such a user sends noise like the others: it must not be told who has nothing."""
    experiment = prepare(tiny(method=offer("decays", end=classmethod(half_way)), privacy=privacy))
    model = build_model(experiment, Reporter())
    store = PersonalStore(tmp_path / "personal", 8, {})
    clients = Clients(experiment.config, experiment.plan, experiment.guarantee, model, store, secret_key(SECRET))
    train = list(experiment.examples.train)
    train[3] = train[3][:0]
    clients.examples = replace(experiment.examples, train=tuple(train))
    start = {name: value + 1.0 for name, value in clients.layout.broadcast().items()}
    replies = clients.train_round(1, range(8), start)
    for name, value in start.items():
        assert np.array_equal(replies[name][3], value) == still
        assert not np.array_equal(replies[name][4], value)


def test_turns_of_different_lengths_are_paid_for_where_they_meet(tiny: Tiny) -> None:
    turns = (Phase("B", "head", turn=(1, 2)), Phase("A", turn=(0, 3)))
    name = offer("meets", scopes={"adapter": SHARED, "head": SHARED}, round=turns)
    plan = method_plan(name, tiny(method=name))
    assert plan.turns == 6
    assert plan.sent(3) == ("A", "B", "head")
    one = prepare(tiny(method="rolora", privacy=RECORD)).guarantee.phase_steps[0]
    assert prepare(tiny(method=name, privacy=RECORD)).guarantee.phase_steps[0] == 2 * one


def test_pooled_records_cannot_be_claimed_about() -> None:
    with pytest.raises(ConfigError, match="method pools: pooled gives one trainer everybody's records"):
        offer("pools", pooled=True)


FILE = """from fedpers.methods import SHARED, Method, Phase


def turned(value):
    return {sign}value


class Turned(Method):
    scopes = {{"adapter": SHARED, "head": SHARED}}
    round = (Phase("adapter", "head"),)

    @classmethod
    def end(cls, visit):
        for name in visit.shared:
            visit.local[name] = visit.received[name] + turned(visit.local[name] - visit.received[name])
"""


def load(path: Path, text: str) -> ModuleType:
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_another_text_of_the_file_means_other_noise(tiny: Tiny, tmp_path: Path) -> None:
    """Two releases with one noise would show their difference, so what a method's functions call counts, too."""
    found = []
    for number, sign in enumerate(("+", "-", "+")):
        path = tmp_path / f"turned_{'other' if sign == '-' else 'one'}.py"
        name = f"turned-{number}"
        fedpers.register(name, load(path, FILE.format(sign=sign)).Turned)
        experiment = prepare(tiny(method=name, privacy=USER))
        found.append(identity(experiment, build_model(experiment, Reporter())).replace(name, ""))
    assert found[0] == found[2] != found[1]


def test_a_given_secret_needs_a_file(tiny: Tiny) -> None:
    module = ModuleType("of_a_notebook")  # as in a notebook: nothing says how the class came about
    sys.modules["of_a_notebook"] = module
    name = offer("of-a-notebook", __module__="of_a_notebook")
    with pytest.raises(PrivacyRefusal, match="no file defines it"):
        build_model(prepare(tiny(method=name, privacy=USER)), Reporter(), Reuse())
    build_model(prepare(tiny(method=name, privacy={**USER, "secret": None})), Reporter(), Reuse())
    assert torch.is_tensor(build_model(prepare(tiny(method=name)), Reporter()).initial["head.direction.weight"])


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda arrays: None, r"returned NoneType; it must return arrays by name, such as mean\(replies\)"),
    "another name": (
        lambda arrays: {**arrays, "heads": next(iter(arrays.values()))},
        "returned 'heads', which does not tra",
    ),
    "another shape": (
        lambda arrays: {name: value.T[:1] for name, value in arrays.items()},
        r"returned '.*' of shape \(.*; expected \(",
    ),
    "no arrays": (lambda arrays: dict.fromkeys(arrays, 0.0), r"returned '.*' of shape \(\); expected \("),
}


@pytest.mark.parametrize("function", ["combine", "serve"])
@pytest.mark.parametrize("case", WRONG)
def test_what_a_server_function_returns_is_checked(tiny: Tiny, tmp_path: Path, function: str, case: str) -> None:
    make, says = WRONG[case]

    def served(cls: type[Method], arrays: Any, service: Any) -> Any:
        return make(mean(arrays) if function == "combine" else arrays)

    name = offer("slipped", **{function: classmethod(served)})
    with pytest.raises(ConfigError, match=f"method 'slipped': {function} {says}"):
        simulate(tiny(method=name, rounds=1, data={"users": 3}), tmp_path / "run")
