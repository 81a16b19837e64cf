"""Metrics of predictions: logits or probabilities and ground truth in, records of `results` out.

NumPy only. Shapes: n images, C classes; logits and probabilities (n, C); labels (n,) class indices;
targets (n, C) of 0 and 1, for multi-label images. `calibration` measures whether the probabilities
can be trusted, `bootstrap` the uncertainty of the metrics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossvit.results import (
    SINGLE_LABEL,
    BranchScore,
    ClassScore,
    LabelScore,
    MultiLabel,
    branch_names,
)

THRESHOLD = 0.5  # probability from which a multi-label model predicts a class, by default

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]
Booleans = NDArray[np.bool_]


# ---------------------------------------------------------------- from logits to probabilities


def probabilities(
    logits: Floats, *, task: str = SINGLE_LABEL, temperature: float = 1.0
) -> NDArray[np.float64]:
    """softmax(z / T) over the classes, or sigmoid(z / T) of each class of a multi-label model.

    Args:
        logits: z, (..., C).
        task: `single-label` or `multi-label`.
        temperature: T, above 0.

    Returns:
        Probabilities (..., C), 0 to 1, float64.
    """
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    if task == SINGLE_LABEL:
        return np.exp(log_softmax(scaled))
    return np.exp(-np.logaddexp(0.0, -scaled))


def confidence(logits: Floats, temperature: float | Floats = 1.0) -> NDArray[np.float64]:
    """The probability of the predicted class: max softmax(z / T) = 1 / Σ exp((z − max z) / T).

    Args:
        logits: z, (n, C).
        temperature: T, one for all images or (n,).

    Returns:
        (n,), 0 to 1, float64.
    """
    shifted = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64)
    shifted /= np.broadcast_to(np.asarray(temperature, dtype=np.float64), len(logits))[:, None]
    highest: NDArray[np.float64] = 1 / np.exp(shifted, out=shifted).sum(axis=1)
    return highest


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """z − log Σ exp z over the last axis, in double precision and without overflow."""
    shifted = np.asarray(logits, dtype=np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def cross_entropy(logits: Floats, labels: Integers, *, temperature: float = 1.0) -> float:
    """Mean of −log softmax(z / T)[label], in nats.

    Args:
        logits: z, (n, C).
        labels: (n,).
        temperature: T, above 0.
    """
    log_probabilities = log_softmax(np.asarray(logits, dtype=np.float64) / temperature)
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def binary_cross_entropy(logits: Floats, targets: Integers, *, temperature: float = 1.0) -> float:
    """Mean over images and classes of −t log p − (1 − t) log(1 − p), p = sigmoid(z / T), in nats.

    Args:
        logits: z, (n, C).
        targets: t, (n, C) of 0 and 1.
        temperature: T, above 0.
    """
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    return float((np.logaddexp(0.0, scaled) - targets * scaled).mean())


# ---------------------------------------------------------------- one class an image


def topk_correct(scores: Floats, truth: Integers, *, k: int = 1) -> Booleans:
    """Whether a true class is among the k highest scores.

    Scores equal to a true one do not count against it; for k = 1 the first of equals is the
    prediction. An image without a class is never correct.

    Args:
        scores: Logits or probabilities, (n, C).
        truth: Labels (n,) or targets (n, C).
        k: Number of classes, 1 or more.

    Returns:
        (n,) booleans.
    """
    rows = np.arange(len(scores))
    if k == 1:
        predicted = scores.argmax(axis=1)
        correct: Booleans = predicted == truth if truth.ndim == 1 else truth[rows, predicted] > 0
        return correct
    best = (
        scores[rows, truth] if truth.ndim == 1 else np.where(truth > 0, scores, -np.inf).max(axis=1)
    )
    ranked: Booleans = ((scores > best[:, None]).sum(axis=1) < k) & (best > -np.inf)
    return ranked


def branch_scores(
    branch_logits: Floats, truth: Integers, patches: Sequence[int]
) -> tuple[BranchScore, ...]:
    """Accuracy of each branch's own head, as in the paper's Table 6.

    Args:
        branch_logits: (branches, n, C).
        truth: Labels (n,) or targets (n, C).
        patches: Patch size of each branch in pixels.
    """
    names = branch_names(len(patches))
    accuracies = [float(topk_correct(logits, truth).mean()) for logits in branch_logits]
    return tuple(
        BranchScore(name, patch, accuracy)
        for name, patch, accuracy in zip(names, patches, accuracies, strict=True)
    )


def confusion_matrix(labels: Integers, predicted: Integers, classes: int) -> NDArray[np.int64]:
    """(C, C) counts: rows true, columns predicted."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def class_scores(confusion: NDArray[np.int64], classes: Sequence[str]) -> tuple[ClassScore, ...]:
    """Per class: precision = TP / predicted, recall = TP / support and F1; 0 for 0 / 0."""
    tp, support, n_predicted = class_counts(confusion)
    precision = tp / np.maximum(n_predicted, 1)
    recall = tp / np.maximum(support, 1)
    rows = zip(classes, support, precision, recall, f1(tp, support, n_predicted), strict=True)
    return tuple(
        ClassScore(name, int(n), float(p), float(r), float(f)) for name, n, p, r, f in rows
    )


def class_counts(confusion: NDArray[np.int64]) -> tuple[Integers, Integers, Integers]:
    """(true positives, support, number predicted) of each class, (C,) each."""
    return confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)


def f1(tp: Integers, support: Integers, n_predicted: Integers) -> NDArray[np.float64]:
    """2 TP / (support + predicted), the harmonic mean of precision and recall; 0 for 0 / 0.

    Args:
        tp: True positives of each class, (C,).
        support: Number of images that have the class, (C,).
        n_predicted: Number of images that the class is predicted for, (C,).
    """
    scores: NDArray[np.float64] = 2 * tp / np.maximum(support + n_predicted, 1)
    return scores


def macro_f1(tp: Integers, support: Integers, n_predicted: Integers) -> float:
    """Mean of `f1` over the classes that occur; 0 where none does."""
    present = support > 0
    return float(f1(tp, support, n_predicted)[present].mean()) if present.any() else 0.0


# ---------------------------------------------------------------- several classes an image


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The images ranked by the score of one class.

    Attributes:
        order: Indices of the images from the highest score to the lowest, (n,).
        ends: Position in `order` of the last image of each distinct score.
        positive: Whether the image has the class, in that order, (n,).
    """

    order: NDArray[np.int64]
    ends: NDArray[np.int64]
    positive: Booleans

    @classmethod
    def of(cls, scores: Floats, positive: Booleans) -> Ranking:
        """The ranking of (n,) scores."""
        order = np.argsort(-scores, kind="stable")
        ends = np.flatnonzero(np.diff(scores[order], append=-np.inf) != 0)
        return cls(order, ends, positive[order])

    def average_precision(self, weights: Integers) -> float:
        """Σ_i (R_i − R_{i−1}) P_i over the distinct scores, from the highest, as in scikit-learn.

        P_i and R_i are precision and recall at a threshold of the i-th score.

        Args:
            weights: How many times each image counts, (n,).

        Returns:
            0 to 1; 0 where no image has the class.
        """
        counts = weights[self.order]
        n_predicted = np.cumsum(counts)[self.ends]
        tp = np.cumsum(counts * self.positive)[self.ends]
        if not tp[-1]:
            return 0.0
        return float((np.diff(tp, prepend=0) * tp / np.maximum(n_predicted, 1)).sum() / tp[-1])


def rankings(scores: Floats, targets: Integers) -> list[Ranking]:
    """The ranking of each class, of scores and targets (n, C)."""
    return [Ranking.of(scores[:, c], targets[:, c] > 0) for c in range(scores.shape[1])]


def average_precision(scores: Floats, targets: Integers) -> NDArray[np.float64]:
    """`Ranking.average_precision` of each class, (C,), of scores and targets (n, C)."""
    once = np.ones(len(scores), dtype=np.int64)
    return np.array([ranking.average_precision(once) for ranking in rankings(scores, targets)])


def best_thresholds(scores: Floats, targets: Integers) -> NDArray[np.float64]:
    """The decision threshold of each class with the highest F1 on these images.

    It lies in the middle between the score with that F1 and the next lower one.

    Args:
        scores: Probabilities, (n, C).
        targets: (n, C) of 0 and 1.

    Returns:
        (C,), 0 to 1; THRESHOLD for a class that no image has.
    """
    thresholds = np.full(scores.shape[1], THRESHOLD)
    for c, ranking in enumerate(rankings(scores, targets)):
        if not ranking.positive.any():
            continue
        distinct = scores[ranking.order[ranking.ends], c].astype(np.float64)
        tp, n_predicted = np.cumsum(ranking.positive)[ranking.ends], ranking.ends + 1
        best = int(np.argmax(2 * tp / (ranking.positive.sum() + n_predicted)))
        below = distinct[best + 1] if best + 1 < len(distinct) else 0.0
        thresholds[c] = (distinct[best] + below) / 2
    return thresholds


def multi_label_scores(
    scores: Floats,
    targets: Integers,
    thresholds: float | Sequence[float] | Floats,
    classes: Sequence[str],
) -> MultiLabel:
    """The metrics of a multi-label model.

    Args:
        scores: Probabilities, (n, C).
        targets: (n, C) of 0 and 1.
        thresholds: Probability from which a class is predicted: one, or one of each class.
        classes: Name of each class.
    """
    limits = np.broadcast_to(np.asarray(thresholds, dtype=np.float64), (len(classes),))
    predicted, positive = scores >= limits, targets > 0
    tp, support = (predicted & positive).sum(axis=0), positive.sum(axis=0)
    n_predicted = predicted.sum(axis=0)
    ap = average_precision(scores, targets)
    precision, recall = tp / np.maximum(n_predicted, 1), tp / np.maximum(support, 1)
    f1_scores = f1(tp, support, n_predicted)
    rows = zip(classes, support, ap, limits, precision, recall, f1_scores, strict=True)
    return MultiLabel(
        map=float(ap[support > 0].mean()) if support.any() else 0.0,
        exact=float((predicted == positive).all(axis=1).mean()),
        micro_f1=float(2 * tp.sum() / max(int(support.sum() + n_predicted.sum()), 1)),
        classes=tuple(LabelScore(name, int(n), *map(float, figures)) for name, n, *figures in rows),
    )
