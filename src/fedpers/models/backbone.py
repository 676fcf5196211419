"""The frozen backbone: loading, and running it in two parts, below and above the lowest adapted layer."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedpers.errors import AssetError, ConfigError
from fedpers.models import assets


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass(frozen=True)
class Tokens:
    """Token ids of many texts, ragged."""

    ids: tuple[Tensor, ...]  # each (tokens,)
    starts: tuple[int, ...] = ()  # position of the first token that is to be predicted; of a language model alone

    def before(self) -> Tokens:
        """Return the tokens that stand before what is to be predicted; all of them where nothing is."""
        if not self.starts:
            return self
        return Tokens(tuple(ids[:start] for ids, start in zip(self.ids, self.starts, strict=True)))

    @property
    def lengths(self) -> Tensor:
        """Tokens per text, shape (texts,)."""
        return torch.tensor([len(one) for one in self.ids], dtype=torch.long)


class Backbone:
    """A pretrained encoder with every dropout at 0, its tokenizer, and the stack of its blocks.

    Dropout is 0 because Opacus needs train mode, and an active dropout would break the prefix cache, the equality of
    cohorts and the replay of runs.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        """Load a model and put it on a device.

        Raises:
            AssetError: it cannot be loaded.
            ConfigError: it has no stack of blocks, or PyTorch has no such device here.
        """
        import transformers

        self.device = usable(device)

        transformers.utils.logging.disable_progress_bar()
        self.name = name
        path = _locate(name)
        try:
            config = transformers.AutoConfig.from_pretrained(path)
            for key, value in config.to_dict().items():
                if isinstance(value, float) and ("dropout" in key or "pdrop" in key):
                    setattr(config, key, 0.0)
            config.use_cache = False  # of keys and values, which training would fill and never read
            # Weights in safetensors alone: the older format is a pickle, which runs what it says.
            self.model: Any = transformers.AutoModel.from_pretrained(
                path, config=config, dtype=torch.float32, use_safetensors=True
            )
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise AssetError(
                f"model.backbone {name!r}: not an asset, and cannot be loaded as a local path or Hugging Face id "
                f"({reason}); see `fedpers assets list`."
            ) from error
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.model.requires_grad_(False).to(self.device)
        self.width: int = config.hidden_size
        self._parent, self._attribute, self.blocks = _stack(self.model, name)

    def shared(self) -> Iterator[Any]:
        """Yield what copies need not have of their own."""
        yield from (self.tokenizer, self.model.config, *self.model.parameters(), *self.model.buffers())

    def twin(self) -> Backbone:
        """Return a copy for another thread, with the same weights."""
        return copy.deepcopy(self, {id(one): one for one in self.shared()})

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def vocabulary(self) -> Tensor:
        """Output embeddings (vocabulary, width), the input's where a language model ties them.

        Raises ConfigError for a model that is no causal language model, or has separate output embeddings.
        """
        kind = type(self.model).__name__
        if not getattr(self.model.config, "tie_word_embeddings", False) or getattr(
            self.model.config, "is_encoder_decoder", False
        ):
            raise ConfigError(f"model.backbone {self.name!r}: {kind} does not tie its output to its input embeddings.")
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    def fingerprint(self) -> str:
        """Return a hash of all weights, configuration and vocabulary: the key of what is cached about them."""
        digest = hashlib.sha256(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        settings = {k: v for k, v in self.model.config.to_dict().items() if k != "_name_or_path"}  # where it lies
        digest.update(repr(sorted(settings.items(), key=lambda item: item[0])).encode())
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode() + value.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    def tokenize(self, texts: Sequence[str], max_tokens: int) -> Tokens:
        """Return token ids, at most `max_tokens` per text, special tokens included."""
        if not texts:
            return Tokens(())
        found = self.tokenizer(list(texts), truncation=True, max_length=max_tokens, padding=False)["input_ids"]
        return Tokens(tuple(torch.tensor(ids, dtype=torch.long) for ids in found))

    def below(self, ids: Tensor, mask: Tensor, layer: int) -> Tensor:
        """Return the hidden states (rows, tokens, width) that block `layer` reads, for token ids (rows, tokens)."""

        # Stopping at the block's door works for every architecture, final norms and all.
        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        handle = self.blocks[layer].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        except _Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise ConfigError(f"model.backbone {self.name!r}: block {layer} is never run.")

    def above(self, hidden: Tensor, mask: Tensor, layer: int) -> Tensor:
        """Run block `layer` and those above on its input (rows, tokens, width); returns the last hidden states.

        Input and mask are on the backbone's device.
        """
        # The model builds masks and positions itself; what it makes of the embeddings is replaced at the first block.
        handle = self.blocks[layer].register_forward_pre_hook(
            lambda _module, args, kwargs: (
                ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
            ),
            with_kwargs=True,
        )
        try:
            with self._only(slice(layer, None)):
                embeddings = hidden.new_zeros(*hidden.shape[:-1], self.model.get_input_embeddings().embedding_dim)
                output: Tensor = self.model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        finally:
            handle.remove()
        return output

    def last(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the last hidden states (rows, tokens, width) by the backbone as it stands."""
        with torch.no_grad():
            found = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        output: Tensor = found.last_hidden_state
        return output

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return unit-length text embeddings (rows, width) by the backbone as it stands."""
        return pool(self.last(ids, mask), mask.to(self.device))

    def _public_text(self) -> Tensor:
        """Token ids (1, tokens) of a text that is nobody's, to try things on."""
        return (
            self.tokenize(["a text to compare with itself, and no more than that"], 16)
            .ids[0]
            .unsqueeze(0)
            .to(self.device)
        )

    def check_half(self, layer: int) -> None:
        """Refuse to keep what block `layer` reads in 16 bits where these cannot hold it, by the look of a public text.

        Raises ConfigError.
        """
        ids = self._public_text()
        largest = self.below(ids, torch.ones_like(ids), layer).abs().max()
        if largest > torch.finfo(torch.float16).max / 4:
            raise ConfigError(
                f"engine.prefix=fp16: block {layer} of {self.name!r} reads numbers up to {largest:.0f}, and 16 bits "
                "hold none above 65504; set engine.prefix=fp32."
            )

    def check_split(self, layer: int) -> None:
        """Run one text whole and in two parts; raises ConfigError when they differ (an architecture we cannot cut)."""
        ids = self._public_text()
        mask = torch.ones_like(ids)
        whole = self.encode(ids, mask)
        with torch.no_grad():
            parts = pool(self.above(self.below(ids, mask, layer), mask, layer), mask)
        if not torch.allclose(whole, parts, atol=1e-5):
            raise ConfigError(
                f"model.backbone {self.name!r}: cutting it at block {layer} changes its output, so its frozen part "
                "cannot be cached; adapt all blocks (model.adapter.layers) or choose a BERT-like encoder."
            )

    @contextmanager
    def _only(self, part: slice) -> Iterator[None]:
        setattr(self._parent, self._attribute, nn.ModuleList(self.blocks[part]))
        try:
            yield
        finally:
            setattr(self._parent, self._attribute, self.blocks)


def usable(name: str) -> torch.device:
    """Return a device by its name; raises ConfigError if PyTorch has none such here, or cannot read what lies there."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # one for each way of not being there
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"engine.device={name}: PyTorch has no such device here ({reason}); set engine.device=cpu."
        ) from error
    return device


def next_tokens(tokens: Tokens, rows: NDArray[np.int64], width: int) -> Tensor:
    """Return the token after each position, (rows, width); -1 where none is to be predicted, or beyond the text."""
    found = torch.full((len(rows), width), -1, dtype=torch.long)
    for place, row in enumerate(rows):
        ids, start = tokens.ids[row], tokens.starts[row]
        found[place, start - 1 : len(ids) - 1] = ids[start:]
    return found


def public_name(name: str) -> str:
    """Return what may be shown of a backbone's name: of a local path, there or not, only the last part."""
    local = Path(name).exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    return Path(name).name if local else name


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of (rows, tokens, width), scaled to unit length (sentence-transformers' recipe)."""
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
    return functional.normalize(mean, dim=-1)


def _locate(name: str) -> str:
    if name in assets.ASSETS:
        return str(assets.fetch(name))
    if not Path(name).exists() and "/" not in name:
        assets.get(name)  # raises, with the nearest asset's name
    return name


def _stack(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.ModuleList]:
    """Find the one list of blocks: the longest ModuleList whose members are all of one class."""
    found = [
        (len(child), parent, attribute, child)
        for parent in model.modules()
        for attribute, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len({type(block) for block in child}) == 1
    ]
    if not found:
        raise ConfigError(f"model.backbone {name!r}: no stack of transformer blocks found in {type(model).__name__}.")
    _, parent, attribute, blocks = max(found, key=lambda item: item[0])
    return parent, attribute, blocks
