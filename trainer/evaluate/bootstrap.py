"""Metrics as functions of sums over rows, and paired bootstrap confidence intervals of their differences.

Every metric of the report is a function of sums of per-row features (a mean is sum / count, the perplexity exp(sum of losses / sum
of tokens), macro-F1 a function of the counts of the confusion matrix). A bootstrap resample is then a vector of weights over the
rows, and the metric of a resample one product of that vector with the features: the same resample for base and tuned (paired).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

LEVELS = (0.9, 0.95, 0.975, 0.99, 0.995)
"""One-sided confidence levels whose bounds are kept in the report, for the gate."""

Floats: TypeAlias = NDArray[np.float64]


def mean(sums: Floats) -> Floats:
    """Features (value, 1) -> mean value."""
    return sums[..., 0] / sums[..., 1]


def exp_mean(sums: Floats) -> Floats:
    """Features (loss sum, tokens) -> perplexity; overflow is infinite."""
    with np.errstate(over="ignore"):
        return np.exp(mean(sums))


def macro_f1(sums: Floats) -> Floats:
    """Features: one-hot confusion matrix [classes * classes], row = reference -> unweighted mean of the classes' F1.

    Classes that occur neither as reference nor as prediction are left out, as scikit-learn's f1_score does with the labels present.
    """
    classes = round(sums.shape[-1] ** 0.5)
    matrix = sums.reshape(*sums.shape[:-1], classes, classes)
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    total = matrix.sum(-1) + matrix.sum(-2)
    f1 = np.divide(2 * hits, total, out=np.zeros_like(hits, dtype=float), where=total > 0)
    return f1.sum(-1) / np.maximum((total > 0).sum(-1), 1)


def one_hot(index: NDArray[np.int64], size: int) -> Floats:
    """[rows] -> [rows, size]."""
    return np.eye(size)[index]


@dataclass(frozen=True)
class Metric:
    """A metric with its per-row features."""

    name: str
    base: Floats
    """Features of the base model, [rows, features]."""
    tuned: Floats
    """Features of the tuned model, the same rows in the same order."""
    statistic: Callable[[Floats], Floats] = mean
    lower_is_better: bool = False


def _weights(rows: int, resamples: int, rng: np.random.Generator) -> Floats:
    """[resamples, rows]: how often each row is drawn."""
    drawn = rng.integers(0, rows, (resamples, rows))
    drawn += np.arange(resamples)[:, None] * rows
    return np.bincount(drawn.ravel(), minlength=resamples * rows).reshape(resamples, rows).astype(np.float64)


def compare(metrics: list[Metric], resamples: int, seed: int) -> dict[str, Any]:
    """Base, tuned and their difference (tuned - base) for metrics over the same rows.

    Returns {"base": {name: value}, "tuned": {name: value}, "difference": {name: {mean, low, high, bounds, better}}}: `low` and
    `high` are the 95 % percentile interval, `bounds` the one-sided lower bound of the improvement (the difference in the metric's
    good direction) by confidence level, `better` says which direction is good. Efron & Tibshirani 1993; paired: Koehn 2004.
    """
    rng = np.random.default_rng(seed)
    rows = len(metrics[0].base)
    if any(len(m.base) != rows or len(m.tuned) != rows for m in metrics):
        raise ValueError("metrics that are compared together need the same rows")
    samples: dict[str, list[Floats]] = {m.name: [] for m in metrics}
    block = max(1, min(resamples, (1 << 22) // max(rows, 1)))  # at most 32 MiB of weights at once
    for start in range(0, resamples, block):
        weights = _weights(rows, min(block, resamples - start), rng)
        for m in metrics:
            samples[m.name].append(m.statistic(weights @ m.tuned) - m.statistic(weights @ m.base))
    result: dict[str, Any] = {"base": {}, "tuned": {}, "difference": {}}
    for m in metrics:
        base, tuned = float(m.statistic(m.base.sum(0))), float(m.statistic(m.tuned.sum(0)))
        difference = np.concatenate(samples[m.name])
        low, high = np.quantile(difference, [0.025, 0.975])
        gain = -difference if m.lower_is_better else difference
        result["base"][m.name], result["tuned"][m.name] = base, tuned
        result["difference"][m.name] = {
            "mean": tuned - base, "low": float(low), "high": float(high), "rows": rows,
            "better": "lower" if m.lower_is_better else "higher",
            "bounds": {str(level): float(np.quantile(gain, 1 - level)) for level in LEVELS},
        }
    return result
