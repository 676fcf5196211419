"""The README's code runs as it stands there."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from fedpers import cli, registry
from fedpers.config import HeadPolicy, Trust, parse_config
from fedpers.errors import ConfigError, PrivacyRefusal
from fedpers.experiment import prepare
from fedpers.guarantees import Mode, guarantees

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


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
    assert "all but fedper, fedrep" in shown


def test_the_guarantees_list_third_party_methods(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = EntryPoint("theirs", "fedpers.methods.fedrep:FedRep", "fedpers.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: (theirs,) if group == theirs.group else ())
    block = methods(capsys, monkeypatch, "--guarantees", "--markdown")
    assert "all but fedper, fedrep, theirs" in block
    assert "split-dp*: fedrep, theirs" in block


def test_markdown_alone_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fedpers", "methods", "--markdown"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "--guarantees; give both" in capsys.readouterr().err


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
            guarantee = prepare(config).guarantee
            assert guarantee.trust == trust
            assert guarantee.personal_covered == (head in mode.covered)
        else:
            with pytest.raises((PrivacyRefusal, ConfigError), match=r"refused|leave|shares nothing|in one step"):
                prepare(config)


def test_the_guarantees_are_those_of_the_threat_model(modes: dict[Trust, Mode]) -> None:
    """The cells that an error would be worst in, by hand."""
    assert modes["none"].against == ()
    server = {trust: [text for text in mode.against if text.startswith("the server")] for trust, mode in modes.items()}
    assert server["user-central"] == []
    assert any(text.startswith("the server (trusted") for text in modes["user-central"].not_against)
    assert [len(server[trust]) for trust in ("record-local", "user-distributed", "user-local")] == [1, 1, 1]
    assert "simulated" in server["user-distributed"][0]
    assert {"fedper", "fedrep"}.isdisjoint(modes["record-local"].methods)
    assert modes["record-local"].covered == {"joint", "split-dp"}
    assert "split" not in modes["record-local"].policies
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
