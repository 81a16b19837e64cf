"""Reliability, temperature and abstention: against torchmetrics and scipy, by brute force, and at literal values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torchmetrics.functional.classification import multiclass_calibration_error

from crossvit.evaluation.calibration import (
    TEMPERATURES,
    calibration,
    expected_error,
    fit_temperature,
    reliability,
    selective,
)
from crossvit.evaluation.metrics import cross_entropy, probabilities, topk_correct


@pytest.fixture
def answers() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits (600, 5) that are 2.5 times too sure, and labels drawn by the probabilities they should have given."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(600, 5)) * 1.5
    labels = np.array([rng.choice(5, p=row) for row in probabilities(logits)])
    return (2.5 * logits).astype(np.float32), labels


def test_the_calibration_error_is_torchmetrics(
    answers: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    logits, labels = answers
    found = calibration(logits, labels, temperature=1.3)
    sure = torch.from_numpy(probabilities(logits, temperature=1.3))
    assert found.ece == pytest.approx(
        multiclass_calibration_error(sure, torch.from_numpy(labels), 5, n_bins=15).item(), rel=1e-5
    )
    assert found.temperature == 1.3
    assert sum(one.n for one in found.bins) == 600
    assert [one.low for one in found.bins] == pytest.approx(np.arange(15) / 15)


def test_bins_at_literal_values() -> None:
    """An edge belongs to the bin above it, 1 to the last; 4/5 of the images are off by 0.25 and 1/5 by 0.5."""
    bins = reliability(
        np.array([0.5, 0.75, 1.0, 1.0, 0.0]), np.array([True, False, True, True, False]), bins=2
    )
    low, high = bins
    assert (low.n, low.confidence, low.accuracy) == (1, 0.0, 0.0)
    assert (high.n, high.confidence, high.accuracy) == (4, 0.8125, 0.75)
    assert expected_error(bins) == pytest.approx(4 / 5 * 0.0625)
    assert [one.n for one in reliability(np.array([0.2]), np.array([True]))][:4] == [0, 0, 0, 1]


def test_the_temperature_is_where_scipy_finds_the_least_loss(
    answers: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    logits, labels = answers
    found = minimize_scalar(
        lambda t: cross_entropy(logits, labels, temperature=t),
        bounds=TEMPERATURES,
        options={"xatol": 1e-9},
    )
    assert fit_temperature(logits, labels) == pytest.approx(found.x, rel=1e-4)
    assert found.x == pytest.approx(2.5, rel=0.15)  # what the logits were made too large by


def test_a_temperature_that_makes_no_end_of_difference_is_bounded() -> None:
    labels = np.array([0, 1, 2, 0])
    assert fit_temperature(np.eye(3)[labels], labels) == 1.0  # all right: the surer the better
    assert fit_temperature(-np.eye(3)[labels], labels) == pytest.approx(
        TEMPERATURES[1]
    )  # all wrong: the less sure


def test_one_temperature_makes_too_sure_a_model_right(
    answers: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    logits, labels = answers
    before = calibration(logits, labels)
    after = calibration(logits, labels, temperature=before.suggested_temperature)
    assert before.ece > 0.15
    assert after.ece < 0.06
    assert (
        before.suggested_ece == after.suggested_ece < 0.07
    )  # each half under the other's temperature
    assert after.suggested_temperature == pytest.approx(before.suggested_temperature)


def test_the_suggested_error_is_crossed_and_does_not_flatter() -> None:
    """Two halves that need opposite temperatures: fitted to itself each would look better than it is under the other's."""
    rng = np.random.default_rng(0)
    order = rng.permutation(400)  # that of `calibration`, whose seed is 0
    logits = np.random.default_rng(5).normal(size=(400, 3))
    labels = np.array(
        [np.random.default_rng(i).choice(3, p=row) for i, row in enumerate(probabilities(logits))]
    )
    logits[order[::2]] *= 6.0
    sure = np.empty(400)
    for own, other in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        sure[own] = probabilities(
            logits[own], temperature=fit_temperature(logits[other], labels[other])
        ).max(axis=1)
    found = calibration(logits, labels)
    assert found.suggested_ece == pytest.approx(
        expected_error(reliability(sure, topk_correct(logits, labels)))
    )


def test_risk_against_coverage_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(4)
    confidence = rng.random(150).round(2)  # some are equal
    correct = rng.random(150) < confidence
    found = selective(confidence, correct)
    risks = {t: float((~correct[confidence >= t]).mean()) for t in np.unique(confidence)}
    assert found.area == pytest.approx(np.mean([risks[own] for own in confidence]))
    for point in found.points:
        assert point.risk == pytest.approx(risks[point.threshold])
        assert point.coverage == pytest.approx((confidence >= point.threshold).mean())
    assert (found.points[-1].coverage, found.points[-1].risk) == (
        1.0,
        pytest.approx((~correct).mean()),
    )
    assert found.target_risk == pytest.approx((~correct).mean() / 2)
    assert found.suggested is not None
    assert found.suggested.threshold == min(
        t for t, risk in risks.items() if risk <= found.target_risk
    )


def test_abstention_at_literal_values() -> None:
    """Of 0.9 right, 0.8 wrong, 0.7 right, 0.6 right the risks are 0, 1/2, 1/3, 1/4: a quarter is reached by answering all."""
    confidence, correct = np.array([0.6, 0.9, 0.8, 0.7]), np.array([True, True, False, True])
    found = selective(confidence, correct, target_risk=0.25)
    assert [(point.threshold, point.coverage, point.risk) for point in found.points] == [
        (0.9, 0.25, 0.0),
        (0.8, 0.5, 0.5),
        (0.7, 0.75, pytest.approx(1 / 3)),
        (0.6, 1.0, 0.25),
    ]
    assert found.area == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert found.suggested is not None
    assert found.suggested.threshold == 0.6
    strict = selective(confidence, correct, target_risk=0.0).suggested
    assert strict is not None
    assert (strict.threshold, strict.coverage) == (0.9, 0.25)
    assert (
        selective(np.array([0.9, 0.5]), np.array([False, True]), target_risk=0.1).suggested is None
    )


def test_a_long_curve_keeps_its_ends() -> None:
    confidence = np.linspace(0, 1, 5000)
    found = selective(confidence, confidence > 0.1)
    assert len(found.points) == 200
    assert (found.points[0].threshold, found.points[-1].coverage) == (1.0, 1.0)
