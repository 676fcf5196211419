"""The ledger: what it refuses to write, what it finds when it is read, and how an interrupted run resumes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import opening_fields
from fedpers.config import Unit
from fedpers.errors import LedgerError, PrivacyRefusal
from fedpers.privacy.ledger import GENESIS, Ledger, release_hash
from fedpers.privacy.ledger_lines import Opening, Release


def opening(unit: Unit = "user", **changes: Any) -> Opening:
    return Opening(**opening_fields(unit, **changes))


def release(round_number: int, unit: Unit = "user", **changes: Any) -> Release:
    noised = unit != "none"
    fields: dict[str, Any] = {
        "round": round_number,
        "mechanism": "gaussian" if noised else "none",
        "noise_multiplier": 1.5 if noised else 0.0,
        "clip": 0.5 if noised else None,
        "sampling_rate": 0.25 if noised else 1.0,
        "steps": 1,
        "clients": None if unit == "user" else [1, 2],
        "noise_address": f"{round_number:064x}" if noised else "",
        "release_hash": release_hash({"w": np.full(3, round_number)}),
    }
    return Release(**{**fields, **changes})


def write(path: Path, rounds: int = 3, unit: Unit = "user") -> Ledger:
    ledger = Ledger.create(path, opening(unit))
    for number in range(1, rounds + 1):
        ledger.append(release(number, unit))
    return ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_what_is_written_is_read_back(path: Path) -> None:
    written = write(path)
    read = Ledger.load(path)
    assert read.opening == written.opening == opening()
    assert read.releases == written.releases == tuple(release(n) for n in (1, 2, 3))
    assert read.head == written.head == json.loads(lines_of(path)[-1])["hash"]
    assert len(read) == len(written) == 4
    assert json.loads(lines_of(path)[0])["previous"] == GENESIS


def test_lines_are_canonical_json(path: Path) -> None:
    write(path)
    for index, line in enumerate(lines_of(path)):
        fields = json.loads(line)
        assert line == json.dumps(fields, sort_keys=True, separators=(",", ":"))
        assert fields["index"] == index


def test_a_read_ledger_goes_on(path: Path) -> None:
    write(path, 2)
    Ledger.load(path).append(release(3))
    assert len(Ledger.load(path)) == 4


def test_numpy_floats_are_written_as_floats(path: Path) -> None:
    ledger = write(path, 0)
    ledger.append(release(1, noise_multiplier=np.float64(1.1)))
    assert '"noise_multiplier":1.1,' in lines_of(path)[1]
    assert Ledger.load(path).releases == ledger.releases


def test_create_never_overwrites(path: Path) -> None:
    write(path)
    with pytest.raises(LedgerError, match="exists"):
        Ledger.create(path, opening())


def test_no_file_no_ledger(path: Path) -> None:
    for read in (Ledger.load, lambda p: Ledger.rewind(p, 1)):
        with pytest.raises(LedgerError, match="does not exist"):
            read(path)
    path.write_text("")
    with pytest.raises(LedgerError, match="no whole opening"):
        Ledger.load(path)


# ---------------------------------------------------------------- edits


def changed(value: Any, salt: int) -> Any:
    """Another value of the same kind, so that only the chain can tell."""
    if isinstance(value, str):
        return "f" * 64 if value and set(value) <= set("0123456789abcdef") and salt % 2 else value + "0"
    if isinstance(value, (int, float)):
        return value + 1 + salt
    if isinstance(value, list):
        return [*value, value[-1]] if value and salt % 2 else [] if value else [1]
    return 1


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), unit=st.sampled_from(["none", "record", "user"]), salt=st.integers(0, 3))
def test_an_edit_of_any_field_of_any_line_is_found(path: Path, data: st.DataObject, unit: Unit, salt: int) -> None:
    path.unlink(missing_ok=True)
    write(path, 3, unit)
    lines = lines_of(path)
    index = data.draw(st.integers(0, len(lines) - 1))
    fields = json.loads(lines[index])
    name = data.draw(st.sampled_from(sorted(fields)))
    fields[name] = changed(fields[name], salt)
    lines[index] = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LedgerError, match=rf"line {index + 1}:"):
        Ledger.load(path)
    with pytest.raises(LedgerError):
        Ledger.rewind(path, 1)  # later lines are verified too


def test_every_field_of_every_line_is_found_when_dropped(path: Path) -> None:
    write(path, 2)
    whole = lines_of(path)
    for index, line in enumerate(whole):
        for name in json.loads(line):
            fields = {key: value for key, value in json.loads(line).items() if key != name}
            edited = [*whole[:index], json.dumps(fields, sort_keys=True, separators=(",", ":")), *whole[index + 1 :]]
            path.write_text("\n".join(edited) + "\n")
            with pytest.raises(LedgerError):
                Ledger.load(path)


@pytest.mark.parametrize("order", [[0, 2, 3], [0, 1, 3], [0, 2, 1, 3], [1, 2, 3], [0, 1, 1, 2, 3]])
def test_lines_removed_moved_or_doubled(path: Path, order: list[int]) -> None:
    write(path)
    lines = lines_of(path)
    path.write_text("\n".join(lines[index] for index in order) + "\n")
    with pytest.raises(LedgerError, match="line"):
        Ledger.load(path)


def test_another_spelling_or_a_doubled_key_is_an_edit(path: Path) -> None:
    write(path, 1)
    text = path.read_text()
    for edited in (text.replace('"clip":0.5', '"clip":0.50'), text.replace('"clip":0.5', '"clip":9.0,"clip":0.5')):
        assert edited != text
        path.write_text(edited)
        with pytest.raises(LedgerError, match="line 2: edited"):
            Ledger.load(path)


def test_a_cut_end_changes_head_and_length(path: Path) -> None:
    """Whole lines missing at the end leave a valid chain: the checkpoint's count and the claim's head find it."""
    whole = write(path)
    path.write_text("\n".join(lines_of(path)[:-1]) + "\n")
    assert Ledger.load(path).head != whole.head
    with pytest.raises(LedgerError, match="3 whole lines, but the checkpoint counts 4"):
        Ledger.rewind(path, len(whole))


# ---------------------------------------------------------------- torn ends and resuming


@pytest.mark.parametrize("keep", [1, 40, -1])
def test_a_torn_last_line(path: Path, keep: int) -> None:
    write(path, 2)
    whole = path.read_bytes()
    last = lines_of(path)[-1] + "\n"
    path.write_bytes(whole[: -len(last)] + last[:keep].encode())
    with pytest.raises(LedgerError, match="line 3: torn"):
        Ledger.load(path)
    with pytest.raises(LedgerError):
        Ledger.rewind(path, 3)
    ledger = Ledger.rewind(path, 2)
    assert not ledger.pending
    ledger.append(release(2))
    assert path.read_bytes() == whole


def test_a_last_line_of_zeros_is_torn_too(path: Path) -> None:
    write(path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 20 + b"\n")
    with pytest.raises(LedgerError, match="torn"):
        Ledger.load(path)
    Ledger.rewind(path, 3)
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_not_torn(path: Path) -> None:
    write(path, 2)
    lines = lines_of(path)
    path.write_text("\n".join([lines[0], lines[1][:30], lines[2]]) + "\n")
    for read in (Ledger.load, lambda p: Ledger.rewind(p, 1)):
        with pytest.raises(LedgerError, match="line 2"):
            read(path)


def test_replay_after_rewind(path: Path) -> None:
    whole = write(path)
    before = path.read_bytes()
    ledger = Ledger.rewind(path, 2)
    assert len(ledger) == 2
    assert ledger.releases == (release(1),)
    assert ledger.pending == (release(2), release(3))
    assert ledger.head == json.loads(lines_of(path)[1])["hash"]
    ledger.append(release(1))  # an exact replay of a committed line is no new line
    ledger.append(release(2))
    assert path.read_bytes() == before  # what was released stays on disk, also while it is replayed
    ledger.append(release(3))
    assert (ledger.head, len(ledger)) == (whole.head, 4)
    assert list(ledger.pending) == []
    ledger.append(release(4))
    assert len(Ledger.load(path)) == 5


CHANGES = [
    {"release_hash": "0" * 64},
    {"noise_address": "ab" * 32},
    {"noise_multiplier": 1.0},
    {"clip": 1.0},
    {"sampling_rate": 0.5},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_replay_that_differs_is_refused(path: Path, changes: dict[str, Any]) -> None:
    write(path)
    before = path.read_bytes()
    ledger = Ledger.rewind(path, 2)
    with pytest.raises(LedgerError, match=rf"replay differs from line 3 .*{next(iter(changes))}"):
        ledger.append(release(2, **changes))
    with pytest.raises(LedgerError, match=r"replay differs .*round"):
        ledger.append(release(3))
    assert path.read_bytes() == before


@pytest.mark.parametrize("lines", [0, 5])
def test_rewind_needs_the_lines(path: Path, lines: int) -> None:
    write(path)
    with pytest.raises(LedgerError, match="whole lines"):
        Ledger.rewind(path, lines)


# ---------------------------------------------------------------- what is refused


def test_an_exact_replay_writes_nothing(path: Path) -> None:
    ledger = write(path)
    before = path.read_bytes()
    for number in (1, 3):
        ledger.append(release(number))
    assert path.read_bytes() == before


@pytest.mark.parametrize(("number", "result"), [(3, "0" * 64), (4, "0" * 64), (4, release(3).release_hash)])
def test_noise_key_reuse(path: Path, number: int, result: str) -> None:
    ledger = write(path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="noise key reuse: round 3"):
        ledger.append(release(number, noise_address=release(3).noise_address, release_hash=result))
    assert path.read_bytes() == before


@pytest.mark.parametrize("number", [1, 2, 3])
def test_rounds_grow(path: Path, number: int) -> None:
    ledger = write(path)
    with pytest.raises(LedgerError, match="rounds must grow"):
        ledger.append(release(number, noise_address="ab" * 32))


@pytest.mark.parametrize("clients", [[], [7], list(range(50))])
def test_participants_never_enter_a_user_level_line(path: Path, clients: list[int]) -> None:
    ledger = write(path, 1)
    with pytest.raises(LedgerError, match="who took part"):
        ledger.append(release(2, clients=clients))
    assert not (path.parent / "private").exists()
    assert all(json.loads(line)["participants"] == "" for line in lines_of(path)[1:])


@pytest.mark.parametrize(
    ("unit", "changes", "message"),
    [
        ("user", {"steps": 2}, "one noised step"),
        ("record", {"clients": None}, "list of clients"),
        ("none", {"clients": None}, "list of clients"),
        ("record", {"clients": [1, 1]}, "twice"),
        ("record", {"steps": 0}, "one step or more"),
        ("record", {"clip": None}, "needs a clip"),
        ("record", {"noise_address": ""}, "noise address"),
        ("user", {"noise_multiplier": 0.0}, "noise multiplier above 0"),
        ("none", {"noise_multiplier": 1.0}, "mechanism none neither"),
        ("none", {"noise_address": "ab"}, "mechanism none neither"),
    ],
)
def test_lines_that_do_not_fit(path: Path, unit: Unit, changes: dict[str, Any], message: str) -> None:
    ledger = write(path, 1, unit)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=message):
        ledger.append(release(2, unit, **changes))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"trust": "record-local"},
        {"adjacency": "replace-one"},
        {"delta": None},
        {"unit": "none", "trust": "none", "adjacency": "none", "delta": 1e-5},
    ],
)
def test_openings_that_contradict_themselves(path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(LedgerError):
        Ledger.create(path, opening(**changes))
    assert not path.exists()


def test_only_accounted_samplers(path: Path) -> None:
    units: dict[Unit, str] = {"user": "client_sampling", "record": "record_sampling"}
    for unit, name in units.items():
        with pytest.raises(PrivacyRefusal, match="Poisson"):
            Ledger.create(path, opening(unit, **{name: "fixed"}))
    ledger = Ledger.create(path, opening("record", client_sampling="fixed", record_sampling="all"))
    ledger.append(release(1, "record", sampling_rate=1.0))
    with pytest.raises(LedgerError, match="every record takes part"):
        ledger.append(release(2, "record"))


def test_two_writers_are_noticed(path: Path) -> None:
    first, second = write(path, 1), Ledger.load(path)
    first.append(release(2))
    with pytest.raises(LedgerError, match="another program"):
        second.append(release(2))


def test_the_order_of_answers_is_not_part_of_a_line() -> None:
    assert release(1, "record", clients=[3, 1, 2]) == release(1, "record", clients=[1, 2, 3])


# ---------------------------------------------------------------- hash of a release


def test_release_hash_depends_on_all_it_names() -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(1, dtype=np.float32),
        "c": np.zeros((0, 3)),
    }
    same = dict(reversed(list(arrays.items())))
    same["a"] = np.asfortranarray(arrays["a"])  # memory order is no content
    assert release_hash(arrays) == release_hash(same)
    others = [
        arrays | {"a": arrays["a"].astype(np.float64)},
        arrays | {"a": arrays["a"].reshape(3, 2)},
        arrays | {"a": np.nextafter(arrays["a"], np.float32(9))},
        arrays | {"c": np.zeros((3, 0))},
        {"a": arrays["a"], "c": arrays["b"], "b": arrays["c"]},
        {"a": arrays["a"]},
        {},
    ]
    assert len({release_hash(arrays), *map(release_hash, others)}) == 1 + len(others)
    with pytest.raises(TypeError, match="a holds Python objects"):
        release_hash({"a": np.array([None])})


def test_who_took_part_is_committed_to_and_kept_apart(path: Path) -> None:
    """Elsewhere than where secrecy is credited, the lines hold a salted hash and a private file the lists."""
    ledger = Ledger.create(path, opening("record"))
    ledger.append(release(1, "record", clients=[4, 2], salt="a"))
    ledger.append(release(2, "record", clients=[4, 2], salt="b"))
    fields = [json.loads(line) for line in lines_of(path)[1:]]
    assert fields[0]["participants"] != fields[1]["participants"], "without salts equal rounds would show"
    assert all("clients" not in line and "salt" not in line for line in fields)
    aside = path.parent / "private" / "participants.jsonl"
    assert aside.stat().st_mode & 0o077 == 0
    assert [one.clients for one in Ledger.load(path).releases] == [[2, 4], [2, 4]]
    whole = aside.read_bytes()
    aside.write_bytes(whole.replace(b"[2,4]", b"[2,5]", 1))
    with pytest.raises(LedgerError, match="is not what this line was written for"):
        Ledger.load(path)
    aside.write_bytes(whole.splitlines(keepends=True)[0])
    with pytest.raises(LedgerError, match="does not say who took part in round 2"):
        Ledger.load(path)


def test_a_round_killed_after_its_participants_were_written_is_repeated(path: Path) -> None:
    ledger = Ledger.create(path, opening("record"))
    ledger.append(release(1, "record"))
    aside = path.parent / "private" / "participants.jsonl"
    whole = aside.read_bytes()
    aside.write_bytes(whole + whole.replace(b'"round":1', b'"round":2') + b'{"clients":[1')  # and a torn line
    again = Ledger.rewind(path, 2)
    with pytest.raises(LedgerError, match="repeated with other clients"):
        again.append(release(2, "record", clients=[7]))
    again.append(release(2, "record"))
    again.append(release(3, "record"))
    assert [one.clients for one in Ledger.load(path).releases] == [[1, 2]] * 3
