"""Two plain files: a row for each round, and the results."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


class Place:
    """Writes rounds.csv, anew after each round since later ones may have more columns, and results.csv."""

    name = "csv"

    def start(self, run: str, config: Mapping[str, str], folder: Path) -> int:
        """Begin anew; the configuration lies beside, in config.yaml."""
        del run, config
        self._folder, self._rows = folder, list[dict[str, float]]()
        return 0

    def round(self, number: int, numbers: Mapping[str, float]) -> None:
        """Write all rounds so far."""
        self._rows.append({"round": number, **numbers})
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        self._write("rounds.csv", columns, ([row.get(name, "") for name in columns] for row in self._rows))

    def finish(self, numbers: Mapping[str, float], claim: str) -> None:
        """Write the results, one a row, and the claim."""
        self._write("results.csv", ["name", "value"], [*numbers.items(), ("claim", claim)])

    def close(self) -> None:
        """Nothing is open between calls."""

    def _write(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        scratch = self._folder / f".{name}.partial"
        with scratch.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        scratch.replace(self._folder / name)
