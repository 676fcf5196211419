"""The README's code runs as it stands there."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from fedpers import cli, registry
from fedpers.config import TRUSTS, HeadPolicy, Trust, parse_config
from fedpers.errors import ConfigError, PrivacyRefusal
from fedpers.experiment import Reuse, prepare
from fedpers.guarantees import Mode, guarantees

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
REUSE = Reuse()  # the same made-up people in every cell
TRUSTED = [trust for trusts in TRUSTS.values() for trust in trusts]


def test_the_method_shown_whole_is_the_file() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert (ROOT / "src/fedpers/methods/fedrep.py").read_text(encoding="utf-8") in blocks


def test_links_and_paths_exist() -> None:
    found = re.findall(r"\]\((?!http)([^)]+)\)", README)
    found += re.findall(r"`((?:src|configs|experiments|docs)/[^` ]+)`", README)
    assert len(found) > 5
    assert [name for name in found if not (ROOT / name).exists()] == []


def methods(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """What `fedpers methods` prints, run as the program runs it."""
    monkeypatch.setattr(sys, "argv", ["fedpers", "methods", *options])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    return capsys.readouterr().out


def test_the_guarantees_are_current(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: ())  # the README knows no third party's methods
    (block,) = re.findall(r"<!-- guarantees -->\n(.*?)<!-- /guarantees -->", README, re.DOTALL)
    assert methods(capsys, monkeypatch, "--guarantees", "--markdown") == block, (
        "put what `fedpers methods --guarantees --markdown` prints between the marks"
    )
    shown = methods(capsys, monkeypatch, "--guarantees")
    assert [line.split()[0] for line in shown.splitlines() if "unit; adjacency" in line] == re.findall(
        r"^\| (none|record-\w+|user-\w+) \|", block, re.MULTILINE
    )
    assert max(map(len, shown.splitlines())) <= 80
    rights = permits(block)
    assert sorted(rights) == registry.names("methods"), "each method once"
    assert rights["fedavg"] == ["yes"] * 5
    assert rights["fedrep"][:2] == ["yes; also frozen, split", "only frozen, joint*, split-dp*"]
    assert rights["fedala"] == ["yes", "no", "yes", "yes", "yes"]
    assert rights["fedex-lora"] == ["yes", "yes", "no", "no", "yes"]
    assert rights["flora"] == ["yes", "no", "no", "no", "no"]
    monkeypatch.setenv("COLUMNS", "200")  # wide enough for no line to be broken
    wide = methods(capsys, monkeypatch, "--guarantees")
    for method, cells in rights.items():  # the same on a terminal
        assert len(re.findall(rf"^  {method} ", shown, re.MULTILINE)) == 1
        (section,) = [text for text in re.split(r"\n\s*\n", wide) if re.search(rf"^  {method} ", text, re.MULTILINE)]
        lines = [re.split(r"\s{2,}", line.strip()) for line in section.splitlines()]
        assert [line[-1] for line in lines if line[-2:-1] and line[-2] in TRUSTED] == cells


def permits(block: str) -> dict[str, list[str]]:
    """How far each method may run in each mode, from the table of methods."""
    _, _, table = block.partition("| methods | none | record-local | user-central | user-distributed | user-local |\n")
    found: dict[str, list[str]] = {}
    for line in table.partition("\n\n")[0].splitlines()[1:]:
        methods, *cells = line.strip("| ").split(" | ")
        found |= dict.fromkeys(methods.split(", "), cells)
    return found


def test_the_guarantees_list_third_party_methods(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = EntryPoint("theirs", "fedpers.methods.fedrep:FedRep", "fedpers.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: (theirs,) if group == theirs.group else ())
    block = methods(capsys, monkeypatch, "--guarantees", "--markdown")
    rights = permits(block)
    assert rights["theirs"] == rights["fedrep"] != rights["fedper"]


def test_the_list_of_methods_is_current(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: ())
    listed = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert methods(capsys, monkeypatch, "--markdown") == listed, "put `fedpers methods --markdown` into docs/methods.md"


@pytest.fixture(scope="module")
def modes() -> dict[Trust, Mode]:
    return {mode.trust: mode for mode in guarantees(registry.names("methods"))}


@pytest.mark.parametrize("head", ["method", "frozen", "joint", "split", "split-dp"])
@pytest.mark.parametrize("trust", ["none", "record-local", "user-central", "user-distributed", "user-local"])
def test_what_the_guarantees_allow_is_what_a_run_gets(modes: dict[Trust, Mode], trust: Trust, head: HeadPolicy) -> None:
    """Each cell again, by the checks of a whole run on made-up people."""
    mode = modes[trust]
    listed = mode.methods if head == "method" else mode.policies.get(head, ())
    noise = {} if trust == "none" else {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
    for name in registry.names("methods"):
        config = parse_config(
            {
                "method": name,
                "rounds": 1,
                "data": {"name": "synthetic", "users": 4},
                "personal": {"groups": "adapter+head"},
                "privacy": {"unit": mode.unit, "trust": trust, "head": head, **noise},
            }
        )
        if name in listed:
            guarantee = prepare(config, REUSE).guarantee
            assert guarantee.trust == trust
            assert guarantee.personal_covered == (name in mode.covered.get(head, ()))
        else:
            with pytest.raises(
                (PrivacyRefusal, ConfigError), match=r"refused|leave|shares nothing|in one step|no gradient"
            ):
                prepare(config, REUSE)


def test_the_guarantees_are_those_of_the_threat_model(modes: dict[Trust, Mode]) -> None:
    """The cells that an error would be worst in, by hand."""
    assert modes["none"].against == ()
    server = {trust: [text for text in mode.against if text.startswith("the server")] for trust, mode in modes.items()}
    assert server["user-central"] == []
    assert any(text.startswith("the server (trusted") for text in modes["user-central"].not_against)
    assert [len(server[trust]) for trust in ("record-local", "user-distributed", "user-local")] == [1, 1, 1]
    assert "simulated" in server["user-distributed"][0]
    assert {"fedper", "fedrep", "fedsa-lora", "ifca", "pfedme"}.isdisjoint(modes["record-local"].methods)
    # not hydra, which fits heads at home without noise, nor feddpa, whose gate holds features of the user's own inputs
    covered = modes["record-local"].covered
    assert {"fedbn", "fedper", "fedrep", "fedsa-lora", "lg-fedavg", "sdflora"} <= set(covered["joint"])
    assert "fedrep" in covered["split-dp"]
    for policy, methods in covered.items():
        assert {"hydra", "feddpa"}.isdisjoint(methods)
        assert set(methods) <= set(modes["record-local"].policies[policy])
    assert "fedrep" not in modes["record-local"].policies.get("split", ())
    for unclaimable in ("centralized", "fedalt", "flora", "hetlora"):
        for trust, mode in modes.items():
            allowed = {unclaimable} & {*mode.methods, *(name for held in mode.policies.values() for name in held)}
            assert bool(allowed) == (trust == "none")
    for trust, mode in modes.items():
        assert any("personal model" in text for text in mode.not_against)
        assert ("Krum" in mode.strategies) == (trust not in {"user-central", "user-distributed"})
        assert "FedAdam" in mode.strategies


@pytest.mark.slow
def test_the_python_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "fedpers.simulate" in b]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    run = names["run"]
    assert 0 < run.claim.epsilon <= 2
    assert run.summary["users"] == 30
    assert run.users.num_rows == 30 * 5
