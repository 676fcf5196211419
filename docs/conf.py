"""How Sphinx makes the site, `make docs`. The repository is the source folder, so that links hold here and there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

project = "fedpers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
include_patterns = ["*.md", "docs/**.md", "notebooks/*.ipynb", "experiments/*/*.md"]
exclude_patterns = [".*", "configs", "runs", "site", "src", "tests"]  # not looked through

html_theme = "furo"  # brings its fonts and scripts along: a page loads nothing from elsewhere
html_title = "fedpers"
html_show_copyright = False
html_copy_source = False
myst_heading_anchors = 3
highlight_language = "none"

default_role = "literal"  # docstrings write `name`
napoleon_use_ivar = True
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100


def as_markdown(app: Sphinx, page: str, source: list[str]) -> None:
    """Read a notebook as text with code, and give the page that `fedpers methods` prints a title."""
    if page.startswith("notebooks/"):
        source[0] = "\n\n".join(map(_cell, json.loads(source[0])["cells"]))
    if page == "docs/methods":
        source[0] = f"# The methods\n\n{source[0]}"


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    return text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"


def start_page(app: Sphinx, error: Exception | None) -> None:
    """Lead to the README from where a browser looks first."""
    if error is None:
        forward = '<!doctype html><meta http-equiv="refresh" content="0; url=README.html"><title>fedpers</title>\n'
        (Path(app.outdir) / "index.html").write_text(forward, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", as_markdown)
    app.connect("build-finished", start_page)
