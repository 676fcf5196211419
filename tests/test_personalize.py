"""Using a finished run: somebody new gets a personal model, and models are tried on records and prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from fedpers import registry
from fedpers.config import Config
from fedpers.data.base import Federation, Record, load
from fedpers.data.synthetic import Synthetic
from fedpers.errors import ConfigError, DataError, RunDirectoryError
from fedpers.experiment import build_model, method_plan, prepare
from fedpers.finished_run import Which, chosen, open_run, read_records
from fedpers.models import adapters
from fedpers.models.array_names import group_of, pairs
from fedpers.models.array_names import second as another
from fedpers.personalize import newcomer_plan, personalize
from fedpers.privacy.randomness import seed_key
from fedpers.public import export_public
from fedpers.reporting import Reporter
from fedpers.simulation import Run, simulate
from fedpers.tasks.language_model import BETWEEN
from fedpers.try_model import generate, score
from test_tasks import Labelled, Rated, settings

Tiny = Callable[..., Config]
Command = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
BOTH: dict[str, Any] = {"personal": {"groups": "adapter+head", "epochs": 8}}
TASKS = {"reply-ranking": "accuracy", "rating": "rmse", "language-model": "loss"}


@pytest.fixture
def tiny(tiny: Tiny) -> Tiny:
    """Measured at the end alone, and nobody trains without the others: no test here looks at either."""
    return lambda **changes: tiny(**{"evaluation": {"every": 0, "local_only": False}, **changes})


@pytest.fixture(autouse=True)
def _sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {("data", "rated"): Rated, ("data", "labelled"): Labelled})


def configured(tiny: Tiny, llama: Path, task: str, **changes: Any) -> Config:
    given = {} if task == "reply-ranking" else settings(task, llama)
    for name, value in changes.items():
        given[name] = {**given[name], **value} if isinstance(given.get(name), dict) else value
    return tiny(**given)


def lines(path: Path, records: Sequence[Record]) -> Path:
    rows = [{"input": r.input, "target": r.target, "id": r.id, "conversation": r.conversation} for r in records]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def people(config: Config) -> Federation:
    return load(config, seed_key(config.seed))


def row_of(run: Run, user: int, kind: str) -> dict[str, float]:
    table = run.users.to_pandas()
    (row,) = table[(table["user"] == user) & (table["kind"] == kind)].to_dict("records")
    return row


def expect(found: dict[str, float] | Any, row: dict[str, float]) -> None:
    for name, value in found.items():
        assert value == pytest.approx(row[name], rel=1e-5, abs=1e-6), name


def strangers(config: Config, number: int = 3, records: int = 30) -> list[list[Record]]:
    """People like the members, whom nobody has met, with many records."""
    data = config.data.model_copy(update={"people": "development", "users": number, "min_train": records,
                                          "max_train": records, "min_test": 20, "max_test": 20})  # fmt: skip
    found = people(config.model_copy(update={"data": data}))
    return [[*train, *test] for train, test in zip(found.train, found.test, strict=True)]


# ---------------------------------------------------------------- members


@pytest.mark.parametrize(
    ("task", "method"),
    [
        *((task, "ditto") for task in TASKS),
        *(("rating", method) for method in ("fedavg-finetune", "fedsa-lora", "ifca")),
    ],
)
def test_scores_of_members_are_those_of_the_run(
    tiny: Tiny, tiny_llama: Path, tmp_path: Path, task: str, method: str
) -> None:
    config = configured(tiny, tiny_llama, task, method=method, **BOTH)
    run = simulate(config, tmp_path / "run")
    federation = people(config)
    for user in (0, 5):
        data = lines(tmp_path / "data.jsonl", federation.test[user])
        own = score(run.path, data, Which(user=str(user)))
        assert (own.metric, own.records) == (TASKS[task], len(federation.test[user]))
        expect(own.metrics, row_of(run, user, "own"))
        expect(score(run.path, data, Which(user=federation.users[user])).metrics, own.metrics)
        expect(score(run.path, data, Which(shared=True)).metrics, row_of(run, user, "global"))
    assert row_of(run, 0, "own")["loss"] != row_of(run, 0, "global")["loss"]


def test_a_gated_method_scores_its_members_alike(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(method="feddpa", data={"name": "rated"}, task={"name": "rating"})
    run = simulate(config, tmp_path / "run")
    data = lines(tmp_path / "data.jsonl", people(config).test[2])
    expect(score(run.path, data, Which(user="2")).metrics, row_of(run, 2, "own"))
    found = personalize(run.path, data, tmp_path / "own", test=0.3)
    assert found.own is not None
    held = lines(tmp_path / "held.jsonl", people(config).test[2][-found.own.records :])
    expect(score(run.path, held, Which(model=tmp_path / "own")).metrics, dict(found.own.metrics))


# ---------------------------------------------------------------- somebody new


@pytest.mark.parametrize("task", ["rating", "reply-ranking", "language-model"])
def test_a_newcomer_with_a_members_records_gets_the_members_model(
    tiny: Tiny, tiny_llama: Path, tmp_path: Path, task: str
) -> None:
    """In steps over all records at once their order plays no part, so both models come out of the same arithmetic."""
    whole = {"personal": {"groups": "adapter+head", "epochs": 3, "batch_size": 64}}
    config = configured(tiny, tiny_llama, task, method="fedavg-finetune", **whole)
    run = simulate(config, tmp_path / "run")
    federation = people(config)
    train, test = federation.train[1], federation.test[1]
    data = lines(tmp_path / "data.jsonl", [*train, *test])
    found = personalize(run.path, data, tmp_path / "own", test=len(test) / (len(train) + len(test)))
    assert found.own is not None
    assert found.common is not None
    assert (found.train, found.own.records) == (len(train), len(test))
    expect(found.own.metrics, row_of(run, 1, "own"))
    expect(found.common.metrics, row_of(run, 1, "global"))
    arrays = adapters.load(tmp_path / "own")
    for name in arrays:
        member = np.load(run.path / "private" / "own" / f"{name}.npy")[1]
        np.testing.assert_allclose(arrays[name], member, rtol=1e-4, atol=1e-5)


PLANTED: dict[str, dict[str, Any]] = {
    "reply-ranking": {"groups": "head", "epochs": 4, "lr": {"head": 0.003}},  # a random encoder is fitted all too well
    "rating": {"groups": "adapter+head", "epochs": 8},
    "language-model": {"groups": "adapter+head", "epochs": 8},
}


@pytest.mark.parametrize("task", PLANTED)
def test_a_newcomer_gains_where_people_differ(tiny: Tiny, tiny_llama: Path, tmp_path: Path, task: str) -> None:
    """Topics, levels and words of the made-up people are their own, so an own model must beat the shared one."""
    config = configured(tiny, tiny_llama, task, method="fedavg-finetune", personal=PLANTED[task])
    run = simulate(config, tmp_path / "run")
    gains = []
    for number, records in enumerate(strangers(config)):
        data = lines(tmp_path / "data.jsonl", records)
        found = personalize(run.path, data, tmp_path / f"own{number}", test=0.4)
        assert found.own is not None
        assert found.common is not None
        assert (found.train, found.own.records) == (30, 20)
        gains.append(found.common.metrics["loss"] - found.own.metrics["loss"])
        held = lines(tmp_path / "held.jsonl", records[30:])
        expect(score(run.path, held, Which(model=found.path)).metrics, dict(found.own.metrics))
    assert np.mean(gains) > 0, gains
    assert task == "reply-ranking" or min(gains) > 0, gains  # ranking by a random encoder helps not each of them


@pytest.mark.parametrize(
    ("method", "moved"),
    [("fedper", {"head"}), ("fedrep", {"head"}), ("fedsa-lora", {"B", "head"}), ("fedbabu", {"head"}),
     ("lg-fedavg", {"A", "B"}), ("fedbn", {"norm"}), ("sdflora", {"A2", "B2", "head"}), ("local", {"A", "B", "head"})],
)  # fmt: skip
def test_what_is_personal_is_fitted_from_its_public_value_and_nothing_else(
    tiny: Tiny, tmp_path: Path, method: str, moved: set[str]
) -> None:
    groups = {"groups": "adapter+norm+head", "epochs": 6}  # A moves only once head and B have
    config = tiny(method=method, data={"name": "rated"}, task={"name": "rating"}, personal=groups)
    run = simulate(config, tmp_path / "run")
    data = lines(tmp_path / "data.jsonl", people(config).train[0])
    personalize(run.path, data, tmp_path / "own")
    model = build_model(prepare(config), Reporter())
    start = {name: value.numpy() for name, value in model.initial.items()} | run.shared
    start |= {n: model.initial[n].numpy() for n in start if method in {"fedsa-lora"} and group_of(n) == "B"}
    found = adapters.load(tmp_path / "own")
    assert found.keys() == start.keys()
    assert {group_of(name) for name in found if not np.array_equal(found[name], start[name])} == moved
    about = json.loads((tmp_path / "own" / "personal.json").read_text())
    assert about["records"] == {"train": len(people(config).train[0]) - 1, "test": 1}


def test_a_newcomer_chooses_among_several_shared_models(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(method="ifca", rounds=3, data={"name": "rated"}, task={"name": "rating"})
    run = simulate(config, tmp_path / "run")
    data = lines(tmp_path / "data.jsonl", people(config).train[0])
    personalize(run.path, data, tmp_path / "chosen", test=0)
    personalize(run.path, data, tmp_path / "tuned", test=0, groups=("head",))
    chosen, tuned = adapters.load(tmp_path / "chosen"), adapters.load(tmp_path / "tuned")
    versions = [adapters.load(run.path / "adapters" / f"cluster{place}") for place in (0, 1)]
    same = [all(np.array_equal(chosen[n], version[n]) for n in chosen) for version in versions]
    assert sorted(same) == [False, True]
    assert {group_of(n) for n in chosen if not np.array_equal(chosen[n], tuned[n])} == {"head"}


@pytest.mark.parametrize("method", ["fedavg", "ditto", "scaffold", "feddpa", "fedex-lora"])
def test_groups_are_fitted_on_top_of_the_shared_model(tiny: Tiny, tmp_path: Path, method: str) -> None:
    config = tiny(method=method, data={"name": "rated"}, task={"name": "rating"})
    run = simulate(config, tmp_path / "run")
    data = lines(tmp_path / "data.jsonl", people(config).train[0])
    if method != "feddpa":
        with pytest.raises(ConfigError, match=rf"method '{method}'.*say --groups head"):
            personalize(run.path, data, tmp_path / "own")
    personalize(run.path, data, tmp_path / "own", groups=("head",), test=0)
    found, shared = adapters.load(tmp_path / "own"), run.shared
    assert found.keys() == shared.keys()
    assert {group_of(n) for n in found if not np.array_equal(found[n], shared[n])} == {"head"}


@pytest.mark.parametrize("method", ["apfl", "pfedme", "fedala", "fedalt", "hetlora", "centralized"])
def test_state_from_the_rounds_cannot_be_made_up(tiny: Tiny, method: str) -> None:
    plan = method_plan(method, tiny(method=method, personal={"groups": "adapter+head"}))
    with pytest.raises(ConfigError, match="say --groups head"):
        newcomer_plan(plan)
    assert newcomer_plan(plan, ("adapter", "head")).personal == ("A", "B", "head")


def test_no_text_is_written_and_an_exported_run_serves_newcomers(
    tiny: Tiny, random_tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(method="hydra", data={"name": "rated"}, task={"name": "rating"})
    run = simulate(config, tmp_path / "run")
    export_public(run.path, tmp_path / "exported")
    monkeypatch.chdir(random_tiny_bert.parent)  # an exported run names a local backbone by its last part
    data = lines(tmp_path / "data.jsonl", people(config).train[0])
    one, two = (personalize(tmp_path / name, data, tmp_path / f"own-{name}") for name in ("run", "exported"))
    assert one.own == two.own
    assert (tmp_path / "own-run").stat().st_mode & 0o077 == 0
    for file in (tmp_path / "own-run").iterdir():
        for record in people(config).train[0]:
            assert record.input.encode() not in file.read_bytes()
            assert record.id.encode() not in file.read_bytes()
    with pytest.raises(RunDirectoryError, match="exported run leaves them out"):
        score(tmp_path / "exported", data, Which(user="0"))
    expect(score(tmp_path / "exported", data, Which(model=two.path)).metrics,
           dict(score(run.path, data, Which(model=one.path)).metrics))  # fmt: skip


# ---------------------------------------------------------------- language models in plain PEFT


def language_run(tiny: Tiny, llama: Path, out: Path, **changes: Any) -> tuple[Config, Run]:
    strong = {"local": {"epochs": 4, "batch_size": 4}, "personal": {"epochs": 8, "groups": "adapter+head"}}
    config = configured(tiny, llama, "language-model", **{"method": "fedavg-finetune", **strong, **changes})
    return config, simulate(config, out)


def plain(llama: Path, folder: Path) -> Any:
    """What a user of PEFT has, without fedpers."""
    return peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(llama), str(folder)).eval()


@torch.no_grad()
def by_hand(causal: Any, tokenizer: Any, ids: Sequence[int], shift: torch.Tensor, tokens: int) -> str:
    """Write on, the likeliest token each time, with a shift added to last states."""
    written: list[int] = []
    while len(written) < tokens:
        states = causal.model(input_ids=torch.tensor([[*ids, *written]])).last_hidden_state[0, -1] + shift
        token = int((causal.lm_head.weight @ states).argmax())
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
    return str(tokenizer.decode(written, skip_special_tokens=True))


def test_plain_peft_gives_the_same_scores_of_tokens(tiny: Tiny, tiny_llama: Path, tmp_path: Path) -> None:
    config, run = language_run(tiny, tiny_llama, tmp_path / "run")
    place = run.path / "adapters" / "shared"
    found = json.loads((place / "adapter_config.json").read_text())
    assert found["task_type"] == "CAUSAL_LM"
    loaded = plain(tiny_llama, place)
    keys = loaded.load_adapter(str(place), adapter_name="again")
    assert (list(keys.missing_keys), list(keys.unexpected_keys)) == ([], [])
    experiment = prepare(config)
    model = build_model(experiment, Reporter())
    assert set(run.shared) == set(model.initial), "fedpers reads its own names back"
    assert any(array.any() for name, array in run.shared.items() if group_of(name) == "B"), "it was trained"
    silent = {n: torch.from_numpy(a) * (group_of(n) != "head") for n, a in run.shared.items()}
    model.load(model.broadcast(1, silent))
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    rows = np.concatenate(experiment.examples.test[:3])
    for row in rows:
        ids = model.inputs.ids[row][None]
        with torch.no_grad():
            theirs = loaded(input_ids=ids).logits[0]
            context = model.contexts(np.array([row]), torch.zeros(1, dtype=torch.long))
            ours = model.head(context)[0, : ids.shape[1]] @ model.backbone.vocabulary.T
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            assert (base(input_ids=ids).logits[0] - theirs).abs().max() > 1e-2, "the adapter does something"


def test_greedy_text_is_that_of_transformers(tiny: Tiny, tiny_llama: Path, tmp_path: Path) -> None:
    """With the head's shift at zero PEFT's own generation must say the same, for shared and personal models."""
    config, run = language_run(
        tiny, tiny_llama, tmp_path / "run", share="adapter", personal={"epochs": 8, "groups": "adapter"}
    )
    data = lines(tmp_path / "data.jsonl", people(config).train[0])
    own = personalize(run.path, data, tmp_path / "own", test=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    said = set()
    for which, folder in ((Which(shared=True), run.path / "adapters" / "shared"), (Which(model=own.path), own.path)):
        loaded = plain(tiny_llama, folder)
        for prompt in ("soup cake", "team goal swim coach race", "map"):
            ids = [tokenizer.eos_token_id, *tokenizer(prompt + BETWEEN)["input_ids"]]
            theirs = loaded.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=8, do_sample=False, pad_token_id=0,
            )  # fmt: skip
            expected = tokenizer.decode(theirs[0, len(ids) :], skip_special_tokens=True)
            assert generate(run.path, prompt, which, tokens=8) == expected
            said.add((which, expected))
    assert len({text for _, text in said}) > 2


def scatter(folder: Path, size: float) -> dict[str, torch.Tensor]:
    """Put random numbers into a personal model's files, as if much had been learnt; returns its arrays."""
    draws = np.random.default_rng(5)
    for file in folder.glob("*.safetensors"):
        kept = load_file(file)
        save_file({n: (size * draws.standard_normal(a.shape)).astype(np.float32) for n, a in kept.items()}, file)
    return {name: torch.from_numpy(array) for name, array in adapters.load(folder).items()}


PROMPTS = ("soup cake", "team goal swim coach race", "map", "drum song tea")


def test_the_shift_of_a_head_and_the_seed_shape_what_is_written(
    tiny: Tiny, tiny_llama: Path, tmp_path: Path, fedpers: Command
) -> None:
    config, run = language_run(tiny, tiny_llama, tmp_path / "run")
    data = lines(tmp_path / "data.jsonl", people(config).train[0])
    own = personalize(run.path, data, tmp_path / "own", groups=("head",), test=0)
    arrays = scatter(own.path, 0.3)
    (shift,) = (value[:, 0] for name, value in arrays.items() if group_of(name) == "head")
    loaded = plain(tiny_llama, own.path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    which, differ, prompt, expected = Which(model=own.path), 0, "", ""
    for prompt in PROMPTS:
        ids = [tokenizer.eos_token_id, *tokenizer(prompt + BETWEEN)["input_ids"]]
        expected = by_hand(loaded.base_model.model, tokenizer, ids, shift, 6)
        assert generate(run.path, prompt, which, tokens=6) == expected
        differ += expected != by_hand(loaded.base_model.model, tokenizer, ids, torch.zeros_like(shift), 6)
    assert differ, "the shift must matter"
    drawn = [generate(run.path, prompt, which, tokens=8, temperature=3.0, seed=seed) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    code, out, _ = fedpers("generate", run.path, "--model", own.path, "--prompt", prompt, "--tokens", 6)
    assert (code, out) == (0, expected + "\n")
    with pytest.raises(ConfigError, match=r"--tokens 13: expected 1 to 12"):
        generate(run.path, prompt, which, tokens=13)
    with pytest.raises(ConfigError, match="--temperature nan"):
        generate(run.path, prompt, which, temperature=float("nan"))
    long = " ".join(["soup"] * 100) + " cake team"
    assert generate(run.path, long, which, tokens=5) == generate(run.path, long.removeprefix("soup "), which, tokens=5)


def test_a_gate_weighs_both_adapters_when_text_is_written(tiny: Tiny, tiny_llama: Path, tmp_path: Path) -> None:
    """By hand: the gate reads what is before the answer by the plain model, both products are added to the weights, the
    head's shift to the last state."""
    config, run = language_run(
        tiny, tiny_llama, tmp_path / "run", method="feddpa", local={"lr": {"adapter": 3.0}, "epochs": 4},
        personal={"epochs": 8, "lr": {"adapter": 3.0}},
    )  # fmt: skip
    own = personalize(run.path, lines(tmp_path / "data.jsonl", strangers(config, 1)[0]), tmp_path / "own")
    assert own.own is not None
    held = lines(tmp_path / "held.jsonl", strangers(config, 1)[0][-own.own.records :])
    expect(score(run.path, held, Which(model=own.path)).metrics, dict(own.own.metrics))
    arrays = scatter(own.path, 0.3)
    model = build_model(prepare(config), Reporter())
    assert arrays.keys() == model.initial.keys()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    (shift,) = (value[:, 0] for name, value in arrays.items() if group_of(name) == "head")
    differ = 0
    for prompt in PROMPTS:
        ids = [tokenizer.eos_token_id, *tokenizer(prompt + BETWEEN)["input_ids"]]
        written = {}
        for gated in (True, False):
            base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
            with torch.no_grad():
                states = base.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
                feature = torch.nn.functional.normalize(states.mean(dim=0), dim=0)
                second = float(arrays["gate.weight"][0] @ torch.cat([feature, torch.ones(1)])) if gated else 0.0
                for pair in pairs(n for n in arrays if group_of(n) == "A"):
                    weight = base.get_submodule(pair.module.replace("base_model.model.", "model.", 1)).weight
                    for share, a, b in ((1 - second, pair.A, pair.B), (second, another(pair.A), another(pair.B))):
                        weight += share * model.scaling * arrays[b] @ arrays[a]
                written[gated] = by_hand(base, tokenizer, ids, shift, 8)
        assert generate(run.path, prompt, Which(model=own.path), tokens=8) == written[True]
        differ += written[True] != written[False]
    assert differ, "the second adapter must matter"


# ---------------------------------------------------------------- what cannot be used


BAD = {
    "": r"data\.jsonl: empty; a line per record",
    "\n\n": r"data\.jsonl: empty",
    '{"input": "soup"}': r"data\.jsonl, line 1: the target is empty; mend",
    '{"input": "", "target": "4"}': r"data\.jsonl, line 1: the input is empty",
    '{"input": "soup", "target": "4"}\n["soup", "4"]': r"data\.jsonl, line 2: not a JSON object",
    '{"input": "soup", "target": "4"}\n\n{"input": "soup", "target": "4"}': r"line 2: not a JSON object",
    '{"input": "soup", "target": "4"}\n{"input": "soup", "tar': r"line 2: not a JSON object",
    '{"input": "soup", "target": ["4"]}': r"line 1: the target holds a list",
    '{"input": "soup", "target": "4", "id": "a"}\n{"input": "soup", "target": "4", "id": "a"}': "appears twice",
    '{"input": "soup", "target": "4"}\n{"input": "soup", "target": "9"}': "of record 2 is no number from 1 to 5",
    '{"input": "soup", "target": "4"}': r"data\.jsonl: 1 record, too few to fit and to test",
}


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory, random_tiny_bert: Path, feature_cache: Path) -> Path:
    return tmp_path_factory.mktemp("rated") / "run"


@pytest.fixture
def finetuned(tiny: Tiny, rated: Path) -> Path:
    """A finished run of a rating task, made once."""
    if not rated.exists():
        simulate(tiny(method="fedavg-finetune", rounds=1, data={"name": "rated"}, task={"name": "rating"}), rated)
    return rated


@pytest.mark.parametrize("text", BAD)
def test_a_file_that_cannot_be_used_is_refused_by_line(finetuned: Path, tmp_path: Path, text: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(text)
    with pytest.raises(DataError, match=BAD[text]) as refused:
        personalize(finetuned, data, tmp_path / "own")
    assert "soup" not in str(refused.value)
    assert not (tmp_path / "own").exists()


def test_numbers_and_further_keys_are_taken(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"input": " soup ", "target": 4, "user": "x"}\n{"input": "tea", "target": 4.5}\n')
    first, second = read_records(data)
    assert (first.input, first.target, second.target) == ("soup", "4", "4.5")
    assert first.id != second.id
    data.write_text('{"target": "tea"}\n')
    assert read_records(data, optional_input=True)[0].input == ""


def test_commands_say_what_they_did_and_what_is_wrong(
    finetuned: Path, tiny: Tiny, fedpers: Command, tmp_path: Path
) -> None:
    config = tiny(data={"name": "rated"}, task={"name": "rating"})
    data = lines(tmp_path / "data.jsonl", people(config).train[0])
    own = tmp_path / "own"
    code, out, _ = fedpers("personalize", finetuned, "--user-data", data, "--out", own, "--quiet")
    assert code == 0
    assert "records held out" in out
    assert "no privacy budget is spent" in out
    assert "must not be shown to others" in out
    assert "warning: fewer than 10 records were held out" in out
    code, out, err = fedpers("score", finetuned, "--model", own, "--data", data, "--quiet")
    assert (code, err) == (0, "")
    found = dict(line.split() for line in out.splitlines())
    expected = score(finetuned, data, Which(model=own))
    assert found.keys() == {"rmse", "mae", "loss", "records"}
    assert float(found["rmse"]) == pytest.approx(expected.metrics["rmse"], rel=1e-5)
    _, again, err = fedpers("score", finetuned, "--model", own, "--data", data)
    assert again == out
    assert "records that the model was trained on score too well" in err
    lines(data, strangers(config, 1)[0])
    _, out, _ = fedpers("personalize", finetuned, "--user-data", data, "--out", tmp_path / "2", "--test", "0.2")
    assert "10 records held out" in out
    assert "warning" not in out

    def refused(*arguments: object) -> str:
        code, _, err = fedpers(*arguments)
        assert code == 2, arguments
        return err

    assert "exists already" in refused("personalize", finetuned, "--user-data", data, "--out", own)
    assert "not known; join some of" in refused("personalize", finetuned, "--user-data", data, "--groups", "tail")
    assert "expected a share" in refused("personalize", finetuned, "--user-data", data, "--test", "1", "--out", "x")
    assert "cannot be read" in refused("personalize", finetuned, "--user-data", tmp_path / "no", "--out", "x")
    assert "no finished run" in refused("score", tmp_path, "--shared", "--data", data)
    assert "exactly one of" in refused("score", finetuned, "--data", data)
    assert "exactly one of" in refused("score", finetuned, "--data", data, "--shared", "--user", "1")
    assert "(0 to 7) or id" in refused("score", finetuned, "--data", data, "--user", "8")
    assert "no personal model" in refused("score", finetuned, "--data", data, "--model", finetuned)
    assert "try its models with `fedpers score`" in refused("generate", finetuned, "--shared", "--prompt", "soup")


def test_a_private_run_is_read_and_never_written(tiny: Tiny, tmp_path: Path) -> None:
    """Heads were noised in the rounds; what is done at home afterwards has neither clip nor noise, nor a claim."""
    record = {"unit": "record", "epsilon": 8, "delta": 1e-2, "clip": 0.1, "head": "split-dp"}
    config = tiny(method="fedrep", privacy=record, data={"name": "rated"}, task={"name": "rating"})
    run = simulate(config, tmp_path / "run")

    def content() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()}

    before = content()
    federation = people(config)
    data = lines(tmp_path / "data.jsonl", federation.train[0])
    personalize(run.path, data, tmp_path / "own")
    expect(score(run.path, lines(data, federation.test[0]), Which(user="0")).metrics, row_of(run, 0, "own"))
    assert content() == before
    found = adapters.load(tmp_path / "own")
    assert {group_of(n) for n in found if not np.array_equal(found[n], run.shared.get(n, np.zeros(1)))} == {"head"}


def test_a_personal_model_of_another_run_is_refused(finetuned: Path, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(method="fedavg-finetune", rounds=1, data={"name": "rated"}, task={"name": "rating"}, seed=1)
    other = simulate(config, tmp_path / "other")
    data = lines(tmp_path / "data.jsonl", people(config).train[0])
    personalize(other.path, data, tmp_path / "own")
    with pytest.raises(RunDirectoryError, match="was not made on"):
        score(finetuned, data, Which(model=tmp_path / "own"))


def test_a_member_without_a_whole_row_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(method="fedsa-lora", rounds=1, data={"name": "rated"}, task={"name": "rating"})
    run = simulate(config, tmp_path / "run")
    data = lines(tmp_path / "data.jsonl", people(config).test[0])
    lost = next(file for file in sorted((run.path / "private" / "own").glob("*.npy")) if "lora_B" in file.name)
    lost.unlink()
    with pytest.raises(RunDirectoryError, match="restore"):
        score(run.path, data, Which(user="0"))


def test_methods_with_nothing_shared_or_nothing_personal_say_so(tiny: Tiny, tmp_path: Path) -> None:
    rating = {"data": {"name": "rated"}, "task": {"name": "rating"}}
    local, fedavg = (simulate(tiny(method=m, rounds=1, **rating), tmp_path / m) for m in ("local", "fedavg"))
    data = lines(tmp_path / "data.jsonl", people(local.config).test[0])
    with pytest.raises(ConfigError, match="shares nothing"):
        score(local.path, data, Which(shared=True))
    with pytest.raises(ConfigError, match="a user's model is --shared"):
        score(fedavg.path, data, Which(user="0"))
    expect(score(local.path, data, Which(user="0")).metrics, row_of(local, 0, "own"))


def test_public_texts_for_ranking_come_from_outside(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The members' records play no part: with others in their place a newcomer's model is the same."""
    config = tiny(method="hydra")
    run = simulate(config, tmp_path / "run")
    data = lines(tmp_path / "data.jsonl", strangers(config, 1)[0])
    one = personalize(run.path, data, tmp_path / "one")

    whole = people(config)
    nobody = (Record("x", "x", "x", "x"),)
    other = Federation(whole.source, ("x",), (nobody,), ((),), whole.pool, whole.pool_authors, (frozenset(),))
    monkeypatch.setattr(Synthetic, "load", lambda *_: other)
    two = personalize(run.path, data, tmp_path / "two")
    assert one.own == two.own
    assert one.common == two.common


def test_a_number_that_is_somebody_elses_id_opens_nobodys_model(run_of_numbers: Path) -> None:
    """Of members with the ids 1, 0 and 2 number 0 is the one with id 1: either may be meant."""
    run = open_run(run_of_numbers)
    for user in ("0", "1"):
        with pytest.raises(ConfigError, match=rf"--user {user} is one member's number and another's id; say number:"):
            chosen(run, Which(user=user))
    for same in (("2", "id:2"), ("number:0", "id:1"), ("number:1", "id:0")):
        first, second = (chosen(run, Which(user=user)) for user in same)
        assert {name: value.tobytes() for name, value in first.items()} == {n: v.tobytes() for n, v in second.items()}
    assert any((chosen(run, Which(user="id:0"))[n] != v).any() for n, v in chosen(run, Which(user="id:1")).items())


@pytest.fixture
def run_of_numbers(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    class Numbered(Rated):
        def load(self, config: Any, key: bytes) -> Federation:
            return replace(super().load(config, key), users=("1", "0", "2"))

    monkeypatch.setattr(registry, "_registered", {("data", "numbered"): Numbered})
    data = {"name": "numbered", "users": 3}
    return simulate(tiny(rounds=1, data=data, task={"name": "rating"}), tmp_path / "numbered").path
