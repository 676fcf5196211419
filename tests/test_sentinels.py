"""Sentinels: values planted in all personal state, in texts and in exceptions appear in nothing that leaves a client.

Whole runs of every method in every mode, each with a client that fails in the second round and is taken up again. The
search itself is tested by runs that are spoilt on purpose.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.serde import message_to_proto
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file, save

from conftest import KINDS, SECRET
from fedpers import cli, public, rounds, simulation
from fedpers.cohort import clients as clients_module
from fedpers.cohort.clients import Clients
from fedpers.cohort.layout import Layout, layout
from fedpers.cohort.local_training import train_phase
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import FAMILY, Config
from fedpers.errors import PrivacyRefusal
from fedpers.experiment import Experiment, Reuse, build_model, prepare
from fedpers.figures import style
from fedpers.figures.curve import learning_curve
from fedpers.flower import cohort_grid
from fedpers.flower import messages as wire
from fedpers.flower.client_app import answer
from fedpers.flower.cohort_grid import CohortGrid
from fedpers.flower.strategy import FedpersStrategy
from fedpers.guarantees import guarantees
from fedpers.methods import PERSONAL
from fedpers.public import export_public
from fedpers.registry import names
from fedpers.reporting import PlainReporter, Reporter
from fedpers.run_directory import RunDirectory
from fedpers.simulation import Run, simulate

pytestmark = pytest.mark.pictures("svg")  # whose text is searched; all kinds in the cases of DRAWN

Rows = dict[str, NDArray[np.float32]]  # personal state by array name, (users, out, in)
USERS = 6
NUMBER = 91734.27  # a personal number that no shared one comes near
WORDS = "SENTINEL"  # what an exception quotes
MOVING = {"adapter": 0.1, "norm": 0.1, "head": 0.1}
STILL = dict.fromkeys(MOVING, 1e-12)  # step sizes that leave a float as it is
MODES = {mode.trust: mode for mode in guarantees(names("methods"))}
PRIVACY: dict[str, dict[str, Any]] = {
    "none": {"unit": "none"},
    "record-local": {"unit": "record", "clip": 0.5, "noise_multiplier": 1.0, "delta": 0.01},
    **{
        trust: {"unit": "user", "trust": trust, "clip": 0.5, "noise_multiplier": 1.0, "delta": 0.01}
        for trust in ("user-central", "user-distributed", "user-local")
    },
}
CASES = [
    (method, trust, "method")
    for trust, mode in MODES.items()
    for method in mode.methods
    if method in KINDS or trust not in {"user-distributed", "user-local"}
] + [
    (method, trust, head)
    for trust in ("record-local", "user-central")
    for head, methods in MODES[trust].policies.items()
    for method in methods
    if (trust == "record-local" or head == "split") and (method in KINDS or head != "frozen")
]
# How a picture is drawn hangs on no method, and its pixels are long to search: one that moves personal heads in the
# rounds and one that moves them at home, under each trust.
DRAWN = {"fedper", "fedbabu"}
UNPLANTED = {"fedala", "fedalt"}  # their own copies are what was sent last: nothing to hide from the server
REWRITTEN = {  # state that every round makes anew, by what it is named
    "pfedme": "", "apfl": "",  # apfl: but for rounding
    "scaffold": "client_control.", "hetlora": "cut.", "fedalt": ".second.",
}  # fmt: skip


# The search


@dataclass
class Search:
    """Finds numbers and words in bytes of any kind: as fp32 or fp64, or written out."""

    words: dict[str, bytes]
    rows: list[NDArray[np.float32]] = field(default_factory=list)  # flat, each two numbers or more
    _sorted: tuple[int, Any, Any] = (0, None, None)  # how many rows, and what is searched for of them

    def know(self, rows: Rows, public: Iterable[NDArray[np.float32]] = ()) -> None:
        """Search for these rows, too, but for numbers that are public anyway."""
        known = np.unique(np.concatenate([np.zeros(1, np.float32), *(array.ravel() for array in public)]))
        for name, array in rows.items():
            for user, row in enumerate(array.reshape(len(array), -1)):
                private = row[~np.isin(row, known)]
                if row.size == 1 and private.size:  # no neighbour to tell it from chance, so all its digits
                    self.words |= {
                        f"{name} of {user}": row.tobytes(),
                        f"{name} of {user} as text": repr(row[0].item()).encode(),
                    }
                elif private.size == row.size:
                    self.rows.append(row)

    def __call__(self, data: bytes) -> list[str]:
        """Name what is found."""
        found = [name for name, word in self.words.items() if word in data]
        if self.rows:
            if len(self.rows) != self._sorted[0]:
                self._sorted = (len(self.rows), *_patterns(self.rows))
            _, eight, three = self._sorted
            windows = _windows(data)
            if (eight[np.searchsorted(eight[:-1], windows)] == windows).any():
                found.append("personal numbers")
            if self._written(data.decode("latin-1"), three):
                found.append("personal numbers as text")
        return found

    def _written(self, text: str, three: NDArray[np.float64]) -> bool:
        """Whether three neighbours stand one after another, rounded as they may be to four decimals or more."""
        numbers = re.findall(r"(-?\d+\.(\d{4,})(?:[eE]([-+]?\d+))?)", text)
        values = np.array([float(number) for number, _, _ in numbers])
        slack = np.array([0.51 * 10.0 ** (int(power or 0) - len(digits)) for _, digits, power in numbers])
        low = np.searchsorted(three[:, 0], values - slack)
        high = np.searchsorted(three[:, 0], values + slack)
        return any(
            np.any(np.all(np.abs(three[low[at] : high[at]] - values[at : at + 3]) <= slack[at : at + 3], axis=1))
            for at in np.flatnonzero(high > low)
            if at + 3 <= len(values)
        )


def _patterns(rows: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
    """Eight bytes that give numbers away: two as fp32, or one as fp64; and all three neighbours, by the first."""
    pairs = [np.lib.stride_tricks.sliding_window_view(row, 2) for row in rows]
    single = [np.ascontiguousarray(two).view("<u8").ravel() for two in pairs]
    double = np.concatenate(rows).astype("<f8").view("<u8")
    three = np.concatenate([np.lib.stride_tricks.sliding_window_view(row, 3) for row in rows if row.size > 2])
    return np.unique(np.concatenate([*single, double])), three[np.argsort(three[:, 0])].astype(np.float64)


def _windows(data: bytes) -> NDArray[np.uint64]:
    """All runs of eight bytes."""
    parts = [np.frombuffer(data, "<u8", (len(data) - at) // 8, at) for at in range(min(8, len(data)))]
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def near(arrays: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the personal number, or it moved a little, is in any array."""
    return any(np.any(np.abs(array - NUMBER) < 1000) for array in arrays.values())


def contents(path: Path) -> bytes:
    """A file as it is; a table's columns written out, too; a picture unpacked: packed bytes hold any four by chance."""
    data = path.read_bytes()
    if data.startswith(b"\x89PNG"):
        with Image.open(path) as picture:
            plain = b"".join(chunk for name, chunk in chunks(data) if name != b"IDAT")
            return plain + repr(picture.info).encode() + picture.tobytes()
    return data + repr(pq.read_table(path).to_pydict()).encode() if path.suffix == ".parquet" else data


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG file by name, and what follows its end."""
    at = 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        name = data[at + 4 : at + 8]
        yield name, data[at + 8 : at + 8 + length]
        at += length + 12
        if name == b"IEND":
            yield b"", data[at:]
            return


# A run that is watched


@dataclass
class Watched:
    """A run with planted personal state, and all that anybody but its users could see of it."""

    config: Config
    experiment: Experiment
    path: Path
    reuse: Reuse
    search: Search
    planted: Rows
    messages: list[Message] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    warned: pytest.WarningsRecorder | None = None
    failing: bool = False

    def go(self, reporter: Reporter) -> Run:
        return simulate(self.config, self.path, resume=True, reporter=reporter, reuse=self.reuse)

    @property
    def layout(self) -> Layout:
        return layout(self.config, self.experiment.plan, build_model(self.experiment, Reporter(), self.reuse))

    def store(self) -> PersonalStore:
        return PersonalStore(self.path / "private" / "rounds", USERS, self.layout.kept())

    def evaluate(self) -> None:
        """Ask all users for metrics, as a stock strategy would; the answers are kept among the messages."""
        shared = _arrays([message for message in self.messages if message.metadata.src_node_id == 1][-1])
        model = build_model(self.experiment, Reporter(), self.reuse)
        experiment = self.experiment
        clients = Clients(self.config, experiment.plan, experiment.guarantee, model, self.store(), bytes(32))
        grid = CohortGrid(clients)
        content = RecordDict({wire.ARRAYS: wire.to_record(shared, clients.shared_names), wire.CONFIG: ConfigRecord()})
        grid.send_and_receive(
            Message(content, dst_node_id=node, message_type="evaluate") for node in grid.get_node_ids()
        )

    def leaks(self, console: str) -> dict[str, list[str]]:
        """What the search finds, by where it was found; empty if all is well."""
        ids = Search({**self.search.words, "user id": b"federation-user-"}, self.search.rows)
        logged = [*self.logs, *(str(one.message) for one in self.warned or ())]
        places: dict[str, list[str]] = {"log": ids("\n".join(logged).encode()), "console": ids(console.encode())}
        for message in self.messages:
            kind = "error" if message.has_error() else message.metadata.message_type
            found = ids(message_to_proto(message).SerializeToString())
            if message.has_content():
                found += ["number"] * near(_arrays(message))
            places.setdefault(f"message: {kind}", []).extend(found)
        checkpoint = self.path / "private" / "checkpoint.safetensors"
        if checkpoint.exists():
            places["checkpoint"] = ids(checkpoint.read_bytes()) + ["number"] * near(load_file(checkpoint))
        for path in sorted(self.path.rglob("*")):
            place = path.relative_to(self.path)
            if path.is_file() and place.parts[0] != "private":
                # Metrics stay with the simulator; who they belong to is no secret there.
                places[str(place)] = (self.search if path.suffix == ".parquet" else ids)(contents(path))
        public = self.path.with_name("public")
        for path in sorted(public.rglob("*")):
            if path.is_file():
                places[f"public/{path.relative_to(public)}"] = ids(contents(path))
        return {place: sorted(set(found)) for place, found in places.items() if found}


def _arrays(message: Message) -> dict[str, NDArray[Any]]:
    return {name: a.numpy() for record in message.content.array_records.values() for name, a in record.items()}


class Arming(PlainReporter):
    """Lets clients fail after the first round; a method without rounds fails at home."""

    def __init__(self, watched: Watched) -> None:
        super().__init__(Console(stderr=True))
        self.watched = watched
        watched.failing = not watched.experiment.plan.shared

    def round(self, row: dict[str, Any], total: int) -> None:
        super().round(row, total)
        self.watched.failing = True


@pytest.fixture(scope="module")
def reuse() -> Reuse:
    return Reuse()


@pytest.fixture
def watch(
    tiny: Callable[..., Config], tmp_path: Path, reuse: Reuse, monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> Iterator[Callable[..., Watched]]:  # fmt: skip
    """Return a function that makes a watched run; nothing of it is simulated but the power of the observer."""
    former = logging.getLogRecordFactory()
    monkeypatch.setitem(style._SETTINGS, "svg.fonttype", "none")  # text as text, to search in

    def make(method: str, trust: str, head: str = "method", planting: int = 0, name: str = "run") -> Watched:
        own = {"head": head} if head != "method" else {}
        small: dict[str, Any] = {
            "method": method, "privacy": {**PRIVACY[trust], **own}, "engine": {"cohort_size": 3, "threads": 1},
            "data": {"users": USERS, "max_train": 6, "max_test": 4, "max_tokens": 8},
        }  # fmt: skip
        groups = "adapter+norm+head"
        plan = prepare(tiny(**small, personal={"groups": groups}), reuse).plan
        # What is personal has to stay as it was planted, also where it moves in the same steps as something shared.
        mixed = [phase.train for phase in plan.round if set(phase.train) & set(plan.shared)]
        still = {FAMILY[group] for train in mixed for group in train if plan.scopes[group] is PERSONAL}
        own_steps = {family: STILL[family] if family in still else step for family, step in MOVING.items()}
        stays = plan.kept and method != "pfedme"  # which sends what its own copies have become
        config = tiny(
            **small, local={"batch_size": 4, "lr": own_steps},
            personal={"epochs": 3, "groups": groups, "lr": STILL if stays else MOVING},
        )  # fmt: skip
        experiment = prepare(config, reuse)
        people = (*experiment.federation.train, *experiment.federation.test)
        texts = {text for records in people for record in records for text in (record.input, record.target)}
        words = {f"text {number}": text.encode() for number, text in enumerate(sorted(texts))}
        words |= {"exception": WORDS.encode(), "key": bytes.fromhex(SECRET), "key in hex": SECRET.encode()}
        words |= {f"number as {kind}": np.array(NUMBER, np.float32).astype(kind).tobytes() for kind in ("<f4", "<f8")}
        words |= {"number as text": b"91734.", "number as text with a power": b"9.1734"}
        watched = Watched(config, experiment, tmp_path / name, reuse, Search(words), {}, warned=recwarn)
        RunDirectory.create(watched.path, config)
        copies = experiment.plan.twins if method in UNPLANTED else ()
        watched.planted = plant(watched.store(), planting, watched.layout.of(copies))
        watched.search.know(watched.planted)
        observe(watched, monkeypatch)
        return watched

    yield make
    logging.setLogRecordFactory(former)


def plant(store: PersonalStore, planting: int, unplanted: Iterable[str] = ()) -> Rows:
    """Fill every personal row, or all but some, with numbers that are easy to find again."""
    rng = np.random.default_rng(planting)
    shapes = {name: (USERS, *tensor.shape) for name, tensor in store.initial.items()}
    # A single number has no neighbours to tell it from noise, so it lies where no noise comes.
    far = {name: 300.0 if np.prod(shape[1:]) == 1 else 0.0 for name, shape in shapes.items()}
    rows = {name: (far[name] + rng.uniform(0.25, 0.75, shape)).astype(np.float32) for name, shape in shapes.items()}
    if "head.direction.weight" in rows:
        rows["head.direction.weight"][0, 0, 0] = NUMBER
    store.apply(range(USERS), rows | {name: store.read(range(USERS))[name].numpy() for name in unplanted})
    return {name: array for name, array in rows.items() if name not in unplanted}


def observe(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every message and log record; let training fail when it is asked to, quoting all that it knows."""
    factory = logging.LogRecord

    def answered(clients: Clients, users: Any, messages: Sequence[Message], report: Any) -> list[Message]:
        watched.messages += copy.deepcopy(list(messages))  # strategies write into them later
        replies = answer(clients, users, messages, report)
        watched.messages += copy.deepcopy(replies)
        return replies

    def trained(model: Any, parameters: Any, *rest: Any, **others: Any) -> Any:
        if watched.failing:
            inner = ValueError(f"{WORDS}: {watched.experiment.federation.train[0][0].target}")
            raise RuntimeError(f"{WORDS}: {parameters}") from inner
        return train_phase(model, parameters, *rest, **others)

    def logged(*given: Any, **others: Any) -> logging.LogRecord:
        record = factory(*given, **others)
        watched.logs.append(logging.Formatter().format(record))  # with the traceback, if it has one
        return record

    monkeypatch.setattr(cohort_grid, "answer", answered)
    monkeypatch.setattr(clients_module, "train_phase", trained)
    logging.setLogRecordFactory(logged)


def finish(watched: Watched, capfd: pytest.CaptureFixture[str]) -> tuple[Run, str]:
    """Run with a failure in the second round, take the run up again, report, export; also what was printed."""
    capfd.readouterr()
    reporter = Arming(watched)
    with pytest.raises(RuntimeError, match=WORDS):
        watched.go(reporter)
    between = capfd.readouterr()
    assert watched.leaks(between.out + between.err) == {}
    watched.failing = False
    run = watched.go(PlainReporter(Console(stderr=True)))
    cli._print_run(run)
    export_public(watched.path, watched.path.with_name("public"))
    printed = capfd.readouterr()
    return run, printed.out + printed.err


# What everybody may see


@pytest.mark.parametrize(
    ("method", "trust", "head"),
    [
        pytest.param(*case, marks=pytest.mark.pictures() if case[0] in DRAWN and case[2] == "method" else ())
        for case in CASES
    ],
)
def test_no_personal_value_appears_anywhere(
    watch: Callable[..., Watched], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, method: str,
    trust: str, head: str,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    watched = watch(method, trust, head)
    run, console = finish(watched, capfd)
    assert "run directory" in console
    if watched.layout.down:
        watched.evaluate()

    model = build_model(watched.experiment, Reporter(), watched.reuse)
    public = [*run.shared.values(), *(array.numpy() for array in model.initial.values())]
    if watched.layout.clusters:  # every own model is one of the shared ones, whole; the choice alone is private
        public += load_file(watched.path / "private" / "checkpoint.safetensors").values()
    if method in UNPLANTED and trust in {"none", "user-central"}:  # there a server sees what was sent, as it is
        public += [a for message in watched.messages if not message.has_error() for a in _arrays(message).values()]
    kept = {name: rows.numpy() for name, rows in watched.store().read(range(USERS)).items()}
    for name, rows in watched.planted.items():
        if method not in REWRITTEN or REWRITTEN[method] not in name:
            np.testing.assert_array_equal(kept[name], rows)  # what was searched for is what there was to hide
            assert watched.search((watched.path / "private" / "rounds" / f"{name}.npy").read_bytes()) != []
        elif method == "apfl":
            np.testing.assert_allclose(kept[name], rows, atol=1e-4)
    watched.search.know(kept, public)
    before = len(watched.search.rows)
    for folder in ("own", "local"):
        final = {path.stem: np.load(path) for path in (watched.path / "private" / folder).glob("*.weight.npy")}
        watched.search.know(final, public)
    assert len(watched.search.rows) > before or watched.planted
    assert watched.leaks(console) == {}
    check_messages(watched)


def check_messages(watched: Watched) -> None:
    """Every message holds declared names only, and errors are one fixed code."""
    arrays, sends = watched.layout, bool(watched.layout.down)
    kinds: dict[str, int] = {}
    for message in watched.messages:
        sent = message.metadata.src_node_id == 1  # by the server
        kind = f"{message.metadata.message_type} {'asked' if sent else 'failed' if message.has_error() else 'answered'}"
        kinds[kind] = kinds.get(kind, 0) + 1
        if message.has_error():
            assert (message.error.code, message.error.reason) == (wire.CLIENT_FAILED, "client failed")
            continue
        records = {wire.ARRAYS, wire.CONFIG} if sent else {wire.ARRAYS, wire.METRICS}
        if kind == "evaluate answered":
            records = {wire.METRICS}
        assert set(message.content) == records
        if wire.ARRAYS in records:
            rounds_done = (kinds[kind] - 1) // USERS  # answers come round by round
            names_allowed = arrays.down if sent else arrays.up(1 + rounds_done)
            assert sorted(message.content[wire.ARRAYS]) == sorted(names_allowed)
        if wire.METRICS in records and (kind.startswith("train") or watched.experiment.guarantee.unit != "none"):
            assert dict(message.content[wire.METRICS]) == {wire.WEIGHT: 1}
    # Two rounds; the second was asked for twice, since its first attempt failed.
    expected = {"train asked": 3, "train answered": 2, "train failed": 1, "evaluate asked": 1, "evaluate answered": 1}
    assert kinds == ({kind: count * USERS for kind, count in expected.items()} if sends else {})


class Enough(Exception):
    """Stands for the end of the rounds."""


class Ending(Reporter):
    def round(self, row: dict[str, Any], total: int) -> None:
        if row["round"] == total:
            raise Enough


@pytest.mark.parametrize("trust", PRIVACY)
def test_without_feedback_messages_do_not_depend_on_personal_values(watch: Callable[..., Watched], trust: str) -> None:
    """Own copies beside the shared ones shape nothing that is sent; personal heads in the forward pass do."""

    def sent(method: str, planting: int) -> list[dict[str, bytes]]:
        watched = watch(method, trust, planting=planting, name=f"{method}-{planting}")
        with pytest.raises(Enough):
            watched.go(Ending())
        assert watched.planted
        assert len(watched.messages) == 2 * 2 * USERS
        return [{name: array.tobytes() for name, array in _arrays(message).items()} for message in watched.messages]

    for method in ("ditto", "apfl", "feddpa"):
        assert sent(method, 0) == sent(method, 1), method
    for method in ("fedbabu", "scaffold"):
        assert sent(method, 0) != sent(method, 1), method


# Negative controls


def test_the_search_finds_numbers_in_every_form() -> None:
    row = np.random.default_rng(0).uniform(0.25, 0.75, (1, 32)).astype(np.float32)
    search = Search({})
    search.know({"w": row[None], "a": row[None, :, :1]})
    other = {"w": row + np.float32(0.01), "text": np.frombuffer(b"innocent", np.uint8)}
    assert search(save(other)) == []
    assert search(str(other).encode()) == []
    assert search(b"") == []
    np.set_printoptions(precision=8)
    for form in (
        row.tobytes(),
        b"x" + row.tobytes(),
        row[0, 5:7].tobytes(),
        row.astype(np.float64).tobytes(),
        save({"x": row.T}),
        str(row).encode(),
        np.array2string(row, precision=4).encode(),
        str(row.tolist()).encode(),
        ",".join(f"{value:.4e}" for value in row.ravel()).encode(),
        b"a" + row[0, :1].tobytes(),
        message_to_proto(
            Message(RecordDict({"a": ArrayRecord({"x": Array(row)})}), dst_node_id=5, message_type="train")
        ).SerializeToString(),
    ):
        assert search(form) != [], form[:80]
    assert near({"x": np.array([1.0, NUMBER + 3])})
    assert not near({"x": np.array([1.0, 0.0])})


def hide(patch: pytest.MonkeyPatch, row: NDArray[np.float32]) -> None:
    """A client hides a personal row in a shared array."""
    train = Clients.train_round

    def train_round(self: Clients, number: int, users: Any, shared: Any) -> Rows:
        found = train(self, number, users, shared)
        next(array for name, array in found.items() if ".lora_A." in name)[:, 0] = row
        return found

    patch.setattr(Clients, "train_round", train_round)


def quote(patch: pytest.MonkeyPatch, row: NDArray[np.float32]) -> None:
    """A failing client says why."""

    def failure(message: Message) -> Message:
        return Message(Error(code=1, reason=str(sys.exc_info()[1])), reply_to=message)

    patch.setattr(wire, "failure", failure)


def log(patch: pytest.MonkeyPatch, row: NDArray[np.float32]) -> None:
    """A logger that nobody listens to is told a personal row."""
    train = Clients.train_round

    def train_round(self: Clients, number: int, users: Any, shared: Any) -> Rows:
        logging.getLogger("fedpers.cohort").debug("heads: %s", row)
        return train(self, number, users, shared)

    patch.setattr(Clients, "train_round", train_round)


def remember(patch: pytest.MonkeyPatch, row: NDArray[np.float32]) -> None:
    """The server's strategy keeps a personal row."""
    state = FedpersStrategy.state
    patch.setattr(FedpersStrategy, "state", lambda self: {**state(self), "fedpers|own|head": row})


def tell(patch: pytest.MonkeyPatch, row: NDArray[np.float32]) -> None:
    """A line per round says too much."""
    patch.setattr("fedpers.reporting.describe_round", lambda found: f"head {row.tolist()}")


def summarize(patch: pytest.MonkeyPatch, row: NDArray[np.float32]) -> None:
    """The summary holds a user's record and head."""
    summary = simulation.headline

    def more(experiment: Experiment, *rest: Any) -> dict[str, Any]:
        return {**summary(experiment, *rest), "like": experiment.federation.test[2][0].target, "head": row.tolist()}

    patch.setattr(simulation, "headline", more)


def label(patch: pytest.MonkeyPatch, row: NDArray[np.float32]) -> None:
    """A figure's label holds a personal row."""

    def curve(rounds_: Any, references: Any, text: str, *rest: Any) -> Any:
        return learning_curve(rounds_, references, f"{text} {row[:4]}", *rest)

    patch.setattr(simulation, "learning_curve", curve)


def measure(patch: pytest.MonkeyPatch, row: NDArray[np.float32]) -> None:
    """A round's metric is a personal number."""
    patch.setattr(rounds, "_measure", lambda *_: {"global_accuracy": float(row[1])})


def publish(patch: pytest.MonkeyPatch, row: NDArray[np.float32]) -> None:
    """The export takes a private file along."""
    patch.setattr(public, "PUBLIC", (*public.PUBLIC, "private/rounds/head.direction.weight.npy"))


Spoil = Callable[[pytest.MonkeyPatch, NDArray[np.float32]], None]


@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        (hide, "message: train"),
        (quote, "message: error"),
        (log, "log"),
        (remember, "checkpoint"),
        (tell, "console"),
        (summarize, "summary.json"),
        (label, "figures/learning_curve.svg"),
        (measure, "rounds.parquet"),
        (publish, "public/private/rounds/head.direction.weight.npy"),
    ],
)
def test_a_spoilt_run_is_found(
    watch: Callable[..., Watched], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spoil: Spoil,
    place: str, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    watched = watch("fedper", "none")
    spoil(monkeypatch, watched.planted["head.direction.weight"][3, 0])
    capfd.readouterr()
    with pytest.raises(RuntimeError, match=WORDS):
        watched.go(Arming(watched))
    watched.failing = False
    run = watched.go(PlainReporter(Console(stderr=True)))
    assert run.summary
    export_public(watched.path, watched.path.with_name("public"))
    found = watched.leaks("".join(capfd.readouterr()))
    assert any("personal numbers" in what or what == "exception" for what in found[place])


def test_a_reply_with_a_personal_name_is_refused(
    watch: Callable[..., Watched], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = watch("fedper", "none")
    train = Clients.train_round
    monkeypatch.setattr(
        Clients,
        "train_round",
        lambda self, *given: train(self, *given) | {"head.direction.weight": watched.planted["head.direction.weight"]},
    )
    with pytest.raises(PrivacyRefusal, match=r"exactly the shared arrays; in question: head\.direction\.weight"):
        watched.go(Reporter())
    assert [message.has_error() for message in watched.messages] == [False] * USERS + [True] * USERS
    assert watched.leaks("".join(capfd.readouterr())) == {}
