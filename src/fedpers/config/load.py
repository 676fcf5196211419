"""Reading, checking and writing a configuration; overrides are `key.path=value`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fedpers.config.refused import REFUSED
from fedpers.config.run import Config
from fedpers.errors import ConfigError

GRID_KEYS = {"product", "zip", "variants"}  # keys of a grid file (sweep/grid.py) and of no configuration
_OPTIONS = {"out", "resume", "quiet", "track", "jobs", "probe"}  # of the command line


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `key.path=value` overrides (values are YAML).

    Raises:
        ConfigError: no such file, broken YAML, a grid file, unknown key, or a value that is not allowed.
    """
    tree = {} if path is None else read_tree(Path(path))
    if GRID_KEYS & tree.keys():
        raise ConfigError(f"{path} asks for many runs; `fedpers sweep {path}` makes them, `fedpers run` makes one.")
    for text in overrides:
        override(tree, text)
    where = "configuration" if path is None else f"{Path(path)} with overrides" if overrides else str(Path(path))
    return parse_config(tree, where)


def read_tree(path: Path) -> dict[str, Any]:
    """Read a YAML file into nested dictionaries; raises ConfigError, which quotes nothing of it."""
    try:
        tree: Any = _yaml(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a YAML file.") from error
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8, or a path that no file can have
        mark = getattr(error, "problem_mark", None)  # a line number; the line itself may hold the secret
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{place}: not valid YAML; mend it there.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(tree).__name__}.")
    return tree


def parse_config(tree: Any, where: str = "configuration") -> Config:
    """Validate nested dictionaries; raises ConfigError naming key, value and what is allowed."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        found = [_explain(dict(item), where) for item in error.errors()[:3]]
    raise ConfigError("; ".join(found))  # outside of except: the chained error would show its input


def override(tree: dict[str, Any], text: str) -> None:
    """Apply `key.path=value` to nested dictionaries; raises ConfigError for what is none, or has no place there."""
    key, equals, value = text.partition("=")
    shown = key if key.strip().startswith("privacy") else text  # the value may be the secret
    if not equals or not key.strip():
        raise ConfigError(f"override {shown!r}: expected key=value, for example privacy.epsilon=2.")
    try:
        assign(tree, key.strip(), _yaml(value), f"override {shown!r}")
    except yaml.YAMLError:
        raise ConfigError(f"override {shown!r}: the value is not valid YAML.") from None


def assign(tree: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key in nested dictionaries; raises ConfigError if the way to it holds a value."""
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{where}: {parent!r} holds a value, not keys.")
    tree[leaf] = value


def _yaml(text: str) -> Any:
    """Read YAML; raises yaml.YAMLError for all that is none."""
    try:
        return yaml.safe_load(text)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        # PyYAML lets these through where a date, a tag's value or the nesting makes no sense
        raise yaml.YAMLError from None


def _explain(item: dict[str, Any], where: str) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path) or "configuration"
    if item["type"] == "extra_forbidden":
        if path[0] == "model" and path[-1] in REFUSED:
            return f"{where}: {key!r} is refused, leave it out: {REFUSED[path[-1]]}."
        if key in _OPTIONS:
            return f"{where}: {key!r} is no key but an option of the command line; write --{key}."
        if key in GRID_KEYS:
            return (
                f"{where}: {key!r} is a key of a grid file, which `fedpers sweep` reads (docs/sweeps.md); one run "
                "takes one value of each key, as in seed=1."
            )
        allowed = _keys_at(path[:-1])
        near = difflib.get_close_matches(path[-1], allowed, 1)
        near = [".".join([*path[:-1], one]) for one in near]
        near += [f"{section}.{path[-1]}" for section in Config.model_fields if path[-1] in _keys_at([section])]
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}."
        return f"{where}: unknown key {key!r}; {hint}"
    message = str(item["msg"]).removeprefix("Value error, ")
    found = "" if isinstance(item["input"], dict) else f" = {item['input']!r}"
    if path[:1] == ["privacy"] and (len(path) == 1 or path[-1] == "secret"):
        found = ""  # never show the secret
    return f"{where}: {key}{found}: {message[0].lower()}{message[1:]}."


def _keys_at(path: Sequence[str]) -> list[str]:
    model: Any = Config
    for part in path:
        field = model.model_fields.get(part)
        choices = [] if field is None else [field.annotation, *get_args(field.annotation)]  # a section may be optional
        model = next((one for one in choices if isinstance(one, type) and issubclass(one, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def result_text(config: Config) -> str:
    """Return what the results of a run depend on, as text: the configuration without how it is run and looked at.

    Of the backbone's and the data's path the last part counts, since where a folder lies changes nothing.
    """
    name = config.model.backbone.rstrip("/").rpartition("/")[2]
    path = config.data.path and config.data.path.rstrip("/").rpartition("/")[2]
    parts = {
        "model": config.model.model_copy(update={"backbone": name}),
        "data": config.data.model_copy(update={"path": path}),
    }
    named = config.model_copy(update=parts)
    left_out: dict[str, bool | set[str]] = {
        "name": True,
        "engine": {"cohort_size", "token_budget", "tune", "threads", "device"},
        "evaluation": True,
        "frontier": True,
        "data": {"lazy"},
        "privacy": {"secret"},
    }
    return named.model_dump_json(exclude=left_out)


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML, without the secret."""
    tree = config.model_dump(mode="json")
    tree["privacy"].pop("secret")
    return yaml.safe_dump(tree, sort_keys=False)
