"""The model that a cohort trains: cached frozen prefix, adapted blocks with owned LoRA factors, an owned head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpers.cohort.batching import Index, microbatches
from fedpers.cohort.linear import CohortLinear, Owners, to_cohort
from fedpers.cohort.prefix_cache import Embedded, Prefix, Progress
from fedpers.config import Config
from fedpers.models import adapters
from fedpers.models.backbone import Backbone, pool, public_name
from fedpers.privacy.randomness import generator
from fedpers.tasks.base import Examples, Task, gather

Parameters = dict[str, Tensor]  # by array name, each (clients, out, in)


class CohortModel(nn.Module):
    """Backbone, adapters and head over all users' examples.

    Attributes:
        initial: public initial value of every trainable array, (out, in) by name.
        group: "adapter" or "head" for every array name.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        examples: Examples,
        key: bytes,
        adapt: bool,
        progress: Progress,
        donor: CohortModel | None = None,
    ) -> None:
        super().__init__()
        backbone: Backbone = Backbone(config.model.backbone) if donor is None else donor.backbone
        budget = config.engine.token_budget
        self.task, self.examples, self.budget = task, examples, budget
        self.backbone: Backbone = backbone
        self.fingerprint: str = backbone.fingerprint() if donor is None else donor.fingerprint  # before LoRA is placed
        # Frozen features come first: they are computed on the plain backbone.
        inputs = backbone.tokenize(examples.inputs, config.data.max_tokens)
        if donor is None:
            texts = backbone.tokenize(examples.texts, config.data.max_tokens)
            self.candidates = Embedded(backbone, texts, budget, progress, "candidates").vectors
        else:
            self.candidates = donor.candidates
        self.lengths: Index = inputs.lengths.numpy()
        self.owners = Owners()
        self.lora: Any | None = None
        layers: dict[str, CohortLinear] = {}
        self.prefix: Prefix | None = None
        self.frozen_contexts: Tensor | None = None
        if adapt:
            self.layer = backbone.depth - config.model.adapter.layers
            if self.layer >= 0:
                backbone.check_split(self.layer)
                self.prefix = Prefix(backbone, inputs, self.layer, budget, progress)
            placed = adapters.place(backbone, config.model.adapter)
            self.lora = placed.peft_config["default"]
            self.encoder = backbone.model
            layers = {adapters.array_name(name): layer for name, layer in to_cohort(placed, self.owners).items()}
        elif donor is None:
            self.frozen_contexts = Embedded(backbone, inputs, budget, progress, "contexts").vectors
        else:
            donor.load(donor.broadcast(1))
            rows = np.arange(len(self.lengths))
            self.frozen_contexts = donor.all_contexts(rows, np.zeros_like(rows))
        self.head = task.head(backbone.width)
        for name, layer in to_cohort(self.head, self.owners).items():
            layers[f"{adapters.HEAD}{name}.weight"] = layer
        self.layers = dict(sorted(layers.items()))
        self.group = {name: adapters.group_of(name) for name in self.layers}
        self.initial = {name: self._initial(name, layer, key) for name, layer in self.layers.items()}
        # Opacus needs train mode, but only where something trains: a frozen layer with batch statistics would let one
        # record shape what is computed for another.
        self.eval()
        for layer in self.layers.values():
            layer.train()

    def _initial(self, name: str, layer: CohortLinear, key: bytes) -> Tensor:
        if ".lora_A." not in name:
            return layer.weight.detach()[0].clone()  # lora_B is 0; heads start as the task says
        bound = 1.0 / np.sqrt(layer.in_features)  # PEFT's choice: Kaiming uniform with a = sqrt(5)
        values = generator(key, "initial", name).uniform(-bound, bound, (layer.out_features, layer.in_features))
        return torch.from_numpy(values.astype(np.float32))

    def names(self, groups: Sequence[str]) -> tuple[str, ...]:
        """Return the array names of these groups, sorted."""
        return tuple(name for name in self.layers if self.group[name] in groups)

    def initial_of(self, groups: Sequence[str]) -> dict[str, Tensor]:
        """Return the public initial values, (out, in), of the arrays of these groups."""
        return {name: self.initial[name] for name in self.names(groups)}

    def broadcast(self, clients: int, arrays: Mapping[str, Tensor] | None = None) -> Parameters:
        """Return parameters for a cohort: everyone gets `arrays` (out, in), or the initial value where not given."""
        given = arrays or {}
        return {n: given.get(n, first).expand(clients, *first.shape).clone() for n, first in self.initial.items()}

    def load(self, parameters: Mapping[str, Tensor]) -> None:
        """Set the weights of the cohort; each tensor is (clients, out, in) and is used in place."""
        for name, layer in self.layers.items():
            layer.weight.data = parameters[name]
            layer.weight.grad = None

    def contexts(self, rows: Index, owners: Tensor) -> Tensor:
        """Encode the inputs of rows with their owners' adapters; unit vectors (records, width)."""
        if self.prefix is None:
            assert self.frozen_contexts is not None
            return self.frozen_contexts[torch.from_numpy(rows)]
        hidden, mask = self.prefix.batch(rows)
        self.owners.set(owners)
        return pool(self.backbone.above(hidden, mask, self.layer), mask)

    def scores(self, contexts: Tensor, rows: Index, owners: Tensor) -> Tensor:
        """Apply the owners' heads: scores (records, candidates)."""
        self.owners.set(owners)
        scores: Tensor = self.head(contexts, gather(self.candidates, self.examples.candidates[rows]))
        return scores

    @torch.no_grad()
    def all_contexts(self, rows: Index, owners: NDArray[np.int64]) -> Tensor:
        """Encode many rows without gradients, cut by the token budget; (records, width) in the order of rows."""
        if self.prefix is None:
            return self.contexts(rows, torch.from_numpy(owners))
        result = torch.empty(len(rows), self.backbone.width)
        for part in microbatches(self.lengths[rows], self.budget):
            result[torch.from_numpy(part)] = self.contexts(rows[part], torch.from_numpy(owners[part]))
        return result

    def save_shared(self, directory: Path, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """Write arrays as standard PEFT files with the head beside them."""
        description = {
            "task": type(self.task).__name__,
            "backbone": public_name(self.backbone.name),
            "pooling": "mean over tokens, then unit length",
            "apply": (self.head.__doc__ or "").strip().partition("\n")[0],
            "scale": self.task.config.scale,
        }
        adapters.save(directory, arrays, self.lora, description)
