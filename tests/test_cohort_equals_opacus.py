"""The cohort engine against plain Opacus, PyTorch and PEFT: one ordinary model per client, no cache, no mixing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from conftest import SECRET
from fedpers.cohort.batching import Step, epochs, poisson
from fedpers.cohort.clients import Clients
from fedpers.cohort.gradients import RecordProtection
from fedpers.cohort.layout import layout
from fedpers.cohort.linear import CohortLinear, Owners, to_cohort
from fedpers.cohort.local_training import train_phase
from fedpers.cohort.model import CohortModel, Parameters
from fedpers.cohort.personal_store import PersonalStore
from fedpers.config import Config, TrainConfig, parse_config
from fedpers.errors import AssetError
from fedpers.experiment import build_model, prepare
from fedpers.models import assets
from fedpers.models.backbone import Backbone, pool
from fedpers.privacy.randomness import generator, secret_key
from fedpers.reporting import Reporter
from fedpers.simulation import simulate

Tiny = Callable[..., Config]
BOTH = ("adapter", "head")
KEY = secret_key(SECRET)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


@pytest.fixture
def tiny(tiny: Tiny) -> Tiny:
    """On one thread, which is faster for tiny models; and with gradients of order one, so that 1e-5 means something."""

    def make(**changes: Any) -> Config:
        engine = {"threads": 1, **changes.pop("engine", {})}
        return tiny(engine=engine, **{"task": {"candidates": 4, "scale": 4.0}, **changes})

    return make


class PlainClient(nn.Module):
    """One user's model from token ids on: Hugging Face, PEFT and two ordinary linear layers; nothing is cached."""

    def __init__(self, config: Config, model: CohortModel, arrays: Mapping[str, Tensor], train: Sequence[str]) -> None:
        super().__init__()
        import transformers

        path = location(config)
        hf = transformers.AutoConfig.from_pretrained(path)
        hf.hidden_dropout_prob = hf.attention_probs_dropout_prob = 0.0
        adapter = config.model.adapter
        lora = peft.LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets),
            layers_to_transform=list(range(hf.num_hidden_layers - adapter.layers, hf.num_hidden_layers)),
        )  # fmt: skip
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.encoder = peft.get_peft_model(transformers.AutoModel.from_pretrained(path, config=hf), lora)
        self.agreement = nn.Linear(1, 1, bias=False)
        self.direction = nn.Linear(hf.hidden_size, 1, bias=False)
        self.scale, self.max_tokens, self.examples = config.task.scale, config.data.max_tokens, model.examples
        self.candidates = model.candidates
        self.trainable = {
            name: p for name, p in self.arrays().items() if ("head" if name.startswith("head.") else "adapter") in train
        }
        assert set(self.arrays()) == set(arrays) == set(model.layers)
        for name, parameter in self.arrays().items():
            parameter.data.copy_(arrays[name])
            parameter.requires_grad_(name in self.trainable)
        self.train()

    def arrays(self) -> dict[str, nn.Parameter]:
        adapter = {n.replace(".default", ""): p for n, p in self.encoder.named_parameters() if "lora_" in n}
        return {
            **adapter,
            "head.agreement.weight": self.agreement.weight,
            "head.direction.weight": self.direction.weight,
        }

    def embed(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_tokens, padding=True, return_tensors="pt"
        )
        hidden = self.encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        return functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)

    def losses(self, rows: Sequence[int]) -> Tensor:
        contexts = self.embed([self.examples.inputs[row] for row in rows])
        candidates = self.candidates[torch.from_numpy(self.examples.candidates[list(rows)])]
        agreement = (contexts.unsqueeze(1) * candidates).sum(dim=2, keepdim=True)
        scores = self.scale * (self.agreement(agreement) + self.direction(candidates)).squeeze(-1)
        return functional.cross_entropy(scores, torch.zeros(len(rows), dtype=torch.long), reduction="none")

    def private(self, clip: float, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Hand the model to Opacus as its manual says; returns Opacus's own optimizer, without noise."""
        loader = DataLoader(TensorDataset(torch.zeros(4, 1)), batch_size=4)
        _, private, _ = PrivacyEngine(accountant="rdp").make_private(
            module=self, optimizer=optimizer or torch.optim.SGD(list(self.trainable.values()), lr=1.0),
            data_loader=loader, noise_multiplier=0.0, max_grad_norm=clip, loss_reduction="sum",
            poisson_sampling=False, wrap_model=False,
        )  # fmt: skip
        return private


def location(config: Config) -> str:
    name = config.model.backbone
    return str(assets.fetch(name)) if name in assets.ASSETS else name


def make_clients(config: Config, folder: Path, **guarantee: Any) -> Clients:
    experiment = prepare(config)
    model = build_model(experiment, Reporter())
    plan = experiment.plan
    first = layout(config, plan, model).kept()
    store = PersonalStore(folder / "personal", len(experiment.examples.users), first)
    return Clients(config, plan, replace(experiment.guarantee, **guarantee), model, store, KEY)


def scattered(model: CohortModel, clients: int, seed: int = 1, spread: float = 0.2) -> Parameters:
    """Different random weights for each client, so that a wrong owner shows."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: first + spread * torch.randn(clients, *first.shape, generator=rng)
        for name, first in sorted(model.initial.items())
    }


def mixed(model: CohortModel, users: Sequence[int], seed: int = 2) -> Step:
    """All training records of these users in one logical batch, in random order."""
    rows = np.concatenate([model.examples.train[user] for user in users])
    owners = np.repeat(np.arange(len(users)), [len(model.examples.train[user]) for user in users])
    shuffle = np.random.default_rng(seed).permutation(len(rows))
    return Step(rows[shuffle], owners[shuffle].astype(np.int64), np.ones(len(users), dtype=bool))


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Absolutely for every number, and relative to the norm of the whole."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance
    assert float((found - expected).norm()) <= tolerance * float(expected.norm()) + 1e-12


def record_gradients(model: CohortModel, parameters: Parameters, step: Step) -> dict[str, Tensor]:
    """What Opacus's hooks find on the cohort layers in one mixed pass, (records, out, in) by name."""
    model.load(parameters)
    for layer in model.layers.values():
        layer.weight.requires_grad_(True)
    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        owners = torch.from_numpy(step.owners)
        contexts = model.contexts(step.rows, owners)
        model.losses(contexts, step.rows, owners).sum().backward()
        return {name: layer.weight.grad_sample.clone() for name, layer in model.layers.items()}
    finally:
        hooks.cleanup()


def clipped_sums(
    model: CohortModel, parameters: Parameters, step: Step, train: Sequence[str], clip: float
) -> tuple[dict[str, Tensor], int]:
    """Read the engine's clipped sums off one noise-free step; returns them by name and how many were clipped."""
    lot = 2.0**-12  # a tiny divisor, so that the step dwarfs the rounding of the weights it is added to

    def no_noise(step: int) -> Sequence[Tensor]:
        raise AssertionError("noise was drawn")

    after = {name: value.clone() for name, value in parameters.items()}
    stats = train_phase(
        model, after, train, [step], TrainConfig(lr={"adapter": 1.0, "head": 1.0}),
        protection=RecordProtection(clip=clip, noise_multiplier=0.0, lot_size=lot, noise=no_noise),
    )  # fmt: skip
    assert stats.records == len(step.rows)
    return {n: (parameters[n] - after[n]) * lot for n in model.names(train)}, stats.clipped


def compare_sums(
    config: Config,
    model: CohortModel,
    users: Sequence[int],
    train: Sequence[str],
    budgets: Sequence[int],
    spread: float = 0.2,
) -> None:
    """Clipped sums of mixed, padded and cut passes on the cached prefix against Opacus on whole models."""
    parameters, step = scattered(model, len(users), spread=spread), mixed(model, users)
    plain, norms = [], []
    for place, user in enumerate(users):
        client = PlainClient(config, model, {n: v[place] for n, v in parameters.items()}, train)
        optimizer = client.private(clip=1.0)
        client.losses(model.examples.train[user].tolist()).sum().backward()
        samples = [p.grad_sample.flatten(1) for p in client.trainable.values()]
        norms.append(torch.cat(samples, dim=1).norm(dim=1))
        plain.append((client, optimizer))
    clip = float(torch.cat(norms).median()) * 1.001
    above = [int((norm > clip).sum()) for norm in norms]
    assert 0 < sum(above) < len(step.rows)
    assert any(0 < n < len(norm) for n, norm in zip(above, norms, strict=True)), "no client has records of both kinds"
    for _, optimizer in plain:
        optimizer.max_grad_norm = clip
        optimizer.clip_and_accumulate()
    for budget in budgets:
        model.budget = budget
        sums, clipped = clipped_sums(model, parameters, step, train, clip)
        assert clipped == sum(above)
        for place, (client, _) in enumerate(plain):
            assert sorted(client.trainable) == sorted(sums)
            found = [sums[name][place].flatten() for name in client.trainable]
            expected = [parameter.summed_grad.flatten() for parameter in client.trainable.values()]
            assert_close(torch.cat(found), torch.cat(expected))


def test_per_record_gradients_of_mixed_records_are_those_of_plain_opacus(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(model={"adapter": {"layers": 2, "rank": 2, "alpha": 4}})
    model = make_clients(config, tmp_path).model
    users = [5, 0, 3, 6]
    parameters, step = scattered(model, len(users)), mixed(model, users)
    found = record_gradients(model, parameters, step)
    lengths = {len(model.examples.train[user]) for user in users}
    assert len(lengths) > 1
    assert len(set(model.lengths[step.rows])) > 1, "ragged clients and ragged texts, or nothing is tested"
    for place, _ in enumerate(users):
        client = PlainClient(config, model, {n: v[place] for n, v in parameters.items()}, BOTH)
        client.private(clip=1.0)
        client.losses(step.rows[step.owners == place].tolist()).sum().backward()
        mine = torch.from_numpy(step.owners == place)
        for name, parameter in client.trainable.items():
            assert_close(found[name][mine], parameter.grad_sample)


def test_hooks_find_the_same_where_autograd_makes_no_gradient(tiny: Tiny, tmp_path: Path) -> None:
    model = make_clients(tiny(model={"adapter": {"layers": 2, "rank": 2, "alpha": 4}}), tmp_path).model
    users = [5, 0, 3, 6]
    parameters, step = scattered(model, len(users)), mixed(model, users)
    expected = record_gradients(model, parameters, step)
    owners = torch.from_numpy(step.owners)
    for name, layer in model.layers.items():  # what autograd makes besides is their sum over a client's records
        summed = torch.zeros_like(layer.weight).index_add_(0, owners, expected[name])
        assert layer.weight.grad is not None
        assert_close(layer.weight.grad, summed)
    model.per_record(True)
    found = record_gradients(model, parameters, step)
    for name, layer in model.layers.items():
        assert layer.weight.grad is None
        assert torch.equal(found[name], expected[name])


def test_a_pass_that_broke_leaves_nothing_behind(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_clients(tiny(), tmp_path).model
    users = [5, 0, 3, 6]
    parameters, step = scattered(model, len(users)), mixed(model, users)
    expected, clipped = clipped_sums(model, parameters, step, BOTH, clip=0.5)
    assert clipped > 0

    def broken(scores: Tensor, targets: Tensor) -> Tensor:
        raise FloatingPointError

    with monkeypatch.context() as patch:
        patch.setattr(model.task, "loss", broken)
        with pytest.raises(FloatingPointError):
            clipped_sums(model, parameters, step, BOTH, clip=0.5)
    assert not any(layer.per_record for layer in model.layers.values() if isinstance(layer, CohortLinear))
    found, _ = clipped_sums(model, parameters, step, BOTH, clip=0.5)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    plain = {name: value.clone() for name, value in parameters.items()}
    train_phase(model, plain, BOTH, [step], TrainConfig())
    assert all(not torch.equal(plain[name], parameters[name]) for name in model.names(BOTH))


@pytest.mark.parametrize("train", [BOTH, ("adapter",), ("head",)], ids="+".join)
def test_clipped_sums_are_those_of_plain_opacus(tiny: Tiny, tmp_path: Path, train: tuple[str, ...]) -> None:
    config = tiny(task={"candidates": 4, "scale": 1.0}, model={"adapter": {"layers": 2, "rank": 2, "alpha": 4}})
    model = make_clients(config, tmp_path).model
    assert model.prefix is not None
    compare_sums(config, model, [5, 0, 3, 6, 7], train, budgets=(30, 10_000))


def test_clipped_sums_with_every_layer_adapted(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(
        task={"candidates": 4, "scale": 1.0},
        model={"adapter": {"layers": 3, "rank": 1, "alpha": 2, "targets": ["query", "dense"]}},
    )
    compare_sums(config, make_clients(config, tmp_path).model, [1, 4], BOTH, budgets=(40,))


def test_candidate_embeddings_are_those_of_the_plain_encoder(tiny: Tiny, tmp_path: Path) -> None:
    """The reference models above take the candidates as given, so they are compared here."""
    config = tiny()
    model = make_clients(config, tmp_path).model
    plain = PlainClient(config, model, model.initial, ())
    with torch.no_grad():
        assert_close(model.candidates, plain.embed(model.examples.texts))


def test_a_noise_free_record_level_round_is_opacus_step_by_step(tiny: Tiny, tmp_path: Path) -> None:
    clip, rate = 1.5, 0.2
    config = tiny(
        method="fedavg",
        privacy={"unit": "record", "clip": clip, "record_rate": rate},
        local={"batch_size": 4, "lr": {"adapter": 0.5, "head": 0.25}},
        engine={"cohort_size": 3},
    )
    clients = make_clients(config, tmp_path)
    model, lot, users = clients.model, 4.0, [6, 1, 4, 0, 2]
    assert clients.guarantee.noise_multiplier == 0
    model.budget = 40
    shared = {name: value[0] for name, value in scattered(model, 1).items()}
    replies = clients.train_round(3, users, {name: value.numpy() for name, value in shared.items()})
    empty = 0
    for place, user in enumerate(users):
        client = PlainClient(config, model, shared, BOTH)
        groups = [
            {"params": [p for n, p in client.trainable.items() if n.startswith("head.") == head], "lr": lr / lot}
            for head, lr in ((False, 0.5), (True, 0.25))
        ]
        optimizer = client.private(clip, torch.optim.SGD(groups))
        for step in poisson(model.examples, [user], 5, rate, KEY, ("round", 3, 0)):
            empty += len(step.rows) == 0
            if len(step.rows):
                client.losses(step.rows.tolist()).sum().backward()
            else:
                for parameter in client.trainable.values():
                    parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in client.arrays().items():
            assert_close(torch.from_numpy(replies[name][place]), parameter.detach())
            assert float((parameter - shared[name]).detach().norm()) > 1e-3
    assert empty > 0
    assert 0 < clients.stats.clipped < clients.stats.records


def test_an_empty_poisson_batch_is_a_step_on_the_clients_own_noise(tiny: Tiny, tmp_path: Path) -> None:
    """Leaving the step out would tell that nobody was in it; a second draw of the same noise would cancel it."""
    config = tiny(
        method="fedavg", privacy={"unit": "record", "clip": 0.5}, local={"lr": {"adapter": 0.5, "head": 0.25}}
    )
    clients = make_clients(config, tmp_path, rate=1e-12, steps=3, noise_multiplier=2.0)
    start = {name: value[0].numpy() for name, value in scattered(clients.model, 1).items()}
    users = [2, 7]
    replies = clients.train_round(1, users, start)
    assert clients.stats.records == 0
    names = clients.model.names(BOTH)
    sizes = [clients.model.initial[name].numel() for name in names]
    draws = []
    for place, user in enumerate(users):
        noise = [
            generator(KEY, "round", 1, 0, "noise", clients.examples.users[user], step).standard_normal(sum(sizes))
            for step in range(3)
        ]
        draws.extend(noise)
        for name, part in zip(names, np.split(sum(noise), np.cumsum(sizes)[:-1]), strict=True):
            lr = 0.25 if name.startswith("head.") else 0.5
            expected = start[name] - lr * 2.0 * 0.5 * part.reshape(start[name].shape) / 4.0
            np.testing.assert_allclose(replies[name][place], expected, atol=1e-5)
    correlations = np.corrcoef(np.stack(draws)) - np.eye(len(draws))
    assert np.abs(correlations).max() < 6 / math.sqrt(sum(sizes)), "two steps or two clients share noise"


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_without_protection_is_plain_pytorch(tiny: Tiny, tmp_path: Path, optimizer: str) -> None:
    lr = {"adapter": 0.3, "head": 0.05} if optimizer == "sgd" else {"adapter": 0.01, "head": 0.02}
    config = tiny(method="fedavg", local={"epochs": 2, "batch_size": 4, "optimizer": optimizer, "lr": lr})
    clients = make_clients(config, tmp_path)
    model, users = clients.model, [6, 1, 4, 0, 2]
    model.budget = 40
    counts = {-(-len(model.examples.train[user]) // 4) for user in users[:4]}
    assert len(counts) > 1, "all clients of the first cohort have the same number of batches"
    shared = {name: value[0] for name, value in scattered(model, 1).items()}
    replies = clients.train_round(2, users, {name: value.numpy() for name, value in shared.items()})
    for place, user in enumerate(users):
        client = PlainClient(config, model, shared, BOTH)
        train_plainly(client, epochs(model.examples, [user], 2, 4, KEY, ("round", 2, 0)), optimizer, lr)
        for name, parameter in client.arrays().items():
            assert_close(torch.from_numpy(replies[name][place]), parameter.detach())
            assert float((parameter - shared[name]).detach().norm()) > 1e-3


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_at_home_is_plain_pytorch_with_a_pull(tiny: Tiny, tmp_path: Path, optimizer: str) -> None:
    lr = {"adapter": 0.3, "head": 0.05} if optimizer == "sgd" else {"adapter": 0.01, "head": 0.02}
    personal = {"epochs": 3, "batch_size": 5, "optimizer": optimizer, "lr": lr, "groups": "adapter+head", "l2": 0.7}
    config = tiny(method="fedavg-finetune", personal=personal)
    clients = make_clients(config, tmp_path)
    model, users = clients.model, [6, 1, 4, 0, 2]
    shared = {name: value[0] for name, value in scattered(model, 1).items()}
    found = clients.finish(users, {name: value.numpy() for name, value in shared.items()}, None)
    own = {user: {n: v[i] for n, v in p.items()} for cohort, p in found for i, user in enumerate(cohort)}
    for user in users:
        client = PlainClient(config, model, shared, BOTH)
        steps = epochs(model.examples, [user], 3, 5, KEY, ("finish", 0))
        train_plainly(client, steps, optimizer, lr, pull=0.7)
        for name, parameter in client.arrays().items():
            assert_close(own[user][name], parameter.detach())


def train_plainly(
    client: PlainClient, steps: Sequence[Step], optimizer: str, lr: Mapping[str, float], pull: float = 0.0
) -> None:
    make = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    moving = make(
        [{"params": [p], "lr": lr["head" if n.startswith("head.") else "adapter"]} for n, p in client.trainable.items()]
    )
    anchors = {name: p.detach().clone() for name, p in client.trainable.items()}
    for step in steps:
        moving.zero_grad()
        distance = sum(((p - anchors[name]) ** 2).sum() for name, p in client.trainable.items())
        (client.losses(step.rows.tolist()).mean() + pull / 2 * distance).backward()
        moving.step()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"method": "fedavg-finetune", "personal": {"groups": "adapter+head"}}, marks=pytest.mark.slow),
        {"method": "fedrep", "client_rate": 0.8},
        pytest.param(
            {"method": "fedbabu", "privacy": {"unit": "record", "clip": 1.0, "record_rate": 0.5}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["fedavg-finetune", "fedrep", "fedbabu-record"],
)
def test_how_the_work_is_cut_does_not_change_a_run(tiny: Tiny, tmp_path: Path, changes: dict[str, Any]) -> None:
    cuts = [(1, 4096), (4, 4096), (16, 512)]
    runs = []
    for cohort, budget in cuts:
        config = tiny(
            **changes, data={"users": 18}, local={"batch_size": 12, "epochs": 2}, rounds=2,
            engine={"cohort_size": cohort, "token_budget": budget},
        )  # fmt: skip
        runs.append(simulate(config, tmp_path / f"{cohort}-{budget}"))
    first = runs[0]
    table = first.users.to_pandas()
    assert set(table["kind"]) >= {"own", "global", "local", "zero_shot"}
    for run in runs[1:]:
        for name, array in run.shared.items():
            np.testing.assert_allclose(array, first.shared[name], atol=1e-4)
        other = run.users.to_pandas()
        assert list(other["kind"]) == list(table["kind"])
        for metric in ("accuracy", "mrr", "loss"):
            np.testing.assert_allclose(other[metric], table[metric], atol=1e-4)
    trained = table[table["kind"] == "own"]["loss"].to_numpy() - table[table["kind"] == "zero_shot"]["loss"].to_numpy()
    assert np.quantile(np.abs(trained), 0.1) > 1e-3, "a user's model did not move, so equality says little"


def test_an_exported_adapter_loads_with_peft_alone(tiny: Tiny, tmp_path: Path) -> None:
    import transformers

    config = tiny(method="fedavg", rounds=1, local={"lr": {"adapter": 2.0}})
    run = simulate(config, tmp_path / "run")
    base = transformers.AutoModel.from_pretrained(config.model.backbone)
    loaded = peft.PeftModel.from_pretrained(base, str(run.path / "adapters" / "shared"))
    result = loaded.load_adapter(str(run.path / "adapters" / "shared"), adapter_name="again")
    assert list(result.missing_keys) == []
    assert list(result.unexpected_keys) == []
    clients = make_clients(config, tmp_path)
    model = clients.model
    arrays = {name: torch.from_numpy(array) for name, array in run.shared.items()}
    assert set(arrays) == set(model.layers)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.backbone)
    rows = np.concatenate(model.examples.test)
    tokens = tokenizer([model.examples.inputs[row] for row in rows], padding=True, return_tensors="pt")
    model.load(model.broadcast(1, arrays))
    ours = model.all_contexts(rows, np.zeros_like(rows))
    model.load(model.broadcast(1))
    untrained = model.all_contexts(rows, np.zeros_like(rows))
    loaded.eval()
    for name in ("default", "again"):
        loaded.set_adapter(name)
        with torch.no_grad():
            hidden = loaded(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        theirs = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        assert_close(ours, theirs)
        assert float((theirs - untrained).norm()) > 1e-2, "the adapter does nothing, so equality says little"


class WithBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(3, 2)


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))


class WithOwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (WithBias(), "output.*Linear"),
        (WithBatchNorm(), r"inner\.1.*BatchNorm1d"),
        (WithOwnParameter(), "WithOwnParameter"),
    ],
)
def test_what_cannot_be_trained_in_cohorts_is_refused(module: nn.Module, found: str) -> None:
    with pytest.raises(TypeError, match=found):
        to_cohort(module, Owners())


def test_frozen_modules_stay_as_they_are() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))
    module[0].requires_grad_(False)
    module[1].requires_grad_(False)
    assert list(to_cohort(module, Owners())) == ["2"]
    assert isinstance(module[2], CohortLinear)
    assert type(module[0]) is nn.Linear


def test_no_dropout_is_left_whatever_the_configuration_file_says(tiny: Tiny, tmp_path: Path) -> None:
    import transformers

    config = tiny()
    written = transformers.AutoConfig.from_pretrained(config.model.backbone)
    assert written.hidden_dropout_prob == written.attention_probs_dropout_prob == 0.1
    model = make_clients(config, tmp_path).model
    for module in model.modules():  # Opacus needs train mode where something trains; nothing else may have it
        assert module.training == isinstance(module, CohortLinear)
    model.backbone.model.train()
    model.load(scattered(model, 2))
    rows = np.concatenate(model.examples.train[:2])
    owners = torch.from_numpy(np.repeat([0, 1], [len(model.examples.train[0]), len(model.examples.train[1])]))
    with torch.no_grad():
        first, second = model.contexts(rows, owners), model.contexts(rows, owners)
        ids = model.backbone.tokenize([model.examples.inputs[row] for row in rows[:1]], 16).ids[0].unsqueeze(0)
        lower = [model.backbone.below(ids, torch.ones_like(ids), 2) for _ in range(2)]
    assert torch.equal(first, second)
    assert torch.equal(lower[0], lower[1])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_cut_backbone_is_the_whole_one(random_tiny_bert: Path, layers: int) -> None:
    backbone = Backbone(str(random_tiny_bert))
    compare_cut(backbone, ["bread soup", "ball run goal team race", "song"], [layers - 1])


def compare_cut(backbone: Backbone, texts: Sequence[str], layers: Sequence[int]) -> None:
    tokens = backbone.tokenize(texts, 32).ids
    ids = torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
    mask = (torch.arange(ids.shape[1])[None, :] < torch.tensor([len(one) for one in tokens])[:, None]).long()
    assert int(mask.min()) == 0, "nothing is padded"
    whole = backbone.encode(ids, mask)
    for layer in layers:
        hidden = backbone.below(ids, mask, layer) * mask.unsqueeze(-1)  # the cache keeps real tokens only
        with torch.no_grad():
            assert_close(pool(backbone.above(hidden, mask, layer), mask), whole)


@pytest.fixture(scope="module")
def real() -> Config:
    """The real encoder and a handful of real records; without a download there is nothing to test."""
    config = parse_config(
        {
            "method": "fedavg",
            "data": {"name": "chitchat", "users": 3, "min_train": 15, "max_train": 15, "min_test": 5, "max_test": 5},
            "task": {"candidates": 4, "scale": 4.0},
            "engine": {"threads": 1},
            "model": {"backbone": "all-MiniLM-L6-v2", "adapter": {"layers": 2, "rank": 4, "alpha": 8}},
        }
    )
    try:
        for name in ("chitchat", "all-MiniLM-L6-v2"):
            assets.fetch(name)
    except AssetError as error:
        pytest.skip(f"no real assets here: {error}")
    return config


@pytest.mark.slow
def test_clipped_sums_on_the_real_encoder_are_those_of_plain_opacus(real: Config, tmp_path: Path) -> None:
    clients = make_clients(real, tmp_path)
    assert clients.model.layer == 4
    compare_sums(real, clients.model, [2, 0, 1], BOTH, budgets=(200,), spread=0.05)


@pytest.mark.slow
def test_the_cut_real_encoder_is_the_whole_one_at_every_layer(real: Config) -> None:
    backbone = Backbone("all-MiniLM-L6-v2")
    assert backbone.depth == 6
    inputs = [record.input for record in prepare(real).federation.train[0]]
    compare_cut(backbone, inputs, range(6))
