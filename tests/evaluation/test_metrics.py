"""Figures of predictions against scikit-learn's and torchmetrics' on the same predictions, and literal small cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn import metrics as theirs
from torchmetrics.functional import classification as torchs

from crossvit.evaluation import metrics
from crossvit.results import MULTI_LABEL, to_json

NAMES = tuple(f"class {index}" for index in range(7))


@pytest.fixture
def single() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits (300, 7) that are often right, and labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 300)
    return (rng.normal(size=(300, 7)) + 1.5 * np.eye(7)[labels]).astype(np.float32), labels


@pytest.fixture(params=["distinct scores", "equal scores"])
def multi(request: pytest.FixtureRequest) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Probabilities (250, 7) and targets; the last class is in no image, some images show nothing."""
    rng = np.random.default_rng(1)
    targets = (rng.random((250, 7)) < 0.25).astype(np.uint8)
    targets[:, 6] = 0
    scores = metrics.probabilities(
        rng.normal(size=targets.shape) + 1.2 * targets - 0.8, task=MULTI_LABEL
    )
    return (scores.round(1) if request.param == "equal scores" else scores), targets


# ---------------------------------------------------------------- one class an image


def test_accuracies_are_scikit_learns_and_torchmetrics(
    single: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    logits, labels = single
    for k in (1, 2, 5):
        share = metrics.topk_correct(logits, labels, k=k).mean()
        assert share == pytest.approx(theirs.top_k_accuracy_score(labels, logits, k=k))
        tensors = torch.from_numpy(logits), torch.from_numpy(labels)
        assert share == pytest.approx(
            torchs.multiclass_accuracy(*tensors, 7, average="micro", top_k=k).item()
        )
    branches = metrics.branch_scores(np.stack([logits, -logits]), labels, (12, 16))
    assert [(one.name, one.patch) for one in branches] == [("S", 12), ("L", 16)]
    assert [one.top1 for one in branches] == [
        pytest.approx(theirs.accuracy_score(labels, own.argmax(axis=1)))
        for own in (logits, -logits)
    ]


def test_figures_of_the_classes_are_scikit_learns_and_torchmetrics(
    single: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    logits, labels = single
    answers = logits.argmax(axis=1)
    confusion = metrics.confusion_matrix(labels, answers, 7)
    tensors = torch.from_numpy(answers), torch.from_numpy(labels)
    assert np.array_equal(confusion, theirs.confusion_matrix(labels, answers))
    assert np.array_equal(confusion, torchs.multiclass_confusion_matrix(*tensors, 7).numpy())
    scores = metrics.class_scores(confusion, NAMES)
    rows = theirs.precision_recall_fscore_support(labels, answers)
    np.testing.assert_allclose(
        [(one.precision, one.recall, one.f1, one.n) for one in scores], np.stack(rows, axis=1)
    )
    f1 = torchs.multiclass_f1_score(*tensors, 7, average="none").numpy()
    np.testing.assert_allclose([one.f1 for one in scores], f1, rtol=1e-6)
    macro = metrics.macro_f1(confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0))
    assert macro == pytest.approx(theirs.f1_score(labels, answers, average="macro"))


def test_probabilities_and_losses_are_torchs(
    single: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    logits, labels = single
    tensor, wanted = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    np.testing.assert_allclose(
        metrics.probabilities(logits, temperature=1.7), (tensor / 1.7).softmax(dim=1)
    )
    np.testing.assert_allclose(
        metrics.confidence(logits, 1.7), (tensor / 1.7).softmax(dim=1).amax(dim=1)
    )
    each = np.linspace(0.5, 3, len(logits))
    own = (tensor / torch.from_numpy(each)[:, None]).softmax(dim=1).amax(dim=1)
    np.testing.assert_allclose(metrics.confidence(logits, each), own, rtol=1e-6)
    np.testing.assert_allclose(
        metrics.probabilities(logits, task=MULTI_LABEL, temperature=1.7), (tensor / 1.7).sigmoid()
    )
    loss = torch.nn.functional.cross_entropy(tensor / 1.7, wanted).item()
    assert metrics.cross_entropy(logits, labels, temperature=1.7) == pytest.approx(loss)
    targets = torch.nn.functional.one_hot(wanted, 7).double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(tensor / 1.7, targets).item()
    assert metrics.binary_cross_entropy(
        logits, targets.long().numpy(), temperature=1.7
    ) == pytest.approx(loss)


def test_enormous_logits_stay_finite() -> None:
    logits = np.array([[1e4, -1e4, 0.0]], dtype=np.float32)
    assert metrics.probabilities(logits).tolist() == [[1, 0, 0]]
    assert metrics.probabilities(logits, task=MULTI_LABEL).tolist() == [[1, 0, 0.5]]
    assert metrics.cross_entropy(logits, np.array([1])) == 2e4
    assert metrics.binary_cross_entropy(logits, np.array([[1, 0, 0]])) == pytest.approx(
        np.log(2) / 3
    )


def test_classes_at_literal_values() -> None:
    """Of class a one of two is found and one answer of two is right; b is found wholly; c is in no image and never said."""
    confusion = metrics.confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 3)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    a, b, c = metrics.class_scores(confusion, "abc")
    assert to_json(a) == {
        "label": "a",
        "n": 2,
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
    }
    assert to_json(b) == {
        "label": "b",
        "n": 1,
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
    }
    assert to_json(c) == {"label": "c", "n": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    macro = metrics.macro_f1(confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0))
    assert macro == pytest.approx(2 / 3)  # c, which does not occur, does not pull it down
    assert metrics.macro_f1(*np.zeros((3, 2), dtype=int)) == 0.0


def test_of_equal_scores_the_first_is_the_answer() -> None:
    scores = np.array([[0.5, 0.5, 0.1], [0.5, 0.5, 0.1]])
    assert metrics.topk_correct(scores, np.array([0, 1])).tolist() == [True, False]
    assert metrics.topk_correct(scores, np.array([1, 2]), k=2).tolist() == [True, False]


# ---------------------------------------------------------------- several classes an image


def test_several_classes_are_scikit_learns(
    multi: tuple[NDArray[np.float64], NDArray[np.uint8]],
) -> None:
    scores, targets = multi
    limits = np.linspace(0.2, 0.6, 7)
    found = metrics.multi_label_scores(scores, targets, limits, NAMES)
    said = scores >= limits
    precise = [theirs.average_precision_score(targets[:, c], scores[:, c]) for c in range(6)]
    np.testing.assert_allclose([one.average_precision for one in found.classes], [*precise, 0.0])
    assert found.map == pytest.approx(np.mean(precise))
    assert found.exact == theirs.accuracy_score(targets, said)
    assert found.micro_f1 == pytest.approx(theirs.f1_score(targets, said, average="micro"))
    rows = theirs.precision_recall_fscore_support(targets, said, zero_division=0)
    np.testing.assert_allclose(
        [(one.precision, one.recall, one.f1, one.n) for one in found.classes],
        np.stack(rows, axis=1),
    )
    assert [one.threshold for one in found.classes] == limits.tolist()


def test_several_classes_are_torchmetrics(
    multi: tuple[NDArray[np.float64], NDArray[np.uint8]],
) -> None:
    scores, targets = (
        multi[0][:, :6],
        multi[1][:, :6],
    )  # torchmetrics counts a class that is in no image as nothing, or not at all
    found = metrics.multi_label_scores(scores, targets, 0.4, NAMES[:6])
    tensors = torch.from_numpy(scores), torch.from_numpy(targets).long()
    assert found.map == pytest.approx(
        torchs.multilabel_average_precision(*tensors, 6).item(), rel=1e-5
    )
    above = (
        torch.from_numpy(scores >= 0.4).long(),
        tensors[1],
    )  # theirs says a class above the threshold, not at it
    assert found.exact == pytest.approx(torchs.multilabel_exact_match(*above, 6).item())
    assert found.micro_f1 == pytest.approx(
        torchs.multilabel_f1_score(*above, 6, average="micro").item()
    )
    macro = np.mean([one.f1 for one in found.classes])
    assert macro == pytest.approx(
        torchs.multilabel_f1_score(*above, 6, average="macro").item(), rel=1e-6
    )


def test_average_precision_at_literal_values() -> None:
    """Right at the 1st and 3rd of 4: half the recall at precision 1, half at 2/3. With the first two equal, half at 1/2."""
    targets = np.array([[1], [0], [1], [0]])
    assert metrics.average_precision(np.array([[0.9], [0.8], [0.7], [0.6]]), targets).tolist() == [
        pytest.approx(5 / 6)
    ]
    assert metrics.average_precision(np.array([[0.8], [0.8], [0.7], [0.6]]), targets).tolist() == [
        pytest.approx((1 / 2 + 2 / 3) / 2)
    ]


def test_images_weigh_as_often_as_they_are_drawn(
    multi: tuple[NDArray[np.float64], NDArray[np.uint8]],
) -> None:
    scores, targets = multi
    drawn = np.random.default_rng(2).integers(0, len(scores), len(scores))
    weights = np.bincount(drawn, minlength=len(scores))
    weighed = [ranking.average_precision(weights) for ranking in metrics.rankings(scores, targets)]
    np.testing.assert_allclose(weighed, metrics.average_precision(scores[drawn], targets[drawn]))


def test_no_threshold_has_a_better_f1_than_the_best(
    multi: tuple[NDArray[np.float64], NDArray[np.uint8]],
) -> None:
    scores, targets = multi
    best = metrics.best_thresholds(scores, targets)
    assert best[6] == metrics.THRESHOLD
    for c in range(6):
        own = theirs.f1_score(targets[:, c], scores[:, c] >= best[c])
        tried = [
            theirs.f1_score(targets[:, c], scores[:, c] >= limit)
            for limit in np.unique(scores[:, c])
        ]
        assert own == pytest.approx(max(tried))
    assert metrics.best_thresholds(
        np.array([[0.9], [0.7], [0.3]]), np.array([[1], [1], [0]])
    ).tolist() == [0.5]


def test_an_image_is_right_if_its_surest_class_is_one_of_its_own() -> None:
    scores = np.array([[0.9, 0.8, 0.1], [0.9, 0.8, 0.1], [0.9, 0.8, 0.1], [0.9, 0.8, 0.1]])
    targets = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    assert metrics.topk_correct(scores, targets).tolist() == [True, False, False, False]
    assert metrics.topk_correct(scores, targets, k=2).tolist() == [True, True, False, False]
