"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

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
