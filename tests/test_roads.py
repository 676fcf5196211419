"""Every real source with each of its tasks, by real models, from end to end: small slices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpers.config import Config, parse_config
from fedpers.data.synthetic import TOPICS
from fedpers.experiment import Reuse
from fedpers.formats.lamp import CATEGORIES, TAGS
from fedpers.formats.lamp_example import write_example
from fedpers.public import export_public
from fedpers.simulation import simulate

RATING = {"name": "rating"}
SCALE = {"name": "rating", "low": -4, "high": 4}
LANGUAGE = {"name": "language-model"}
ENCODER: dict[str, Any] = {
    "backbone": "all-MiniLM-L6-v2",
    "adapter": {"layers": 1, "rank": 2, "alpha": 4, "targets": ["value"]},
}
SMOLLM = {"backbone": "SmolLM2-135M-Instruct", "adapter": {**ENCODER["adapter"], "targets": ["q_proj", "v_proj"]}}
ROADS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, float]]] = {
    "chitchat, ranking": ("chitchat", {"name": "reply-ranking"}, ENCODER, {"adapter": 0.1, "head": 0.01}),
    "chitchat, language": ("chitchat", LANGUAGE, SMOLLM, {"adapter": 0.3, "head": 0.3}),
    "movielens": ("movielens", RATING, ENCODER, {"adapter": 0.1, "head": 0.1}),
    "vader": ("vader", SCALE, ENCODER, {"adapter": 0.1, "head": 0.1}),
    "shakespeare": ("shakespeare", LANGUAGE, SMOLLM, {"adapter": 0.3, "head": 0.3}),
}


@pytest.mark.slow
@pytest.mark.parametrize("road", ROADS)
def test_a_real_source_runs_from_end_to_end(road: str, tmp_path: Path) -> None:
    """People learn something: their own models beat no training at all, on average, in what is optimized."""
    source, task, model, rates = ROADS[road]
    causal = task is LANGUAGE
    config = parse_config(
        {
            "method": "fedavg-finetune",
            "rounds": 1,
            "data": {
                "name": source, "users": 3 if causal else 20, "min_train": 15, "max_train": 15, "min_test": 5,
                "max_test": 5 if causal else 10, "max_tokens": 24,
            },
            "task": task,
            "model": model,
            "local": {"batch_size": 8, "lr": rates},
            "personal": {"batch_size": 8, "epochs": 3, "lr": rates, "groups": "adapter+head"},
            "evaluation": {"every": 0, "local_only": False},
            "privacy": {"unit": "user", "epsilon": 50, "delta": 1e-2, "clip": 0.1},
        }
    )  # fmt: skip
    run = simulate(config, tmp_path / "run", reuse=Reuse())
    assert 0 < run.claim.epsilon <= 50
    table = run.users.to_pandas().pivot(index="user", columns="kind", values="loss")
    assert len(table) >= (3 if causal else 18)
    assert np.isfinite(table.to_numpy()).all()
    assert table["own"].mean() < table["zero_shot"].mean()


LAMP: dict[str, dict[str, Any]] = {  # LaMP-3 to 7 and the tags and categories of 2, on made-up people in its format
    "2": {"name": "classification", "labels": TAGS},
    "2-news": {"name": "classification", "labels": CATEGORIES},
    "3": RATING,
    "4": LANGUAGE,
    "5": LANGUAGE,
    "6": LANGUAGE,
    "7": LANGUAGE,
}


@pytest.mark.parametrize("number", LAMP)
def test_each_lamp_runs_from_end_to_end(
    tiny: Callable[..., Config], tiny_llama: Path, tmp_path: Path, number: str
) -> None:
    task = LAMP[number]
    write_example(tmp_path / "lamp", number, users=6, items=10)  # type: ignore[arg-type]
    data = {
        "name": "lamp", "path": str(tmp_path / "lamp"), "users": None, "min_train": 4, "min_test": 1, "max_tokens": 48,
        "lamp": {"task": number},
    }  # fmt: skip
    model = {"model": {"backbone": str(tiny_llama), "adapter": SMOLLM["adapter"]}} if task is LANGUAGE else {}
    run = simulate(tiny(rounds=1, data=data, task=task, **model), tmp_path / "run")
    table = run.users.to_pandas()
    assert set(table["kind"]) == {"own", "global", "local", "zero_shot", "swap"}
    assert np.isfinite(table["loss"]).all()
    trained = table.pivot(index="user", columns="kind", values="loss")
    assert (trained["own"] != trained["zero_shot"]).all()


FILES = {
    "rating": RATING,
    "classification": {"name": "classification", "labels": ("low", "high")},
    "language": LANGUAGE,
}


@pytest.mark.parametrize("task", FILES)
def test_own_files_run_with_each_task(tiny: Callable[..., Config], tiny_llama: Path, tmp_path: Path, task: str) -> None:
    words = TOPICS["food"]
    target = {"rating": ("2", "4"), "classification": ("low", "high"), "language": ("bread soup", "cake tea")}[task]
    lines = [
        {"who": f"person{user}", "said": words[number % 8], "answer": target[(user + number) % 2], "when": number}
        for user in range(8) for number in range(10)
    ]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    columns = {"user": "who", "input": "said", "target": "answer", "time": "when"}
    data = {"name": "files", "path": str(tmp_path / "mine.jsonl"), "columns": columns, "users": None, "min_test": 2}
    model = {"model": {"backbone": str(tiny_llama), "adapter": SMOLLM["adapter"]}} if task == "language" else {}
    run = simulate(tiny(rounds=1, data=data, task=FILES[task], **model), tmp_path / "run")
    assert np.isfinite(run.users.column("loss").to_numpy()).all()
    assert run.summary["metric"] == {"rating": "rmse", "classification": "accuracy", "language": "loss"}[task]
    export_public(run.path, tmp_path / "public")
    shown = b"".join(file.read_bytes() for file in (tmp_path / "public").rglob("*") if file.is_file())
    assert b"mine.jsonl" in shown
    assert str(tmp_path).encode() not in shown
