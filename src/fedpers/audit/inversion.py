"""Gradient inversion: which words does one client's LoRA update give away, with and without record-level DP?

The scenario is the worst one for the client: it takes one SGD step on one record, and whoever reads its reply also
knows the broadcast, the step size, clip and noise multiplier. The update is made by the production engine; the attacks
are forward and backward passes of an attacker's own copy of the model.

For a layer y = Wx + s B A x with output gradient d_t for token t, dA = s B^T sum_t d_t x_t^T: each row of dA lies in
the span of the layer's inputs x_t. Where the layer reads the embeddings, each x_t is one of (vocabulary x positions)
public vectors, so membership in the span is a test of each word at each position (Petrov et al., DAGER, NeurIPS 2024,
for full gradients). It can find every token only while there are not more of them than the rank.
At the first broadcast B = 0, so dA = 0 and only dB = s sum_t d_t (A x_t)^T leaks, rank-dimensional projections of the
inputs; the attack is therefore made at a broadcast where B is not 0, as in every later round, here random.

What comes out is an attack's success, never an epsilon: an attack that fails proves nothing.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedpers.audit.inversion_optimize import match_updates
from fedpers.audit.inversion_span import Nearest, RowSpace, first_arrays, row_space, vocabulary
from fedpers.cohort.clients import Clients
from fedpers.cohort.model import CohortModel
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config, PrivacyConfig
from fedpers.errors import ConfigError, DataError
from fedpers.experiment import Experiment, build_model, prepare
from fedpers.methods.base import PERSONAL
from fedpers.models.backbone import Backbone, Tokens
from fedpers.privacy.randomness import derive, generator, secret_key, seed_key
from fedpers.reporting import Reporter
from fedpers.tasks.base import Examples

SPREAD = 0.05  # deviation of the broadcast's lora_B
NEAR = 0.02  # relative distance to the span below which a token counts as recovered
UNBOUNDED = 1e9  # a clip that clips nothing

Truth = list[Tensor]  # token ids of each record, (tokens,)


@dataclass(frozen=True)
class Observation:
    """What the attacker reads off the clients' replies."""

    gradients: dict[str, Tensor]  # (records, out, in) by array of the adapter, float64
    deviation: dict[str, float]  # of what hides each entry: DP noise and the rounding of the reply to float32


def inversion_report(
    config: Config, *, records: int = 4, noise_multiplier: float | None = None, iterations: int = 150
) -> dict[str, dict[str, float]]:
    """Attack single-record updates of clients of the configured federation, without and with record-level DP.

    Victims, their records and the broadcast are drawn by the public seed; the noise by a stream of its own.

    Args:
        config: a run whose adapter reaches down to the first block. At other units than "record" the run's clip and
            epsilon are applied to records.
        records: victims, one record each.
        noise_multiplier: noise deviation over clip; None takes what the configuration's epsilon asks for at record
            level. The victim's record surely takes part, whatever record rate the epsilon counts on.
        iterations: steps of the optimization attack.

    Returns:
        For "without DP" and "with DP": over all victims' tokens other than special ones, at their positions,
        `span_precision` and `span_recall` of the pairs (token, position) within NEAR of the span (precision 0 where
        there are none); `nearest_recall` of the token nearest to the span at each position, which needs no threshold
        and fades more slowly under noise; `optimization_recall` of gradient matching; `chance`, the recall of the token
        most frequent at that position in the public pool; `tokens`, how many there are; `rank` of the adapter.

    Raises:
        ConfigError: an adapter or a method that the attacks do not fit, or no clip or noise to compare with.
        PrivacyRefusal: the method is refused at record level.
        DataError: fewer users with any word than victims asked for.
    """
    bound = _check(config, records, noise_multiplier, iterations)
    experiment = prepare(config.model_copy(update={"privacy": _record_level(config.privacy)}))
    if not {"A", "B"} <= set(experiment.plan.shared) or len(experiment.plan.round) != 1 or not experiment.plan.plain:
        raise ConfigError(f"method={config.method}, share={'+'.join(config.share)}: inversion needs a method that "
                          "shares the adapter and trains it in one phase.")  # fmt: skip
    if noise_multiplier is None:
        noise_multiplier = experiment.guarantee.noise_multiplier
        if noise_multiplier == 0:
            raise ConfigError("privacy.epsilon is infinite, so there is no noise to attack; set it, or give a noise "
                              "multiplier.")  # fmt: skip
    experiment = replace(experiment, examples=_victims(experiment.examples, records, config.seed))
    model = build_model(experiment, Reporter())
    if model.layer > 0:
        raise ConfigError(f"model.adapter.layers = {config.model.adapter.layers}: inversion reads tokens off the first "
                          f"of {model.backbone.depth} blocks; set it to {model.backbone.depth}.")  # fmt: skip
    truth = list(model.backbone.tokenize(experiment.examples.inputs, config.data.max_tokens).ids)
    shared = _broadcast(model, model.names(experiment.plan.shared), config.seed)
    chance = _chance(model.backbone, experiment, truth)
    report = {}
    for name, clip, noise in (("without DP", UNBOUNDED, 0.0), ("with DP", bound, noise_multiplier)):
        seen = _observe(experiment, model, shared, clip, noise)
        report[name] = {**_attack(model, shared, seen, truth, config, iterations), "chance": chance}
    return report


def _check(config: Config, records: int, noise_multiplier: float | None, iterations: int) -> float:
    """Refuse what the attacks do not fit before anything is loaded; returns the bound on one record."""
    if records < 1 or iterations < 1 or (noise_multiplier is not None and not 0 < noise_multiplier < math.inf):
        raise ConfigError(f"inversion: records={records} and iterations={iterations} must be at least 1, and "
                          f"noise_multiplier={noise_multiplier} positive and finite.")  # fmt: skip
    if config.task.name != "reply-ranking":
        raise ConfigError(f"task.name = {config.task.name!r}: inversion knows the loss of reply-ranking alone.")
    if config.privacy.clip is None:
        raise ConfigError("privacy.clip is not set, and inversion with DP needs it; set the bound on one record.")
    if config.local.optimizer != "sgd":
        raise ConfigError(f"local.optimizer = {config.local.optimizer}: inversion reads gradients off steps of sgd.")
    if config.data.max_tokens > config.model.adapter.rank:
        raise ConfigError(f"data.max_tokens = {config.data.max_tokens} exceeds model.adapter.rank = "
                          f"{config.model.adapter.rank}: the span of the tokens need not fit into the update, and a "
                          "failed test would look like protection; lower the one or raise the other.")  # fmt: skip
    return config.privacy.clip


def _record_level(privacy: PrivacyConfig) -> PrivacyConfig:
    if privacy.unit == "record":
        return privacy
    kept = {"epsilon", "delta", "clip", "record_rate", "secret"}  # the rest belongs to the other unit
    return PrivacyConfig(unit="record", **{name: getattr(privacy, name) for name in kept})


def _victims(examples: Examples, records: int, seed: int) -> Examples:
    """Keep one training record of each of `records` users; the rest of the federation plays no part."""
    rng = generator(seed_key(seed), "inversion", "victims")
    chosen: list[tuple[str, int]] = []
    for user in rng.permutation(len(examples.users)):
        held = [row for row in examples.train[user] if examples.inputs[row].split()]
        if held and len(chosen) < records:
            chosen.append((examples.users[user], int(held[rng.integers(len(held))])))
    if len(chosen) < records:
        raise DataError(f"inversion: {records} victims asked for, and {len(chosen)} users hold a record with words; "
                        "lower records or raise data.users.")  # fmt: skip
    rows = [row for _, row in chosen]
    texts, places = np.unique(examples.candidates[rows], return_inverse=True)
    return Examples(
        users=tuple(user for user, _ in chosen),
        ids=tuple(examples.ids[row] for row in rows),
        inputs=tuple(examples.inputs[row] for row in rows),
        train=tuple(np.array([place]) for place in range(records)),
        test=tuple(np.zeros(0, np.int64) for _ in range(records)),
        texts=tuple(examples.texts[text] for text in texts),
        candidates=places.reshape(records, -1),
    )


def _broadcast(model: CohortModel, names: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Public initial values, but for lora_B, which every round after the first has moved off 0."""
    key, shared = seed_key(seed), {}
    for name in names:
        shared[name] = model.initial[name].clone()
        if ".lora_B." in name:
            draws = generator(key, "inversion", name).standard_normal(shared[name].shape)
            shared[name] += torch.from_numpy((SPREAD * draws).astype(np.float32))
    return shared


def _observe(
    experiment: Experiment, model: CohortModel, shared: dict[str, Tensor], clip: float, noise: float
) -> Observation:
    """Let the victims' clients answer the broadcast with one step, and divide what moved by the step size."""
    guarantee = replace(
        experiment.guarantee, clip=clip, noise_multiplier=noise, steps=1, denominator=1.0, rate=1.0
    )  # fmt: skip
    personal = model.initial_of(experiment.plan.groups(PERSONAL))
    users, config = range(len(experiment.examples.users)), experiment.config
    # A stream of its own: under one secret no run's noise is drawn a second time.
    secret = derive(secret_key(config.privacy.secret), "inversion")
    with tempfile.TemporaryDirectory() as folder:
        store = PersonalStore(Path(folder), len(users), personal)
        clients = Clients(config, experiment.plan, guarantee, model, store, secret)
        replies = clients.train_round(1, users, {name: value.numpy() for name, value in shared.items()})
    rate = config.local.lr.adapter
    gradients, deviation = {}, {}
    for name in model.names(["adapter"]):
        gradients[name] = (shared[name].double() - torch.from_numpy(replies[name]).double()) / rate
        spacing = np.spacing(np.abs(replies[name])).astype(np.float64) / rate
        rounding = float(np.sqrt(np.square(spacing).mean() / 12))
        deviation[name] = math.hypot(rounding, noise * clip)
    return Observation(gradients, deviation)


def _attack(
    model: CohortModel, shared: dict[str, Tensor], seen: Observation, truth: Truth, config: Config, iterations: int
) -> dict[str, float]:
    backbone, positions = model.backbone, config.data.max_tokens
    space = row_space(seen.gradients, seen.deviation, first_arrays(model))
    mean = torch.zeros(positions, backbone.width)
    words = 0
    for ids, inputs in vocabulary(backbone, positions):
        mean, words = mean + inputs.sum(dim=0), words + len(ids)
    dummies = match_updates(
        model, np.arange(len(truth)), shared, {name: value.float() for name, value in seen.gradients.items()},
        mean / words, space.distance, iterations,
    )  # fmt: skip
    longest = dummies.shape[1]
    nearest, matched = Nearest(len(truth), longest), Nearest(len(truth), longest)
    recovered: list[set[tuple[int, int]]] = [set() for _ in truth]
    for ids, inputs in vocabulary(backbone, positions):
        for record in range(len(truth)):
            one = RowSpace(space.directions[[record]], space.shrink[[record]])
            distance = one.distance(inputs.reshape(1, -1, backbone.width)).reshape(len(ids), positions)
            word, position = (distance < NEAR**2).nonzero(as_tuple=True)
            recovered[record].update(zip(ids[word].tolist(), position.tolist(), strict=True))
            nearest.see(record, ids, distance[:, :longest])
            matched.see(record, ids, (inputs[:, :longest] - dummies[record]).square().sum(dim=-1))
    pairs = [_pairs(backbone, ids) for ids in truth]
    total = sum(map(len, pairs))
    hits = sum(len(found & true) for found, true in zip(recovered, pairs, strict=True))
    return {
        "span_precision": hits / max(1, sum(map(len, recovered))),
        "span_recall": hits / total,
        "nearest_recall": nearest.hits(pairs) / total,
        "optimization_recall": matched.hits(pairs) / total,
        "tokens": total,
        "rank": config.model.adapter.rank,
    }


def _pairs(backbone: Backbone, ids: Tensor) -> set[tuple[int, int]]:
    special = set(backbone.tokenizer.all_special_ids)
    return {(token, place) for place, token in enumerate(ids.tolist()) if token not in special}


def _chance(backbone: Backbone, experiment: Experiment, truth: Truth) -> float:
    """Recall of guessing at each position the token that the public pool has there most often."""
    public: Tokens = backbone.tokenize([one.text for one in experiment.federation.pool],
                                       experiment.config.data.max_tokens)  # fmt: skip
    counts: dict[int, Counter[int]] = {}
    for ids in public.ids:
        for token, place in _pairs(backbone, ids):
            counts.setdefault(place, Counter())[token] += 1
    guess = {place: min(seen, key=lambda token: (-seen[token], token)) for place, seen in counts.items()}
    pairs = [pair for ids in truth for pair in _pairs(backbone, ids)]
    return sum(guess.get(place) == token for token, place in pairs) / len(pairs)
