"""The models of all peers: a Hugging Face model, PEFT's LoRA, and fedpers's head as plain linear layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from workload import IGNORED, Settings

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
transformers.utils.logging.disable_progress_bar()


class PeerModel(nn.Module):
    """What both tasks have in common. Every dropout is 0, as in fedpers."""

    def __init__(self, settings: Settings, kind: Any) -> None:
        super().__init__()
        config = transformers.AutoConfig.from_pretrained(settings.backbone)
        for key, value in config.to_dict().items():
            if isinstance(value, float) and "dropout" in key:
                setattr(config, key, 0.0)
        backbone = kind.from_pretrained(settings.backbone, config=config, dtype=torch.float32)
        lora = peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=list(settings.targets),
            layers_to_transform=list(range(config.num_hidden_layers - settings.layers, config.num_hidden_layers)),
        )  # fmt: skip
        self.encoder = peft.get_peft_model(backbone, lora)
        self.width: int = config.hidden_size

    def head(self) -> dict[str, nn.Linear]:
        """Return the head's layers, by fedpers's names."""
        raise NotImplementedError

    @staticmethod
    def of_output(output: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each record, (records,), of what `forward` gives."""
        raise NotImplementedError

    def arrays(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by fedpers's names."""
        adapter = {n.replace(".default", ""): p for n, p in self.encoder.named_parameters() if "lora_" in n}
        return adapter | {f"head.{name}.weight": layer.weight for name, layer in self.head().items()}


class Replies(PeerModel):
    """Scores the candidates of each record."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, transformers.AutoModel)
        self.agreement = nn.Linear(1, 1, bias=False)
        self.direction = nn.Linear(self.width, 1, bias=False)
        nn.init.ones_(self.agreement.weight)
        nn.init.zeros_(self.direction.weight)
        self.scale = settings.scale
        self.train()  # Opacus needs it

    def head(self) -> dict[str, nn.Linear]:
        """Return the head's layers, by fedpers's names."""
        return {"agreement": self.agreement, "direction": self.direction}

    def forward(self, ids: Tensor, mask: Tensor, candidates: Tensor) -> Tensor:
        """Return scores (records, candidates) of ids and mask (records, tokens), candidates (records, ..., width)."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.to(hidden.dtype).unsqueeze(-1)
        context = functional.normalize((hidden * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)
        similarity = torch.einsum("rd,rcd->rc", context, candidates)
        scores: Tensor = self.agreement(similarity.unsqueeze(-1)) + self.direction(candidates)
        return self.scale * scores.squeeze(-1)

    @staticmethod
    def of_output(scores: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each record, (records,)."""
        return functional.cross_entropy(scores, targets, reduction="none")


class NextMessage(PeerModel):
    """Predicts each record's own tokens; the head adds a vector to the last hidden states."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, transformers.AutoModelForCausalLM)
        self.shift = nn.Linear(1, self.width, bias=False)
        nn.init.zeros_(self.shift.weight)
        self.train()

    def head(self) -> dict[str, nn.Linear]:
        """Return the head's layers, by fedpers's names."""
        return {"shift": self.shift}

    def arrays(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by fedpers's names."""
        return {name.replace("base_model.model.model.", "base_model.model."): p for name, p in super().arrays().items()}

    def forward(self, ids: Tensor, mask: Tensor, candidates: Tensor) -> Tensor:
        """Return scores of all words, (records, tokens, words)."""
        model = self.encoder.get_base_model()
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        scores: Tensor = model.lm_head(hidden + self.shift(torch.ones_like(hidden[..., :1])))
        return scores

    @staticmethod
    def of_output(scores: Tensor, targets: Tensor) -> Tensor:
        """Return each record's mean over its own tokens, (records,)."""
        # Words last: over another dimension PyTorch adds 49,152 of them up one by one, which is slower and less exact.
        each = functional.cross_entropy(
            scores.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
        ).view(targets.shape)
        return each.sum(dim=1) / (targets != IGNORED).sum(dim=1)


def make(settings: Settings) -> PeerModel:
    """Return the model of the task."""
    return Replies(settings) if settings.task == "reply" else NextMessage(settings)


class Criterion(nn.Module):
    """The losses of a batch's records, summed or averaged."""

    def __init__(self, model: PeerModel, reduction: str) -> None:
        super().__init__()
        self.of_output, self.reduction = model.of_output, reduction

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return one number, or with `none` (records,), of a model's output."""
        found: Tensor = self.of_output(output, targets)
        return {"sum": found.sum, "mean": found.mean, "none": lambda: found}[self.reduction]()


@torch.no_grad()
def copy_into(arrays: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    """Set a model's trained weights in place."""
    for name, parameter in arrays.items():
        parameter.copy_(weights[name])
