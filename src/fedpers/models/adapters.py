"""LoRA adapters by PEFT: placing them, naming their arrays, writing standard adapter files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from fedpers.config import AdapterConfig
from fedpers.errors import ConfigError
from fedpers.models.backbone import Backbone, public_name

Arrays = Mapping[str, NDArray[np.float32]]
HEAD = "head."  # arrays of the head are named head.*, all others are PEFT's keys


def place(backbone: Backbone, config: AdapterConfig) -> Any:
    """Put LoRA factors on the top layers of the backbone, in place; returns the PeftModel.

    Raises:
        ConfigError: more layers than the backbone has, or targets it does not know.
    """
    if config.layers > backbone.depth:
        raise ConfigError(f"model.adapter.layers = {config.layers}: the backbone has {backbone.depth} layers.")
    # Full module names: PEFT's own way to pick layers knows the layer lists of some architectures only.
    top = set(backbone.blocks[backbone.depth - config.layers :].modules())
    linears = {name for name, module in backbone.model.named_modules() if module in top and _is_linear(module)}
    targets = sorted(name for name in linears if name.rpartition(".")[2] in config.targets)
    known = {name.rpartition(".")[2] for name in linears}
    if unknown := sorted(set(config.targets) - known):
        raise ConfigError(
            f"model.adapter.targets = {list(config.targets)}: {', '.join(unknown)} not found in the top layers; linear "
            f"layers there: {', '.join(sorted(known))}."
        )
    lora = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, bias="none", target_modules=targets
    )  # fmt: skip
    with warnings.catch_warnings():
        # PEFT asks transformers for a property under its old name; nothing of ours depends on it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        model = peft.get_peft_model(backbone.model, lora)
    model.peft_config["default"].base_model_name_or_path = public_name(backbone.name)
    return model


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def array_name(module: str) -> str:
    """Return the key of a LoRA layer's weight in PEFT's adapter file, from its module name in the PeftModel."""
    return f"{module.removesuffix('.default')}.weight"


def group_of(name: str) -> str:
    """Return the parameter group, "head" or "adapter", of an array."""
    return "head" if name.startswith(HEAD) else "adapter"


def save(directory: Path, arrays: Arrays, lora: Any | None, head: Mapping[str, object]) -> None:
    """Write PEFT's adapter_config.json and adapter_model.safetensors, and a head with a JSON that says how to apply it.

    `peft.PeftModel.from_pretrained` loads the directory without fedpers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    adapter = {name: np.ascontiguousarray(a) for name, a in arrays.items() if group_of(name) == "adapter"}
    if lora is not None and adapter:
        lora.save_pretrained(str(directory))
        save_file(adapter, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    heads = {name: np.ascontiguousarray(a) for name, a in arrays.items() if group_of(name) == "head"}
    save_file(heads, directory / "head.safetensors")
    (directory / "head.json").write_text(json.dumps(head, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load(directory: Path) -> dict[str, NDArray[np.float32]]:
    """Read the arrays that `save` wrote."""
    arrays: dict[str, NDArray[np.float32]] = dict(load_file(directory / "head.safetensors"))
    if (directory / "adapter_model.safetensors").exists():
        arrays.update(load_file(directory / "adapter_model.safetensors"))
    return arrays
