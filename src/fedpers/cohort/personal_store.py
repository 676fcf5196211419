"""Every user's personal state in one place: a memory-mapped array per parameter, a row per user.

A user's row is read and written on its own, so users who are not sampled cost nothing. Within a round changes are
collected; they go to a journal first and to the arrays only once the server's checkpoint stands (see run_directory).
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpers.errors import RunDirectoryError

Changes = dict[str, NDArray[np.float32]]  # by array name, (users, out, in)


class PersonalStore:
    """Personal arrays of all users; a row that was never written reads as the public initial value."""

    def __init__(self, directory: Path, users: int, initial: Mapping[str, Tensor]) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.initial = dict(initial)
        self.arrays = {n: _open(directory / f"{n}.npy", np.float32, (users, *t.shape)) for n, t in initial.items()}
        self.written = _open(directory / "written.npy", np.bool_, (users,))
        self._pending: dict[int, dict[str, NDArray[np.float32]]] = {}

    def read(self, users: Sequence[int]) -> dict[str, Tensor]:
        """Return the users' latest rows, staged ones included, (users, out, in) by name."""
        known = np.asarray(self.written[list(users)], dtype=np.bool_)
        result = {}
        for name, array in self.arrays.items():
            rows = np.array(array[list(users)])
            rows[~known] = self.initial[name].numpy()
            for place, user in enumerate(users):
                if user in self._pending:
                    rows[place] = self._pending[user][name]
            result[name] = torch.from_numpy(rows)
        return result

    def stage(self, users: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Remember the users' new rows until `drain`; the disk is not touched."""
        for place, user in enumerate(users):
            self._pending[user] = {name: values[name][place].numpy().copy() for name in self.arrays}

    def drain(self) -> tuple[list[int], Changes]:
        """Return and forget what was staged: users in ascending order and their rows."""
        users = sorted(self._pending)
        rows = {
            name: np.stack([self._pending[user][name] for user in users])
            if users
            else np.zeros((0, *self.initial[name].shape), np.float32)
            for name in self.arrays
        }
        self._pending = {}
        return users, rows

    def apply(self, users: Sequence[int], rows: Changes) -> None:
        """Write rows to disk; doing it twice is harmless."""
        if not len(users):
            return
        for name, array in self.arrays.items():
            array[list(users)] = rows[name]
            array.flush()
        self.written[list(users)] = True
        self.written.flush()


class OwnStore(PersonalStore):
    """The personal arrays of one user, whose position is of no account here: one row."""

    def __init__(self, directory: Path, initial: Mapping[str, Tensor]) -> None:
        super().__init__(directory, 1, initial)

    def read(self, users: Sequence[int]) -> dict[str, Tensor]:
        """Return the latest row, (1, out, in) by name."""
        return super().read([0])

    def stage(self, users: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Remember the new row until `drain`."""
        super().stage([0], values)


def _open(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap[tuple[int, ...], np.dtype[np.generic]]:
    if path.exists():
        try:
            found = np.load(path, mmap_mode="r")  # opened for writing, a cut file would grow zeros
            whole = (found.shape, found.dtype) == (shape, np.dtype(dtype))
        except Exception:  # what numpy's reader of headers raises is of many kinds
            whole = False
        if not whole:
            raise RunDirectoryError(
                f"{path} is damaged; restore it from a copy, or start the run again in a new directory."
            )
    else:
        scratch = path.with_suffix(".partial")
        np.lib.format.open_memmap(scratch, mode="w+", dtype=dtype, shape=shape).flush()
        scratch.chmod(0o600)
        scratch.rename(path)
    array = np.lib.format.open_memmap(path, mode="r+")
    if hasattr(mmap, "MADV_RANDOM"):  # rows are far apart: reading ahead costs a hundred times what a row does
        array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return array
