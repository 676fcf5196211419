"""A change of preference, and people held out: who holds whose records, and what it does to models."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from conftest import Command
from fedpers import registry
from fedpers.config import Config, DataConfig, load_config
from fedpers.data import Federation, Record, load
from fedpers.data.synthetic import Synthetic
from fedpers.drift import changed
from fedpers.errors import ConfigError, DataError
from fedpers.evaluation.models import swap_partners
from fedpers.experiment import prepare
from fedpers.privacy.randomness import seed_key
from fedpers.simulation import simulate
from test_tasks import Rated

KEY = seed_key(0)
Tiny = Callable[..., Config]


class Few(Synthetic):
    """Made-up people, of whom there are twelve."""

    def load(self, config: DataConfig, key: bytes) -> Federation:
        """Make no more than twelve."""
        return super().load(config.model_copy(update={"users": min(config.users or 12, 12)}), key)


class Deaf(Synthetic):
    """Made-up people, always the same ten."""

    def load(self, config: DataConfig, key: bytes) -> Federation:
        """Make ten, whatever is asked for."""
        return super().load(config.model_copy(update={"users": 10}), key)


@pytest.fixture(autouse=True)
def _sources(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {("data", "few"): Few, ("data", "deaf"): Deaf, ("data", "rated"): Rated}
    monkeypatch.setattr(registry, "_registered", found)


def loaded(*overrides: str) -> Federation:
    return load(load_config(None, ["data.name=synthetic", "data.users=6", *overrides]), KEY)


def ids(federation: Federation) -> list[list[str]]:
    return [[record.id for record in held] for held in federation.train]


def history(person: str, train: int, test: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    made = [Record(f"{person}/{n}", f"{person}/{n}", "asked", "said") for n in range(train + test)]
    return tuple(made[:train]), tuple(made[train:])


def made_up(**people: tuple[int, int]) -> Federation:
    """A federation with so many training and test records of each person."""
    parts = [history(person, *counts) for person, counts in people.items()]
    nobody = tuple(frozenset[int]() for _ in people)
    train, test = (tuple(part[side] for part in parts) for side in (0, 1))
    return Federation("made-up", tuple(people), train, test, (), frozenset(), nobody)


# A change of preference


def test_records_after_the_change_are_a_donors() -> None:
    everyone = made_up(a=(4, 1), b=(3, 2), x=(6, 2))
    found = changed(made_up(a=(4, 1)), made_up(a=(4, 1), x=(6, 2)), 0.5, KEY).check()
    assert (found.users, found.donors) == (("a",), ("x",))
    assert ids(found) == [["a/0", "a/1", "x/3", "x/4", "x/5"]]
    assert [record.id for record in found.test[0]] == ["x/6", "x/7"]
    odd = changed(made_up(b=(3, 2)), everyone, 0.4, KEY)
    assert ids(odd)[0][:2] == ["b/0", "b/1"], "position 1 lies before 0.4 * 3, position 2 does not"
    assert odd.donors[0] in {"a", "x"}


def test_a_made_up_history_keeps_the_partners_and_the_group_of_both_its_people() -> None:
    """Members a, b, c with donors; whoever met the donor may have a text in the member's test records."""
    sizes: dict[str, Any] = dict.fromkeys("abcxyz", (4, 2))
    everyone = made_up(**sizes)
    pairs = changed(made_up(**dict.fromkeys("abc", (4, 2))), everyone, 0.5, KEY).donors
    place = {user: index for index, user in enumerate(everyone.users)}
    partners = [frozenset[int]() for _ in everyone.users]
    partners[place[pairs[0]]], partners[1] = frozenset({1}), frozenset({place[pairs[0]]})  # a's donor met b
    partners[2], partners[place[pairs[2]]] = frozenset({place[pairs[2]]}), frozenset({2})  # c met c's donor
    groups = [frozenset[int]() for _ in everyone.users]
    groups[place[pairs[0]]] = frozenset({place[pairs[1]], 2})  # a's donor may swap with b's donor, and with c
    found = changed(
        made_up(**dict.fromkeys("abc", (4, 2))),
        replace(everyone, partners=tuple(partners), swap=tuple(groups)), 0.5, KEY,
    )  # fmt: skip
    assert found.partners == (frozenset({1}), frozenset({0}), frozenset())
    assert found.swap == (frozenset({1, 2}), frozenset(), frozenset())


def test_members_keep_their_beginning_and_each_donor_gives_once() -> None:
    before, after = loaded("data.max_train=20"), loaded("data.max_train=20", "data.drift=0.3")
    assert after.users == before.users
    assert len(set(after.donors)) == 6
    assert not set(after.donors) & set(after.users)
    for user, donor, old, new, test in zip(
        after.users, after.donors, ids(before), ids(after), after.test, strict=True
    ):  # fmt: skip
        own = [name for name in new if name.startswith(f"{user}/")]
        assert own == old[: len(own)] == new[: len(own)]
        assert own
        assert all(name.startswith(f"{donor}/") for name in (*new[len(own) :], *(record.id for record in test)))
        assert abs(len(own) - 0.3 * len(old)) < 1
    assert after.counts["drift_donors"] == 6
    assert after.counts["drift_train_records_before"] + after.counts["drift_train_records_after"] == sum(
        map(len, after.train)
    )
    assert any("made-up history" in fact for fact in after.facts)
    assert loaded("data.drift=0.3", "data.max_train=20").donors == after.donors
    assert load(load_config(None, ["data.name=synthetic", "data.users=6", "data.drift=0.3"]), seed_key(1)).donors != (
        after.donors
    )


@pytest.mark.parametrize("share", [0.01, 0.1, 1 / 3, 0.5, 0.77, 0.99])
def test_no_cap_is_passed(share: float) -> None:
    """Delta and noise are planned with data.max_train."""
    for own in range(1, 21):
        for given in range(1, 21):
            found = changed(made_up(a=(own, 1)), made_up(a=(own, 1), x=(given, 1)), share, KEY)
            assert len(found.train[0]) <= 20, (own, given)
            assert ids(found)[0][0] == "a/0"


def test_one_record_less_moves_no_donors_record_and_at_most_one_more_of_the_members() -> None:
    whole, everyone = made_up(a=(9, 1), b=(7, 1)), made_up(a=(9, 1), b=(7, 1), x=(8, 1), y=(5, 1))
    before = set(chain(*ids(changed(whole, everyone, 0.6, KEY))))
    for gone in range(9):
        less = replace(whole, train=(whole.train[0][:gone] + whole.train[0][gone + 1 :], whole.train[1]))
        after = set(chain(*ids(changed(less, everyone, 0.6, KEY))))
        assert before - after <= {f"a/{n}" for n in range(9)}
        assert len(before - after) <= 1
        assert len(after - before) <= 1
        assert all(name.startswith("a/") for name in after - before)


def test_one_record_less_of_a_donor_moves_at_most_one_more_of_the_donors() -> None:
    member, everyone = made_up(a=(9, 1)), made_up(a=(9, 1), x=(8, 1))
    before = set(ids(changed(member, everyone, 0.6, KEY))[0])
    for gone in range(8):
        left = everyone.train[1][:gone] + everyone.train[1][gone + 1 :]
        after = set(ids(changed(member, replace(everyone, train=(everyone.train[0], left)), 0.6, KEY))[0])
        assert len(before - after) <= 1
        assert len(after - before) <= 1
        assert all(name.startswith("x/") for name in before ^ after)


def test_too_few_people_outside_is_told_with_both_ways_out() -> None:
    with pytest.raises(DataError, match=r"each of 8 members .* are 4 people .*data\.users to 6 .*held_out to 6"):
        loaded("data.name=few", "data.users=8", "data.drift=0.5")
    for mended in ("data.users=6", "data.held_out=6"):
        found = loaded("data.name=few", "data.users=null", mended, "data.drift=0.5")
        assert len(found.users) == len(found.donors) == 6
    with pytest.raises(ConfigError, match=r"data\.drift = 1"):
        loaded("data.drift=1")


def test_a_source_that_chooses_others_when_asked_for_more_is_refused() -> None:
    everyone = made_up(b=(3, 1), x=(3, 1), y=(3, 1))
    with pytest.raises(DataError, match="1 members are not among the people"):
        changed(made_up(a=(3, 1)), everyone, 0.5, KEY)
    found = changed(made_up(b=(3, 1)), everyone, 0.5, KEY)
    with pytest.raises(DataError, match="every epsilon false"):
        replace(found, pool_authors=frozenset(found.donors)).check()


def test_personal_models_of_an_early_preference_fail_after_a_late_change(tiny: Tiny, tmp_path: Path) -> None:
    """The same test records; every other rater gives large numbers, so half of the donors rate as the member did."""

    def own(drift: float) -> tuple[pd.Series, Federation]:
        data = {"name": "rated", "users": 12, "min_train": 10, "drift": drift}
        config = tiny(method="local", data=data, task={"name": "rating"}, rounds=0, personal={"epochs": 20})
        users = simulate(config, tmp_path / f"run{drift}").users.to_pandas()
        return users[users.kind == "own"].set_index("user")["rmse"], prepare(config).federation

    (late, federation), (early, same) = own(0.9), own(0.1)
    assert [[r.id for r in held] for held in federation.test] == [[r.id for r in held] for held in same.test]
    other = [int(u[-1]) % 2 != int(d[-1]) % 2 for u, d in zip(federation.users, federation.donors, strict=True)]
    assert 2 < sum(other) < 10
    lag = (late - early)[other]
    assert (lag > 0).mean() > 0.7, "one or the other who overshoots"
    assert lag.mean() > 0.5
    assert abs((late - early)[[not one for one in other]].mean()) < 0.2, "a donor of the same taste changes little"


# People held out


def test_people_held_out_are_the_last_whom_the_source_would_choose() -> None:
    for users in ("null", "100", "3"):
        whole = loaded("data.name=few", f"data.users={users}")
        found = loaded("data.name=few", f"data.users={users}", "data.held_out=4")
        assert len(found.users) == min(len(whole.users), 8)
        assert set(found.users) <= set(whole.users)
        assert found.counts["held_out"] == 4
    with pytest.raises(DataError, match=r"data\.held_out = 12: 12 people .* lower it"):
        loaded("data.name=few", "data.held_out=12")
    with pytest.raises(DataError, match=r"does not heed data\.users"):
        loaded("data.name=deaf", "data.held_out=2")


def test_somebody_more_moves_at_most_one_person_in_or_out(tmp_path: Path) -> None:
    rows = [f'{{"user": "u{u}", "input": "a{n}", "target": "b{n}"}}' for u in range(40) for n in range(6)]

    def members(kept: list[str]) -> set[str]:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")
        small = (f"data.path={path}", "data.min_train=3", "data.min_test=1", "data.held_out=7")
        found = loaded("data.name=files", "data.users=null", *small)
        assert found.counts["held_out"] == 7
        assert found.counts["not_chosen"] == 0
        return set(found.users)

    everyone = members(rows)
    for gone in range(0, 40, 9):
        less = members([row for row in rows if f'"u{gone}"' not in row])
        assert less <= everyone
        assert len(everyone - less) <= 1


def test_describe_shows_both(fedpers: Command) -> None:
    small = ("data.users=5", "data.held_out=9", "data.drift=0.25")
    code, out, _ = fedpers("data", "describe", "synthetic", *small)
    assert code == 0
    assert re.search(r"^users +5$", out, re.MULTILINE)
    assert re.search(r"^held out +9$", out, re.MULTILINE)
    assert re.search(r"^drift donors +5$", out, re.MULTILINE)
    assert re.search(r"^drift train records after +\d+$", out, re.MULTILINE)
    assert "data.drift=0.25" in out
    _, out, _ = fedpers("data", "describe", "synthetic", "data.users=5")
    assert "held out" not in out
    assert "drift" not in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chitchat", "movielens", "vader", "shakespeare"])
def test_real_people_change_and_are_held_out(name: str) -> None:
    """Conversations stay on one side, no record stands twice, and a swap control can be had."""
    found = load(load_config(None, [f"data.name={name}", "data.users=60", "data.held_out=70", "data.drift=0.5"]), KEY)
    assert len(found.users) == len(found.donors) == 60
    swap = swap_partners(found.users, found.partners, KEY, found.swap)
    assert all(other not in found.partners[user] for user, other in enumerate(swap))
