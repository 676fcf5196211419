"""Methods that tell LoRA's factors apart: exact averaging, ranks, orthonormal rows, second adapters, and the export."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from fedpers.cohort.clients import Clients
from fedpers.config import Config
from fedpers.models.array_names import Pair, pairs
from fedpers.privacy.randomness import seed_key, uniforms
from fedpers.simulation import simulate
from test_method_properties import (
    REUSE,
    Turn,
    assert_close,
    gentle,
    home,
    kept,
    last,
    make,
    own,
    play,
    scores,
)  # fmt: skip

Tiny = Callable[..., Config]
Arrays = Mapping[str, NDArray[np.float32]]
EXACT = ["fedex-lora", "flora", "ffa-lora", "rolora", "fedsvd"]
NOT_EXACT = ["fedavg", "fedit"]
WIDE = {"adapter": {"layers": 1, "rank": 32, "alpha": 64}}  # as wide as the layer: every factor is square


def modules(clients: Clients) -> list[Pair]:
    return pairs(clients.model.initial)


def update(clients: Clients, pair: Pair, *given: Arrays) -> Tensor:
    """What the first adapter and the residual add to a frozen weight, (out, in); later arrays count first."""
    arrays = {name: value.double() for name, value in clients.model.initial.items()}
    for one in given:
        arrays |= {name: torch.from_numpy(np.array(value)).double() for name, value in one.items()}
    product = clients.model.scaling * arrays[pair.B] @ arrays[pair.A]
    return product + arrays.get(pair.residual, torch.zeros_like(product))


def meant(clients: Clients, turn: Turn, pair: Pair) -> Tensor:
    """The mean of what the clients' own replies add to a weight."""
    return torch.stack([update(clients, pair, turn.before, reply) for reply in turn.up.values()]).mean(dim=0)


def lost(clients: Clients, turn: Turn, pair: Pair) -> float:
    """How far the next broadcast is from that, relative to how far the clients went."""
    mean, before = meant(clients, turn, pair), update(clients, pair, turn.before)
    return float((update(clients, pair, turn.after) - mean).norm() / (mean - before).norm())


# ---------------------------------------------------------------- exact averaging


@pytest.mark.parametrize("model", [{}, {"adapter": WIDE["adapter"]}], ids=["narrow", "wide"])
@pytest.mark.parametrize("name", EXACT + NOT_EXACT)
def test_the_next_broadcast_is_the_mean_of_what_clients_mean(
    tiny: Tiny, tmp_path: Path, name: str, model: dict[str, Any]
) -> None:
    """Effective weights, from the messages alone; a case where plain averaging of factors is off by a hundredth."""
    clients = make(tiny, tmp_path, name, model=model, local={"epochs": 6})
    for turn in play(clients, tmp_path, 3):
        for pair in modules(clients):
            if name in EXACT:
                assert lost(clients, turn, pair) < 1e-5
            else:
                assert lost(clients, turn, pair) > 0.01
        for head in ("head.agreement.weight", "head.direction.weight"):
            if head in turn.after:
                mean = np.mean([reply[head] for reply in turn.up.values()], axis=0)
                np.testing.assert_allclose(turn.after[head], mean, atol=1e-6)


@pytest.mark.parametrize("name", EXACT + NOT_EXACT)
def test_the_error_that_a_run_reports_is_that_of_its_messages(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """Relative to the mean product that the clients sent, averaged over the modules."""
    clients = make(tiny, tmp_path, name)
    for turn in play(clients, tmp_path, 2):
        errors = []
        for pair in modules(clients):
            base = {pair.B: np.zeros_like(clients.model.initial[pair.B])}
            received = update(clients, pair, {**turn.before, **base})  # the residual alone
            mean = meant(clients, turn, pair)
            errors.append(float((update(clients, pair, turn.after) - mean).norm() / (mean - received).norm()))
        assert turn.report.diagnosis is not None
        assert turn.report.diagnosis.error == pytest.approx(np.mean(errors), abs=1e-6)


# From round to round: which factors' numbers differ from those before, in what clients send and in the next broadcast.
MOVES = {
    "fedavg": [("AB", "AB"), ("AB", "AB")],
    "ffa-lora": [("B", "B"), ("B", "B")],
    "fedsa-lora": [("", ""), ("A", "A")],  # while B is zero, A has no gradient
    "rolora": [("B", "B"), ("A", "A")],
    "fedex-lora": [("AB", "ABR"), ("AB", "ABR")],
    "flora": [("AB", "AR"), ("AB", "AR")],  # B is back at zero
    "fedsvd": [("B", "AB"), ("B", "AB")],
    "hetlora": [("AB", "AB"), ("AB", "AB")],
    "feddpa": [("AB", "AB"), ("AB", "AB")],
}


@pytest.mark.parametrize("rank", [2, 32])
@pytest.mark.parametrize("name", sorted(MOVES))
def test_factors_are_told_apart_by_name_also_where_both_are_square(
    tiny: Tiny, tmp_path: Path, name: str, rank: int
) -> None:
    steps = {"epochs": 1 if name == "fedsa-lora" else 3}
    clients = make(tiny, tmp_path, name, model={"adapter": {"layers": 1, "rank": rank, "alpha": 2 * rank}}, local=steps)
    for turn, (up, down) in zip(play(clients, tmp_path, 2), MOVES[name], strict=True):
        for pair in modules(clients):
            letters = {"A": pair.A, "B": pair.B, "R": pair.residual}
            for arrays, expected in (*((reply, up) for reply in turn.up.values()), (turn.after, down)):
                found = {k for k, n in letters.items() if n in arrays and changed(arrays[n], turn.before[n])}
                assert found == set(expected)


def changed(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    return bool(np.abs(one - other).max() > 1e-7)


def test_flora_and_fedex_mean_the_same_after_one_round(tiny: Tiny, tmp_path: Path) -> None:
    """Both start from the same adapter, and what they send on is the same in effect; from then on they part."""
    found = {}
    for name in ("flora", "fedex-lora", "fedavg"):
        clients = make(tiny, tmp_path, name)
        found[name] = [
            [update(clients, p, turn.after) for p in modules(clients)] for turn in play(clients, tmp_path, 2)
        ]
    first, second, plain = found["flora"], found["fedex-lora"], found["fedavg"]
    for place in range(2):
        torch.testing.assert_close(first[0][place], second[0][place], atol=1e-6, rtol=0)
        assert float((first[1][place] - second[1][place]).norm()) > 0.01 * float(first[1][place].norm())
        assert float((first[0][place] - plain[0][place]).norm()) > 0.01 * float(first[0][place].norm())


# ---------------------------------------------------------------- fedsvd


@pytest.mark.parametrize("model", [{}, {"adapter": WIDE["adapter"]}], ids=["narrow", "wide"])
def test_fedsvd_keeps_the_product_and_makes_the_rows_orthonormal(
    tiny: Tiny, tmp_path: Path, model: dict[str, Any]
) -> None:
    clients, ffa = (make(tiny, tmp_path, name, model=model) for name in ("fedsvd", "ffa-lora"))
    turns = play(clients, tmp_path, 3)
    for turn in turns:
        for pair in modules(clients):
            A, B = (torch.from_numpy(turn.after[name]).double() for name in (pair.A, pair.B))
            torch.testing.assert_close(A @ A.T, torch.eye(len(A)).double(), atol=1e-5, rtol=0)
            sizes = torch.linalg.vector_norm(B, dim=0)
            gram = B.T @ B
            torch.testing.assert_close(gram, torch.diag(sizes**2), atol=1e-5, rtol=0)  # B = U S
            mean = np.mean([reply[pair.B] for reply in turn.up.values()], axis=0)
            product = torch.from_numpy(mean).double() @ torch.from_numpy(turn.before[pair.A]).double()
            torch.testing.assert_close(B @ A, product, atol=1e-6, rtol=0)
    # Before the first server step it is ffa-lora.
    (other,) = play(ffa, tmp_path)
    for user, reply in other.up.items():
        assert_close(turns[0].up[user], reply, atol=0.0)


# ---------------------------------------------------------------- sdflora


def test_sdflora_keeps_the_best_part_of_the_mean_product_that_has_the_rank(tiny: Tiny, tmp_path: Path) -> None:
    clients = make(tiny, tmp_path, "sdflora")
    for turn in play(clients, tmp_path, 2):
        for pair in modules(clients):
            U, S, V = torch.linalg.svd(meant(clients, turn, pair))
            best = U[:, :2] @ torch.diag(S[:2]) @ V[:2]
            torch.testing.assert_close(update(clients, pair, turn.after), best, atol=1e-6, rtol=0)
            assert float(S[2]) > 1e-3 * float(S[0]), "nothing was cut off"


# ---------------------------------------------------------------- hetlora


def het(tiny: Tiny, folder: Path, rank: int = 4, **changes: Any) -> Clients:
    return make(tiny, folder, "hetlora", model={"adapter": {"layers": 1, "rank": rank, "alpha": 4}}, **changes)


def first_ranks(clients: Clients, lowest: int, full: int) -> list[int]:
    """The public draw by hand: each rank from the lowest to the full one alike."""
    coins = uniforms(seed_key(clients.config.seed), ("coin",), clients.examples.users)[:, 0]
    return [lowest + math.floor(coin * (full - lowest + 1)) for coin in coins]


def ranks_of(replies: Mapping[int, Arrays], pair: Pair) -> list[int]:
    """Up to which row of A, and column of B, a reply has numbers; the two must agree."""
    found = []
    for reply in replies.values():
        rows, columns = np.abs(reply[pair.A]).sum(axis=1), np.abs(reply[pair.B]).sum(axis=0)
        assert np.array_equal(rows > 0, columns > 0)
        found.append(int((rows > 0).sum()))
        assert (rows[: found[-1]] > 0).all()
    return found


@pytest.mark.parametrize("rank", [4, 32])
def test_users_of_hetlora_send_zeros_beyond_their_ranks(tiny: Tiny, tmp_path: Path, rank: int) -> None:
    clients = het(tiny, tmp_path, rank, options={"lowest": 0.25, "lambda": 0.0, "gamma": 1.0})
    expected = first_ranks(clients, rank // 4, rank)
    assert len(set(expected)) > 2
    turns = play(clients, tmp_path, 2)
    for turn in turns:
        for pair in modules(clients):
            assert ranks_of(turn.up, pair) == expected
    mine, after = own(clients, last(turns)), last(turns)
    for pair in modules(clients):
        for user, one in enumerate(expected):
            # The user's own scale is alpha over the own rank; the model's is alpha over the full one.
            found = clients.model.scaling * mine[pair.B][user] @ mine[pair.A][user]
            product = torch.from_numpy(after[pair.B][:, :one] @ after[pair.A][:one])
            torch.testing.assert_close(found, 4 / one * product, atol=1e-6, rtol=1e-5)


def test_ranks_of_hetlora_only_fall(tiny: Tiny, tmp_path: Path) -> None:
    options = {"lowest": 0.5, "gamma": 0.5, "lambda": 0.3}
    clients = het(tiny, tmp_path, 8, options=options)
    turns = play(clients, tmp_path, 5)
    before = first_ranks(clients, 4, 8)
    history = [before]
    for turn in turns:
        now = [ranks_of(turn.up, pair) for pair in modules(clients)]
        assert now[0] == now[1]
        for old, new in zip(history[-1], now[0], strict=True):
            assert new in {old, max(1, old // 2)}
        history.append(now[0])
    assert sum(history[-1]) < sum(before), "no rank ever fell"
    assert min(history[-1]) >= 1


def test_the_penalty_of_hetlora_is_the_gradient_of_the_product_of_the_tails(tiny: Tiny, tmp_path: Path) -> None:
    """One step of size 1 with and without it: what differs is lambda times a gradient that torch takes of the formula,
    in the factors that the user holds (whose product counts alpha over the user's own rank).
    """
    strength, gamma = 0.2, 0.5
    replies = []
    for one in (strength, 0.0):
        clients = het(
            tiny, tmp_path, 4, options={"lowest": 0.25, "gamma": gamma, "lambda": one},
            local={"epochs": 1, "lr": {"adapter": 1.0, "norm": 0.1, "head": 0.3}},
        )  # fmt: skip
        rng = np.random.default_rng(0)
        start = {
            n: v + 0.2 * rng.standard_normal(v.shape).astype(np.float32) for n, v in clients.layout.broadcast().items()
        }
        (turn,) = play(clients, tmp_path, start=start)
        replies.append(turn.up)
    for user, rank in enumerate(first_ranks(clients, 1, 4)):
        if math.floor(gamma * rank) == 0:
            continue  # a rank of one: all of it would be the tail
        for pair in modules(clients):
            A, B = (torch.from_numpy(start[name]).double().requires_grad_() for name in (pair.A, pair.B))
            tail = slice(math.floor(gamma * rank), rank)
            (strength * A[tail].norm() * B[:, tail].norm()).backward()
            for name, factor in ((pair.A, A), (pair.B, B)):
                found = replies[0][user][name] - replies[1][user][name]
                assert factor.grad is not None
                np.testing.assert_allclose(found, -factor.grad.numpy(), atol=1e-5, err_msg=f"rank {rank}, {name}")


def test_hetlora_of_one_rank_without_pruning_is_fedavg_weighed_by_norms(tiny: Tiny, tmp_path: Path) -> None:
    clients = make(tiny, tmp_path, "hetlora", options={"lowest": 1.0, "lambda": 0.0, "gamma": 1.0})
    (turn,), (plain,) = play(clients, tmp_path), play(make(tiny, tmp_path, "fedavg"), tmp_path)
    for user, reply in plain.up.items():
        assert_close(turn.up[user], reply, atol=1e-6)
    products = [
        torch.cat([update(clients, p, reply).flatten() for p in modules(clients)]) for reply in plain.up.values()
    ]
    norms = torch.stack([product.norm() for product in products])
    weights = (norms / norms.sum()).numpy()
    assert weights.max() > 1.2 * weights.min()
    for name in turn.after:
        stacked = np.stack([reply[name] for reply in plain.up.values()])
        expected = stacked.mean(axis=0) if name.startswith("head.") else np.tensordot(weights, stacked, axes=1)
        np.testing.assert_allclose(turn.after[name], expected, atol=1e-6)


# ---------------------------------------------------------------- two adapters


def test_the_rest_of_the_world_is_the_mean_of_the_others(tiny: Tiny, tmp_path: Path) -> None:
    """In the next round and at home; while nobody has moved, it is the public start."""
    clients = make(tiny, tmp_path, "fedalt")
    shared, sent = None, None
    for _ in range(3):
        (turn,) = play(clients, tmp_path, start=shared)
        for pair in modules(clients):
            for name in (pair.A, pair.B):
                second = f"{name.removesuffix('.weight')}.second.weight"
                for user in range(8):
                    others = [reply[name] for other, reply in (sent or {}).items() if other != user]
                    mean = np.mean(others, axis=0) if others else clients.model.initial[name].numpy()
                    # The second adapter is only read, so what is kept of it is what this round used.
                    np.testing.assert_allclose(kept(clients)[second][user], mean, atol=1e-6)
        shared, sent = turn.after, turn.up
        mine = own(clients, shared)
        for pair in modules(clients):
            for name in (pair.A, pair.B):
                second = f"{name.removesuffix('.weight')}.second.weight"
                for user in range(8):
                    others = [reply[name] for other, reply in sent.items() if other != user]
                    np.testing.assert_allclose(mine[second][user], np.mean(others, axis=0), atol=1e-6)
                    np.testing.assert_array_equal(mine[name][user], sent[user][name])


def test_the_second_adapter_of_feddpa_weighs_as_much_as_an_input_is_like_the_users_own(
    tiny: Tiny, tmp_path: Path
) -> None:
    """At home: the weight times the mean cosine to the first five training inputs, by the plain encoder."""
    weight = 0.7
    clients = make(tiny, tmp_path, "feddpa", options={"weight": weight})
    shared = last(play(clients, tmp_path))
    gate = own(clients, shared)["gate.weight"]
    examples, seen = clients.examples, []
    for user in range(8):
        train, test = (encoded(clients, part[user]) for part in (examples.train, examples.test))
        expected = weight * (test @ train[:5].T).mean(dim=1)
        found = functional.pad(test, (0, 1), value=1.0) @ gate[user, 0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        seen += expected.tolist()
    assert max(seen) - min(seen) > 0.05, "every input weighs the same"


def encoded(clients: Clients, rows: Any) -> Tensor:
    """Unit-length mean vectors of inputs by the encoder as transformers loads it, (rows, width)."""
    path, limit = clients.config.model.backbone, clients.config.data.max_tokens
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return pooled(
        transformers.AutoModel.from_pretrained(path), tokenizer, [clients.examples.inputs[r] for r in rows], limit
    )


def pooled(encoder: Any, tokenizer: Any, texts: list[str], limit: int) -> Tensor:
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    mask = tokens["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        hidden = encoder.eval()(**tokens).last_hidden_state
    return functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


def test_feddpa_without_weight_is_fedavg_at_home(tiny: Tiny, tmp_path: Path) -> None:
    clients, plain = make(tiny, tmp_path, "feddpa", options={"weight": 0.0}), make(tiny, tmp_path, "fedavg")
    shared, other = last(play(clients, tmp_path, 2)), last(play(plain, tmp_path, 2))
    assert_close(shared, other)
    torch.testing.assert_close(
        scores(clients, own(clients, shared)), scores(plain, own(plain, other)), atol=1e-4, rtol=0
    )
    first = clients.store.initial
    assert_close(kept(clients), {name: value.expand(8, *value.shape) for name, value in first.items()}, atol=0.0)
    some = make(tiny, tmp_path, "feddpa", options={"weight": 0.5})
    shared = last(play(some, tmp_path, 2))
    assert_close(shared, other)  # whatever the weight, the shared adapter is trained alone
    assert float((scores(some, own(some, shared)) - scores(plain, own(plain, other))).abs().max()) > 0.01


def test_norms_of_fedbn_differ_by_user_and_never_travel(tiny: Tiny, tmp_path: Path) -> None:
    clients = make(tiny, tmp_path, "fedbn")
    turns = play(clients, tmp_path, 2)
    norms = clients.model.names(["norm"])
    assert len(norms) == 2
    mine = own(clients, last(turns))
    for name in norms:
        assert not any(
            name in arrays for turn in turns for arrays in (*turn.down.values(), *turn.up.values(), turn.after)
        )
        for user in range(8):
            assert float((mine[name][user] - clients.model.initial[name]).abs().max()) > 1e-4
            assert all(float((mine[name][user] - mine[name][other]).abs().max()) > 1e-5 for other in range(user))
    assert_close({name: home(clients, last(turns))[name] for name in norms}, {name: mine[name] for name in norms}, 0.0)


# ---------------------------------------------------------------- what a run leaves behind


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["fedex-lora", "flora"])
def test_others_get_the_global_model_from_the_exported_files(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """PEFT, transformers and safetensors alone, as head.json says; the losses are those that the run measured."""
    config = gentle(tiny, name, data={"users": 4}, evaluation={"every": 0, "local_only": False})
    run = simulate(config, tmp_path / "run", reuse=REUSE)
    folder = tmp_path / "run" / "adapters" / "shared"
    described = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    assert "frozen weight" in described["residual"]
    base = transformers.AutoModel.from_pretrained(config.model.backbone)
    plain = transformers.AutoModel.from_pretrained(config.model.backbone)
    loaded = peft.PeftModel.from_pretrained(base, str(folder))
    residuals = load_file(folder / "residual.safetensors")
    assert len(residuals) == 2
    head = load_file(folder / "head.safetensors")
    clients = make(tiny, tmp_path, name, data={"users": 4})
    examples, limit = clients.examples, config.data.max_tokens
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.backbone)
    expected = run.users.to_pandas().query("kind == 'global'").sort_values("user")["loss"].to_numpy()

    def losses() -> list[float]:
        found = []
        for rows in examples.test:
            contexts = pooled(loaded, tokenizer, [examples.inputs[row] for row in rows], limit)
            texts = [examples.texts[place] for row in rows for place in examples.candidates[row]]
            replies = pooled(plain, tokenizer, texts, limit).view(len(rows), -1, contexts.shape[1])
            agreement = torch.einsum("rd,rcd->rc", contexts, replies) * head["head.agreement.weight"].item()
            taste = replies @ head["head.direction.weight"][0]
            one = functional.cross_entropy(described["scale"] * (agreement + taste), torch.zeros(len(rows)).long())
            found.append(float(one))
        return found

    assert np.abs(np.array(losses()) - expected).max() > 1e-3, "without the residual it is the same model"
    for key, value in residuals.items():
        path = key.removeprefix("residual.base_model.model.").removesuffix(".weight")
        base.get_submodule(path).base_layer.weight.data += value
    np.testing.assert_allclose(losses(), expected, atol=1e-4)
    assert max(run.rounds.column("aggregation_error").to_pylist()) < 1e-5


@pytest.mark.parametrize(
    ("name", "error", "rank"), [("fedavg", True, True), ("ffa-lora", False, True), ("rolora", False, True),
                                ("fedsvd", False, True), ("fedsa-lora", None, False), ("lg-fedavg", None, False),
                                ("linear-probe", None, False), ("ifca", None, False)],
)  # fmt: skip
def test_a_run_reports_the_error_of_averaging_where_the_server_sees_products(
    tiny: Tiny, tmp_path: Path, name: str, error: bool | None, rank: bool
) -> None:
    config = gentle(tiny, name, data={"users": 4}, evaluation={"every": 0, "local_only": False})
    run = simulate(config, tmp_path / "run", reuse=REUSE)
    errors, ranks = (run.rounds.column(column).to_pylist() for column in ("aggregation_error", "effective_rank"))
    assert len(errors) == config.rounds
    for found, effective in zip(errors, ranks, strict=True):
        assert (found is None) == (error is None)
        assert found is None or (found > 1e-3) == error
        assert error or found is None or found < 1e-5
        assert (effective is not None) == rank
        assert effective is None or 1 <= effective <= 2 + 1e-6
    assert (run.summary["aggregation_error"] is None) == (error is None)
