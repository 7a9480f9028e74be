"""Metrics of classification and regression, by their names in GLUE.

    METRICS[name](predictions, labels) -> float

Predictions and labels are classes (int64 [rows]) or scores (float [rows]). Shares lie in 0..1,
correlations in -1..1. Computed by scikit-learn and scipy, whose definitions everybody compares
with. A correlation with predictions that are all alike is 0: they order nothing.
"""

from collections.abc import Callable

import numpy as np

# The metrics that a kind of task may name; the first is what a task reports by default.
OF_KIND = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "qa": ("f1", "exact_match"),  # computed from texts: fastffn.data.qa
}


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose class is right."""
    return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1 of two; 0 where neither holds it."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean over classes of their F1."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0.0))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation coefficient; 0 where one side is all alike."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, labels)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, labels)


def _correlation(function: Callable, predictions: np.ndarray, labels: np.ndarray) -> float:
    sides = [np.asarray(values, np.float64) for values in (predictions, labels)]
    if len(sides[0]) < 2 or any(np.ptp(values) == 0 for values in sides):
        return 0.0
    return float(function(*sides).statistic)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    function.__name__: function
    for function in (accuracy, f1, macro_f1, matthews, pearson, spearman)
}
