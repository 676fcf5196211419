"""The model that a cohort trains: cached frozen prefix, adapted blocks with owned layers, an owned head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpers.cohort.batching import Index, microbatches
from fedpers.cohort.gate import mixed, weights
from fedpers.cohort.lanes import Lanes
from fedpers.cohort.linear import CohortLinear, Layer, Owners, to_cohort
from fedpers.cohort.prefix_cache import Embedded, Prefix, Progress
from fedpers.cohort.products import round_linears
from fedpers.config import Config, expand
from fedpers.method_table import Link
from fedpers.models import adapters
from fedpers.models.array_names import GATE, HEAD, array_name, group_of
from fedpers.models.backbone import Backbone, Tokens, next_tokens
from fedpers.tasks.base import Batch, Examples, Task, gather

Parameters = dict[str, Tensor]  # by array name, each (clients, out, in)


class CohortModel(nn.Module):
    """Backbone, adapters and head over all users' examples.

    Attributes:
        initial: public initial value of every trainable array, (out, in) by name.
        group: one of config.GROUPS for every array name.
        scaling: alpha / rank; an adapter adds scaling * B @ A to its module's weight.
        features: unit-length vectors of the inputs by the frozen backbone, (rows, width); what a gate reads.
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
        extra: Collection[str] = (),
        link: Link = "linear",
        records_of: Callable[[Sequence[int]], Examples] | None = None,
    ) -> None:
        """Load the backbone and compute what is frozen.

        Args:
            config: the run's configuration.
            task: gives the head.
            examples: all users' records.
            key: public key of the initial values.
            adapt: whether there are adapters, so that the groups A and B exist; without, the head is alone.
            progress: told how far the frozen part is.
            donor: a model with adapters, from which one without takes all that is frozen.
            extra: further groups, or their aliases, of a model that adapts: A2, B2, gate, residual, norm.
            link: makes the mixing weight g of the gate's output.
            records_of: makes the records of some users, where they are made when needed; `examples` are then those
                of a few.

        Raises:
            ConfigError: an adapter or extra groups that do not fit the backbone, or a backbone that cannot be cut.
        """
        super().__init__()
        backbone: Backbone = Backbone(config.model.backbone, config.engine.device) if donor is None else donor.backbone
        self.task, self.adapts, self.records_of = task, adapt, records_of
        self.budget, self.max_tokens = config.engine.token_budget, config.data.max_tokens
        self.precision, self.kept_as = config.engine.precision, config.engine.prefix
        self.backbone: Backbone = backbone
        self.fingerprint: str = backbone.fingerprint() if donor is None else donor.fingerprint  # before LoRA is placed
        self.owners = Owners()
        self.device = backbone.device
        lanes = config.engine.threads if self.device.type == "cpu" else 1
        self.lanes: Lanes[CohortModel] = Lanes(self, CohortModel.twin, lanes)
        self.lora: Any | None = None
        self.scaling: float = config.model.adapter.alpha / config.model.adapter.rank
        self.link: Link = link
        self.gated = adapt and "gate" in expand(extra)
        self.gate: CohortLinear | None = None
        self.features: Tensor | None = None
        self.lora_layers: list[Any] = []
        self.prefix: Prefix | None = None
        self.frozen_contexts: Tensor | None = None
        self.layer: int = backbone.depth  # the lowest block that may move; at the depth, none does
        if adapt:
            self.layer = backbone.depth - config.model.adapter.layers
            if self.layer >= 0:
                backbone.check_split(self.layer)
                if self.kept_as == "fp16":
                    backbone.check_half(self.layer)
        self._present: tuple[int, ...] | None = None
        # Frozen features come first: they are computed on the plain backbone.
        # Of a large federation these are a few people to try things on.
        self._take_up(examples, progress, donor, keep=records_of is None)
        layers: dict[str, Layer] = self._adapt(config, expand(extra)) if adapt else {}
        self.head = task.head(backbone.width).to(self.device)
        for name, layer in to_cohort(self.head, self.owners).items():
            layers[f"{HEAD}{name}.weight"] = layer
        self.layers = dict(sorted(layers.items()))
        self.group = {name: group_of(name) for name in self.layers}
        self.initial = {name: self._initial(name, layer, key) for name, layer in self.layers.items()}
        # Opacus needs train mode, but only where something trains: a frozen layer with batch statistics would let one
        # record shape what is computed for another.
        self.eval()
        for layer in self.layers.values():
            layer.train()

    def read(self, examples: Examples) -> tuple[Tokens, Tokens]:
        """Return the tokens of inputs and of candidates."""
        inputs = self.task.tokenize(self.backbone, examples, self.max_tokens)
        return inputs, self.backbone.tokenize(examples.texts, self.max_tokens)

    def present(self, users: Sequence[int], keep: bool = False) -> None:
        """Have the records of these users, by position, at hand; nothing has to be done where everybody's are.

        Rows are then those of `examples` as it is now, and the records of others are gone. With `keep` what the frozen
        backbone makes of them stays in the cache on disk: for people who are asked for again.
        """
        if self.records_of is None or self._present == tuple(users):
            return
        self._present = None
        examples = self.records_of(users)
        # Adapters at their initial values change nothing, so that this is the frozen backbone.
        self.load(self.broadcast(1))
        first = self.backbone.model.register_forward_pre_hook(
            lambda _module, _args, kwargs: self.owners.set(
                self.on_device(np.zeros(len(kwargs["input_ids"]), np.int64))
            ),
            with_kwargs=True,
        )
        try:
            self._take_up(examples, lambda what, done, total: None, keep=keep)
        finally:
            first.remove()
        self._present = tuple(users)

    def _take_up(
        self, examples: Examples, progress: Progress, donor: CohortModel | None = None, keep: bool = True
    ) -> None:
        """Compute what the frozen backbone makes of these records."""
        budget = self.budget
        self.lanes.forget()
        backbone = Lanes(self.backbone, Backbone.twin, self.lanes.count)
        self.examples = examples
        self.inputs: Tokens
        self.texts: Tokens
        self.inputs, self.texts = self.read(examples) if donor is None else (donor.inputs, donor.texts)
        inputs = self.inputs
        if self.task.causal:
            self.candidates = torch.zeros(0, self.backbone.width, device=self.device)
        elif donor is None:
            self.candidates = Embedded(backbone, self.texts, budget, progress, "candidates", keep).vectors
        else:
            self.candidates = donor.candidates
        self.lengths: Index = inputs.lengths.numpy()
        self.longest = int(self.lengths.max(initial=0))
        if self.gated:
            # Of a language model what comes before the words to predict: a gate must not read the answer.
            self.features = Embedded(backbone, inputs.before(), budget, progress, "contexts", keep).vectors
        if self.adapts or self.task.causal:
            if self.layer >= 0:
                self.prefix = Prefix(backbone, inputs, self.layer, budget, progress, keep, self.kept_as)
        elif donor is None:
            self.frozen_contexts = Embedded(backbone, inputs, budget, progress, "contexts", keep).vectors
        else:
            donor.load(donor.broadcast(1))
            rows = np.arange(len(self.lengths))
            self.frozen_contexts = donor.all_contexts(rows, np.zeros_like(rows))

    def _adapt(self, config: Config, extra: Collection[str]) -> dict[str, Layer]:
        """Place the adapters and the extra groups; returns their layers by array name."""
        backbone = self.backbone
        placed = adapters.place(backbone, config.model.adapter, extra)
        self.lora = placed.peft_config["default"]
        self.lora_layers = adapters.lora_layers(placed)
        self.encoder = backbone.model
        layers = {array_name(name): layer for name, layer in to_cohort(placed, self.owners).items()}
        if config.engine.precision == "bf16":
            round_linears(backbone.blocks[max(self.layer, 0) :])
        if "gate" in extra:
            self.gate = CohortLinear(backbone.width + 1, 1, self.owners).to(self.device)  # the last input is 1
            layers[GATE] = self.gate
        for name, layer in layers.items():
            layer.weight.requires_grad_(group_of(name) != "residual")
        return layers

    def _initial(self, name: str, layer: Layer, key: bytes) -> Tensor:
        if self.group[name] not in {"A", "A2"} or not isinstance(layer, CohortLinear):
            # lora_B, gate and residual are 0, norms the backbone's, heads start as the task says.
            return layer.weight.detach()[0].cpu().clone()
        return torch.from_numpy(adapters.first_factor((layer.out_features, layer.in_features), key, "initial", name))

    def twin(self) -> CohortModel:
        """Return a copy for another thread: it has weights and gradients of its own, and shares the rest."""
        kept = ("task", "lanes", "initial", "records_of", "examples", "inputs", "texts", "lengths")
        frozen = ("candidates", "prefix", "features", "frozen_contexts")
        shared: list[Any] = [getattr(self, name) for name in (*kept, *frozen)]
        shared += [*self.parameters(), *self.buffers(), *self.backbone.shared()]
        shared += [self.vocabulary] if self.task.causal else []
        owned = {id(layer.weight) for layer in self.layers.values()}
        return copy.deepcopy(self, {id(one): one for one in shared if id(one) not in owned})

    def follow(self, other: CohortModel) -> None:
        """Use the weights that another lane has now, in place."""
        for name, layer in other.layers.items():
            self.layers[name].weight.data = layer.weight.data

    def effort(self, tokens: int) -> float:
        """Return about how many floating-point operations a pass over so many tokens has, backward included."""
        width, adapted = self.backbone.width, self.backbone.depth - max(self.layer, 0)
        words = self.vocabulary.shape[0] if self.task.causal else 0
        return 4.0 * tokens * width * (12 * width * adapted + words)

    def names(self, groups: Sequence[str]) -> tuple[str, ...]:
        """Return the array names of these groups (or aliases, see config.expand), sorted."""
        wanted = expand(groups)
        return tuple(name for name in self.layers if self.group[name] in wanted)

    def initial_of(self, groups: Sequence[str]) -> dict[str, Tensor]:
        """Return the public initial values, (out, in), of the arrays of these groups."""
        return {name: self.initial[name] for name in self.names(groups)}

    def broadcast(self, clients: int, arrays: Mapping[str, Tensor] | None = None) -> Parameters:
        """Return parameters for a cohort: everyone gets `arrays` (out, in), or the initial value where not given."""
        given = arrays or {}
        return {n: given.get(n, first).expand(clients, *first.shape).clone() for n, first in self.initial.items()}

    def load(self, parameters: Mapping[str, Tensor]) -> None:
        """Set the weights of the cohort; each tensor is (clients, out, in), and on a CPU it is used in place."""
        for name, layer in self.layers.items():
            layer.weight.data = parameters[name].to(self.device)
            layer.weight.grad = None

    def per_record(self, on: bool) -> None:
        """Leave gradients in weights to hooks that make them record by record, or not."""
        for layer in self.layers.values():
            if isinstance(layer, CohortLinear):
                layer.per_record = on

    def on_device(self, array: NDArray[Any]) -> Tensor:
        """Return an array as a tensor on the model's device."""
        return torch.from_numpy(array).to(self.device)

    def contexts(self, rows: Index, owners: Tensor) -> Tensor:
        """Encode the inputs of rows as their owners' models do, as the task wants it: by default unit vectors
        (records, width).
        """
        if self.prefix is None:
            assert self.frozen_contexts is not None
            return self.frozen_contexts.index_select(0, self.on_device(rows))
        hidden, mask = (one.to(self.device) for one in self.prefix.batch(rows))
        if self.layer == self.backbone.depth:
            return self.task.context(hidden, mask, self.longest)
        self.owners.set(owners.to(self.device))
        with self.mixed(rows):
            return self.task.context(self.backbone.above(hidden, mask, self.layer), mask, self.longest)

    def mixed(self, rows: Index) -> AbstractContextManager[None]:
        """Let both adapters count for these rows as their owners' gates say; without a gate, in full."""
        if self.gate is None:
            return nullcontext()
        assert self.features is not None
        second = weights(self.gate, self.features[self.on_device(rows)], self.link)
        return mixed(self.lora_layers, self.scaling, second)

    def scores(self, contexts: Tensor, rows: Index, owners: Tensor) -> Tensor:
        """Apply the owners' heads: scores (records, ...), as the task makes them."""
        self.owners.set(owners.to(self.device))
        batch = Batch(
            lambda: gather(self.candidates, self.examples.candidates[rows]),
            lambda: next_tokens(self.inputs, rows, contexts.shape[1]).to(self.device),
            lambda: self.vocabulary,
        )
        return self.task.scores(self.head, contexts, batch)

    @cached_property
    def vocabulary(self) -> Tensor:
        """The backbone's output embeddings (vocabulary, width), in the precision of products."""
        vocabulary = self.backbone.vocabulary
        return vocabulary.bfloat16() if self.precision == "bf16" else vocabulary

    def losses(self, contexts: Tensor, rows: Index, owners: Tensor) -> Tensor:
        """Return the loss of each record, (records,)."""
        return self.task.loss(self.scores(contexts, rows, owners), self.targets(rows))

    def metrics(self, contexts: Tensor, rows: Index, owners: Tensor) -> Mapping[str, Tensor]:
        """Return what the task measures on each record, each (records,)."""
        return self.task.metrics(self.scores(contexts, rows, owners), self.targets(rows))

    def targets(self, rows: Index) -> Tensor:
        """Return the numbers to predict, (records,); zeros for a task without."""
        targets = self.examples.targets
        return self.on_device(targets[rows] if len(targets) else np.zeros(len(rows), np.float32))

    @torch.no_grad()
    def all_contexts(self, rows: Index, owners: NDArray[np.int64]) -> Tensor:
        """Encode many rows without gradients, cut by the token budget; (records, width) in the order of rows."""
        if self.prefix is None:
            return self.contexts(rows, torch.from_numpy(owners))
        tokens = (self.longest,) if self.task.causal else ()
        result = torch.empty(len(rows), *tokens, self.backbone.width, device=self.device)

        def encode(model: CohortModel, part: Index) -> None:
            model.follow(self)
            with torch.no_grad():  # which holds for the thread that says it
                result[self.on_device(part)] = model.contexts(rows[part], torch.from_numpy(owners[part]))

        parts = list(microbatches(self.lengths[rows], self.budget))
        for _ in self.lanes.each(encode, parts, self.effort(int(self.lengths[rows].sum())) / 2):
            pass
        return result
