"""`fedpers audit`: every check and attack that fits a configuration, in one list of findings."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from fedpers.audit.bounds import Finding
from fedpers.audit.canaries import user_canary_audit
from fedpers.audit.canaries_mechanism import mechanism_audit
from fedpers.audit.canaries_records import record_canary_audit
from fedpers.audit.checks import TOLERANCE
from fedpers.audit.inversion import inversion_report
from fedpers.audit.membership import membership
from fedpers.audit.probe import probe
from fedpers.config import Config, parse_config
from fedpers.errors import ConfigError
from fedpers.experiment import prepare
from fedpers.figures.audit import claimed_and_found
from fedpers.models.backbone import Backbone
from fedpers.reporting import Reporter
from fedpers.run_place import check_empty

INVERSION_TOKENS, INVERSION_RANK = 14, 16
SPEAKS = 2.0  # a claim well below the ceiling of a thousand canaries
_RATES = ("span_recall", "nearest_recall", "optimization_recall", "chance", "tokens")


class _Canaries(Protocol):
    def __call__(self, config: Config, *, reporter: Reporter) -> list[Finding]: ...


@dataclass(frozen=True)
class Audit:
    """What was found, and where it was written."""

    findings: list[Finding]
    inversion: dict[str, dict[str, float]]  # success of gradient inversion, without and with noise; empty if not tried
    figures: list[Path]
    seconds: float

    @property
    def violations(self) -> list[Finding]:
        """The findings that show a claim to be false."""
        return [finding for finding in self.findings if finding.verdict == "violation"]


def audit(config: Config, out: Path, *, probe_only: bool = False, reporter: Reporter | None = None) -> Audit:
    """Audit a configuration; writes audit.json and a figure to `out`.

    The probe checks the mechanism on a slice of the people. Then come the audits that train: canaries in the place of
    whole users or of records (a bound on epsilon, from one run), two-sample tests of a single release (a bound),
    membership attacks with shadow federations (a bound from their coins, and success rates), gradient inversion
    (success rates). A bound below the claim does not prove the claim; a bound above it refutes it.

    Raises:
        FedpersError: the configuration is refused or cannot be run, or `out` is taken.
    """
    reporter, began = reporter or Reporter(), time.monotonic()
    check_empty(out)
    if config.data.lazy and not probe_only:
        raise ConfigError(
            "data.lazy: the attacks train on the records of all users; say --probe, or data.lazy=false and fewer "
            "data.users."
        )
    config = config.model_copy(update={"frontier": None})
    findings = _timed("probe", reporter, lambda: probe(config, reporter))
    inversion: dict[str, dict[str, float]] = {}
    if not probe_only:
        if _can_invert(config):
            reporter.message("gradient inversion ...")
            inversion = inversion_report(inversion_setup(config))
        for name, one in _audits(config, reporter):
            findings += _timed(name, reporter, one)
    out.mkdir(parents=True, exist_ok=True)
    figures = [] if probe_only else claimed_and_found(findings, inversion, out, f"{config.name}: claimed and found")
    seconds = time.monotonic() - began
    content = {"findings": [finding.to_dict() for finding in findings], "inversion": inversion, "seconds": seconds}
    (out / "audit.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return Audit(findings, inversion, figures, seconds)


def _audits(config: Config, reporter: Reporter) -> Sequence[tuple[str, Callable[[], list[Finding]]]]:
    if not config.rounds:
        return []
    found: list[tuple[str, Callable[[], list[Finding]]]] = []
    noised = not math.isinf(config.privacy.epsilon) or config.privacy.noise_multiplier is not None
    unit = config.privacy.unit
    if unit == "record" and not prepare(config).federation.pool:
        reporter.message("record canaries NOT RUN: they are made of a public pool's words, and these data have no pool")
    elif unit != "none":
        canaries: _Canaries = user_canary_audit if unit == "user" else record_canary_audit
        found.append((f"{unit} canaries", lambda: canaries(config, reporter=reporter)))
        if SPEAKS < config.privacy.epsilon < math.inf:
            strict = f"{unit} canaries at epsilon {SPEAKS:g}"
            found.append((strict, lambda: _stricter(canaries, config, reporter)))
    if config.privacy.unit != "none" and noised:
        found.append(("one release", lambda: mechanism_audit(prepare(config).guarantee)))
    found.append(("membership", lambda: membership(config, reporter=reporter)))
    return found


def _stricter(canaries: _Canaries, config: Config, reporter: Reporter) -> list[Finding]:
    """Audit the same program at an epsilon that one run can speak about; above it, silence would say nothing."""
    changes = {"epsilon": SPEAKS, "noise_multiplier": None, "stop": "rounds"}
    strict = config.model_copy(update={"privacy": config.privacy.model_copy(update=changes)})
    return [replace(one, name=f"{one.name}, at ε = {SPEAKS:g}") for one in canaries(strict, reporter=reporter)]


def _timed(name: str, reporter: Reporter, work: Callable[[], list[Finding]]) -> list[Finding]:
    began = time.monotonic()
    reporter.message(f"{name} ...")
    found = work()
    reporter.message(f"{name}: {len(found)} findings in {time.monotonic() - began:.1f} s")
    return found


def _can_invert(config: Config) -> bool:
    """Whether a LoRA update leaves the clients and inversion has a clip to try noise with."""
    ranks = config.task.name == "reply-ranking"  # whose loss the attacks know
    return ranks and "adapter" in config.share and config.privacy.clip is not None and config.rounds > 0


def inversion_setup(config: Config) -> Config:
    """Return the configuration with an adapter that the span test can read: all layers, and as many ranks as tokens.

    The weakest place to be in; what fails here fails with the configured adapter, too.
    """
    tree = config.model_dump()
    tree["method"], tree["share"] = "fedavg", "adapter+head"
    depth = Backbone(config.model.backbone).depth
    tree["model"]["adapter"] |= {"layers": depth, "rank": INVERSION_RANK, "alpha": float(INVERSION_RANK)}
    tree["data"]["max_tokens"] = min(config.data.max_tokens, INVERSION_TOKENS)
    tree["local"]["optimizer"] = "sgd"
    tree["server"] = {}
    tree["engine"]["device"] = "cpu"  # what is attacked is the update, wherever it was made
    keep = ("epsilon", "delta", "clip", "secret")
    tree["privacy"] = {"unit": "record", **{key: tree["privacy"][key] for key in keep}}
    return parse_config(tree)


def print_audit(found: Audit, out: Path, console: Console) -> None:
    """Print the findings as tables and one line that sums them up."""
    checks = [finding for finding in found.findings if finding.kind == "check"]
    table = Table("check", "of", "allowed", "measured", "verdict", box=SIMPLE)
    for one in checks:
        small = one.claimed == 0 and one.empirical < TOLERANCE
        measured = "not done" if math.isnan(one.empirical) else "under 0.0001" if small else f"{one.empirical:.4g}"
        table.add_row(one.name, one.what, f"{one.claimed:.4g}", measured, one.verdict)
    console.print(table)
    console.print("Checks on twelve people at most: sums in clips, noise in the ledger's, chance in deviations.")
    others = [finding for finding in found.findings if finding.kind != "check"]
    if others:
        columns = (Column(name, no_wrap=True) for name in ("claimed ε", "found ε", "ceiling", "verdict"))
        table = Table("audit", *columns, box=SIMPLE)
        for one in others:
            empirical = f"{one.empirical:.2f}" + (" (est.)" if one.kind == "estimate" else "")
            name = f"{one.name}: {one.what} ({one.unit})"
            table.add_row(name, _number(one.claimed), empirical, _number(one.ceiling), one.told)
        console.print(table)
    if found.inversion:
        table = Table("gradient inversion", *(key.replace("_", " ") for key in _RATES), box=SIMPLE)
        for name, rates in found.inversion.items():
            table.add_row(name, *(f"{rates[key]:.2f}" for key in _RATES))
        console.print(table)
    bad = found.violations
    verdicts = " ".join(sorted({f"{one.name}: {one.detail}" for one in bad}))
    says = (
        f"VIOLATION: a check failed, or a bound that holds in 95 of 100 audits exceeds the claim. {verdicts}"
        if bad
        else ("No violation. A lower bound below the claim does not prove it, and a powerless audit says nothing.")
    )
    console.print(f"{says}\n{found.seconds:.0f} s; findings: {out / 'audit.json'}", highlight=False, markup=False)
    for path in found.figures:
        if path.suffix == ".png":
            console.print(f"figure: {path}", highlight=False, markup=False, soft_wrap=True)


def _number(value: float) -> str:
    return "∞" if value == math.inf else "" if math.isnan(value) else f"{value:.2f}"
