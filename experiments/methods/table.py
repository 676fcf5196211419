"""Tables and figure of a finished comparison, from the files of its runs alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedpers.evaluation.comparison import Score, Scores, Versus, against, by_person, reading
from fedpers.evaluation.per_user import write_table
from fedpers.evaluation.statistics import MINIMUM_RECORDS, mean_interval, worst_decile
from fedpers.figures.methods import Estimate, Panel, forest
from fedpers.privacy.claim import Claim, rounded_up

REFERENCES = ("fedavg", "local", "zero_shot")
SEEN = "The metrics are measured without noise, which no claim covers."
Run = tuple[str, str, int]  # level, method, seed


def write_results(
    out: Path,
    places: Mapping[Run, Path],
    people: Sequence[Sequence[str]],
    budget: Mapping[Run, float],
    refused: Mapping[str, Mapping[str, str]],
) -> str:
    """Write methods.parquet, table.md and figures/methods; returns the sentences that say what came out.

    Args:
        out: where to.
        places: directory of every run.
        people: who took part, by seed and position.
        budget: gradients per record of every run.
        refused: by level, the methods that did not run, and why.
    """
    rows: list[dict[str, Any]] = []
    parts, panels, said = [], [], []
    for level in dict.fromkeys(level for level, _, _ in places):
        runs = {run: path for run, path in places.items() if run[0] == level}
        found, label, versus, references = _level(runs, people, budget)
        sentences = [f"{label}: {reading(versus[name], name.replace('_', '-'))}" for name in REFERENCES]
        said += sentences
        parts += [f"## {label}", *sentences, _utility(found, versus), _costs(found), _refused(refused[level])]
        rows += [_flat(level, method, one, versus) for method, one in found.items()]
        panels.append(_panel(label, found, versus["fedavg"], references, list(refused[level])))
    seeds = len(people)
    title = f"Own accuracy of every method, 95% intervals over {len({p for one in people for p in one})} people, " + (
        f"{seeds} seeds. {SEEN}" if seeds > 1 else f"one seed. {SEEN}"
    )
    write_table(pa.Table.from_pylist(rows), out / "methods.parquet")
    forest(panels, out / "figures", title)
    (out / "table.md").write_text("\n\n".join(["# Methods compared", *filter(None, parts)]) + "\n", encoding="utf-8")
    return "\n".join(said)


def _level(
    runs: Mapping[Run, Path], people: Sequence[Sequence[str]], budget: Mapping[Run, float]
) -> tuple[dict[str, dict[str, Any]], str, dict[str, dict[str, Versus]], dict[str, float]]:
    """Return by method what its runs came to, the level's label, all comparisons, and the references' means."""
    own: dict[str, dict[int, Mapping[str, Score]]] = {}
    shared: dict[str, dict[int, Mapping[str, Score]]] = {}
    zero_shot: dict[int, Mapping[str, Score]] = {}
    for (_, method, seed), path in runs.items():
        table = pq.read_table(path / "users.parquet")
        own.setdefault(method, {})[seed] = _scores(table, "own", people[seed])
        shared.setdefault(method, {})[seed] = _scores(table, "global", people[seed])
        if method == "fedavg":
            zero_shot[seed] = _scores(table, "zero_shot", people[seed])
    found = {}
    for method in own:
        mine = {run: path for run, path in runs.items() if run[1] == method}
        found[method] = _estimate(own[method]) | {
            "global": float(by_person(shared[method])[1].mean()), "passes": budget[next(iter(mine))], **_facts(mine)
        }  # fmt: skip
    reference: dict[str, Scores] = {"fedavg": own["fedavg"], "local": own["local"], "zero_shot": zero_shot}
    versus = {
        name: against({method: scores for method, scores in own.items() if method != name}, scores)
        for name, scores in reference.items()
    }
    means = {name: float(by_person(scores)[1].mean()) for name, scores in reference.items()}
    claim = Claim.from_json(
        (next(p for run, p in runs.items() if run[1] == "fedavg") / "claim.json").read_text("utf-8")
    )
    return found, claim.label(), versus, means


def _scores(table: pa.Table, kind: str, people: Sequence[str]) -> dict[str, Score]:
    rows = [row for row in table.to_pylist() if row["kind"] == kind]
    return {people[row["user"]]: Score(row["accuracy"], row["test_records"]) for row in rows}


def _estimate(scores: Scores) -> dict[str, Any]:
    _, values, records = by_person(scores)
    mean, low, high = mean_interval(values, np.random.default_rng(0))
    enough = records >= MINIMUM_RECORDS
    worst = worst_decile(values[enough]) if enough.any() else None
    return {"people": len(values), "own": mean, "low": low, "high": high, "worst_decile": worst}


def _facts(runs: Mapping[Run, Path]) -> dict[str, Any]:
    """Return what a method's runs cost and promised: sums and means over its seeds, the largest epsilon."""
    summaries = [json.loads((path / "summary.json").read_text("utf-8")) for path in runs.values()]
    claims = [Claim.from_json((path / "claim.json").read_text("utf-8")) for path in runs.values()]
    rounds = [row for path in runs.values() for row in pq.read_table(path / "rounds.parquet").to_pylist()]
    visits = sum(row["clients"] for row in rounds)
    families = dict.fromkeys(family for one in summaries for family in one["noise_to_update"])
    return {
        "epsilon": max(claim.epsilon for claim in claims),
        "clip": claims[0].clip,
        "bytes_up": sum(row["bytes_up"] for row in rounds) / visits if visits else 0.0,
        "bytes_down": sum(row["bytes_down"] for row in rounds) / visits if visits else 0.0,
        "seconds": float(np.mean([one["seconds"] for one in summaries])),
        "aggregation_error": _mean([one["aggregation_error"] for one in summaries]),
        "effective_rank": _mean([one["effective_rank"] for one in summaries]),
        "noise_to_update": {f: _mean([one["noise_to_update"].get(f) for one in summaries]) for f in families},
        "nonfinite": sum(one["nonfinite"] for one in summaries),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _flat(
    level: str, method: str, one: Mapping[str, Any], versus: Mapping[str, Mapping[str, Versus]]
) -> dict[str, Any]:
    row = {"level": level, "method": method, **{name: v for name, v in one.items() if name != "noise_to_update"}}
    for family in ("adapter", "norm", "head"):
        row[f"noise_to_update_{family}"] = one["noise_to_update"].get(family)
    for reference in REFERENCES:
        held = versus[reference].get(method)
        row[f"gain_over_{reference}"] = held.gain if held else None
        row[f"gain_low_{reference}"], row[f"gain_high_{reference}"] = held.ci95 if held else (None, None)
        row[f"p_{reference}"] = held.p_value if held else None
        row[f"p_holm_{reference}"] = held.p_corrected if held else None
        row[f"detectable_{reference}"] = held.detectable if held else None
        row[f"verdict_{reference}"] = held.verdict if held else None
    return row


def _utility(found: Mapping[str, Mapping[str, Any]], versus: Mapping[str, Mapping[str, Versus]]) -> str:
    head = ["method", "own, 95%", "worst decile", "global"]
    for name in ("fedavg", "local", "zero-shot"):
        head += [f"over {name}; p (Holm); detectable", "verdict"]
    rows = []
    for method, one in _sorted(found):
        row = [method, f"{one['own']:.3f} ({one['low']:.3f} to {one['high']:.3f})", _number(one["worst_decile"], ".3f"),
               f"{one['global']:.3f}"]  # fmt: skip
        for reference in REFERENCES:
            row += _held(versus[reference].get(method))
        rows.append(row)
    return _markdown(head, rows)


def _held(one: Versus | None) -> list[str]:
    """Gain, corrected p and detectable difference in one cell, the verdict in the next; empty for the reference."""
    if one is None:
        return ["", ""]
    p = "p < 0.001" if one.p_corrected < 0.001 else f"p = {one.p_corrected:.3f}"
    return [f"{one.gain:+.3f}; {p}; {_number(one.detectable, '.3f')}", one.verdict]


def _costs(found: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["method", "gradients per record", "kB up", "kB down", "seconds", "aggregation error", "effective rank",
            "noise / update", "clip", "ε"]  # fmt: skip
    rows = [
        [
            method, f"{one['passes']:g}", f"{one['bytes_up'] / 1000:.1f}", f"{one['bytes_down'] / 1000:.1f}",
            f"{one['seconds']:.0f}", _number(one["aggregation_error"], ".2g"), _number(one["effective_rank"], ".2f"),
            ", ".join(f"{f} {_number(v, '.2f')}" for f, v in one["noise_to_update"].items()) or "–",
            _number(one["clip"], "g"), "∞" if math.isinf(one["epsilon"]) else rounded_up(one["epsilon"]),
        ]
        for method, one in _sorted(found)
    ]  # fmt: skip
    return _markdown(head, rows)


def _sorted(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(found.items(), key=lambda item: (-item[1]["own"], item[0]))


def _refused(reasons: Mapping[str, str]) -> str:
    return "\n".join(["Not run:", "", *(f"- {reason}" for reason in reasons.values())]) if reasons else ""


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _panel(
    label: str,
    found: Mapping[str, Mapping[str, Any]],
    versus: Mapping[str, Versus],
    references: Mapping[str, float],
    refused: Sequence[str],
) -> Panel:
    rows = {
        method: Estimate(one["own"], one["low"], one["high"], versus[method].verdict if method in versus else None)
        for method, one in found.items()
    }
    return Panel(label, rows, references, refused)
