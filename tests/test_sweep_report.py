"""The page of a sweep: what its runs promise alone and together, the numbers that are stored, and nothing trained."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from matplotlib.figure import Figure
from scipy import stats

import chromium as browser
from conftest import SECRET, Command, opening_fields
from fedpers.config import dump_config, parse_config
from fedpers.errors import LedgerError, RunDirectoryError
from fedpers.evaluation.comparison import holm
from fedpers.figures.style import new_figure, save
from fedpers.privacy.accounting import GaussianEvent, epsilon, gaussian_epsilon
from fedpers.privacy.claim import Claim, rounded_up
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import Opening, Release
from fedpers.privacy.spending import composed, spending
from fedpers.report import citations, sweep_page
from fedpers.report.sweep_page import write_sweep_report
from fedpers.report.sweep_tables import user_by_user
from fedpers.sweep import pictures, place
from fedpers.sweep.grid import Grid, expand
from fedpers.sweep.runner import sweep
from fedpers.sweep.together import together

pytestmark = pytest.mark.pictures
ODD = "tiny<script>&'bert"
DELTA = 1e-3
SECTIONS = [
    "promises", "together", "headline", "figures", "users", "left-out", "configuration", "environment", "reproduce",
    "citations",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def few_figures() -> Iterator[None]:
    """Two small figures that have ids in common; the real ones have tests of their own."""

    def figure(name: str) -> pictures.Figure:
        def draw(results: pa.Table, users: pa.Table, folder: Path) -> list[Path]:
            fig = new_figure(3, 2)
            fig.add_subplot().plot(range(results.num_rows), label=name)
            return save(fig, folder, name)

        return draw

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "FIGURES", (figure("first"), figure("second")))
        yield


@pytest.fixture(scope="module")
def grid(random_tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """Two methods at two levels under two seeds, and two cells that are refused."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(random_tiny_bert, folder / ODD)
    base = {
        "rounds": 2,
        "data": {
            "name": "synthetic", "users": 24, "min_train": 4, "min_test": 6, "max_train": 12, "max_test": 14,
            "max_tokens": 16,
        },
        "task": {"candidates": 4},
        "model": {"backbone": str(folder / ODD), "adapter": {"layers": 1, "rank": 2, "alpha": 4}},
        "local": {"batch_size": 4},
        "personal": {"epochs": 1, "batch_size": 4},
        "engine": {"token_budget": 512, "cohort_size": 12, "threads": 1},
        "evaluation": {"every": 0},
        "privacy": {"unit": "user", "epsilon": 8, "clip": 1, "delta": DELTA, "secret": SECRET},
    }  # fmt: skip
    axes = {"method": ["fedavg", "fedper", "fedalt"], "privacy.epsilon": [float("inf"), 8], "seed": [0, 1]}
    skip = [{"method": "fedalt", "privacy.epsilon": "inf"}]
    return expand({"name": "odd.name_1-x", "base": base, "product": axes, "skip": skip})


@pytest.fixture(scope="module")
def swept(grid: Grid, feature_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep-report") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPERS_CACHE", str(feature_cache))
        patch.setattr(Figure, "savefig", lambda self, where, **_: where.write(b"a run's picture, undrawn"))
        found = sweep(grid, out)
    assert (found.good, found.finished, len(found.refused)) == (True, 10, 2)
    return out


@pytest.fixture(scope="module")
def page(swept: Path) -> str:
    return write_sweep_report(swept).read_text(encoding="utf-8")


@pytest.fixture
def copy(swept: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(swept, tmp_path / "out", ignore=shutil.ignore_patterns("*.html", "figures"))
    return tmp_path / "out"


def section(page: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
    assert found
    return found[1]


def text(part: str) -> str:
    return " ".join(unescape(re.sub("<[^>]+>", " ", part)).split())


def claims(out: Path, grid: Grid) -> dict[str, Claim]:
    return {
        run.label: Claim.from_json((out / "cells" / run.address / "claim.json").read_text(encoding="utf-8"))
        for run in grid.runs
        if (out / "cells" / run.address / "claim.json").exists()
    }


def ledgers(out: Path, grid: Grid, level: str) -> list[Ledger]:
    chosen = [cell for cell in grid.cells if cell.coordinates.get("privacy.epsilon") == level]
    paths = [out / "cells" / cell.address / "ledger.jsonl" for cell in chosen]
    return [Ledger.load(path) for path in paths if path.exists()]


# --- the page ---------------------------------------------------------------------------------------------------------


def test_every_claim_is_there_once_and_in_words(page: str, swept: Path, grid: Grid) -> None:
    assert re.findall(r'<section id="([\w-]+)">', page) == SECTIONS
    said = section(page, "promises")
    blocks = re.findall(r'<div class="claim">(.*?)</details>', said, re.DOTALL)
    found = claims(swept, grid)
    assert len(found) == 10
    assert sum(block.count('<tr><th scope="row">') for block in blocks) == 10
    assert len(blocks) == 3  # private ones, those without privacy, baselines that release nothing
    private = [claim for claim in found.values() if math.isfinite(claim.epsilon) and claim.rounds]
    assert len(private) == 4
    assert len({claim.sentence for claim in private}) == 1
    assert private[0].sentence in text(blocks[0])
    assert "4 runs on synthetic: user-level" in text(blocks[0])
    for name, claim in found.items():
        (row,) = re.findall(rf'<tr><th scope="row">{name}</th>(.*?)</tr>', said, re.DOTALL)
        shown = "∞" if math.isinf(claim.epsilon) else rounded_up(claim.epsilon)
        assert row.startswith(f"<td>{shown}</td>")
        assert claim.ledger_head[:16] in row


def test_claims_that_differ_in_epsilon_alone_stand_together(swept: Path, grid: Grid) -> None:
    one = next(claim for claim in claims(swept, grid).values() if math.isfinite(claim.epsilon) and claim.rounds)
    assert one.record_level is not None

    def other(epsilon: float, **changes: Any) -> Claim:
        was, now = rounded_up(one.epsilon), rounded_up(epsilon)
        return one.model_copy(update={"epsilon": epsilon, "sentence": one.sentence.replace(was, now), **changes})

    low, high = other(1.5), other(4.25)
    server = one.sentence.replace("the server (trusted: it sees raw updates)", "somebody else")
    away = other(4.25, sentence=server.replace(rounded_up(one.epsilon), "4.25"))
    found = sweep_page._promises({"a": high, "b": low, "c": away}, dict.fromkeys("abc", "synthetic"))
    assert [list(group.claims) for group in found] == [["a", "b"], ["c"]]
    assert f"ε = … and δ = {DELTA:g} for one user" in found[0].sentence
    assert "(for one record ε = … at the same δ)" in found[0].sentence
    assert "ε from 1.50 to 4.25" in found[0].label
    assert found[1].sentence == away.sentence
    delta = other(1.5, sentence=low.sentence.replace(f"δ = {DELTA:g}", "δ = 0.002"))
    assert len(sweep_page._promises({"a": high, "b": delta}, dict.fromkeys("ab", "synthetic"))) == 2


def test_all_private_runs_are_added_up_and_those_without_noise_void_it(page: str, swept: Path, grid: Grid) -> None:
    private = ledgers(swept, grid, "8")
    events = [
        GaussianEvent(release.noise_multiplier, release.sampling_rate, 1) for one in private for release in one.releases
    ]
    total = epsilon(events, DELTA)
    assert len(events) == 8
    assert total > 1.5 * max(spending(one.opening, one.releases).total for one in private)
    said = text(section(page, "together"))
    # baselines and refused cells have released nothing, so they count for nothing
    assert "People of synthetic Whoever sees what all 8 runs on these people released is promised nothing" in said
    assert "4 of them added no noise" in said
    promise = (
        f"4 runs promise together at user level (user-central, 24 users) ε = {rounded_up(total)} and δ = {DELTA:g}"
    )
    assert promise in said


def test_the_headline_is_what_the_tables_hold(page: str, swept: Path) -> None:
    table = pd.read_parquet(swept / "users.parquet")
    results = pd.read_parquet(swept / "results.parquet")
    p_values, expected = [], {}
    for method in ("fedavg", "fedper"):
        for level in ("8", "inf"):
            mine = table[(table["method"] == method) & (table["privacy_epsilon"] == level)]
            wide = mine.pivot_table("accuracy", ["seed", "person"], "kind")
            expected[method, level] = [f"{wide['own'].mean():.3f} "]
            for kind in ("local", "global"):
                gains = (wide["own"] - wide[kind]).round(12)
                mean = gains.groupby("person").mean().round(12)
                p = float(stats.wilcoxon(mean, zero_method="pratt").pvalue) if mean.any() else 1.0
                p_values.append(p)
                expected[method, level].append(f"{gains.mean():+.3f} over {kind}, p = ")
            runs = results[(results["method"] == method) & (results["privacy_epsilon"] == level)]
            if level == "8":
                ratio = runs["noise_to_update_adapter"].mean()
                expected[method, level].append(f"noise {ratio:.2f} × adapter update")
    corrected = [f"{p:.1g}" for p in holm(p_values)]
    for method in ("fedavg", "fedper"):
        (row,) = re.findall(rf'<tr data-series="{method}">(.*?)</tr>', page, re.DOTALL)
        cells = [text(cell) for cell in re.findall(r"<td>(.*?)</td>", row, re.DOTALL)]
        assert len(cells) == 2  # the more private first
        for cell, level in zip(cells, ("8", "inf"), strict=True):
            for part in expected[method, level]:
                assert part in cell
            for kind in ("local", "global"):
                assert f"over {kind}, p = {corrected.pop(0)}" in cell
        assert "no noise" in cells[1]
    said = text(section(page, "headline"))
    assert "24 users, 2 seeds" in said
    local = table[(table["method"] == "local") & (table["kind"] == "own")]["accuracy"].mean()
    assert f"Training at home alone, which costs no privacy: {local:.3f} (" in said
    assert "correction for the 8 gains in this table" in said


def test_users_are_those_of_one_level_and_seed(page: str, swept: Path) -> None:
    table = pd.read_parquet(swept / "users.parquet")
    mine = table[(table["privacy_epsilon"] == "8") & (table["seed"] == 0)].set_index(["method", "kind", "user"])
    found = re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    rows = json.loads(found[1])
    assert [row[0] for row in rows] == list(range(24))
    for user, test, train, local, fedavg, fedper, *gains in rows:
        one = mine.loc["fedper", "own", user]
        assert (test, train) == (one["test_records"], one["train_records"])
        values = [mine.loc[key]["accuracy"] for key in (("fedper", "local", user), ("fedavg", "own", user))]
        assert [local, fedavg, fedper] == pytest.approx([*values, one["accuracy"]], abs=1e-6)
        assert gains == pytest.approx([fedavg - local, fedper - local], abs=2e-6)
    assert re.search(r"ε = \d+\.\d\d per user, δ = 0.001, seed 0: all 24 users", text(section(page, "users")))


def test_figures_are_those_that_were_drawn_now(page: str, swept: Path) -> None:
    stored = list((swept / "figures").glob("*.svg"))
    assert page.count("<svg") == len(stored) == 2
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_refused_cells_are_told_with_their_reason(page: str, swept: Path) -> None:
    said = text(section(page, "left-out"))
    refused = place.read(swept, place.REFUSED)
    assert len(refused) == 2
    for entry in refused.values():
        assert " ".join(entry["reason"].split()) in said
    assert "method=fedalt, privacy.epsilon=8, seed=1" in said
    assert "2 refused, 0 failed, 0 not run" in text(page)


def test_the_grid_in_the_page_asks_for_the_same_runs(page: str, grid: Grid) -> None:
    block = re.search(r"<pre[^>]*>(.*?)</pre>", section(page, "configuration"), re.DOTALL)
    assert block
    again = expand(yaml.safe_load(unescape(block[1])), [f"privacy.secret={SECRET}"])
    assert [run.address for run in again.runs] == [run.address for run in grid.runs]
    assert again.name == grid.name
    assert "fedpers sweep odd.name_1-x.yaml --out odd.name_1-x-again" in section(page, "reproduce")
    assert SECRET not in page
    assert ODD not in page


def test_every_kind_of_grid_is_kept_whole(grid: Grid) -> None:
    tree = {
        "name": "whole",
        "product": {"method": ["fedavg", "fedper"]},
        "zip": {"share": ["head", "adapter+head"], "local.lr.head": [0.1, 0.25]},
        "variants": {"few": {"base": grid.tree["base"], "data.users": 6}, "more": {"base": {"rounds": 3}, "rounds": 4}},
        "skip": [{"method": "fedper", "variant": "more"}],
    }
    first = expand(tree, ["seed=3"])
    again = expand(yaml.safe_load(first.to_yaml())["grid"])
    assert [(run.address, run.coordinates) for run in again.runs] == [(r.address, r.coordinates) for r in first.runs]


def test_whom_to_cite_is_the_union(page: str) -> None:
    cited = unescape(section(page, "citations"))
    for entry in (citations.FLOWER, citations.OPACUS, citations.PEFT, citations.method_entry("fedavg")):
        assert cited.count(entry) == 1
    assert cited.count(citations.method_entry("fedper")) == 1
    assert cited.count(citations.HEAD) == 1


# --- without training, in public --------------------------------------------------------------------------------------


def test_nothing_is_trained_and_the_page_is_the_same_again(
    page: str, swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpers import experiment, simulation
    from fedpers.cohort.clients import Clients
    from fedpers.cohort.model import CohortModel
    from fedpers.sweep import runner

    def trained(*_: object, **__: object) -> None:
        raise AssertionError("something was trained")

    for owner, name in (
        (Clients, "__init__"), (CohortModel, "__init__"), (simulation, "simulate"), (runner, "simulate"),
        (experiment, "load"), (simulation, "prepare"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, trained)
    for made in ("results.parquet", "users.parquet"):
        (swept / made).unlink()
    assert write_sweep_report(swept).read_text(encoding="utf-8") == page


def test_a_public_page_holds_nothing_measured_without_noise(page: str, swept: Path, tmp_path: Path, grid: Grid) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("*") if path.is_file()}
    place = write_sweep_report(swept, tmp_path / "page.html", public=True)
    assert place.stat().st_mode & 0o077 == 0o044
    assert (swept / "report.html").stat().st_mode & 0o777 == 0o600
    assert {path: path.stat().st_mtime_ns for path in swept.rglob("*") if path.is_file()} == before
    public = place.read_text(encoding="utf-8")
    measured = {"headline", "figures", "users"}
    assert re.findall(r'<section id="([\w-]+)">', public) == [name for name in SECTIONS if name not in measured]
    table = pd.read_parquet(swept / "results.parquet")
    numbers = [table[f"{kind}_{what}"] for kind in ("own", "local", "global") for what in ("mean", "low", "high")]
    for value in pd.concat([*numbers, table["noise_to_update_adapter"]]).dropna():
        assert f"{value:.3f}" not in public
    for part in ("<svg", "application/json", "× head"):
        assert part in page
        assert part not in public
    folder = str(Path(grid.tree["base"]["model"]["backbone"]).parent)
    assert folder in unescape(page)
    assert folder not in unescape(public)
    assert ODD in unescape(public).replace("''", "'")
    assert section(public, "promises") == section(page, "promises")
    assert section(public, "together") == section(page, "together")


def test_folders_on_an_axis_are_not_public() -> None:
    axes = {"a": {"model.backbone": "/home/me/bert", "seed": "0"}, "b": {"model.backbone": "/srv/bert", "seed": "0"}}
    names = sweep_page._names(axes, public=True)
    assert sorted(names.values()) == ["model.backbone=bert, seed=0 (a)", "model.backbone=bert, seed=0 (b)"]
    assert sweep_page._names(axes, public=False)["b"] == "model.backbone=/srv/bert, seed=0"
    for value in ('{"name": "files", "path": "/home/me/x"}', "relative/x", "/home/me/x"):
        assert not {"home", "me", "relative"} & set(re.split(r"\W+", str(sweep_page._public({"data.path": value}))))
    assert sweep_page._public({"data": {"path": "hub:owner/name"}}) == {"data": {"path": "hub:owner/name"}}
    assert sweep_page._public({"model": {"backbone": "owner/name"}}) == {"model": {"backbone": "owner/name"}}


def test_each_file_of_a_run_is_read_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[Path] = Counter()

    def counting(plain: Any) -> Any:
        def reading(path: Path, *rest: Any, **more: Any) -> Any:
            read[Path(path)] += 1
            return plain(path, *rest, **more)

        return reading

    for kind, name in ((Path, "read_text"), (Path, "read_bytes"), (pq, "read_table")):
        monkeypatch.setattr(kind, name, counting(getattr(kind, name)))
    write_sweep_report(copy)
    names = ["claim.json", "config.yaml", "ledger.jsonl", "rounds.parquet", "summary.json", "users.parquet"]
    of_runs = {path: times for path, times in read.items() if path.parent.parent == copy / "cells"}
    assert {path.name: times for path, times in of_runs.items() if path.name in names} == dict.fromkeys(names, 1)
    assert len([path for path in of_runs if path.name in names]) == 10 * len(names)


# --- refused ----------------------------------------------------------------------------------------------------------


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text(encoding="utf-8")
    assert old in content
    path.write_text(content.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("public", [False, True])
def test_an_edited_ledger_is_told_by_its_run(copy: Path, grid: Grid, public: bool) -> None:
    cell = next(one for one in grid.cells if one.label == "method=fedper, privacy.epsilon=8, seed=1")
    edit(copy / "cells" / cell.address / "ledger.jsonl", '"noise_multiplier":', '"noise_multiplier":1')
    with pytest.raises(LedgerError, match=r"^method=fedper, privacy\.epsilon=8, seed=1: .*line 2"):
        write_sweep_report(copy, public=public)
    with pytest.raises(LedgerError, match=r"^method=fedper, privacy\.epsilon=8, seed=1: .*line 2"):
        together(copy, lambda address: {run.address: run.label for run in grid.runs}[address])
    assert not list(copy.glob("*.html"))


def test_a_sweep_that_cannot_be_shown_is_refused(copy: Path, grid: Grid, fedpers: Command) -> None:
    code, out, err = fedpers("report", copy, "--public")
    assert (code, out.strip()) == (0, str(copy / "report-public.html"))
    assert err.startswith("making tables and figures")
    environment = copy / "cells" / grid.cells[0].address / "environment.json"
    found = json.loads(environment.read_text(encoding="utf-8"))
    environment.write_text(json.dumps({**found, "fedpers": "7.3.1"}), encoding="utf-8")
    with pytest.raises(RunDirectoryError, match=rf"^{grid.cells[0].label}: .*made by fedpers 7\.3\.1"):
        write_sweep_report(copy)
    (copy / place.FAILED).write_text("{", encoding="utf-8")
    environment.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(RunDirectoryError, match=r"failed\.json is damaged"):
        write_sweep_report(copy)
    about = yaml.safe_load((copy / place.GRID).read_text(encoding="utf-8"))
    place.write(copy, place.GRID, yaml.safe_dump({**about, "fedpers": "7.3.1"}))
    with pytest.raises(RunDirectoryError, match=r"made by fedpers 7\.3\.1"):
        write_sweep_report(copy)
    place.write(copy, place.GRID, "runs: []\n")
    code, out, err = fedpers("report", copy)
    assert (code, out) == (2, "")
    assert "damaged or of an earlier version" in err
    assert err.count("\n") == 2


def test_what_is_missing_and_what_failed_is_told(copy: Path, grid: Grid) -> None:
    gone, failed, *others = grid.cells
    (copy / "cells" / gone.address / "summary.json").unlink()
    (copy / "cells" / failed.address / "summary.json").unlink()
    entry = {
        "coordinates": dict(failed.coordinates),
        "type": "DataError",
        "message": "nobody; see /home/me",
        "attempts": 1,
    }
    place.write(copy, place.FAILED, {failed.address: entry, "0" * 16: entry})
    shown = sweep_page.collect(copy, public=True)
    assert (shown.finished, shown.missing, shown.failed) == (8, [gone.label], {failed.label: "DataError"})
    assert "what all 8 runs on these people released" in shown.together[0].sentences[0]  # also of those without an end
    for cell in [*others, *grid.baselines]:
        (copy / "cells" / cell.address / "summary.json").unlink(missing_ok=True)
    with pytest.raises(RunDirectoryError, match="none of its runs is finished"):
        write_sweep_report(copy)


# --- promises together, by hand ---------------------------------------------------------------------------------------


def made(out: Path, name: str, unit: Any, lines: list[dict[str, Any]], members: int = 0, **changes: Any) -> Ledger:
    """A cell whose ledger has such lines; `members` tells whose it is."""
    folder = out / "cells" / name
    (folder / "private").mkdir(parents=True)
    config = parse_config({"data": {"name": "files", "path": "/home/me/chats.csv", "users": 6}})
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "private" / "members.json").write_text(json.dumps([f"user-{members}-{n}" for n in range(6)]))
    special = {"population": 6, "protected": 6, "shared_names": ["adapter"]}
    ledger = Ledger.create(folder / "ledger.jsonl", Opening(**opening_fields(unit, **{**special, **changes})))
    for number, line in enumerate(lines, start=1):
        noised = bool(line.get("noise_multiplier", 1))
        fields = {
            "round": number, "mechanism": "gaussian" if noised else "none", "noise_multiplier": 4.0, "clip": 1.0,
            "sampling_rate": 1.0, "steps": 1, "clients": None, "noise_address": f"{number:064x}" if noised else "",
            "release_hash": hashlib.sha256(name.encode()).hexdigest(),
        }  # fmt: skip
        ledger.append(Release(**{**fields, **line}))
    return ledger


LOCAL = {
    "trust": "user-local", "amplification": "none", "client_sampling": "poisson",
    "adjacency": "replace-one: one registered user's records replaced by any others",
}  # fmt: skip


def test_numbers_of_other_people_are_not_taken_for_the_same(tmp_path: Path) -> None:
    """User 0 is in both runs; of the same people it is one person, of others it may be anybody."""
    one = made(tmp_path, "a", "user", [{"clients": [0]}, {"clients": [0]}], members=1, **LOCAL)
    two = made(tmp_path, "b", "user", [{"clients": [1]}], members=2, **LOCAL)
    same = gaussian_epsilon(2 * math.sqrt(2) / 4, 1e-5)
    apart = gaussian_epsilon(2 * math.sqrt(3) / 4, 1e-5)
    assert composed([one, two]) == pytest.approx(same)
    assert composed([one, two], ["x", "y"]) == pytest.approx(apart)
    (found,) = together(tmp_path)
    assert found.source == "files chats.csv"
    assert any(f"2 runs promise together at user level (user-local, 6 users) ε = {rounded_up(apart)}" in s
               for s in found.sentences)  # fmt: skip
    (tmp_path / "cells/b/private/members.json").write_bytes((tmp_path / "cells/a/private/members.json").read_bytes())
    (found,) = together(tmp_path)
    assert any(f"ε = {rounded_up(same)}" in sentence for sentence in found.sentences)


def test_kinds_are_not_mixed(tmp_path: Path) -> None:
    """Banded noise moves with who takes part, so its multiplier is not that of independent noise."""
    everybody = {"client_sampling": "all", "trust": "user-central"}
    banded = {**everybody, "amplification": "none", "coefficients": [1.0, 0.5]}
    one = made(tmp_path, "a", "user", [{}, {}], **everybody)
    two = made(tmp_path, "b", "user", [{"clients": [0, 1]}, {"clients": [0, 1]}], **banded)
    with pytest.raises(LedgerError, match="the same trust"):
        composed([one, two])
    (found,) = together(tmp_path)
    assert sum("1 run promises at user level" in sentence for sentence in found.sentences) == 2
    assert any("not added up" in sentence for sentence in found.sentences)
    assert not any("promised nothing" in sentence for sentence in found.sentences)


def test_fixed_samples_of_several_sizes_are_taken_as_the_largest(tmp_path: Path) -> None:
    fixed = {
        "client_sampling": "fixed", "adjacency": "replace-one: one registered user's records replaced by any others",
        "population": 100, "protected": 100,
    }  # fmt: skip
    few = made(tmp_path, "a", "user", [{"noise_multiplier": 2.0, "sampling_rate": 0.02}], **fixed)
    many = made(tmp_path, "b", "user", [{"noise_multiplier": 2.1, "sampling_rate": 0.5}], **fixed)
    assert composed([few, many]) > max(spending(one.opening, one.releases).total for one in (few, many))
    assert composed([few, many]) == composed([many, few])


def test_records_get_sums_and_never_more(tmp_path: Path) -> None:
    line = {"steps": 3, "sampling_rate": 0.25, "clients": [0, 1]}
    runs = [made(tmp_path, name, "record", [{**line, "noise_multiplier": z}]) for name, z in (("a", 2.0), ("b", 3.0))]
    total = sum(epsilon([GaussianEvent(z, 0.25, 3)], 1e-5) for z in (2.0, 3.0))
    assert sum(spending(one.opening, one.releases).total for one in runs) == pytest.approx(total)
    (found,) = together(tmp_path)
    said = f"2 runs promise together at record level no more than ε = {rounded_up(total)} and δ = 2e-05 for one record"
    assert any(said in sentence for sentence in found.sentences)
    made(tmp_path, "c", "record", [line], delta=0.2)
    (found,) = together(tmp_path)
    assert any("at record level nothing that can be said" in sentence for sentence in found.sentences)
    made(tmp_path, "d", "user", [{"noise_multiplier": 0.0, "clip": 1.0, "sampling_rate": 0.5}])
    (found,) = together(tmp_path)
    assert "what all 4 runs on these people released is promised nothing: 1 of them" in found.sentences[0]


# --- many users -------------------------------------------------------------------------------------------------------


def tables(users: int, methods: tuple[str, ...] = ("fedavg", "fedper")) -> tuple[pa.Table, pa.Table]:
    """A private level and one without privacy, of made-up numbers."""
    rng = np.random.default_rng(0)
    runs = [
        {"hash": f"{method}-{level}", "baseline": "home", "data": "d", "method": method, "seed": 4,
         "privacy_epsilon": level, "claim": "", "unit": unit, "epsilon": eps, "delta": delta, "metric": "rmse",
         "higher_is_better": False}
        for method in methods
        for level, unit, eps, delta in (("inf", "none", math.inf, None), ("1", "user", 0.99, 1e-5))
    ]  # fmt: skip
    rows = [
        {
            "hash": run["hash"],
            "user": user,
            "kind": kind,
            "test_records": 9,
            "train_records": 8,
            "rmse": rng.random() if kind == "own" else user / 10,
        }
        for run in runs
        for user in range(users)
        for kind in ("own", "local")
    ]
    return pa.Table.from_pylist(runs), pa.Table.from_pylist(rows)


def test_of_many_users_the_first_are_shown_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpers.report.sweep_tables.SHOWN", 5)
    results, users = tables(9)
    found = user_by_user(results, users)
    assert found
    assert (found.everybody, [row[0] for row in found.table.rows]) == (9, [0, 1, 2, 3, 4])
    assert found.which == "d, ε = 0.99 per user, δ = 1e-05, seed 4"
    (own, local) = users.filter(pc.and_(pc.equal(users["hash"], "fedper-1"), pc.equal(users["user"], 2)))[
        "rmse"
    ].to_pylist()
    assert found.table.rows[2][-1] == pytest.approx(local - own, abs=1e-6)  # a lower error is a gain


def test_runs_on_other_people_are_not_put_beside_them() -> None:
    results, users = tables(4)
    fewer = users.filter(pc.or_(pc.not_equal(users["hash"], "fedper-1"), pc.less(users["user"], 3)))
    found = user_by_user(results, fewer)
    assert found
    heads = [column.head for column in found.table.columns]
    assert heads == ["user", "test records", "training records", "local rmse", "fedavg: own rmse",
                     "fedavg: gain over local"]  # fmt: skip


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    with browser.chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.mark.slow
@pytest.mark.skipif(not browser.PROGRAM.exists(), reason="needs a browser: apt-get install chromium")
class TestBrowser:
    @pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
    def test_it_opens_without_complaints_and_fits(
        self, tab: browser.Tab, page: str, swept: Path, tmp_path: Path, width: int, dark: bool
    ) -> None:
        assert page
        for shown in (swept / "report.html", write_sweep_report(swept, tmp_path / "public.html", public=True)):
            tab.open(shown, width, dark=dark)
            assert tab.errors == []
            assert tab.run("document.documentElement.scrollWidth") <= width
            tab.run("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert tab.run("document.documentElement.scrollWidth") <= width
            assert tab.photograph(tmp_path / f"{shown.stem}-{width}.png").stat().st_size > 10_000

    def test_users_are_sorted_and_searched(self, tab: browser.Tab, page: str, swept: Path) -> None:
        assert page
        tab.open(swept / "report.html", 1280)
        head = "fedper: gain over local"
        heads = "[...document.querySelectorAll('#users th')]"
        place = tab.run(f"{heads}.findIndex(h => h.textContent == {head!r})")
        column = f"[...document.querySelectorAll('#users tbody tr')].map(r => Number(r.cells[{place}].textContent))"
        for turn in (1, -1):
            tab.run(f"{heads}[{place}].querySelector('button').click()")
            gains = tab.run(column)
            assert gains == sorted(gains, reverse=turn < 0)
            assert len(set(gains)) > 1
        tab.run("document.querySelector('#users input').focus()")
        tab.call("Input.insertText", text="23")
        assert tab.run("document.querySelector('#users [role=status]').textContent") == "1 of 24 users."
