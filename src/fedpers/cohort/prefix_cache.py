"""What the frozen part of the backbone makes of each text, computed once and kept.

Below the lowest adapted block nothing changes during a run, so each record's hidden states there are computed once and
kept on disk, in fp32 or rounded to 16 bits as the run asks, under the hash of model, vocabulary, layer and token ids.
Without adapters the whole backbone is frozen, and one pooled vector per record is all that is kept.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedpers.cohort.batching import Index, microbatches
from fedpers.cohort.lanes import Lanes
from fedpers.models import assets
from fedpers.models.backbone import Backbone, Tokens

MAX_BYTES = 8 * 2**30  # of all cached files together; the least recently used go first
FORMAT = 2
Floats = NDArray[Any]  # float32, or float16 where a prefix is kept so
LARGEST = float(np.finfo(np.float16).max)
Kept = Literal["fp32", "fp16"]
Progress = Callable[[str, int, int], None]  # what, done, total
Fill = Callable[[Backbone, Floats, Index, Tensor, Tensor], None]  # by, into, rows, token ids, mask


class Embedded:
    """Unit-length vectors of texts by the frozen backbone, shape (texts, width), on its device; equal texts are encoded
    once.
    """

    def __init__(
        self, backbone: Lanes[Backbone], tokens: Tokens, budget: int, progress: Progress, what: str, keep: bool = True
    ) -> None:
        def fill(backbone: Backbone, out: Floats, rows: Index, ids: Tensor, mask: Tensor) -> None:
            out[rows] = backbone.encode(ids, mask).cpu().numpy()

        places: dict[tuple[int, ...], int] = {}
        rows = [places.setdefault(tuple(ids.tolist()), len(places)) for ids in tokens.ids]
        distinct = Tokens(tuple(torch.tensor(ids, dtype=torch.long) for ids in places))
        shape = (len(places), backbone.first.width)
        found = _cached(backbone, distinct, "pooled", shape, fill, budget, progress, what, keep)
        self.vectors = torch.from_numpy(found[np.array(rows, dtype=np.int64)]).to(backbone.first.device)


class Prefix:
    """Hidden states that block `layer` reads, for every record; ragged, kept flat as (all tokens, width).

    With `layer` at the backbone's depth they are what the whole backbone gives.
    """

    def __init__(
        self,
        backbone: Lanes[Backbone],
        tokens: Tokens,
        layer: int,
        budget: int,
        progress: Progress,
        keep: bool = True,
        kept_as: Kept = "fp32",
    ) -> None:
        self.lengths: Index = tokens.lengths.numpy()
        self.offsets: Index = np.concatenate([[0], np.cumsum(self.lengths)])

        def fill(backbone: Backbone, out: Floats, rows: Index, ids: Tensor, mask: Tensor) -> None:
            whole = layer == backbone.depth
            hidden = (backbone.last(ids, mask) if whole else backbone.below(ids, mask, layer)).cpu().numpy()
            if kept_as == "fp16":  # a rule on each record alone: no record may stop a run
                hidden = np.clip(hidden, -LARGEST, LARGEST)
            for place, row in enumerate(rows):
                out[self.offsets[row] : self.offsets[row + 1]] = hidden[place, : self.lengths[row]]

        shape, kind = (int(self.offsets[-1]), backbone.first.width), f"layer{layer}"
        self.flat = _cached(backbone, tokens, kind, shape, fill, budget, progress, "frozen layers", keep, kept_as)

    def batch(self, rows: Index) -> tuple[Tensor, Tensor]:
        """Return hidden states (records, tokens, width), zero where padded, and the mask (records, tokens)."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        hidden = np.zeros((len(rows), longest, self.flat.shape[1]), dtype=np.float32)
        for place, row in enumerate(rows):
            hidden[place, : lengths[place]] = self.flat[self.offsets[row] : self.offsets[row + 1]]
        mask = np.arange(longest)[None, :] < lengths[:, None]
        return torch.from_numpy(hidden), torch.from_numpy(mask.astype(np.int64))


def _cached(
    backbone: Lanes[Backbone],
    tokens: Tokens,
    kind: str,
    shape: tuple[int, int],
    fill: Fill,
    budget: int,
    progress: Progress,
    what: str,
    keep: bool,
    kept_as: Kept = "fp32",
) -> Floats:
    dtype = {"fp32": np.float32, "fp16": np.float16}[kept_as]
    if not keep:  # in memory alone
        found = np.empty(shape, dtype=dtype)
        _compute(found, backbone, tokens, fill, budget, progress, what)
        return found
    digest = hashlib.sha256(f"{FORMAT} {backbone.first.fingerprint()} {kind} {kept_as}".encode())
    # A run may get the same noise again only if it computes the same: what is kept is told apart as `identity` does.
    if kept_as == "fp16" or backbone.first.device.type != "cpu":
        digest.update(f"{backbone.first.device} {budget} {backbone.count}".encode())
    digest.update(tokens.lengths.numpy().tobytes())
    for ids in tokens.ids:
        digest.update(ids.numpy().tobytes())
    folder = assets.cache_dir() / "features"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{digest.hexdigest()}.npy"
    if path.exists():
        os.utime(path)
    else:
        # A unique name until it is complete: a killed or a second process can never leave or read half a file.
        scratch = folder / f"{uuid.uuid4().hex}.partial"
        out = np.lib.format.open_memmap(scratch, mode="w+", dtype=dtype, shape=shape)
        try:
            _compute(out, backbone, tokens, fill, budget, progress, what)
            out.flush()
            del out
            scratch.rename(path)
        finally:
            scratch.unlink(missing_ok=True)
        _evict(folder, keep=path)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def _compute(
    out: Floats,
    backbone: Lanes[Backbone],
    tokens: Tokens,
    fill: Fill,
    budget: int,
    progress: Progress,
    what: str,
) -> None:
    lengths: Index = tokens.lengths.numpy()

    def one(by: Backbone, rows: Index) -> int:
        ids = pad_sequence([tokens.ids[row] for row in rows], batch_first=True)
        mask = torch.from_numpy((np.arange(ids.shape[1])[None, :] < lengths[rows][:, None]).astype(np.int64))
        fill(by, out, rows, ids, mask)
        return len(rows)

    done, effort = 0, 2.0 * int(lengths.sum()) * 12 * backbone.first.width**2 * backbone.first.depth
    for count in backbone.each(one, list(microbatches(lengths, budget)), effort):
        done += count
        progress(what, done, len(lengths))


def _evict(folder: Path, keep: Path) -> None:
    files = sorted((f for f in folder.glob("*.npy") if f != keep), key=lambda f: f.stat().st_mtime)
    size = sum(f.stat().st_size for f in folder.glob("*.npy"))
    for file in files:
        if size <= MAX_BYTES:
            break
        size -= file.stat().st_size
        file.unlink(missing_ok=True)
