"""Whatever lies in a file or comes in a message: it is taken, or refused by an error of ours that quotes nothing."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fedpers
from conftest import opening_fields
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import load_config
from fedpers.data import load
from fedpers.errors import FedpersError, RunDirectoryError
from fedpers.flower import messages as wire
from fedpers.flower.node_file import Limits, place_of, write_nodes
from fedpers.formats.lamp_example import write_example
from fedpers.privacy.claim import TUNING, Claim
from fedpers.privacy.claiming import claim_from
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.ledger_lines import Opening, Release
from fedpers.privacy.randomness import seed_key
from fedpers.run_directory import Checkpoint, RunDirectory
from fedpers.sweep.grid import read_grid

few = settings(
    max_examples=30, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
NAME = "Bartholomew"  # stands for what is private
CONFIGS = Path(__file__).parents[1] / "configs"

# --- what may lie in a file -------------------------------------------------------------------------------------------

ODD_JSON = st.sampled_from(  # texts that JSON's or YAML's readers fall over in ways of their own
    ["[" * 5000, '{"a":' * 3000, "9" * 5000, "-1e999", "NaN", '"\\ud800"', "2020-13-45", "!!int ''", "!!bool x",
     "!!timestamp x", "!!x y", "!!python/object/apply:os.system ['true']", "&a [*a]", "? [1]\n: 2", "\x00", ""]
)  # fmt: skip
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file that was cut, overwritten in places, or had something put into it."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "flip", "insert", "drop"]))
        if kind == "cut":
            del data[place:]
        elif kind == "drop":
            del data[place : place + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=6) | ODD_JSON.map(lambda text: text.encode()))
        elif place < len(data):
            data[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


@st.composite
def altered(draw: st.DrawFn, whole: Any) -> Any:
    """A tree of which one branch is something else, is gone, or has a neighbour."""
    if draw(st.integers(0, 3)) == 0 or not isinstance(whole, (dict, list)) or not whole:
        return draw(TREES)
    if isinstance(whole, list):
        place = draw(st.integers(0, len(whole) - 1))
        return [*whole[:place], draw(altered(whole[place])), *whole[place + 1 :]]
    key = draw(st.sampled_from(sorted(whole)))
    change = draw(st.sampled_from(["change", "change", "change", "drop", "add"]))
    if change == "add":
        return {**whole, draw(st.text(max_size=8) | st.sampled_from(["secret", "path", "id"])): draw(TREES)}
    rest = {name: value for name, value in whole.items() if name != key}
    return rest if change == "drop" else {**rest, key: draw(altered(whole[key]))}


def spoilt(whole: Any, write: Callable[[Any], str]) -> st.SearchStrategy[bytes]:
    """A file that is damaged, or is whole and says something else."""
    text = write(whole)
    return damaged(text.encode()) | altered(whole).map(lambda tree: write(tree).encode("utf-8", "surrogatepass"))


def as_json(tree: Any) -> str:
    return json.dumps(tree, default=str)


def as_yaml(tree: Any) -> str:
    return yaml.safe_dump(tree)


def tried(read: Callable[[], Any]) -> None:
    """Read, or be refused by an error of ours that quotes no text of the file."""
    said = ""
    try:
        read()
    except FedpersError as error:
        said = str(error)
    assert NAME not in said


# --- configurations and grids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chitchat", "quickstart"])
@few
@given(data=st.data())
def test_configurations(tmp_path: Path, name: str, data: st.DataObject) -> None:
    tree = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    path = tmp_path / "config.yaml"
    path.write_bytes(data.draw(spoilt(tree, as_yaml)))
    tried(lambda: load_config(path))


@few
@given(text=st.text(max_size=20) | ODD_JSON, key=st.sampled_from(["seed", "privacy.epsilon", "data", "name", ".", ""]))
def test_overrides(text: str, key: str) -> None:
    tried(lambda: load_config(None, [f"{key}={text}"]))


@few
@given(data=st.data())
def test_grids(tmp_path: Path, data: st.DataObject) -> None:
    tree = {
        "name": "g", "base": {"name": "b", "data": {"name": "synthetic"}}, "product": {"seed": [0, 1], "rounds": [2]},
        "zip": {"share": ["head", "adapter"]}, "variants": {"a": {"data.users": 9}},
        "skip": [{"seed": [1], "share": "head"}],
    }  # fmt: skip
    path = tmp_path / "grid.yaml"
    path.write_bytes(data.draw(spoilt(tree, as_yaml)))
    tried(lambda: read_grid(path))


# --- a run's own files ------------------------------------------------------------------------------------------------


def ledger_in(folder: Path) -> Ledger:
    """A ledger whose lines lean on the private file beside it."""
    ledger = Ledger.create(folder / "ledger.jsonl", Opening(**opening_fields("record")))
    for number in (1, 2):
        ledger.append(
            Release(
                round=number,
                mechanism="gaussian",
                noise_multiplier=1.0,
                clip=1.0,
                sampling_rate=0.5,
                steps=2,
                clients=[3, 5],
                salt="ab",
                noise_address=f"{number:02x}",
                release_hash="0" * 64,
            )
        )
    return ledger


@pytest.mark.parametrize("name", ["ledger.jsonl", "private/participants.jsonl"])
@few
@given(data=st.data())
def test_ledgers(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    ledger_in(folder)
    path = folder / name
    lines = path.read_bytes().splitlines(keepends=True)
    place = data.draw(st.integers(0, len(lines) - 1))
    line = data.draw(
        damaged(lines[place]) | altered(json.loads(lines[place])).map(lambda t: as_json(t).encode() + b"\n")
    )
    path.write_bytes(b"".join([*lines[:place], line, *lines[place + 1 :]]))
    tried(lambda: Ledger.load(folder / "ledger.jsonl"))
    tried(lambda: Ledger.rewind(folder / "ledger.jsonl", 2))


@few
@given(data=st.data())
def test_claims(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    ledger = ledger_in(tmp_path_factory.mktemp("claim"))
    text = claim_from(ledger, expected_rounds=2, excluded=[TUNING]).to_json()
    tried(lambda: Claim.from_json(data.draw(spoilt(json.loads(text), as_json))))


@pytest.mark.parametrize(
    "name", ["checkpoint.safetensors", "journal.safetensors", "rounds/head.npy", "rounds/written.npy"]
)
@few
@given(data=st.data())
def test_checkpoints_and_personal_state(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    run.private.mkdir()
    ledger = ledger_in(run.path)

    def store() -> PersonalStore:
        return PersonalStore(run.private / "rounds", 3, {"head": torch.zeros(2, 2)})

    state = Checkpoint(2, len(ledger), ledger.head, {"head": np.ones((2, 2), np.float32)}, {}, [{"round": 2}])
    journal = run.private / "journal.safetensors"
    kept = store()
    kept.apply = lambda users, rows: (run.private / "kept").write_bytes(journal.read_bytes())  # type: ignore[method-assign]
    run.commit(state, [1], {"head": np.ones((1, 2, 2), np.float32)}, kept)
    (run.private / "kept").rename(journal)  # as if it had been killed before the rows were written
    whole = (run.private / name).read_bytes()
    (run.private / name).write_bytes(data.draw(damaged(whole)))

    def recover() -> None:
        again = store()
        run.recover(again)
        again.read([0, 1, 2])

    tried(recover)


# --- people's data ----------------------------------------------------------------------------------------------------

ROWS = [{"user": f"{NAME} {n % 3}", "input": f"{NAME} asks {n}", "target": f"{NAME} {n}", "time": n} for n in range(12)]


@pytest.mark.parametrize("skip", [False, True])
@few
@given(data=st.data())
def test_rows_of_json(tmp_path: Path, skip: bool, data: st.DataObject) -> None:
    path = tmp_path / "rows.jsonl"

    def write(rows: Any) -> str:
        return "".join(as_json(row) + "\n" for row in rows) if isinstance(rows, list) else as_json(rows)

    path.write_bytes(data.draw(spoilt(ROWS, write)))
    given_ = ["data.name=files", f"data.path={path}", "data.min_train=1", "data.min_test=1", "data.columns.time=time"]
    config = load_config(None, [*given_, f"data.skip_bad={str(skip).lower()}"])
    tried(lambda: load(config, seed_key(0)))


@pytest.mark.parametrize("ending", ["csv", "parquet", "arrow"])
@few
@given(data=st.data())
def test_tables(tmp_path: Path, ending: str, data: st.DataObject) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    path, table = tmp_path / f"rows.{ending}", pa.Table.from_pylist(ROWS)
    if ending == "csv":
        pa.csv.write_csv(table, path)
    elif ending == "parquet":
        pa.parquet.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    config = load_config(
        None, ["data.name=files", f"data.path={path}", "data.min_train=1", "data.min_test=1", "data.columns.time=time"]
    )
    tried(lambda: load(config, seed_key(0)))


@pytest.mark.parametrize("name", ["dev_questions.json", "dev_outputs.json"])
@few
@given(data=st.data())
def test_lamp(tmp_path: Path, name: str, data: st.DataObject) -> None:
    write_example(tmp_path, "4", users=2, items=3, split="time")
    tree = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_bytes(data.draw(spoilt(tree, as_json)))
    settings_ = [
        "data.name=lamp",
        f"data.path={tmp_path}",
        "data.lamp.task=4",
        "data.lamp.split=time",
        "data.min_train=1",
    ]
    config = load_config(None, [*settings_, "data.min_test=1", "data.lamp.part=dev"])
    tried(lambda: load(config, seed_key(0)))


@pytest.mark.parametrize("name", ["node0000/node.yaml", "node0000/records.json", "node0000/config.yaml", "people.json"])
@few
@given(data=st.data())
def test_files_of_a_node(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("node")
    (folder / "config.yaml").write_text("data: {name: synthetic, users: 3}")
    config = load_config(folder / "config.yaml")
    (file, *_) = write_nodes(load(config, seed_key(0)), folder / "config.yaml", folder, Limits(), range(2))
    path, yamls = folder / name, name.endswith("yaml")
    tree = yaml.safe_load(path.read_text()) if yamls else json.loads(path.read_text())
    path.write_bytes(data.draw(spoilt(tree, as_yaml if yamls else as_json)))
    tried(lambda: place_of(file))


# --- messages ---------------------------------------------------------------------------------------------------------

EXPECTED = {"head": np.ones((2, 3), np.float32), "a": np.ones(2, np.float32)}
BYTES = st.binary(max_size=8) | damaged(Array(EXPECTED["head"]).data) | st.just(Array(EXPECTED["head"]).data)
ARRAYS = st.builds(
    Array, st.sampled_from(["float32", "object", ""]), st.sampled_from([(2, 3), (2,), (), (2**40,)]),
    st.sampled_from(["numpy.ndarray", "torch", ""]), BYTES,
) | st.sampled_from([Array(EXPECTED["head"]), Array(EXPECTED["a"])])  # fmt: skip
NAMES = st.sampled_from(["head", "a", "arrays", "config", "metrics", "server-round", "num-examples", "x"])
NUMBERS = st.integers(-2, 2) | st.floats()
RECORDS = (
    st.dictionaries(NAMES, ARRAYS, max_size=3).map(ArrayRecord)
    | st.fixed_dictionaries({"head": ARRAYS, "a": ARRAYS}).map(ArrayRecord)
    | st.dictionaries(NAMES, NUMBERS | st.lists(st.integers(0, 1), max_size=2), max_size=2).map(MetricRecord)
    | st.dictionaries(NAMES, NUMBERS | st.text(max_size=3) | st.binary(max_size=3), max_size=2).map(ConfigRecord)
    | st.sampled_from([MetricRecord({"num-examples": 1}), ConfigRecord({"server-round": 1})])
)
CONTENTS = st.dictionaries(NAMES, RECORDS, max_size=3) | st.fixed_dictionaries(
    {"arrays": RECORDS, "metrics": RECORDS}
) | st.fixed_dictionaries({"arrays": RECORDS, "config": RECORDS})  # fmt: skip


@settings(few, max_examples=200)
@given(content=CONTENTS, finite=st.booleans())
def test_messages(content: dict[str, Any], finite: bool) -> None:
    """What a node is asked and what it answers: fp32 numbers of the right names and shapes, or a refusal."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(RecordDict(content), 7, "train")
    taken: list[tuple[dict[str, Any], bool]] = []
    with suppress(wire.Refused):
        wire.asked(message)
        taken.append((wire.read_arrays(message, EXPECTED), True))
    with suppress(wire.BadReply):
        taken.append((wire.shared_of(message, EXPECTED, finite), finite))
    for arrays, whole in taken:
        assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
            name: (array.shape, array.dtype) for name, array in EXPECTED.items()
        }
        assert not whole or all(np.isfinite(array).all() for array in arrays.values())


# --- no pickle --------------------------------------------------------------------------------------------------------


def test_nothing_that_unpickles_is_imported_or_called() -> None:
    """Foreign bytes are safetensors, JSON, YAML of plain values, or arrays of numbers."""
    banned = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    calls = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load")}
    for path in Path(fedpers.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not banned & {one.name.partition(".")[0] for one in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in banned, path
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in calls, path
            elif isinstance(node, ast.keyword):
                assert node.arg != "allow_pickle", path


def test_arrays_of_objects_are_not_read(tmp_path: Path) -> None:
    """The object would write a file as soon as it were unpickled."""
    trace = tmp_path / "ran"

    class Runs:
        def __reduce__(self) -> Any:
            return (open, (str(trace), "w"))

    file = BytesIO()
    np.save(file, np.array([[Runs()]], dtype=object), allow_pickle=True)
    store = tmp_path / "store"
    store.mkdir()
    (store / "head.npy").write_bytes(file.getvalue())
    with pytest.raises(RunDirectoryError, match="is damaged"):
        PersonalStore(store, 1, {"head": torch.zeros(1)})
    content = {"arrays": ArrayRecord({"head": Array("float32", (1, 1), "numpy.ndarray", file.getvalue())})}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(RecordDict({**content, "metrics": MetricRecord({"num-examples": 1})}), 7, "train")
    with pytest.raises(wire.BadReply, match="another kind or size"):
        wire.shared_of(message, {"head": np.zeros((1, 1), np.float32)}, finite=True)
    assert not trace.exists()
