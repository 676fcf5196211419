"""A grid file and its cells: which runs a sweep is made of.

    name: frontier
    base: chitchat.yaml              # a configuration beside this file, or a mapping written out
    product:                         # every combination; dotted keys as on the command line, lists of values
      method: [fedavg, fedper]
      privacy.epsilon: [.inf, clip, 8, 1]
      seed: [0, 1, 2]
    zip:                             # lists of one length, taken in step
      share: [head, adapter+head]
      local.lr.head: [0.1, 0.2]
    variants:                        # named sets of changes, each combined with everything above
      chitchat: {data.users: 100}
      vader: {base: vader.yaml}      # may start from another configuration
    skip:                            # a cell that has one of the named values on every named axis is left out
      - {method: fedper, privacy.epsilon: [clip, 8]}

There are two kinds of no noise on an axis `privacy.epsilon`: `.inf` is no privacy at all, neither clipping nor noise;
`clip` is the clipping of the base without its noise, so that the price of both can be told apart. Neither promises
anything.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from fedpers.config import Config, PrivacyConfig, assign, dump_config, override, parse_config, read_tree
from fedpers.errors import ConfigError
from fedpers.privacy.levels import clipped_only, unprotected, with_own_secret

VARIANT, EPSILON, CLIP = "variant", "privacy.epsilon", "clip"
_KEYS = ("name", "base", "product", "zip", "variants", "skip")
_NO_AXES = ("name", "frontier", "privacy", "privacy.secret", "evaluation.local_only")  # what a cell has by itself
_AT_HOME = ("seed", "data", "task", "model", "personal", "engine")  # what the local-only baseline hangs on
Tree = dict[str, Any]
Changes = Mapping[str, Any]  # values by dotted key


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        coordinates: its value on every axis, as text; on the axis `variant` the variant's name.
        config: what is run; named by the cell's content address.
        baseline: address of the local-only run on the same people; None where the base asks for none.
    """

    coordinates: Mapping[str, str]
    config: Config
    baseline: str | None

    @property
    def address(self) -> str:
        """16 hexadecimal digits for all that is configured, the secret (by its hash) and the version of fedpers."""
        return self.config.name

    @property
    def label(self) -> str:
        """The cell in words, for people."""
        return ", ".join(f"{key}={value}" for key, value in self.coordinates.items())


@dataclass(frozen=True)
class Grid:
    """All runs of a sweep: the cells, and the local-only baselines that are no cells themselves."""

    name: str
    cells: tuple[Cell, ...]
    baselines: tuple[Cell, ...]

    @property
    def runs(self) -> tuple[Cell, ...]:
        """All that is run."""
        return self.cells + self.baselines

    def to_yaml(self) -> str:
        """Which runs there are and where they stand on the axes; their configurations lie beside their results."""
        runs = [
            {"hash": run.address, "baseline": run.baseline, "coordinates": dict(run.coordinates)} for run in self.runs
        ]
        return yaml.safe_dump({"name": self.name, "fedpers": version("fedpers"), "runs": runs}, sort_keys=False)


def read_grid(path: Path | str, overrides: Sequence[str] = ()) -> Grid:
    """Read a grid file; `key.path=value` overrides change every base.

    Raises:
        ConfigError: as `expand` does, or the file or a base cannot be read.
    """
    path = Path(path)
    tree = read_tree(path)
    return expand({"name": path.stem, **tree}, overrides, path.parent, str(path))


def expand(tree: Tree, overrides: Sequence[str] = (), folder: Path = Path(), where: str = "grid") -> Grid:
    """Make the cells of a grid that is given as nested dictionaries; bases are looked for in `folder`.

    Raises:
        ConfigError: an unknown key (with the nearest), a list that is none, lists of different lengths in `zip`, a key
            that is set twice, a grid without cells, two cells that are the same run, or a cell's configuration.
    """
    for key in tree:
        _known(key, _KEYS, where)
    name = parse_config({"name": tree.get("name", "grid")}, where).name
    crossed, stepped = _lists(tree, "product", where), _lists(tree, "zip", where)
    variants = _mapping(tree.get("variants"), f"{where}: variants")
    changes = {one: dict(_mapping(variants[one], f"{where}: variants.{one}")) for one in variants}
    bases = {one: _base(found.pop("base", tree.get("base")), overrides, folder, where) for one, found in changes.items()}
    if not variants:
        changes, bases = {"": {}}, {"": _base(tree.get("base"), overrides, folder, where)}
    _check_keys(crossed, stepped, changes, overrides, where)
    axes = {**({VARIANT: list(variants)} if variants else {}), **stepped, **crossed}
    conditions = _conditions(tree.get("skip"), axes, f"{where}: skip")
    cells: list[Cell] = []
    for one, step, rest in product(changes, _steps(stepped, where), list(product(*crossed.values()))):
        chosen = {**step, **dict(zip(crossed, rest, strict=True))}
        coordinates = {**({VARIANT: one} if variants else {}), **{key: _text(value) for key, value in chosen.items()}}
        if any(all(coordinates[key] in values for key, values in skip.items()) for skip in conditions):
            continue
        cells.append(_cell(bases[one], {**changes[one], **chosen}, coordinates, where))
    if not axes or not cells:
        raise ConfigError(f"{where}: no cells; name values under product, zip or variants, and skip fewer.")
    _check_distinct(cells, where)
    return Grid(name, tuple(cells), tuple(_baselines(cells)))


def _cell(base: Tree, changes: Changes, coordinates: Mapping[str, str], where: str) -> Cell:
    where = f"{where} ({', '.join(f'{key}={value}' for key, value in coordinates.items())})"
    tree = copy.deepcopy(base)
    if "method" in changes and changes["method"] != base.get("method", Config().method):
        tree.pop("options", None)  # they are the base method's own
    level = str(changes.get(EPSILON)).strip().lower()
    for key, value in changes.items():
        if not (key == EPSILON and level in {"inf", ".inf", CLIP}):
            assign(tree, key, value, where)
    config = parse_config(tree, where)
    privacy = config.privacy
    if EPSILON in changes and level in {"inf", ".inf"}:
        privacy = unprotected(privacy)
    elif EPSILON in changes and level == CLIP:
        try:
            privacy = clipped_only(privacy)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    local = _local_only(config)
    if config.method == "local":
        own = local
    else:
        evaluation = config.evaluation.model_copy(update={"local_only": False})  # it has a cell of its own
        own = config.model_copy(update={"privacy": privacy, "evaluation": evaluation})
    return Cell(coordinates, _addressed(own), _addressed(local).name if config.evaluation.local_only else None)


def _local_only(config: Config) -> Config:
    """Training at home alone: neither method nor privacy nor anything of the rounds matters to it."""
    kept = {section: getattr(config, section) for section in _AT_HOME}
    evaluation = config.evaluation.model_copy(update={"local_only": False, "every": 0})
    secret = PrivacyConfig(secret=config.privacy.secret)
    return Config(method="local", rounds=0, evaluation=evaluation, privacy=secret, **kept)


def _addressed(config: Config) -> Config:
    """Name a configuration by its content, and give it a secret of its own."""
    config = config.model_copy(update={"name": "cell", "frontier": None})
    content = f"{version('fedpers')}\n{dump_config(config)}"
    privacy = with_own_secret(config.privacy, _digest(content))
    if privacy.secret is not None:
        content += _digest(privacy.secret)
    return config.model_copy(update={"name": _digest(content)[:16], "privacy": privacy})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _baselines(cells: Iterable[Cell]) -> Iterable[Cell]:
    """Make the local-only runs that are no cells, each with what the cells that it belongs to have in common."""
    have = {cell.address for cell in cells}
    mates: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.baseline is not None and cell.baseline not in have:
            mates.setdefault(cell.baseline, []).append(cell)
    for address, found in mates.items():
        # The secret of a cell is derived already, so a baseline is made where the cell is, from what was given.
        del address, found
    return ()


def _check_distinct(cells: Sequence[Cell], where: str) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        twin = seen.setdefault(cell.address, cell)
        if twin is not cell:
            hint = "; training at home hangs on neither privacy nor rounds" if cell.config.method == "local" else ""
            raise ConfigError(f"{where}: ({twin.label}) and ({cell.label}) are the same run{hint}; skip one of them.")
