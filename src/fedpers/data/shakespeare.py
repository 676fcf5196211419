"""Shakespeare's plays by role, in the manner of LEAF (Caldas et al. 2018) and McMahan et al. (2017)."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from fedpers.config import DataConfig
from fedpers.data.base import Federation, Record, Source, choose_users
from fedpers.errors import DataError
from fedpers.models import assets
from fedpers.sources import FROM_RAW_DATA, Parts, assemble, is_among, read_lines

ASSET = "shakespeare"
SUFFIX = "_gut.txt"  # modern spelling; the First Folio's is in other files
TEST_FROM = 0.7  # a scene is for testing if the mean position of its speeches in the play lies beyond
WORDS = 100  # of a speech that are kept: the first of what is said, the last of what it answers
TOGETHER = ("ALL", "BOTH")  # not a role: several of them at once

_LONE_DIRECTION = re.compile(r"^[ \t]*\[[^\]}]*?(?:[\]}]|(?=\n[ \t]*\n)|\Z)[ \t]*\n", re.MULTILINE)
_DIRECTION = re.compile(r"\[[^\]}]*?(?:[\]}]|(?=\n[ \t]*\n)|\Z)")  # some are never closed: to the end of the paragraph
_HEADING = re.compile(r"\s*(ACT|Act|SCENE|Scene)\b")
_SPEAKER = re.compile(r"[A-Z][A-Za-z'-]*(?:[ .,]+[A-Za-z'-]+)*\.?")
_LONGEST_NAME = 32


@dataclass(frozen=True, slots=True)
class _Speech:
    scene: str
    role: str
    text: str


class Shakespeare(Source):
    """Each record: a speech, and before it what was said last in the scene, by whoever said it.

    A user is one role of one play. This is made like the benchmark's data, from another edition and by another parser,
    so it has other roles and counts: LEAF-style, not LEAF. A role is a name before speeches: the messengers of two
    scenes are one, and two ways to write a name are two.

    A record quotes another role's speech, so whole scenes are for training or for testing, for all roles of a play, and
    the play, not the role, decides who is a development user.
    """

    about = "roles of 37 plays, LEAF-style (not LEAF's own data)"
    licence = "public domain (Project Gutenberg's texts); the package around them: MIT"
    citation = "texts: Open Shakespeare, Open Knowledge Foundation, 2008; task: Caldas et al.: LEAF, arXiv:1812.01097"
    split = "whole scenes, for all roles: those beyond the first 70% of a play's speeches are for testing"
    tasks = ("language-model",)

    def load(self, config: DataConfig, key: bytes) -> Federation:
        """Read the asset and build the federation of the configured plays."""
        held: dict[str, Parts] = {}
        scenes: dict[str, set[str]] = defaultdict(set)  # of each role
        quoted: dict[str, str] = {}  # record to the role whose speech it answers
        openings = 0
        for path in _plays(assets.fetch(ASSET)):
            play = path.name.removesuffix(SUFFIX)
            if is_among(config.people, f"shakespeare/{play}"):
                speeches = _speeches(play, read_lines(path, ASSET))
                found, opened = _records(play, speeches)
                held |= found
                openings += opened
                for place, speech in enumerate(speeches):
                    scenes[f"{play}/{speech.role}"].add(speech.scene)
                    quoted[f"{play}/{place + 1}"] = f"{play}/{speech.role}"
        federation = assemble(
            "shakespeare", held, config, lambda users, n: choose_users(users, n, key), {"speeches_that_open": openings}
        )
        met = _met([scenes[user] for user in federation.users])
        return replace(federation, partners=met, facts=_facts(federation, quoted))


def _plays(folder: Path) -> list[Path]:
    found = sorted(folder.glob(f"*{SUFFIX}"))
    if not found:
        raise DataError(f"{ASSET}: no play *{SUFFIX} is there; run `fedpers assets fetch {ASSET} --force`.")
    return found


def _speeches(play: str, lines: list[str]) -> list[_Speech]:
    """Parse a play: a name on a line of its own after an empty line begins a speech; ACT or SCENE begins a scene.

    Stage directions, in brackets, are left out. Names are in capitals, in some plays with small letters and a full
    stop; which it is in a play is what most of its names are.
    """
    text = "\n".join(line.rstrip() for line in lines)
    cleaned = ["", *_DIRECTION.sub("", _LONE_DIRECTION.sub("", text + "\n")).splitlines(), ""]
    rows = [line.strip() for line in cleaned]
    names = {place for place in range(1, len(rows) - 1) if _may_name(rows[place - 1], rows[place], rows[place + 1])}
    capitals = {place for place in names if rows[place].isupper()}
    small = 2 * len(capitals) < len(names)
    names = {place for place in names if rows[place].endswith(".")} if small else capitals
    scene, role, said = 0, "", list[str]()
    speeches: list[_Speech] = []

    def end() -> None:
        words = " ".join(said).split()
        if scene and role and words:
            speeches.append(_Speech(f"{play}/{scene}", role, " ".join(words)))
        said.clear()

    for place in range(1, len(rows)):
        alone = not rows[place - 1]
        if alone and _HEADING.match(rows[place]):
            end()
            scene, role = scene + 1, ""
        elif place in names:
            end()
            role = " ".join(rows[place].rstrip(".").upper().split())
        elif not (alone and len(rows[place]) > 3 and rows[place].isupper()):  # a title, as EPILOGUE
            said.append(rows[place])
    end()
    if not speeches:
        raise DataError(f"{play}{SUFFIX}: has no speeches; run `fedpers assets fetch {ASSET} --force`.")
    return speeches


def _may_name(before: str, line: str, after: str) -> bool:
    return (
        not before
        and bool(after)
        and len(line) <= _LONGEST_NAME
        and _SPEAKER.fullmatch(line) is not None
        and _HEADING.match(line) is None
    )


def _records(play: str, speeches: list[_Speech]) -> tuple[dict[str, Parts], int]:
    """Return each role's records, and how many speeches open a scene and so answer nothing."""
    late = _late(speeches)
    held: dict[str, Parts] = {}
    openings = 0
    for place, speech in enumerate(speeches):
        if speech.role in TOGETHER:
            continue
        user = f"{play}/{speech.role}"
        parts = held.setdefault(user, ([], []))
        if place == 0 or speeches[place - 1].scene != speech.scene:
            openings += 1
            continue
        before = " ".join(speeches[place - 1].text.split()[-WORDS:])
        said = " ".join(speech.text.split()[:WORDS])
        parts[speech.scene in late].append(Record(f"{play}/{place}", speech.scene, before, said))
    return held, openings


def _late(speeches: list[_Speech]) -> set[str]:
    """Return the scenes for testing."""
    positions: dict[str, list[float]] = defaultdict(list)
    for place, speech in enumerate(speeches):
        positions[speech.scene].append((place + 0.5) / len(speeches))
    return {scene for scene, found in positions.items() if sum(found) / len(found) > TEST_FROM}


def _met(scenes: list[set[str]]) -> tuple[frozenset[int], ...]:
    """Return, for each role, the others that speak in a scene with it."""
    by_scene: dict[str, set[int]] = defaultdict(set)
    for user, held in enumerate(scenes):
        for scene in held:
            by_scene[scene].add(user)
    return tuple(frozenset(set[int]().union(*(by_scene[s] for s in held)) - {user}) for user, held in enumerate(scenes))


def _facts(federation: Federation, quoted: dict[str, str]) -> tuple[str, ...]:
    members = set(federation.users)
    held = [(u, record) for u, records in zip(federation.users, federation.train, strict=True) for record in records]
    from_member = sum(quoted[record.id] in members - {user} for user, record in held)
    own = sum(quoted[record.id] == user for user, record in held)
    return (
        "the users are roles of plays that everybody can read, and that a pretrained model has most likely read: "
        "nobody's secret is kept here, and what a model remembers of them need not have been learnt here",
        f"{from_member} of {len(held)} training records quote another member, and what those clients hold is protected "
        "as theirs, not as the quoted role's",
        f"{own} of {len(held)} training records have an earlier speech of the same role as their input, so one speech "
        "can be in two records of a client: a guarantee per record covers either record, not the speech in both",
        FROM_RAW_DATA,
    )
