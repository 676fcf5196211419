"""Gradient inversion: without noise a LoRA update gives the words away, with noise it does not; both are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpers.audit import inversion
from fedpers.audit.inversion import inversion_report
from fedpers.audit.inversion_span import first_arrays, row_space, vocabulary
from fedpers.cohort.model import CohortModel
from fedpers.config import Config, load_config
from fedpers.errors import ConfigError, DataError, PrivacyRefusal
from fedpers.experiment import Experiment, build_model, prepare
from fedpers.reporting import Reporter

Tiny = Callable[..., Config]
RANK = 8
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


@pytest.fixture
def deep(tiny: Tiny) -> Tiny:
    """Adapters on every layer, with room for every token of a made-up sentence (2 to 6 words, 2 special tokens)."""

    def make(**changes: Any) -> Config:
        adapter = {"layers": 3, "rank": RANK, "alpha": RANK, **changes.pop("adapter", {})}
        backbone = tiny().model.backbone
        tree = {
            "method": "fedavg",
            "data": {"max_tokens": RANK},
            "privacy": {"unit": "record", "clip": 0.1, "epsilon": 8, "delta": 1e-3},
            "model": {"backbone": backbone, "adapter": adapter},
        }
        return tiny(**{**tree, **changes})

    return make


def built(config: Config, records: int = 4) -> tuple[Experiment, CohortModel]:
    experiment = prepare(config)
    examples = inversion._victims(experiment.examples, records, config.seed)
    experiment = replace(experiment, examples=examples)
    return experiment, build_model(experiment, Reporter())


def test_without_noise_the_span_gives_every_word_away_and_with_noise_none(deep: Tiny) -> None:
    config = deep()
    report = inversion_report(config, records=6, noise_multiplier=1.0, iterations=60)
    plain, private = report["without DP"], report["with DP"]
    assert set(report) == {"without DP", "with DP"}
    assert plain["span_recall"] == plain["nearest_recall"] == 1.0
    assert plain["span_precision"] > 0.95
    assert plain["optimization_recall"] > plain["chance"] + 0.5
    assert private["span_recall"] == private["span_precision"] == 0.0
    for found in ("nearest_recall", "optimization_recall"):
        assert private[found] < private["chance"] + 0.2
    experiment, model = built(config, 6)
    words = sum(len(text.split()) for text in experiment.examples.inputs)  # one token a word in this vocabulary
    assert plain["tokens"] == private["tokens"] == words
    assert model.layer == 0
    assert all(type(value) in (int, float) for part in report.values() for value in part.values()), "numbers alone"


def test_control_clipping_alone_protects_nothing(deep: Tiny) -> None:
    """The attacks work on the path that clips and noises: what stops them there is the noise."""
    found = inversion_report(deep(), noise_multiplier=1e-7, iterations=60)["with DP"]
    assert found["span_recall"] == 1.0
    assert found["span_precision"] > 0.95
    assert found["optimization_recall"] > found["chance"] + 0.5


def test_more_noise_leaves_less_and_a_secret_replays_the_attack(deep: Tiny) -> None:
    def nearest(noise: float) -> float:
        return inversion_report(deep(), records=8, noise_multiplier=noise, iterations=1)["with DP"]["nearest_recall"]

    found = [nearest(noise) for noise in (1e-6, 1e-3, 1e-2, 100.0)]
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.2
    assert nearest(1e-3) == found[1]


def test_the_noise_is_what_the_record_level_guarantee_asks_for(deep: Tiny) -> None:
    config = deep(privacy={"unit": "user", "epsilon": 8, "delta": 1e-3, "clip": 0.1})
    wanted = prepare(deep()).guarantee.noise_multiplier
    assert wanted > 0
    default, given = (inversion_report(config, iterations=2, noise_multiplier=noise) for noise in (None, wanted))
    assert default == given


def test_the_observed_update_is_the_records_gradient_scaled_to_the_clip(deep: Tiny) -> None:
    experiment, model = built(deep())
    shared = inversion._broadcast(model, model.names(["adapter", "head"]), 0)
    plain = inversion._observe(experiment, model, shared, inversion.UNBOUNDED, 0.0).gradients
    clipped = inversion._observe(experiment, model, shared, 0.01, 0.0).gradients
    noised = inversion._observe(experiment, model, shared, 0.01, 3.0)
    model.load(model.broadcast(4, shared))
    rows, owners = np.arange(4), torch.arange(4)
    weights = {name: model.layers[name].weight.requires_grad_() for name in shared}
    losses = model.losses(model.contexts(rows, owners), rows, owners)
    expected = dict(zip(weights, torch.autograd.grad(losses.sum(), list(weights.values())), strict=True))
    norms = torch.sqrt(sum(((g.flatten(1) ** 2).sum(dim=1) for g in expected.values()), torch.zeros(4)))
    assert (norms > 0.01).any()
    scale = (0.01 / norms).clamp(max=1.0)[:, None, None]
    for name, gradient in plain.items():
        assert torch.allclose(gradient.float(), expected[name], rtol=1e-3, atol=1e-6)
        assert torch.allclose(clipped[name].float(), expected[name] * scale, rtol=1e-3, atol=1e-6)
    noise = torch.cat([(noised.gradients[name] - clipped[name]).flatten() for name in clipped])
    assert float(noise.std()) == pytest.approx(0.03, rel=0.05)
    assert list(noised.deviation.values()) == pytest.approx([0.03] * len(clipped), rel=1e-3)


def test_at_the_first_broadcast_only_lora_b_moves_and_the_span_is_empty(
    deep: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inversion, "SPREAD", 0.0)
    experiment, model = built(deep())
    shared = inversion._broadcast(model, model.names(["adapter", "head"]), 0)
    gradients = inversion._observe(experiment, model, shared, inversion.UNBOUNDED, 0.0).gradients
    assert all(not value.any() for name, value in gradients.items() if ".lora_A." in name)
    assert all(value.any() for name, value in gradients.items() if ".lora_B." in name)
    assert inversion_report(deep(), noise_multiplier=1.0, iterations=1)["without DP"]["span_recall"] == 0.0


def test_inputs_of_the_vocabulary_are_the_embeddings_of_the_architecture(deep: Tiny) -> None:
    _, model = built(deep())
    bert = model.backbone.model.embeddings
    seen = []
    for ids, inputs in vocabulary(model.backbone, 5):
        seen += ids.tolist()
        with torch.no_grad():
            plain = bert.word_embeddings.weight[ids, None] + bert.position_embeddings.weight[:5]
            expected = bert.LayerNorm(plain + bert.token_type_embeddings.weight[0])
        assert torch.allclose(inputs, expected, atol=1e-5)
    special = set(model.backbone.tokenizer.all_special_ids)
    assert sorted([*seen, *special]) == list(range(len(model.backbone.tokenizer)))
    names = first_arrays(model)
    assert sorted(name.split(".layer.")[1] for name in names) == [
        "0.attention.self.query.lora_A.weight",
        "0.attention.self.value.lora_A.weight",
    ]


def test_distance_to_the_span_equals_least_squares_and_noise_has_no_span() -> None:
    rng = np.random.default_rng(3)
    tokens, others = rng.standard_normal((5, 24)), rng.standard_normal((40, 24))
    gradient = rng.standard_normal((8, 5)) @ tokens

    def distance(rows: Any, deviation: float) -> Any:
        space = row_space({"a": torch.from_numpy(rows)[None]}, {"a": deviation}, ["a"])
        return space.distance(torch.from_numpy(np.concatenate([tokens, others])).float()[None])[0].sqrt().numpy()

    found = distance(gradient, 1e-9)
    coefficients, *_ = np.linalg.lstsq(tokens.T, others.T, rcond=None)
    expected = np.linalg.norm(others.T - tokens.T @ coefficients, axis=0) / np.linalg.norm(others, axis=1)
    assert found[:5].max() < 1e-4
    assert found[5:] == pytest.approx(expected, abs=1e-4)
    assert distance(rng.standard_normal((8, 24)), 1.0).min() > 0.7


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "says"),
    [
        ({"adapter": {"layers": 2}}, {}, ConfigError, "first of 3 blocks"),
        ({"adapter": {"rank": RANK - 1}}, {}, ConfigError, "exceeds model.adapter.rank"),
        ({"adapter": {"targets": ("dense",)}}, {}, ConfigError, "targets"),
        ({"share": "head"}, {}, ConfigError, "shares the adapter"),
        ({"local": {"optimizer": "adam"}}, {}, ConfigError, "sgd"),
        ({"privacy": {"unit": "none", "epsilon": "inf", "clip": None}}, {}, ConfigError, "privacy.clip"),
        ({"privacy": {"epsilon": "inf"}}, {"noise_multiplier": None}, ConfigError, "infinite"),
        ({}, {"noise_multiplier": 0.0}, ConfigError, "positive"),
        ({}, {"records": 0}, ConfigError, "at least 1"),
        ({}, {"records": 9}, DataError, "9 victims asked for, and 8 users"),
        ({"method": "fedrep", "privacy": {"unit": "user"}}, {}, PrivacyRefusal, "fedrep"),
    ],
)
def test_what_the_attack_would_misjudge_is_refused(
    deep: Tiny, changes: dict[str, Any], arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    privacy = {"unit": "record", "clip": 0.1, "epsilon": 8, "delta": 1e-3, **changes.pop("privacy", {})}
    with pytest.raises(error, match=says):
        inversion_report(deep(privacy=privacy, **changes), **{"noise_multiplier": 1.0, "iterations": 1, **arguments})


@pytest.mark.slow  # a real model on real chats; only numbers leave the function
def test_a_real_model_gives_real_words_away_unless_there_is_noise() -> None:
    adapter = "{layers: 6, rank: 16, alpha: 16, targets: [query, value]}"
    changes = [f"model.adapter={adapter}", "data.max_tokens=10", "engine.threads=1", "frontier=null"]
    report = inversion_report(load_config(QUICKSTART, changes), noise_multiplier=1.0, iterations=60)
    plain, private = report["without DP"], report["with DP"]
    assert plain["span_recall"] > 0.9
    assert plain["span_precision"] > 0.9
    assert plain["optimization_recall"] > plain["chance"] + 0.1
    assert private["span_recall"] == 0.0
    assert private["nearest_recall"] <= private["chance"] + 0.1
    assert private["optimization_recall"] <= private["chance"] + 0.1
