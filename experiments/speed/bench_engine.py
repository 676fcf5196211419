"""Speed of the parts, for whoever changes them: did something get slower?

    pip install -c constraints.txt -e ".[bench]"
    pytest experiments/speed/bench_engine.py --benchmark-autosave           # before a change
    pytest experiments/speed/bench_engine.py --benchmark-compare            # after it

Random weights of MiniLM's shape and made-up people, so nothing is fetched. No part of the tests: time is no assertion.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpers.cohort.batching import epochs
from fedpers.cohort.gradients import RecordProtection
from fedpers.cohort.local_training import train_phase
from fedpers.cohort.model import CohortModel
from fedpers.config import Config, load_config
from fedpers.experiment import Experiment, build_model, prepare
from fedpers.privacy.randomness import seed_key
from fedpers.privacy.sampling import draw
from fedpers.reporting import Reporter
from fedpers.tasks.language_model import _TokenLoss

Benchmark = Callable[..., Any]
USERS = 16


def encoder(folder: Path) -> Path:
    """Write a random encoder of MiniLM's shape with a vocabulary of the made-up people's words."""
    import transformers

    from fedpers.data.synthetic import TOPICS

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({word for topic in TOPICS.values() for word in topic}),
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, CohortModel]:
    """Return a model with adapters in the top two layers over made-up people."""
    folder = tmp_path_factory.mktemp("encoder")
    changes = [
        "data.name=synthetic", f"data.users={USERS}", "method=fedavg", f"model.backbone={encoder(folder)}",
        "model.adapter={layers: 2, rank: 8, alpha: 16}", "evaluation.local_only=false",
    ]  # fmt: skip
    config: Config = load_config(None, changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        experiment = prepare(config)
        return experiment, build_model(experiment, Reporter())


@pytest.mark.parametrize("groups", [("adapter", "head"), ("head",)], ids=["adapter", "head"])
def test_epoch_of_a_cohort(benchmark: Benchmark, made: tuple[Experiment, CohortModel], groups: tuple[str, ...]) -> None:
    """Clipped per record, without noise."""
    experiment, model = made
    steps = epochs(experiment.examples, range(USERS), 1, 16, seed_key(0), ("bench",))

    def epoch() -> None:
        protection = RecordProtection(1.0, 0.0, 16.0, lambda step: [])
        train_phase(model, model.broadcast(USERS), groups, steps, experiment.config.local, protection=protection)

    benchmark(epoch)


def test_contexts_of_all_records(benchmark: Benchmark, made: tuple[Experiment, CohortModel]) -> None:
    """As evaluation does."""
    _, model = made
    model.load(model.broadcast(1))
    rows = np.arange(len(model.lengths))
    benchmark(lambda: model.all_contexts(rows, np.zeros_like(rows)))


def test_loss_over_a_vocabulary(benchmark: Benchmark) -> None:
    """And its gradient, of SmolLM2's shape."""
    vocabulary, states = torch.randn(49_152, 576), torch.randn(256, 576, requires_grad=True)
    targets = torch.arange(256)
    benchmark(lambda: _TokenLoss.apply(states, vocabulary, targets).sum().backward())  # type: ignore[no-untyped-call]


def test_a_thousand_clients_of_a_million(benchmark: Benchmark) -> None:
    """Poisson sampling."""
    benchmark(lambda: draw("poisson", 1e-3, range(1_000_000), b"0" * 32, 1))  # type: ignore[arg-type]
