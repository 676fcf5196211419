"""The command line: what it prints, what it refuses and how, and that a refusal writes nothing."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from conftest import SECRET, Command
from fedpers.config import Config, dump_config, load_config
from fedpers.data.base import Federation, Source
from fedpers.data.synthetic import Synthetic
from fedpers.errors import ConfigError
from fedpers.experiment import method_plan
from fedpers.models.assets import ASSETS
from fedpers.privacy.refusals import check_setup
from fedpers.registry import find, names
from fedpers.reporting import BarReporter, PlainReporter, Reporter, reporter
from fedpers.sweep.grid import expand

USER = ("privacy.unit=user", "privacy.epsilon=8", "privacy.clip=1", "privacy.delta=1e-3")
RECORD = ("privacy.unit=record", *USER[1:])
SHORT = ("engine.threads=1", "rounds=1", "evaluation.local_only=false")
PROGRAM = Path(sys.executable).with_name("fedpers")


@pytest.fixture
def work(tmp_path: Path, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a good configuration, tiny.yaml."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "tiny.yaml").write_text(dump_config(tiny()).replace("privacy:\n", f"privacy:\n  secret: {SECRET}\n"))
    assert load_config(folder / "tiny.yaml") == tiny()
    return folder


def tree(path: Path) -> dict[str, bytes | None]:
    return {str(f.relative_to(path)): f.read_bytes() if f.is_file() else None for f in sorted(path.rglob("*"))}


# --- bad input --------------------------------------------------------------------------------------------------------


def assert_refused(fedpers: Command, work: Path, *arguments: object, says: tuple[str, ...]) -> None:
    """Exit code 2, one line on standard error that says these things, nothing on standard output, nothing written."""
    before = tree(work.parent)
    code, out, err = fedpers(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fedpers: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    for text in says:
        assert text in err
    assert tree(work.parent) == before


BAD_VALUES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown key": (
        ("privacy.epsilom=2",),
        ("tiny.yaml", "unknown key 'privacy.epsilom'", "did you mean 'privacy.epsilon'"),
    ),
    "unknown section": (("privcy.epsilon=2",), ("unknown key 'privcy'", "did you mean 'privacy'")),
    "unknown key without a near one": (("engine.xyzzy=2",), ("'engine.xyzzy'", "allowed: cohort_size, token_budget")),
    **{
        key: ((f"model.{key}=1",), ("tiny.yaml", f"'model.{key}' is refused, leave it out", reason))
        for key, reason in {
            "adapter.use_dora": "identity matrix",
            "adapter.modules_to_save": "belongs to no parameter group",
            "adapter.lora_dropout": "every dropout is 0",
            "adapter.bias": "stay frozen",
            "gradient_checkpointing": "Opacus counts as one more use",
        }.items()
    },
    "wrong type": (("rounds=many",), ("rounds = 'many'", "integer")),
    "fraction of a round": (("rounds=1.5",), ("rounds = 1.5", "integer")),
    "a value where keys belong": (("privacy=strong",), ("privacy: input should be a valid dictionary",)),
    "keys where a value belongs": (("rounds.many=2",), ("'rounds.many=2'", "'rounds' holds a value")),
    "epsilon 0": (("privacy.unit=user", "privacy.clip=1", "privacy.epsilon=0"), ("privacy.epsilon = 0", "greater")),
    "epsilon negative": (("privacy.epsilon=-1",), ("privacy.epsilon = -1", "greater than 0")),
    "epsilon not a number": (("privacy.epsilon=.nan",), ("privacy.epsilon = nan",)),
    "delta 1": (("privacy.delta=1",), ("privacy.delta = 1", "less than 1")),
    "epsilon without a unit": (("privacy.epsilon=2",), ("unit is none", "set privacy.unit")),
    "a unit without a clip": (("privacy.unit=user", "privacy.epsilon=2"), ("needs privacy.clip",)),
    "unknown unit": (("privacy.unit=usr",), ("privacy.unit = 'usr'", "'none', 'record' or 'user'")),
    "unknown group": (("share=adapter+hed",), ("share", "'hed'", "'adapter', 'norm' or 'head'")),
    "no candidates": (("task.candidates=1",), ("task.candidates = 1", "greater than or equal to 2")),
    "caps that exclude everyone": (("data.min_train=20",), ("min_train=20", "max_train=12")),
    "a name that leaves the directory": (("name=../x",), ("name = '../x'", "pattern")),
    "an option of the command line": (("out=here",), ("'out' is no key", "write --out.")),
    "a key of a grid file": (("product.seed=[0, 1]",), ("'product' is a key of a grid file", "`fedpers sweep`")),
    "override without =": (("rounds",), ("override 'rounds'", "key=value", "privacy.epsilon=2")),
    "override without a key": (("=2",), ("override '=2'", "key=value")),
    "override that is not YAML": (("rounds=[",), ("override 'rounds=['", "not valid YAML")),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_bad_value_is_named(case: str, fedpers: Command, work: Path) -> None:
    overrides, says = BAD_VALUES[case]
    assert_refused(fedpers, work, "run", "tiny.yaml", *overrides, "--quiet", says=says)


TOLD_AT_ONCE = {
    "run nowhere.yaml": "nowhere.yaml: cannot be read",
    "run tiny.yaml epsilon=2": "unknown key 'epsilon'; did you mean 'privacy.epsilon'?",
    "run tiny.yaml method=fedrap": "did you mean 'fedrep'?",
    'run tiny.yaml frontier={"methods":["fedrap"],"epsilons":[1]}': "frontier.methods = 'fedrap': unknown;",
    "run tiny.yaml data.name=syntetic": "did you mean 'synthetic'?",
    "run tiny.yaml task.name=reply-rank": "did you mean 'reply-ranking'?",
    "run tiny.yaml --out taken": "taken holds another run",
    "run tiny.yaml --out tiny.yaml --resume": "tiny.yaml is a file",
    "sweep grid.yaml method=fedrap": "did you mean 'fedrep'?",
    "sweep grid.yaml --out taken": "taken holds something that is no sweep",
    "sweep grid.yaml product.seed=1": "only keys of the base can be changed here; edit grid.yaml",
    "audit tiny.yaml method=fedrap": "did you mean 'fedrep'?",
    "audit tiny.yaml --out taken": "taken holds something already",
    "personalize taken --user-data x --out taken": "taken exists already",
}
COMMANDS = """
import sys
from fedpers.cli import main
for line in sys.stdin:
    sys.argv = ["fedpers", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert end.code == 2, line
    assert not {"torch", "transformers", "flwr"} & sys.modules.keys(), line
"""


def test_what_can_be_told_at_once_does_not_wait_for_torch(work: Path) -> None:
    (work / "taken").mkdir()
    (work / "taken" / "file").touch()
    (work / "grid.yaml").write_text("base: tiny.yaml\nproduct: {seed: [0, 1]}\n")
    before = tree(work)
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], input="\n".join(TOLD_AT_ONCE), capture_output=True, text=True, cwd=work
    )
    assert done.returncode == 0, done.stderr
    for said, (command, words) in zip(done.stderr.splitlines(), TOLD_AT_ONCE.items(), strict=True):
        assert words in said, command
    assert tree(work) == before


BAD_SETUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "delta against the number of users": (
        (*USER[:3], "privacy.delta=0.125"), ("delta 0.125", "8 protected units", "choose delta well below 0.125"),
    ),
    "delta against the records of all": (
        (*RECORD[:3], "privacy.delta=0.1", "method=fedbabu"), ("delta 0.1", "96 protected units"),
    ),
    "fedrep with record-level noise": (
        (*RECORD, "method=fedrep"),
        ("'fedrep'", "privacy.unit=record", "(1)", "method=fedbabu", "(2)", "method=fedavg-finetune", "(3)",
         "privacy.unit=user"),
    ),
    "fedper with record-level noise": ((*RECORD, "method=fedper"), ("'fedper'", "Three sound ways out")),
    "unknown method": (("method=fedrap",), ("'fedrap'", "did you mean 'fedrep'", "known: apfl, ")),
    "unknown data": (("data.name=syntetic",), ("'syntetic'", "did you mean 'synthetic'", "known: chitchat")),
    "unknown task": (("task.name=reply-rank",), ("'reply-rank'", "did you mean 'reply-ranking'")),
    "unknown asset": (("model.backbone=all-MiniLM-L6-v3",), ("'all-MiniLM-L6-v3'", "Did you mean all-MiniLM-L6-v2")),
    "a backbone that is not there": (("model.backbone=./nowhere",), ("model.backbone './nowhere'", "assets list")),
    "unknown strategy": (("server.strategy=FedAdm",), ("server.strategy = 'FedAdm'", "FedAdam")),
    "a strategy that looks at single updates": ((*USER, "server.strategy=Krum"), ("'Krum'", "FedAvg", "unit=record")),
    "more layers than there are": (("model.adapter.layers=9",), ("model.adapter.layers = 9", "has 3 layers")),
    "unknown adapter target": (("model.adapter.targets=[qery]",), ("model.adapter.targets = ['qery']", "query, value")),
    "an embedding as a target": (
        ("model.adapter.targets=[word_embeddings]",), ("not found in the top layers", "word_embeddings is refused: an"),
    ),
    "too small a pool": (("task.candidates=40",), ("120 texts", "40 candidates", "lower task.candidates")),
    "nobody to swap with": (("method=fedper", "data.users=1"), ("raise data.users",)),
    "a secret that is none": (("privacy.secret=abc",), ("privacy.secret", "64 hexadecimal digits")),
    "an option of another method": (
        ("method=fedavg", "options.mu=1"), ("options.mu", "'fedavg' has no such number", "its options: none"),
    ),
    "a misspelt option": (("method=fedprox", "options.mue=1"), ("options.mue", "its options: mu=0.1")),
    "what a method is about, left out": (
        ("method=rolora", "share=head"), ("share=head", "about the adapter", "set share=adapter+head"),
    ),
    "nothing left to share": (("method=fedrep", "share=head"), ("share=head", "set share=adapter")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SETUPS)
def test_a_setup_that_cannot_be_run_is_refused_before_anything_is_written(
    case: str, fedpers: Command, work: Path
) -> None:
    overrides, says = BAD_SETUPS[case]
    assert_refused(fedpers, work, "run", "tiny.yaml", *overrides, "--quiet", "--out", "out", says=says)


def test_server_options_that_the_strategy_does_not_take(fedpers: Command, work: Path) -> None:
    assert_refused(
        fedpers, work, "run", "tiny.yaml", "server.options={beta: 1}", "--quiet", says=("server.options", "beta")
    )


def test_bad_configuration_files(fedpers: Command, work: Path) -> None:
    assert_refused(fedpers, work, "run", "nowhere.yaml", says=("nowhere.yaml", "cannot be read", "name a YAML file"))
    assert_refused(fedpers, work, "run", ".", says=("cannot be read",))
    (work / "broken.yaml").write_text("privacy: {unit: user\nrounds: 3\n")
    assert_refused(fedpers, work, "run", "broken.yaml", says=("broken.yaml", "not valid YAML", "line 2"))
    (work / "list.yaml").write_text("- method: fedavg\n")
    assert_refused(fedpers, work, "run", "list.yaml", says=("list.yaml", "expected a mapping", "list"))
    (work / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert_refused(fedpers, work, "run", "bytes.yaml", says=("bytes.yaml", "not valid YAML"))
    (work / "typo.yaml").write_text("metod: fedavg\n")
    assert_refused(fedpers, work, "run", "typo.yaml", says=("typo.yaml", "'metod'", "did you mean 'method'"))


def test_an_error_never_shows_the_secret(fedpers: Command, work: Path) -> None:
    code, _, err = fedpers("run", "tiny.yaml", "privacy.secret=[5ec2e7]", "privacy.epsilon=-1")
    assert code == 2
    assert "5ec2e7" not in err


def test_nobody_with_enough_records(fedpers: Command, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Synthetic.load

    def nobody(self: Synthetic, *arguments: Any) -> Federation:
        return replace(whole(self, *arguments), users=(), train=(), test=(), partners=())

    monkeypatch.setattr(Synthetic, "load", nobody)
    assert_refused(
        fedpers, work, "run", "tiny.yaml", "--quiet", says=("no user has enough records", "lower data.min_train")
    )  # fmt: skip


def test_a_directory_with_something_in_it_is_left_alone(fedpers: Command, work: Path) -> None:
    (work / "mine").mkdir()
    (work / "mine" / "thesis.tex").write_text("years of work")
    says = ("mine", "another run", "--out")
    assert_refused(fedpers, work, "run", "tiny.yaml", "--quiet", "--out", "mine", says=says)
    assert_refused(fedpers, work, "run", "tiny.yaml", "--quiet", "--out", "mine", "--resume", says=says)
    assert_refused(
        fedpers, work, "run", "tiny.yaml", "--quiet", "--out", "tiny.yaml", says=("tiny.yaml is a file", "--out")
    )


def test_other_commands_refuse_in_the_same_way(fedpers: Command, work: Path) -> None:
    assert_refused(fedpers, work, "assets", "show", "chitchit", says=("'chitchit'", "chitchat"))
    assert_refused(fedpers, work, "assets", "fetch", "chitchit", says=("'chitchit'", "chitchat"))
    assert_refused(fedpers, work, "privacy", "plan", "nowhere.yaml", says=("nowhere.yaml",))
    assert_refused(
        fedpers, work, "privacy", "plan", "tiny.yaml", *RECORD, "method=fedrep", says=("Three sound ways out",)
    )  # fmt: skip
    assert_refused(fedpers, work, "export", "--public", "nowhere", "out", says=("nowhere", "no finished run"))
    assert_refused(fedpers, work, "export", "nowhere", "out", says=("--public",))


CONFIGS = Path(__file__).parent.parent / "configs"
GRIDS = {"frontier": (188, 10), "frontier_full": (1350, 45)}  # cells, and baselines that they share


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_that_comes_along_may_run(path: Path) -> None:
    """Its names exist and nothing of it is refused, as far as that can be told without data."""
    if path.stem in GRIDS:
        with pytest.raises(ConfigError, match="fedpers sweep"):
            load_config(path)
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        seeds = tree["product"]["seed"]
        assert len(set(seeds)) == len(seeds)
        if "skip" not in tree:  # then each further seed is the same cells again, and a hundred cells take a second
            tree["product"]["seed"] = seeds[:1]
        grid, times = expand(tree, folder=CONFIGS), 1 if "skip" in tree else len(seeds)
        assert (len(grid.cells) * times, len(grid.baselines) * times) == GRIDS[path.stem]
        axes = [("method", "privacy.epsilon"), ("variant",)]  # each method at each level, and each of the bases
        one_each = {tuple(cell.coordinates[key] for key in some): cell for some in axes for cell in grid.cells}
        configs = [cell.config for cell in one_each.values()]
    else:
        configs = [load_config(path)]
        assert configs[0].name == path.stem.replace("_", "-")
    for config in configs:
        check_setup(config, method_plan(config.method, config))
        assert config.task.name in find("data", config.data.name, Source).tasks  # type: ignore[type-abstract]
        assert config.model.backbone in ASSETS


# --- what is printed --------------------------------------------------------------------------------------------------


def test_help_and_methods(fedpers: Command) -> None:
    code, out, _ = fedpers("--help")
    assert code == 0
    for command in ("run", "methods", "export", "privacy", "assets"):
        assert re.search(rf"^\W*{command}\b", out, re.MULTILINE)
    code, out, _ = fedpers("methods")
    assert code == 0
    shown = printed_methods(out)
    assert list(shown) == names("methods")
    expected = {
        "fedavg": "adapter, head; -",
        "fedbabu": "adapter; head",
        "fedbn": "adapter, head; norm",
        "fedit": "adapter; -",
        "fedsa-lora": "A; B, head",
        "ffa-lora": "B, head; -",
        "local": "-; adapter, head",
    }
    assert {name: shown[name] for name in expected} == expected


def printed_methods(out: str) -> dict[str, str]:
    """What is shared and what stays, by method; a cell may take several lines."""
    head, *lines = out.splitlines()[1:]
    second, third = head.index("shared; stays"), head.index("what it does")
    shown: dict[str, str] = {}
    for line in lines:
        name, cell = line[:second].strip(" ─"), line[second:third].strip(" ─")
        if name or (cell and shown):
            name = name or next(reversed(shown))
            shown[name] = f"{shown.get(name, '')} {cell}".strip()
    return shown


@pytest.mark.parametrize(
    ("overrides", "unit"), [((*USER, "method=fedper"), "user"), ((*RECORD, "method=fedbabu"), "record")]
)
def test_a_privacy_plan_shows_noise_and_trains_nothing(
    overrides: tuple[str, ...], unit: str, fedpers: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpers.cohort.clients import Clients
    from fedpers.cohort.model import CohortModel

    monkeypatch.setattr(Clients, "__init__", None)
    monkeypatch.setattr(CohortModel, "__init__", None)
    before = tree(work)
    code, out, err = fedpers("privacy", "plan", "tiny.yaml", *overrides)
    assert (code, err) == (0, "")
    assert tree(work) == before
    text = " ".join(out.split())
    assert f"unit {unit}" in text
    assert "target epsilon 8, delta 0.001" in text
    found = re.search(r"noise multiplier ([0-9.]+)", text)
    assert found
    (row,) = [line for line in out.splitlines() if line.startswith("│ adapter")]
    numbers, over_clip, over_best = (float(cell) for cell in row.split("│")[2:5])
    assert numbers == 2 * (2 * 32 + 32 * 2)  # query and value of one layer, width 32, rank 2
    assert over_clip == pytest.approx(float(found[1]) * numbers**0.5, abs=0.01)
    divisor = {"user": 8, "record": 0.25 * 12}[unit]  # users, or a full client's expected batch
    assert over_best == pytest.approx(over_clip / divisor, abs=0.001)


def test_a_plan_without_noise_says_so(fedpers: Command, work: Path) -> None:
    _, out, _ = fedpers("privacy", "plan", "tiny.yaml")
    assert out.startswith("No noise: privacy.unit is none")
    assert "no privacy guarantee" in " ".join(out.split())
    _, out, _ = fedpers("privacy", "plan", "tiny.yaml", "privacy.clip=1")
    assert "clipped to 1; that alone is none" in " ".join(out.split())
    _, out, _ = fedpers("privacy", "plan", "tiny.yaml", "privacy.unit=user", "privacy.clip=1")
    assert out.startswith("No noise: privacy.epsilon is inf")
    _, out, _ = fedpers("privacy", "plan", "tiny.yaml", "method=local", *USER)
    assert "releases nothing here, so epsilon is 0" in " ".join(out.split())


def test_plain_lines_where_there_is_no_terminal(fedpers: Command, work: Path) -> None:
    """Where there is no --out, a run goes to runs/NAME, and the next one does not touch it."""
    code, out, err = fedpers("run", "tiny.yaml", *USER, "method=fedper", *SHORT, "rounds=2")
    assert code == 0
    assert "\x1b" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("round ")]
    assert [line.split(":")[0] for line in lines] == ["round 1/2", "round 2/2"]
    for line in lines:
        assert re.search(r"8 clients, loss [0-9.]+, .*global accuracy [0-9.]+, [0-9.]+ clients/s, epsilon spent", line)
    spent = [float(line.rpartition(" ")[2]) for line in lines]
    assert 0 < spent[0] < spent[1] <= 8
    assert "8 users of synthetic" in err
    claim = json.loads((work / "runs" / "tiny" / "claim.json").read_text())
    assert " ".join(claim["sentence"].split()) in " ".join(out.split())
    for kind in ("own", "global", "zero_shot", "swap"):
        assert re.search(rf"^ *{kind} .* 0\.\d\d\d ", out, re.MULTILINE)
    assert f"figure: {Path('runs/tiny/figures/learning_curve.png')}\n" in out
    before = tree(work / "runs")

    code, out, err = fedpers("run", "tiny.yaml", *USER, "method=fedper", *SHORT, "rounds=2", "--resume")
    assert code == 0
    assert err == "runs/tiny: this run is finished already\n"
    assert tree(work / "runs") == before

    code, out, err = fedpers("run", "tiny.yaml", *SHORT, "rounds=0", "method=local", "--quiet")
    assert (code, err) == (0, "")
    assert "run directory: runs/tiny-2\n" in out
    assert {name: data for name, data in tree(work / "runs").items() if not name.startswith("tiny-2")} == before


def test_export_lists_what_it_copied(fedpers: Command, work: Path) -> None:
    assert fedpers("run", "tiny.yaml", *SHORT, "rounds=0", "method=local", "--quiet", "--out", "r")[0] == 0
    code, out, _ = fedpers("export", "--public", "r", "public")
    assert code == 0
    assert {Path(line) for line in out.splitlines()} == set((work / "public").relative_to(work).iterdir())
    assert_refused(fedpers, work, "export", "--public", "r", "public", says=("public", "not an empty directory"))


def test_bars_on_a_terminal_show_the_round() -> None:
    screen = io.StringIO()
    bars = reporter(Console(file=screen, force_terminal=True, width=160), quiet=False)
    assert isinstance(bars, BarReporter)
    row = {"clients": 8, "train_loss": 0.5, "global_accuracy": 0.25, "clients_per_second": 12.0, "epsilon": 1.5}
    for number in (1, 2):
        bars.round({**row, "round": number}, 2)
    bars.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "2/2" in shown
    assert "8 clients, loss 0.500, global accuracy 0.250, 12.0 clients/s, epsilon spent 1.50" in shown


def test_plain_lines_are_whole_lines() -> None:
    log = io.StringIO()
    plain = reporter(Console(file=log, width=40), quiet=False)
    assert isinstance(plain, PlainReporter)
    plain.message("a line that is [not] markup and longer than forty columns")
    plain.stage("frozen layers", 4, 4)
    plain.round({"round": 1, "clients": 0, "train_loss": None, "epsilon": None}, 3)
    lines = log.getvalue().splitlines()
    assert lines[0] == "a line that is [not] markup and longer than forty columns"
    assert lines[1] == "frozen layers: 4 ..."
    assert re.fullmatch(r"frozen layers: done in [0-9.]+ s", lines[2])
    assert lines[3] == "round 1/3: 0 clients"
    assert type(reporter(Console(file=log), quiet=True)) is Reporter


# --- the program as it is installed -----------------------------------------------------------------------------------


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "what",
    [
        "import fedpers; fedpers.load_config",
        "sys.argv[1:] = ['--help']; from fedpers.cli import main; main()",
        "sys.argv[1:] = ['run', 'nowhere.yaml']; from fedpers.cli import main; main()",
    ],
)
def test_what_needs_no_torch_does_not_import_it(what: str) -> None:
    code = f"import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); {what}"
    found = run(sys.executable, "-c", code)
    assert found.stdout.splitlines()[-1] == "False", found.stderr


def test_the_package_offers_the_run_from_the_top() -> None:
    import fedpers as package
    from fedpers.simulation import Run, simulate

    assert package.simulate is simulate
    assert package.Run is Run
    assert package.load_config is load_config
    assert package.Config is Config
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        _ = package.simulat


def test_the_installed_program_refuses_in_one_line(work: Path) -> None:
    found = run(PROGRAM, "run", "tiny.yaml", "privacy.epsilom=2")
    assert (found.returncode, found.stdout) == (2, "")
    assert (
        found.stderr
        == "fedpers: tiny.yaml with overrides: unknown key 'privacy.epsilom'; did you mean 'privacy.epsilon'?\n"
    )


@pytest.mark.slow
def test_the_installed_program_runs_quietly(work: Path) -> None:
    """Nothing on standard error: no progress, and no warning of any library either."""
    found = run(PROGRAM, "run", "tiny.yaml", *USER, "method=fedrep", *SHORT, "--quiet", "--out", "out")
    assert (found.returncode, found.stderr) == (0, "")
    assert "run directory: out\n" in found.stdout
    assert (work / "out" / "summary.json").exists()
    assert {path.name for path in work.iterdir()} == {"tiny.yaml", "out"}
