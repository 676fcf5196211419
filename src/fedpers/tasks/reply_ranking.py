"""Reply ranking: which of these replies did this user write?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpers.config import TaskConfig
from fedpers.data.base import Federation
from fedpers.errors import DataError
from fedpers.privacy.randomness import generator
from fedpers.tasks.base import Batch, Examples, Task, examples_of


class RankingHead(nn.Module):
    """Scores `scale * (a * <q, c> + <w, c>)`: agreement with the context, and what this user tends to say."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.agreement = nn.Linear(1, 1, bias=False)  # a, public initial value 1
        self.direction = nn.Linear(width, 1, bias=False)  # w, public initial value 0
        nn.init.ones_(self.agreement.weight)
        nn.init.zeros_(self.direction.weight)

    def forward(self, context: Tensor, candidates: Tensor) -> Tensor:
        """Return scores (rows, candidates) for contexts (rows, width) and candidates (rows, candidates, width)."""
        similarity = torch.einsum("rd,rcd->rc", context, candidates)
        scores: Tensor = self.agreement(similarity.unsqueeze(-1)) + self.direction(candidates)
        return self.scale * scores.squeeze(-1)


class ReplyRanking(Task):
    """Given the partner's last turn, rank the user's real reply among replies by people outside the federation."""

    metric = "accuracy"
    default_scale = 20.0  # inverse temperature
    columns = ("accuracy", "mrr", "loss")

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        self.others = config.candidates - 1

    def prepare(self, federation: Federation, key: bytes) -> Examples:
        """Draw each record's other candidates from the public pool, by the record's id alone.

        A pool text of the same conversation or with the same words as the true reply is passed over. Raises DataError
        when the pool is too small.
        """
        records, examples = examples_of(federation)
        pool = federation.pool
        if len(pool) < 4 * self.config.candidates:
            raise DataError(
                f"data {federation.source}: the public pool holds {len(pool)} texts, too few for "
                f"{self.config.candidates} candidates, which need {4 * self.config.candidates}; lower task.candidates"
                f"{', or set data.pool=true' if federation.source == 'files' and not pool else ''}."
            )
        place: dict[str, int] = {}
        candidates = np.empty((len(records), 1 + self.others), dtype=np.int64)
        for row, record in enumerate(records):
            candidates[row, 0] = place.setdefault(record.target, len(place))
            column = 1
            draws = generator(key, "candidates", record.id)
            taken = {record.target.casefold()}
            # Distinct texts, so a bounded number of draws always suffices for a pool of distinct words.
            for index in draws.permutation(len(pool)):
                text = pool[index]
                if text.conversation != record.conversation and text.text.casefold() not in taken:
                    taken.add(text.text.casefold())
                    candidates[row, column] = place.setdefault(text.text, len(place))
                    column += 1
                    if column > self.others:
                        break
            else:
                raise DataError(
                    f"data {federation.source}: the public pool has too few distinct texts for "
                    f"{self.config.candidates} candidates; lower task.candidates."
                )
        return replace(examples, texts=tuple(place), candidates=candidates)

    def head(self, width: int) -> nn.Module:
        """Return the ranking head; untrained it ranks by cosine similarity, the zero-shot model."""
        return RankingHead(width, self.scale)

    def scores(self, head: nn.Module, contexts: Tensor, batch: Batch) -> Tensor:
        """Scores (rows, candidates)."""
        scores: Tensor = head(contexts, batch.candidates)
        return scores

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Softmax cross-entropy over the candidates, per record."""
        truth = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        return functional.cross_entropy(scores, truth, reduction="none")

    def metrics(self, scores: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """accuracy@1 and reciprocal rank; a tie counts against the true reply, and a score that is no number last."""
        beaten = (scores[:, 1:] < scores[:, :1]).sum(dim=1)
        rank = scores.shape[1] - beaten
        return {"accuracy": (rank == 1).float(), "mrr": 1.0 / rank, "loss": self.loss(scores, targets)}
