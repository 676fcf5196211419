"""LaMP's own metrics, with its rules for predictions that have a wrong form (`eval/evaluation.py` of LaMP-Benchmark).

LaMP-1 and 2: accuracy and macro-F1 over the fixed list of labels; a prediction that is no label is none of them.
LaMP-3: MAE and RMSE; a prediction that is no number counts as 1 or 5, whichever is farther from the truth.
LaMP-4 to 7: ROUGE-1 and ROUGE-L, F-measures without stemming, by Google's `rouge-score`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from fedpers.errors import DataError
from fedpers.evaluation.text_metrics import rouge
from fedpers.formats.lamp import FORMS, Task, read_outputs


def score_files(predictions: Path, answers: Path, task: Task) -> dict[str, float]:
    """Score a file of predictions against a file of answers, both in the form of LaMP's outputs; see `score`."""
    return score(task, read_outputs(predictions, task), read_outputs(answers, task))


def score(task: Task, predictions: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, float]:
    """Return the benchmark's metrics of predictions by question id.

    Where the benchmark's ROUGE is the median of 1,000 bootstrap means, which changes from run to run, this is the mean.

    Raises:
        DataError: predictions for other questions than the answers, an answer that is no label or no number, or no
            question at all.
        ConfigError: LaMP-4 to 7 without the library `rouge-score`.
    """
    if set(predictions) != set(answers):
        missing, extra = len(set(answers) - set(predictions)), len(set(predictions) - set(answers))
        raise DataError(f"predictions: {missing} questions have none, and {extra} are of no question; ids must match.")
    if not answers:
        raise DataError("predictions: there is no question.")
    pairs = [(predictions[name].strip(), answers[name].strip()) for name in answers]
    if task == "3":
        errors = [number_of(said, truth) - _truth(truth) for said, truth in pairs]
        squares = sum(error**2 for error in errors) / len(errors)
        return {"MAE": sum(map(abs, errors)) / len(errors), "RMSE": math.sqrt(squares)}
    labels = FORMS[task].labels
    if labels:
        if unknown := sum(truth not in labels for _, truth in pairs):
            raise DataError(f"answers: {unknown} are none of the {len(labels)} labels of LaMP-{task}.")
        right = sum(said == truth for said, truth in pairs)
        return {"accuracy": right / len(pairs), "f1": sum(_f1(label, pairs) for label in labels) / len(labels)}
    return {name: sum(found) / len(found) for name, found in rouge(pairs).items()}


def number_of(said: str, truth: str) -> float:
    """Return the rating that a prediction for LaMP-3 counts as.

    As in the benchmark a number counts as it is, inside of 1 to 5 or not, and of 1 and 5 at the same distance it is 5.
    A prediction such as `nan` or `inf`, at which the benchmark's library stops, counts as one that is no number.
    """
    try:
        number = float(said)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return number
    return 1.0 if abs(1 - _truth(truth)) > abs(5 - _truth(truth)) else 5.0


def _truth(truth: str) -> float:
    try:
        return float(truth)
    except ValueError:
        raise DataError("answers: one is no number, as those of LaMP-3 are.") from None


def _f1(label: str, pairs: list[tuple[str, str]]) -> float:
    """F1 of one label; 0 for a label that is neither given nor predicted, as in scikit-learn."""
    both = sum(said == truth == label for said, truth in pairs)
    either = sum((said == label) + (truth == label) for said, truth in pairs)
    return 2 * both / either if either else 0.0
