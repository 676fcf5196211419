"""From a template to one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedpers.errors import ConfigError, RunDirectoryError
from fedpers.privacy.claim import rounded_up

SHOWN = 2000  # rows of a table that are in the page at once


def render(template: str, **values: Any) -> str:
    """Fill a template of this package. Every value is escaped, and no script but the package's own may run."""
    environment = Environment(
        loader=PackageLoader("fedpers.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number, "signed": signed, "interval": interval, "p": p_value, "epsilon": epsilon, "short": short,
    }  # fmt: skip
    style, script = (_part(name) for name in ("page.css", "table.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        shown=SHOWN,
        **values,
    )


def write_page(path: Path, text: str, *, private: bool) -> Path:
    """Write a page in one step, over an older one; a private one is for its owner's eyes alone (mode 0600).

    Raises:
        ConfigError: the name does not end in .html, so something else may be there.
        RunDirectoryError: the place cannot be written.
    """
    if path.suffix != ".html":
        raise ConfigError(f"--out {path}: the page is a file whose name ends in .html.")
    scratch = path.with_name(f".{path.name}.partial")
    try:
        scratch.unlink(missing_ok=True)  # a killed attempt's may have another mode
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        scratch.replace(path)
    except OSError as error:
        raise RunDirectoryError(f"Cannot write {path}: {error.strerror or error}.") from error
    return path


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    if value is None:
        return "–"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def signed(value: float) -> str:
    """A difference, with its sign."""
    return f"{value:+.3f}"


def interval(pair: tuple[float, float]) -> str:
    """A 95% interval."""
    return f"{pair[0]:.3f} to {pair[1]:.3f}"


def epsilon(value: float | None) -> str:
    """An epsilon, never less than it is, or a dash where there is none."""
    if value is None:
        return "–"
    return "∞" if math.isinf(value) else rounded_up(value)


def short(value: float | None) -> str:
    """A parameter, or a dash where there is none."""
    return "–" if value is None else f"{value:.6g}"


def p_value(value: float) -> str:
    """A p-value, as the command line prints it."""
    return f"{value:.1g}"


def _part(name: str) -> str:
    return files("fedpers.report").joinpath("templates", name).read_text(encoding="utf-8")
