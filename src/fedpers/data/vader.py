"""Raters of sentences from film reviews: the movie file behind VADER (Hutto and Gilbert 2014)."""

from __future__ import annotations

import tarfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedpers.config import DataConfig
from fedpers.data.base import Federation, Record, Source, choose_users
from fedpers.errors import DataError
from fedpers.models import assets
from fedpers.privacy.randomness import order
from fedpers.sources import FROM_RAW_DATA, Parts, assemble, broken, is_among, text_lines

ASSET = "vader-ratings"
FOLDER = "hutto_ICWSM_2014"  # inside the archive inside the archive
RATINGS, TEXTS = "movieReviewSnippets_anonDataRatings.txt", "movieReviewSnippets_GroundTruth.txt"
BATCH = 30  # sentences that the same people rated
TRAIN = 20  # of them, the first


@dataclass(frozen=True, slots=True)
class _Sentence:
    id: str
    text: str
    ratings: tuple[int, ...]


class Vader(Source):
    """Each record: a sentence, and how one rater felt it, from "-4" (very negative) to "4" (very positive).

    The archive holds a list of ratings per sentence, without names. That the same place in the lists of 30 sentences in
    a row is the same person is an inference, nowhere documented. For it speak the lengths of the lists, which change at
    multiples of 30 only, and the ratings: those at one place deviate from the other raters' mean in the same direction
    within a batch, and not from one batch to the next (`tests/test_sources.py` computes both). In the tweets, product
    reviews and editorials of the same archive neighbours at one place do not agree either, so a place there is nobody,
    and they are not read.

    All raters of a batch rate the same sentences. So a sentence is for training or for testing for all of them (it is
    the conversation; one text of 10,588 stands in two batches). And the batch, not the rater, decides who is a
    development user: sentences are public, but how people rated them is not, and a development user from a member's
    batch would bring the member's test sentences, with ratings that mostly agree, into tuning. For the same reason a
    user swaps personal state with another rater of the batch: neighbouring sentences share a polarity, and the state
    of a rater elsewhere would lack it.
    """

    about = "6,619 raters (inferred, each within a batch) of 30 sentences from film reviews"
    licence = "MIT"
    citation = "Hutto, Gilbert: VADER: A Parsimonious Rule-based Model for Sentiment Analysis, ICWSM 2014"
    split = "the first 20 sentences of a batch of 30 are for training, for all its raters, the last 10 for testing"
    tasks = ("rating",)

    def load(self, config: DataConfig, key: bytes) -> Federation:
        """Read the asset and build the federation of the configured people."""
        batches, left_over = _batches(_sentences(assets.fetch(ASSET)))
        held: dict[str, Parts] = {}
        for number, batch in enumerate(batches):
            if is_among(config.people, f"vader/{number}"):
                held |= {f"{number:03d}/{place:02d}": _parts(batch, number, place) for place in _places(batch)}
        federation = assemble(
            "vader", held, config, lambda users, limit: _choose(users, limit, key), {"sentences_left_over": left_over}
        )
        return replace(federation, swap=_same_batch(federation.users), facts=_facts(federation))


def _places(batch: Sequence[_Sentence]) -> range:
    return range(len(batch[0].ratings))


def _parts(batch: Sequence[_Sentence], number: int, place: int) -> Parts:
    records = [
        Record(f"{number:03d}/{place:02d}/{sentence.id}", sentence.id, sentence.text, str(sentence.ratings[place]))
        for sentence in batch
    ]
    return records[:TRAIN], records[TRAIN:]


def _sentences(path: Path) -> list[_Sentence]:
    """Join the two files of the inner archive, line by line."""
    rows = _rows(path, RATINGS, 4)
    texts = _rows(path, TEXTS, 3)
    if len(rows) != len(texts):
        raise DataError(
            f"{RATINGS} has {len(rows)} lines and {TEXTS} {len(texts)}; run `fedpers assets fetch {ASSET} --force`."
        )
    sentences = []
    for line, ((name, _, _, listed), (same, _, text)) in enumerate(zip(rows, texts, strict=True), start=1):
        if name != same or not text.strip():
            raise broken(TEXTS, line, f"no text, or another sentence than in {RATINGS}", ASSET)
        sentences.append(_Sentence(name, text.strip(), _numbers(listed, line)))
    if len({sentence.id for sentence in sentences}) != len(sentences):
        raise DataError(f"{RATINGS}: two sentences have one id; run `fedpers assets fetch {ASSET} --force`.")
    return sentences


def _numbers(listed: str, line: int) -> tuple[int, ...]:
    try:
        if not (listed.startswith("[") and listed.endswith("]")):
            raise ValueError
        found = tuple(int(number) for number in listed[1:-1].split(","))
    except ValueError:
        raise broken(RATINGS, line, "no list of whole numbers", ASSET) from None
    if not all(-4 <= number <= 4 for number in found):
        raise broken(RATINGS, line, "a rating is not from -4 to 4", ASSET)
    return found


def _rows(path: Path, name: str, columns: int) -> list[list[str]]:
    try:
        with tarfile.open(path, "r:gz") as packed:
            stream = packed.extractfile(f"{FOLDER}/{name}")
            content = stream.read() if stream is not None else b""
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise DataError(
            f"{path.name}: {name} cannot be read from it; run `fedpers assets fetch {ASSET} --force`."
        ) from error
    rows = [line.split("\t") for line in text_lines(content, name, ASSET)]
    for line, row in enumerate(rows, start=1):
        if len(row) != columns:
            raise broken(name, line, f"{len(row)} columns, expected {columns}", ASSET)
    return rows


def _batches(sentences: list[_Sentence]) -> tuple[list[list[_Sentence]], int]:
    """Return the whole batches whose sentences all have one number of ratings, and how many sentences are left over."""
    cut = [sentences[start : start + BATCH] for start in range(0, len(sentences), BATCH)]
    whole = [batch for batch in cut if len(batch) == BATCH and len({len(s.ratings) for s in batch}) == 1]
    return whole, len(sentences) - BATCH * len(whole)


def _choose(users: Sequence[str], limit: int | None, key: bytes) -> list[str]:
    """Return at most `limit` users in whole batches but for the last, so that raters to swap with are among them.

    Where one place alone is left, it stays empty: a rater without another of the batch could not swap.
    """
    by_batch: dict[str, list[str]] = defaultdict(list)
    for user in users:
        by_batch[user.split("/")[0]].append(user)
    names = sorted(by_batch)
    chosen: list[str] = []
    for place in order(key, ("batch",), names):
        room = len(users) if limit is None else limit - len(chosen)
        if room > 1 or not chosen:
            chosen += choose_users(by_batch[names[place]], room, key)
    return sorted(chosen)


def _same_batch(users: Sequence[str]) -> tuple[frozenset[int], ...]:
    by_batch: dict[str, set[int]] = defaultdict(set)
    for place, user in enumerate(users):
        by_batch[user.split("/")[0]].add(place)
    return tuple(frozenset(by_batch[user.split("/")[0]] - {place}) for place, user in enumerate(users))


def _facts(federation: Federation) -> tuple[str, ...]:
    members = Counter(user.split("/")[0] for user in federation.users)
    shared = sum(members[user.split("/")[0]] - 1 for user in federation.users) / max(1, len(federation.users))
    return (
        "that one place in the lists of a batch is one person is inferred from the ratings, not documented, and a "
        f"person who rated several of the {len(members)} batches is as many users, and protected as each of them alone",
        f"on average {shared:.1f} other members rate the same sentences, and what they hold is protected as theirs, "
        "though it tells of the user's ratings as far as people agree",
        FROM_RAW_DATA,
    )
