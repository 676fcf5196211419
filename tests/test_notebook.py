"""The notebook runs from top to bottom as it is committed, and is committed without anybody's results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from fedpers import registry
from fedpers.errors import ConfigError

ROOT = Path(__file__).parent.parent
FILE = ROOT / "notebooks" / "write_your_own_method.ipynb"
ASKED = ("unit=record", "unit=record privacy.head=joint", "unit=record privacy.head=frozen", "unit=user")

TOLD = """
import json
found_by_it = {"epsilon": run.claim.epsilon, "unit": run.claim.unit, "noise": run.summary["noise_to_update"]}
print(json.dumps(found_by_it | {"path": str(run.path), "rows": run.users.num_rows,
                                "gain": found.mean_gain, "gains": (mine - theirs).tolist()}))
"""


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(FILE, as_version=4)


def test_it_is_committed_without_outputs(notebook: Any) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) >= 5
    assert [cell.id for cell in cells if cell.outputs or cell.execution_count is not None] == []
    nbformat.validate(notebook)


@pytest.fixture
def started(notebook: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that its cells leave behind, up to the one that trains."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.chdir(FILE.parent)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook.cells:
        if cell.id == "train":
            break
        if cell.cell_type == "code":
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


def test_a_cell_that_is_run_again_replaces_its_method(started: dict[str, Any], notebook: Any) -> None:
    first = started["FedSASwapped"]
    (source,) = (cell.source for cell in notebook.cells if cell.id == "method")
    exec(source.replace('"A": PERSONAL', '"A": SHARED'), started)
    assert started["FedSASwapped"] is not first
    assert started["plan"].shared == ("A", "B")
    assert registry.find("methods", "fedsa-swapped", started["Method"]) is started["FedSASwapped"]
    other = type("Other", (started["Method"],), {"scopes": first.scopes, "round": first.round})
    with pytest.raises(ConfigError, match=r"register\('fedsa-swapped'\): another of fedpers\.methods has this name"):
        registry.register("fedsa-swapped", other)


@pytest.mark.slow
def test_it_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    notebook.cells.append(nbformat.v4.new_code_cell(TOLD))
    where = {"metadata": {"path": str(FILE.parent)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=where).execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    run = json.loads(notebook.cells[-1].outputs[0].text)
    assert run["unit"] == "user"
    assert 0 < run["epsilon"] <= 8
    assert run["noise"]["adapter"] > 0
    assert len(run["gains"]) == 24
    assert run["gain"] == pytest.approx(sum(run["gains"]) / 24)
    assert any(run["gains"])  # the two methods are not the same
    assert run["rows"] == 24 * 5
    for cell in ("picture", "pairs"):
        assert any("image/png" in one.get("data", {}) for one in outputs[cell]), f"cell {cell} shows no picture"
    said = "".join(one.text for one in outputs["train"] if one.get("name") == "stdout")
    assert said.startswith("ε = 8.00 and δ = 1e-05 for one user")
    assert not Path(run["path"]).exists()  # the kernel is gone, and private state with it
