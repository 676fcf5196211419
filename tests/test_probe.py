"""The probe finds nothing wrong with any method under any guarantee that is offered for it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpers.audit.bench import Bench, flat, slice_of
from fedpers.audit.bounds import Finding
from fedpers.audit.probe import probe, violations
from fedpers.audit.recount import recount
from fedpers.config import Config
from fedpers.errors import ConfigError, PrivacyRefusal
from fedpers.experiment import method_plan
from fedpers.guarantees import guarantees
from fedpers.privacy.accounting import GaussianEvent, epsilon, gaussian_epsilon
from fedpers.privacy.ledger import Ledger
from fedpers.registry import names

Tiny = Callable[..., Config]
USER = {"unit": "user", "epsilon": 8, "delta": 1e-4, "clip": 0.05}
RECORD = {"unit": "record", "epsilon": 8, "delta": 1e-4, "clip": 0.05}
TRUSTS: dict[str, dict[str, Any]] = {
    "record-local": {"privacy": RECORD},
    "user-central": {"privacy": USER, "client_rate": 0.5},
    "user-distributed": {
        "privacy": {**USER, "trust": "user-distributed"}, "client_rate": 0.5, "client_sampling": "fixed"
    },
    "user-local": {"privacy": {**USER, "trust": "user-local"}, "client_rate": 0.5},
}  # fmt: skip
MECHANISMS: dict[str, dict[str, Any]] = {
    "fixed": {"privacy": USER, "client_rate": 0.5, "client_sampling": "fixed"},
    "cyclic": {"privacy": USER, "client_rate": 0.5, "client_sampling": "cyclic"},
    "banded": {"privacy": {**USER, "mechanism": "banded"}, "client_rate": 0.5, "client_sampling": "cyclic"},
    "banded, everyone": {"privacy": {**USER, "mechanism": "banded", "bands": 3}},
    "adaptive": {"privacy": {**USER, "adaptive": {"bit_noise": 5}}, "client_rate": 0.5},
    "per-layer, user": {"privacy": {**USER, "clipping": "per-layer"}, "client_rate": 0.5},
    "per-layer, record": {"privacy": {**RECORD, "clipping": "per-layer"}},
    "signal": {"privacy": {**USER, "schedule": "signal"}, "client_rate": 0.5, "rounds": 6},
    "budget": {"privacy": {**USER, "noise_multiplier": 1.5, "stop": "budget"}, "client_rate": 0.5},
    "forecast": {"privacy": {**USER, "population": 1000}, "client_rate": 0.5},
    "FedAdam": {"privacy": USER, "client_rate": 0.5, "server": {"strategy": "FedAdam"}},
    "joint, one phase": {"method": "fedper", "privacy": {**RECORD, "head": "joint"}},
    "joint, two phases": {"method": "fedrep", "privacy": {**RECORD, "head": "joint"}},
    "frozen": {"method": "fedrep", "privacy": {**RECORD, "head": "frozen"}},
    "split-dp": {"method": "fedrep", "privacy": {**RECORD, "head": "split-dp"}},
    "split, user": {"method": "fedrep", "privacy": {**USER, "head": "split"}, "client_rate": 0.5},
    "no clipping in sight": {"privacy": {**RECORD, "clip": 1e6}},
    "joint, B at home": {"method": "fedsa-lora", "privacy": {**RECORD, "head": "joint"}},
    "joint, adapter at home": {"method": "lg-fedavg", "privacy": {**RECORD, "head": "joint"}},
    "joint, norm at home": {"method": "fedbn", "privacy": {**RECORD, "head": "joint"}},
    "joint, second adapter, alone": {"method": "feddpa", "privacy": {**RECORD, "head": "joint"}},
    "joint, second adapter, in the same steps": {"method": "sdflora", "privacy": {**RECORD, "head": "joint"}},
    "three models": {"method": "ifca", "options": {"clusters": 3}, "privacy": USER, "client_rate": 0.5},
    "companions, per-layer": {"method": "scaffold", "privacy": {**USER, "clipping": "per-layer"}},
    "companions, banded": {"method": "scaffold", "privacy": {**USER, "mechanism": "banded", "bands": 3}},
    "turns, adaptive": {"method": "rolora", "privacy": {**USER, "adaptive": {"bit_noise": 5}}, "client_rate": 0.5},
    "turns, signal": {"method": "rolora", "privacy": {**USER, "schedule": "signal"}, "client_rate": 0.5, "rounds": 6},
    "turns, momentum": {"method": "rolora", "privacy": USER, "client_rate": 0.5, "server": {"strategy": "FedAdam"}},
}
# Where clients add the noise these go through the same lines as a method of their kind that is probed there.
ALIKE = {
    "fedavg", "fedavg-finetune", "linear-probe", "ditto", "fedprox", "fedit", "ffa-lora", "fedsvd", "fedsa-lora",
    "fedrep", "fedbn", "lg-fedavg", "hydra", "per-fedavg", "reptile",
}  # fmt: skip
PERMITTED = {mode.trust: mode.methods for mode in guarantees(names("methods"))}


def setup(tiny: Tiny, **changes: Any) -> Config:
    steps = {"batch_size": 4, "lr": {"adapter": 0.5, "head": 0.5}}
    return tiny(**{"rounds": 3, "local": steps, "personal": {"groups": "adapter+head"}, **changes})


def check(config: Config) -> list[Finding]:
    found = probe(config)
    assert violations(found) == []
    assert found
    return found


@pytest.mark.parametrize(
    ("method", "trust"),
    [
        (method, trust)
        for method in names("methods")
        for trust in TRUSTS
        if trust in {"record-local", "user-central"} or method not in ALIKE
    ],
)
def test_every_method_under_every_guarantee(tiny: Tiny, method: str, trust: str) -> None:
    config = setup(tiny, method=method, **TRUSTS[trust])
    if method not in PERMITTED[trust]:  # type: ignore[index]
        with pytest.raises(PrivacyRefusal, match=rf"method '{method}' .*refused"):
            probe(config)
        return
    found = check(config)
    plan = method_plan(method, config)
    if not plan.shared:
        return
    unit = "record" if trust == "record-local" else "user"
    kinds = {f"sensitivity of one {unit}", "noise", "fresh noise", "accounting"}
    assert kinds <= {finding.name for finding in found}
    if unit == "record":  # each noised phase is looked at, also one that rests in some rounds
        looked_at = [finding for finding in found if finding.name == "sensitivity of one record"]
        assert len(looked_at) == sum(map(plan.protected, plan.round)) > 0
        assert "steps on the ledger" in {finding.name for finding in found}


def test_what_the_probe_looks_at_is_what_may_run() -> None:
    """By hand, so that neither the table nor the refusals can lose a method unseen."""
    all_but = {
        "record-local": "centralized fedala fedalt fedbn fedper fedrep fedsa-lora flora hetlora hydra ifca lg-fedavg "
        "pfedme sdflora",
        "user-central": "centralized fedalt fedex-lora flora hetlora sdflora",
        "user-distributed": "centralized fedalt fedex-lora flora hetlora sdflora",
        "user-local": "centralized fedalt flora hetlora",
    }
    known = set(names("methods"))
    for trust, refused in all_but.items():
        assert known - set(PERMITTED[trust]) == set(refused.split()), trust  # type: ignore[index]
    assert set(PERMITTED["none"]) == known


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism(tiny: Tiny, name: str) -> None:
    check(setup(tiny, **MECHANISMS[name]))


def test_banded_noise_and_turns_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="from round to round"):
        probe(setup(tiny, method="rolora", privacy={**USER, "mechanism": "banded", "bands": 3}))


def test_the_bound_is_reached_so_a_looser_one_would_show(tiny: Tiny) -> None:
    for trust in ("record-local", "user-central"):
        found = {one.name: one for one in probe(setup(tiny, method="fedavg", **TRUSTS[trust]))}
        unit = "record" if trust == "record-local" else "user"
        assert found[f"sensitivity of one {unit}"].empirical == pytest.approx(1, abs=1e-3)


def test_taking_a_user_away_changes_no_other_reply(tiny: Tiny, tmp_path: Path) -> None:
    bench = Bench(slice_of(setup(tiny, **TRUSTS["user-central"])), tmp_path)
    start = bench.start()
    everyone = bench.rounds(bench.clients(), 1, start=start).replies[0]
    gone = sorted(everyone)[0]
    less = bench.rounds(bench.clients(world=bench.without(gone)), 1, start=start).replies[0]
    assert set(less) == set(everyone)
    assert np.linalg.norm(flat(less[gone]) - flat(start)) == 0
    for user in set(everyone) - {gone}:
        np.testing.assert_allclose(flat(less[user]), flat(everyone[user]), atol=1e-6)


def test_the_second_count_reads_the_file_and_knows_the_right_number(tiny: Tiny, tmp_path: Path) -> None:
    bench = Bench(slice_of(setup(tiny, **TRUSTS["user-central"])), tmp_path)
    bench.rounds(bench.clients(), 3)
    (found,) = recount(bench.ledger)
    line = json.loads(bench.ledger.path.read_text().splitlines()[1])
    exact = epsilon([GaussianEvent(line["noise_multiplier"], 0.5, 3)], 1e-4)
    assert exact - 0.03 < found.empirical <= found.claimed == exact
    bench = Bench(slice_of(setup(tiny, **TRUSTS["user-local"])), tmp_path / "local")
    (tmp_path / "local").mkdir()
    bench.rounds(bench.clients(), 3)
    (found,) = recount(bench.ledger)
    counts = np.bincount([u for one in bench.ledger.releases for u in one.clients or ()])
    z = bench.ledger.releases[0].noise_multiplier
    assert found.claimed == pytest.approx(gaussian_epsilon(2 * math.sqrt(counts.max()) / z, 1e-4))
    assert found.empirical == pytest.approx(found.claimed, rel=1e-6)


def test_a_ledger_with_a_line_less_is_not_counted(tiny: Tiny, tmp_path: Path) -> None:
    bench = Bench(slice_of(setup(tiny, **TRUSTS["user-central"])), tmp_path)
    bench.rounds(bench.clients(), 3)
    lines = bench.ledger.path.read_text().splitlines(keepends=True)
    bench.ledger.path.write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(Exception, match="removed or moved"):
        Ledger.load(bench.ledger.path)


@pytest.mark.slow
def test_on_the_real_encoder_and_real_people() -> None:
    from fedpers.config import load_config

    config = load_config(Path(__file__).parent.parent / "configs" / "quickstart.yaml", ["frontier=null"])
    found = probe(config)
    assert violations(found) == []
    assert {one.name for one in found} >= {"sensitivity of one user", "one user at the broadcast", "fresh noise"}
