"""Letting the models of a finished run write, and scoring it; batches write what single prompts do."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from conftest import Stages
from fedpers import registry
from fedpers.config import Config
from fedpers.data.base import Federation, load
from fedpers.data.synthetic import TOPICS, Synthetic
from fedpers.decoding import write
from fedpers.errors import ConfigError, DataError, RunDirectoryError
from fedpers.experiment import build_model, prepare
from fedpers.finished_run import Which, open_run
from fedpers.formats.longlamp_example import write_example
from fedpers.privacy.randomness import seed_key
from fedpers.public import export_public
from fedpers.reporting import Reporter
from fedpers.simulation import Run, simulate
from fedpers.tasks.base import Examples
from fedpers.tasks.language_model import BETWEEN
from fedpers.try_model import generate
from fedpers.write_texts import scores, write_texts
from test_tasks import Rated, retarget, save_random_tiny_gpt2, settings

Tiny = Callable[..., Config]
Command = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
KINDS = ["own", "global", "swap", "zero_shot"]


class Signed(Synthetic):
    """The made-up people, who answer whatever they read with the same words of their own."""

    tasks = ("language-model",)
    lazy = False

    def load(self, config: Any, key: bytes) -> Federation:
        """Replace targets by the user's first one."""
        made = super().load(config, key)
        own = {
            record.id: train[0].target
            for train, test in zip(made.train, made.test, strict=True)
            for record in (*train, *test)
        }
        return retarget(made, lambda record: own[record.id])


@pytest.fixture(autouse=True)
def _sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {("data", "signed"): Signed, ("data", "rated"): Rated})


def language_run(tiny: Tiny, llama: Path, place: Path, method: str = "fedavg-finetune", **changes: Any) -> Run:
    short = {"evaluation": {"every": 0, "local_only": False}}  # of which no text is written
    given = {**settings("language-model", llama), "data": {"name": "signed"}, **short, **changes}
    return simulate(tiny(method=method, **given), place)


@pytest.fixture(scope="module")
def kept() -> list[Run]:
    return []


@pytest.fixture
def fitted(tiny: Tiny, tiny_llama: Path, kept: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose members' own models have learnt what their users always say; made once, and only read."""
    personal = {"groups": "adapter+head", "epochs": 10, "lr": {"adapter": 0.05, "head": 0.05}}
    data = {"name": "signed", "max_test": 3}
    if not kept:
        place = tmp_path_factory.mktemp("fitted") / "run"
        kept.append(language_run(tiny, tiny_llama, place, personal=personal, data=data))
    return kept[0]


def people(run: Run) -> Federation:
    config = open_run(run.path).config
    return load(config, seed_key(config.seed))


def test_an_own_model_that_learnt_its_user_writes_as_its_user(fitted: Run, tmp_path: Path) -> None:
    """The planted signal is per user, so own beats shared, and another user's own model is no better than that."""
    found = write_texts(fitted.path, tmp_path / "out", tokens=10)
    assert (found.people, found.first) == (len(people(fitted).users), "own")
    assert found.records == sum(map(len, people(fitted).test))
    assert list(found.means) == KINDS
    metrics = list(found.means["own"])
    assert metrics[:2] == ["rouge-1", "rouge-L"]
    assert metrics[2] in ("meteor", "meteor_exact_stem")
    for metric in metrics:
        own, others = found.means["own"][metric].mean, [found.means[kind][metric].mean for kind in KINDS[1:]]
        assert own > max(others) + 0.1, (metric, own, others)
        for kind in KINDS[1:]:
            gain, low, high, p = found.gains[kind][metric]
            assert gain == pytest.approx(own - found.means[kind][metric].mean)
            assert low <= gain <= high
            assert p < 0.05
    table = pq.read_table(tmp_path / "out" / "written.parquet").to_pandas()
    assert len(table) == len(KINDS) * found.people
    assert table[table.kind == "swap"][metrics[2]].mean() == pytest.approx(found.means["swap"][metrics[2]].mean)
    said = json.loads((tmp_path / "out" / "written.json").read_text())
    assert said["means"]["own"]["rouge-1"] == pytest.approx(list(found.means["own"]["rouge-1"]))


def test_batches_write_what_single_prompts_do(fitted: Run, tmp_path: Path) -> None:
    """Each kind is the model that its name says, and neither padding nor whom else a batch holds plays a part."""
    stages = Stages()
    write_texts(fitted.path, tmp_path / "out", users=5, tokens=6, reporter=stages)
    assert stages.told["models that write"] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    table = pq.read_table(tmp_path / "out" / "written.parquet").to_pandas().set_index(["user", "kind"])
    partner = prepare(open_run(fitted.path).config).swap
    assert partner is not None
    lengths = set()
    for user in (0, 4):
        tests = people(fitted).test[user]
        lengths |= {len(record.input.split()) for record in tests}
        which = {"own": Which(str(user)), "global": Which(shared=True), "swap": Which(str(partner[user]))}
        for kind, one in which.items():
            pairs = [(generate(fitted.path, record.input, one, tokens=6), record.target) for record in tests]
            for metric, values in scores(pairs).items():
                assert table.loc[user, kind][metric] == pytest.approx(np.mean(values)), (user, kind, metric)
        assert table.loc[user, "own"]["test_records"] == len(tests)
    assert len(lengths) > 1, "prompts of unequal lengths"


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_ragged_prompts_of_many_owners_go_on_as_each_alone(
    tiny: Tiny, tiny_llama: Path, tmp_path: Path, backbone: str
) -> None:
    """Against one prompt at a time, and against the whole model anew for each token, with nothing kept."""
    folder = tiny_llama if backbone == "llama" else save_random_tiny_gpt2(tmp_path / "gpt2", tiny_llama)
    adapter = {"targets": ["q_proj", "v_proj"] if backbone == "llama" else ["c_attn"], "layers": 2}
    config = tiny(
        data={"max_tokens": 40}, task={"name": "language-model"}, method="fedavg",
        model={"backbone": str(folder), "adapter": adapter},
    )  # fmt: skip
    words = [word for topic in TOPICS.values() for word in topic]
    prompts = tuple(" ".join(words[start : start + length]) for start, length in ((0, 1), (3, 9), (9, 4), (14, 15)))
    rows, none = np.arange(len(prompts)), np.zeros(0, dtype=np.int64)
    examples = Examples(("a", "b"), prompts, prompts, (none, none), (rows, none), continuations=("",) * len(prompts))
    model = build_model(replace(prepare(config), examples=examples), Reporter())
    draws = torch.Generator().manual_seed(3)
    both = {name: 0.5 * torch.randn(2, *first.shape, generator=draws) for name, first in model.initial.items()}
    owners = np.array([1, 0, 0, 1])
    model.load(both)
    together = write(model, rows, owners, 12)
    assert together == [write(model, rows[n : n + 1], owners[n : n + 1], 12)[0] for n in rows]
    assert len({tuple(one) for one in together}) == len(prompts)
    end = model.backbone.tokenizer.eos_token_id
    for number, owner in enumerate(owners):
        model.owners.set(torch.tensor([owner]))
        ids = model.inputs.ids[number][: model.inputs.starts[number]]
        for token in [*together[number], end][:12]:
            with torch.no_grad():
                hidden = model.backbone.last(ids[None], torch.ones_like(ids)[None])
                scored = model.head(hidden[:, -1:])[0, 0] @ model.backbone.vocabulary.T
            assert int(scored.argmax()) == token
            ids = torch.cat([ids, torch.tensor([token])])


def test_untrained_is_the_backbone_alone(fitted: Run, tiny_llama: Path, tmp_path: Path) -> None:
    write_texts(fitted.path, tmp_path / "out", users=2, tokens=6)
    table = pq.read_table(tmp_path / "out" / "written.parquet").to_pandas().set_index(["user", "kind"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    for user in range(2):
        pairs = []
        for record in people(fitted).test[user]:
            ids = [tokenizer.eos_token_id, *tokenizer(record.input + BETWEEN)["input_ids"][-9:]]  # 16 - 6 - 1
            said = model.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=6, do_sample=False, pad_token_id=0,
            )  # fmt: skip
            pairs.append((tokenizer.decode(said[0, len(ids) :], skip_special_tokens=True), record.target))
        for metric, values in scores(pairs).items():
            assert table.loc[user, "zero_shot"][metric] == pytest.approx(np.mean(values))


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        ("fedavg", ["global", "zero_shot"]),
        ("local", ["own", "swap", "zero_shot"]),
        ("feddpa", KINDS),
        ("fedper", KINDS),
    ],
)
def test_methods_have_the_models_that_they_have(
    tiny: Tiny, tiny_llama: Path, tmp_path: Path, method: str, kinds: list[str]
) -> None:
    run = language_run(tiny, tiny_llama, tmp_path / "run", method, rounds=1)
    found = write_texts(run.path, tmp_path / "out", users=4, tokens=3)
    assert list(found.means) == kinds
    assert (found.first, list(found.gains)) == (kinds[0], kinds[1:])
    assert (found.people, found.tokens) == (4, 3)


def test_those_write_whom_the_run_measured(tiny: Tiny, tiny_llama: Path, tmp_path: Path) -> None:
    run = language_run(tiny, tiny_llama, tmp_path / "run", rounds=1, evaluation={"users": 3})
    write_texts(run.path, tmp_path / "out", tokens=3)
    table, users = pq.read_table(tmp_path / "out" / "written.parquet").to_pandas(), run.users.to_pandas()
    assert set(table["user"]) == set(users["user"])
    assert len(set(table["user"])) == 3


# ---------------------------------------------------------------- privacy, refusals, the command


def test_the_command_tells_numbers_and_no_text(fitted: Run, tmp_path: Path, fedpers: Command) -> None:
    code, out, _ = fedpers("write", fitted.path, "--users", 3, "--tokens", 10, "--out", tmp_path / "out", "--quiet")
    assert code == 0
    assert "rouge-L" in out
    assert "test records of 3 people, at most 10 tokens written" in out
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"written.parquet", "written.json"}
    table = pq.read_table(tmp_path / "out" / "written.parquet")
    assert {field.name for field in table.schema if str(field.type) == "string"} == {"kind"}
    told = set(
        re.findall(r"[a-z]+", out.partition("table, metrics")[0] + (tmp_path / "out" / "written.json").read_text())
    )
    words = {word for topic in TOPICS.values() for word in topic}
    assert not told & words
    again = fedpers("write", fitted.path, "--users", 3, "--tokens", 10, "--out", tmp_path / "again", "--quiet")
    assert again[0] == 0
    for name in ("written.parquet", "written.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), "greedy: the same"


def test_what_cannot_write_is_refused_before_anything_is_written(fitted: Run, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"--tokens 13: expected 1 to 12"):
        write_texts(fitted.path, out, tokens=13)
    with pytest.raises(ConfigError, match=r"--users 0: expected 1 or more"):
        write_texts(fitted.path, out, users=0)
    rated = simulate(tiny(method="fedavg", rounds=1, data={"name": "rated"}, task={"name": "rating"}), tmp_path / "r")
    with pytest.raises(ConfigError, match=r"task 'rating' writes no text"):
        write_texts(rated.path, out)
    export_public(fitted.path, tmp_path / "public")
    with pytest.raises(RunDirectoryError, match="an exported run leaves them out"):
        write_texts(tmp_path / "public", out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(RunDirectoryError, match="exists already"):
        write_texts(fitted.path, out)


def test_longlamp_from_its_files_to_what_models_write(tiny: Tiny, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_example(file, "topic", users=8, items=10)
    data = {"name": "longlamp", "path": str(file), "users": 6, "min_test": 1, "max_tokens": 32}
    run = language_run(tiny, tiny_llama, tmp_path / "run", data=data)
    found = write_texts(run.path, tmp_path / "out", tokens=9)
    assert (found.people, found.records) == (len(people(run).users), len(people(run).users))
    write_example(file, "topic", users=4, items=10)
    with pytest.raises(DataError, match="does not have the people of the run any more"):
        write_texts(run.path, tmp_path / "again")
