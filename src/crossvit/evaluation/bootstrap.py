"""Uncertainty of metrics: bootstrap intervals, and a paired test of two runs. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from crossvit.errors import UsageError
from crossvit.evaluation.metrics import Booleans, Floats, Integers, macro_f1, rankings, topk_correct
from crossvit.results import Comparison, Evaluation, Interval

RESAMPLINGS = 1000
WORK = 10**9  # scores in all resamplings of a multi-label model together, which take some seconds
FEWEST = 200  # resamplings, however many scores there are


def single_label_intervals(
    labels: Integers,
    predicted: Integers,
    top5_correct: Booleans,
    *,
    resamplings: int = RESAMPLINGS,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % percentile bootstrap intervals of top1, top5 and macro_f1.

    Images are drawn with replacement, as many as there are, `resamplings` times; low and high are
    the 2.5th and the 97.5th percentile of the metric over the draws (Efron 1979).

    Args:
        labels: (n,) class indices.
        predicted: (n,) class indices.
        top5_correct: (n,), whether the label is among the five highest scores.
        resamplings: Number of draws.
        seed: Of the draws.

    Returns:
        The interval of each metric by its name.
    """
    classes = int(max(labels.max(), predicted.max())) + 1
    correct_class = np.where(labels == predicted, labels, classes)  # `classes`: not correct
    figures = np.empty((resamplings, 3))
    for row, drawn in enumerate(_draws(len(labels), resamplings, seed)):
        tp = np.bincount(correct_class[drawn], minlength=classes + 1)[:classes]
        support = np.bincount(labels[drawn], minlength=classes)
        n_predicted = np.bincount(predicted[drawn], minlength=classes)
        figures[row] = (
            tp.sum() / len(labels),
            top5_correct[drawn].mean(),
            macro_f1(tp, support, n_predicted),
        )
    return {
        name: percentiles(figures[:, column])
        for column, name in enumerate(("top1", "top5", "macro_f1"))
    }


def multi_label_intervals(
    scores: Floats,
    targets: Integers,
    thresholds: Floats,
    *,
    resamplings: int = RESAMPLINGS,
    seed: int = 0,
) -> dict[str, Interval]:
    """As `single_label_intervals`, of a multi-label model and with map.

    Each resampling takes time in proportion to n · C, so there are fewer where that is large: WORK
    scores in all, but FEWEST resamplings at least.

    Args:
        scores: Probabilities, (n, C).
        targets: (n, C) of 0 and 1.
        thresholds: Decision threshold of each class, (C,).
        resamplings: Number of draws.
        seed: Of the draws.
    """
    resamplings = max(min(resamplings, FEWEST), min(resamplings, WORK // scores.size))
    positive, predicted = targets > 0, scores >= thresholds
    counts = np.stack([positive & predicted, positive, predicted]).astype(np.float32)  # (3, n, C)
    top1_correct, top5_correct = topk_correct(scores, targets), topk_correct(scores, targets, k=5)
    ranked = rankings(scores, targets)
    figures = np.empty((resamplings, 4))
    for row, drawn in enumerate(_draws(len(scores), resamplings, seed)):
        weights = np.bincount(drawn, minlength=len(scores))
        tp, support, n_predicted = (weights.astype(np.float32) @ counts).astype(np.int64)
        ap = [
            ranking.average_precision(weights)
            for ranking, n in zip(ranked, support, strict=True)
            if n
        ]
        figures[row] = (
            top1_correct[drawn].mean(),
            top5_correct[drawn].mean(),
            macro_f1(tp, support, n_predicted),
            np.mean(ap or [0.0]),
        )
    return {
        name: percentiles(figures[:, column])
        for column, name in enumerate(("top1", "top5", "macro_f1", "map"))
    }


def percentiles(figures: NDArray[np.float64]) -> Interval:
    """The middle 95 % of a metric's values over the draws."""
    low, high = np.percentile(figures, (2.5, 97.5))
    return Interval(float(low), float(high))


def _draws(n: int, resamplings: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Indices of n images drawn with replacement, once for each resampling."""
    rng = np.random.default_rng(seed)
    for _ in range(resamplings):
        yield rng.integers(n, size=n)


def compare(
    first: Evaluation, second: Evaluation, *, resamplings: int = 10_000, seed: int = 0
) -> Comparison:
    """A paired test of two evaluations on the images that both have, matched by name.

    Args:
        first: The run that is compared with.
        second: The run whose gain is measured.
        resamplings: Number of draws for the percentile bootstrap interval over images.
        seed: Of the draws.

    Returns:
        The difference in accuracy with its interval and the p-value of McNemar's exact test.

    Raises:
        UsageError: Where they have no image in common.
    """
    second_correct = dict(zip(second.images, second.correct, strict=True))
    pairs = [
        (correct, second_correct[name])
        for name, correct in zip(first.images, first.correct, strict=True)
        if name in second_correct
    ]
    if not pairs:
        raise UsageError(
            f"{first.run} and {second.run} were evaluated on no image in common "
            f"({first.data}, {second.data}): evaluate both on the same DATA and --split"
        )
    a, b = np.array(pairs, dtype=bool).T
    n, only_first, only_second = len(pairs), int((a & ~b).sum()), int((b & ~a).sum())
    shares = np.array([only_first, only_second, n - only_first - only_second]) / n
    # of a resampling only these three counts matter
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=resamplings)
    return Comparison(
        runs=(first.run, second.run),
        n=n,
        accuracies=(float(a.mean()), float(b.mean())),
        only_first=only_first,
        only_second=only_second,
        difference=(only_second - only_first) / n,
        interval=percentiles((drawn[:, 1] - drawn[:, 0]) / n),
        p=mcnemar(only_first, only_second),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """p-value of McNemar's exact test (1947): min(1, 2 Σ_{k ≤ min} C(m, k) / 2^m).

    Args:
        only_first: Number of images that the first run alone gets right.
        only_second: Number of images that the second run alone gets right.

    Returns:
        Probability of counts at least as uneven if the runs were equally good, 0 to 1.
    """
    m, rarer = only_first + only_second, min(only_first, only_second)
    logs = [
        math.lgamma(m + 1) - math.lgamma(k + 1) - math.lgamma(m - k + 1) - m * math.log(2)
        for k in range(rarer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
