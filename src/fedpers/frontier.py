"""A small privacy-utility picture: the same run at several methods and privacy levels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpers.config import Config
from fedpers.errors import ConfigError, PrivacyRefusal
from fedpers.experiment import Experiment
from fedpers.figures.frontier import FrontierCell, frontier
from fedpers.privacy.claim import Claim, rounded_up
from fedpers.privacy.forecast import Forecast
from fedpers.privacy.ledger import Ledger
from fedpers.privacy.levels import unprotected, with_own_secret
from fedpers.privacy.spending import composed

# a run's claim, its summary (or the part of it that `summarize` makes), and the forecast if one was asked for
Outcome = tuple[Claim, dict[str, Any], Forecast | None]


def cells(config: Config) -> dict[str, Config]:
    """Return the configuration of every cell of `config.frontier`, by a name for its directory.

    Epsilon infinity stands for no privacy at all: neither noise nor clipping. Each cell has a secret of its own.
    """
    assert config.frontier is not None
    found = {}
    share = config.frontier.share or config.share
    for method in config.frontier.methods:
        for epsilon in config.frontier.epsilons:
            name = f"{method}-eps-{'inf' if math.isinf(epsilon) else format(epsilon, 'g')}"
            if math.isinf(epsilon):
                privacy = unprotected(config.privacy)
            elif config.privacy.unit == "none":
                raise ConfigError(
                    "frontier.epsilons: finite values need privacy.unit record or user, and privacy.clip."
                )
            else:
                privacy = config.privacy.model_copy(update={"epsilon": epsilon})
            privacy = with_own_secret(privacy, name)
            options = config.options if method == config.method else {}  # they are the main method's own
            found[name] = config.model_copy(
                update={"method": method, "options": options, "share": share, "privacy": privacy, "frontier": None}
            )
    return found


def check(config: Config, prepare: Callable[[Config], Experiment]) -> dict[str, str]:
    """Return the refused cells and why. Raises ConfigError for what cannot be in the picture at all."""
    if not config.evaluation.local_only:
        raise ConfigError("frontier: needs evaluation.local_only=true, the line that costs no privacy.")
    if not config.rounds:
        raise ConfigError("frontier: needs rounds of at least 1; without a release there is no epsilon to draw.")
    refused = {}
    for name, cell in cells(config).items():
        try:
            if not prepare(cell).plan.shared:
                raise ConfigError(
                    f"frontier.methods: {cell.method!r} shares nothing; it is drawn as the local-only band."
                )
        except PrivacyRefusal as refusal:
            refused[name] = str(refusal)
    return refused


def draw(
    config: Config, path: Path, main: Outcome, refused: dict[str, str], run: Callable[[Config, Path], Outcome]
) -> list[Path]:
    """Run the cells below `path`/frontier, except the one that is the main run, and draw them all.

    Returns the directories of the cells that were run.

    Args:
        config: the main run's configuration.
        path: the main run's directory.
        main: its claim, results and forecast.
        refused: cells that must not run.
        run: runs a cell's configuration in a directory, or continues it.
    """
    drawn, ran = [], []
    for name, cell in cells(config).items():
        if name in refused:
            continue
        if _setup(cell) == _setup(config):
            claim, result, forecast = main
        else:
            ran.append(path / "frontier" / name)
            claim, result, forecast = run(cell, ran[-1])
        metrics = result["metrics"]
        drawn.append(
            FrontierCell(
                method=cell.method,
                epsilon=claim.epsilon if forecast is None else forecast.epsilon,
                delta=config.privacy.delta,
                unit=config.privacy.unit,
                label=f"trust: {claim.trust}",
                forecast=None if forecast is None else f"forecast for {forecast.population:,} users",
                own=_range(metrics["own"]),
                global_=_range(metrics["global"]),
                local=_range(metrics["local"]),
                zero_shot=metrics["zero_shot"]["mean"],
            )
        )
    shared = "+".join(config.frontier.share or config.share) if config.frontier else ""
    title = f"{config.name}: utility (exact, which no claim covers) against privacy, shared: {shared}"
    frontier(drawn, path / "figures", title)
    (path / "frontier").mkdir(exist_ok=True)
    (path / "frontier" / "refused.json").write_text(json.dumps(refused, indent=2) + "\n", encoding="utf-8")
    return ran


def further_runs(ledger: Ledger, ran: list[Path]) -> list[str]:
    """Say for the main run's claim that the same people were trained on again, and what all of it promises together."""
    ledgers = [Ledger.load(folder / "ledger.jsonl") for folder in ran]
    private = [one for one in ledgers if one.opening.unit != "none"]
    open_ = len(ledgers) - len(private)
    text = f"{len(ran)} further runs on the same people for the picture, {open_} of them without any privacy"
    if private and ledger.opening.unit == "user":
        text += f"; the private ones and this one together promise ε = {rounded_up(composed([ledger, *private]))}"
    return [text] if ran else []


def _setup(config: Config) -> Config:
    """All that two runs with the same results have in common: not the secret, and not whether they draw a picture."""
    privacy = config.privacy.model_copy(update={"secret": None})
    return config.model_copy(update={"privacy": privacy, "frontier": None})


def _range(metric: dict[str, Any]) -> tuple[float, float, float]:
    low, high = metric["ci95"]
    return metric["mean"], low, high
