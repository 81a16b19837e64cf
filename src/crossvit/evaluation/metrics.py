"""Figures of predictions: logits or probabilities and what the images show in, the records of `results` out. NumPy only.

Shapes: n images, C classes; logits and probabilities (n, C); labels (n,) class indices; targets (n, C) of 0 and 1, of images
that may show several classes. `calibration` asks whether the probabilities are right, `bootstrap` how far figures may be off.
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

THRESHOLD = 0.5  # from which a multi-label model says a class, where no other was set

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]
Booleans = NDArray[np.bool_]


# ---------------------------------------------------------------- from logits to probabilities


def probabilities(
    logits: Floats, *, task: str = SINGLE_LABEL, temperature: float = 1.0
) -> NDArray[np.float64]:
    """(..., C) in 0..1: softmax(z / T) over the classes, or of a multi-label model sigmoid(z / T) of each."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    if task == SINGLE_LABEL:
        return np.exp(log_softmax(scaled))
    return np.exp(-np.logaddexp(0.0, -scaled))


def confidence(logits: Floats, temperature: float | Floats = 1.0) -> NDArray[np.float64]:
    """(n,): the probability of the surest class, max softmax(z / T) = 1 / Σ exp((z − max z) / T). temperature: one, or (n,)."""
    shifted = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64)
    shifted /= np.broadcast_to(np.asarray(temperature, dtype=np.float64), len(logits))[:, None]
    surest: NDArray[np.float64] = 1 / np.exp(shifted, out=shifted).sum(axis=1)
    return surest


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """z − log Σ exp z over the last axis, in double precision and without overflow."""
    shifted = np.asarray(logits, dtype=np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def cross_entropy(logits: Floats, labels: Integers, *, temperature: float = 1.0) -> float:
    """Mean of −log p(label), in nats."""
    own = log_softmax(np.asarray(logits, dtype=np.float64) / temperature)[
        np.arange(len(labels)), labels
    ]
    return float(-own.mean())


def binary_cross_entropy(logits: Floats, targets: Integers, *, temperature: float = 1.0) -> float:
    """Mean over images and classes of −t log p − (1 − t) log(1 − p), p = sigmoid(z / T), in nats."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    return float((np.logaddexp(0.0, scaled) - targets * scaled).mean())


# ---------------------------------------------------------------- one class an image


def hits(scores: Floats, truth: Integers, *, k: int = 1) -> Booleans:
    """(n,): whether a true class is among the k surest. truth: labels (n,) or targets (n, C).

    Classes as sure as a true one do not count against it, but for k = 1 the first of equals is the answer, as in prediction.
    An image that shows no class has no hit.
    """
    rows = np.arange(len(scores))
    if k == 1:
        answers = scores.argmax(axis=1)
        found: Booleans = answers == truth if truth.ndim == 1 else truth[rows, answers] > 0
        return found
    best = (
        scores[rows, truth] if truth.ndim == 1 else np.where(truth > 0, scores, -np.inf).max(axis=1)
    )
    ranked: Booleans = ((scores > best[:, None]).sum(axis=1) < k) & (best > -np.inf)
    return ranked


def branch_scores(
    branch_logits: Floats, truth: Integers, patches: Sequence[int]
) -> tuple[BranchScore, ...]:
    """Accuracy of each branch's own head, from (branches, n, C) logits: the columns of the paper's Table 6."""
    names = branch_names(len(patches))
    shares = [float(hits(own, truth).mean()) for own in branch_logits]
    return tuple(
        BranchScore(name, patch, share)
        for name, patch, share in zip(names, patches, shares, strict=True)
    )


def confusion_matrix(labels: Integers, predicted: Integers, classes: int) -> NDArray[np.int64]:
    """(C, C) counts: rows true, columns predicted."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def class_scores(confusion: NDArray[np.int64], classes: Sequence[str]) -> tuple[ClassScore, ...]:
    """Of each class: precision = right / predicted, recall = right / true, F1 = 2 right / (true + predicted); 0 for 0 / 0."""
    right, true, guessed = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    precision = right / np.maximum(guessed, 1)
    recall = right / np.maximum(true, 1)
    rows = zip(classes, true, precision, recall, f1(right, true, guessed), strict=True)
    return tuple(
        ClassScore(name, int(n), float(p), float(r), float(f)) for name, n, p, r, f in rows
    )


def f1(right: Integers, true: Integers, guessed: Integers) -> NDArray[np.float64]:
    """2 right / (true + guessed), the harmonic mean of precision and recall; 0 for a class neither present nor predicted."""
    shares: NDArray[np.float64] = 2 * right / np.maximum(true + guessed, 1)
    return shares


def macro_f1(right: Integers, true: Integers, guessed: Integers) -> float:
    """Mean F1 of the classes that occur. (C,) counts of images right, true and predicted; 0 where none occurs."""
    present = true > 0
    return float(f1(right, true, guessed)[present].mean()) if present.any() else 0.0


# ---------------------------------------------------------------- several classes an image


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The images of one class from the surest to the least sure: `order` (n,), where each distinct score ends in it, and which
    of the images, in that order, show the class."""

    order: NDArray[np.int64]
    ends: NDArray[np.int64]
    shown: Booleans

    @classmethod
    def of(cls, scores: Floats, shown: Booleans) -> Ranking:
        order = np.argsort(-scores, kind="stable")
        return cls(order, np.flatnonzero(np.diff(scores[order], append=-np.inf) != 0), shown[order])

    def average_precision(self, weights: Integers) -> float:
        """Σ_i (R_i − R_{i−1}) P_i over the distinct scores, from the highest; 0 where no image shows the class.

        P_i, R_i: precision and recall of saying the class wherever the score is at least the i-th, as in scikit-learn.
        weights: (n,) how many times each image counts.
        """
        counted = weights[self.order]
        said = np.cumsum(counted)[self.ends]
        right = np.cumsum(counted * self.shown)[self.ends]
        if not right[-1]:
            return 0.0
        return float((np.diff(right, prepend=0) * right / np.maximum(said, 1)).sum() / right[-1])


def rankings(scores: Floats, targets: Integers) -> list[Ranking]:
    return [Ranking.of(scores[:, c], targets[:, c] > 0) for c in range(scores.shape[1])]


def average_precision(scores: Floats, targets: Integers) -> NDArray[np.float64]:
    """(C,), of each class: see `Ranking.average_precision`."""
    once = np.ones(len(scores), dtype=np.int64)
    return np.array([ranking.average_precision(once) for ranking in rankings(scores, targets)])


def best_thresholds(scores: Floats, targets: Integers) -> NDArray[np.float64]:
    """(C,): of each class the probability from which to say it that has the highest F1 on these images.

    Halfway to the next lower score, so that the images at hand stand off it on both sides; THRESHOLD for a class in no image.
    """
    found = np.full(scores.shape[1], THRESHOLD)
    for c, ranking in enumerate(rankings(scores, targets)):
        if not ranking.shown.any():
            continue
        distinct = scores[ranking.order[ranking.ends], c].astype(np.float64)
        right, said = np.cumsum(ranking.shown)[ranking.ends], ranking.ends + 1
        best = int(np.argmax(2 * right / (ranking.shown.sum() + said)))
        found[c] = (distinct[best] + (distinct[best + 1] if best + 1 < len(distinct) else 0.0)) / 2
    return found


def multi_label_scores(
    scores: Floats,
    targets: Integers,
    thresholds: float | Sequence[float] | Floats,
    classes: Sequence[str],
) -> MultiLabel:
    """What `MultiLabel` holds, of probabilities and targets (n, C); thresholds: one, or one of each class."""
    limits = np.broadcast_to(np.asarray(thresholds, dtype=np.float64), (len(classes),))
    said = scores >= limits
    right, true, guessed = (
        (said & (targets > 0)).sum(axis=0),
        (targets > 0).sum(axis=0),
        said.sum(axis=0),
    )
    precise = average_precision(scores, targets)
    columns = (
        classes,
        true,
        precise,
        limits,
        right / np.maximum(guessed, 1),
        right / np.maximum(true, 1),
    )
    rows = zip(*columns, f1(right, true, guessed), strict=True)
    return MultiLabel(
        map=float(precise[true > 0].mean()) if true.any() else 0.0,
        exact=float((said == (targets > 0)).all(axis=1).mean()),
        micro_f1=float(2 * right.sum() / max(int(true.sum() + guessed.sum()), 1)),
        classes=tuple(LabelScore(name, int(n), *map(float, figures)) for name, n, *figures in rows),
    )
