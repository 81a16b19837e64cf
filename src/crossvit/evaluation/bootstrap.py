"""How far figures may be off for the images being these: bootstrap intervals, and a paired test of two runs. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from crossvit.errors import UsageError
from crossvit.evaluation.metrics import Booleans, Floats, Integers, hits, macro_f1, rankings
from crossvit.results import Comparison, Evaluation, Interval

RESAMPLINGS = 1000
WORK = (
    10**9
)  # scores sorted in all resamplings of a multi-label model together: some seconds; fewer resamplings of more
FEWEST = 200


def single_label_intervals(
    labels: Integers,
    predicted: Integers,
    among_five: Booleans,
    *,
    resamplings: int = RESAMPLINGS,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % percentile bootstrap intervals of top1, top5 and macro_f1.

    Images are drawn with replacement, as many as there are, `resamplings` times; low and high are the 2.5th and the 97.5th
    percentile of the figure over the draws (Efron 1979). labels, predicted: (n,) class indices; among_five: (n,).
    """
    classes = int(max(labels.max(), predicted.max())) + 1
    right = labels == predicted
    own = np.where(right, labels, classes)  # where it is right its class, else one more
    figures = np.empty((resamplings, 3))
    for row, drawn in enumerate(_draws(len(labels), resamplings, seed)):
        hits_of = np.bincount(own[drawn], minlength=classes + 1)[:classes]
        true = np.bincount(labels[drawn], minlength=classes)
        guessed = np.bincount(predicted[drawn], minlength=classes)
        figures[row] = (
            hits_of.sum() / len(labels),
            among_five[drawn].mean(),
            macro_f1(hits_of, true, guessed),
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
    """As `single_label_intervals`, and of map, of probabilities and targets (n, C). thresholds: (C,).

    Each resampling takes time in proportion to n · C: of more than WORK scores in all there are fewer, FEWEST at the least.
    """
    resamplings = max(min(resamplings, FEWEST), min(resamplings, WORK // scores.size))
    shown, said = targets > 0, scores >= thresholds
    counts = np.stack([shown & said, shown, said]).astype(np.float32)  # (3, n, C)
    first, five = hits(scores, targets), hits(scores, targets, k=5)
    ranked = rankings(scores, targets)
    figures = np.empty((resamplings, 4))
    for row, drawn in enumerate(_draws(len(scores), resamplings, seed)):
        weights = np.bincount(drawn, minlength=len(scores))
        right, true, guessed = (weights.astype(np.float32) @ counts).astype(np.int64)
        precise = [
            ranking.average_precision(weights) for ranking, n in zip(ranked, true, strict=True) if n
        ]
        figures[row] = (
            first[drawn].mean(),
            five[drawn].mean(),
            macro_f1(right, true, guessed),
            np.mean(precise or [0.0]),
        )
    return {
        name: percentiles(figures[:, column])
        for column, name in enumerate(("top1", "top5", "macro_f1", "map"))
    }


def percentiles(figures: NDArray[np.float64]) -> Interval:
    """The middle 95 % of a figure's values over the draws."""
    low, high = np.percentile(figures, (2.5, 97.5))
    return Interval(float(low), float(high))


def _draws(n: int, resamplings: int, seed: int) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    for _ in range(resamplings):
        yield rng.integers(n, size=n)


def compare(
    first: Evaluation, second: Evaluation, *, resamplings: int = 10_000, seed: int = 0
) -> Comparison:
    """A paired test of two evaluations on the images both have, told apart by name. See `Comparison`.

    p is McNemar's, exact: of images that one run alone gets right, each is a fair coin if the runs are equally good. The interval
    is the percentile bootstrap's over images. UsageError where they have no image in common.
    """
    theirs = dict(zip(second.images, second.correct, strict=True))
    pairs = [
        (right, theirs[name])
        for name, right in zip(first.images, first.correct, strict=True)
        if name in theirs
    ]
    if not pairs:
        raise UsageError(
            f"{first.run} and {second.run} were evaluated on no image in common ({first.data}, {second.data}): evaluate both "
            "on the same DATA and --split"
        )
    a, b = np.array(pairs, dtype=bool).T
    n, only_first, only_second = len(pairs), int((a & ~b).sum()), int((b & ~a).sum())
    shares = np.array([only_first, only_second, n - only_first - only_second]) / n
    drawn = np.random.default_rng(seed).multinomial(
        n, shares, size=resamplings
    )  # all that a resampling changes
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
    """The chance that of `only_first` + `only_second` fair coins one side comes up as rarely as the rarer here, or more rarely.

    min(1, 2 Σ_{k ≤ min} C(m, k) / 2^m), the exact test of McNemar 1947.
    """
    m, rarer = only_first + only_second, min(only_first, only_second)
    logs = [
        math.lgamma(m + 1) - math.lgamma(k + 1) - math.lgamma(m - k + 1) - m * math.log(2)
        for k in range(rarer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
