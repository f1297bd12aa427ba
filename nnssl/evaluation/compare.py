"""Compare several predictions of the same cases in pairs: bootstrap intervals, Wilcoxon tests, Holm's correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

#: The metrics that are compared.
COMPARED = ("dice", "hd95")
#: Below this, a difference is rounding and counts as zero.
ZERO = 1e-12
#: With fewer pairs even a difference in the same direction in every case has p >= 0.05 (two-sided: 2 / 2^5 = 0.0625).
SMALLEST_TESTABLE = 6
FOREGROUND = "foreground"


def compare(results: Mapping[str, Mapping[str, Any]], seed: int = 0, resamples: int = 9999) -> list[dict[str, Any]]:
    """Compare every pair of evaluations case by case, for each class and for the mean over classes.

    A case that is undefined (both masks empty) in one of the two is left out of the pair. The difference is second
    minus first. Holm's correction runs over all rows of a metric.

    Args:
        results: name to the result of :func:`nnssl.evaluation.evaluate.evaluate_folders`, all against one reference.
        seed: seed of the bootstrap.
        resamples: number of bootstrap samples.

    Returns:
        Rows with ``first``, ``second``, ``metric``, ``label``, ``n``, ``excluded``, ``mean_difference``, ``ci_low``,
        ``ci_high`` (95 %, percentile bootstrap over cases), ``p`` (Wilcoxon signed-rank, two-sided), ``p_holm`` and
        ``note``.
    """
    rows = []
    for metric in COMPARED:
        of_metric = [
            _row(first, second, metric, label, results, seed, resamples)
            for first, second in combinations(results, 2)
            for label in _labels(results[first])
        ]
        tested = [row for row in of_metric if row["p"] is not None]
        for row, adjusted in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row["p_holm"] = adjusted
        rows += of_metric
    return rows


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's step-down rule (Holm 1979): sorted, p_(i) becomes max over j <= i of (m - j + 1) p_(j).

    Args:
        p_values: raw p-values.

    Returns:
        Adjusted values, at most 1, in the given order.
    """
    order = np.argsort(p_values, kind="stable")
    stepped = np.asarray(p_values, dtype=float)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(stepped))
    return adjusted.tolist()


def wilcoxon(differences: np.ndarray) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test; 1 if no difference is other than zero."""
    moved = differences[np.abs(differences) > ZERO]
    return float(stats.wilcoxon(moved).pvalue) if moved.size else 1.0


def bootstrap_interval(differences: np.ndarray, seed: int = 0, resamples: int = 9999) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of the mean; None for fewer than two differences."""
    if differences.size < 2:
        return None
    if np.ptp(differences) <= ZERO:  # every resample is the sample
        return float(differences.mean()), float(differences.mean())
    generator = np.random.default_rng(seed)
    found = stats.bootstrap(
        (differences,), np.mean, n_resamples=resamples, method="percentile", random_state=generator, vectorized=True
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _labels(result: Mapping[str, Any]) -> list[str]:
    names = list(result["labels"])
    return names if len(names) == 1 else [FOREGROUND, *names]


def _row(
    first: str,
    second: str,
    metric: str,
    label: str,
    results: Mapping[str, Mapping[str, Any]],
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    cases = results[first]["cases"]
    pairs = [_difference(cases[c], results[second]["cases"][c], metric, label) for c in cases]
    differences = np.array([d for d in pairs if d is not None])
    interval = bootstrap_interval(differences, seed, resamples)
    n = int(differences.size)
    return {
        "first": first,
        "second": second,
        "metric": metric,
        "label": label,
        "n": n,
        "excluded": len(pairs) - n,
        "mean_difference": float(differences.mean()) if n else None,
        "ci_low": interval[0] if interval else None,
        "ci_high": interval[1] if interval else None,
        "p": wilcoxon(differences) if n else None,
        "p_holm": None,
        "note": f"{n} pairs are too few for p < 0.05" if n < SMALLEST_TESTABLE else "",
    }


def _difference(first: Mapping[str, Any], second: Mapping[str, Any], metric: str, label: str) -> float | None:
    """Return second minus first of one case; for the foreground, the mean over the classes defined in both."""
    names = list(first) if label == FOREGROUND else [label]
    pairs = [(first[n][metric], second[n][metric]) for n in names]
    defined = [b - a for a, b in pairs if a is not None and b is not None]
    return float(np.mean(defined)) if defined else None
