"""The notebooks run from top to bottom as they are committed, and are committed without anybody's results."""

from __future__ import annotations

import ast
import html
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from scipy import stats
from traitlets.config import Config

from fedpers import registry
from fedpers.errors import ConfigError

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
OWN_METHOD = "05_write_your_own_method"
ASKED = ("unit=record", "unit=record privacy.head=joint", "unit=record privacy.head=frozen", "unit=user")


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_of(notebook: Any) -> dict[str, Any]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_without_outputs(name: str) -> None:
    notebook = read(name)
    cells = code_of(notebook)
    assert len(cells) >= 5
    assert [one for one, cell in cells.items() if cell.outputs or cell.execution_count is not None] == []
    assert notebook.cells[0].id == "about"
    assert "TemporaryDirectory()" in cells["setup"].source, "runs hold private state"
    nbformat.validate(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_what_it_imports_is_there(name: str) -> None:
    """Where a name moves, this fails without running anything."""
    tree = ast.parse("\n".join(cell.source for cell in code_of(read(name)).values()))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert [one.name for one in node.names if not hasattr(module, one.name)] == [], node.module


def test_a_notebook_that_names_another_names_one_that_is_there() -> None:
    texts = {name: (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8") for name in NAMES}
    for text in texts.values():
        for word in text.replace("`", " ").replace("/", " ").replace(".ipynb", " ").split():
            assert not (word[:2].isdigit() and word[2:3] == "_") or word in texts, word


# ---------------------------------------------------------------- what they show


@dataclass(frozen=True)
class Shown:
    """What a notebook printed and drew, by cell."""

    cells: dict[str, Any]

    @property
    def told(self) -> list[Any]:
        """Its temporary folder, and what it was asked at its end."""
        found: list[Any] = json.loads(self.text("asked"))
        return found

    def text(self, cell: str) -> str:
        return "".join(one.text for one in self.cells[cell].outputs if one.get("name") == "stdout")

    def draws(self, cell: str) -> bool:
        return any("image/png" in one.get("data", {}) for one in self.cells[cell].outputs)


# Of a picture a notebook shows the PNG, and its page the SVG; the others stay undrawn, as in conftest.py.
UNDRAWN = """
from matplotlib.figure import Figure
def _savefig(self, where, *, format, draw=Figure.savefig, **options):
    return where.write(b"undrawn") if format in {} else draw(self, where, format=format, **options)
Figure.savefig = _savefig
del Figure
"""


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Shown]:
    """Run a notebook in a kernel of its own; an expression over its names is what it tells at the end, as JSON."""
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))

    def run(name: str, asked: str) -> Shown:
        notebook = read(name)
        unshown = ("pdf",) if name == "01_quickstart" else ("svg", "pdf")
        notebook.cells.insert(0, nbformat.v4.new_code_cell(UNDRAWN.format(unshown), id="undrawn"))
        asked = f"import json\nprint(json.dumps([folder.name, {asked}]))"
        notebook.cells.append(nbformat.v4.new_code_cell(asked, id="asked"))
        where = {"metadata": {"path": str(FOLDER)}}
        patient = Config({"KernelManager": {"shutdown_wait_time": 120}})  # a kernel that is killed cannot clean up
        NotebookClient(notebook, timeout=None, kernel_name="python3", resources=where, config=patient).execute()
        found = Shown(code_of(notebook))
        assert not Path(found.told[0]).exists()  # the kernel is gone, and private state with it
        return found

    return run


@pytest.mark.slow
def test_quickstart(shown: Callable[[str, str], Shown]) -> None:
    found = shown(
        "01_quickstart",
        '{"claim": json.loads(run.claim.to_json()), "summary": run.summary, "rows": run.users.num_rows, '
        '"page": page.read_text(), "public": public.read_text()}',
    )
    _, told = found.told
    claim, summary = told["claim"], told["summary"]
    assert 0 < claim["epsilon"] <= 8
    assert claim["unit"] == "user"
    assert found.text("train").strip() == claim["sentence"]
    assert "did you mean" in found.text("config")
    assert "epsilon'?" in found.text("config")
    assert [
        one for one in (*claim["not_protected_against"], *claim["excluded"]) if one not in found.text("promised")
    ] == []
    assert told["rows"] == 30 * 5
    for kind in summary["metrics"].values():
        assert f"{kind['mean']:.3f}" in found.text("table")
    assert summary["noise_to_update"]["head"] > 0
    assert found.draws("picture")
    files = found.text("files").splitlines()
    assert {"config.yaml", "claim.json", "ledger.jsonl", "users.parquet", "private/secret"} <= set(files)
    assert summary["reading"] in html.unescape(told["page"])
    assert summary["reading"][:60] not in html.unescape(told["public"])
    assert "<svg" not in told["public"]  # the pictures are of people


@pytest.mark.slow
def test_frontier(shown: Callable[[str, str], Shown]) -> None:
    found = shown("02_privacy_utility_frontier", "json.loads(json.dumps(done.results.to_pylist(), default=str))")
    _, runs = found.told
    assert found.text("run") == "14 of 14 runs finished, 0 refused, 0 failed\n"
    free = [one for one in runs if one["method"] == "local"]
    assert {one["epsilon"] for one in free} == {0.0}
    assert {one["hash"] for one in free} == {one["baseline"] for one in runs}, "one for each seed, for all levels"
    asked = {level: [one for one in runs if one["privacy_epsilon"] == level] for level in ("inf", "clip", "8")}
    assert {level: len(some) for level, some in asked.items()} == {"inf": 4, "clip": 4, "8": 4}
    assert {one["unit"] for one in asked["inf"]} == {"none"}
    assert all(math.isinf(one["epsilon"]) and one["unit"] == "user" for one in asked["clip"])
    assert all(7 < one["epsilon"] <= 8 and one["noise_to_update_head"] > 0 for one in asked["8"])
    for one in (*asked["inf"], *asked["clip"]):
        assert not one["noise_to_update_head"]
    for one in runs:
        assert (one["own_mean"] == one["global_mean"]) == (one["method"] == "fedavg"), "fedavg keeps nothing at home"
    means = [
        np.mean([one["own_mean"] for one in some if one["method"] == "fedavg-finetune"]) for some in asked.values()
    ]
    assert [f"{mean:.3f}" for mean in means if f": {mean:.3f}, noise" not in found.text("numbers")] == []
    assert f"{np.mean([one['own_mean'] for one in free]):.3f}" in found.text("numbers")
    assert found.draws("frontier")
    assert "is promised nothing: 8 of them added no noise" in found.text("promised")
    assert "4 runs promise together at user level" in found.text("promised")


@pytest.mark.slow
def test_who_gains(shown: Callable[[str, str], Shown]) -> None:
    found = shown(
        "03_who_gains_and_who_loses",
        '{"rows": run.users.to_pylist(), "claim": run.claim.unit, "trend": trend.statistic, "alone": alone, '
        '"corrected": corrected, "powers": [power(30), power(1000), power(30, wins=0.5)]}',
    )
    _, told = found.told
    rows = {(one["kind"], one["user"]): one for one in told["rows"]}
    users = sorted(user for kind, user in rows if kind == "own")
    assert told["claim"] == "none"
    assert len(users) == 30
    gains = {
        kind: np.array([rows["own", user]["accuracy"] - rows[kind, user]["accuracy"] for user in users])
        for kind in ("global", "local", "swap")
    }
    for kind, cell in {"global": "train", "local": "trend", "swap": "swapped"}.items():
        p = stats.wilcoxon(np.round(gains[kind], 12), zero_method="pratt").pvalue
        assert f"over {kind}: mean gain {gains[kind].mean():+.3f} (" in found.text(cell)
        assert f"p = {p:.1g}" in found.text(cell)
    enough = [user for user in users if rows["own", user]["test_records"] >= 10]
    helped = sum(gains["global"][user] > 1e-9 for user in enough)
    assert f"of {len(enough)} users with 10 test records or more" in found.text("picture")
    assert f"{helped} helped; coins alone: " in found.text("picture")
    records = [rows["own", user]["train_records"] for user in users]
    assert told["trend"] == pytest.approx(stats.spearmanr(records, np.round(gains["local"], 12)).statistic, abs=0.02)
    alone = 0
    for user in users:
        wins, losses = rows["global", user]["only_own"], rows["global", user]["only_other"]
        alone += bool(wins + losses) and stats.binomtest(wins, wins + losses).pvalue < 0.05
    assert (told["alone"], told["corrected"] <= alone) == (alone, True)
    few, many, none = told["powers"]
    assert few < 0.1 < 0.75 < many, "30 records tell little about one person"
    assert none < 0.05
    assert found.draws("picture")
    assert found.draws("trend")


@pytest.mark.slow
def test_audit(shown: Callable[[str, str], Shown]) -> None:
    found = shown(
        "04_audit_a_claim",
        '{"epsilons": epsilons, "restored": UserLevelServer.noise is honest_noise, "verdicts": '
        "{name: {one.name: one.verdict for one in some.values()} for name, some in findings.items()}}",
    )
    _, told = found.told
    verdicts = told["verdicts"]
    attacks = {name for name in verdicts["honest"] if name.startswith("two-sample")}
    by = {name: {one for one, verdict in some.items() if verdict == "violation"} for name, some in verdicts.items()}
    assert len(attacks) == 2
    assert set(verdicts["honest"].values()) == {"consistent"}
    assert {"sensitivity of one user", "one user at the broadcast", "client sampling", "accounting"} <= set(
        verdicts["honest"]
    )
    assert by == {"honest": set(), "quarter": {"noise", *attacks}, "repeated": {"fresh noise"}}
    assert len(set(told["epsilons"].values())) == 1, "a program with a bug claims what an honest one does"
    assert told["restored"]
    assert "nothing" in found.text("verdicts").splitlines()[1]


# ---------------------------------------------------------------- a method of one's own


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that its cells leave behind, up to the one that trains."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.chdir(FOLDER)
    names: dict[str, Any] = {"__name__": "__main__"}
    for name, cell in code_of(read(OWN_METHOD)).items():
        if name == "train":
            break
        exec(cell.source, names)
    return names


def test_its_table_is_the_half_that_fedsa_lora_leaves_out(started: dict[str, Any]) -> None:
    plan = started["plan"]
    assert (plan.shared, plan.sent(1), plan.kept) == (("B",), ("B",), ("A", "head"))
    (phase,) = plan.round
    assert phase.train == ("A", "B", "head")
    assert "fedsa-swapped" in registry.names("methods")


def test_its_verdicts_are_what_the_text_says(started: dict[str, Any]) -> None:
    verdicts = started["verdicts"]
    assert tuple(asked.removeprefix("privacy.") for asked in verdicts) == ASKED
    refused, *others = verdicts.values()
    assert others == ["allowed"] * 3
    assert refused.startswith("refused: method 'fedsa-swapped' with privacy.unit=record is refused")
    assert "the records -> personal A -> shared B" in refused
    assert all(way in refused for way in ("privacy.head=frozen", "privacy.head=joint", "privacy.unit=user"))


def test_a_cell_that_is_run_again_replaces_its_method(started: dict[str, Any]) -> None:
    first = started["FedSASwapped"]
    source = code_of(read(OWN_METHOD))["method"].source
    exec(source.replace('"A": PERSONAL', '"A": SHARED'), started)
    assert started["FedSASwapped"] is not first
    assert started["plan"].shared == ("A", "B")
    assert registry.find("methods", "fedsa-swapped", started["Method"]) is started["FedSASwapped"]
    other = type("Other", (started["Method"],), {"scopes": first.scopes, "round": first.round})
    with pytest.raises(ConfigError, match=r"register\('fedsa-swapped'\): another of fedpers\.methods has this name"):
        registry.register("fedsa-swapped", other)


@pytest.mark.slow
def test_own_method(shown: Callable[[str, str], Shown]) -> None:
    found = shown(
        OWN_METHOD,
        '{"epsilon": run.claim.epsilon, "unit": run.claim.unit, "noise": run.summary["noise_to_update"], '
        '"rows": run.users.num_rows, "gain": found.mean_gain, "gains": (mine - theirs).tolist()}',
    )
    _, run = found.told
    assert run["unit"] == "user"
    assert 0 < run["epsilon"] <= 8
    assert run["noise"]["adapter"] > 0
    assert len(run["gains"]) == 24
    assert run["gain"] == pytest.approx(sum(run["gains"]) / 24)
    assert any(run["gains"])  # the two methods are not the same
    assert run["rows"] == 24 * 5
    assert found.draws("picture")
    assert found.draws("pairs")
    assert found.text("train").startswith("ε = 8.00 and δ = 1e-05 for one user")
