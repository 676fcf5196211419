"""MovieLens-100K: 100,000 ratings of 1,682 films by 943 people, 1997 to 1998 (Harper and Konstan 2015)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from fedpers.config import DataConfig
from fedpers.data.base import Federation, Record, Source, choose_users
from fedpers.errors import DataError
from fedpers.models import assets
from fedpers.sources import FROM_RAW_DATA, Parts, assemble, broken, is_among, read_lines

ASSET = "movielens-100k"
TEST_SHARE = 0.2  # of each user's ratings, the last ones
RATINGS = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")  # RecBole's "atomic files"
FILMS = ("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq")
SCALE = ("1", "2", "3", "4", "5")


@dataclass(frozen=True, slots=True)
class _Rating:
    user: str
    film: str
    value: str
    time: int


class Movielens(Source):
    """Each record: a film's title, year and genres, and the rating of one user, "1" to "5".

    What is private is that a user rated a film, and how. The texts are public; they are the same for everybody, so a
    record is a conversation of its own: another user's rating of the same film tells of that user. Age, gender,
    occupation and zip code are in the archive, and are not unpacked.
    """

    about = "ratings of 1,682 films by 943 people"
    licence = "GroupLens terms: research only, no redistribution, no commercial use without permission"
    citation = "Harper, Konstan: The MovieLens Datasets: History and Context, ACM TiiS 5(4), 2015"
    split = "the last 20% of each user's ratings are for testing (by time, ties by number of the film)"
    tasks = ("rating",)

    def load(self, config: DataConfig, key: bytes) -> Federation:
        """Read the asset and build the federation of the configured people."""
        path = assets.fetch(ASSET)
        films = _films(path.with_suffix(".item"))
        ratings = _ratings(path, films)
        history: dict[str, list[_Rating]] = defaultdict(list)
        for rating in ratings:
            history[rating.user].append(rating)
        held = {user: _parts(user, found, films) for user, found in history.items() if is_among(config.people, user)}
        federation = assemble("movielens", held, config, lambda users, n: choose_users(users, n, key), {})
        fewest = min(len(found) for found in history.values())
        return replace(
            federation,
            facts=(
                "titles, years and genres of films are public, and protected is which films a user rated, and how",
                f"the {len(history)} people of the data set, all of it published, have {fewest} ratings or more each, "
                "because GroupLens left out who had fewer: that a member has so many is known beforehand",
                FROM_RAW_DATA,
            ),
        )


def _parts(user: str, ratings: list[_Rating], films: dict[str, str]) -> Parts:
    """Split one user's ratings by time."""
    ordered = sorted(ratings, key=lambda rating: (rating.time, int(rating.film)))
    records = [Record(name := f"{user}/{rating.film}", name, films[rating.film], rating.value) for rating in ordered]
    cut = round(len(records) * (1 - TEST_SHARE))
    return records[:cut], records[cut:]


def _films(path: Path) -> dict[str, str]:
    """Return the text of each film, by its number."""
    films = {}
    for number, (film, title, year, genres) in _rows(path, FILMS):
        if film in films or not film.isdecimal():
            raise broken(path.name, number, "a film's number is no number, or stands there twice", ASSET)
        films[film] = " ".join(f"{title} {year} {genres}".split())
    return films


def _ratings(path: Path, films: dict[str, str]) -> list[_Rating]:
    """Return the ratings, in the file's order."""
    seen: set[tuple[str, str]] = set()
    ratings = []
    for number, (user, film, value, time) in _rows(path, RATINGS):
        if not user or film not in films:
            raise broken(path.name, number, "no user, or a film that has no text", ASSET)
        if (user, film) in seen:
            raise broken(path.name, number, "a second rating of one film by one user", ASSET)
        if value not in SCALE or not time.isdecimal():
            raise broken(path.name, number, "the rating is not 1 to 5, or the time no number of seconds", ASSET)
        seen.add((user, film))
        ratings.append(_Rating(user, film, value, int(time)))
    if not ratings:
        raise DataError(f"{path.name}: has no ratings; run `fedpers assets fetch {ASSET} --force`.")
    return ratings


def _rows(path: Path, header: tuple[str, ...]) -> list[tuple[int, list[str]]]:
    """Return the rows below the header, with their line numbers."""
    lines = read_lines(path, ASSET)
    if not lines or tuple(lines[0].split("\t")) != header:
        raise broken(path.name, 1, f"expected the columns {', '.join(header)}", ASSET)
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        if len(cells) != len(header):
            raise broken(path.name, number, f"{len(cells)} columns, expected {len(header)}", ASSET)
        rows.append((number, cells))
    return rows
