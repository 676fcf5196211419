"""The model of all peers: Hugging Face's BERT, PEFT's LoRA, and fedpers's ranking head as two plain linear layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from workload import Settings

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
transformers.utils.logging.disable_progress_bar()


class PeerModel(nn.Module):
    """Scores the candidates of each record; every dropout is 0, as in fedpers."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        config = transformers.AutoConfig.from_pretrained(settings.backbone)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        backbone = transformers.AutoModel.from_pretrained(settings.backbone, config=config, dtype=torch.float32)
        lora = peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=list(settings.targets),
            layers_to_transform=list(range(config.num_hidden_layers - settings.layers, config.num_hidden_layers)),
        )  # fmt: skip
        self.encoder = peft.get_peft_model(backbone, lora)
        self.agreement = nn.Linear(1, 1, bias=False)
        self.direction = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.ones_(self.agreement.weight)
        nn.init.zeros_(self.direction.weight)
        self.scale = settings.scale
        self.train()  # Opacus needs it

    def forward(self, ids: Tensor, mask: Tensor, candidates: Tensor) -> Tensor:
        """Return scores (records, candidates) of ids and mask (records, tokens), candidates (records, ..., width)."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.to(hidden.dtype).unsqueeze(-1)
        context = functional.normalize((hidden * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)
        similarity = torch.einsum("rd,rcd->rc", context, candidates)
        scores: Tensor = self.agreement(similarity.unsqueeze(-1)) + self.direction(candidates)
        return self.scale * scores.squeeze(-1)

    def arrays(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by fedpers's names."""
        adapter = {n.replace(".default", ""): p for n, p in self.encoder.named_parameters() if "lora_" in n}
        head = {"agreement": self.agreement, "direction": self.direction}
        return adapter | {f"head.{name}.weight": layer.weight for name, layer in head.items()}


@torch.no_grad()
def copy_into(arrays: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    """Set a model's trained weights in place."""
    for name, parameter in arrays.items():
        parameter.copy_(weights[name])
