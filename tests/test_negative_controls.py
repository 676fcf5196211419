"""One line of the program is wrong, `fedpers run` prints its claim as ever, and the audit must find it.

Each control changes one line of the production path (see flip.py). The same configurations without the change are found
to be consistent, so what is found is the change.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import SECRET, Command
from fedpers.config import Config, dump_config
from fedpers.flower import messages as wire
from fedpers.flower.aggregation import serve
from fedpers.privacy import refusals
from flip import flip

USER = {"unit": "user", "epsilon": 4, "delta": 1e-4, "clip": 0.05}
RECORD = {"unit": "record", "epsilon": 4, "delta": 1e-4, "clip": 0.05}
BIG_STEPS = {"batch_size": 4, "lr": {"adapter": 0.5, "head": 0.5}}  # updates longer than the clip


def noise_last(strategy: Any, number: int, listed: list[Any]) -> tuple[Any, Any]:
    """Hand the clean mean to the server's optimizer and put the noise on what comes out: DP-FedAdam done wrong."""
    server = strategy._server()
    scale = server.noise_multiplier * server.clip / strategy.guarantee.denominator
    noise = {name: scale * one for name, one in server.noise(number).items()}
    record = listed[0].content[wire.ARRAYS]
    clean = {name: (a - noise[name]).astype(np.float32) for name, a in wire.from_record(record).items()}
    listed[0].content[wire.ARRAYS] = wire.to_record(clean, sorted(clean))
    arrays, metrics = strategy.inner.aggregate_train(number, listed)
    moved = {name: (a + noise[name]).astype(np.float32) for name, a in wire.from_record(arrays).items()}
    return wire.to_record(moved, sorted(moved)), metrics


def clip_without_companions(clip: Callable[..., Any]) -> Callable[..., Any]:
    """Clip what was trained by itself, and let its companions through."""

    def clipped(update: dict[str, Any], bound: float, per_layer: bool) -> tuple[dict[str, Any], float, bool]:
        trained = {name: array for name, array in update.items() if not name.startswith("control.")}
        kept, norm, longer = clip(trained, bound, per_layer)
        return {name: kept.get(name, array) for name, array in update.items()}, norm, longer

    return clipped


def served_clean(strategy: Any, number: int, mean: dict[str, Any]) -> dict[str, Any]:
    """Let the method's server function see the clean mean, and put the noise on what comes out."""
    server = strategy._server()
    scale = server.noise_multiplier * server.clip / strategy.guarantee.denominator
    noise = {name: scale * one for name, one in server.noise(number).items()}
    clean = {name: strategy._broadcast[name] + (one - noise[name]) for name, one in mean.items()}
    arrays = serve(strategy.layout, {**strategy._broadcast, **clean}, strategy._broadcast, number)
    return {name: (array + noise.get(name, 0.0)).astype(np.float32) for name, array in arrays.items()}


def by_those_who_chose(total: dict[str, Any], updates: list[Any], denominator: float) -> dict[str, float]:
    """How many clients moved each array: the size of its cluster."""
    return {name: max(1, sum(bool(one[name].any()) for one in updates)) for name in total}


@dataclass(frozen=True)
class Control:
    """What is changed, where, in which setup, and which check must find it."""

    module: str
    line: str
    instead: str
    found_by: str
    setup: dict[str, Any] = field(default_factory=dict)
    helpers: dict[str, Any] = field(default_factory=dict)
    hook: str | None = None  # a refusal that would stop the run first, switched off
    refused: bool = False  # `fedpers run` itself does not get past it


CONTROLS = {
    "noise off, user": Control(
        "fedpers.privacy.mechanisms",
        "added = {name: noise_multiplier * clip * noise[name] for name in total}",
        "added = {name: 0.0 * noise[name] for name in total}",
        "noise", {"privacy": USER, "client_rate": 0.5, "local": BIG_STEPS},
    ),
    "noise off, record": Control(
        "fedpers.cohort.optimizer",
        "parameter.grad = parameter.summed_grad + added",
        "parameter.grad = parameter.summed_grad + 0.0 * draw",
        "noise", {"privacy": RECORD},
    ),
    "noise off, user-local": Control(
        "fedpers.cohort.clients",
        "result[name][place] += (clipped[name] + noise[name]).astype(np.float32)",
        "result[name][place] += clipped[name].astype(np.float32)",
        "noise", {"privacy": {**USER, "trust": "user-local"}, "local": BIG_STEPS},
    ),
    "the same noise in two rounds": Control(
        "fedpers.privacy.user_level",
        'return standard_normals(self.shapes, generator(self._key, "user-noise", number))',
        'return standard_normals(self.shapes, generator(self._key, "user-noise", 1))',
        "fresh noise", {"privacy": USER, "client_rate": 0.5, "local": BIG_STEPS},
    ),
    "the same noise for two clients": Control(
        "fedpers.cohort.clients",
        'generator(self._secret, *address, "noise", self.examples.users[user], step).standard_normal(',
        'generator(self._secret, *address, "noise", step).standard_normal(',
        "fresh noise", {"privacy": RECORD},
    ),
    "the same noise in two steps": Control(
        "fedpers.cohort.clients",
        'generator(self._secret, *address, "noise", self.examples.users[user], step).standard_normal(',
        'generator(self._secret, *address, "noise", self.examples.users[user], 0).standard_normal(',
        "fresh noise", {"privacy": RECORD},
    ),
    "a loss that the batch shares": Control(
        "fedpers.tasks.reply_ranking",
        'return functional.cross_entropy(scores, truth, reduction="none")',
        'return functional.cross_entropy(scores, truth, reduction="none") * 30 / len(scores) ** 2',
        "one record, other clients", {"privacy": {**RECORD, "clip": 2.0}},
        hook="fedpers.experiment.check_separate", refused=True,
    ),
    "a noise-free head that feeds the shared part": Control(
        "fedpers.privacy.dataflow",
        'if target.place == "shared":',
        'if target.place == "shared" and False:',
        "sensitivity of one record",
        {"method": "fedrep", "privacy": RECORD, "personal": {"epochs": 4, "batch_size": 2, "l2": 0}},
    ),
    "an accountant that starts again each round": Control(
        "fedpers.privacy.spending",
        "events = tuple(_event(release) for release in releases)",
        "events = tuple(_event(release) for release in releases[-1:])",
        "accounting", {"privacy": USER, "client_rate": 0.5, "local": BIG_STEPS},
    ),
    "an accountant that starts again each round, record": Control(
        "fedpers.privacy.spending",
        "steps[client][event] += getattr(release, half)",
        "steps[client][event] = getattr(release, half)",
        "accounting", {"privacy": RECORD},
    ),
    "weights that differ between users": Control(
        "fedpers.privacy.mechanisms",
        "total[name] += kept[name]",
        "total[name] += kept[name] * len(norms)",
        "sensitivity of one user", {"privacy": USER, "client_rate": 0.5, "local": BIG_STEPS},
    ),
    "the number of records as a client's weight": Control(
        "fedpers.flower.messages",
        "content = RecordDict({ARRAYS: to_record(arrays, allowed), METRICS: MetricRecord({WEIGHT: 1})})",
        "content = RecordDict({ARRAYS: to_record(arrays, allowed), METRICS: MetricRecord({WEIGHT: 7})})",
        "", {"privacy": USER}, refused=True,
    ),
    "clipped to this round's bound, noised for the next": Control(
        "fedpers.privacy.user_level",
        "multiplier = split_noise(multiplier, guarantee.adaptive.bit_noise)",
        "multiplier = split_noise(multiplier, 5.0) * guarantee.adaptive.next_clip(self.clip, 1.0) / self.clip",
        "noise", {"privacy": {**USER, "adaptive": {"bit_noise": 5, "rate": 1.0}}, "client_rate": 0.5},
    ),
    "noise after the server's optimizer": Control(
        "fedpers.flower.strategy",
        "arrays, metrics = self.inner.aggregate_train(number, replies)",
        "arrays, metrics = noise_last(self, number, replies)",
        "one user at the broadcast",
        {"privacy": USER, "client_rate": 0.5, "local": BIG_STEPS, "server": {"strategy": "FedAdam"}},
        {"noise_last": noise_last},
    ),
    "candidates that are other clients' replies": Control(
        "fedpers.tasks.reply_ranking",
        "pool = federation.pool",
        "pool = (*federation.pool, *(PublicText(r.id, r.id, r.target) for own in federation.train for r in own))",
        "one record, other clients", {"privacy": RECORD},
        {"PublicText": importlib.import_module("fedpers.data").PublicText},
    ),
    "more clients asked than credited": Control(
        "fedpers.privacy.sampling",
        "return _hits(generator(key, \"clients\", round_number), rate, len(users))",
        "return _hits(generator(key, \"clients\", round_number), rate * 1.7, len(users))",
        "client sampling", {"privacy": USER, "client_rate": 0.5, "local": BIG_STEPS},
    ),
    "clipping left out": Control(
        "fedpers.privacy.mechanisms",
        "kept, norm, longer = _clip(update, clip, per_layer)",
        "kept, norm, longer = _clip(update, 1e9, per_layer)",
        "sensitivity of one user", {"privacy": USER, "client_rate": 0.5, "local": BIG_STEPS},
    ),
    "companions that are not clipped": Control(
        "fedpers.privacy.mechanisms",
        "kept, norm, longer = _clip(update, clip, per_layer)",
        "kept, norm, longer = clip_without_companions(_clip)(update, clip, per_layer)",
        "sensitivity of one user", {"method": "scaffold", "privacy": USER, "client_rate": 0.5, "local": BIG_STEPS},
        {"clip_without_companions": clip_without_companions},
    ),
    "companions without noise": Control(
        "fedpers.privacy.mechanisms",
        "added = {name: noise_multiplier * clip * noise[name] for name in total}",
        'added = {n: noise_multiplier * clip * noise[n] * (not n.startswith("control.")) for n in total}',
        "noise", {"method": "scaffold", "privacy": USER, "client_rate": 0.5, "local": BIG_STEPS},
    ),
    "the mean over those who chose a model": Control(
        "fedpers.privacy.mechanisms",
        "mean={name: ((total[name] + added[name]) / denominator).astype(np.float32) for name in total},",
        "mean={n: ((total[n] + added[n]) / by_those_who_chose(total, updates, denominator)[n]).astype(np.float32) "
        "for n in total},",
        "sensitivity of one user", {"method": "ifca", "privacy": USER, "client_rate": 0.5, "local": BIG_STEPS},
        {"by_those_who_chose": by_those_who_chose},
    ),
    "noise on the first of the models alone": Control(
        "fedpers.privacy.mechanisms",
        "added = {name: noise_multiplier * clip * noise[name] for name in total}",
        'added = {n: noise_multiplier * clip * noise[n] * n.startswith("cluster0.") for n in total}',
        "noise", {"method": "ifca", "privacy": USER, "client_rate": 0.5, "local": BIG_STEPS},
    ),
    "noise on one factor, user": Control(
        "fedpers.privacy.mechanisms",
        "added = {name: noise_multiplier * clip * noise[name] for name in total}",
        'added = {n: noise_multiplier * clip * noise[n] * (".lora_A." not in n) for n in total}',
        "noise", {"method": "rolora", "privacy": USER, "client_rate": 0.5, "local": BIG_STEPS},
    ),
    "noise on one factor, record": Control(
        "fedpers.cohort.clients",
        "if self.guarantee.unit == \"record\" and not at_home and self.plan.protected(phase):",
        "if self.guarantee.unit == \"record\" and not at_home and \"B\" in phase.train:",
        "sensitivity of one record", {"method": "rolora", "privacy": RECORD},
    ),
    "the server's function before the noise": Control(
        "fedpers.flower.strategy",
        "return self._reply({**self._broadcast, **moved})",
        "return self._reply(served_clean(self, number, found.mean))",
        "one user at the broadcast", {"method": "fedsvd", "privacy": USER, "client_rate": 0.5, "local": BIG_STEPS},
        {"served_clean": served_clean},
    ),
    "an own adapter that is read when the shared one is trained": Control(
        "fedpers.cohort.rules",
        "still = {name: model.initial[name] for name in model.names(phase.without)}",
        "still = {GATE: model.initial[GATE] + 0.5} if phase.without else {}",
        "sensitivity of one record",
        {"method": "feddpa", "privacy": RECORD, "personal": {"epochs": 4, "batch_size": 2, "l2": 0}},
    ),
    "two noised steps for the price of one": Control(
        "fedpers.privacy.guarantee",
        "counts = {half: sum(2 if p.inner else 1 for p in noised if plan.half(p) == half) for half in HALVES}",
        "counts = {half: sum(1 for p in noised if plan.half(p) == half) for half in HALVES}",
        "steps on the ledger", {"method": "per-fedavg", "privacy": RECORD},
    ),
}  # fmt: skip


@pytest.fixture
def write(tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a small configuration; returns its file, in the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(**setup: Any) -> Path:
        quick = {"evaluation": {"every": 0, "local_only": False}, "rounds": 3, **setup}
        (tmp_path / "control.yaml").write_text(
            dump_config(tiny(**quick)).replace("privacy:\n", f"privacy:\n  secret: {SECRET}\n")
        )
        return tmp_path / "control.yaml"

    return make


def checks(out: Path) -> dict[str, str]:
    """Worst verdict of each check."""
    found: dict[str, str] = {}
    for finding in json.loads((out / "audit.json").read_text())["findings"]:
        if found.get(finding["name"]) != "violation":
            found[finding["name"]] = finding["verdict"]
    return found


@pytest.fixture(scope="module")
def honest() -> set[str]:
    """The setups that were found to be consistent without a change; several controls have the same."""
    return set()


@pytest.mark.parametrize("name", CONTROLS)
def test_a_wrong_line_is_found(
    name: str, fedpers: Command, write: Callable[..., Path], honest: set[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    control = CONTROLS[name]
    path = write(**control.setup)
    refused = name == "a noise-free head that feeds the shared part"  # as it should be without the change
    if not refused and repr(control.setup) not in honest:
        code, out, err = fedpers("audit", path, "--probe", "--quiet", "--out", tmp_path / "honest")
        assert code == 0, out + err
        assert set(checks(tmp_path / "honest").values()) == {"consistent"}
        honest.add(repr(control.setup))
    flip(monkeypatch, importlib.import_module(control.module), control.line, control.instead, **control.helpers)
    code, out, err = fedpers("run", path, "--quiet", "--out", tmp_path / "run")
    if control.refused:
        assert code == 2
        assert err.startswith("fedpers: ")
        if control.hook is None:
            return
        monkeypatch.setattr(control.hook, lambda *args: None)
        code, out, err = fedpers("run", path, "--quiet", "--out", tmp_path / "run")
    assert code == 0, err
    claim = json.loads((tmp_path / "run" / "claim.json").read_text())
    assert claim["epsilon"] < 5, "the run claims what it was asked for, or less"
    code, out, err = fedpers("audit", path, "--probe", "--quiet", "--out", tmp_path / "audit")
    assert code == 1, out + err
    assert "VIOLATION" in out
    assert checks(tmp_path / "audit")[control.found_by] == "violation"


def test_the_same_noise_key_twice_is_refused_by_the_ledger(
    fedpers: Command, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the wrong line gives the ledger the same address, too, nothing gets out."""
    path = write(privacy=USER)
    module = importlib.import_module("fedpers.privacy.user_level")
    line = 'noise_address=fingerprint(self._key, "user-noise", number) if noised else "",'
    flip(monkeypatch, module, line, line.replace("number", "1"))
    code, _, err = fedpers("run", path, "--quiet", "--out", tmp_path / "run")
    assert code == 2
    assert "noise key reuse" in err
    assert not (tmp_path / "run" / "claim.json").exists()


def test_the_refusal_of_the_noise_free_head_is_what_stops_it(
    fedpers: Command, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Switched off by hand instead of by the data-flow graph, the probe still finds it."""
    path = write(**CONTROLS["a noise-free head that feeds the shared part"].setup)
    assert fedpers("run", path, "--quiet", "--out", tmp_path / "run")[0] == 2
    monkeypatch.setattr(refusals, "_check_feedback", lambda config, plan: None)
    assert fedpers("run", path, "--quiet", "--out", tmp_path / "run")[0] == 0
    assert fedpers("audit", path, "--probe", "--quiet", "--out", tmp_path / "audit")[0] == 1
    assert checks(tmp_path / "audit")["sensitivity of one record"] == "violation"
