"""A grid file and the runs that it asks for.

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
    skip:                            # a cell is left out if it has, on every axis named, one of the values named
      - {method: fedper, privacy.epsilon: [clip, 8]}

There are two ways to have no noise on an axis `privacy.epsilon`: `.inf` is no privacy at all, neither clipping nor
noise; `clip` is the base's clipping without its noise, so that the price of each can be told. Neither promises
anything.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from fedpers.config import GRID_KEYS, override, parse_config, read_tree
from fedpers.errors import ConfigError
from fedpers.sweep.cells import AT_HOME, EPSILON, Cell, Tree, make_cell, no_privacy

VARIANT = "variant"
_KEYS = ("name", "base", "product", "zip", "variants", "skip")
_NO_AXES = ("name", "frontier", "privacy.secret")  # a cell has these by itself
Axes = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Grid:
    """The runs of a sweep: its cells, and the local-only baselines that are no cells themselves.

    `tree` is the same grid as a file that needs no other one, without a secret.
    """

    name: str
    cells: tuple[Cell, ...]
    baselines: tuple[Cell, ...]
    tree: Tree

    @property
    def runs(self) -> tuple[Cell, ...]:
        """All that is run."""
        return self.cells + self.baselines

    def to_yaml(self) -> str:
        """Name the runs and their places on the axes, and the grid itself; each configuration is beside its results."""
        runs = [
            {"hash": one.address, "baseline": one.baseline, "coordinates": dict(one.coordinates)} for one in self.runs
        ]
        about = {"name": self.name, "fedpers": version("fedpers"), "runs": runs, "grid": self.tree}
        return yaml.safe_dump(about, sort_keys=False)


def read_grid(path: Path | str, overrides: Sequence[str] = ()) -> Grid:
    """Read a grid file and make its cells; `key.path=value` overrides change every base.

    Raises:
        ConfigError: a file cannot be read, and what `expand` raises.
    """
    path = Path(path)
    return expand({"name": path.stem, **read_tree(path)}, overrides, path.parent, str(path))


def expand(tree: Tree, overrides: Sequence[str] = (), folder: Path = Path(), where: str = "grid") -> Grid:
    """Make the cells of a grid given as nested dictionaries, whose bases are looked for in `folder`.

    Raises:
        ConfigError: an unknown key (with the nearest), a list that is none, lists of different lengths in `zip`, a key
            that is set twice, a grid without cells, two cells that are the same run, a cell that cannot be configured.
    """
    if not tree.keys() - {"name"}:
        raise ConfigError(f"{where}: is empty; docs/sweeps.md shows what a grid holds.")
    if "base" not in tree and not tree.keys() & GRID_KEYS:
        raise ConfigError(f"{where}: is no grid but a configuration of one run; `fedpers run` makes it.")
    for key in tree:
        _known(key, _KEYS, where)
    name = parse_config({"name": tree.get("name", "grid")}, where).name
    crossed, stepped = _axes(tree, "product", where), _axes(tree, "zip", where)
    named = _mapping(tree.get("variants"), f"{where}: variants")
    changes = {one: dict(_mapping(found, f"{where}: variants.{one}")) for one, found in named.items()} or {"": {}}
    bases = {one: found.pop("base", tree.get("base")) for one, found in changes.items()}
    _check_keys([crossed, stepped], list(changes.values()), overrides, where)
    starts = {one: _base(base, overrides, folder, where) for one, base in bases.items()}
    axes = {**({VARIANT: list(named)} if named else {}), **stepped, **crossed}
    conditions = _conditions(tree.get("skip") or [], axes, f"{where}: skip")
    steps = [dict(zip(stepped, values, strict=True)) for values in zip(*stepped.values(), strict=True)] or [{}]
    cells = []
    for one, step, values in product(changes, steps, list(product(*crossed.values()))):
        chosen = {**step, **dict(zip(crossed, values, strict=True))}
        coordinates = {**({VARIANT: one} if named else {}), **{key: _text(key, value) for key, value in chosen.items()}}
        if not any(all(coordinates[key] in skipped for key, skipped in each.items()) for each in conditions):
            cells.append(make_cell(starts[one], {**changes[one], **chosen}, coordinates, where))
    if not axes or not cells:
        raise ConfigError(f"{where}: has no cells; list values under product, zip or variants, and skip fewer.")
    _check_distinct(cells, where)
    whole: Tree = {"name": name}
    if named:
        whole["variants"] = {one: {"base": _without_secret(starts[one]), **found} for one, found in changes.items()}
    else:
        whole["base"] = _without_secret(starts[""])
    whole |= {key: tree[key] for key in ("product", "zip", "skip") if tree.get(key)}
    return Grid(name, tuple(cells), tuple(_baselines(cells)), whole)


def _baselines(cells: Sequence[Cell]) -> Iterable[Cell]:
    """Make the local-only runs that are no cells, each with those of its cells' coordinates that are its own."""
    have = {cell.address for cell in cells}
    mates: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.baseline is not None and cell.baseline not in have:
            mates.setdefault(cell.baseline, []).append(cell)
    for first, *others in mates.values():
        own = [key for key in first.coordinates if key.split(".")[0] in {*AT_HOME, "evaluation", VARIANT}]
        alike = [key for key in own if len({cell.coordinates[key] for cell in (first, *others)}) == 1]
        assert first.local is not None
        yield Cell({"method": "local"} | {key: first.coordinates[key] for key in alike}, first.local, first.local)


def _base(base: Any, overrides: Sequence[str], folder: Path, where: str) -> Tree:
    if isinstance(base, str):
        tree = read_tree(folder / base)
    elif isinstance(base, dict):
        tree = copy.deepcopy(base)
    else:
        raise ConfigError(f"{where}: base: name a configuration file, or write a configuration out.")
    for text in overrides:
        override(tree, text)
    return tree


def _without_secret(base: Tree) -> Tree:
    found = copy.deepcopy(base)
    if isinstance(found.get("privacy"), dict):
        found["privacy"].pop("secret", None)
    return found


def _axes(tree: Tree, kind: str, where: str) -> Axes:
    """Read `product` or `zip`: lists by dotted key."""
    axes = _mapping(tree.get(kind), f"{where}: {kind}")
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            found = "an empty list" if values == [] else type(values).__name__
            raise ConfigError(f"{where}: {kind}.{key}: expected a list of values, as in [0, 1, 2], found {found}.")
    lengths = {key: len(values) for key, values in axes.items()}
    if kind == "zip" and len(set(lengths.values())) > 1:
        shown = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise ConfigError(f"{where}: zip: lists taken in step need one length, but {shown} values.")
    return axes


def _conditions(conditions: Any, axes: Axes, where: str) -> list[dict[str, set[str]]]:
    if not isinstance(conditions, list):
        raise ConfigError(f"{where}: expected a list of conditions, as in [{{method: local, seed: [1, 2]}}].")
    found = []
    for condition in conditions:
        skipped = {}
        for key, values in _mapping(condition, where).items():
            _known(key, list(axes), where)
            skipped[key] = {_text(key, value) for value in (values if isinstance(values, list) else [values])}
            have = [_text(key, value) for value in axes[key]]
            if missing := sorted(skipped[key] - set(have)):
                raise ConfigError(f"{where}: {key} has no value {missing[0]}; it has {', '.join(have)}.")
        if not skipped:
            raise ConfigError(f"{where}: a condition names at least one axis.")
        found.append(skipped)
    return found


def _check_keys(
    axes: Sequence[Axes], changes: Sequence[Mapping[str, Any]], overrides: Sequence[str], where: str
) -> None:
    """Refuse keys that are set twice, or that a cell has by itself; one that is part of another counts as the same."""
    for one in changes:
        keys = [*(key for part in axes for key in part), *one]
        for place, key in enumerate(keys):
            if key == "privacy" or any(_within(key, no) for no in _NO_AXES):
                raise ConfigError(f"{where}: {key!r} is not to be varied: set it in the base, or name a single key.")
            if any(_within(key, other) or _within(other, key) for other in keys[:place]):
                raise ConfigError(f"{where}: {key!r} is set twice; name it, and what it is part of, once.")
        for text in overrides:
            given = text.partition("=")[0].strip()
            if given.split(".")[0] in GRID_KEYS:
                raise ConfigError(f"override {given!r}: only keys of the base can be changed here; edit {where}.")
            if any(_within(given, key) for key in keys):
                raise ConfigError(f"override {given!r}: {where} sets it itself; change it there.")


def _within(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.")


def _check_distinct(cells: Sequence[Cell], where: str) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        twin = seen.setdefault(cell.address, cell)
        if twin is not cell:
            hint = "; training at home hangs on neither privacy nor rounds" if cell.config.method == "local" else ""
            raise ConfigError(f"{where}: ({twin.label}) and ({cell.label}) are the same run{hint}; skip one of them.")


def _known(key: Any, allowed: Sequence[str], where: str) -> None:
    if key not in allowed:
        near = difflib.get_close_matches(str(key), allowed, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}."
        raise ConfigError(f"{where}: unknown key {str(key)!r}; {hint}")


def _mapping(found: Any, where: str) -> dict[str, Any]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"{where}: expected keys with values, found {type(found).__name__}.")
    return found


def _text(key: str, value: Any) -> str:
    """Write a value as a coordinate: numbers alike however they are written, sections as JSON."""
    if key == EPSILON and no_privacy(value):
        return "inf"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return json.dumps(value, sort_keys=True, default=str)
