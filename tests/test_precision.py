"""Products in bfloat16: how far they are from fp32, and that clipping bounds what it did before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpers.cohort.batching import Step
from fedpers.cohort.gradients import RecordProtection
from fedpers.cohort.lanes import Lanes
from fedpers.cohort.local_training import train_phase
from fedpers.cohort.model import CohortModel
from fedpers.cohort.prefix_cache import Prefix
from fedpers.cohort.products import RoundedLinear, round_linears
from fedpers.config import Config, TrainConfig, result_text
from fedpers.errors import ConfigError
from fedpers.experiment import build_model, prepare
from fedpers.identity import identity
from fedpers.models.backbone import Backbone
from fedpers.reporting import Reporter
from fedpers.simulation import simulate
from fedpers.tasks.language_model import _TokenLoss

CLIP, CLIENTS = 0.5, 3
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:Secure RNG turned off")


def no_noise(step: int) -> Sequence[Tensor]:
    raise AssertionError("noise was drawn")


def moved(model: CohortModel, rows: Sequence[int], owners: Sequence[int]) -> dict[str, Tensor]:
    """Return the clipped sums of one step, from random weights around the public ones, by array name."""
    draws = torch.Generator().manual_seed(0)
    start = {n: v + 0.1 * torch.randn(v.shape, generator=draws) for n, v in model.initial.items()}
    before = model.broadcast(CLIENTS, start)
    weights = {name: value.clone() for name, value in before.items()}
    step = Step(np.array(rows), np.array(owners), np.ones(CLIENTS, dtype=bool))
    settings = TrainConfig.model_validate({"lr": {"adapter": 1.0, "head": 1.0}})
    train_phase(
        model, weights, ("adapter", "head"), [step], settings, protection=RecordProtection(CLIP, 0.0, 1.0, no_noise)
    )
    return {name: before[name] - weights[name] for name in weights}


def built(config: Config) -> CohortModel:
    return build_model(prepare(config), Reporter())


def changed(config: Config, precision: str) -> Config:
    return config.model_copy(update={"engine": config.engine.model_copy(update={"precision": precision})})


def norms(sums: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.flatten(1).norm(dim=1) for value in sums.values()]).norm(dim=0)


def test_sums_in_bf16_are_near_those_in_fp32_and_within_the_clip(tiny: Callable[..., Config]) -> None:
    config = tiny()
    plain, rounded = (built(changed(config, precision)) for precision in ("fp32", "bf16"))
    assert any(isinstance(module, RoundedLinear) for module in rounded.encoder.modules())
    assert not any(isinstance(module, RoundedLinear) for module in plain.encoder.modules())
    rows = [*plain.examples.train[0][:4], *plain.examples.train[1][:4], plain.examples.train[2][0]]
    ours, theirs = (moved(model, rows, [0] * 4 + [1] * 4 + [2]) for model in (plain, rounded))
    for name, value in ours.items():
        error = float((theirs[name] - value).norm() / value.norm())
        assert error < 0.03, name  # 8 bits of mantissa
    assert max(float((theirs[name] - value).abs().max()) for name, value in ours.items()) > 1e-7  # it does round
    assert float(norms(theirs)[2]) <= CLIP * (1 + 1e-5)  # one record
    assert bool((norms(theirs)[:2] <= 4 * CLIP).all())


def test_a_record_is_rounded_by_itself_alone(tiny: Callable[..., Config]) -> None:
    model = built(changed(tiny(), "bf16"))
    own, other = model.examples.train[0][:3], model.examples.train[1][:3]
    alone, mixed = moved(model, own, [0] * 3), moved(model, [*own, *other], [0] * 3 + [1] * 3)
    assert all(torch.allclose(alone[name][0], mixed[name][0], atol=1e-5) for name in alone)


def test_precision_is_part_of_what_a_run_is(tiny: Callable[..., Config]) -> None:
    config = tiny()
    texts = [result_text(changed(config, precision)) for precision in ("fp32", "bf16")]
    assert texts[0] != texts[1]  # else both would draw the same noise, and their difference would show rounding alone
    experiments = [prepare(changed(config, precision)) for precision in ("fp32", "bf16")]
    names = [identity(experiment, build_model(experiment, Reporter())) for experiment in experiments]
    assert names[0] != names[1]
    wider = config.model_copy(update={"engine": config.engine.model_copy(update={"cohort_size": 3})})
    assert result_text(config) == result_text(wider)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_every_frozen_linear_is_rounded_and_no_trained_one(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    frozen, trained = (nn.Linear(6, 4) if kind is nn.Linear else Conv1D(4, 6) for _ in range(2))
    frozen.requires_grad_(False)
    block = nn.ModuleDict({"frozen": frozen, "trained": trained})
    x = torch.randn(5, 3, 6, requires_grad=True)
    expected = frozen(x)
    assert round_linears([block]) == 1
    assert block["trained"] is trained
    found = block["frozen"](x)
    assert torch.allclose(found, expected, atol=0.05)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    (reference,) = torch.autograd.grad(expected.sum(), x)
    assert torch.allclose(gradient, reference, atol=0.02)


def test_a_language_model_in_bf16_scores_nearly_alike() -> None:
    draws = torch.Generator().manual_seed(0)
    vocabulary, states = (torch.randn(size, 16, generator=draws) for size in (50, 7))
    targets = torch.arange(7)
    exact = torch.nn.functional.cross_entropy(states @ vocabulary.T, targets, reduction="none")
    rounded = _TokenLoss.apply(states, vocabulary.bfloat16(), targets)
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded, exact, atol=0.1)
    assert not torch.equal(rounded, exact)


def test_the_claim_of_a_run_does_not_depend_on_precision(tiny: Callable[..., Config], tmp_path: Path) -> None:
    private = {"unit": "user", "epsilon": 4, "delta": 1e-3, "clip": 0.5}
    config = tiny(privacy=private)
    plain, rounded = (simulate(changed(config, one), tmp_path / one) for one in ("fp32", "bf16"))
    assert plain.claim.epsilon == rounded.claim.epsilon > 0
    assert "precision: bf16" in (tmp_path / "bf16" / "config.yaml").read_text()


def test_a_prefix_in_16_bits_changes_sums_by_its_rounding_alone(tiny: Callable[..., Config]) -> None:
    """Measured with MiniLM and real messages: see experiments/speed; here a random tiny encoder."""
    config = tiny()
    half = config.model_copy(update={"engine": config.engine.model_copy(update={"prefix": "fp16"})})
    plain, kept = built(config), built(half)
    assert plain.prefix is not None
    assert kept.prefix is not None
    assert kept.prefix.flat.dtype == np.float16
    assert kept.prefix.flat.nbytes * 2 == plain.prefix.flat.nbytes
    rows = [*plain.examples.train[0][:4], *plain.examples.train[1][:4]]
    ours, theirs = (moved(model, rows, [0] * 4 + [1] * 4) for model in (plain, kept))
    for name, value in ours.items():
        assert float((theirs[name] - value).norm() / value.norm()) < 2e-3, name  # 11 bits of mantissa
    assert any(not torch.equal(theirs[name], value) for name, value in ours.items())
    assert bool((norms(theirs)[:2] <= 4 * CLIP * (1 + 1e-5)).all())
    assert result_text(config) != result_text(half)


def test_a_prefix_that_16_bits_cannot_hold_is_refused(tiny: Callable[..., Config], random_tiny_bert: Path) -> None:
    config = tiny(engine={"prefix": "fp16"})
    backbone = Backbone(str(random_tiny_bert))
    with torch.no_grad():
        backbone.blocks[0].output.LayerNorm.weight.mul_(1e6)
    with pytest.raises(ConfigError, match=r"engine\.prefix=fp16: block 1 .* 65504"):
        backbone.check_half(1)
    # A record above that stops no run: it is cut to what can be held.
    tokens = backbone.tokenize(["a text"], config.data.max_tokens)
    lanes = Lanes(backbone, Backbone.twin, 1)
    kept = Prefix(lanes, tokens, 1, 512, lambda what, done, total: None, keep=False, kept_as="fp16")
    assert np.isfinite(kept.flat).all()
    assert np.abs(kept.flat).max() == np.finfo(np.float16).max
