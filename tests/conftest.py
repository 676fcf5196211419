"""Shared fixtures: a random tiny encoder (named as such), small configurations, one cache for the session."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from opacus.accountants.analysis import rdp

from fedpers.config import TRUSTS, Config, Unit, parse_config
from fedpers.data.synthetic import TOPICS
from fedpers.privacy.ledger_lines import ADJACENCIES
from fedpers.reporting import Reporter

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # tiny models: more threads only wait for each other
# Runs in this process do not wait for the disk: no test cuts the power, and what is killed is a process of its own.
os.fsync = lambda file: None
# Opacus's Renyi divergences are functions of a few numbers, and half of the time of a claim: once for each is enough.
rdp._compute_rdp = cache(rdp._compute_rdp)

SECRET = "5ec2e7" + "00" * 29  # a test secret: whoever reads it can subtract the noise, so it protects nobody
# Where clients add the noise, who sees what and what is clipped is the same for methods of one kind (what is kept, what
# travels beside, turns, several models, own copies, the server's own step), so one method of each kind runs there.
KINDS = {
    "apfl", "fedala", "fedbabu", "feddpa", "fedex-lora", "fedper", "ifca", "pfedme", "rolora", "scaffold", "sdflora",
}  # fmt: skip
LONG = {
    "test_load",
    "test_wheel",
    "test_notebook",
    "test_deployment",
    "test_sweep",
    "test_inversion",
    "test_site",
    "test_convert",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with tests of half a minute first: begun last, one keeps a worker busy while the other has no more."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish() -> None:
    """Keep what is loaded by now out of garbage collections: half a second for each that looks through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave pictures undrawn, a second in a run of two, but in tests marked `pictures`: those that look at them.

    `pictures("svg")` draws that kind alone, which has all of a picture's text.
    """
    marker = request.node.get_closest_marker("pictures")
    if marker is None or marker.args:
        draw_only(monkeypatch, *(marker.args if marker else ()))


class Stages(Reporter):
    """Remembers by stage how much was done, of how much, whenever it was told."""

    def __init__(self) -> None:
        self.told: dict[str, list[tuple[int, int]]] = {}

    def stage(self, what: str, done: int, total: int, note: str = "") -> None:
        """Remember it."""
        self.told.setdefault(what, []).append((done, total))


def draw_only(patch: pytest.MonkeyPatch, *kinds: str) -> None:
    """Leave pictures of all other kinds undrawn."""
    from matplotlib.figure import Figure

    draw = Figure.savefig

    def savefig(self: Figure, where: BinaryIO, *, format: str, **options: Any) -> None:
        if format in kinds:
            draw(self, where, format=format, **options)
        else:
            where.write(b"a picture, undrawn")

    patch.setattr(Figure, "savefig", savefig)


def opening_fields(unit: Unit, **changes: Any) -> dict[str, Any]:
    """Fields of a ledger's opening line for a unit with its default trust, Poisson sampling and 100 users."""
    trust = TRUSTS[unit][0]
    fields: dict[str, Any] = {
        "unit": unit,
        "trust": trust,
        "adjacency": ADJACENCIES[trust][0],
        "delta": None if unit == "none" else 1e-5,
        "population": 100,
        "protected": 100,
        "method": "fedavg",
        "head_policy": "shared",
        "shared_names": ["adapter.A", "head"],
        "client_sampling": "poisson",
        "record_sampling": "poisson",
        "amplification": {"none": "none", "record": "records", "user": "clients"}[unit],
        "secret": "kept by the simulator",
    }
    return {**fields, **changes}


def save_random_tiny_bert(folder: Path, layers: int = 3, width: int = 32, seed: int = 7) -> Path:
    """Write a random (untrained) BERT of a few thousand parameters with a word-level vocabulary."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for topic in TOPICS.values() for w in topic})]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * width, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a random tiny BERT (3 layers, width 32)."""
    return save_random_tiny_bert(tmp_path_factory.mktemp("random-tiny-bert"))


def save_random_tiny_llama(folder: Path, layers: int = 3, width: int = 32, seed: int = 7) -> Path:
    """Write a random (untrained) Llama of a few thousand parameters with a word-level vocabulary."""
    import tokenizers
    import transformers

    words = ["<unk>", "<end>", "\n", *sorted({w for topic in TOPICS.values() for w in topic})]
    model = tokenizers.models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split("\n", "isolated"), tokenizers.pre_tokenizers.Split(" ", "removed")]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=2 * width, max_position_embeddings=64, initializer_range=0.2,
        tie_word_embeddings=True, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a random tiny causal language model (3 layers, width 32)."""
    return save_random_tiny_llama(tmp_path_factory.mktemp("random-tiny-llama"))


@pytest.fixture(scope="session")
def feature_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache directory for frozen features of tiny models; assets are not fetched into it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(random_tiny_bert: Path, feature_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Return a function that makes a configuration of a few seconds on made-up people; sections can be overridden."""
    monkeypatch.setenv("FEDPERS_CACHE", str(feature_cache))

    def make(**changes: Any) -> Config:
        tree: dict[str, Any] = {
            "name": "tiny",
            "rounds": 2,
            "data": {
                "name": "synthetic", "users": 8, "min_train": 4, "min_test": 3, "max_train": 12, "max_test": 12,
                "max_tokens": 16,
            },
            "task": {"candidates": 4},
            "model": {"backbone": str(random_tiny_bert), "adapter": {"layers": 1, "rank": 2, "alpha": 4}},
            "local": {"batch_size": 4},
            "personal": {"epochs": 2, "batch_size": 4},
            "engine": {"token_budget": 512, "cohort_size": 4, "threads": 1},
            "privacy": {"secret": SECRET},
        }  # fmt: skip
        for key, value in changes.items():
            tree[key] = {**tree[key], **value} if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
        return parse_config(tree)

    return make


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fedpers(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run the program's entry point in this process; returns exit code, standard output and standard error."""
    from fedpers import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedpers", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        return code, *capfd.readouterr()

    return call
