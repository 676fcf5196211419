"""Tasks besides ranking: what they compute equals the definition, and each runs from end to end with its own metric."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.nn import functional

from fedpers import registry
from fedpers.cohort.model import CohortModel
from fedpers.config import Config, TaskConfig
from fedpers.data.base import Federation, Record
from fedpers.data.synthetic import TOPICS, Synthetic
from fedpers.errors import ConfigError, DataError, PrivacyRefusal
from fedpers.experiment import build_model, prepare
from fedpers.identity import identity
from fedpers.reporting import Reporter
from fedpers.simulation import simulate
from fedpers.tasks.base import Examples
from fedpers.tasks.classification import Classification
from fedpers.tasks.language_model import BETWEEN, LanguageModel, _TokenLoss
from fedpers.tasks.rating import Rating

Tiny = Callable[..., Config]
LABELS = tuple(TOPICS)


class Rated(Synthetic):
    """The made-up people, who give a number to what they read: every other one a large one."""

    tasks = ("rating",)

    def load(self, config: Any, key: bytes) -> Federation:
        """Replace targets."""
        return retarget(super().load(config, key), lambda r: ("2", "4")[int(r.id.split("/")[0][-1]) % 2])


class Labelled(Synthetic):
    """The made-up people, who name the topic of their reply."""

    tasks = ("classification",)

    def load(self, config: Any, key: bytes) -> Federation:
        """Replace targets."""
        return retarget(
            super().load(config, key), lambda r: next(t for t in TOPICS if r.target.split()[0] in TOPICS[t])
        )


def retarget(federation: Federation, make: Callable[[Record], str]) -> Federation:
    def changed(part: Any) -> Any:
        return tuple(tuple(replace(record, target=make(record)) for record in held) for held in part)

    return replace(federation, train=changed(federation.train), test=changed(federation.test), pool=())


@pytest.fixture(autouse=True)
def _sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {("data", "rated"): Rated, ("data", "labelled"): Labelled})


def settings(task: str, llama: Path) -> dict[str, Any]:
    """A small configuration of each task."""
    found: dict[str, dict[str, Any]] = {
        "rating": {"data": {"name": "rated"}, "task": {"name": "rating"}},
        "classification": {"data": {"name": "labelled"}, "task": {"name": "classification", "labels": LABELS}},
        "language-model": {
            "task": {"name": "language-model"},
            "model": {"backbone": str(llama), "adapter": {"layers": 1, "targets": ["q_proj", "v_proj"]}},
        },
    }
    return found[task]


TASKS = {"rating": ("rmse", False), "classification": ("accuracy", True), "language-model": ("loss", False)}
PRIVACY: dict[str, dict[str, Any]] = {
    "none": {},
    "user": {"unit": "user", "epsilon": 8, "delta": 1e-2, "clip": 0.1},
    "record": {"unit": "record", "epsilon": 8, "delta": 1e-2, "clip": 0.1},
}


@pytest.mark.parametrize("unit", PRIVACY)
@pytest.mark.parametrize("task", TASKS)
def test_a_task_runs_from_end_to_end(tiny: Tiny, tiny_llama: Path, tmp_path: Path, task: str, unit: str) -> None:
    groups = {"personal": {"groups": "adapter+head"}}
    config = tiny(method="ditto", privacy=PRIVACY[unit], **groups, **settings(task, tiny_llama))
    run = simulate(config, tmp_path / "run")
    metric, higher = TASKS[task]
    assert (run.summary["metric"], run.summary["higher_is_better"]) == (metric, higher)
    assert set(run.summary["metrics"]) == {"own", "global", "local", "zero_shot", "swap"}
    assert f"global_{metric}" in run.rounds.column_names
    assert np.isfinite(run.rounds.column(f"global_{metric}").to_numpy()).all()
    table = run.users.to_pandas().pivot(index="user", columns="kind", values="loss")
    assert unit != "none" or (table["own"] < table["zero_shot"]).mean() > 0.6
    assert (unit == "none") == np.isinf(run.claim.epsilon)
    said = json.loads((run.path / "adapters" / "shared" / "head.json").read_text(encoding="utf-8"))
    assert said["scale"] > 0
    if task == "rating":
        assert (said["low"], said["high"]) == (1, 5)
    assert task != "classification" or said["labels"] == list(LABELS)


def test_a_gain_is_positive_where_less_is_better(tiny: Tiny, tiny_llama: Path, tmp_path: Path) -> None:
    """A sign that is wrong would turn every conclusion round."""
    run = simulate(tiny(method="local", rounds=0, **settings("rating", tiny_llama)), tmp_path / "run")
    means = {kind: found["mean"] for kind, found in run.summary["metrics"].items()}
    gain = run.summary["comparisons"]["zero_shot"]["mean_gain"]
    assert gain == pytest.approx(means["zero_shot"] - means["own"])
    assert gain > 0


# ---------------------------------------------------------------- rating


@pytest.mark.parametrize(("scale", "said"), [({}, True), ({"low": 1}, True), ({"low": 1, "high": 5}, False)])
def test_a_run_says_which_scale_it_assumes(
    tiny: Tiny, tiny_llama: Path, tmp_path: Path, scale: dict[str, float], said: bool
) -> None:
    class Heard(Reporter):
        def message(self, text: str) -> None:
            heard.append(text)

    heard: list[str] = []
    given = settings("rating", tiny_llama)
    given["task"] |= scale
    simulate(tiny(method="local", rounds=0, **given), tmp_path / "run", reporter=Heard())
    (line,) = [text for text in heard if "8 users of" in text]
    assert ("ratings are taken to go from 1 to 5 (task.low, task.high)" in line) is said


def test_ratings_are_measured_in_the_units_of_the_scale() -> None:
    task = Rating(TaskConfig(name="rating", low=-4, high=4))
    scores, targets = torch.tensor([[0.5], [-2.0], [0.0]]), torch.tensor([1.0, -4.0, 3.0])
    found = task.metrics(scores, targets)
    predicted = np.array([2.0, -4.0, 0.0])  # the second is cut to the scale
    user = task.of_user({name: value.double().numpy() for name, value in found.items()})
    assert user["rmse"] == pytest.approx(np.sqrt(np.mean((predicted - targets.numpy()) ** 2)))
    assert user["mae"] == pytest.approx(np.mean(np.abs(predicted - targets.numpy())))
    np.testing.assert_allclose(
        task.loss(scores, targets), 0.5 * (np.array([2.0, -8.0, 0.0]) - targets.numpy()) ** 2 / 16
    )


@pytest.mark.parametrize("target", ["six", "6", "nan", "0.5", ""])
def test_a_target_that_is_no_rating_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    class Odd(Synthetic):
        tasks = ("rating",)

        def load(self, config: Any, key: bytes) -> Federation:
            return retarget(super().load(config, key), lambda _: target)

    monkeypatch.setattr(registry, "_registered", {("data", "odd"): Odd})
    with pytest.raises(DataError, match=r"data synthetic: the target of record 1 is no number from 1 to 5; mend"):
        prepare(tiny(data={"name": "odd"}, task={"name": "rating"}))


def test_a_scale_upside_down_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"task\.low = 5 is not below task\.high = 1"):
        prepare(tiny(data={"name": "rated"}, task={"name": "rating", "low": 5, "high": 1}))


# ---------------------------------------------------------------- classification


def test_macro_f1_is_that_of_its_definition() -> None:
    task = Classification(TaskConfig(name="classification", labels=("a", "b", "c", "d")))
    scores = torch.tensor([[3.0, 0, 0, 0], [3, 0, 0, 0], [0, 3, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    targets = torch.tensor([0.0, 1, 1, 0, 2])
    found = {name: value.double().numpy() for name, value in task.metrics(scores, targets).items()}
    assert found["predicted"].tolist() == [0, 0, 1, -1, -1], "a tie is no answer"
    # a: 1 right of 2 predicted and 2 true, 1/2; b: 1 right, 1 predicted, 2 true, 2/3; c: never predicted, 0; d: absent
    user = task.of_user(found)
    assert user["macro_f1"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert user["accuracy"] == pytest.approx(2 / 5)


@pytest.mark.parametrize("labels", [(), ("food",), ("food", "food")])
def test_labels_must_be_listed(tiny: Tiny, labels: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"task\.labels must list two labels or more, each once"):
        prepare(tiny(data={"name": "labelled"}, task={"name": "classification", "labels": labels}))


def test_a_label_that_is_not_listed_is_refused(tiny: Tiny) -> None:
    with pytest.raises(
        DataError, match=r"the targets of \d+ records are not among task\.labels, the first that of rec"
    ):
        prepare(tiny(data={"name": "labelled"}, task={"name": "classification", "labels": LABELS[:3]}))


# ---------------------------------------------------------------- language model


@pytest.fixture
def language(tiny: Tiny, tiny_llama: Path) -> tuple[CohortModel, Examples]:
    experiment = prepare(tiny(method="fedavg", **settings("language-model", tiny_llama)))
    return build_model(experiment, Reporter()), experiment.examples


def test_the_loss_is_that_of_the_language_model_itself(
    language: tuple[CohortModel, Examples], tiny_llama: Path
) -> None:
    model, examples = language
    rows = np.concatenate(examples.test[:3])
    owners = np.zeros_like(rows)
    model.load(model.broadcast(1))
    with torch.no_grad():
        found = model.losses(model.all_contexts(rows, owners), rows, torch.from_numpy(owners))
    whole = transformers.LlamaForCausalLM.from_pretrained(tiny_llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    for row, loss in zip(rows, found, strict=True):
        before = [tokenizer.eos_token_id, *tokenizer(examples.inputs[row] + BETWEEN)["input_ids"]]
        after = [*tokenizer(examples.continuations[row])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([[*before, *after]])
        assert ids.shape[1] <= 16, "the configured length must not cut this case"
        labels = torch.tensor([[-100] * len(before) + after])
        torch.testing.assert_close(loss, whole(input_ids=ids, labels=labels).loss.detach(), rtol=1e-4, atol=1e-5)


def test_the_shift_is_a_bias_on_the_scores_of_all_tokens(language: tuple[CohortModel, Examples]) -> None:
    """Two owners in one batch, each with a shift of its own."""
    model, examples = language
    rows = np.array([examples.test[0][0], examples.test[0][0]])
    owners = torch.tensor([0, 1])
    parameters = model.broadcast(2)
    (head,) = model.names(["head"])
    parameters[head] = torch.randn(parameters[head].shape, generator=torch.Generator().manual_seed(3))
    model.load(parameters)
    with torch.no_grad():
        context = model.contexts(rows, owners)
        found = model.losses(context, rows, owners)
    ids, start = model.inputs.ids[rows[0]], model.inputs.starts[rows[0]]
    for owner in (0, 1):
        states = context[owner, start - 1 : len(ids) - 1]
        scores = states @ model.backbone.vocabulary.T + (model.backbone.vocabulary @ parameters[head][owner]).T
        torch.testing.assert_close(found[owner], functional.cross_entropy(scores, ids[start:]), rtol=1e-4, atol=1e-5)


def test_gradients_of_token_losses_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpers.tasks.language_model.CHUNK", 3)  # several chunks
    draws = torch.Generator().manual_seed(1)
    states = torch.randn(7, 5, dtype=torch.float64, generator=draws, requires_grad=True)
    vocabulary = torch.randn(11, 5, dtype=torch.float64, generator=draws)
    targets = torch.randint(11, (7,), generator=draws)
    torch.autograd.gradcheck(lambda x: _TokenLoss.apply(x, vocabulary, targets), (states,))
    torch.testing.assert_close(
        _TokenLoss.apply(states, vocabulary, targets),
        functional.cross_entropy(states @ vocabulary.T, targets, reduction="none"),
    )


def test_long_texts_are_cut_where_they_begin(tiny: Tiny, tiny_llama: Path) -> None:
    """The words just before the reply are kept, and never more than three quarters are to be predicted."""
    experiment = prepare(tiny(method="fedavg", data={"max_tokens": 8}, **settings("language-model", tiny_llama)))
    model = build_model(experiment, Reporter())
    rows = [row for held in experiment.examples.train for row in held]
    cut = 0
    for row in rows:
        ids, start = model.inputs.ids[row], model.inputs.starts[row]
        assert len(ids) <= 8
        assert 1 <= len(ids) - start <= 6
        assert start >= 1
        cut += len(ids) == 8
        words = [model.backbone.tokenizer.decode([token]) for token in ids[1 : start - 1]]
        assert (
            experiment.examples.inputs[row].split()[len(experiment.examples.inputs[row].split()) - len(words) :]
            == words
        )
    assert cut > 10


def test_a_user_with_long_replies_counts_each_token() -> None:
    records = {"summed": np.array([2.0, 30.0]), "tokens": np.array([1.0, 10.0]), "loss": np.array([2.0, 3.0])}
    user = LanguageModel(TaskConfig(name="language-model")).of_user(records)
    assert user["loss"] == pytest.approx(32 / 11)
    assert user["perplexity"] == pytest.approx(np.exp(32 / 11))


def test_an_encoder_is_no_language_model(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"is no causal language model .*, which task\.name=language-model needs; set model\.backbone"
    ):
        simulate(tiny(method="fedavg", task={"name": "language-model"}), tmp_path / "run")


def test_a_model_without_an_adapter_keeps_last_states(tiny: Tiny, tiny_llama: Path, tmp_path: Path) -> None:
    """The head alone: nothing is encoded twice, and the zero-shot model is the same as with an adapter."""
    heads = {"share": "head", "personal": {"groups": "head"}}
    run = simulate(tiny(method="fedavg-finetune", **heads, **settings("language-model", tiny_llama)), tmp_path / "a")
    both = {"personal": {"groups": "adapter+head"}}
    other = simulate(tiny(method="fedavg-finetune", **both, **settings("language-model", tiny_llama)), tmp_path / "b")
    untrained = [one.summary["metrics"]["zero_shot"]["mean"] for one in (run, other)]
    assert untrained[0] == pytest.approx(untrained[1], abs=1e-4)
    assert run.summary["metrics"]["own"]["mean"] < untrained[0]


@pytest.mark.parametrize("method", ["feddpa", "fedalt"])
def test_a_gate_reads_what_comes_before_the_answer(tiny: Tiny, tiny_llama: Path, method: str) -> None:
    """Else a model would be told the words that it is to predict."""
    config = tiny(method=method, personal={"groups": "adapter+head"}, **settings("language-model", tiny_llama))
    experiment = prepare(config)
    other = replace(experiment.examples, continuations=tuple("bread" for _ in experiment.examples.continuations))
    features = [
        build_model(replace(experiment, examples=examples), Reporter()).features
        for examples in (experiment.examples, other)
    ]
    assert features[0] is not None
    assert features[1] is not None
    # A long reply leaves less room before it, so only rows that nothing is cut off are alike.
    whole = [
        len(i.split()) + len(t.split()) < 12
        for i, t in zip(other.inputs, experiment.examples.continuations, strict=True)
    ]
    assert sum(whole) > 20
    torch.testing.assert_close(features[0][whole], features[1][whole])


def test_a_given_secret_needs_a_task_that_a_file_defines(
    tiny: Tiny, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a changed loss would draw the same noise, and the difference of two releases would be free of it."""
    monkeypatch.setitem(sys.modules, "a_notebook", types.ModuleType("a_notebook"))
    Typed = type("Typed", (Rating,), {"__module__": "a_notebook"})
    made = {**registry._registered, ("tasks", "typed"): Typed}
    monkeypatch.setattr(registry, "_registered", made)
    config = tiny(data={"name": "rated"}, task={"name": "typed"}, privacy=PRIVACY["user"])
    with pytest.raises(PrivacyRefusal, match=r"privacy\.secret with the task Typed: no file defines it"):
        build_model(prepare(config), Reporter())


def test_another_tokenizer_makes_another_identity(tiny: Tiny, tiny_llama: Path, tmp_path: Path) -> None:
    """Same vocabulary and weights, but another end of text: other tokens, so other releases, under other noise."""
    moved = shutil.copytree(tiny_llama, tmp_path / "moved")
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    path = other / "tokenizer_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"eos_token": "<end>"', '"eos_token": "soup"'))
    found = []
    for folder in (tiny_llama, moved, other):
        experiment = prepare(tiny(method="fedavg", **settings("language-model", folder)))
        model = build_model(experiment, Reporter())
        text = identity(experiment, model)
        found.append(text.replace(folder.name, "x"))
    assert found[0] == found[1] != found[2]


def save_random_tiny_gpt2(folder: Path, tokenizer: Path) -> Path:
    """Write a random (untrained) GPT-2, whose linear layers are Conv1D, with the tokenizer of the tiny Llama."""
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=40,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        eos_token_id=1,
        bos_token_id=1,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_gpt2_has_linear_layers_of_another_class(tiny: Tiny, tiny_llama: Path, tmp_path: Path) -> None:
    """Its loss is the model's own, an adapter on Conv1D learns, and plain PEFT loads what comes out of a run."""
    folder = save_random_tiny_gpt2(tmp_path / "gpt2", tiny_llama)
    sections = settings("language-model", tiny_llama)
    sections["model"] = {
        "backbone": str(folder),
        "adapter": {"layers": 2, "rank": 2, "alpha": 4, "targets": ["c_attn"]},
    }
    experiment = prepare(tiny(method="fedavg", **sections))
    model = build_model(experiment, Reporter())
    rows = np.concatenate(experiment.examples.test[:2])
    model.load(model.broadcast(1))
    with torch.no_grad():
        found = model.losses(
            model.all_contexts(rows, np.zeros_like(rows)), rows, torch.zeros(len(rows), dtype=torch.long)
        )
    whole = transformers.GPT2LMHeadModel.from_pretrained(folder)
    for row, loss in zip(rows, found, strict=True):
        ids, start = model.inputs.ids[row], model.inputs.starts[row]
        labels = torch.where(torch.arange(len(ids)) < start, -100, ids)
        torch.testing.assert_close(
            loss, whole(input_ids=ids[None], labels=labels[None]).loss.detach(), rtol=1e-4, atol=1e-5
        )
    run = simulate(
        tiny(method="fedavg", rounds=3, local={"epochs": 3, "lr": {"adapter": 1.0}}, **sections), tmp_path / "run"
    )
    means = {kind: found["mean"] for kind, found in run.summary["metrics"].items()}
    assert means["global"] < means["zero_shot"] - 0.05
    loaded = peft.PeftModel.from_pretrained(
        transformers.GPT2LMHeadModel.from_pretrained(folder), run.path / "adapters" / "shared"
    )
    ids = torch.tensor([[1, 5, 6, 7]])
    assert (loaded(input_ids=ids).logits - whole(input_ids=ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("data", "task", "fits"),
    [("movielens", "reply-ranking", "rating"), ("synthetic", "rating", "reply-ranking or language-model")],
)
def test_a_task_that_does_not_fit_the_source_is_refused(tiny: Tiny, data: str, task: str, fits: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"data\.name={data} is for {fits}, which task\.name={task} is not; set task"
    ):
        prepare(tiny(data={"name": data}, task={"name": task}))


def test_labels_that_yaml_takes_for_something_else(tiny: Tiny) -> None:
    assert tiny(task={"labels": [1, 2, "three"]}).task.labels == ("1", "2", "three")
    for labels, says in (([True, False], "quote labels"), ("good", r"expected a list, as labels: \[good, bad\]")):
        with pytest.raises(ConfigError, match=says):
            tiny(task={"labels": labels})
