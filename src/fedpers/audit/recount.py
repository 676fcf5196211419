"""The claim of a ledger, counted a second time: from the file's lines, by other code than the claim's accountant."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any

import numpy as np
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.linalg import toeplitz
from scipy.stats import norm

from fedpers.audit.bounds import Finding
from fedpers.privacy.claim import METRICS, TUNING
from fedpers.privacy.claiming import claim_from
from fedpers.privacy.ledger import Ledger

PRV_ERROR = 0.01
PRV_LARGEST = 60.0  # its grid takes gigabytes and minutes beyond


def recount(ledger: Ledger) -> list[Finding]:
    """Compare the claim with a second count that may be lower than the truth, never higher.

    Poisson sampling by Opacus's PRV accountant less twice its error; no sampling by the exact trade-off of two
    Gaussians whose distance is computed here from participation and noise; a filter by Opacus's Renyi divergences.
    Fixed-size sampling has no second accountant here, and says so.
    """
    claim = claim_from(ledger, expected_rounds=None, excluded=[METRICS, TUNING])
    opening, *lines = [json.loads(line) for line in ledger.path.read_text(encoding="ascii").splitlines()]
    participants = ledger.path.parent / "private" / "participants.jsonl"
    who: dict[int, list[int]] = {}
    if participants.exists():
        who = {one["round"]: one["clients"] for one in map(json.loads, participants.read_text().splitlines())}
    lower, how = _second_count(opening, lines, who)
    holds = math.isnan(lower) or claim.epsilon >= lower
    missing = len(lines) != claim.rounds
    return [
        Finding(
            name="accounting", what="claim", unit=opening["unit"], claimed=claim.epsilon, delta=opening["delta"],
            empirical=lower, ceiling=math.nan, kind="check",
            verdict="violation" if missing or not holds else "powerless" if math.isnan(lower) else "consistent",
            detail=how,
            numbers={"lines": float(len(lines)), "rounds": float(claim.rounds)},
        )
    ]  # fmt: skip


def _second_count(opening: dict[str, Any], lines: list[dict[str, Any]], who: dict[int, list[int]]) -> tuple[float, str]:
    delta = opening["delta"]
    if any(line["noise_multiplier"] == 0 for line in lines):
        return math.inf, "A line without noise: nothing finite can be claimed."
    if opening["filter"] is not None:
        return _filtered(opening["filter"], lines, delta), "Opacus's Renyi divergences at the filter's order."
    if opening["amplification"] == "none":
        twice = 2 if opening["adjacency"].startswith("replace-one") else 1
        return _epsilon_of(twice * _distance(opening["coefficients"], lines, who), delta), (
            "Exact trade-off of two Gaussians, their distance from each user's rounds."
        )
    if opening["client_sampling"] == "fixed" and opening["unit"] == "user":
        return math.nan, "Not counted again: no second accountant for samples of a fixed size."
    return _poisson(opening, lines, who, delta), f"Opacus's PRV accountant less {2 * PRV_ERROR}, up to {PRV_LARGEST:g}."


def _filtered(given: dict[str, float], lines: list[dict[str, Any]], delta: float) -> float:
    """The filter's epsilon if the releases stay within it, else infinity."""
    order, budget = given["order"], given["epsilon"]
    spent = sum(
        float(compute_rdp(q=one["sampling_rate"], noise_multiplier=one["noise_multiplier"], steps=1, orders=order))
        for one in lines
    )
    # Canonne, Kamath, Steinke, NeurIPS 2020, Proposition 12
    conversion = (math.log(1 / delta) - math.log(order)) / (order - 1) + math.log1p(-1 / order)
    return budget if spent + conversion <= budget + 1e-6 else math.inf


def _poisson(opening: dict[str, Any], lines: list[dict[str, Any]], who: dict[int, list[int]], delta: float) -> float:
    histories: defaultdict[int, list[tuple[float, float, int]]] = defaultdict(list)
    for line in lines:
        for steps in ("steps", "head_steps"):
            entry = (line["noise_multiplier"], line["sampling_rate"], line[steps])
            half = 0 if steps == "steps" else 1
            for client in who.get(line["round"], [0]) if opening["unit"] == "record" else [0]:
                if entry[2]:
                    histories[2 * client + half].append(entry)
    if not histories:
        return 0.0
    worst = max(histories.values(), key=lambda history: sum(steps / z**2 for z, _, steps in history))
    if all(q == 1 for _, q, _ in worst):
        return _epsilon_of(math.sqrt(sum(steps / z**2 for z, _, steps in worst)), delta)
    renyi = RDPAccountant()
    renyi.history = list(worst)
    if renyi.get_epsilon(delta) > PRV_LARGEST:
        return math.nan
    accountant = PRVAccountant()
    accountant.history = list(worst)
    with np.errstate(divide="ignore"):
        found = float(accountant.get_epsilon(delta, eps_error=PRV_ERROR, delta_error=delta / 1000))
    return max(0.0, found - 2 * PRV_ERROR)


def _distance(coefficients: list[float], lines: list[dict[str, Any]], who: dict[int, list[int]]) -> float:
    """Largest distance of the means of all releases together, in noise deviations, over users; one clip each time."""
    column = np.zeros(len(lines))
    bands = coefficients or [1.0]
    column[: min(len(bands), len(lines))] = bands[: len(lines)]
    matrix = toeplitz(column, np.zeros(len(lines)))  # noise is C^-1 Z, so C times the releases has fresh noise
    noises = np.array([line["noise_multiplier"] for line in lines])
    users = sorted({user for clients in who.values() for user in clients})
    took_part = {u: np.array([u in who[line["round"]] for line in lines], dtype=float) for u in users}
    # the same direction each time is the worst where no coefficient is negative
    return max((float(np.linalg.norm(matrix @ (there / noises))) for there in took_part.values()), default=0.0)


def _epsilon_of(mu: float, delta: float) -> float:
    """Epsilon at which two unit Gaussians at distance mu have this delta, from below, by bisection."""
    if mu == 0:
        return 0.0

    def excess(epsilon: float) -> float:
        return math.exp(norm.logcdf(mu / 2 - epsilon / mu)) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))

    low, high = 0.0, mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > delta else (low, middle)
    return low * (1 - 1e-9)
