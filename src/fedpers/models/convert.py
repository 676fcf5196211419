"""Model files of other formats, turned into folders that transformers loads; done once, when an asset is fetched.

The files are read as numbers and text, nothing in them is run. Both conversions copy or de-quantize value by value, so
the weights are the same wherever they are made, and an asset's row can hold their hash (`fingerprint`).
"""

import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from fedpers.errors import AssetError

WEIGHTS = "model.safetensors"
VERSIONS = ("fedpers", "numpy", "safetensors", "tokenizers", "torch", "transformers")
BERT_TOKENIZER = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")

# GGUF's names of the parts of a Llama model, and transformers'.
_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's types of tokens that are never cut


def llama_from_gguf(source: Path, out: Path) -> None:
    """Write the Llama model in the GGUF file `source`, with its tokenizer, to the folder `out`, as bfloat16.

    transformers reads such files too, but cannot save what it read, and (5.23) cuts white space before a number
    otherwise than SmolLM's own tokenizer. So the file is read here, by the `gguf` library.

    Raises AssetError if `source` holds another architecture or tokenizer than the ones that are known here.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    told = {key: fields.get(key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")}
    if tuple(told.values()) != ("llama", "gpt2", "smollm"):
        raise AssetError(f"{source.name} cannot be converted: {told} is not llama with a gpt2 tokenizer cut as smollm.")
    # A hint that would change the arithmetic must not be dropped in silence.
    scaling = [key for key in fields if key.startswith("llama.rope.scaling.")]
    if scaling:
        raise AssetError(f"{source.name} cannot be converted: it has {scaling[0]}, which is not read here.")
    config = _llama_config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        # The rotary halves of each head are interleaved in GGUF, one after the other in transformers.
        if ".attn_q." in tensor.name:
            values = _halves_apart(values, config.num_attention_heads)
        elif ".attn_k." in tensor.name:
            values = _halves_apart(values, config.num_key_value_heads)
        weights[_llama_name(source, tensor.name)] = torch.tensor(values).to(torch.bfloat16)
    _save(transformers.LlamaForCausalLM, config, weights, source, out)
    _smollm_tokenizer(fields).save_pretrained(out)


def _llama_config(fields: dict[str, Any], *, tied: bool) -> Any:
    def number(key: str) -> int:
        return int(fields[f"llama.{key}"])

    def real(key: str) -> float:
        return float(str(np.float32(fields[f"llama.{key}"])))  # 1e-05, not 9.999999747378752e-06

    return transformers.LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=number("attention.head_count"),
        num_key_value_heads=number("attention.head_count_kv"),
        max_position_embeddings=number("context_length"),
        rms_norm_eps=real("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": real("rope.freq_base")},
        tie_word_embeddings=tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        dtype=torch.bfloat16,
    )


def _llama_name(source: Path, name: str) -> str:
    """Return transformers' name of a GGUF tensor: `blk.3.attn_q.weight` is layer 3's query projection."""
    layer, part = "", name.removesuffix(".weight")
    if name.startswith("blk."):
        _, number, part = part.split(".", 2)
        layer = f"model.layers.{number}."
    if part not in _LLAMA or not name.endswith(".weight"):
        raise AssetError(f"{source.name} cannot be converted: the tensor {name} is not known here.")
    return f"{layer}{_LLAMA[part]}.weight"


def _halves_apart(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo GGUF's interleaving within each head, for a projection (heads * size, width)."""
    rows, width = values.shape
    return values.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _smollm_tokenizer(fields: dict[str, Any]) -> Any:
    """Return the byte-level BPE tokenizer that the fields describe; numbers are cut into digits, as for SmolLM."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        whole = [
            AddedToken(token, normalized=False, special=special)
            for token, its_kind in zip(tokens, types, strict=True)
            if its_kind == kind
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(whole)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=int(fields["llama.context_length"]),
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in names.items()},
    )


def bert_from_onnx(source: Path, out: Path, tokenizer: Path) -> None:
    """Write the BERT encoder in the ONNX file `source` to the folder `out`, as float32, with the files of `tokenizer`.

    The file is one that sentence-transformers' modules were exported to by torch. Biases, norms and embeddings have
    their names; a dense weight has none and is known by the node that multiplies with it. The file holds no pooler; one
    of zeros is written, because transformers would draw one at random at each load, and no two loads would be equal.

    Raises AssetError if the file holds anything else than that.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(source), load_external_data=False).graph
    prefix = "model.0.auto_model."
    stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    arrays = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    scales = set()
    for node in graph.node:
        within = node.name.removeprefix("/model/").replace("/", ".")  # a node's path is its module's
        if not within.startswith(prefix):
            continue
        if node.op_type == "MatMul" and node.input[1] in stored:
            arrays[within.removeprefix(prefix).removesuffix(".MatMul") + ".weight"] = stored[node.input[1]].T
        elif node.op_type == "Constant" and ".attention.self." in within:
            value = numpy_helper.to_array(node.attribute[0].t)
            if value.dtype == np.float32 and value.ndim == 0:
                scales.add(float(value))
    vocabulary, width = arrays["embeddings.word_embeddings.weight"].shape
    # Scores are divided by the square root of a head's size; nothing else in the file tells the number of heads.
    size = round(scales.pop() ** 2) if len(scales) == 1 else 0
    if size == 0 or width % size:
        raise AssetError(f"{source.name} cannot be converted: it does not tell the size of an attention head.")
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("attention.self.query.weight") for name in arrays),
        num_attention_heads=width // size,
        intermediate_size=len(arrays["encoder.layer.0.intermediate.dense.bias"]),
        max_position_embeddings=len(arrays["embeddings.position_embeddings.weight"]),
        type_vocab_size=len(arrays["embeddings.token_type_embeddings.weight"]),
    )
    weights = {name: torch.tensor(value) for name, value in arrays.items()}
    weights |= {"pooler.dense.weight": torch.zeros(width, width), "pooler.dense.bias": torch.zeros(width)}
    _save(transformers.BertModel, config, weights, source, out)
    for name in BERT_TOKENIZER:
        shutil.copyfile(tokenizer / name, out / name)


def _save(kind: Any, config: Any, weights: dict[str, Tensor], source: Path, out: Path) -> None:
    """Put `weights` into a model of class `kind` and save it; all of its arrays must be there, in their shapes."""
    with torch.device("meta"):  # nothing is drawn, so no random state changes
        model: nn.Module = kind(config)
    try:
        found = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        reason = str(error).split("\n")[-1].strip()
        raise AssetError(f"{source.name} cannot be converted: {reason}") from error
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    wrong = sorted((set(found.missing_keys) - tied) | set(found.unexpected_keys))
    if wrong:
        raise AssetError(f"{source.name} cannot be converted: {wrong[0]} is missing, or not of this architecture.")
    saved: Any = model
    saved.tie_weights()
    transformers.utils.logging.disable_progress_bar()
    saved.save_pretrained(out)
    shutil.copymode(out / "config.json", out / WEIGHTS)  # safetensors lets nobody else read, not even in a shared cache


CONVERSIONS: dict[str, Callable[..., None]] = {"gguf": llama_from_gguf, "onnx": bert_from_onnx}
"""The conversions by the library that reads the format; all take the source file and the folder to write."""


def fingerprint(folder: Path) -> str:
    """Return a hash of the converted weights in `folder`: names, types, shapes and values, however they are stored."""
    digest = hashlib.sha256()
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor: Tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions(library: str) -> dict[str, str]:
    """Return the versions of all that takes part in a conversion from the format that `library` reads."""
    return {name: importlib.metadata.version(name) for name in sorted((*VERSIONS, library))}
