"""Finer parameter groups: names, a second adapter, gate, residual, norms; against a model without PEFT or cohorts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn
from torch.nn import functional

from conftest import save_random_tiny_bert
from fedpers.cohort.linear import Owners, to_cohort
from fedpers.cohort.model import CohortModel, Parameters
from fedpers.cohort.norm import CohortLayerNorm
from fedpers.cohort.saving import save_shared
from fedpers.config import ALIASES, FAMILY, GROUPS, AdapterConfig, Config
from fedpers.data.base import load as load_data
from fedpers.errors import ConfigError
from fedpers.method_table import Link
from fedpers.models import adapters
from fedpers.models.array_names import Pair, base_name, family_of, group_of, pairs
from fedpers.models.backbone import Backbone, pool
from fedpers.privacy.randomness import seed_key
from fedpers.tasks.reply_ranking import ReplyRanking

Tiny = Callable[..., Config]
ALL = ("A2", "B2", "gate", "residual", "norm")
QUERY = "base_model.model.encoder.layer.2.attention.self.query"
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def build(config: Config, extra: Sequence[str] = (), link: Link = "linear", adapt: bool = True) -> CohortModel:
    key = seed_key(config.seed)
    task = ReplyRanking(config.task)
    examples = task.prepare(load_data(config, key), key)
    return CohortModel(config, task, examples, key, adapt, lambda *_: None, extra=extra, link=link)


@pytest.fixture
def small(tiny: Tiny) -> Tiny:
    """With gradients of order one, so that 1e-5 means something."""
    return lambda **changes: tiny(**{"data": {"users": 4}, "task": {"candidates": 4, "scale": 4.0}, **changes})


def scattered(model: CohortModel, clients: int, seed: int = 1, spread: float = 0.2) -> Parameters:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: first + spread * torch.randn(clients, *first.shape, generator=rng)
        for name, first in sorted(model.initial.items())
    }


def rows_of(model: CohortModel, users: Sequence[int]) -> tuple[np.ndarray[Any, Any], Tensor]:
    """The training records of these users, mixed, and who owns them."""
    rows = np.concatenate([model.examples.train[user] for user in users])
    owners = np.repeat(np.arange(len(users)), [len(model.examples.train[user]) for user in users])
    order = np.random.default_rng(0).permutation(len(rows))
    return rows[order], torch.from_numpy(owners[order])


def encode(model: CohortModel, arrays: Mapping[str, Tensor], **changes: Tensor) -> Tensor:
    """What one client's model, (out, in) by name, makes of the first users' records."""
    model.load(model.broadcast(1, {**arrays, **changes}))
    rows, owners = rows_of(model, [0, 1, 2])
    return model.all_contexts(rows, torch.zeros_like(owners).numpy())


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    assert float((found - expected).abs().max()) <= tolerance
    assert float((found - expected).norm()) <= tolerance * float(expected.norm()) + 1e-9


class Plain:
    """One client's model in a few lines over the plain encoder: no PEFT, no cohort, no cache, one record at a time."""

    def __init__(self, config: Config, model: CohortModel, arrays: Mapping[str, Tensor]) -> None:
        path = config.model.backbone
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.encoder = transformers.AutoModel.from_pretrained(path).eval().requires_grad_(False)
        self.config, self.model = config, model
        self.arrays = {name: array.clone().requires_grad_() for name, array in arrays.items()}

    @contextmanager
    def changed(self, gate: Tensor) -> Iterator[None]:
        def change(path: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
                scale, x, get = self.config.model.adapter, args[0], self.arrays.get
                if isinstance(module, nn.LayerNorm):
                    row = self.arrays[f"norm.base_model.model.{path}.weight"]
                    centred = x - x.mean(-1, keepdim=True)
                    return centred / (x.var(-1, correction=0, keepdim=True) + module.eps).sqrt() * row[0] + row[1]
                name = f"base_model.model.{path}"
                first = x @ get(f"{name}.lora_A.weight").T @ get(f"{name}.lora_B.weight").T
                second = x @ get(f"{name}.lora_A.second.weight").T @ get(f"{name}.lora_B.second.weight").T
                mixed = (1 - gate) * first + gate * second
                return output + mixed * scale.alpha / scale.rank + x @ get(f"residual.{name}.weight").T

            return hook

        handles = [
            module.register_forward_hook(change(path))
            for path, module in self.encoder.named_modules()
            if f"base_model.model.{path}.lora_A.weight" in self.arrays
            or f"norm.base_model.model.{path}.weight" in self.arrays
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def context(self, row: int) -> Tensor:
        limit = self.config.data.max_tokens
        text = self.model.examples.inputs[row]
        tokens = self.tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
        frozen = functional.normalize(self.encoder(**tokens).last_hidden_state[0].mean(0), dim=0)
        gate = self.arrays["gate.weight"][0] @ torch.cat([frozen, torch.ones(1)])
        with self.changed(torch.sigmoid(gate) if self.model.link == "sigmoid" else gate):
            return functional.normalize(self.encoder(**tokens).last_hidden_state[0].mean(0), dim=0)

    def gradients(self, row: int) -> dict[str, Tensor]:
        candidates = self.model.candidates[torch.from_numpy(self.model.examples.candidates[row])]
        agreement, direction = self.arrays["head.agreement.weight"], self.arrays["head.direction.weight"]
        scores = agreement[0, 0] * (candidates @ self.context(row)) + candidates @ direction[0]
        loss = -functional.log_softmax(self.config.task.scale * scores, dim=0)[0]
        return dict(zip(self.arrays, torch.autograd.grad(loss, list(self.arrays.values())), strict=True))


@pytest.mark.parametrize("link", ["linear", "sigmoid"])
def test_a_cohort_is_its_clients_in_every_group(small: Tiny, link: Link) -> None:
    config = small(model={"adapter": {"layers": 2, "rank": 2, "alpha": 3, "targets": ["query", "dense"]}})
    model = build(config, ALL, link)
    users = [3, 0, 2]
    parameters = scattered(model, len(users))
    rows, owners = rows_of(model, users)
    model.load(parameters)
    for layer in model.layers.values():
        layer.weight.requires_grad_(True)
    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        contexts = model.contexts(rows, owners)
        model.losses(contexts, rows, owners).sum().backward()
        found = {name: layer.weight.grad_sample for name, layer in model.layers.items()}
    finally:
        hooks.cleanup()
    model.budget = 30  # several parts
    assert_close(model.all_contexts(rows, owners.numpy()), contexts.detach())
    assert set(model.group.values()) == set(GROUPS)
    assert len(set(model.lengths[rows])) > 1
    clients = [Plain(config, model, {n: v[place] for n, v in parameters.items()}) for place in range(len(users))]
    mixed = list(zip(rows.tolist(), owners.tolist(), strict=True))
    assert_close(contexts.detach(), torch.stack([clients[owner].context(row).detach() for row, owner in mixed]))
    alone = [clients[owner].gradients(row) for row, owner in mixed]
    for name, parameter in parameters.items():
        expected = torch.stack([gradients[name] for gradients in alone])
        assert float(expected.norm()) > 1e-2, f"no gradient in {name}, so equality says nothing"
        assert_close(found[name], expected)
        summed = torch.zeros_like(parameter).index_add_(0, owners, expected)
        assert_close(model.layers[name].weight.grad, summed, 2e-5)  # what autograd itself adds up


@pytest.mark.parametrize(
    ("name", "group"),
    [
        (f"{QUERY}.lora_A.weight", "A"),
        (f"{QUERY}.lora_B.weight", "B"),
        (f"{QUERY}.lora_A.second.weight", "A2"),
        (f"{QUERY}.lora_B.second.weight", "B2"),
        ("gate.weight", "gate"),
        (f"residual.{QUERY}.weight", "residual"),
        ("norm.base_model.model.encoder.layer.2.output.LayerNorm.weight", "norm"),
        ("head.direction.weight", "head"),
        ("head.lora_A.weight", "head"),
    ],
)
def test_the_name_alone_tells_the_group(name: str, group: str) -> None:
    assert base_name(name) == name
    for companion in ("control", "cluster3"):
        assert base_name(f"{companion}.{name}") == name
        assert group_of(f"{companion}.{name}") == group_of(name) == group
        assert family_of(f"{companion}.{name}") == FAMILY[group]


@pytest.mark.parametrize("name", ["lora_A.weight", "adapter.A", f"a.b.{QUERY}.lora_A.weight", f"{QUERY}.lora_C.weight"])
def test_a_name_that_no_model_gives_has_no_group(name: str) -> None:
    with pytest.raises(ConfigError, match="belongs to no parameter group"):
        group_of(name)


def test_pairs_are_made_of_the_first_adapter_alone(small: Tiny) -> None:
    model = build(small(), ALL)
    query = Pair(QUERY, f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight", f"residual.{QUERY}.weight")
    found = pairs(model.layers)
    assert found[0] == query
    assert [pair.module for pair in found] == [QUERY, QUERY.replace("query", "value")]
    assert {pair.A for pair in found} == set(model.names(["A"]))
    assert {pair.B for pair in found} == set(model.names(["B"]))
    assert {pair.residual for pair in found} == set(model.names(["residual"]))
    assert pairs([f"control.{query.B}", "head.x", query.A]) == [query]
    assert pairs(model.names(["A2", "B2", "gate", "norm", "head", "residual"])) == []


def test_groups_of_a_model_and_their_initial_values(small: Tiny) -> None:
    model = build(small(), ALL)
    assert list(model.layers) == sorted(model.layers)
    assert model.names(["adapter"]) == model.names(["B", "A"])
    assert model.names(["adapter2"]) == model.names(ALIASES["adapter2"])
    assert sorted(name for group in GROUPS for name in model.names([group])) == list(model.layers)
    assert set(model.initial_of(["adapter", "gate"])) == {*model.names(["A", "B"]), "gate.weight"}
    for name, value in model.initial.items():
        assert value.any() == (model.group[name] in {"A", "A2", "norm"} or name == "head.agreement.weight")
    first, second = model.initial_of(["A"]), model.initial_of(["A2"])
    assert not any(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
    assert all(layer.scaling == {"default": model.scaling, "second": model.scaling} for layer in model.lora_layers)
    assert [n for n, layer in model.layers.items() if not layer.weight.requires_grad] == list(model.names(["residual"]))
    plain = build(small())
    assert set(plain.group.values()) == {"A", "B", "head"}
    assert all(torch.equal(plain.initial[name], model.initial[name]) for name in plain.initial)
    assert torch.allclose(encode(plain, {}), encode(model, {}), atol=1e-6)  # at the start extra groups do nothing
    assert set(build(small(), adapt=False).group.values()) == {"head"}


def test_initial_values_come_from_the_public_key_alone(small: Tiny) -> None:
    torch.manual_seed(1)
    one = build(small(), ALL)
    torch.manual_seed(2)
    two, other = build(small(), ALL), build(small(seed=5), ALL)
    assert all(torch.equal(one.initial[name], two.initial[name]) for name in one.initial)
    for name in one.names(["A", "A2"]):
        assert not torch.equal(one.initial[name], other.initial[name])
        assert float(one.initial[name].abs().max()) <= 1 / np.sqrt(one.backbone.width)


def test_only_what_trains_is_in_train_mode_and_norms_of_the_top_alone_are_owned(small: Tiny) -> None:
    model = build(small(model={"adapter": {"layers": 1}}), ["norm"])
    owned = set(model.layers.values())
    assert all(module.training == (module in owned) for module in model.modules())
    names = model.names(["norm"])
    assert len(names) == 2
    assert all(name.startswith("norm.base_model.model.encoder.layer.2.") for name in names)
    everything = build(small(model={"adapter": {"layers": 3}}), ["norm"])
    assert len(everything.names(["norm"])) == 6
    assert not any("embeddings" in name for name in everything.layers)
    rows, _ = rows_of(everything, [0])
    assert everything.prefix is not None
    everything.load(scattered(everything, 1))
    hidden, mask = everything.prefix.batch(rows[:2])
    ids = torch.nn.utils.rnn.pad_sequence(
        list(everything.backbone.tokenize([everything.examples.inputs[row] for row in rows[:2]], 16).ids), True
    )
    assert_close(everything.backbone.below(ids, mask, 0) * mask.unsqueeze(-1), hidden)


def test_width_equal_to_rank_does_not_mix_the_factors_up(small: Tiny, tmp_path: Path) -> None:
    narrow = save_random_tiny_bert(tmp_path / "random-narrow-bert", width=4)
    config = small(model={"backbone": str(narrow), "adapter": {"layers": 1, "rank": 4, "alpha": 4}})
    model = build(config, ["A2", "B2"])
    assert {tuple(model.initial[name].shape) for name in model.names(["adapter", "adapter2"])} == {(4, 4)}
    for group in ("A", "B", "A2", "B2"):
        assert len(model.names([group])) == 2
        assert all(f".lora_{group[0]}." in name for name in model.names([group]))
        assert all((".second." in name) == group.endswith("2") for name in model.names([group]))
        assert all(value.any() == group.startswith("A") for value in model.initial_of([group]).values())
    first = dict.fromkeys(model.names(["B"]), torch.eye(4))
    assert_close(encode(model, {}, **dict.fromkeys(model.names(["A"]), torch.eye(4))), encode(model, {}))  # B is zero
    assert float((encode(model, first) - encode(model, {})).norm()) > 1e-3


def test_two_adapters_are_one_of_stacked_rank(small: Tiny) -> None:
    two = build(small(model={"adapter": {"layers": 2, "rank": 2, "alpha": 4}}), ["adapter2"])
    one = build(small(model={"adapter": {"layers": 2, "rank": 4, "alpha": 8}}))
    arrays = {name: value[0] for name, value in scattered(two, 1).items()}
    stacked = {name: arrays[name] for name in one.names(["head"])}
    for pair in pairs(one.layers):
        for name, dim in ((pair.A, 0), (pair.B, 1)):
            stacked[name] = torch.cat([arrays[name], arrays[name.replace(".weight", ".second.weight")]], dim=dim)
    assert_close(encode(two, arrays), encode(one, stacked))
    assert float((encode(one, {}) - encode(one, stacked)).norm()) > 1e-2


@pytest.mark.parametrize(("link", "at_zero", "at_one"), [("linear", 0.0, 1.0), ("sigmoid", -50.0, 50.0)])
def test_a_gate_at_its_ends_leaves_one_adapter(small: Tiny, link: Link, at_zero: float, at_one: float) -> None:
    gated, plain = build(small(), ["A2", "B2", "gate"], link), build(small())
    arrays = {name: value[0] for name, value in scattered(gated, 1).items()}
    gate = torch.zeros_like(arrays["gate.weight"])
    first = {name: arrays[name] for name in plain.layers}
    second = {n: arrays[n.replace("weight", "second.weight")] if ".lora_" in n else arrays[n] for n in plain.layers}
    gate[0, -1] = at_zero
    assert_close(encode(gated, {**arrays, "gate.weight": gate}), encode(plain, first))
    gate[0, -1] = at_one
    assert_close(encode(gated, {**arrays, "gate.weight": gate}), encode(plain, second))
    assert float((encode(plain, first) - encode(plain, second)).norm()) > 1e-2


def test_a_gate_reads_the_plain_encoder_and_leaves_no_tensor_behind(small: Tiny) -> None:
    model = build(small(), ["adapter2", "gate"])
    frozen = build(small(), adapt=False)
    assert model.features is not None
    assert frozen.frozen_contexts is not None
    assert_close(model.features, frozen.frozen_contexts)
    floats = [{"default": model.scaling, "second": model.scaling}] * len(model.lora_layers)
    rows, owners = rows_of(model, [0, 1])
    model.load(scattered(model, 2))
    model.contexts(rows, owners)
    assert [layer.scaling for layer in model.lora_layers] == floats

    def fail(_module: nn.Module, _args: Any) -> None:
        assert all(isinstance(value, Tensor) for layer in model.lora_layers for value in layer.scaling.values())
        raise RuntimeError("in the middle")

    handle = model.backbone.blocks[2].attention.output.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model.contexts(rows, owners)
    handle.remove()
    assert [layer.scaling for layer in model.lora_layers] == floats


def test_a_residual_is_added_to_the_frozen_weight(small: Tiny) -> None:
    with_residual, plain = build(small(), ["residual"]), build(small())
    arrays = {name: value[0] for name, value in scattered(with_residual, 1).items()}
    rest = {name: arrays[name] for name in plain.layers}
    before = encode(plain, rest)
    assert_close(encode(with_residual, rest), before)
    for pair in pairs(plain.layers):
        layer = plain.encoder.get_submodule(pair.module.removeprefix("base_model.model."))
        layer.base_layer.weight.data += arrays[pair.residual]
    assert_close(encode(with_residual, arrays), encode(plain, rest))
    assert float((encode(plain, rest) - before).norm()) > 1e-2


def test_a_cohort_of_one_layer_norm_is_the_ordinary_one() -> None:
    torch.manual_seed(0)
    plain = nn.LayerNorm(6, eps=1e-3)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    module = nn.Sequential(plain)
    owners = Owners()
    replaced = to_cohort(module, owners)
    owned = replaced["0"]
    assert module[0] is owned
    assert isinstance(owned, CohortLayerNorm)
    for shape in ((5, 6), (5, 3, 6), (5, 2, 3, 6)):
        x = torch.randn(shape) + 2
        owners.set(torch.zeros(5, dtype=torch.long))
        assert_close(owned(x), plain(x), 1e-6)
        expected = torch.autograd.grad(plain(x).square().sum(), [plain.weight, plain.bias])
        (found,) = torch.autograd.grad(owned(x).square().sum(), [owned.weight])
        assert_close(found[0], torch.stack(expected))
    fresh = CohortLayerNorm(6, 1e-3, owners)
    assert_close(fresh(x), functional.layer_norm(x, (6,), eps=1e-3), 1e-6)


@pytest.mark.parametrize("shape", [(7, 6), (7, 4, 6)], ids=str)
def test_layer_norm_gradients_per_record_are_those_of_separate_layers(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    owners, index = Owners(), torch.tensor([2, 0, 1, 1, 0, 2, 2])
    layer = CohortLayerNorm(6, 1e-5, owners)
    layer.weight.data = torch.randn(3, 2, 6)
    model, x, y = nn.Sequential(layer), torch.randn(shape), torch.randn(shape)
    owners.set(index)
    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        (model(x) - y).square().sum().backward()
        found = layer.weight.grad_sample
    finally:
        hooks.cleanup()
    for record, owner in enumerate(index.tolist()):
        alone = nn.LayerNorm(6, eps=1e-5)
        alone.weight.data, alone.bias.data = layer.weight.detach()[owner].unbind()
        (alone(x[record : record + 1]) - y[record]).square().sum().backward()
        assert_close(found[record], torch.stack([alone.weight.grad, alone.bias.grad]))


@pytest.mark.parametrize("module", [nn.LayerNorm(3, bias=False), nn.LayerNorm((2, 3)), nn.BatchNorm1d(3)], ids=str)
def test_other_normalisations_are_refused(module: nn.Module) -> None:
    with pytest.raises(TypeError, match="inner"):
        to_cohort(nn.ModuleDict({"inner": module}), Owners())


def test_a_layer_norm_of_which_only_a_part_trains_is_refused() -> None:
    norm = nn.LayerNorm(3)
    norm.bias.requires_grad_(False)
    with pytest.raises(TypeError, match="LayerNorm"):
        to_cohort(nn.Sequential(norm), Owners())


@pytest.mark.parametrize(("extra", "found"), [(["gate"], "ask for A2 and B2"), (["A3"], "A3 not known")])
def test_extra_groups_that_do_not_fit_are_refused(random_tiny_bert: Path, extra: list[str], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        adapters.place(Backbone(str(random_tiny_bert)), AdapterConfig(), extra)


def test_a_backbone_without_layer_norms_in_its_top_is_refused(random_tiny_bert: Path) -> None:
    backbone = Backbone(str(random_tiny_bert))
    top = backbone.blocks[2]
    top.attention.output.LayerNorm = top.output.LayerNorm = nn.Identity()
    with pytest.raises(ConfigError, match="no layer norm with scale and shift in the top 1 layers"):
        adapters.place(backbone, AdapterConfig(layers=1), ["norm"])
    placed = adapters.place(backbone, AdapterConfig(layers=2), ["norm"])
    norms = [name for name, p in placed.named_parameters() if p.requires_grad and "LayerNorm" in name]
    assert len(norms) == 4
    assert all(".layer.1." in name for name in norms)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_what_is_saved_comes_back_and_peft_applies_it(small: Tiny, tmp_path: Path) -> None:
    model = build(small(), ALL, "sigmoid")
    arrays = {name: value[0].numpy() for name, value in scattered(model, 1).items()}
    save_shared(model, tmp_path, arrays)
    back = adapters.load(tmp_path)
    assert set(back) == set(arrays)
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)
    description = json.loads((tmp_path / "head.json").read_text())
    assert {"residual", "norm", "second", "gate"} <= set(description)
    assert description["link"] == "sigmoid"

    base = transformers.AutoModel.from_pretrained(model.backbone.name)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    result = loaded.load_adapter(str(tmp_path), adapter_name="again")
    assert (list(result.missing_keys), list(result.unexpected_keys)) == ([], [])
    for name, array in back.items():  # as head.json says, by hand
        kind, _, path = name.partition(".base_model.model.")
        if kind == "residual":
            base.get_submodule(path.removesuffix(".weight")).base_layer.weight.data += torch.from_numpy(array)
        elif kind == "norm":
            norm = base.get_submodule(path.removesuffix(".weight"))
            norm.weight.data, norm.bias.data = torch.from_numpy(array).unbind()
    rows, _ = rows_of(model, [0, 1, 2])
    tokens = transformers.AutoTokenizer.from_pretrained(model.backbone.name)(
        [model.examples.inputs[row] for row in rows], padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = pool(loaded(**tokens).last_hidden_state, tokens["attention_mask"])
    first = {name: torch.from_numpy(array) for name, array in arrays.items()}
    silent = {name: torch.zeros_like(first[name]) for name in model.names(["gate"])}
    silent["gate.weight"][0, -1] = -50.0
    assert_close(encode(model, {**first, **silent}), theirs)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("group", ["A", "B"])
def test_a_lone_factor_is_saved_with_the_other_at_its_public_start(small: Tiny, tmp_path: Path, group: str) -> None:
    model = build(small())
    arrays = {name: value.numpy() + 1 for name, value in model.initial_of([group]).items()}
    save_shared(model, tmp_path, arrays)
    back = adapters.load(tmp_path)
    assert set(back) == set(model.names(["adapter"]))
    for name, array in back.items():
        assert np.array_equal(array, arrays[name] if name in arrays else model.initial[name].numpy())
    loaded = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(model.backbone.name), str(tmp_path))
    result = loaded.load_adapter(str(tmp_path), adapter_name="again")
    assert (list(result.missing_keys), list(result.unexpected_keys)) == ([], [])
    with pytest.raises(ConfigError, match="PEFT could not load it"):
        adapters.save(tmp_path / "alone", arrays, model.lora, {})


def test_without_factors_of_the_first_adapter_nothing_is_written_for_peft(small: Tiny, tmp_path: Path) -> None:
    model = build(small(), ALL)
    kept = model.initial_of(["head", "norm", "A2", "B2"])
    save_shared(model, tmp_path, {name: value.numpy() for name, value in kept.items()})
    assert {file.name for file in tmp_path.iterdir()} == {
        "head.json", "head.safetensors", "norm.safetensors", "second.safetensors"
    }  # fmt: skip
    assert set(adapters.load(tmp_path)) == set(kept)


def test_companions_of_arrays_are_not_saved_as_a_model(small: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"control\.head\.x"):
        adapters.save(tmp_path / "out", {"control.head.x": np.zeros((1, 1), np.float32)}, None, {})
    assert not (tmp_path / "out").exists()
