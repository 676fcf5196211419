"""The ledger: an append-only, hash-chained list of releases, and the only source of privacy numbers.

One JSON line per release, after one opening line. Each line holds the hash of the line before it, so an edit anywhere
is found when the ledger is read. The chain is not signed: whoever rewrites the whole file leaves no trace in it, which
is why the claim and the server checkpoint keep the head's hash.

A release is appended before it is used or sent. A run that is killed in between has spent the budget and repeats the
round with the same noise: `Ledger.rewind` then holds the repeated release against the line that is already there.

Who took part is private and not in the lines: they hold a salted hash of it, and the lists lie in a file beside the
ledger, in the directory `private`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from fedpers.errors import LedgerError
from fedpers.privacy.ledger_lines import Opening, Release, check_opening, release_problem

GENESIS = "0" * 64  # stands for the hash before the first line

_Content = TypeVar("_Content", Opening, Release)


class Ledger:
    """A ledger file that is open for appending.

    Build one with `create`, `load` or `rewind`. `head` is the hash of the last line and `len()` the number of lines,
    the opening included; both belong into the server checkpoint. `pending` lines (after `rewind` only) are on disk
    but not yet replayed, and do not count into either.
    """

    def __init__(self, path: Path, lines: list[str], kept: int, size: int) -> None:
        """Not for callers: see `create`, `load` and `rewind`."""
        self.path = path
        self._size = size  # bytes on disk; another writer shows by a different size
        self._rounds: dict[int, Release] = {}
        self._address_round: dict[str, int] = {}
        self._expected: list[tuple[Release, str]] = []
        self._participants = Participants(path)
        self.opening = _read(Opening, lines[0], 0, GENESIS, path, None)
        check_opening(self.opening)
        self._head = previous = _hash_of(lines[0])
        for index, line in enumerate(lines[1:], start=1):
            release = _read(Release, line, index, previous, path, self._participants)
            previous = _hash_of(line)
            if index < kept:
                self._check(release, f"{path}, line {index + 1}")
                self._accept(release, previous)
            else:
                self._expected.append((release, previous))

    @classmethod
    def create(cls, path: Path, opening: Opening) -> Self:
        """Start a new ledger with its opening line.

        Raises:
            LedgerError: The file exists, or unit, trust, adjacency and delta do not belong together.
            PrivacyRefusal: The sampler of the protected unit is not one that is accounted (refusal R3).
        """
        check_opening(opening)
        line = _line(0, opening, GENESIS)
        try:
            with path.open("xb") as file:
                _write_through(file.fileno(), line)
        except FileExistsError as error:
            raise LedgerError(f"{path} exists; resume the run or choose another directory.") from error
        return cls(path, [line], 1, len(line) + 1)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a ledger and verify every line of it.

        Raises:
            LedgerError: A line is torn, edited, missing or out of order; the message names it.
        """
        lines, torn = _split(path)
        if torn:
            raise LedgerError(f"{path}, line {len(lines) + 1}: torn, the run was killed while writing it; resume it.")
        return cls(path, lines, len(lines), path.stat().st_size)

    @classmethod
    def rewind(cls, path: Path, lines: int) -> Self:
        """Read a ledger for a run that resumes behind its first `lines` lines (as counted by `len`).

        Later whole lines stay in the file, for what was released stays released. They become `pending`: the releases
        that are appended next must equal them field by field. A last line that is torn (no newline, or not JSON) is
        cut off on purpose: it was never synced, so its release was never used, and the replay writes it again.

        Raises:
            LedgerError: A line is edited or out of order, or fewer than `lines` whole lines are there.
        """
        kept, torn = _split(path)
        if lines < 1 or len(kept) < lines:
            raise LedgerError(f"{path} has {len(kept)} whole lines, but the checkpoint counts {lines}.")
        size = sum(len(line) + 1 for line in kept)
        ledger = cls(path, kept, lines, size)  # verifies before anything is cut
        if torn:
            with path.open("r+b") as file:
                file.truncate(size)
                os.fsync(file.fileno())
        return ledger

    def append(self, release: Release) -> None:
        """Write one release and sync it to disk. An exact replay of a line that is there writes nothing.

        Raises:
            LedgerError: The release does not fit the opening, its round is not later than the last one, its noise
                address was used before (refusal R9), it differs from the pending line that it replays, or another
                program wrote to the file.
        """
        if self._rounds.get(release.round) == release:
            return
        self._check(release, f"round {release.round}")
        if self._expected:
            expected, line_hash = self._expected[0]
            if release != expected:
                differing = [name for name in Release.model_fields if getattr(release, name) != getattr(expected, name)]
                raise LedgerError(
                    f"round {release.round}: the replay differs from line {len(self) + 1} of {self.path} in "
                    f"{', '.join(differing)}; the same noise would protect two different releases. Start a new run "
                    "with another secret."
                )
            del self._expected[0]
            self._accept(release, line_hash)
            return
        self._participants.write(release)  # first: a line whose participants are lost could not be accounted
        line = _line(len(self), release, self._head)
        with self.path.open("r+b") as file:
            if file.seek(0, os.SEEK_END) != self._size:
                raise LedgerError(f"{self.path} was changed by another program during the run.")
            _write_through(file.fileno(), line)
        self._size += len(line) + 1
        self._accept(release, _hash_of(line))

    @property
    def releases(self) -> tuple[Release, ...]:
        """All releases so far, by round; without the pending ones."""
        return tuple(self._rounds.values())

    @property
    def pending(self) -> tuple[Release, ...]:
        """Releases that an earlier attempt made and this run has not replayed yet."""
        return tuple(release for release, _ in self._expected)

    @property
    def head(self) -> str:
        """Hash of the last line."""
        return self._head

    def __len__(self) -> int:
        return 1 + len(self._rounds)

    def _accept(self, release: Release, line_hash: str) -> None:
        self._rounds[release.round] = release
        if release.noise_address:
            self._address_round[release.noise_address] = release.round
        self._head = line_hash

    def _check(self, release: Release, where: str) -> None:
        """Raise LedgerError unless the release may follow the lines that are there."""
        problem = release_problem(release, self.opening)
        used_in = self._address_round.get(release.noise_address)
        last = next(reversed(self._rounds), 0)
        if problem is None and used_in is not None:
            problem = f"noise key reuse: round {used_in} drew its noise from the same address"
        if problem is None and release.round <= last:
            problem = f"round {release.round} comes after round {last}, but rounds must grow"
        if problem is not None:
            raise LedgerError(f"{where}: {problem}.")


class Participants:
    """The private file that says who took part in each round, in the order of the ledger's lines."""

    def __init__(self, ledger: Path) -> None:
        self.path = ledger.parent / "private" / "participants.jsonl"
        self._known: dict[int, tuple[list[int], str]] = {}
        data = self.path.read_bytes() if self.path.exists() else b""
        self._whole = data.rfind(b"\n") + 1  # a torn line was never synced, so nothing was released after it
        for line in data[: self._whole].splitlines():
            try:
                entry = json.loads(line)
                self._known[entry["round"]] = (entry["clients"], entry["salt"])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise LedgerError(f"{self.path} is damaged; restore it from a copy.") from None

    def __str__(self) -> str:
        return str(self.path)

    def read(self, number: int) -> tuple[list[int], str]:
        """Return the clients of a round and the salt of their hash; LedgerError if they are not there."""
        if number not in self._known:
            raise LedgerError(
                f"{self.path} does not say who took part in round {number}; without it (as in a public export) the "
                "epsilon of this ledger cannot be computed again."
            )
        return self._known[number]

    def write(self, release: Release) -> None:
        """Add a release's clients; those of a repeated round are there already and must be the same."""
        if release.clients is None:
            return
        entry = (release.clients, release.salt)
        if release.round in self._known:
            if self._known[release.round] != entry:
                raise LedgerError(f"{self.path}: round {release.round} is repeated with other clients.")
            return
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, self._whole)
            os.lseek(descriptor, 0, os.SEEK_END)
            line = _canonical({"round": release.round, "clients": release.clients, "salt": release.salt})
            _write_through(descriptor, line)
            self._whole += len(line) + 1
        finally:
            os.close(descriptor)
        self._known[release.round] = entry


def release_hash(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """SHA-256 (hex) of named arrays: name, dtype, shape and bytes, in the order of the names.

    Raises:
        TypeError: An array holds Python objects, whose bytes mean nothing.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.hasobject:
            raise TypeError(f"{name} holds Python objects; only numbers are released.")
        header = json.dumps([name, array.dtype.str, array.shape]).encode()
        digest.update(len(header).to_bytes(8, "little") + header)  # lengths, so that no two inputs run together
        digest.update(array.tobytes())
    return digest.hexdigest()


def _canonical(fields: Mapping[str, Any]) -> str:
    """One spelling per content: sorted keys, no spaces, floats as `repr`, ASCII."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _line(index: int, content: Opening | Release, previous: str) -> str:
    kind = type(content).__name__.lower()
    fields = {**content.model_dump(), "index": index, "kind": kind, "previous": previous}
    if isinstance(content, Release):
        fields["participants"] = content.participants
    return _canonical({**fields, "hash": hashlib.sha256(_canonical(fields).encode()).hexdigest()})


def _hash_of(line: str) -> str:
    return str(json.loads(line)["hash"])


def _write_through(descriptor: int, line: str) -> None:
    data = (line + "\n").encode()
    while data:  # a signal may cut a write short
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def _split(path: Path) -> tuple[list[str], bool]:
    """Whole lines of the file, and whether a torn one follows them."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise LedgerError(f"{path} does not exist; without a ledger there is no claim.") from error
    parts = data.split(b"\n")
    lines = [part.decode("ascii", errors="replace") for part in parts[:-1]]
    torn = parts[-1] != b""
    if lines and not torn and not _is_json(lines[-1]):
        torn = True
        del lines[-1]
    if not lines:
        raise LedgerError(f"{path} has no whole opening line; start the run again in an empty directory.")
    return lines, torn


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read(
    model: type[_Content], line: str, index: int, previous: str, path: Path, participants: Participants | None
) -> _Content:
    """Verify one line's place in the chain and read its content."""
    where, kind = f"{path}, line {index + 1}", model.__name__.lower()
    try:
        fields = json.loads(line)
        stated = fields.pop("hash")
        # the text itself is compared, so that doubled keys or another spelling of a number are found too
        whole = _canonical({**fields, "hash": stated}) == line
        if not whole or stated != hashlib.sha256(_canonical(fields).encode()).hexdigest():
            raise LedgerError(f"{where}: edited, its hash does not match its content.")
        place = (fields.pop("previous"), fields.pop("index"), fields.pop("kind"))
        if place != (previous, index, kind):
            raise LedgerError(f"{where}: not the {kind} that follows here; a line was edited, removed or moved.")
        if participants is not None:
            stated = fields.pop("participants")
            fields["clients"], fields["salt"] = participants.read(fields["round"]) if stated else (None, "")
        content = model.model_validate_json(_canonical(fields))
        if isinstance(content, Release) and content.participants != stated:
            raise LedgerError(f"{where}: who took part, in {participants}, is not what this line was written for.")
        return content
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:  # pydantic's: ValueError
        raise LedgerError(f"{where}: not a ledger line ({error}).") from error
