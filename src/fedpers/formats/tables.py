"""Rows of JSONL, CSV, Parquet and Arrow files, each with its place; what is broken is told by place, never by content.

Messages name files without their folders and hold nothing of what the rows say.
"""

from __future__ import annotations

import csv
import difflib
import glob
import importlib
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fedpers.errors import ConfigError, DataError

HUB = "hub:"  # before the name of a data set on the Hugging Face hub
Columns = Mapping[str, str]  # by key of `data.columns`, the name of the column
LINES, TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv", ".parquet", ".arrow")


class Bad(Exception):
    """One row that cannot be used; `kind` names the count that it goes to, `said` what is wrong."""

    def __init__(self, kind: str, said: str) -> None:
        super().__init__(said)
        self.kind, self.said = kind, said


@dataclass
class Skips:
    """Refuses bad rows, or counts them where that was asked for."""

    allowed: bool
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, bad: Bad, place: str) -> None:
        """Count a bad row; raises DataError where none may be left out."""
        if not self.allowed:
            raise DataError(f"{place}: {bad.said}; mend it, or set data.skip_bad=true to leave such records out.")
        self.counts[f"skipped_{bad.kind}"] += 1


def find_files(path: str, endings: Sequence[str] = (*LINES, *TABLES)) -> list[Path]:
    """Return the files of a path, a folder or a pattern, in order of their names. Raises DataError if there are none.

    Of a folder that is each file with one of the endings, as in one that the `datasets` library saved.
    """
    known = f"a file that ends in {', '.join(endings)}"
    if Path(path).is_dir():
        found = sorted(one for one in Path(path).iterdir() if one.suffix.lower() in endings)
    else:
        found = [Path(one) for one in ([path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True)))]
    if not found:
        raise DataError(f"data.path = {path!r}: nothing there; name {known}, a folder of such files or a pattern.")
    if odd := [one for one in found if one.suffix.lower() not in endings]:
        raise DataError(f"data.path: {odd[0].name}: not {known}.")
    return found


def rows(files: Sequence[Path], columns: Columns, skips: Skips) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, values by column) of every row, in order; only `columns` are read.

    Raises:
        DataError: a file that cannot be read, a column that is nowhere in it, or, unless `skips` allows it, a row that
            cannot be read.
    """
    for file in files:
        kind = file.suffix.lower()
        try:
            found = _lines(file, columns, skips) if kind in LINES else _table(file, kind, columns, skips)
            yield from found
        except OSError as error:
            raise DataError(f"{file.name}: cannot be read ({error.strerror or type(error).__name__}).") from error
        except (pa.ArrowException, csv.Error, UnicodeDecodeError):  # their messages may quote a row
            raise DataError(f"{file.name}: not a valid {kind[1:]} file.") from None


def hub_rows(path: str, columns: Columns) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, values by column) of every row of `hub:owner/name` or `hub:owner/name:split`, by `datasets`.

    Raises:
        ConfigError: the library is not installed.
        DataError: it finds no such data set or split, or a column is missing.
    """
    try:
        library: Any = importlib.import_module("datasets")
    except ImportError:
        raise ConfigError(
            f"data.path = {path!r} needs datasets; run `pip install datasets==5.2.0`, or save the data set as Parquet."
        ) from None
    name, _, split = path.removeprefix(HUB).partition(":")
    try:
        found = library.load_dataset(name, split=split or "train")
    except Exception as error:  # what the hub's client and its loaders raise is of many kinds
        said = type(error).__name__
        raise DataError(f"data.path = {path!r}: cannot be loaded ({said}); check name, split and network.") from error
    _check_columns(path, columns, found.column_names)
    for number, row in enumerate(found.select_columns(_names(columns)), start=1):
        yield f"{path}, row {number}", row


def as_text(value: Any, column: str) -> str:
    """Return a cell as stripped text; whole numbers of a numeric column are written without their point.

    Cells are compared as text afterwards: the numbers 4.0 and 4 are one label and one user, the texts "4.0" and "4"
    (and all cells of a CSV file are texts) are two.

    Raises:
        Bad: an empty cell, a list or the like, or a text that is not valid Unicode.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Bad(f"empty_{column}", f"the {column} is empty")
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise Bad("not_unicode", f"the {column} is not valid Unicode") from None
        return value.strip()
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, float):
        raise Bad(f"empty_{column}", f"the {column} is no number")
    raise Bad(f"odd_{column}", f"the {column} holds a {type(value).__name__}, not a text or a number")


def as_time(value: Any) -> tuple[str, float]:
    """Return ("number" or "date", seconds) of a cell: seconds as they are, ISO 8601 or a date; no zone means UTC.

    Raises:
        Bad: a time that does not parse.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            try:
                value = datetime.fromisoformat(value.strip())
            except ValueError:
                raise Bad("time_not_parsed", "the time is neither a number nor ISO 8601") from None
    if isinstance(value, datetime):
        return "date", (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, date):
        return "date", datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return "number", float(value)
    raise Bad("time_not_parsed", "the time is neither a number nor ISO 8601")


def _lines(file: Path, columns: Columns, skips: Skips) -> Iterator[tuple[str, dict[str, Any]]]:
    absent: Columns | None = None  # columns that no line so far has
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{file.name}, line {number}"
            try:
                found = _object(line)
            except Bad as bad:
                skips.add(bad, place)
                continue
            if not skips.allowed:
                _check_columns(place, columns, found)
            before = columns if absent is None else absent
            absent = {key: name for key, name in before.items() if name not in found}
            yield place, {name: found.get(name) for name in columns.values()}
    for key, name in (absent or {}).items():
        raise DataError(f"{file.name}: data.columns.{key}: no line has a column {name!r}; {_mend(key)}.")


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        tree = json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise Bad("not_utf8", f"not UTF-8 at its byte {error.start + 1}") from None
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
        column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise Bad("broken_json", f"not valid JSON{column}") from None
    if not isinstance(tree, dict):
        raise Bad("broken_json", f"a {type(tree).__name__}, not an object with names and values")
    return tree


def _table(file: Path, kind: str, columns: Columns, skips: Skips) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        table = _csv(file, kind, columns, skips) if kind in (".csv", ".tsv") else _binary(file, kind, columns)
    except pa.ArrowInvalid as error:  # its message may quote a row
        raise DataError(f"{file.name}: not a valid {kind[1:]} file.") from (None if kind in (".csv", ".tsv") else error)
    for place, name in enumerate(table.column_names):
        if pa.types.is_timestamp(table.schema.field(name).type):  # nanoseconds would need pandas
            zone = table.schema.field(name).type.tz
            table = table.set_column(place, name, table.column(name).cast(pa.timestamp("us", tz=zone), safe=False))
    number = 0
    for batch in table.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            number += 1
            yield f"{file.name}, row {number}", row


def _binary(file: Path, kind: str, columns: Columns) -> pa.Table:
    if kind == ".parquet":
        _check_columns(file.name, columns, pa.parquet.read_schema(file).names)
        return pa.parquet.read_table(file, columns=_names(columns))
    with pa.memory_map(str(file)) as source:  # what `datasets` saves is a stream, what others call Feather is not
        try:
            table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(source).read_all()
    _check_columns(file.name, columns, table.column_names)
    table = table.select(_names(columns))
    table.validate(full=True)  # else a damaged file could end the process
    return table


def _csv(file: Path, kind: str, columns: Columns, skips: Skips) -> pa.Table:
    """Read all as text. Broken rows are numbered by the reader, which counts the header."""
    raw = file.read_bytes()
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{file.name}, line {line}: not UTF-8; convert the file, for example with iconv.") from None
    delimiter = "\t" if kind == ".tsv" else ","
    header = next(csv.reader(io.StringIO(raw.decode("utf-8-sig")), delimiter=delimiter), [])
    _check_columns(file.name, columns, header)
    broken: list[tuple[int | None, int, int]] = []

    def odd(row: Any) -> str:
        broken.append((row.number, row.expected_columns, row.actual_columns))
        return "skip"

    table = pa.csv.read_csv(
        io.BytesIO(raw),
        read_options=pa.csv.ReadOptions(use_threads=False),  # threads lose the number of a broken row
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=odd),
        convert_options=pa.csv.ConvertOptions(
            column_types={name: pa.string() for name in _names(columns)},
            include_columns=_names(columns),
            strings_can_be_null=False,
        ),
    )
    for number, expected, actual in broken:
        place = f"{file.name}, row {number} with the header as row 1"
        skips.add(Bad("broken_row", f"{actual} cells where the header has {expected}"), place)
    return table


def _names(columns: Columns) -> list[str]:
    return list(dict.fromkeys(columns.values()))  # one column may be input and target


def _check_columns(place: str, columns: Columns, found: Collection[str]) -> None:
    """Raise DataError for the first missing column; those that are there may be a row of data and are not named."""
    for key, name in columns.items():
        if name not in found:
            near = difflib.get_close_matches(name, [str(one) for one in found], 1)
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise DataError(
                f"{place}: data.columns.{key}: no column {name!r} among the {len(found)} there{hint}; {_mend(key)}."
            )


def _mend(key: str) -> str:
    if key != "user":
        return "name the column of your files that holds it"
    return (
        "name the column of your files that holds it, or, where there are no users, set it to null and data.partition"
    )
