"""What tells the members of a training set from others: scores of records, from losses alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]

FEW = 64  # with fewer shadows a variance per record is too noisy, and all records share one
_SMALLEST = 1e-12  # keeps a loss off zero, and a variance where nothing was trained


def confidence(losses: Scores) -> Scores:
    """Return log(p / (1 - p)) of the probability p = exp(-loss) of the truth.

    Carlini, Chien, Nasr, Song, Terzis, Tramer: Membership Inference Attacks From First Principles, IEEE S&P 2022: on
    this scale the scores of one record under many models are roughly normal.
    """
    bounded = np.maximum(losses, _SMALLEST)
    return np.asarray(-bounded - np.log(-np.expm1(-bounded)))


def likelihood_ratio(observed: Scores, seen: Scores, included: Mask) -> Scores:
    """Return the log likelihood ratio of membership, in the shape of `observed`; positive speaks for it.

    Online LiRA (Carlini et al. 2022, Algorithm 1): for each record one normal distribution of its scores under the
    shadows that held it and one under the others. With fewer than 64 shadows all records share the two variances,
    as is advised there. A record that the shadows saw on one side alone gives no evidence: 0.

    Args:
        observed: (..., targets) scores under the models that are attacked.
        seen: (shadows, targets) scores under the shadows.
        included: (shadows, targets) which shadow was trained on which record.
    """
    mean_in, variance_in = _moments(seen, included)
    mean_out, variance_out = _moments(seen, ~included)
    ratio = 0.5 * (
        (observed - mean_out) ** 2 / variance_out
        - (observed - mean_in) ** 2 / variance_in
        + np.log(variance_out / variance_in)
    )
    both = included.any(axis=0) & ~included.all(axis=0)
    return np.where(both, ratio, 0.0)


def _moments(seen: Scores, mask: Mask) -> tuple[Scores, Scores]:
    """Mean of each record's masked scores, and their variance: each record's own, or one for all."""
    count = mask.sum(axis=0)
    mean = np.where(mask, seen, 0.0).sum(axis=0) / np.maximum(count, 1)
    squares = np.where(mask, (seen - mean) ** 2, 0.0).sum(axis=0)
    freedom = np.maximum(count - 1, 0)
    if len(seen) < FEW:
        squares, freedom = squares.sum(), freedom.sum()
    return mean, np.maximum(squares / np.maximum(freedom, 1), _SMALLEST)


def leave_one_out(seen: Scores, included: Mask) -> Scores:
    """Return likelihood ratios (shadows, targets): each shadow is attacked with the help of all the others."""
    rows = np.arange(len(seen))
    return np.stack([likelihood_ratio(seen[t], seen[rows != t], included[rows != t]) for t in rows])


def advantage_at_training_loss(losses: Scores, included: Mask) -> float:
    """Return the mean over shadows of TPR - FPR when a loss up to the mean training loss is called a member.

    Yeom, Giacomelli, Fredrikson, Jha: Privacy Risk in Machine Learning, IEEE CSF 2018. Whoever knows the training loss
    knows the threshold: it is not tuned on the answers.
    """
    found = [np.mean(one[held] <= one[held].mean()) - np.mean(one[~held] <= one[held].mean())
             for one, held in zip(losses, included, strict=True)]  # fmt: skip
    return float(np.mean(found))
