"""Whether 80 % sure means 80 % right, the temperature that makes it so, and when to give no answer. NumPy only.

Shapes as in `metrics`: logits (n, C), labels (n,); sure (n,) is the probability of the answer, correct (n,) whether it is right.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crossvit.evaluation.metrics import Booleans, Floats, Integers, confidence, hits
from crossvit.results import Calibration, ReliabilityBin, RiskPoint, Selective

BINS = 15  # of equal width, as in Guo et al., On Calibration of Modern Neural Networks, ICML 2017
TEMPERATURES = (0.05, 20.0)  # what is fitted lies between
CURVE_POINTS = 200  # of risk against coverage that are kept
ROWS = 4096  # of logits in double precision at a time


def calibration(logits: Floats, labels: Integers, *, temperature: float = 1.0) -> Calibration:
    """What `Calibration` holds, of fused logits before any temperature and the `temperature` they are divided by."""
    bins = _bins(logits, labels, temperature)
    order = np.random.default_rng(0).permutation(len(labels))
    halves = order[::2], order[1::2]
    crossed = np.empty(len(labels))
    for own, other in (halves, halves[::-1]):
        crossed[own] = fit_temperature(logits[other], labels[other]) if len(other) else 1.0
    return Calibration(
        ece=expected_error(bins),
        temperature=temperature,
        bins=bins,
        suggested_temperature=fit_temperature(logits, labels),
        suggested_ece=expected_error(_bins(logits, labels, crossed)),
    )


def reliability(sure: Floats, correct: Booleans, *, bins: int = BINS) -> tuple[ReliabilityBin, ...]:
    """Bins of equal width from 0 to 1, each with its lower edge, the last with 1 too; an empty one has 0 for both shares."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, sure, side="right") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    means = np.bincount(place, weights=sure, minlength=bins) / np.maximum(counts, 1)
    right = np.bincount(place, weights=correct, minlength=bins) / np.maximum(counts, 1)
    rows = zip(edges[:-1], edges[1:], counts, means, right, strict=True)
    return tuple(
        ReliabilityBin(float(low), float(high), int(n), float(c), float(a))
        for low, high, n, c, a in rows
    )


def expected_error(bins: tuple[ReliabilityBin, ...]) -> float:
    """Expected calibration error, 0 to 1: Σ_b n_b / n · |accuracy_b − confidence_b|."""
    total = sum(one.n for one in bins)
    return sum(one.n * abs(one.accuracy - one.confidence) for one in bins) / max(total, 1)


def fit_temperature(logits: Floats, labels: Integers) -> float:
    """The temperature T within TEMPERATURES that makes the mean of −log softmax(z / T)[label] least.

    In β = 1 / T this is convex, with the slope mean(E_p[z] − z[label]) and the curvature mean(Var_p[z]): Newton's steps, halved
    into the bracket where they leave it. Where every label has the highest logit the surer the better without end, so nothing is
    fitted: 1. Source: Guo et al. 2017, section 4.2.
    """
    if hits(logits, labels).all():
        return 1.0
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    inverse = 1.0
    for _ in range(100):
        slope, curvature = _slope_and_curvature(logits, labels, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curvature if curvature > 0 else np.inf
        following = step if low < step < high else (low + high) / 2
        if abs(following - inverse) <= 1e-9 * inverse:
            break
        inverse = float(following)
    return 1 / inverse


def _slope_and_curvature(logits: Floats, labels: Integers, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean cross-entropy by β at β = `inverse`."""
    slope = curvature = 0.0
    for start in range(0, len(labels), ROWS):
        own = labels[start : start + ROWS]
        z = logits[start : start + ROWS].astype(np.float64)
        z -= z.max(axis=1, keepdims=True)
        p = np.exp(inverse * z)
        p /= p.sum(axis=1, keepdims=True)
        mean = (p * z).sum(axis=1)
        slope += float((mean - z[np.arange(len(own)), own]).sum())
        curvature += float(((p * z * z).sum(axis=1) - mean**2).sum())
    return slope / len(labels), curvature / len(labels)


def _bins(
    logits: Floats, labels: Integers, temperatures: float | NDArray[np.float64]
) -> tuple[ReliabilityBin, ...]:
    """Reliability of each image's logits divided by its own temperature; what is right does not depend on that."""
    return reliability(confidence(logits, temperatures), hits(logits, labels))


def selective(sure: Floats, correct: Booleans, *, target_risk: float | None = None) -> Selective:
    """Risk against coverage: answering where the confidence is at least t, the share answered and the share of those wrong.

    area: the mean over all images of the risk at their own confidence (AURC: Geifman et al., Bias-Reduced Uncertainty
    Estimation for Deep Neural Classifiers, ICLR 2019). target_risk: 0 to 1; None is half the risk of always answering.
    """
    wrong = ~np.asarray(correct, dtype=bool)
    target = float(wrong.mean()) / 2 if target_risk is None else target_risk
    order = np.argsort(-sure, kind="stable")
    falling = sure[order]
    steps = np.flatnonzero(
        np.diff(falling, append=-np.inf) != 0
    )  # the last image of each distinct confidence
    answered = steps + 1
    risk = np.cumsum(wrong[order])[steps] / answered
    area = float((risk * np.diff(answered, prepend=0)).sum() / len(wrong))

    def point(step: int) -> RiskPoint:
        return RiskPoint(
            float(falling[steps[step]]), float(answered[step] / len(wrong)), float(risk[step])
        )

    reaching = np.flatnonzero(risk <= target)
    kept = np.unique(
        np.linspace(0, len(steps) - 1, min(CURVE_POINTS, len(steps))).round().astype(int)
    )
    return Selective(
        points=tuple(point(int(step)) for step in kept),
        area=area,
        target_risk=target,
        suggested=point(int(reaching[-1])) if len(reaching) else None,
    )
