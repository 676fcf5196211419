"""Small files in LongLaMP's form, about made-up people whose words depend on who they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from fedpers.data.synthetic import TOPICS
from fedpers.errors import DataError
from fedpers.formats.longlamp import ENDINGS, FORMS, Task


def write_example(file: Path, task: Task, users: int = 30, items: int = 24, rows: int = 1, seed: int = 0) -> None:
    """Write made-up people's rows to one file; its ending says whether as JSON, JSONL or Parquet.

    Each person has one of four topics at heart, and writes about whatever it is in words of that topic, with a word of
    the title between them: the title says what to write about, and only the profile says how.

    Args:
        file: `.json`, `.jsonl`, `.ndjson` or `.parquet`; its folder is made if it is absent.
        task: abstract, review or topic.
        users: people.
        items: profile items of a person.
        rows: questions of a person; 1 is the benchmark's user setting.
        seed: of all draws.

    Raises:
        DataError: another ending.
    """
    kind = file.suffix.lower()
    if kind not in ENDINGS:
        raise DataError(f"{file.name}: expected a name that ends in {', '.join(ENDINGS)}.")
    form = FORMS[task]
    made = []
    for user in range(users):
        rng = np.random.default_rng([seed, user])
        profile = [_item(task, user, place, rng) for place in range(items)]
        for place in range(items, items + rows):
            asked = _item(task, user, place, rng)
            text = form.prompt.format(**asked)
            if task == "abstract":
                text += f" using the following items: 1. {asked['title'].split()[0]}"
            made.append(
                {form.user: f"person{user}", "input": text, "output": asked[form.answer], "profile": list(profile)}
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(made), file)
    elif kind == ".json":
        file.write_text(json.dumps(made, indent=1), encoding="utf-8")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def _item(task: Task, user: int, place: int, rng: np.random.Generator) -> dict[str, Any]:
    topics = tuple(TOPICS)
    heart = TOPICS[topics[user % len(topics)]]
    title = [str(word) for word in rng.choice(TOPICS[topics[int(rng.integers(len(topics)))]], size=3)]
    own = [str(word) for word in rng.choice(heart, size=8)]
    text = " ".join([*own[:4], title[0], *own[4:]])
    if task == "abstract":
        return {"id": f"{user}-{place}", "title": " ".join(title), "abstract": text, "year": 2000 + place}
    if task == "topic":
        return {"id": f"{user}-{place}", "author": f"person{user}", "summary": " ".join(title), "content": text}
    return {
        "overall": str(float(1 + rng.integers(5))), "description": " ".join(title), "summary": title[0],
        "reviewText": text,
    }  # fmt: skip
