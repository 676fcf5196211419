"""A finished run as it is used afterwards: its models, and how one of them is put over somebody's records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from fedpers.cohort.model import CohortModel
from fedpers.config import GROUPS, Config, PrivacyConfig, expand, load_config, result_text
from fedpers.data.base import Federation, PublicText, Record, load
from fedpers.errors import ConfigError, DataError, RunDirectoryError
from fedpers.evaluation import models as evaluation
from fedpers.experiment import Experiment, build_model, method_plan
from fedpers.formats.tables import Bad, as_text
from fedpers.methods.base import PERSONAL, Phase
from fedpers.models import adapters
from fedpers.models.array_names import group_of
from fedpers.models.backbone import usable
from fedpers.plan import Plan, encodes
from fedpers.privacy.guarantee import Guarantee, resolve
from fedpers.privacy.randomness import seed_key
from fedpers.registry import find
from fedpers.reporting import Reporter
from fedpers.run_directory import MEMBERS
from fedpers.tasks.base import Examples, Task

Arrays = dict[str, NDArray[np.float32]]
NEWCOMER = "newcomer"  # the name that somebody new has; batches are drawn by it
_POOLLESS = ("rating", "classification", "language-model")  # tasks that need no public texts


@dataclass(frozen=True)
class Finished:
    """What is kept of a finished run, without anybody's records."""

    path: Path
    config: Config  # without its privacy section: nothing is released any more
    plan: Plan
    task: Task
    wire: Arrays  # what the server sent last, without companions
    shared: Arrays  # the one shared model, by the model's names

    @property
    def stored(self) -> set[str]:
        """The groups that its private store holds of each member; without adapters, the head alone."""
        trained = (*self.plan.trained, *self.plan.beyond)
        if self.config.evaluation.local_only:
            trained += tuple(expand(self.config.personal.groups))
        return set(self.plan.personal) & (set(GROUPS) if encodes(trained) else {"head"})

    @property
    def mark(self) -> str:
        """A hash of configuration and shared arrays: what a personal model belongs to."""
        digest = hashlib.sha256(result_text(self.config).encode())
        for name in sorted(self.wire):
            digest.update(name.encode() + np.ascontiguousarray(self.wire[name]).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Measured:
    """Metrics of one model on some records."""

    records: int
    metric: str  # the headline among them
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Which:
    """Which model of a run is meant: a member's own, one made by `personalize`, or the shared one; exactly one."""

    user: str | None = None  # a position in users.parquet, or a user id
    model: Path | None = None
    shared: bool = False


def open_run(path: Path) -> Finished:
    """Read a finished or exported run.

    Raises:
        RunDirectoryError: not finished, or its shared arrays are missing or damaged.
    """
    if not path.is_dir():
        raise RunDirectoryError(f"{path}: no such directory.")
    if not (path / "config.yaml").exists() or not (path / "claim.json").exists():
        raise RunDirectoryError(f"{path}: no finished run; finish it with `fedpers run ... --resume` first.")
    config = load_config(path / "config.yaml")
    try:
        usable(config.engine.device)
    except ConfigError as error:
        raise ConfigError(f"{path / 'config.yaml'}: {error}") from error
    plan = method_plan(config.method, config)
    task = find("tasks", config.task.name, Task)(config.task)  # type: ignore[type-abstract]
    folder = path / "adapters"
    shared = _arrays(folder / "shared", plan.shared) if plan.shared else {}
    wire = shared
    if option := plan.method.clusters:
        versions = {place: f"cluster{place}" for place in range(int(plan.options[option]))}
        wire = {f"{v}.{n}": a for v in versions.values() for n, a in _arrays(folder / v, plan.shared).items()}
    plain = config.model_copy(update={"privacy": PrivacyConfig(), "frontier": None})
    return Finished(path, plain, plan, task, wire, shared)


def chosen(run: Finished, which: Which) -> Arrays:
    """Return the arrays of the model that is meant; others are at their public initial values."""
    if (which.user is not None) + (which.model is not None) + which.shared != 1:
        raise ConfigError("say whose model: exactly one of --user, --model and --shared.")
    if which.user is not None:
        return run.shared | _of_member(run, which.user)
    if which.model is not None:
        return _made(run, which.model)
    if not run.shared:
        raise ConfigError(f"method {run.config.method!r} shares nothing, so there is no shared model.")
    return run.shared


def _of_member(run: Finished, user: str) -> Arrays:
    """Return what a member's own model has beyond the shared one, from the run's private store."""
    found, members = of_members(run)
    place = _place(run, user, members)
    check_trained(run, place)
    return {name: np.array(array[place]) for name, array in found.items()}


def of_members(run: Finished) -> tuple[Arrays, int]:
    """Return what all members' own models have beyond the shared one, (members, out, in) by name and not read yet, and
    the number of members.

    Raises:
        ConfigError: a method that keeps nothing personal.
        RunDirectoryError: the run's private store is not there or damaged.
    """
    if not run.plan.personal:
        raise ConfigError(f"method {run.config.method!r} keeps nothing personal: a user's model is --shared.")
    folder = run.path / "private" / "own"
    if not (folder / "written.npy").exists():
        raise RunDirectoryError(
            f"{folder} is not there: this copy of the run holds no member's own model (an exported run leaves them "
            "out); use the run itself, or --shared."
        )
    try:
        found = {file.name.removesuffix(".npy"): np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}
    except (ValueError, EOFError) as error:
        raise RunDirectoryError(f"{folder} is damaged; restore it from a copy.") from error
    members = len(found.pop("written"))
    if {group_of(name) for name in found} != run.stored or any(len(array) != members for array in found.values()):
        raise RunDirectoryError(f"{folder} is damaged; restore it from a copy.")
    return found, members


def check_trained(run: Finished, place: int | None = None) -> None:
    """Refuse a member who did not train at home, since `evaluation.users` are fewer; by default refuse if any did not.

    Raises:
        ConfigError: the own model in the store would be the public initial value.
    """
    written = np.load(run.path / "private" / "own" / "written.npy")
    if not (written.all() if place is None else written[place]):
        raise ConfigError(
            f"only {int(written.sum())} of {len(written)} members were measured and have an own model in {run.path}; "
            "choose one of them (users.parquet), or run again without evaluation.users."
        )


def members_of(run: Finished) -> Sequence[str]:
    """Return the ids of a run's members, by their number; of an exported run, whom its data source gives today."""
    path = run.path / "private" / MEMBERS
    if path.exists():
        return tuple(json.loads(path.read_text(encoding="utf-8")))
    return load(run.config, seed_key(run.config.seed)).users


def _place(run: Finished, user: str, members: int) -> int:
    """Find a member by number or id; one that could be either is refused, since it would open another's model."""
    known = members_of(run)
    kind, _, rest = user.partition(":")
    by_id = {name: place for place, name in enumerate(known)}
    found = set()
    if kind != "number":
        found |= {by_id[name] for name in ((rest,) if kind == "id" else (user,)) if name in by_id}
    number = rest if kind == "number" else user
    if kind != "id" and number.isdecimal() and int(number) < members:
        found.add(int(number))
    if len(found) > 1:
        raise ConfigError(f"--user {user} is one member's number and another's id; say number:{user} or id:{user}.")
    if not found or len(known) != members:
        raise ConfigError(f"--user: no member has this number (0 to {members - 1}) or id.")
    return found.pop()


def _made(run: Finished, folder: Path) -> Arrays:
    """Return a model that `personalize` made on this run."""
    try:
        about = json.loads((folder / "personal.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunDirectoryError(f"{folder}: no personal model; `fedpers personalize` makes one.") from None
    if about.get("made_on") != run.mark:
        raise RunDirectoryError(f"{folder} was not made on {run.path}; name the run that it was made on.")
    return _arrays(folder, GROUPS)


def _arrays(folder: Path, groups: tuple[str, ...]) -> Arrays:
    try:
        found = adapters.load(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise RunDirectoryError(f"{folder} is damaged or not there; restore it from a copy.") from error
    return {name: array for name, array in found.items() if group_of(name) in groups}


def plan_of(run: Finished, arrays: Arrays) -> Plan:
    """A table that makes the model have the groups of these arrays."""
    groups = {group_of(name) for name in arrays}
    return Plan(run.plan.name, dict.fromkeys(groups, PERSONAL), (Phase(*groups),), (), method=run.plan.method,
                options=run.plan.options)  # fmt: skip


def check_fit(model: CohortModel, arrays: Arrays, path: Path) -> None:
    """Refuse arrays that are not the model's, or not all of a group."""
    names = model.names(sorted({group_of(name) for name in arrays}))
    if set(names) != set(arrays) or any(model.initial[name].shape != arrays[name].shape for name in names):
        raise RunDirectoryError(f"{path}: its arrays do not fit the backbone of its configuration; restore the run.")


def read_records(path: Path, optional_input: bool = False) -> tuple[Record, ...]:
    """Read a JSONL of {"input", "target"}; an "id" and a "conversation" are used where given, other keys are not.

    Raises:
        DataError: no such file, no line, or a line that cannot be used; it names the line and holds nothing of it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{path.name}: cannot be read ({reason}); name a JSONL file.") from None
    if lines == [""]:
        raise DataError(f"{path.name}: empty; a line per record is expected, with an input and a target.")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            row = _object(line)
            text = as_text(row.get("input"), "input") if row.get("input") or not optional_input else ""
            target = as_text(row.get("target"), "target")
            name = as_text(row["id"], "id") if "id" in row else f"{NEWCOMER}/{number}"
            together = as_text(row["conversation"], "conversation") if "conversation" in row else name
        except Bad as bad:
            raise DataError(f"{path.name}, line {number}: {bad.said}; mend it or leave it out.") from None
        records.append(Record(name, together, text, target))
    return tuple(records)


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise Bad("odd_line", "not a JSON object with an input and a target")
    return row


def over_records(
    run: Finished,
    plan: Plan,
    train: tuple[Record, ...],
    test: tuple[Record, ...],
    source: str,
    reporter: Reporter | None,
) -> CohortModel:
    """Make the model over one user's records, with the public texts that the run's task draws from."""
    key = seed_key(run.config.seed)
    pool = () if run.config.task.name in _POOLLESS else load(run.config, key).pool
    federation = federation_of(source, train, test, pool).check()
    return model_over(run, plan, federation, run.task.prepare(federation, key), reporter)


def federation_of(
    source: str, train: tuple[Record, ...], test: tuple[Record, ...], pool: tuple[PublicText, ...]
) -> Federation:
    """Return a federation of one."""
    return Federation(source, (NEWCOMER,), (train,), (test,), pool, frozenset(), (frozenset(),))


def model_over(
    run: Finished, plan: Plan, federation: Federation, examples: Examples, reporter: Reporter | None
) -> CohortModel:
    """Make the model of a table over examples."""
    off = run.config.evaluation.model_copy(update={"local_only": False})
    config = run.config.model_copy(update={"evaluation": off})
    experiment = Experiment(config, plan, plan, nothing_released(run), federation, examples, run.task, None)
    return build_model(experiment, reporter or Reporter())


def measure(model: CohortModel, kinds: Mapping[str, evaluation.Kind]) -> list[Measured]:
    """Measure models on the one user's test records."""
    found, task = evaluation.measure(model, [0], kinds), model.task
    return [Measured(found.test[0], task.metric, found.per_user(task, kind)[0]) for kind in kinds]


def nothing_released(run: Finished) -> Guarantee:
    """Return the guarantee of training at home: none, for want of a release."""
    return resolve(run.config, Plan(run.plan.name, {}, (), ()), users=1)
