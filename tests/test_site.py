"""The documentation site: built without a warning, complete, and loading nothing from elsewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = (sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "html"
    done = subprocess.run([*BUILD, "-d", str(out.parent / "trees"), str(out)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return out


class Loads(HTMLParser):
    """What a browser fetches by itself for a page: not what a reader may click."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found += [given[name] or "" for name in ("src", "srcset", "poster") if name in given]
        if tag == "link" and "canonical" not in (given.get("rel") or ""):
            self.found.append(given.get("href") or "")


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loads = {page: Loads(page.read_text(encoding="utf-8")).found for page in site.rglob("*.html")}
    assert sum(map(len, loads.values())) > 100
    assert [one for found in loads.values() for one in found if re.match(r"(?i)[a-z]+:|//", one)] == []
    for style in site.rglob("*.css"):
        assert (
            re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//[^)"']*""", style.read_text(encoding="utf-8")) == []
        )


def test_all_that_is_written_is_there(site: Path) -> None:
    written = [one for pattern in ("*.md", "docs/**/*.md", "notebooks/*.ipynb") for one in ROOT.glob(pattern)]
    assert [one for one in written if not (site / one.relative_to(ROOT)).with_suffix(".html").exists()] == []
    assert "README.html" in (site / "index.html").read_text(encoding="utf-8")
    home = (site / "README.html").read_text(encoding="utf-8")
    assert 'href="docs/your_own_data.html"' in home
    assert 'href="CONTRIBUTING.html"' in home
    assert "<img" in home


def test_the_reference_has_signatures_and_texts(site: Path) -> None:
    for page, anchors in {
        "run": ("fedpers.simulate", "fedpers.load_config", "fedpers.sweep.runner.sweep", "fedpers.errors.LedgerError"),
        "extend": ("fedpers.methods.base.Method.serve", "fedpers.tasks.base.Task", "fedpers.data.base.Source"),
        "privacy": ("fedpers.privacy.claim.Claim", "fedpers.privacy.ledger.Ledger"),
        "results": ("fedpers.evaluation.statistics.compare", "fedpers.personalize.personalize"),
    }.items():
        text = (site / "docs" / "api" / f"{page}.html").read_text(encoding="utf-8")
        assert [one for one in anchors if f'id="{one}"' not in text] == []
    assert "the run directory; by default" in (site / "docs/api/run.html").read_text(encoding="utf-8")
    assert "share of the clients in a round" in (site / "docs/api/configuration.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")))
def test_a_notebook_is_whole(site: Path, name: str) -> None:
    text = (site / "notebooks" / f"{name}.html").read_text(encoding="utf-8")
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    assert text.count('<div class="highlight-python') == sum(cell["cell_type"] == "code" for cell in cells)
