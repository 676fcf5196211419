"""The pages: they say what is stored, nothing more than may be shown, and work in a browser without a network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from html import unescape
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

import chromium as browser
from conftest import SECRET, Command
from fedpers.config import parse_config
from fedpers.errors import ConfigError, LedgerError, RunDirectoryError
from fedpers.evaluation.comparison import holm
from fedpers.evaluation.per_user import users_table, write_table
from fedpers.evaluation.statistics import MINIMUM_RECORDS
from fedpers.registry import names
from fedpers.report import citations
from fedpers.report.compare import compare_runs, write_comparison
from fedpers.report.html import SHOWN
from fedpers.report.page import write_report
from fedpers.report.tables import FEW
from fedpers.simulation import simulate

ODD = "tiny<script>&'bert"  # a folder's name that would be markup if it were not escaped
PAGES = shutil.ignore_patterns("*.html")
SECTIONS = [
    "claim", "headline", "figures", "users", "configuration", "environment", "reproduce", "forecast", "citations",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(random_tiny_bert: Path, feature_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run at user level, with its figures drawn and a forecast asked for."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(random_tiny_bert, folder / ODD)
    config = parse_config({
        "name": "odd.name_1-x", "seed": 3, "rounds": 2, "method": "fedrep",
        "data": {
            "name": "synthetic", "users": 24, "min_train": 4, "min_test": 6, "max_train": 12, "max_test": 14,
            "max_tokens": 16,
        },
        "task": {"candidates": 4},
        "model": {"backbone": str(folder / ODD), "adapter": {"layers": 1, "rank": 2, "alpha": 4}},
        "local": {"batch_size": 4},
        "personal": {"epochs": 2, "batch_size": 4},
        "engine": {"token_budget": 512, "cohort_size": 12, "threads": 1},
        "privacy": {
            "unit": "user", "epsilon": 8, "clip": 1, "delta": 1e-3, "population": 48, "secret": SECRET,
        },
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPERS_CACHE", str(feature_cache))
        return simulate(config, folder / "run").path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(finished, tmp_path / "run", ignore=PAGES)
    return tmp_path / "run"


def summary(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text(encoding="utf-8")))


def change(path: Path, **values: Any) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(tree | values), encoding="utf-8")


def section(page: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
    assert found
    return found[1]


def cells(page: str, kind: str) -> list[str]:
    """The texts of the headline's row of a kind of model."""
    found = re.search(rf'<tr data-kind="{kind}">(.*?)</tr>', page, re.DOTALL)
    assert found
    return [unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall(r"<td>(.*?)</td>", found[1], re.DOTALL)]


def rows(page: str) -> list[list[Any]]:
    found = re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return list(json.loads(found[1]))


# --- one run ----------------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_run_stored(finished: Path) -> None:
    page = write_report(finished).read_text(encoding="utf-8")
    claim = json.loads((finished / "claim.json").read_text(encoding="utf-8"))
    stored = summary(finished)
    assert re.findall(r'<section id="(\w+)">', page) == SECTIONS
    said = unescape(section(page, "claim"))
    assert stored["claim"] in said
    assert claim["sentence"] in said
    for kind, one in stored["metrics"].items():
        low, high = one["ci95"]
        worst = "–" if one["worst_decile"] is None else f"{one['worst_decile']:.3f}"
        expected = [f"{one['mean']:.3f}{low:.3f} to {high:.3f}", worst, str(one["n_users"])]
        if versus := stored["comparisons"].get(kind):
            null, least = versus["null_helped"], versus["minimum_detectable_effect"]
            expected += [
                "{:+.3f}{:.3f} to {:.3f}".format(versus["mean_gain"], *versus["ci95"]),
                f"{versus['helped']:g} / {versus['tied']:g} / {versus['harmed']:g}"
                f"{null['low']:g} to {null['high']:g} helped by chance",
                f"{versus['p_value']:.1g}",
                "–" if least is None else f"{least:.3f}",
            ]
        else:
            expected += [""] * 4
        assert cells(page, kind) == expected
    assert set(stored["metrics"]) == {"own", "global", "local", "zero_shot", "swap"}
    assert stored["noise_to_update"]
    for family, ratio in stored["noise_to_update"].items():
        assert f"{family} {ratio:.2f}" in section(page, "headline")
    environment = json.loads((finished / "environment.json").read_text(encoding="utf-8"))
    assert all(version in section(page, "environment") for version in environment["packages"].values())
    assert "fedpers run config.yaml seed=3 --out odd.name_1-x-again" in section(page, "reproduce")


def test_the_forecast_stands_apart_and_is_called_none(finished: Path) -> None:
    page = write_report(finished).read_text(encoding="utf-8")
    forecast = json.loads((finished / "forecast.json").read_text(encoding="utf-8"))["sentence"]
    assert page.count(forecast) == 1
    assert forecast in section(page, "forecast")
    assert "no claim" in section(page, "forecast")


def test_every_user_is_there_as_the_headline_counts_them(finished: Path) -> None:
    page = write_report(finished).read_text(encoding="utf-8")
    stored, table = summary(finished), pq.read_table(finished / "users.parquet").to_pylist()
    values = {(row["user"], row["kind"]): row for row in table}
    found = rows(page)
    assert [row[0] for row in found] == sorted({user for user, _ in values})
    for user, test, train, *metrics, gain, outcome in found:
        own = values[user, "own"]
        assert (test, train) == (own["test_records"], own["train_records"])
        assert metrics == [
            values[user, kind]["accuracy"] if (user, kind) in values else None for kind in stored["metrics"]
        ]
        assert gain == pytest.approx(own["accuracy"] - values[user, "global"]["accuracy"], abs=1e-9)
        assert (outcome == FEW) == (test < MINIMUM_RECORDS)
    outcomes = [row[-1] for row in found]
    for word in ("helped", "tied", "harmed"):
        assert outcomes.count(word) == stored[word]
    assert 0 < outcomes.count(FEW) < len(found)


def test_a_public_page_holds_nothing_measured_without_noise(finished: Path, tmp_path: Path) -> None:
    place = write_report(finished, tmp_path / "page.html", public=True)
    page, stored = place.read_text(encoding="utf-8"), summary(finished)
    assert "left out" in page
    assert re.findall(r'<section id="(\w+)">', page) == [one for one in SECTIONS if one not in SECTIONS[1:4]]
    members = json.loads((finished / "private" / "members.json").read_text(encoding="utf-8"))
    private = write_report(finished).read_text(encoding="utf-8")
    numbers = [f"{value:.3f}" for one in stored["metrics"].values() for value in (one["mean"], *one["ci95"])]
    ratios = [f"{family} {value:.2f}" for family, value in stored["noise_to_update"].items()]
    for text in (*numbers, *ratios, "<svg", "application/json", f"{stored['seconds']:.0f} seconds", stored["reading"]):
        assert text in unescape(private)
        assert text not in unescape(page)
    assert not [one for one in members if one in page or one in private]
    assert str(finished.parent) in private  # the backbone's folder
    assert str(finished.parent) not in page
    assert stored["claim"] in page


def test_who_may_read_a_page(run: Path) -> None:
    place = write_report(run)
    assert (place, place.stat().st_mode & 0o777) == (run / "report.html", 0o600)
    place.chmod(0o644)
    assert write_report(run).stat().st_mode & 0o777 == 0o600
    place = write_report(run, public=True)
    assert (place.name, place.stat().st_mode & 0o077) == ("report-public.html", 0o044)


def test_no_page_shows_the_secret(finished: Path, tmp_path: Path) -> None:
    for public in (False, True):
        page = write_report(finished, tmp_path / "page.html", public=public).read_text(encoding="utf-8")
        assert SECRET not in page
        assert SECRET[:6] not in page


@pytest.mark.parametrize("public", [False, True])
def test_values_are_text_and_nothing_is_loaded(finished: Path, tmp_path: Path, public: bool) -> None:
    page = write_report(finished, tmp_path / "page.html", public=public).read_text(encoding="utf-8")
    assert ODD not in page
    assert ODD in unescape(section(page, "configuration")).replace("''", "'")  # YAML doubles the quote
    scripts = re.findall(r"<script( [^>]*)?>(.*?)</script>", page, re.DOTALL)
    own = [text for attributes, text in scripts if not attributes]
    assert len(own) == 1
    assert len(scripts) == (1 if public else 2)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    digest = base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode()
    directives = unescape(policy[1])
    assert "default-src 'none'" in directives
    assert f"script-src 'sha256-{digest}'" in directives
    assert "connect-src" not in directives
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_figures_do_not_share_ids(finished: Path, tmp_path: Path) -> None:
    stored = sorted((finished / "figures").glob("*.svg"))
    assert len(stored) >= 2
    ids = [re.findall(r'\bid="([^"]+)"', path.read_text(encoding="utf-8")) for path in stored]
    assert set(ids[0]) & set(ids[1])  # so they would collide
    page = write_report(finished, tmp_path / "page.html").read_text(encoding="utf-8")
    found = re.findall(r'\bid="([^"]+)"', page)
    assert len(found) == len(set(found)) == sum(map(len, ids)) + len(SECTIONS)
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
    assert references
    assert {one or other for one, other in references} <= set(found)
    assert page.count("<svg") == len(stored)


def test_a_page_is_made_without_a_model_and_is_the_same_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedpers.cohort.clients import Clients
    from fedpers.cohort.model import CohortModel

    monkeypatch.setattr(Clients, "__init__", None)
    monkeypatch.setattr(CohortModel, "__init__", None)
    before = write_report(finished).read_bytes()
    assert write_report(finished).read_bytes() == before


# --- refused ----------------------------------------------------------------------------------------------------------


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "stopped": (lambda run: (run / "summary.json").unlink(), RunDirectoryError, "no finished run"),
    "another version": (
        lambda run: change(run / "environment.json", fedpers="7.3.1"), RunDirectoryError, "made by fedpers 7.3.1",
    ),
    "environment lost": (lambda run: (run / "environment.json").unlink(), RunDirectoryError, "damaged or missing"),
    "summary cut": (lambda run: (run / "summary.json").write_text("{"), RunDirectoryError, "damaged or missing"),
    "summary without its numbers": (
        lambda run: (run / "summary.json").write_text("{}"), RunDirectoryError, "lacks metric",
    ),
    "ledger edited": (
        lambda run: edit(run / "ledger.jsonl", '"noise_multiplier":', '"noise_multiplier":1'), LedgerError, "line",
    ),
    "claim edited": (lambda run: change(run / "claim.json", epsilon=0.5), LedgerError, "another claim"),
    "claim of another ledger": (lambda run: change(run / "claim.json", ledger_head="0" * 64), LedgerError, "last line"),
    "claim of another form": (lambda run: change(run / "claim.json", magic=1), LedgerError, "claim.json is damaged"),
    "users cut": (lambda run: (run / "users.parquet").write_bytes(b"PAR1"), RunDirectoryError, "users.parquet"),
    "configuration of another version": (
        lambda run: edit(run / "config.yaml", "rounds:", "rouns:"), ConfigError, "'rouns'",
    ),
    "a figure that is none": (
        lambda run: (run / "figures" / "a.svg").write_text("<p>"), RunDirectoryError, "no SVG figure",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_run_that_cannot_be_trusted_is_refused(case: str, run: Path) -> None:
    spoil, error, says = BROKEN[case]
    spoil(run)
    with pytest.raises(error, match=says):
        write_report(run)
    assert not (run / "report.html").exists()


def test_an_edited_ledger_is_refused_by_compare(finished: Path, run: Path) -> None:
    edit(run / "ledger.jsonl", '"noise_multiplier":', '"noise_multiplier":1')
    with pytest.raises(LedgerError, match="line"):
        compare_runs([finished, run.rename(run.with_name("other"))])


def test_nothing_but_a_page_is_written_over(run: Path) -> None:
    before = (run / "ledger.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        write_report(run, run / "ledger.jsonl")
    assert (run / "ledger.jsonl").read_bytes() == before
    with pytest.raises(RunDirectoryError, match="Cannot write"):
        write_report(run, run / "nowhere" / "page.html")


def test_on_the_command_line(fedpers: Command, run: Path) -> None:
    code, out, err = fedpers("report", run)
    assert (code, out.strip(), err) == (0, str(run / "report.html"), "")
    code, out, err = fedpers("report", run / "figures")
    assert (code, out) == (2, "")
    assert "neither a run nor a sweep" in err
    assert err.count("\n") == 1
    code, out, err = fedpers("compare", run, run)
    assert (code, out) == (2, "")
    assert "two or more different runs" in err
    shutil.copytree(run, run.with_name("other"))
    code, out, err = fedpers("compare", run, run.with_name("other"))
    assert (code, out.strip(), err) == (0, str(run.with_name("compare.html")), "")


# --- runs against each other ------------------------------------------------------------------------------------------


def hand_made(finished: Path, place: Path, own: list[float], records: int = 20) -> Path:
    """A copy of the run whose users.parquet says that the own models have these accuracies, user by user."""
    shutil.copytree(finished, place, ignore=PAGES)
    made = []
    for user, accuracy in enumerate(own):
        row = {"seed": 3, "user": user, "test_records": records, "train_records": 9, "accuracy": accuracy, "mrr": 0.5,
               "loss": 1.0, "only_own": 0, "only_other": 0}  # fmt: skip
        made += [row | {"kind": kind} for kind in ("own", "global")]
    write_table(users_table(made), place / "users.parquet")
    return place


@pytest.fixture
def three(finished: Path, tmp_path: Path) -> tuple[list[Path], list[list[float]]]:
    """Three runs on the same ten people."""
    first = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.3, 0.2, 0.1]
    second = [
        one + more for one, more in zip(first, (5, 1, 2, 3, 4, 6, 0, 7, 8, -1), strict=True) for more in [more / 50]
    ]
    third = [one - more / 20 for one, more in zip(first, (0, 0, 1, 2, 0, 1, 0, -1, 0, 0), strict=True)]
    own = [first, second, third]
    return [hand_made(finished, tmp_path / name, one) for name, one in zip("abc", own, strict=True)], own


def test_people_are_paired_and_corrected(three: tuple[list[Path], list[list[float]]]) -> None:
    paths, own = three
    found = compare_runs(paths)
    assert list(found.paired) == ["b", "c"]
    assert found.unpaired == {}
    gains = [np.round(np.array(one) - np.array(own[0]), 12) for one in own[1:]]
    p_values = [float(stats.wilcoxon(one, zero_method="pratt").pvalue) for one in gains]
    for one, gain, p, corrected in zip(found.paired.values(), gains, p_values, holm(p_values), strict=True):
        assert one.versus.gain == pytest.approx(gain.mean())
        assert one.versus.p_value == pytest.approx(p)
        assert one.versus.p_corrected == pytest.approx(corrected)
    counts = [(one.better, one.same, one.worse) for one in found.paired.values()]
    assert counts == [(8, 1, 1), (1, 6, 3)]
    assert found.users
    for user, records, a, b, c, b_gain, c_gain in found.users.rows:
        assert (records, a, b, c) == (20, own[0][user], own[1][user], own[2][user])
        assert (b_gain, c_gain) == (pytest.approx(b - a), pytest.approx(c - a))
    page = write_comparison(paths).read_text(encoding="utf-8")
    assert "p by Holm" in page
    assert [f"{one.versus.gain:+.3f}" in section(page, "paired") for one in found.paired.values()] == [True, True]
    assert rows(page) == [list(row) for row in found.users.rows]
    assert "p by Holm" not in write_comparison(paths[:2]).read_text(encoding="utf-8")


def test_where_less_is_better_the_sign_turns(three: tuple[list[Path], list[list[float]]]) -> None:
    paths, own = three
    for path in paths:
        change(path / "summary.json", higher_is_better=False)
    found = compare_runs(paths)
    assert found.paired["b"].versus.gain == pytest.approx(np.mean(own[0]) - np.mean(own[1]))
    assert (found.paired["b"].better, found.paired["b"].worse) == (1, 8)
    assert found.users
    assert [row[5] for row in found.users.rows] == pytest.approx([a - b for a, b in zip(*own[:2], strict=True)])


def other_members(path: Path) -> None:
    edit(path / "private" / "members.json", "-00001", "-99999")


UNPAIRED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another seed": (lambda path: edit(path / "config.yaml", "seed: 3", "seed: 4"), "the seed differs"),
    "other data": (lambda path: edit(path / "config.yaml", "max_test: 14", "max_test: 13"), "the data section differs"),
    "other questions": (lambda path: edit(path / "config.yaml", "candidates: 4", "candidates: 5"), "the task section"),
    "other members": (other_members, "members are others"),
}


@pytest.mark.parametrize("case", UNPAIRED)
def test_other_people_are_not_paired(case: str, three: tuple[list[Path], list[list[float]]]) -> None:
    paths, _ = three
    spoil, says = UNPAIRED[case]
    spoil(paths[1])
    found = compare_runs(paths)
    assert list(found.paired) == ["c"]
    assert says in found.unpaired["b"]
    page = write_comparison(paths).read_text(encoding="utf-8")
    assert says in unescape(section(page, "paired"))
    assert "p by Holm" not in page
    alone = write_comparison(paths[:2]).read_text(encoding="utf-8")
    assert "User by user" not in alone


def test_other_test_records_are_not_paired(three: tuple[list[Path], list[list[float]]], finished: Path) -> None:
    paths, own = three
    shutil.rmtree(paths[1])
    hand_made(finished, paths[1], own[1], records=21)
    assert "other people or test records" in compare_runs(paths).unpaired["b"]


def test_only_what_differs_is_listed(three: tuple[list[Path], list[list[float]]]) -> None:
    paths, _ = three
    assert compare_runs(paths).differences == {}
    edit(paths[1] / "config.yaml", "method: fedrep", "method: fedper")
    edit(paths[2] / "config.yaml", "epsilon: 8.0", "epsilon: 8.5")
    assert compare_runs(paths).differences == {
        "method": ["fedrep", "fedper", "fedrep"],
        "privacy.epsilon": ["8.0", "8.0", "8.5"],
    }


def test_other_metrics_are_refused(three: tuple[list[Path], list[list[float]]]) -> None:
    paths, _ = three
    change(paths[1] / "summary.json", metric="rmse", task="rating")
    with pytest.raises(ConfigError, match="b: rmse of rating"):
        compare_runs(paths)


def test_odd_directory_names_are_text(three: tuple[list[Path], list[list[float]]]) -> None:
    paths, _ = three
    odd = paths[1].rename(paths[1].with_name(ODD))
    page = write_comparison([paths[0], odd]).read_text(encoding="utf-8")
    assert ODD not in page
    assert ODD in unescape(page)


# --- citations --------------------------------------------------------------------------------------------------------


def test_every_method_brings_its_title_along() -> None:
    entries = {name: citations.method_entry(name) for name in names("methods")}
    plain = {name for name, entry in entries.items() if entry.startswith("%")}
    assert plain == {"local", "centralized"}
    keys = [re.search(r"\{(\w+),", entry) for name, entry in entries.items() if name not in plain]
    assert len({key[1] for key in keys if key}) == len(entries) - 2
    for name in set(entries) - plain:
        title = re.search(r"title=\{\{(.*)\}\}", entries[name])
        assert title
        assert title[1][0].isupper(), name  # a lost title would be "(name)"
    assert entries["fedrep"] == (
        "@inproceedings{collins2021fedrep,\n"
        "  title={{Exploiting Shared Representations for Personalized Federated Learning}},\n"
        "  author={Collins and Hassani and Mokhtari and Shakkottai},\n"
        "  booktitle={ICML},\n"
        "  year={2021}\n}"
    )
    assert "Zhuang and others" in entries["hydra"]
    assert "eprint={2003.13461}" in entries["apfl"]
    assert "{Agüera y Arcas}" in entries["fedavg"]


def test_data_and_models_bring_theirs() -> None:
    assert "hutto2014vader" in citations.data_entry("vader")
    assert "harper2015movielens" in citations.data_entry("movielens")
    assert "title={{LaMP: When Large Language Models Meet Personalization}}" in citations.data_entry("lamp")
    longlamp = citations.data_entry("longlamp")
    assert "eprint={2407.11016}" in longlamp
    assert "title={{LongLaMP: A Benchmark for Personalized Long-form Text Generation}}" in longlamp
    assert citations.data_entry("files").startswith("% data files: its file says 'none'")
    assert citations.method_entry("of-another-house").startswith("% method of-another-house: not installed")
    assert "wang2020minilm" in citations.bibtex(parse_config({"method": "fedrep"}))


def test_programs_are_cited_as_they_ask() -> None:
    """The titles are those in the packages' own descriptions; and only what a run used is cited."""
    for package, entry in (("flwr", citations.FLOWER), ("opacus", citations.OPACUS), ("peft", citations.PEFT)):
        title = re.search(r"title=(\{.*\}),", entry)
        assert title
        assert title[1] in metadata(package).json["description"]
    assert "@article{opacus" not in citations.bibtex(parse_config({}))
    private = parse_config({"privacy": {"unit": "user", "clip": 1, "epsilon": 8}})
    assert "@article{opacus" in citations.bibtex(private)
    assert "@misc{peft" in citations.bibtex(private)
    assert "@misc{peft" not in citations.bibtex(parse_config({"method": "linear-probe", "share": "head"}))


# --- in a browser -----------------------------------------------------------------------------------------------------

in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(not browser.PROGRAM.exists(), reason="needs a browser: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    with browser.chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def column(tab: browser.Tab, head: str) -> list[str]:
    place = tab.run(f"[...document.querySelectorAll('#users th')].findIndex(h => h.textContent == {head!r})")
    assert place >= 0
    return list(tab.run(f"[...document.querySelectorAll('#users tbody tr')].map(r => r.cells[{place}].textContent)"))


def order(tab: browser.Tab) -> list[str]:
    return list(tab.run("[...document.querySelectorAll('#users th')].map(h => h.getAttribute('aria-sort'))"))


def press_head(tab: browser.Tab, head: str, how: str) -> None:
    button = f"[...document.querySelectorAll('#users th button')].find(b => b.textContent == {head!r})"
    tab.run(f"{button}.{how}()")


class TestBrowser:
    pytestmark = in_browser

    @pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
    def test_pages_open_without_complaints_and_fit(
        self, tab: browser.Tab, finished: Path, three: tuple[list[Path], list[list[float]]], tmp_path: Path, width: int,
        dark: bool,
    ) -> None:  # fmt: skip
        pages = [
            write_report(finished),
            write_report(finished, tmp_path / "public.html", public=True),
            write_comparison(three[0]),
        ]
        for page in pages:
            tab.open(page, width, dark=dark)
            assert tab.errors == []
            assert tab.run("document.documentElement.scrollWidth") <= width  # wide tables scroll inside their boxes
            shot = tab.photograph(tmp_path / f"{page.stem}-{width}-{'dark' if dark else 'light'}.png")
            assert shot.stat().st_size > 10_000

    def test_sorting_by_click_and_by_key(self, tab: browser.Tab, finished: Path) -> None:
        tab.open(write_report(finished), 1280)
        users = column(tab, "user")
        assert users == sorted(users, key=int)
        assert order(tab)[0] == "ascending"
        head = "gain over global"
        press_head(tab, head, "click")
        gains = [float(one) for one in column(tab, head)]
        assert gains == sorted(gains)
        assert gains[0] < gains[-1]
        assert order(tab).count("none") == len(order(tab)) - 1
        press_head(tab, head, "focus")
        tab.press("Enter", 13, "\r")
        assert [float(one) for one in column(tab, head)] == sorted(gains, reverse=True)
        assert "descending" in order(tab)
        assert sorted(column(tab, "user")) == sorted(users)  # nobody is lost

    def test_searching(self, tab: browser.Tab, finished: Path) -> None:
        tab.open(write_report(finished), 1280)
        tab.run("document.querySelector('#users input').focus()")
        tab.call("Input.insertText", text="1")
        assert column(tab, "user") == ["1", *(str(user) for user in range(10, 20))]
        assert tab.run("document.querySelector('#users [role=status]').textContent") == "11 of 24 users."
        tab.run("document.querySelector('#users input').select()")
        tab.call("Input.insertText", text="Helped")
        assert set(column(tab, "outcome")) == {"helped"}
        assert len(column(tab, "outcome")) == summary(finished)["helped"]
        tab.call("Input.insertText", text=" nobody")
        assert column(tab, "user") == []

    def test_many_users(self, tab: browser.Tab, finished: Path, tmp_path: Path) -> None:
        many = hand_made(finished, tmp_path / "many", [user % 7 / 10 for user in range(SHOWN + 500)])
        tab.open(write_report(many), 1280)
        assert tab.errors == []
        said = "document.querySelector('#users [role=status]').textContent"
        assert tab.run(said) == f"2500 of 2500 users, of which the first {SHOWN} in this order are shown."
        assert column(tab, "user") == [str(user) for user in range(SHOWN)]
        press_head(tab, "user", "click")  # the first of all, not of those that were shown
        assert column(tab, "user") == [str(user) for user in range(SHOWN + 499, 499, -1)]

    def test_a_foreign_script_is_not_run(self, tab: browser.Tab, run: Path) -> None:
        """The negative control of `errors`, too: what the policy forbids is complained of."""
        (run / "figures" / "z.svg").write_text(
            '<svg xmlns="http://www.w3.org/2000/svg"><script>document.title = "owned"</script></svg>'
        )
        tab.open(write_report(run), 1280)
        assert tab.run("document.title") == "odd.name_1-x: fedrep"
        assert "Content Security Policy" in "".join(tab.errors)
