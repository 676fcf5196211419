"""What of a run may be shown to others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from fedpers.errors import RunDirectoryError
from fedpers.models.backbone import public_name
from fedpers.privacy.claim import Claim
from fedpers.privacy.claiming import reread
from fedpers.privacy.ledger import Ledger
from fedpers.run_directory import RunDirectory

PUBLIC = (
    "config.yaml",
    "environment.json",
    "claim.json",
    "forecast.json",
    "ledger.jsonl",
)
PUBLIC_ADAPTERS = (  # of shared arrays, in adapters/shared and, for a method with clusters, in adapters/cluster0, ...
    "adapter_config.json",
    "adapter_model.safetensors",
    "residual.safetensors",
    "second.safetensors",
    "gate.safetensors",
    "norm.safetensors",
    "head.json",
    "head.safetensors",
)


def export_public(run: Path, out: Path) -> list[str]:
    """Copy what a release may hold: no personal state, no secret, no metrics (they are measured without noise).

    Raises:
        RunDirectoryError: the run is not finished, or `out` is not empty.
        LedgerError: the claim is not what the ledger gives.
    """
    if not RunDirectory(run).finished:
        raise RunDirectoryError(f"{run}: no finished run; finish it with `fedpers run ... --resume` first.")
    reread(Claim.from_json((run / "claim.json").read_bytes()), Ledger.load(run / "ledger.jsonl"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunDirectoryError(f"{out} is not an empty directory; choose another one.")
    out.mkdir(parents=True, exist_ok=True)
    copied = []
    folders = ["shared", *(f"cluster{place}" for place in range(len(list((run / "adapters").glob("cluster*")))))]
    for name in (*PUBLIC, *(f"adapters/{folder}/{file}" for folder in folders for file in PUBLIC_ADAPTERS)):
        if not (run / name).exists():
            continue  # a method that shares nothing has no adapters, one that shares the head has no LoRA files
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / name, out / name)  # not the private mode of the original
        copied.append(name)
    config = without_folders(yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8")))
    (out / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return copied


def without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """Change a configuration's tree so that of the folders of this machine only the last part is left; returns it."""
    config["model"]["backbone"] = public_name(config["model"]["backbone"])
    data = config["data"]
    if data.get("path") and not data["path"].startswith("hub:"):
        data["path"] = data["path"].rstrip("/").rpartition("/")[2]
    if (data.get("lamp") or {}).get("tokenizer"):
        data["lamp"]["tokenizer"] = public_name(data["lamp"]["tokenizer"])
    return config
