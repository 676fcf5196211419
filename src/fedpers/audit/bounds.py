"""Statistics of privacy audits: lower bounds on epsilon, what they could reach at most, and the verdict on a claim.

A bound holds with the stated confidence whatever the attack: a bad attack makes it small, never wrong. Two things
would break it, and callers must avoid both: choosing the number of guesses, or the best of several scores, after
having seen who was included. For the second there is `corrected`.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import expit, ndtri

from fedpers.audit.gaussian import gaussian_epsilon
from fedpers.errors import ConfigError, DataError

Floats = NDArray[np.float64]
Verdict = Literal["consistent", "violation", "powerless"]

_TOLERANCE = 1e-9  # of epsilon, in bisection
_CHOICE = (
    0.999  # confidence at which thresholds are compared: of thousands, the best at 0.95 is the luckiest (measured)
)


@dataclass(frozen=True)
class Finding:
    """What one audit says about one claim.

    Attributes:
        name: The audit.
        what: Its target, such as "shared model", "personal model" or "mechanism".
        unit: What the claim protects: "user" or "record".
        claimed: Claimed epsilon; infinite where nothing is claimed.
        delta: Delta of claim and bound, None where it has no meaning.
        empirical: Lower bound or estimate of epsilon, NaN for a measure that is neither.
        ceiling: The most that this audit could have shown, NaN where that has no meaning.
        kind: "bound" holds with its confidence; "estimate" does not; "check" compares a release with what it must be;
            "attack" is a success rate, never an epsilon.
        verdict: See `verdict`.
        detail: One sentence for the reader.
        numbers: Further measures by name.
    """

    name: str
    what: str
    unit: str
    claimed: float
    delta: float | None
    empirical: float
    ceiling: float
    kind: Literal["bound", "estimate", "check", "attack"]
    verdict: Verdict
    detail: str
    numbers: dict[str, float]

    @property
    def told(self) -> str:
        """The verdict in words: where nothing is claimed an attack refutes nothing, however much it finds."""
        return self.verdict if math.isfinite(self.claimed) else "nothing claimed"

    def to_dict(self) -> dict[str, Any]:
        """All fields for JSON, which has no infinity and no NaN: "inf" or "-inf" for the first, None for the second."""
        plain = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return plain | {"numbers": {name: _plain(value) for name, value in self.numbers.items()}}


def verdict(claimed: float, lower: float, ceiling: float) -> Verdict:
    """Compare a claimed epsilon with the lower bound of an audit and with the most that the audit could have shown.

    "violation": the bound exceeds the claim. "powerless": no result could have exceeded it, hence silence says nothing;
    always so for an infinite claim. "consistent": a violation could have been shown and was not. Raises DataError if a
    number is NaN.
    """
    if math.isnan(claimed) or math.isnan(lower) or math.isnan(ceiling):
        raise DataError(f"a verdict needs numbers: claimed {claimed}, lower bound {lower}, ceiling {ceiling}.")
    if lower > claimed:
        return "violation"
    return "powerless" if ceiling <= claimed else "consistent"


def corrected(confidence: float, tried: int) -> float:
    """Confidence that each of `tried` bounds needs for the largest of them to hold with `confidence` (Bonferroni).

    `tried` counts everything the largest is taken over: scores, signs of a score, numbers of guesses, runs.
    Raises ConfigError if `confidence` is not in (0, 1) or `tried` is below 1.
    """
    _check(0.0, confidence)
    if tried < 1:
        raise ConfigError(f"tried must be 1 or more, not {tried}.")
    return 1 - (1 - confidence) / tried


def guess(scores: ArrayLike, included: NDArray[np.bool_], guesses: int) -> int:
    """Number of correct guesses when the `guesses` / 2 highest scores are guessed IN and as many lowest OUT.

    `scores` and `included` are `(canaries,)`. Equal scores rank by position, the later one higher; that is fair as long
    as positions were given before the coins were tossed. Raises ConfigError if `guesses` is odd, below 2 or above the
    number of canaries, DataError if shapes differ, `included` is not boolean or a score is not finite.
    """
    values, coins = _finite(scores, "scores"), _coins(included, "included")
    if values.shape != coins.shape:
        raise DataError(f"scores {values.shape} and included {coins.shape} must have one entry per canary.")
    if guesses < 2 or guesses % 2 or guesses > values.size:
        raise ConfigError(f"guesses must be even and from 2 to the {values.size} canaries, not {guesses}.")
    order, k = np.argsort(values, kind="stable"), guesses // 2
    return int(coins[order[-k:]].sum() + (~coins[order[:k]]).sum())


def one_run_bound(correct: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95) -> float:
    """Lower bound on epsilon from one training with many canaries (Steinke, Nasr, Jagielski, NeurIPS 2023).

    Each of `canaries` was included by its own fair coin, `guesses` of the coins were guessed (how many was fixed
    before) and `correct` of these were right. The bound is the first epsilon whose p-value exceeds 1 - `confidence`,
    with the p-value of arXiv:2305.08846, Appendix D: B ~ Binomial(guesses, e^eps / (1 + e^eps)),

        P[B >= correct] + 2 canaries delta max_{i >= 1} P[correct > B >= correct - i] / i,   at most 1.

    The true epsilon is for adding or removing one canary. 0.0 if nothing can be said. Raises ConfigError if the counts
    do not satisfy 0 <= correct <= guesses <= canaries, delta is not in [0, 1) or confidence not in (0, 1).
    """
    _check(delta, confidence)
    if not 0 <= correct <= guesses <= canaries:
        raise ConfigError(f"need 0 <= correct {correct} <= guesses {guesses} <= canaries {canaries}.")

    def refuted(eps: float) -> bool:
        return _one_run_p_value(correct, guesses, canaries, eps, delta) <= 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def one_run_ceiling(guesses: int, canaries: int, delta: float, confidence: float = 0.95) -> float:
    """What `one_run_bound` gives if all guesses are right: no claim above it can be refuted. Raises likewise."""
    return one_run_bound(guesses, guesses, canaries, delta, confidence)


def two_sample_bound(
    with_canary: ArrayLike, without: ArrayLike, delta: float, confidence: float = 0.95, gaussian: bool = False
) -> float:
    """Lower bound on epsilon from scores of independent runs with and without one canary.

    The arrays are `(runs,)` each, in an order that does not depend on the scores. Threshold and sign of the score are
    chosen on the first half of each, where choosing costs nothing. The second half gives one-sided Clopper-Pearson
    upper limits of the two error rates, each at (1 - confidence) / 2, hence the larger of ln((1 - delta - FNR) / FPR)
    and ln((1 - delta - FPR) / FNR) (the error rates that differential privacy allows: Kairouz, Oh, Viswanath, ICML
    2015; as an audit: Nasr et al., IEEE S&P 2021).

    `gaussian=True` turns the same two limits into mu = z(1 - FPR) - z(FNR), and mu into epsilon (Nasr et al., USENIX
    Security 2023). That is tighter and is a bound only if the trade-off curve is Gaussian: full participation, no
    subsampling. 0.0 if nothing can be said. Raises ConfigError if delta is not in [0, 1), or 0 with `gaussian`, or
    confidence not in (0, 1); DataError if a score is not finite or a side has fewer than two runs.
    """
    _check_two_sample(delta, confidence, gaussian)
    present, absent = _finite(with_canary, "with_canary"), _finite(without, "without")
    if min(present.size, absent.size) < 2:
        raise DataError(f"two runs or more are needed per side, not {present.size} with and {absent.size} without.")
    half, other_half = present.size // 2, absent.size // 2
    best, sign, threshold = -math.inf, 1.0, math.inf
    for direction in (1.0, -1.0):
        first, other_first = direction * present[:half], direction * absent[:other_half]
        levels = np.unique(np.concatenate([first, other_first]))
        between = (levels[:-1] + levels[1:]) / 2  # between scores: a later score a hair off changes no decision
        if between.size:
            strength = _evidence(*_error_limits(first, other_first, between, _CHOICE), delta, gaussian)
            if strength.max() > best:
                best, sign, threshold = float(strength.max()), direction, float(between[strength.argmax()])
    limits = _error_limits(sign * present[half:], sign * absent[other_half:], np.array([threshold]), confidence)
    return _to_epsilon(float(_evidence(*limits, delta, gaussian)[0]), delta, gaussian)


def two_sample_ceiling(n: int, delta: float, confidence: float = 0.95, gaussian: bool = False) -> float:
    """What `two_sample_bound` gives if no decision is wrong, for `n` runs per side in the second half of the runs.

    That is n = runs - runs // 2; for sides of different size the smaller gives a ceiling that is too low rather than
    too high. Raises ConfigError as `two_sample_bound`, or if n < 1.
    """
    _check_two_sample(delta, confidence, gaussian)
    if n < 1:
        raise ConfigError(f"n must be 1 or more, not {n}.")
    limit = _clopper_pearson(n, confidence)[:1]
    return _to_epsilon(float(_evidence(limit, limit, delta, gaussian)[0]), delta, gaussian)


def attack_rates(scores: ArrayLike, members: NDArray[np.bool_]) -> dict[str, float]:
    """Success of a membership attack; higher scores mean "member". Both arrays are `(records,)`.

    `auc`: chance that a member scores above a non-member, ties counting half. `tpr_at_fpr_0.01`, `tpr_at_fpr_0.001`:
    the largest share of members above a threshold that at most that share of non-members passes. `best_advantage`:
    largest TPR - FPR, its threshold chosen on these very records, so it is above 0 for a score that knows nothing.
    Equal scores are on one side of every threshold. Raises DataError if shapes differ, a score is not finite, or
    members or non-members are missing.
    """
    values, is_member = _finite(scores, "scores"), _coins(members, "members")
    inside, outside = int(is_member.sum()), int((~is_member).sum())
    if values.shape != is_member.shape or not inside or not outside:
        raise DataError(
            f"scores {values.shape} must match members {is_member.shape}, with both members ({inside}) and others "
            f"({outside}) among them."
        )
    levels = np.append(np.unique(values), math.inf)
    hits = (inside - np.searchsorted(np.sort(values[is_member]), levels)) / inside
    alarms = outside - np.searchsorted(np.sort(values[~is_member]), levels)
    ranks = stats.rankdata(values)[is_member].sum() - inside * (inside + 1) / 2
    rates = {"auc": float(ranks / (inside * outside))}
    for level in (0.01, 0.001):
        rates[f"tpr_at_fpr_{level}"] = float(hits[alarms <= level * outside + 1e-9].max())
    return rates | {"best_advantage": float((hits - alarms / outside).max())}


def _one_run_p_value(correct: int, guesses: int, canaries: int, eps: float, delta: float) -> float:
    rate = float(expit(eps))
    tail = float(stats.binom.sf(correct - 1, guesses, rate))
    i = np.arange(1, correct + 1)  # beyond `correct` the probability stays and only the divisor grows
    near = np.max((stats.binom.sf(correct - i - 1, guesses, rate) - tail) / i, initial=0.0)
    return min(1.0, tail + 2 * canaries * delta * float(near))


def _error_limits(present: Floats, absent: Floats, thresholds: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Upper limits of FPR and FNR at each threshold, a score above it being taken for the canary's presence."""
    misses = np.searchsorted(np.sort(present), thresholds, side="right")
    alarms = absent.size - np.searchsorted(np.sort(absent), thresholds, side="right")
    return _clopper_pearson(absent.size, confidence)[alarms], _clopper_pearson(present.size, confidence)[misses]


def _clopper_pearson(n: int, confidence: float) -> Floats:
    """One-sided upper limits for 0 to n errors among n, `(n + 1,)`, each at half of the error that is allowed."""
    k = np.arange(n)
    return np.append(stats.beta.ppf(1 - (1 - confidence) / 2, k + 1, n - k), 1.0)


def _evidence(fpr: Floats, fnr: Floats, delta: float, gaussian: bool) -> Floats:
    """Epsilon, or mu of the Gaussian form, that these error rates need; may be negative."""
    if gaussian:
        return np.asarray(-ndtri(fpr) - ndtri(fnr))
    with np.errstate(divide="ignore"):  # a rate of correct decisions below delta shows nothing: -inf
        first = np.log(np.maximum(1 - delta - fnr, 0)) - np.log(fpr)
        second = np.log(np.maximum(1 - delta - fpr, 0)) - np.log(fnr)
    return np.asarray(np.maximum(first, second))


def _to_epsilon(evidence: float, delta: float, gaussian: bool) -> float:
    if evidence <= 0:
        return 0.0
    return gaussian_epsilon(evidence, delta) if gaussian else evidence


def _check_two_sample(delta: float, confidence: float, gaussian: bool) -> None:
    _check(delta, confidence)
    if gaussian and delta == 0:
        raise ConfigError("a Gaussian mechanism has no finite epsilon at delta 0; give a delta in (0, 1).")


def _check(delta: float, confidence: float) -> None:
    if not 0 <= delta < 1:
        raise ConfigError(f"delta must be in [0, 1), not {delta}.")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must be in (0, 1), not {confidence}.")


def _finite(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise DataError(f"{name} must be one row of finite numbers; a run that diverged has no score to rank.")
    return array


def _coins(values: NDArray[np.bool_], name: str) -> NDArray[np.bool_]:
    array = np.asarray(values)
    if array.dtype != np.bool_:
        raise DataError(f"{name} must be boolean, not {array.dtype}: compare with == 1 if it holds 0 and 1.")
    return array


def _plain(value: Any) -> Any:
    if not isinstance(value, float | np.floating):
        return value
    number = float(value)
    return None if math.isnan(number) else number if math.isfinite(number) else str(number)
