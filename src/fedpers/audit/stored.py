"""Reading back what `fedpers audit` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedpers.audit.bounds import Finding
from fedpers.errors import RunDirectoryError

_NUMBERS = ("claimed", "empirical", "ceiling")


def read_findings(path: Path) -> list[Finding]:
    """Read the findings of an audit.json.

    Raises:
        RunDirectoryError: it is damaged, or of another version.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["findings"]
        for row in rows:
            row |= _numbers({name: row[name] for name in _NUMBERS}) | {"numbers": _numbers(row["numbers"])}
        return [Finding(**row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{path} is damaged or of another version; `fedpers audit` makes it again.") from error


def _numbers(plain: dict[str, Any]) -> dict[str, float]:
    """Undo what JSON has no word for: None is NaN, "inf" infinity."""
    return {name: float("nan") if value is None else float(value) for name, value in plain.items()}
