"""Intervals against scipy's bootstrap and at known spreads; the paired test against scipy's."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import average_precision_score, f1_score

from crossvit.errors import UsageError
from crossvit.evaluation.bootstrap import (
    compare,
    mcnemar,
    multi_label_intervals,
    single_label_intervals,
)
from crossvit.evaluation.metrics import topk_correct
from crossvit.results import Evaluation


def near(interval: object, low: float, high: float) -> bool:
    """Whether both ends are within a fifth of the width: what a thousand draws leave to chance."""
    found = dataclasses.astuple(interval)  # type: ignore[call-overload]
    return bool(np.allclose(found, (low, high), atol=(high - low) / 5))


def test_intervals_are_scipys() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    answers = np.where(rng.random(200) < 0.7, labels, rng.integers(0, 4, 200))
    five = rng.random(200) < 0.9
    found = single_label_intervals(labels, answers, five)
    options = {
        "paired": True,
        "vectorized": False,
        "n_resamples": 2000,
        "method": "percentile",
        "rng": 1,
    }
    for name, data, figure in (
        ("top1", (labels, answers), lambda true, said: np.mean(true == said)),
        ("top5", (five, five), lambda among, _: np.mean(among)),
        ("macro_f1", (labels, answers), lambda true, said: f1_score(true, said, average="macro")),
    ):
        low, high = bootstrap(data, figure, **options).confidence_interval
        assert near(found[name], low, high), name
    assert found == single_label_intervals(labels, answers, five)
    assert found != single_label_intervals(labels, answers, five, seed=1)


def test_intervals_of_several_classes_are_scipys() -> None:
    rng = np.random.default_rng(1)
    targets = (rng.random((120, 3)) < 0.4).astype(np.uint8)
    scores = np.clip(0.5 * targets + 0.7 * rng.random((120, 3)), 0, 1)
    limits = np.array([0.5, 0.6, 0.7])
    found = multi_label_intervals(scores, targets, limits)
    images = np.arange(120)
    options = {"vectorized": False, "n_resamples": 1000, "method": "percentile", "rng": 1}
    for name, figure in (
        ("top1", lambda drawn: topk_correct(scores[drawn], targets[drawn]).mean()),
        (
            "macro_f1",
            lambda drawn: f1_score(targets[drawn], scores[drawn] >= limits, average="macro"),
        ),
        ("map", lambda drawn: average_precision_score(targets[drawn], scores[drawn])),
    ):
        low, high = bootstrap((images,), figure, **options).confidence_interval
        assert near(found[name], low, high), name


def test_fifty_thousand_images_take_seconds() -> None:
    labels = np.arange(50_000) % 1000
    answers = np.where(np.arange(50_000) % 5, labels, 0)
    started = time.perf_counter()
    found = single_label_intervals(labels, answers, labels == answers)
    assert time.perf_counter() - started < 30
    assert found["top1"].high - found["top1"].low == pytest.approx(
        2 * 1.96 * np.sqrt(0.8 * 0.2 / 50_000), rel=0.2
    )


@pytest.mark.parametrize(
    ("only_first", "only_second"), [(0, 0), (1, 0), (3, 9), (9, 3), (12, 12), (400, 481)]
)
def test_the_paired_test_is_the_exact_binomial(only_first: int, only_second: int) -> None:
    m = only_first + only_second
    assert mcnemar(only_first, only_second) == pytest.approx(
        binomtest(only_first, m).pvalue if m else 1.0
    )


def evaluation(run: str, correct: dict[str, bool]) -> Evaluation:
    return Evaluation(
        top1=float(np.mean(list(correct.values()))),
        n=len(correct),
        run=run,
        data="photos",
        split="val",
        top5=1.0,
        macro_f1=0.0,
        loss=0.0,
        branches=(),
        classes=(),
        confusion=np.zeros((0, 0), dtype=np.int64),
        images=tuple(correct),
        correct=tuple(correct.values()),
    )


def test_runs_are_compared_on_the_images_both_have() -> None:
    first = {f"{i}.png": i < 60 for i in range(100)} | {"theirs.png": True}
    second = {f"{i}.png": 10 <= i < 95 for i in reversed(range(100))}
    found = compare(evaluation("a", first), evaluation("b", second))
    assert (found.runs, found.n, found.accuracies) == (("a", "b"), 100, (0.6, 0.85))
    assert (found.only_first, found.only_second, found.difference) == (10, 35, 0.25)
    assert found.p == pytest.approx(binomtest(10, 45).pvalue)
    spread = np.sqrt((45 / 100 - 0.25**2) / 100)  # of a mean of +1, −1 and 0
    assert found.interval.low == pytest.approx(0.25 - 1.96 * spread, abs=0.02)
    assert found.interval.high == pytest.approx(0.25 + 1.96 * spread, abs=0.02)


def test_runs_without_an_image_in_common_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="a and b were evaluated on no image in common"):
        compare(evaluation("a", {"1.png": True}), evaluation("b", {"2.png": True}))
