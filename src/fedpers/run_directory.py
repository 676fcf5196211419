"""A run on disk: what it holds, and how it survives being killed.

After each round the changed personal rows go to a journal, then the server's checkpoint is renamed into place, then the
journal is applied to the personal store. A round that is killed anywhere is repeated with the same random numbers and
never reads a row that it already wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from fedpers.cohort.personal_store import Changes, PersonalStore
from fedpers.cohort.tuning import Choice, from_json
from fedpers.config import Config, dump_config
from fedpers.errors import ConfigError, LedgerError, RunDirectoryError
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import Secret
from fedpers.privacy.randomness import secret_key
from fedpers.run_place import RunPlace

MEMBERS = "members.json"  # ids by number, in the private part
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """The server's side of a run after a round: nothing personal."""

    round: int
    ledger_lines: int
    ledger_head: str  # hash of the last of these lines
    shared: dict[str, NDArray[np.float32]]
    strategy: dict[str, NDArray[Any]]
    history: list[dict[str, Any]]  # a row per round, for rounds.parquet


class RunDirectory(RunPlace):
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.private = path / "private"
        self.ledger = path / "ledger.jsonl"
        self.figures = path / "figures"
        self.adapters = path / "adapters" / "shared"

    @classmethod
    def create(cls, path: Path, config: Config) -> RunDirectory:
        """Start a run in a new or empty directory; writes config, environment and secret.

        Raises:
            RunDirectoryError: the directory holds something already, or cannot be written.
        """
        run = cls(path)
        run.check_free()
        try:
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o700)  # metrics of single users are private too
            run.private.mkdir(exist_ok=True)
            run.private.chmod(0o700)
            run._write("environment.json", json.dumps(environment(config), indent=2, sort_keys=True) + "\n")
            run._write_secret(secret_key(config.privacy.secret), given=config.privacy.secret is not None)
            run._write("config.yaml", dump_config(config))  # last: from here on the run can be resumed
        except OSError as error:
            raise RunDirectoryError(f"{path}: cannot be written ({error.strerror}).") from error
        return run

    @classmethod
    def reopen(cls, path: Path, config: Config) -> RunDirectory:
        """Open a run to continue it, with the same configuration.

        Raises:
            RunDirectoryError: its configuration or secret is another one.
        """
        run = cls(path)
        stored = path / "config.yaml"
        try:
            old, new = yaml.safe_load(stored.read_text(encoding="utf-8")), yaml.safe_load(dump_config(config))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise _damaged(stored) from error
        if changed := sorted(_differences(old, new)):
            raise RunDirectoryError(
                f"{stored} differs from the configuration given in {', '.join(changed)}; resume with the same one."
            )
        given = config.privacy.secret
        if given is not None and (secret_key(given) != run.secret() or not (run.private / "secret-given").exists()):
            raise RunDirectoryError(f"{path}: was not started with this privacy.secret; leave it out to resume.")
        return run

    def tuned(self, choose: Callable[[], Choice]) -> Choice:
        """Return how the engine cuts its work, as it was chosen when this run began, or choose it now.

        Raises:
            RunDirectoryError: the file with the choice is damaged.
        """
        path = self.private / "engine.json"
        if not path.exists():
            self._write("private/engine.json", choose().to_json())
        try:
            return from_json(path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path) from error

    def has_ledger(self) -> bool:
        """Whether the ledger has its opening line; what a run killed while writing that line left is dropped."""
        if self.ledger.exists() and b"\n" not in self.ledger.read_bytes():
            self.ledger.unlink()
        return self.ledger.exists()

    def secret(self) -> bytes:
        """Read the key of noise and sampling."""
        try:
            return secret_key((self.private / "secret").read_text(encoding="ascii").strip())
        except (OSError, ValueError, ConfigError) as error:
            raise _damaged(self.private / "secret") from error

    def secret_origin(self) -> Secret:
        """Where the key came from when the run was started; a resumed run may be given none."""
        return "given in the configuration" if (self.private / "secret-given").exists() else "kept by the simulator"

    def commit(self, checkpoint: Checkpoint, users: Sequence[int], rows: Changes, store: PersonalStore) -> None:
        """Make a round final: journal, checkpoint, personal rows, in this order."""
        journal = self.private / "journal.safetensors"
        if users:
            _save(journal, {"users": np.array(users, np.int64), **{f"rows/{n}": r for n, r in rows.items()}}, {
                "round": str(checkpoint.round)
            })  # fmt: skip
        arrays = {f"shared/{n}": a for n, a in checkpoint.shared.items()}
        arrays |= {f"strategy/{n}": a for n, a in checkpoint.strategy.items()}
        about = {
            "round": checkpoint.round,
            "ledger_lines": checkpoint.ledger_lines,
            "ledger_head": checkpoint.ledger_head,
            "history": checkpoint.history,
        }
        _save(self.private / "checkpoint.safetensors", arrays, {"about": json.dumps(about)})
        store.apply(users, rows)
        journal.unlink(missing_ok=True)

    def recover(self, store: PersonalStore) -> Checkpoint | None:
        """Return the last checkpoint, with the personal store brought to the same round; None before the first.

        Raises:
            RunDirectoryError: a damaged checkpoint or journal; nothing is changed then.
            LedgerError: the ledger is damaged, or not the one that the checkpoint was made with; likewise.
        """
        path, journal = self.private / "checkpoint.safetensors", self.private / "journal.safetensors"
        if not path.exists():
            journal.unlink(missing_ok=True)
            return None
        arrays, metadata = _load(path)
        about = json.loads(metadata["about"])
        rows, journal_metadata = _load(journal) if journal.exists() else ({}, {})
        ledger = Ledger.rewind(self.ledger, about["ledger_lines"])
        if ledger.head != about["ledger_head"]:
            raise LedgerError(
                f"{self.ledger}: line {len(ledger)} is not the one that the checkpoint was made after; restore it from "
                "a copy, or start the run again in a new directory."
            )
        if rows:
            if int(journal_metadata["round"]) == about["round"]:  # else of a round that will be repeated
                store.apply(
                    rows["users"].tolist(),
                    {n.removeprefix("rows/"): r for n, r in rows.items() if n.startswith("rows/")},
                )
            journal.unlink()
        return Checkpoint(
            round=about["round"],
            ledger_lines=about["ledger_lines"],
            ledger_head=about["ledger_head"],
            shared={n.removeprefix("shared/"): a for n, a in arrays.items() if n.startswith("shared/")},
            strategy={n.removeprefix("strategy/"): a for n, a in arrays.items() if n.startswith("strategy/")},
            history=about["history"],
        )

    def fresh_store(self, name: str, users: int, initial: Mapping[str, Tensor]) -> PersonalStore:
        """Return an empty personal store under private/, dropping what a killed attempt left there."""
        shutil.rmtree(self.private / name, ignore_errors=True)
        return PersonalStore(self.private / name, users, initial)

    def fresh_adapters(self) -> Path:
        """Return the place for the shared adapter, without what a killed attempt left there."""
        shutil.rmtree(self.adapters, ignore_errors=True)
        return self.adapters

    def note_time(self, what: str, seconds: float) -> None:
        """Append a wall time; these live apart, so that everything else can be compared byte for byte."""
        with (self.path / "timing.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "seconds": round(seconds, 3)}) + "\n")

    def seconds(self) -> float:
        """Wall time of all attempts at this run that came to an end."""
        lines = (self.path / "timing.jsonl").read_text(encoding="utf-8").splitlines()
        return float(sum(one["seconds"] for one in map(json.loads, lines) if one["what"] == "run"))

    def write_text(self, name: str, text: str) -> None:
        """Write a file in one step: it is whole or not there."""
        self._write(name, text)

    def write_members(self, users: Sequence[str]) -> None:
        """Keep the ids of the users, by their number, in the private part."""
        self._write(f"private/{MEMBERS}", json.dumps(list(users)) + "\n")

    def _write(self, name: str, text: str) -> None:
        path = self.path / name
        scratch = path.with_name(f".{path.name}.partial")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)

    def _write_secret(self, secret: bytes, given: bool) -> None:
        (self.private / "secret-given").unlink(missing_ok=True)
        if given:
            (self.private / "secret-given").touch(mode=0o600)
        descriptor = os.open(self.private / "secret", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secret.hex() + "\n")


def environment(config: Config) -> dict[str, Any]:
    """Versions and machine that the bytes of a run depend on; no names, no dates."""
    packages = ("torch", "numpy", "transformers", "peft", "opacus", "dp-accounting", "flwr", "scipy", "pyarrow")
    return {
        "fedpers": version("fedpers"),
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "threads": config.engine.threads,
        "device": config.engine.device,
        "packages": {name: version(name) for name in packages},
    }


def _save(path: Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    ready = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    scratch = path.with_suffix(".partial")
    # Not by save_file: killed, that leaves a file with a random name behind.
    content = save(ready, metadata={**metadata, "digest": _digest(ready, metadata)})
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _load(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata())
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, TypeError) as error:
        raise _damaged(path) from error
    if metadata.pop("digest", None) != _digest(arrays, metadata):
        raise _damaged(path)
    return arrays, metadata


def _damaged(path: Path) -> RunDirectoryError:
    return RunDirectoryError(f"{path} is damaged; restore it from a copy, or start the run again in a new directory.")


def _digest(arrays: Arrays, metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode() + arrays[name].tobytes())
    return digest.hexdigest()


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = set(old) | set(new)
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))]
    return [] if old == new else [prefix]
