"""Where a run may lie. Nothing heavy is imported here, so that a directory that is taken is told at once."""

from __future__ import annotations

from pathlib import Path

from fedpers.errors import RunDirectoryError

_FIRST = {"private", "environment.json", ".environment.json.partial", ".config.yaml.partial"}  # before a run counts


class RunPlace:
    """A directory that holds a run, or may come to hold one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def started(self) -> bool:
        """Whether there is a run to continue; config.yaml is the first file that counts."""
        return (self.path / "config.yaml").exists()

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; summary.json is written last."""
        return (self.path / "summary.json").exists()

    def check_free(self) -> None:
        """Raise RunDirectoryError unless a new run may be written here."""
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is a file; choose a new directory with --out.")
        if self.started or (self.path.exists() and any(item.name not in _FIRST for item in self.path.iterdir())):
            raise RunDirectoryError(
                f"{self.path} holds another run; continue it with --resume, or choose a new directory with --out."
            )


def place_of_run(out: Path | str | None, name: str, resume: bool = False) -> RunPlace:
    """Return where a run is to be written, or continued: `out`, or by default `runs/NAME`, numbered if taken.

    Raises:
        RunDirectoryError: the place is taken, and there is no run to continue.
    """
    place = RunPlace(Path(out) if out is not None else free_directory(name, resume))
    if not (resume and place.started):
        place.check_free()
    return place


def free_directory(name: str, resume: bool = False) -> Path:
    """Return `runs/NAME`, or the first free `NAME-2`, `NAME-3`, ...; to resume, the latest that was stopped."""
    places = [RunPlace(Path("runs", one)) for one in (name, *(f"{name}-{number}" for number in range(2, 10_000)))]
    first = next(index for index, one in enumerate(places) if not one.path.exists())
    if not resume or first == 0:
        return places[first].path
    return ([one for one in places[:first] if not one.finished] or places[:first])[-1].path


def new_directory(out: Path | None, name: str) -> Path:
    """Return `out`, or a free directory under runs/; raises RunDirectoryError if `out` exists."""
    if out is not None:
        check_new(out)
    return out or free_directory(name)


def check_new(path: Path) -> None:
    """Raise RunDirectoryError if there is anything by this name."""
    if path.exists():
        raise RunDirectoryError(f"{path} exists already; choose a new directory.")


def check_empty(path: Path) -> None:
    """Raise RunDirectoryError unless this is a new or an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunDirectoryError(f"{path} holds something already; choose a new directory with --out.")
