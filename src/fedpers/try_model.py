"""Trying any model of a finished run: on somebody's records, or on a prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedpers.data.base import Record
from fedpers.decoding import likeliest, with_room, write
from fedpers.errors import ConfigError
from fedpers.evaluation import models as evaluation
from fedpers.finished_run import (
    NEWCOMER,
    Measured,
    Which,
    check_fit,
    chosen,
    federation_of,
    measure,
    model_over,
    open_run,
    over_records,
    plan_of,
    read_records,
)
from fedpers.reporting import Reporter
from fedpers.tasks.base import Examples


def score(run_dir: Path, data: Path, which: Which, reporter: Reporter | None = None) -> Measured:
    """Measure one model of a run on a JSONL of {"input", "target"}, as the run measures its members.

    Records that the model was trained on score too well; a run keeps nobody's records, so they cannot be told apart.

    Raises:
        FedpersError: as `personalize`; a user or a model that is not there.
    """
    run = open_run(run_dir)
    arrays = chosen(run, which)
    records = read_records(data, optional_input=run.task.causal)
    model = over_records(run, plan_of(run, arrays), (), records, data.name, reporter)
    check_fit(model, arrays, run.path)
    (found,) = measure(model, {"it": evaluation.common(model, arrays, "it")})
    return found


def generate(
    run_dir: Path,
    prompt: str,
    which: Which,
    *,
    tokens: int | None = None,
    seed: int = 0,
    temperature: float = 0.0,
    reporter: Reporter | None = None,
) -> str:
    """Let one model of a language-model run go on after a prompt, laid out as the texts that it was trained on.

    Args:
        run_dir: a finished or exported run.
        prompt: the text before; of a long one the last tokens are kept.
        which: the model.
        tokens: at most so many, by default 32 or what fits; it stops at the end of text.
        seed: of the draws.
        temperature: 0 takes the likeliest token each time; else tokens are drawn from the scores divided by it.
        reporter: whom to tell about progress.

    Raises:
        ConfigError: another task, or more tokens than a target in training may have.
        FedpersError: as `score`.
    """
    run = open_run(run_dir)
    short, tokens = with_room(run, tokens)
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"--temperature {temperature:g}: expected 0 or more.")
    arrays = chosen(run, which)
    nothing = np.zeros(0, dtype=np.int64)
    row = Examples((NEWCOMER,), ("prompt",), (prompt,), (nothing,), (np.arange(1),), continuations=("",))
    federation = federation_of("the prompt", (), (Record("prompt", "prompt", prompt, ""),), ())
    model = model_over(short, plan_of(run, arrays), federation, row, reporter)
    check_fit(model, arrays, run.path)
    model.load(evaluation.common(model, arrays, "it").parameters([0]))
    draws = torch.Generator().manual_seed(seed)

    def drawn(scores: Tensor) -> Tensor:
        return torch.multinomial(torch.softmax(scores / temperature, dim=1), 1, generator=draws)[:, 0]

    first = np.zeros(1, dtype=np.int64)
    (written,) = write(model, first, first, tokens, drawn if temperature else likeliest)
    return str(model.backbone.tokenizer.decode(written, skip_special_tokens=True))
