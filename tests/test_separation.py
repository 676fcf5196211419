"""What must not meet: noise of different runs, records of one batch, users of one name, secrets and messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import SECRET
from fedpers.config import Config, load_config, result_text
from fedpers.data import Federation, load
from fedpers.errors import ConfigError, DataError, PrivacyRefusal, RunDirectoryError
from fedpers.experiment import build_model, prepare
from fedpers.methods import PERSONAL, SHARED, Method, Phase
from fedpers.models.backbone import Backbone
from fedpers.privacy.claim import Claim
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.randomness import derive, run_keys, seed_key
from fedpers.privacy.spending import composed
from fedpers.public import export_public
from fedpers.reporting import Reporter
from fedpers.simulation import simulate
from fedpers.tasks.reply_ranking import ReplyRanking

Tiny = Callable[..., Config]
USER = {"unit": "user", "epsilon": 2.0, "clip": 0.5, "delta": 1e-3}


def moved(run: Any, start: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([(run.shared[name] - start[name]).ravel() for name in sorted(start)]).astype(np.float64)


def test_a_secret_given_twice_makes_other_noise_for_another_configuration(tiny: Tiny, tmp_path: Path) -> None:
    """Two releases with the same noise would give away the noise-free difference of their updates."""

    def run(name: str, **changes: Any) -> Any:
        return simulate(tiny(rounds=1, privacy=USER, share="head", **changes), tmp_path / name)

    still = {"local": {"lr": {"adapter": 1e-12, "head": 1e-12}}}
    one, other, other_seed = run("a", **still), run("b", **still, client_rate=0.999), run("c", **still, seed=1)
    again = run("again", **still, engine={"cohort_size": 2}, evaluation={"every": 0})
    start = {name: np.zeros_like(array) for name, array in one.shared.items()}
    start["head.agreement.weight"] += 1.0
    noises = [moved(found, start) for found in (one, other, other_seed, again)]
    norm = np.linalg.norm(noises[0])
    assert norm > 0.1
    for noise in noises[1:3]:
        assert np.linalg.norm(noise - noises[0]) > 0.8 * norm  # independent draws: about sqrt(2) times the norm
    np.testing.assert_allclose(noises[3], noises[0], atol=1e-6)  # how it is run and looked at changes no result
    addresses = [Ledger.load(found.path / "ledger.jsonl").releases[0].noise_address for found in (one, other, again)]
    assert addresses[0] != addresses[1]
    assert addresses[0] == addresses[2]


def test_the_server_has_no_key_of_the_clients_noise(tiny: Tiny) -> None:
    server, clients = run_keys(bytes.fromhex(SECRET), result_text(tiny()))
    assert server != clients
    assert SECRET not in result_text(tiny())
    assert run_keys(bytes.fromhex(SECRET), result_text(tiny(rounds=3)))[0] != server
    with pytest.raises(TypeError, match="made of str and int, not float"):
        derive(server, "user", 1.0)  # type: ignore[arg-type]


class Coupled(ReplyRanking):
    """A loss that looks at the whole batch."""

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        losses = super().loss(scores, targets)
        return losses / (1e-3 + losses.mean())


def test_a_loss_that_couples_records_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpers.experiment.find", _with_task(Coupled))
    with pytest.raises(PrivacyRefusal, match="loss changes with the other records"):
        build_model(prepare(tiny(privacy=USER)), Reporter())
    assert build_model(prepare(tiny()), Reporter())  # without a claim it is only unusual


def _with_task(task: type) -> Callable[..., Any]:
    from fedpers.registry import find

    return lambda kind, name, base: task if kind == "tasks" else find(kind, name, base)


class Normalized(nn.Module):
    """A block behind a batch normalization, as some encoder could have."""

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.block, self.norm = block, nn.BatchNorm1d(width)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        normal = self.norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.block(normal, *args, **kwargs)
        return out


@pytest.mark.parametrize("unit", ["user", "record"])
def test_batch_statistics_of_frozen_layers_do_not_couple_records(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    made = Backbone.__init__

    def with_batch_norm(self: Backbone, *given: str) -> None:
        made(self, *given)
        self.blocks[2] = Normalized(self.blocks[2], self.width).requires_grad_(False).train()

    monkeypatch.setattr(Backbone, "__init__", with_batch_norm)
    privacy = {**USER, "unit": unit}
    experiment = prepare(tiny(privacy=privacy, method="fedbabu", model={"adapter": {"layers": 1, "rank": 2}}))
    model = build_model(experiment, Reporter())
    rows = model.examples.train[0][:3]
    model.load(model.broadcast(1))
    together = model.contexts(rows, torch.zeros(3, dtype=torch.long))
    alone = model.contexts(rows[:1], torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


def test_two_users_with_one_id_are_refused() -> None:
    honest: Federation = load(load_config(None, ["data.name=synthetic", "data.users=4"]), seed_key(0))
    object.__setattr__(honest, "users", (honest.users[0], *honest.users[:3]))
    with pytest.raises(DataError, match="would get the same noise"):
        honest.check()


def test_a_phase_may_name_its_groups_in_any_order(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forwards(Method):
        """FedAvg in this file: another file would get other noise."""

        scopes = {"adapter": SHARED, "head": SHARED}
        round = (Phase("adapter", "head"),)

    class Backwards(Method):
        """FedAvg with its groups named the other way round."""

        scopes = {"adapter": SHARED, "head": SHARED}
        round = (Phase("head", "adapter"),)

    class KeepsAdapter(Method):
        """A personal adapter under a shared head."""

        scopes = {"adapter": PERSONAL, "head": SHARED}
        round = (Phase("head", "adapter"),)

    privacy = {**USER, "unit": "record"}
    from fedpers.registry import find

    methods: dict[str, type[Method]] = {"fedavg": Forwards, "fedper": KeepsAdapter}
    monkeypatch.setattr("fedpers.experiment.find", lambda kind, name, base: methods.get(name) or find(kind, name, base))
    plain = simulate(tiny(method="fedavg", privacy=privacy), tmp_path / "plain")
    methods["fedavg"] = Backwards
    turned = simulate(tiny(method="fedavg", privacy=privacy), tmp_path / "turned")
    for name, array in plain.shared.items():
        np.testing.assert_allclose(turned.shared[name], array, atol=1e-6)
    with pytest.raises(PrivacyRefusal, match="the personal adapter is trained without noise"):
        prepare(tiny(method="fedper", privacy=privacy))


def test_no_error_shows_the_secret(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    cases = {
        f"privacy: {{unit: user, secret: {SECRET}}}": (),
        f"privacy: {SECRET}": (),
        f"privacy: {{secret: [{SECRET}]}}": (),
        f"privacy: {{secret: {SECRET}, unit: [": (),
        "rounds: 1": (f"privacy.secret=[{SECRET}", f"privacy={SECRET}", f"privacy.secret.x={SECRET}"),
    }
    for text, overrides in cases.items():
        file.write_text(text)
        for override in overrides or (None,):
            with pytest.raises(ConfigError) as caught:
                load_config(file, [override] if override else [])
            chain: BaseException | None = caught.value
            while chain is not None:
                assert SECRET[:12] not in str(chain), text
                chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)


def test_an_export_copies_named_files_only_and_no_local_path(tiny: Tiny, tmp_path: Path) -> None:
    run = simulate(tiny(privacy=USER), tmp_path / "run")
    (run.path / "adapters" / "personal").mkdir()
    (run.path / "adapters" / "personal" / "user.safetensors").write_bytes(b"PLANTED")
    (run.path / "adapters" / "shared" / "notes.txt").write_bytes(b"PLANTED")
    export_public(run.path, tmp_path / "public")
    exported = b"".join(f.read_bytes() for f in (tmp_path / "public").rglob("*") if f.is_file())
    assert b"PLANTED" not in exported
    assert str(Path(run.config.model.backbone).parent).encode() not in exported
    assert Path(run.config.model.backbone).name.encode() in exported
    assert run.path.stat().st_mode & 0o777 == 0o700


def test_the_claim_counts_the_other_runs_of_its_picture(tiny: Tiny, tmp_path: Path) -> None:
    picture = {"methods": ["fedavg"], "epsilons": ["inf", 1]}
    run = simulate(tiny(method="fedavg", privacy=USER, frontier=picture), tmp_path / "run")
    ledgers = [
        Ledger.load(tmp_path / "run" / "ledger.jsonl"),
        Ledger.load(tmp_path / "run/frontier/fedavg-eps-1/ledger.jsonl"),
    ]
    together = composed(ledgers)
    assert run.claim.epsilon < together < run.claim.epsilon + 1.0
    (said,) = [text for text in run.claim.excluded if "further runs" in text]
    assert said.startswith("2 further runs on the same people for the picture, 1 of them without any privacy")
    assert f"promise ε = {together:.1f}"[:-2] in said
    assert Claim.from_json((run.path / "claim.json").read_text()) == run.claim


def test_a_secret_written_into_the_configuration_later_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    fresh = tiny(privacy={**USER, "secret": None})
    run = simulate(fresh, tmp_path / "run")
    secret = (run.path / "private" / "secret").read_text().strip()
    (run.path / "summary.json").unlink()
    with pytest.raises(RunDirectoryError, match="not started with this"):
        simulate(tiny(privacy={**USER, "secret": secret}), tmp_path / "run", resume=True)
    assert simulate(fresh, tmp_path / "run", resume=True).claim == run.claim
