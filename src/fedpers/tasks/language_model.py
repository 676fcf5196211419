"""Language modelling: what does this user write next?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpers.cohort.products import times
from fedpers.data.base import Federation
from fedpers.errors import ConfigError, DataError
from fedpers.models.backbone import Backbone, Tokens
from fedpers.tasks.base import Batch, Examples, Floats, Task, examples_of, where

CHUNK = 4096  # words of the vocabulary whose scores are in memory at a time
BETWEEN = "\n"  # stands between the text before and the text to predict


class LanguageHead(nn.Module):
    """Adds `s` to every last hidden state before it meets the output embeddings, as a bias on all tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Linear(1, width, bias=False)  # s, public initial value 0
        nn.init.zeros_(self.shift.weight)

    def forward(self, context: Tensor) -> Tensor:
        """Return shifted states (rows, tokens, width)."""
        shifted: Tensor = context + self.shift(torch.ones_like(context[..., :1]))
        return shifted


class _TokenLoss(torch.autograd.Function):
    """Cross-entropy of each token, whose gradient is made along with it: scores of all words never exist at once.

    The words are taken in chunks, and what was summed before is scaled when a larger score turns up, as attention does
    it whose keys and values are the output embeddings (Rabe, Staats 2021; Dao et al., NeurIPS 2022).
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, vocabulary: Tensor, targets: Tensor) -> Tensor:
        """Return (tokens,) losses of states (tokens, width), vocabulary (vocabulary, width) and targets (tokens,)."""
        highest = states.new_full((len(states), 1), -torch.inf)
        total = states.new_zeros(len(states), 1)
        expected = torch.zeros_like(states) if ctx.needs_input_grad[0] else None  # sum of exp(score) * embedding
        for part in torch.split(vocabulary, CHUNK):
            scores = times(states, part.T)
            before, highest = highest, torch.maximum(highest, scores.amax(dim=1, keepdim=True))
            fade = (before - highest).exp_()
            weights = scores.sub_(highest).exp_()
            total.mul_(fade).add_(weights.sum(dim=1, keepdim=True))
            if expected is not None:
                expected.mul_(fade).add_(times(weights, part))
        wanted = vocabulary[targets].to(states.dtype)
        if expected is not None:
            ctx.save_for_backward(expected.div_(total).sub_(wanted))
        found: Tensor = (highest + total.log()).squeeze(1) - (states * wanted).sum(dim=1)
        return found

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        """Scale each token's own gradient."""
        (gradient,) = ctx.saved_tensors
        return outer[0][:, None] * gradient, None, None


class LanguageModel(Task):
    """Given the text before, predict the user's own words, token by token, by a causal language model.

    Only the target's tokens and the end of text are predicted. A record's loss is the mean over its own tokens, so that
    it hangs on no other record; a user's is the mean over all of the user's tokens, and perplexity its exponential.
    """

    metric = "loss"
    higher_is_better = False
    columns = ("loss", "perplexity")
    reads = "each token's last hidden state"
    causal = True

    def prepare(self, federation: Federation, key: bytes) -> Examples:
        """Keep inputs and targets as texts. Raises DataError for an empty target."""
        records, examples = examples_of(federation)
        if empty := [place for place, record in enumerate(records) if not record.target.strip()]:
            raise DataError(
                f"data {federation.source}: {len(empty)} records have an empty target, the first is "
                f"{where(records, empty[0])}; leave them out."
            )
        return replace(examples, continuations=tuple(record.target for record in records))

    def tokenize(self, backbone: Backbone, examples: Examples, max_tokens: int) -> Tokens:
        """Put input, a line break, target and the end of text in a row; of a long input the last tokens are kept.

        A target may fill three quarters of `max_tokens`. Raises ConfigError for a tokenizer without an end of text.
        """
        tokenizer = backbone.tokenizer
        end = tokenizer.eos_token_id
        if end is None:
            raise ConfigError(
                f"model.backbone {backbone.name!r} is no causal language model (its tokenizer has no end of "
                "text), which task.name=language-model needs; set model.backbone, as in configs/next_message.yaml."
            )
        if not examples.inputs:
            return Tokens(())
        begin = [end] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        before = tokenizer([text + BETWEEN for text in examples.inputs], add_special_tokens=False)["input_ids"]
        after = tokenizer(list(examples.continuations), add_special_tokens=False)["input_ids"]
        ids, starts = [], []
        for context, target in zip(before, after, strict=True):
            kept = [*target, end][: max(1, 3 * max_tokens // 4)]
            room = max_tokens - len(kept) - 1
            row = [*begin, *context[max(0, len(context) - room) :]]
            starts.append(len(row))
            ids.append(torch.tensor([*row, *kept], dtype=torch.long))
        return Tokens(tuple(ids), tuple(starts))

    def context(self, hidden: Tensor, mask: Tensor, width: int) -> Tensor:
        """Keep every token's hidden state: (rows, width, hidden), zero beyond the text."""
        kept = hidden * mask.to(hidden.dtype).unsqueeze(-1)
        return functional.pad(kept, (0, 0, 0, width - hidden.shape[1]))

    def head(self, width: int) -> nn.Module:
        """Return the head; untrained it changes nothing."""
        return LanguageHead(width)

    def scores(self, head: nn.Module, contexts: Tensor, batch: Batch) -> Tensor:
        """Return (rows, 2): summed loss of a row's tokens, and how many there are."""
        following = batch.next_tokens
        counted = following >= 0
        states = head(contexts)[counted]
        losses: Tensor = _TokenLoss.apply(  # type: ignore[no-untyped-call]
            states, batch.vocabulary, following[counted]
        )
        row = torch.arange(len(following), device=following.device)[:, None].expand_as(following)[counted]
        summed = states.new_zeros(len(following)).index_add(0, row, losses)
        return torch.stack([summed, counted.sum(dim=1).to(summed.dtype)], dim=1)

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the record's own tokens, in nats."""
        return scores[:, 0] / scores[:, 1]

    def metrics(self, scores: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Summed loss and number of tokens, and their quotient."""
        return {"summed": scores[:, 0], "tokens": scores[:, 1], "loss": self.loss(scores, targets)}

    def of_user(self, records: Mapping[str, Floats]) -> dict[str, float]:
        """Mean loss over all tokens of the user, in nats, and its exponential."""
        loss = float(records["summed"].sum() / records["tokens"].sum())
        return {"loss": loss, "perplexity": float(np.exp(loss))}
