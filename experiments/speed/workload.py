"""The workload that all peers run: who trains on which tokens, in which batches, from which weights.

    python experiments/speed/workload.py FILE [--task reply|next] [--layers 2] [--users 64]

People, message lengths and candidates are those of `configs/chitchat.yaml`, or, of the next message, those of
`configs/next_message.yaml`. The file holds real people's texts as token
ids and the place of the backbone on this machine: keep it in a private folder outside of the repository. It is all that
a peer needs; fedpers itself is needed to write it, not to read it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from fedpers.cohort.batching import Step
    from fedpers.config import Config
    from fedpers.models.backbone import Backbone
    from fedpers.tasks.base import Examples

CONFIGS = Path(__file__).parents[2] / "configs"
TASKS = {"reply": ("chitchat.yaml", "all-MiniLM-L6-v2"), "next": ("next_message.yaml", "SmolLM2-135M-Instruct")}
IGNORED = -100  # what PyTorch's cross-entropy leaves out
START = "start."  # before the names of the weights that training starts from
SPREAD = 0.02  # of the random start: at the public start B is 0, and the gradient of A would be, too


@dataclass(frozen=True)
class Settings:
    """What is trained, and how; the same for every peer."""

    task: str  # of TASKS
    backbone: str  # folder of the Hugging Face model
    layers: int  # top layers with an adapter
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")  # of the next message ("q_proj", "v_proj")
    scale: float = 20.0  # of the ranking head's scores
    batch_size: int = 16  # fixed batches; the last of a client may be smaller, and is divided by this all the same
    lr: float = 0.05  # SGD, adapter and head alike
    clip: float = 1.0
    noise_multiplier: float = 1.0


@dataclass(frozen=True)
class Batch:
    """One step of one client, padded to its own longest text."""

    ids: Tensor  # (records, tokens)
    mask: Tensor  # (records, tokens), 1 where real
    candidates: Tensor  # (records, candidates, width), embedded by the frozen backbone beforehand; else (records, 0, 0)
    targets: Tensor  # (records,), the place of the true reply: 0; or (records, tokens), what comes next, or IGNORED


@dataclass(frozen=True)
class Workload:
    """Settings, the weights that every client starts from (out, in) by name, and each client's batches in order."""

    settings: Settings
    start: dict[str, Tensor]
    clients: list[list[Batch]]


def load(path: Path) -> Workload:
    """Read what `write` wrote."""
    with safe_open(path, framework="pt") as file:
        found = json.loads(file.metadata()["settings"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    texts = torch.split(arrays["tokens"], arrays["lengths"].tolist())
    clients: list[list[Batch]] = [[] for _ in range(int(arrays["clients"].max()) + 1)]
    start = 0
    for client, size in zip(arrays["clients"].tolist(), arrays["sizes"].tolist(), strict=True):
        rows = slice(start, start + size)
        ids = pad_sequence(list(texts[rows]), batch_first=True)
        mask = (torch.arange(ids.shape[1])[None, :] < arrays["lengths"][rows, None]).long()
        if found["task"] == "next":
            nothing, starts = torch.zeros(size, 0, 0), arrays["starts"][rows].tolist()
            clients[client].append(Batch(ids, mask, nothing, _following(texts[rows], starts, ids.shape[1])))
        else:
            candidates = arrays["embeddings"][arrays["candidates"][rows]]
            clients[client].append(Batch(ids, mask, candidates, torch.zeros(size, dtype=torch.long)))
        start += size
    weights = {name.removeprefix(START): array for name, array in arrays.items() if name.startswith(START)}
    return Workload(Settings(**{**found, "targets": tuple(found["targets"])}), weights, clients)


def _following(texts: Sequence[Tensor], starts: Sequence[int], width: int) -> Tensor:
    """Return what comes after each token, (records, width), where it is to be predicted."""
    found = torch.full((len(texts), width), IGNORED)
    for place, (ids, start) in enumerate(zip(texts, starts, strict=True)):
        found[place, start - 1 : len(ids) - 1] = ids[start:]
    return found


def configure(task: str, layers: int, users: int) -> Config:
    """Return the workload as a configuration of fedpers, without its protection."""
    from fedpers.config import load_config

    s, (file, backbone) = settings_of(task, "", layers), TASKS[task]
    changes = [
        "method=fedavg", "frontier=null", "share=adapter+head", "privacy={}", f"data.users={users}", "data.max_test=5",
        f"model.backbone={backbone}", f"model.adapter.layers={layers}",
        f"model.adapter.targets=[{', '.join(s.targets)}]",
        f"model.adapter.rank={s.rank}", f"model.adapter.alpha={s.alpha}", "local.epochs=1",
        f"local.batch_size={s.batch_size}", f"local.lr.adapter={s.lr}", f"local.lr.head={s.lr}",
    ]  # fmt: skip
    return load_config(CONFIGS / file, changes + ([f"task.scale={s.scale}"] if task == "reply" else []))


def settings_of(task: str, backbone: str, layers: int) -> Settings:
    """Return what is trained in a task."""
    plain = Settings(task, backbone, layers)
    return plain if task == "reply" else replace(plain, targets=("q_proj", "v_proj"))


def order(config: Config, examples: Examples) -> list[Step]:
    """Return the one epoch of all clients as steps of fedpers: the order of the batches in the file."""
    from fedpers.cohort.batching import epochs
    from fedpers.privacy.randomness import seed_key

    users = range(len(examples.users))
    return epochs(examples, users, 1, config.local.batch_size, seed_key(config.seed), ("speed",))


def write(path: Path, task: str, layers: int, users: int) -> None:
    """Write the workload of so many people with adapters in so many top layers."""
    from peer_model import make

    from fedpers.experiment import prepare
    from fedpers.models import assets
    from fedpers.models.backbone import Backbone
    from fedpers.registry import find
    from fedpers.tasks.base import Task

    config = configure(task, layers, users)
    examples = prepare(config).examples
    steps = order(config, examples)
    batches = [(client, step.rows[step.owners == client]) for client in range(users) for step in steps]
    batches = [(client, rows) for client, rows in batches if len(rows)]
    rows = torch.cat([torch.from_numpy(rows) for _, rows in batches])
    backbone = Backbone(TASKS[task][1])
    inputs = find("tasks", config.task.name, Task)(config.task).tokenize(backbone, examples, config.data.max_tokens)
    settings = settings_of(task, str(assets.fetch(TASKS[task][1])), layers)
    torch.manual_seed(0)
    public = make(settings).arrays()
    start = {name: p.detach() + SPREAD * torch.randn(p.shape) for name, p in sorted(public.items())}
    found = [inputs.ids[row] for row in rows.tolist()]
    starts = torch.tensor([inputs.starts[row] for row in rows.tolist()] if inputs.starts else [])
    arrays = {
        "rows": rows,  # of fedpers's examples, to tell that it still makes the same ones
        "tokens": torch.cat(found),
        "lengths": torch.tensor([len(ids) for ids in found]),
        "clients": torch.tensor([client for client, _ in batches]),
        "sizes": torch.tensor([len(rows) for _, rows in batches]),
        **(_candidates(backbone, config, examples, rows) if task == "reply" else {"starts": starts}),
        **{f"{START}{name}": value for name, value in start.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    save_file({n: array.contiguous() for n, array in arrays.items()}, path, {"settings": json.dumps(asdict(settings))})
    path.chmod(0o600)
    print(f"{users} clients, {len(rows)} records in {len(batches)} batches, {int(arrays['lengths'].sum())} tokens")


def _candidates(backbone: Backbone, config: Config, examples: Examples, rows: Tensor) -> dict[str, Tensor]:
    """Return the embeddings of all candidates that the rows have, and where each row's lie among them."""
    from fedpers.cohort.lanes import Lanes
    from fedpers.cohort.prefix_cache import Embedded
    from fedpers.models import backbone as backbones
    from fedpers.reporting import Reporter

    texts, lanes = (
        backbone.tokenize(examples.texts, config.data.max_tokens),
        Lanes(backbone, backbones.Backbone.twin, 1),
    )
    embeddings = Embedded(lanes, texts, config.engine.token_budget, Reporter().stage, "candidates").vectors
    used, places = torch.unique(torch.from_numpy(examples.candidates)[rows], return_inverse=True)
    return {"candidates": places, "embeddings": embeddings[used]}


def main() -> None:
    """Write a workload file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--task", choices=sorted(TASKS), default="reply", help="rank replies, or write the next message"
    )
    parser.add_argument("--layers", type=int, default=2, help="top layers with an adapter")
    parser.add_argument("--users", type=int, default=64)
    args = parser.parse_args()
    write(args.file, args.task, args.layers, args.users)


if __name__ == "__main__":
    main()
