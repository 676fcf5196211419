"""Do people's own models write as they do? Models of a finished run answer held-out test records; answers are scored.

What is written is compared with the real text in memory and forgotten: no text reaches a file or the screen. Features
of the prompts stay in the cache, as those of all texts do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from fedpers.cohort.batching import Index, microbatches
from fedpers.cohort.model import CohortModel, Parameters
from fedpers.data.base import Federation
from fedpers.decoding import with_room, write
from fedpers.errors import ConfigError, DataError
from fedpers.evaluation import models as evaluation
from fedpers.evaluation.per_user import write_table
from fedpers.evaluation.statistics import Floats, Interval, compare, mean_interval
from fedpers.evaluation.text_metrics import Pairs, meteor, rouge
from fedpers.experiment import prepare
from fedpers.finished_run import (
    Arrays,
    Finished,
    check_fit,
    members_of,
    model_over,
    of_members,
    open_run,
    plan_of,
)
from fedpers.reporting import Reporter
from fedpers.run_place import check_new
from fedpers.tasks.base import Examples, examples_of

COHORT = 64  # people whose models are in memory at a time
Kinds = dict[str, evaluation.Kind]


@dataclass(frozen=True)
class Written:
    """How near models came to what people wrote; all by kind of model and then by metric, means over people.

    Attributes:
        people: whose test records were answered.
        records: how many of them.
        tokens: at most so many were written of each.
        first: the model that the others are compared with: own, or global where nothing is personal.
        means: with their 95% bootstrap intervals.
        gains: mean gain of `first` over the kind, 95% interval, p of Wilcoxon's paired test.
    """

    people: int
    records: int
    tokens: int
    first: str
    means: Mapping[str, Mapping[str, Interval]]
    gains: Mapping[str, Mapping[str, tuple[float, float, float, float]]]


def write_texts(
    run_dir: Path, out: Path, *, users: int | None = None, tokens: int | None = None, reporter: Reporter | None = None
) -> Written:
    """Let members' own, the shared, swapped and untrained models answer test records; write table and JSON.

    Models take the likeliest token each time, so a run always writes the same. ROUGE is that of LaMP, so it is not
    computed another time for a run on LaMP-4 to 7. Targets are compared whole, however few tokens may be written.

    Args:
        run_dir: a finished language-model run.
        out: a new directory, of which only the owner may read what it holds.
        users: the first so many of those whom the run measured.
        tokens: at most so many of an answer, by default 32 or what fits.
        reporter: whom to tell about progress.

    Raises:
        ConfigError: another task, a number out of range, or a library that is missing.
        DataError: the data source has other people today than the run had.
        RunDirectoryError: `out` exists, or the run lacks what its members' models need.
    """
    check_new(out)
    if users is not None and users < 1:
        raise ConfigError(f"--users {users}: expected 1 or more.")
    run, reporter = open_run(run_dir), reporter or Reporter()
    short, tokens = with_room(run, tokens)
    names = tuple(scores(()))  # what is not installed is told before anything is written
    experiment = prepare(run.config)
    people = list(experiment.measured)[:users]
    own = of_members(run)[0] if run.plan.personal else {}
    federation = _tested(run, experiment.federation, people)
    records, examples = examples_of(federation)
    model = _model(short, federation, replace(examples, continuations=("",) * len(records)), own, reporter)
    kinds = _kinds(run, model, own, people, experiment.swap or {})
    values: dict[str, dict[str, Floats]] = {}
    reporter.stage("models that write", 0, len(kinds))
    for done, (kind, one) in enumerate(kinds.items(), start=1):
        said = _answers(model, one, tokens)
        found = scores([(text, record.target) for text, record in zip(said, records, strict=True)])
        values[kind] = {name: _per_user(found[name], examples) for name in names}
        reporter.stage("models that write", done, len(kinds))
    result = _summary(values, np.array([len(rows) for rows in examples.test]), tokens, run.config.seed)
    out.mkdir(parents=True, mode=0o700)  # metrics of single people are private
    write_table(pa.Table.from_pylist(_rows(values, federation, people)), out / "written.parquet")
    (out / "written.json").write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    return result


def scores(pairs: Pairs) -> dict[str, list[float]]:
    """Return all metrics of pairs of a written and the true text, by name."""
    return rouge(pairs) | meteor(pairs)


def _tested(run: Finished, federation: Federation, people: list[int]) -> Federation:
    """Return some members with their test records alone; their positions in it are those in `people`."""
    members, users = members_of(run), [federation.users[user] for user in people]
    if len(members) != len(federation.users) or [members[user] for user in people] != users:
        raise DataError(
            f"data {federation.source}: it does not have the people of the run any more; put the files back as they "
            "were, or run again."
        )
    nobody = tuple(frozenset[int]() for _ in people)
    tests = tuple(federation.test[user] for user in people)
    nothing = tuple(() for _ in people)
    return replace(federation, users=tuple(users), train=nothing, test=tests, partners=nobody, swap=None, lazy="")


def _model(run: Finished, federation: Federation, examples: Examples, own: Arrays, reporter: Reporter) -> CohortModel:
    first = run.shared | {name: array[0] for name, array in own.items()}
    model = model_over(run, plan_of(run, first), federation, examples, reporter)
    check_fit(model, first, run.path)
    return model


def _kinds(run: Finished, model: CohortModel, own: Arrays, people: list[int], partner: Mapping[int, int]) -> Kinds:
    """Return the models to compare, by the names of the users table; the first is the one of interest."""
    given = {name: torch.from_numpy(np.array(value)) for name, value in run.shared.items()}

    def of(members: list[int]) -> Parameters:
        held = {name: torch.from_numpy(np.array(array[members])) for name, array in own.items()}
        return model.broadcast(len(members), given) | held

    kinds: Kinds = {}
    if own:
        kinds["own"] = evaluation.Kind(lambda users: of([people[user] for user in users]), "own")
    if run.shared:
        kinds["global"] = evaluation.common(model, run.shared, "shared")
    if own:
        kinds["swap"] = evaluation.Kind(lambda users: of([partner[people[user]] for user in users]), "swap")
    kinds["zero_shot"] = evaluation.common(model, {}, "initial")
    return kinds


def _answers(model: CohortModel, kind: evaluation.Kind, tokens: int) -> list[str]:
    """Return what is written in answer to each row of the examples."""
    test, written = model.examples.test, [""] * len(model.lengths)
    size = len(test) if kind.common else COHORT
    for start in range(0, len(test), size):
        cohort = list(range(len(test)))[start : start + size]
        rows: Index = np.concatenate([test[user] for user in cohort])
        owners: NDArray[np.int64] = np.repeat(np.arange(len(cohort)), [len(test[user]) for user in cohort])
        model.load(kind.parameters(cohort[:1] if kind.common else cohort))
        for part in microbatches(model.lengths[rows] + tokens, model.budget):
            who = np.zeros_like(part) if kind.common else owners[part]
            for row, ids in zip(rows[part], write(model, rows[part], who, tokens), strict=True):
                written[row] = str(model.backbone.tokenizer.decode(ids, skip_special_tokens=True))
    return written


def _per_user(values: list[float], examples: Examples) -> Floats:
    """Return the mean over each user's records, (people,)."""
    return np.array([np.mean(np.array(values)[rows]) for rows in examples.test])


def _summary(values: Mapping[str, Mapping[str, Floats]], tested: NDArray[np.int64], tokens: int, seed: int) -> Written:
    first = next(iter(values))

    def gain(own: Floats, other: Floats) -> tuple[float, float, float, float]:
        versus = compare(own, other, tested, None, None, np.random.default_rng(seed))
        return versus.mean_gain, *versus.ci95, versus.p_value

    return Written(
        len(tested),
        int(tested.sum()),
        tokens,
        first,
        {
            kind: {name: mean_interval(one, np.random.default_rng(seed)) for name, one in found.items()}
            for kind, found in values.items()
        },
        {
            kind: {name: gain(values[first][name], one) for name, one in found.items()}
            for kind, found in values.items() if kind != first
        },
    )  # fmt: skip


def _rows(
    values: Mapping[str, Mapping[str, Floats]], federation: Federation, people: list[int]
) -> list[dict[str, object]]:
    return [
        {"user": user, "kind": kind, "test_records": len(federation.test[place])}
        | {name: float(one[place]) for name, one in found.items()}
        for kind, found in values.items() for place, user in enumerate(people)
    ]  # fmt: skip
