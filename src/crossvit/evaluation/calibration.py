"""Calibration (does a confidence of 80 % mean 80 % correct?), temperature scaling, abstention.

NumPy only. Shapes as in `metrics`: logits (n, C), labels (n,); confidences (n,) are the
probabilities of the predicted classes, correct (n,) whether the predictions are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crossvit.evaluation.metrics import Booleans, Floats, Integers, confidence, topk_correct
from crossvit.results import Calibration, ReliabilityBin, RiskPoint, Selective

BINS = 15  # of equal width, as in Guo et al., On Calibration of Modern Neural Networks, ICML 2017
TEMPERATURES = (0.05, 20.0)  # range of the fitted temperature
CURVE_POINTS = 200  # of risk against coverage, at most
ROWS = 4096  # of logits in double precision at a time


def calibration(logits: Floats, labels: Integers, *, temperature: float = 1.0) -> Calibration:
    """Calibration of a single-label model, and the temperature that would improve it.

    Args:
        logits: Fused logits before any temperature, (n, C).
        labels: (n,).
        temperature: What the logits are divided by.
    """
    bins = _bins(logits, labels, temperature)
    order = np.random.default_rng(0).permutation(len(labels))
    first, second = order[::2], order[1::2]
    cross_fitted = np.empty(len(labels))  # of each image, from images that do not include it
    for measured, fitted in ((first, second), (second, first)):
        cross_fitted[measured] = (
            fit_temperature(logits[fitted], labels[fitted]) if len(fitted) else 1.0
        )
    return Calibration(
        ece=expected_error(bins),
        temperature=temperature,
        bins=bins,
        suggested_temperature=fit_temperature(logits, labels),
        suggested_ece=expected_error(_bins(logits, labels, cross_fitted)),
    )


def reliability(
    confidences: Floats, correct: Booleans, *, bins: int = BINS
) -> tuple[ReliabilityBin, ...]:
    """Mean confidence and accuracy in bins of equal width from 0 to 1.

    A bin includes its lower edge, the last one 1 too. An empty bin has 0 for both.

    Args:
        confidences: (n,), 0 to 1.
        correct: (n,) booleans.
        bins: Number of bins.
    """
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.clip(np.searchsorted(edges, confidences, side="right") - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    means = np.bincount(index, weights=confidences, minlength=bins) / np.maximum(counts, 1)
    accuracies = np.bincount(index, weights=correct, minlength=bins) / np.maximum(counts, 1)
    rows = zip(edges[:-1], edges[1:], counts, means, accuracies, strict=True)
    return tuple(
        ReliabilityBin(float(low), float(high), int(n), float(c), float(a))
        for low, high, n, c, a in rows
    )


def expected_error(bins: tuple[ReliabilityBin, ...]) -> float:
    """Expected calibration error, 0 to 1: Σ_b n_b / n · |accuracy_b − confidence_b|."""
    total = sum(row.n for row in bins)
    return sum(row.n * abs(row.accuracy - row.confidence) for row in bins) / max(total, 1)


def fit_temperature(logits: Floats, labels: Integers) -> float:
    """The temperature T that minimises the mean of −log softmax(z / T)[label].

    The loss is convex in β = 1 / T, with the slope mean(E_p[z] − z[label]) and the curvature
    mean(Var_p[z]). Newton's method, with bisection where a step leaves the bracket. Source: Guo
    et al. 2017, section 4.2.

    Args:
        logits: z, (n, C).
        labels: (n,).

    Returns:
        T within TEMPERATURES; 1 where all predictions are correct, since no T is the best then.
    """
    if topk_correct(logits, labels).all():
        return 1.0
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    inverse = 1.0
    for _ in range(100):
        slope, curvature = _slope_and_curvature(logits, labels, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curvature if curvature > 0 else np.inf
        updated = step if low < step < high else (low + high) / 2
        if abs(updated - inverse) <= 1e-9 * inverse:
            break
        inverse = float(updated)
    return 1 / inverse


def _slope_and_curvature(logits: Floats, labels: Integers, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean cross-entropy with respect to β at β = `inverse`."""
    slope = curvature = 0.0
    for start in range(0, len(labels), ROWS):
        rows = labels[start : start + ROWS]
        z = logits[start : start + ROWS].astype(np.float64)
        z -= z.max(axis=1, keepdims=True)
        p = np.exp(inverse * z)
        p /= p.sum(axis=1, keepdims=True)
        mean = (p * z).sum(axis=1)
        slope += float((mean - z[np.arange(len(rows)), rows]).sum())
        curvature += float(((p * z * z).sum(axis=1) - mean**2).sum())
    return slope / len(labels), curvature / len(labels)


def _bins(
    logits: Floats, labels: Integers, temperatures: float | NDArray[np.float64]
) -> tuple[ReliabilityBin, ...]:
    """Reliability of logits divided by one temperature, or by one of each image."""
    return reliability(confidence(logits, temperatures), topk_correct(logits, labels))


def selective(
    confidences: Floats, correct: Booleans, *, target_risk: float | None = None
) -> Selective:
    """Selective classification: risk against coverage for every confidence threshold.

    The area under the curve is the mean over all images of the risk at their confidence (AURC:
    Geifman et al., Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, ICLR 2019).

    Args:
        confidences: (n,), 0 to 1.
        correct: (n,) booleans.
        target_risk: Share of wrong answers to stay below, 0 to 1; None for half of the error rate.
    """
    wrong = ~np.asarray(correct, dtype=bool)
    target = float(wrong.mean()) / 2 if target_risk is None else target_risk
    order = np.argsort(-confidences, kind="stable")
    falling = confidences[order]
    # the last image of each distinct confidence
    steps = np.flatnonzero(np.diff(falling, append=-np.inf) != 0)
    answered = steps + 1
    risk = np.cumsum(wrong[order])[steps] / answered
    area = float((risk * np.diff(answered, prepend=0)).sum() / len(wrong))

    def point(step: int) -> RiskPoint:
        return RiskPoint(
            float(falling[steps[step]]), float(answered[step] / len(wrong)), float(risk[step])
        )

    within_target = np.flatnonzero(risk <= target)
    n_points = min(CURVE_POINTS, len(steps))
    drawn = np.unique(np.linspace(0, len(steps) - 1, n_points).round().astype(int))
    return Selective(
        points=tuple(point(int(step)) for step in drawn),
        area=area,
        target_risk=target,
        suggested=point(int(within_target[-1])) if len(within_target) else None,
    )
