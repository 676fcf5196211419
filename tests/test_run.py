"""A finished run: what its directory holds, what it reproduces, what of it may be shown, and the frontier picture."""

from __future__ import annotations

import json
import platform
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from conftest import SECRET
from fedpers import frontier, simulation
from fedpers.config import Config
from fedpers.errors import ConfigError, LedgerError, RunDirectoryError
from fedpers.experiment import Experiment, Reuse, build_model, prepare
from fedpers.privacy.claim import Claim
from fedpers.privacy.ledger import Ledger
from fedpers.public import export_public
from fedpers.reporting import Reporter
from fedpers.run_directory import RunDirectory
from fedpers.simulation import Run, load, simulate

pytestmark = pytest.mark.pictures

USER = {"unit": "user", "epsilon": 8, "delta": 1e-3, "clip": 1.0}
FEDPER: dict[str, Any] = {"method": "fedper", "privacy": USER, "engine": {"threads": 1}}
PLAIN: dict[str, Any] = {"rounds": 1, "engine": {"threads": 1}, "evaluation": {"every": 0}}
KINDS = {"own", "global", "local", "zero_shot", "swap"}
REPRODUCED = ("users.parquet", "rounds.parquet", "ledger.jsonl", "claim.json", "config.yaml", "environment.json")


class Shelf:
    """Runs of this file, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.reuse = folder, dict[str, Run](), Reuse()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def made(tiny: Callable[..., Config], shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Return a function that makes a run by its name, or returns the one that was made; figures only where asked."""

    def make(name: str, settings: dict[str, Any], figures: bool = False, alone: bool = False) -> Run:
        if name not in shelf.runs:
            with monkeypatch.context() as patch:
                if not figures:
                    patch.setattr(simulation, "learning_curve", lambda *args, **options: None)
                    patch.setattr(simulation, "per_user_gain", lambda *args, **options: None)
                shelf.runs[name] = simulate(
                    tiny(**settings), shelf.folder / name, reuse=Reuse() if alone else shelf.reuse
                )
        return shelf.runs[name]

    return make


@pytest.fixture
def fedper(made: Callable[..., Run]) -> Run:
    return made("fedper", FEDPER, figures=True)


def with_secret(secret: str | None, settings: dict[str, Any] = FEDPER) -> dict[str, Any]:
    return {**settings, "privacy": {**settings.get("privacy", {}), "secret": secret}}


def tree(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def reproduced(path: Path) -> dict[str, bytes]:
    """What must be the same for the same seed, secret and thread count."""
    everything = tree(path)
    return {
        name: data
        for name, data in everything.items()
        if name in REPRODUCED or name.startswith("adapters/") or name.endswith(".npy")
    }


def differing(one: Path, other: Path) -> set[str]:
    first, second = reproduced(one), reproduced(other)
    assert first.keys() == second.keys()
    return {name for name in first if first[name] != second[name]}


# --- the directory ----------------------------------------------------------------------------------------------------


def test_the_directory_holds_what_it_should_and_nothing_else(fedper: Run) -> None:
    names = {name for name in tree(fedper.path) if not name.startswith(("private/", "figures/", "adapters/"))}
    assert names == {*REPRODUCED, "summary.json", "timing.jsonl"}
    assert {item.name for item in (fedper.path / "adapters").iterdir()} == {"shared"}
    figures = {item.name for item in (fedper.path / "figures").iterdir()}
    names = ("gain_over_global", "learning_curve")
    assert figures == {f"{name}.{kind}" for name in names for kind in ("png", "svg", "pdf")}
    assert (fedper.path / "figures" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (fedper.path / "figures" / "gain_over_global.svg").read_bytes()


def test_what_is_private_is_closed_to_others(fedper: Run) -> None:
    private = fedper.path / "private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert stat.S_IMODE((private / "secret").stat().st_mode) == 0o600
    assert {item.name for item in private.iterdir()} == {
        "secret", "secret-given", "checkpoint.safetensors", "members.json", "rounds", "own", "local",
    }  # fmt: skip
    elsewhere = {name for name in tree(fedper.path) if not name.startswith("private/")}
    assert not any(name.endswith(".npy") for name in elsewhere)


def test_the_written_configuration_is_resolved_and_holds_no_secret(fedper: Run) -> None:
    text = (fedper.path / "config.yaml").read_text()
    stored = yaml.safe_load(text)
    assert stored["method"] == "fedper"
    assert stored["personal"]["l2"] == 0.01  # a default that nobody wrote down
    assert "secret" not in text
    assert not any(SECRET.encode() in data for name, data in tree(fedper.path).items() if name != "private/secret")


def test_the_environment_names_versions_but_no_place_person_or_date(fedper: Run) -> None:
    text = (fedper.path / "environment.json").read_text()
    found = json.loads(text)
    assert found.keys() == {"fedpers", "python", "system", "machine", "threads", "device", "packages"}
    assert (found["threads"], found["device"]) == (1, "cpu")
    assert {"torch", "flwr", "opacus", "dp-accounting"} <= found["packages"].keys()
    assert "/" not in text
    assert not re.search(r"\d{4}-\d{2}-\d{2}", text)
    assert f'"{platform.node()}"' not in text


def test_the_summary_has_the_named_fields(fedper: Run) -> None:
    summary = json.loads((fedper.path / "summary.json").read_text())
    assert summary == fedper.summary
    named = {
        "name", "task", "method", "users", "rounds", "claim", "metrics", "helped", "tied", "harmed", "p_value",
        "bytes_up", "bytes_down", "seconds",
    }  # fmt: skip
    assert named <= summary.keys()
    assert summary["metrics"].keys() == KINDS
    assert all({"mean", "ci95", "worst_decile"} <= one.keys() for one in summary["metrics"].values())
    assert (summary["users"], summary["rounds"]) == (8, 2)
    sent = 4 * sum(array.size for array in fedper.shared.values())
    assert summary["bytes_up"] == summary["bytes_down"] == sent * 8 * 2  # every user in both rounds
    assert summary["helped"] + summary["tied"] + summary["harmed"] <= 8
    assert summary["claim"] == fedper.claim.label()
    own = fedper.users.to_pandas().query("kind == 'own'")["accuracy"]
    assert summary["metrics"]["own"]["mean"] == pytest.approx(own.mean())


def test_pandas_reads_the_tables(fedper: Run) -> None:
    users = pd.read_parquet(fedper.path / "users.parquet")
    assert len(users) == 8 * 5
    assert set(users["kind"]) == KINDS
    assert (users.groupby("user")["kind"].nunique() == 5).all()
    assert users[["accuracy", "mrr"]].to_numpy().min() >= 0
    assert users[["accuracy", "mrr"]].to_numpy().max() <= 1
    rounds = pd.read_parquet(fedper.path / "rounds.parquet")
    assert rounds["round"].tolist() == [1, 2]
    assert rounds["epsilon"].is_monotonic_increasing
    assert rounds["epsilon"].iloc[-1] == pytest.approx(fedper.claim.epsilon)
    assert rounds[["train_loss", "noise_adapter", "signal_adapter", "global_accuracy"]].notna().all(axis=None)
    assert not any("time" in name or "second" in name for name in rounds)


def test_the_last_learning_curve_point_is_the_users_table(fedper: Run) -> None:
    users = fedper.users.to_pandas().groupby("kind")["accuracy"].mean()
    last = fedper.rounds.to_pandas().iloc[-1]
    assert last["global_accuracy"] == pytest.approx(users["global"])
    assert last["own_accuracy"] == pytest.approx(users["own"])  # fedper does not train after the last round


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_peft_loads_the_shared_adapter(fedper: Run, random_tiny_bert: Path) -> None:
    import peft
    import transformers

    place = fedper.path / "adapters" / "shared"
    model = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(random_tiny_bert), str(place))
    loaded = {name.replace(".default", ""): value.numpy() for name, value in model.state_dict().items()}
    adapter = {name: array for name, array in fedper.shared.items() if not name.startswith("head.")}
    assert adapter
    for name, array in adapter.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert any(array.any() for name, array in adapter.items() if "lora_B" in name)  # it was trained


def test_the_claim_and_the_ledger_belong_together(fedper: Run) -> None:
    ledger = Ledger.load(fedper.path / "ledger.jsonl")
    claim = Claim.from_json((fedper.path / "claim.json").read_text())
    assert claim == fedper.claim
    assert claim.ledger_head == ledger.head
    assert (claim.unit, claim.rounds, len(ledger)) == ("user", 2, 3)
    assert claim.epsilon <= 8


def test_wall_times_are_in_a_file_of_their_own(fedper: Run) -> None:
    lines = [json.loads(line) for line in (fedper.path / "timing.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines] == ["round 1", "round 2", "run"]
    assert fedper.summary["seconds"] == lines[-1]["seconds"]


# --- what is reproduced -----------------------------------------------------------------------------------------------


def test_the_same_seed_and_secret_give_the_same_bytes(fedper: Run, made: Callable[..., Run]) -> None:
    again = made("again", FEDPER, figures=True, alone=True)
    assert differing(fedper.path, again.path) == set()
    assert tree(fedper.path / "figures") == tree(again.path / "figures")


@pytest.mark.slow
def test_two_threads_reproduce_too(made: Callable[..., Run]) -> None:
    settings = {**FEDPER, "engine": {"threads": 2}, "client_rate": 0.6}
    one, other = (made(name, settings, alone=True) for name in ("two-threads", "two-threads-again"))
    assert differing(one.path, other.path) == set()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedbabu", "fedavg-finetune"])
def test_record_level_reproduces_too(method: str, made: Callable[..., Run]) -> None:
    privacy = {"unit": "record", "epsilon": 8, "delta": 1e-3, "clip": 1.0, "record_rate": 0.5}
    settings = {**PLAIN, "method": method, "privacy": privacy}
    one, other = (made(f"{method}-{number}", settings, alone=True) for number in (1, 2))
    assert differing(one.path, other.path) == set()


def test_another_secret_changes_what_is_released_but_not_the_data(
    fedper: Run, made: Callable[..., Run], tiny: Callable[..., Config], shelf: Shelf
) -> None:
    other = made("other-secret", with_secret("ab" * 32))
    changed = differing(fedper.path, other.path)
    assert "config.yaml" not in changed
    assert {"ledger.jsonl", "adapters/shared/adapter_model.safetensors", "users.parquet"} <= changed
    assert any(name.startswith("private/rounds/head.") for name in changed)
    releases = (Ledger.load(run.path / "ledger.jsonl").releases for run in (fedper, other))
    for before, after in zip(*releases, strict=True):
        assert before.noise_address != after.noise_address
        assert before.release_hash != after.release_hash
        assert before.noise_multiplier == after.noise_multiplier
    # Splits, candidates and the initial model do not depend on the secret, so the untrained model is equally right.
    columns = ["user", "test_records", "train_records", "accuracy", "mrr", "loss"]
    tables = [run.users.to_pandas().query("kind == 'zero_shot'")[columns] for run in (fedper, other)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    examples = [prepare(tiny(**with_secret(secret))).examples for secret in (SECRET, "ab" * 32)]
    assert examples[0].ids == examples[1].ids
    np.testing.assert_array_equal(examples[0].candidates, examples[1].candidates)
    for part in ("train", "test"):
        pairs = zip(*(getattr(one, part) for one in examples), strict=True)
        assert all(np.array_equal(first, second) for first, second in pairs)


def test_another_seed_changes_the_initial_model(tiny: Callable[..., Config], shelf: Shelf) -> None:
    first, same, other = (
        build_model(prepare(tiny(**{**FEDPER, "seed": seed})), Reporter()).initial for seed in (0, 0, 1)
    )
    factors = [name for name in first if "lora_A" in name]
    assert factors
    for name in factors:
        assert first[name].equal(same[name])
        assert not first[name].equal(other[name])


def test_a_fresh_secret_is_kept_and_replays_the_run(fedper: Run, made: Callable[..., Run]) -> None:
    fresh, second = (made(name, with_secret(None, {**FEDPER, "rounds": 1})) for name in ("fresh", "fresh-2"))
    kept = (fresh.path / "private" / "secret").read_text().strip()
    assert re.fullmatch("[0-9a-f]{64}", kept)
    assert kept != (second.path / "private" / "secret").read_text().strip()
    assert "adapters/shared/adapter_model.safetensors" in differing(fresh.path, second.path)
    replayed = made("replayed", with_secret(kept, {**FEDPER, "rounds": 1}))
    assert differing(fresh.path, replayed.path) == {"ledger.jsonl", "claim.json"}  # both say where the secret is from
    hashes = [[r.release_hash for r in Ledger.load(run.path / "ledger.jsonl").releases] for run in (fresh, replayed)]
    assert hashes[0] == hashes[1]


def test_the_claim_says_who_knows_a_given_secret(fedper: Run, made: Callable[..., Run]) -> None:
    fresh = made("fresh", with_secret(None, {**FEDPER, "rounds": 1}))
    assert fedper.claim.secret == "given in the configuration"
    assert any("whoever reads the configuration" in one for one in fedper.claim.not_protected_against)
    assert "whoever reads the configuration" in fedper.claim.sentence
    assert fresh.claim.secret == "kept by the simulator"
    assert "whoever reads the configuration" not in fresh.claim.sentence


# --- the methods' ends ------------------------------------------------------------------------------------------------


def test_fedavg_has_nothing_personal_to_swap(made: Callable[..., Run]) -> None:
    run = made("fedavg", {**PLAIN, "method": "fedavg"})
    assert run.summary["metrics"].keys() == KINDS - {"swap"}
    users = run.users.to_pandas().set_index("user")
    own, everyones = (users[users["kind"] == kind]["accuracy"] for kind in ("own", "global"))
    assert own.equals(everyones)
    assert not (run.path / "private" / "own").exists()


def test_local_releases_nothing(made: Callable[..., Run]) -> None:
    run = made("local", {**PLAIN, "method": "local"})
    assert run.claim.epsilon == 0
    assert run.claim.rounds == run.summary["rounds"] == run.summary["bytes_up"] == 0
    assert run.shared == {}
    assert not (run.path / "adapters").exists()
    assert run.rounds.num_rows == 0
    users = run.users.to_pandas().set_index("user")
    assert users[users["kind"] == "own"]["accuracy"].equals(users[users["kind"] == "local"]["accuracy"])


# --- export -----------------------------------------------------------------------------------------------------------


def test_an_export_holds_nothing_private(fedper: Run, tmp_path: Path) -> None:
    copied = export_public(fedper.path, tmp_path / "public")
    exported = tree(tmp_path / "public")
    plain = {"config.yaml", "environment.json", "claim.json", "ledger.jsonl"}
    assert {name for name in copied if "/" not in name} == plain
    assert {name for name in exported if "/" not in name} == plain
    assert {name for name in exported if "/" in name} == {
        f"adapters/shared/{name}"
        for name in ("adapter_config.json", "adapter_model.safetensors", "head.json", "head.safetensors")
    }
    everything = b"\n".join(exported.values())
    assert (fedper.path / "adapters/shared/adapter_model.safetensors").read_bytes() in everything  # the search works
    assert SECRET.encode() not in everything
    assert bytes.fromhex(SECRET) not in everything
    searched = 0
    for array in (fedper.path / "private").rglob("*.npy"):
        if array.name == "written.npy":
            continue
        for row in np.load(array):
            if row.any() and "lora_A" not in array.name:
                searched += 1
                assert row.tobytes() not in everything
    assert searched > 8
    for number in fedper.users.to_pandas().query("kind == 'own'")["loss"]:
        assert repr(number).encode() not in everything
        assert np.float64(number).tobytes() not in everything
    assert b"accuracy" not in everything
    assert b"-user-0" not in everything  # ids of users


def test_an_export_refuses_what_is_not_finished_and_what_is_not_empty(fedper: Run, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no finished run"):
        export_public(tmp_path / "nothing", tmp_path / "public")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for name in ("config.yaml", "claim.json", "ledger.jsonl"):
        (unfinished / name).write_bytes((fedper.path / name).read_bytes())
    with pytest.raises(RunDirectoryError, match="no finished run"):
        export_public(unfinished, tmp_path / "public")
    assert not (tmp_path / "public").exists()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    for target in (taken, taken / "mine"):
        with pytest.raises(RunDirectoryError, match="not an empty directory"):
            export_public(fedper.path, target)
    assert tree(taken) == {"mine": b"mine"}


def test_a_method_that_shares_nothing_exports_no_adapters(made: Callable[..., Run], tmp_path: Path) -> None:
    export_public(made("local", {**PLAIN, "method": "local"}).path, tmp_path / "public")
    assert set(tree(tmp_path / "public")) == {"config.yaml", "environment.json", "claim.json", "ledger.jsonl"}


def test_a_finished_run_is_read_back(fedper: Run, tmp_path: Path) -> None:
    found = load(fedper.path, fedper.config)
    assert (found.claim, found.summary) == (fedper.claim, fedper.summary)
    with pytest.raises(RunDirectoryError, match="holds another run"):
        simulate(fedper.config, fedper.path)


def test_a_directory_that_was_taken_meanwhile_is_not_joined(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out, prepared = tiny(), tmp_path / "run", simulation.prepare

    def slow(*given: Any) -> Experiment:
        RunDirectory.create(out, config)  # another process was faster
        return prepared(*given)

    monkeypatch.setattr(simulation, "prepare", slow)
    with pytest.raises(RunDirectoryError, match="holds another run"):
        simulate(config, out)
    assert not (out / "ledger.jsonl").exists()


# --- the frontier -----------------------------------------------------------------------------------------------------

RECORD = {"unit": "record", "epsilon": 4, "delta": 1e-3, "clip": 1.0, "record_rate": 1.0}
FRONTIER = {**PLAIN, "method": "fedbabu", "privacy": RECORD}


def test_every_cell_of_the_frontier_is_drawn_or_refused(
    made: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[frontier.FrontierCell] = []
    draw = frontier.frontier
    monkeypatch.setattr(frontier, "frontier", lambda cells, *rest: [drawn.extend(cells), draw(cells, *rest)][1])
    methods, epsilons = ["fedbabu", "fedrep"], [4, "inf"]
    run = made("frontier", {**FRONTIER, "frontier": {"methods": methods, "epsilons": epsilons}})
    folder = run.path / "frontier"
    refused = json.loads((folder / "refused.json").read_text())
    assert refused.keys() == {"fedrep-eps-4"}
    assert "Three sound ways out" in refused["fedrep-eps-4"]
    ran = {item.name for item in folder.iterdir() if item.is_dir()}
    assert ran == {"fedbabu-eps-inf", "fedrep-eps-inf"}  # fedbabu at 4 is the run itself
    found = {(cell.method, cell.epsilon): cell for cell in drawn}
    assert found.keys() == {("fedbabu", run.claim.epsilon), ("fedbabu", np.inf), ("fedrep", np.inf)}
    assert found["fedbabu", run.claim.epsilon].own[0] == run.summary["metrics"]["own"]["mean"]
    secrets = {(run.path / "private" / "secret").read_text()}
    for name in ran:
        summary = json.loads((folder / name / "summary.json").read_text())
        assert "no privacy" in summary["claim"]
        cell = found[summary["method"], np.inf]
        assert cell.own[0] == summary["metrics"]["own"]["mean"]
        assert cell.global_[0] == summary["metrics"]["global"]["mean"]
        assert stat.S_IMODE((folder / name / "private").stat().st_mode) == 0o700
        secrets.add((folder / name / "private" / "secret").read_text())
    assert len(secrets) == 3  # no noise is used for two releases
    for kind in ("png", "svg"):
        assert (run.path / "figures" / f"frontier.{kind}").stat().st_size > 1000


def test_clipping_without_noise_is_not_drawn_as_no_privacy(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At epsilon infinity the picture shows runs without clipping, also where the main run clips."""
    monkeypatch.setattr(frontier, "frontier", lambda *args: [])
    metric = {"mean": 0.5, "ci95": [0.4, 0.6]}
    outcome: Any = (
        SimpleNamespace(epsilon=np.inf, trust="none"),
        {"metrics": dict.fromkeys(("own", "global", "local", "zero_shot"), metric)},
        None,
    )
    for clip, expected in ((1.0, ["fedbabu-eps-inf"]), (None, [])):
        config = tiny(
            method="fedbabu", privacy={"clip": clip}, frontier={"methods": ["fedbabu"], "epsilons": ["inf"]}
        )  # fmt: skip
        ran: list[str] = []

        def run(cell: Config, path: Path, ran: list[str] = ran) -> Any:
            assert cell.privacy.clip is None
            ran.append(path.name)
            return outcome

        frontier.draw(config, tmp_path, outcome, {}, run)
        assert ran == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"local_only": False}}, r"evaluation\.local_only"),
        ({"rounds": 0}, "rounds"),
        ({"frontier": {"methods": ["local"], "epsilons": [4]}}, "shares nothing"),
        ({"frontier": {"methods": ["fedbabo"], "epsilons": [4]}}, "did you mean 'fedbabu'"),
        ({"privacy": {"unit": "none", "epsilon": "inf"}}, r"finite values need privacy\.unit"),
    ],
)
def test_a_frontier_that_cannot_be_drawn_is_refused_before_training(
    changes: dict[str, Any], message: str, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**FRONTIER, "frontier": {"methods": ["fedbabu"], "epsilons": [4]}}
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=message):
        simulate(tiny(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_empty_frontier_is_not_a_configuration(tiny: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"frontier\.methods"):
        tiny(frontier={"methods": [], "epsilons": [4]})


@pytest.mark.parametrize("edit", ["cut", "rewritten claim"])
def test_a_finished_run_whose_ledger_was_touched_shows_no_claim(
    made: Callable[..., Run], tiny: Callable[..., Config], tmp_path: Path, edit: str
) -> None:
    settings = {"rounds": 2, "privacy": {"unit": "user", "epsilon": 8, "delta": 1e-3, "clip": 0.1}}
    config, run, copy = tiny(**settings), made("touched", settings), tmp_path / "run"
    shutil.copytree(run.path, copy)
    assert simulate(config, copy, resume=True).claim == run.claim
    ledger, claim = copy / "ledger.jsonl", copy / "claim.json"
    if edit == "cut":
        ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    else:
        claim.write_text(claim.read_text().replace(f'"epsilon": {run.claim.epsilon}', '"epsilon": 0.5'))
    with pytest.raises(LedgerError, match=r"restore|Restore"):
        simulate(config, copy, resume=True)
    with pytest.raises(LedgerError):
        export_public(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
