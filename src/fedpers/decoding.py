"""Letting language models write: many prompts at a time, each by the model of whom it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedpers.cohort.batching import Index
from fedpers.cohort.model import CohortModel
from fedpers.errors import ConfigError
from fedpers.finished_run import Finished

Pick = Callable[[Tensor], Tensor]  # from scores (rows, vocabulary) to tokens (rows,), on the CPU


def likeliest(scores: Tensor) -> Tensor:
    """Take the token with the highest score of each row, the first of several."""
    return scores.argmax(dim=1)


def with_room(run: Finished, tokens: int | None) -> tuple[Finished, int]:
    """Return the run with prompts short enough to write so many tokens behind them, by default 32 or what fits.

    Raises ConfigError: another task than a language model, or more tokens than a target in training may have.
    """
    if not run.task.causal:
        raise ConfigError(f"task {run.config.task.name!r} writes no text; try its models with `fedpers score`.")
    room = run.config.data.max_tokens
    most = 3 * room // 4
    tokens = min(32, most) if tokens is None else tokens
    if not 1 <= tokens <= most:
        raise ConfigError(f"--tokens {tokens}: expected 1 to {most}, three quarters of the run's data.max_tokens.")
    # The task lays a text out with the end of text alone after it; what is written must fit behind what is read.
    data = run.config.data.model_copy(update={"max_tokens": room - tokens + 1})
    return replace(run, config=run.config.model_copy(update={"data": data})), tokens


@torch.no_grad()
def write(
    model: CohortModel, rows: Index, owners: NDArray[np.int64], tokens: int, pick: Pick = likeliest
) -> list[list[int]]:
    """Go on after the prompts of these rows, each by its owner's loaded model; returns the new token ids of each.

    Prompts are padded on the right, where nothing reads the padding: attention is causal, the mask hides it from what
    is written later, and positions go on from each prompt's own length. Keys and values of earlier tokens are kept, so
    that a step costs one token a row.

    Args:
        model: of a causal task; its examples have nothing to predict but the end of text.
        rows: which examples, (rows,).
        owners: position of each row's owner in the loaded cohort, (rows,).
        tokens: at most so many a row; a row stops at the end of text.
        pick: chooses the next tokens.
    """
    prompts = [model.inputs.ids[row][: model.inputs.starts[row]] for row in rows]
    lengths = torch.tensor([len(one) for one in prompts])
    ids, kept = pad_sequence(prompts, batch_first=True), None
    places = torch.arange(ids.shape[1]).expand(len(rows), -1)
    mask, last = (places < lengths[:, None]).long(), lengths - 1
    ids, places, mask, last, lengths = (one.to(model.device) for one in (ids, places, mask, last, lengths))
    end, written = model.backbone.tokenizer.eos_token_id, list[Tensor]()
    going = torch.ones(len(rows), dtype=torch.bool)
    model.owners.set(model.on_device(owners))
    row = model.on_device(np.arange(len(rows)))
    with model.mixed(rows):
        while len(written) < tokens and going.any():
            found = model.backbone.model(
                input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=kept, use_cache=True
            )
            kept = found.past_key_values
            states = model.head(found.last_hidden_state[row, last][:, None])[:, 0]
            chosen = pick((states @ model.backbone.vocabulary.T).cpu())
            written.append(chosen)
            going &= chosen != end
            ids, places = chosen[:, None].to(model.device), (lengths + len(written) - 1)[:, None]
            last, mask = torch.zeros_like(last), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return [_until(end, row) for row in torch.stack(written, dim=1).tolist()]


def _until(end: int, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
