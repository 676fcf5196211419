"""`fedpers audit` from a configuration to findings, table and figure."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import SECRET
from fedpers import cli
from fedpers.audit.bounds import Finding
from fedpers.audit.command import audit, inversion_setup
from fedpers.config import Config, dump_config
from fedpers.errors import PrivacyRefusal, RunDirectoryError
from fedpers.figures.audit import claimed_and_found

Tiny = Callable[..., Config]
USER = {"unit": "user", "epsilon": 4, "delta": 1e-5, "clip": 0.05}


def finding(**changes: Any) -> Finding:
    given: dict[str, Any] = {
        "name": "one-run", "what": "shared model", "unit": "user", "claimed": 2.0, "delta": 1e-5, "empirical": 0.5,
        "ceiling": 4.0, "kind": "bound", "verdict": "consistent", "detail": "", "numbers": {},
    }  # fmt: skip
    return Finding(**{**given, **changes})


@pytest.mark.pictures("png", "svg")
def test_a_user_level_setup_is_audited_whole(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny(privacy=USER, evaluation={"every": 0, "local_only": False})
    (tmp_path / "c.yaml").write_text(dump_config(config).replace("privacy:\n", f"privacy:\n  secret: {SECRET}\n"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedpers", "audit", "c.yaml", "--quiet"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0, "no violation"
    content = json.loads((tmp_path / "runs" / "tiny-audit" / "audit.json").read_text())
    kinds = {one["kind"] for one in content["findings"]}
    assert kinds == {"check", "bound", "estimate", "attack"}
    names = {one["name"] for one in content["findings"]}
    assert any("at ε = 2" in name for name in names), "a claim of 4 is above what one run can show"
    assert {one["verdict"] for one in content["findings"]} <= {"consistent", "powerless"}
    assert content["inversion"]["without DP"]["span_recall"] > content["inversion"]["with DP"]["span_recall"]
    for suffix in ("png", "svg"):
        assert (tmp_path / "runs" / "tiny-audit" / f"audit.{suffix}").stat().st_size > 1000
    out = capfd.readouterr().out
    assert "No violation" in out
    assert "does not prove it" in out
    with pytest.raises(RunDirectoryError, match="choose a new directory"):
        audit(config, tmp_path / "runs" / "tiny-audit", probe_only=True)


@pytest.mark.slow
def test_a_record_level_setup_is_audited_whole(tiny: Tiny, tmp_path: Path) -> None:
    """With a head alone; records under adapters are audited in test_canaries.py, inversion above."""
    config = tiny(privacy={**USER, "unit": "record", "epsilon": 2}, data={"users": 20}, share="head")
    found = audit(config, tmp_path / "out")
    assert found.violations == []
    assert {one.unit for one in found.findings} == {"record"}
    assert not any("at ε" in one.name for one in found.findings)


def test_without_privacy_only_attacks_are_run(tiny: Tiny, tmp_path: Path) -> None:
    found = audit(tiny(rounds=1, share="head"), tmp_path / "out")
    assert found.inversion == {}, "no LoRA update leaves"
    assert {one.kind for one in found.findings} == {"check", "attack"}
    assert {one.verdict for one in found.findings if one.kind == "attack"} == {"powerless"}


def test_a_setup_that_is_refused_is_not_audited(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(PrivacyRefusal, match="Three sound ways out"):
        audit(tiny(method="fedrep", privacy={**USER, "unit": "record"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inversion_is_tried_where_it_is_strongest(tiny: Tiny) -> None:
    config = inversion_setup(tiny(method="fedper", privacy=USER))
    assert config.model.adapter.layers == 3
    assert config.model.adapter.rank >= config.data.max_tokens
    assert (config.privacy.unit, config.privacy.epsilon, config.method) == ("record", 4, "fedavg")


@pytest.mark.pictures
def test_the_figure_shows_every_epsilon_and_nothing_else(tmp_path: Path) -> None:
    rates = {"span_recall": 1.0, "nearest_recall": 1.0, "optimization_recall": 0.5, "chance": 0.1}
    rows = [finding(), finding(claimed=float("inf"), verdict="powerless"), finding(kind="check", empirical=1.0)]
    png, svg, _ = claimed_and_found(rows, {"without DP": rates, "with DP": rates}, tmp_path, "t")
    assert png.stat().st_size > 1000
    assert svg.exists()
    assert claimed_and_found([finding(kind="check")], {}, tmp_path / "none", "t") == []
