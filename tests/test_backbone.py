"""Any Hugging Face encoder with one stack of blocks can be cut at every block; what cannot be cut is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from opacus.grad_sample import GradSampleHooks

from conftest import save_random_tiny_bert
from fedpers.cohort.linear import Owners, to_cohort
from fedpers.config import AdapterConfig, Config
from fedpers.errors import AssetError, ConfigError
from fedpers.models import adapters
from fedpers.models.array_names import group_of
from fedpers.models.backbone import Backbone, pool
from fedpers.simulation import simulate

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "bert": (transformers.BertConfig(vocab_size=40, **SMALL), ("query", "value")),
    "roberta": (transformers.RobertaConfig(vocab_size=40, pad_token_id=0, **SMALL), ("query", "value")),
    "electra": (transformers.ElectraConfig(vocab_size=40, embedding_size=16, **SMALL), ("query", "value")),
    "distilbert": (
        transformers.DistilBertConfig(vocab_size=40, dim=32, n_layers=3, n_heads=4, hidden_dim=64),
        ("q_lin", "v_lin"),
    ),
    "modernbert": (
        transformers.ModernBertConfig(
            vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
            attn_implementation="sdpa", **SMALL,
        ),
        ("Wqkv",),
    ),
    "gpt2": (transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4), ("c_attn",)),
    "llama": (transformers.LlamaConfig(vocab_size=40, tie_word_embeddings=True, **SMALL), ("q_proj", "v_proj")),
}  # fmt: skip


def save_random(folder: Path, config: Any) -> Path:
    """Write a random tiny model of some family, with the vocabulary of the random tiny BERT."""
    save_random_tiny_bert(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    torch.manual_seed(3)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_equals_whole_at_every_block(family: str, tmp_path: Path) -> None:
    config, targets = FAMILIES[family]
    backbone = Backbone(str(save_random(tmp_path, config)))
    tokens = backbone.tokenize(["bread soup apple", "ball run goal team race swim", "song"], 12)
    ids = torch.nn.utils.rnn.pad_sequence(list(tokens.ids), batch_first=True)
    mask = (torch.arange(ids.shape[1])[None] < tokens.lengths[:, None]).long()
    whole = backbone.encode(ids, mask)
    assert backbone.depth == 3
    assert whole.std() > 0.01  # not a constant
    for layer in range(backbone.depth):
        backbone.check_split(layer)
        with torch.no_grad():
            parts = pool(backbone.above(backbone.below(ids, mask, layer), mask, layer), mask)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    placed = adapters.place(backbone, AdapterConfig(layers=1, rank=2, alpha=4, targets=targets))
    trained = [name for name, p in placed.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(targets)
    assert all(".2." in name for name in trained)  # the top block alone


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama"])
def test_a_plain_linear_target_is_trained(family: str, tiny: Callable[..., Config], tmp_path: Path) -> None:
    """With clipping per record, so that each factor must have a gradient of each record."""
    config, targets = FAMILIES[family]
    model = {"backbone": str(save_random(tmp_path / "model", config)), "adapter": {"targets": targets}}
    privacy = {"unit": "record", "noise_multiplier": 1e-3, "clip": 1.0, "delta": 1e-3}
    run = simulate(tiny(model=model, method="fedavg", privacy=privacy, rounds=1), tmp_path / "run")
    moved = [array for name, array in run.shared.items() if group_of(name) == "B"]
    assert len(moved) == len(targets)
    assert all(np.abs(array).max() > 1e-4 for array in moved)
    assert run.summary["nonfinite"] == 0


@pytest.mark.parametrize(
    ("family", "target", "reason"),
    [
        ("bert", "word_embeddings", "bare parameters"),
        ("bert", "embeddings.position_embeddings", "read once for all records of a batch"),
        ("gpt2", "wte", "bare parameters"),
        ("gpt2", "wpe", "read once for all records of a batch"),
        ("llama", "embed_tokens", "bare parameters"),
        ("llama", "lm_head", "tied"),
    ],
)
def test_embeddings_are_refused_with_the_reason(family: str, target: str, reason: str, tmp_path: Path) -> None:
    config, targets = FAMILIES[family]
    backbone = Backbone(str(save_random(tmp_path, config)))
    with pytest.raises(ConfigError, match=rf"{target} not found in the top layers.*is refused: .*{reason}"):
        adapters.place(backbone, AdapterConfig(targets=(*targets, target)))
    assert not adapters.lora_layers(backbone.model), "nothing was placed"
    with pytest.raises(ConfigError, match=r"layers there: [^:]*\.$"):
        adapters.place(backbone, AdapterConfig(targets=("nonsense",)))


@pytest.mark.parametrize(
    "asked",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["pooler"]},
        {"target_modules": ["word_embeddings"]},
        {"target_modules": ["position_embeddings"]},
    ],
    ids=str,
)
def test_what_is_refused_could_not_be_trained_in_cohorts(asked: dict[str, Any], random_tiny_bert: Path) -> None:
    def placed(**more: Any) -> Any:
        lora = peft.LoraConfig(**{"r": 2, "target_modules": ["query"], **more})
        return peft.get_peft_model(Backbone(str(random_tiny_bert)).model, lora)

    assert to_cohort(placed(), Owners())
    with pytest.raises(TypeError, match="can be trained in cohorts"):
        to_cohort(placed(**asked), Owners())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_checkpointing_no_record_gets_a_gradient(checkpointing: bool, random_tiny_bert: Path) -> None:
    backbone, owners = Backbone(str(random_tiny_bert)), Owners()
    placed = adapters.place(backbone, AdapterConfig(rank=2))
    layers = to_cohort(placed, owners)
    placed.train()
    if checkpointing:
        backbone.model.gradient_checkpointing_enable()
    hooks = GradSampleHooks(placed, loss_reduction="sum")
    owners.set(torch.zeros(3, dtype=torch.long))
    ids = torch.tensor([[2, 7, 3], [2, 8, 3], [2, 9, 3]])
    backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.square().sum().backward()
    samples = [layer.weight.grad_sample for layer in layers.values()]
    hooks.cleanup()
    assert all((one is None) is checkpointing for one in samples)


def test_a_wrong_cut_is_refused(random_tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(str(random_tiny_bert))
    honest = backbone.below
    monkeypatch.setattr(backbone, "below", lambda ids, mask, layer: honest(ids, mask, max(0, layer - 1)))
    with pytest.raises(ConfigError, match="cutting it at block 2 changes its output"):
        backbone.check_split(2)


def test_no_stack_and_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"model\.backbone"):
        Backbone(str(tmp_path))
    with pytest.raises(AssetError, match="all-MiniLM-L6-v2"):
        Backbone("all-MiniLM-L6-v3")


def test_where_a_backbone_lies_changes_nothing_and_one_weight_does(random_tiny_bert: Path, tmp_path: Path) -> None:
    """Keys of noise and cached features are made from it: a moved folder must give the same run."""
    moved = shutil.copytree(random_tiny_bert, tmp_path / "elsewhere")
    before = Backbone(str(random_tiny_bert)).fingerprint()
    assert Backbone(str(moved)).fingerprint() == before
    other = Backbone(str(moved))
    next(other.model.parameters()).data.view(-1)[0] += 1e-3
    assert other.fingerprint() != before
