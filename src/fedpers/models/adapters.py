"""LoRA adapters by PEFT: placing them, and writing standard adapter files."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.numpy import save as packed
from torch import Tensor, nn

from fedpers.config import GROUPS, AdapterConfig, expand
from fedpers.config.refused import REFUSED
from fedpers.errors import ConfigError
from fedpers.models.array_names import SECOND, base_name, group_of, pairs
from fedpers.models.backbone import Backbone, public_name
from fedpers.privacy.randomness import Part, generator

Arrays = Mapping[str, NDArray[np.float32]]
_STEM = "base_model.model."  # of PEFT's keys, before the path in the adapted model
BESIDE = {  # what is saved beside PEFT's files, each in a file of this name, and how it is applied
    SECOND: "the factors of a second adapter of the same configuration, whose output is added; with a gate g the first "
    "adapter's output is scaled by 1 - g, the second's by g",
    "gate": "one row over the unit-length vector that the backbone without adapters makes of the input, with a 1 "
    "appended; g is the link of the product",
    "residual": "each is added to the frozen weight of the module that its key names, after residual.base_model.model.",
    "norm": "row 0 is the scale and row 1 the shift of the layer norm that the key names, after norm.base_model.model.",
}


def place(backbone: Backbone, config: AdapterConfig, extra: Collection[str] = ()) -> Any:
    """Put LoRA factors on the top layers of the backbone, in place; returns the PeftModel, factors trainable.

    Args:
        backbone: what is adapted.
        config: where and how.
        extra: further groups. A2 or B2: a second adapter beside the first, both active. norm: the layer norms of the
            adapted layers are trainable. residual: each LoRA layer gets a linear `residual`, zero, whose output is
            added. gate needs nothing here but the second adapter.

    Raises:
        ConfigError: more layers than the backbone has, targets it does not know, no layer norm where one is to be
            trained, or extra groups that do not exist or do not fit.
    """
    wanted = set(expand(extra))
    second = bool(wanted & {"A2", "B2"})
    if unknown := sorted(wanted - set(GROUPS)):
        raise ConfigError(f"extra groups: {', '.join(unknown)} not known; there are {', '.join(GROUPS)}.")
    if "gate" in wanted and not second:
        raise ConfigError("extra groups: a gate mixes two adapters; ask for A2 and B2, too.")
    if config.layers > backbone.depth:
        raise ConfigError(f"model.adapter.layers = {config.layers}: the backbone has {backbone.depth} layers.")
    top = list(backbone.blocks[backbone.depth - config.layers :].modules())
    targets = _targets(backbone, config, set(top))
    norms = [module for module in top if _is_norm(module)]
    if "norm" in wanted and not norms:
        raise ConfigError(
            f"model.backbone {backbone.name!r}: no layer norm with scale and shift in the top {config.layers} layers, "
            "so no method can train norms; choose a BERT-like encoder or another method."
        )
    with warnings.catch_warnings():
        # PEFT asks transformers for a property under its old name; nothing of ours depends on it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # of Conv1D: PEFT then mends it
        model = peft.get_peft_model(backbone.model, _lora(config, targets))
        if second:
            model.add_adapter(SECOND, _lora(config, targets))
            model.base_model.set_adapter(["default", SECOND])  # PeftModel.set_adapter takes one name only
    model.peft_config["default"].base_model_name_or_path = public_name(backbone.name)
    if "norm" in wanted:
        for module in norms:
            module.requires_grad_(True)
    if "residual" in wanted:
        for layer in lora_layers(model):
            layer.residual = nn.Linear(layer.in_features, layer.out_features, bias=False)
            nn.init.zeros_(layer.residual.weight)
            layer.register_forward_hook(_add_residual)
    return model


def _targets(backbone: Backbone, config: AdapterConfig, top: set[nn.Module]) -> list[str]:
    # Full module names: PEFT's own way to pick layers knows the layer lists of some architectures only.
    linears = {name for name, module in backbone.model.named_modules() if module in top and _is_linear(module)}
    known = {name.rpartition(".")[2] for name in linears}
    if unknown := sorted(set(config.targets) - known):
        leaves = dict.fromkeys(name.rpartition(".")[2] for name in unknown)
        reasons = (f" {name} is refused: {REFUSED[name]}." for name in leaves if name in REFUSED)
        raise ConfigError(
            f"model.adapter.targets = {list(config.targets)}: {', '.join(unknown)} not found in the top layers; linear "
            f"layers there: {', '.join(sorted(known))}.{''.join(reasons)}"
        )
    return sorted(name for name in linears if name.rpartition(".")[2] in config.targets)


def _lora(config: AdapterConfig, targets: list[str]) -> Any:
    return peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, bias="none", target_modules=targets
    )  # fmt: skip


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, with its weight lying the other way

    return isinstance(module, nn.Linear | Conv1D)


def _is_norm(module: nn.Module) -> bool:
    if type(module) is not nn.LayerNorm or len(module.normalized_shape) != 1:
        return False
    return dict(module.named_parameters()).keys() == {"weight", "bias"}


def _add_residual(layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    total: Tensor = output + layer.residual(args[0])
    return total


def first_factor(shape: tuple[int, ...], key: bytes, *address: Part) -> NDArray[np.float32]:
    """Draw a factor A (rank, in) as PEFT does: Kaiming uniform with a = sqrt(5)."""
    bound = 1.0 / np.sqrt(shape[1])
    return generator(key, *address).uniform(-bound, bound, shape).astype(np.float32)


def lora_layers(model: Any) -> list[Any]:
    """Return PEFT's layers of a model, each with a base layer and the factors of all adapters."""
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def save(directory: Path, arrays: Arrays, lora: Any | None, head: Mapping[str, object], inner: str = "") -> None:
    """Write PEFT's adapter_config.json and adapter_model.safetensors, and a head with a JSON that says how to apply it.

    `peft.PeftModel.from_pretrained` loads the directory without fedpers. What PEFT's files cannot hold (BESIDE) lies
    beside the head, and its JSON says how it is applied.

    Args:
        directory: where.
        arrays: by their names in the model that `place` returned.
        lora: its LoRA configuration.
        head: further lines of the JSON.
        inner: of a causal language model, the attribute of transformers' `AutoModelForCausalLM` that holds the adapted
            `AutoModel`; modules are then named from the former, which PEFT adapts.

    Raises:
        ConfigError: one factor of a LoRA module without the other, factors without `lora`, or companions of arrays.
    """
    if others := sorted(name for name in arrays if base_name(name) != name):
        raise ConfigError(f"arrays {', '.join(others)}: no part of a model, so they cannot be saved with one.")
    parts: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name, array in arrays.items():
        parts.setdefault(_part(name), {})[name] = np.ascontiguousarray(array)
    adapter, heads = parts.pop("adapter", {}), parts.pop("head", {})
    directory.mkdir(parents=True, exist_ok=True)
    if adapter:
        missing = {name for pair in pairs(adapter) for name in (pair.A, pair.B)} - set(adapter)
        if lora is None or missing:
            lacks = "its LoRA configuration" if lora is None else ", ".join(sorted(missing))
            raise ConfigError(f"{directory}: an adapter without {lacks} cannot be saved; PEFT could not load it.")
        _outside(lora, inner).save_pretrained(str(directory))
        content = packed(_renamed(adapter, _STEM, _stem(inner)), {"format": "pt"})
        (directory / "adapter_model.safetensors").write_bytes(content)
    # Not by save_file: of a full disk it tells a text alone, and not by an OSError.
    for part, group in parts.items():
        (directory / f"{part}.safetensors").write_bytes(packed(_renamed(group, _STEM, _stem(inner))))
    (directory / "head.safetensors").write_bytes(packed(heads))
    about = {**head, **{part: BESIDE[part] for part in parts}} | ({"inner": inner} if inner else {})
    text = json.dumps(about, indent=2, sort_keys=True)
    (directory / "head.json").write_text(text + "\n", encoding="utf-8")


def _part(name: str) -> str:
    group = group_of(name)
    return {"A": "adapter", "B": "adapter", "A2": SECOND, "B2": SECOND}.get(group, group)


def load(directory: Path) -> dict[str, NDArray[np.float32]]:
    """Read the arrays that `save` wrote, by the names that it was given."""
    inner = json.loads((directory / "head.json").read_text(encoding="utf-8")).get("inner", "")
    arrays: dict[str, NDArray[np.float32]] = dict(load_file(directory / "head.safetensors"))
    for part in ("adapter_model", *BESIDE):
        path = directory / f"{part}.safetensors"
        if path.exists():
            arrays.update(_renamed(load_file(path), _stem(inner), _STEM))
    return arrays


def _stem(inner: str) -> str:
    return f"{_STEM}{inner}." if inner else _STEM


def _renamed(arrays: Arrays, old: str, new: str) -> dict[str, NDArray[np.float32]]:
    return {name.replace(old, new, 1): array for name, array in arrays.items()}


def _outside(lora: Any, inner: str) -> Any:
    """Return the configuration with modules named from outside of a causal language model, and PEFT's name for it."""
    if not inner:
        return lora
    found = copy.copy(lora)
    found.target_modules = {f"{inner}.{name}" for name in lora.target_modules}
    found.task_type = "CAUSAL_LM"
    return found
