"""Any Hugging Face encoder with one stack of blocks can be cut at every block; what cannot be cut is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import save_random_tiny_bert
from fedpers.config import AdapterConfig
from fedpers.errors import AssetError, ConfigError
from fedpers.models import adapters
from fedpers.models.backbone import Backbone, pool

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
