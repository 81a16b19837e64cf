"""Evaluation and prediction: numbers against scikit-learn's, and literal cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import (
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

import crossvit
from crossvit.data.images import Arrays, ImageSet
from crossvit.data.sources import open_data
from crossvit.engines.protocol import EngineOutput
from crossvit.errors import DataError, RunError, UnknownNameError, UsageError
from crossvit.evaluation.evaluator import summarise
from crossvit.prediction.image_paths import find_images
from crossvit.results import TrainingResult, to_json
from crossvit.results.run_record import SCHEMA
from crossvit.run import Run


def image_set(labels: list[int], classes: int) -> ImageSet:
    names = tuple(f"{index:03d}" for index in range(len(labels)))
    pixels = np.zeros((len(labels), 4, 4), dtype=np.uint8)
    known = tuple(f"class {index}" for index in range(classes))
    return ImageSet(Arrays("made-up", pixels), known, names, tuple(labels), (1,) * len(labels))


def test_metrics_equal_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 200).tolist()
    logits = (
        rng.normal(size=(2, 200, 7)).astype(np.float32) + 1.5 * np.eye(7, dtype=np.float32)[labels]
    )
    ours = summarise(
        EngineOutput.of_branches(logits),
        image_set(labels, 7),
        patches=(4, 8),
        run="r",
        data="d",
        split="all",
    )
    fused = logits.mean(axis=0).astype(np.float64)
    probabilities = np.exp(fused) / np.exp(fused).sum(axis=1, keepdims=True)
    predicted = fused.argmax(axis=1)
    assert ours.top1 == pytest.approx(np.mean(predicted == labels))
    assert ours.top5 == pytest.approx(top_k_accuracy_score(labels, probabilities, k=5))
    assert ours.loss == pytest.approx(log_loss(labels, probabilities), rel=1e-6)
    assert ours.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert np.array_equal(ours.confusion, confusion_matrix(labels, predicted))
    theirs = np.stack(precision_recall_fscore_support(labels, predicted)[:3], axis=1)
    np.testing.assert_allclose(
        [(score.precision, score.recall, score.f1) for score in ours.classes], theirs
    )
    assert [branch.name for branch in ours.branches] == ["S", "L"]
    assert ours.branches[0].top1 == pytest.approx(np.mean(logits[0].argmax(axis=1) == labels))
    sure = [mistake.probability for mistake in ours.mistakes]
    assert sure == sorted(sure, reverse=True)
    assert len(sure) == 24


def test_a_literal_case() -> None:
    logits = np.log(np.array([[[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]]], dtype=np.float32)).repeat(
        2, axis=0
    )
    result = summarise(
        EngineOutput.of_branches(logits),
        image_set([0, 1, 1], 2),
        patches=(4, 8),
        run="r",
        data="d",
        split="val",
    )
    assert result.confusion.tolist() == [[1, 0], [1, 1]]
    assert result.top1 == pytest.approx(2 / 3)
    assert result.loss == pytest.approx(-(np.log(0.8) + np.log(0.4) + np.log(0.9)) / 3, rel=1e-5)
    assert [(score.precision, score.recall) for score in result.classes] == [(0.5, 1.0), (1.0, 0.5)]
    (mistake,) = result.mistakes
    assert (mistake.image, mistake.label, mistake.predicted) == (
        "made-up/001",
        "class 1",
        "class 0",
    )
    assert mistake.probability == pytest.approx(0.6)
    assert list(to_json(mistake)) == [
        "image",
        "label",
        "predicted",
        "probability",
    ]  # bytes stay out of JSON


def test_a_class_without_images_does_not_pull_the_mean_down() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 1]][None].repeat(2, axis=0)
    assert (
        summarise(
            EngineOutput.of_branches(logits),
            image_set([0, 1], 3),
            patches=(4, 8),
            run="r",
            data="d",
            split="val",
        ).macro_f1
        == 1.0
    )


# ---------------------------------------------------------------- evaluate


def test_evaluate_gives_the_numbers_training_ended_with(
    tiny_run: TrainingResult, scans: Path
) -> None:
    result = crossvit.evaluate(tiny_run.run, scans)
    assert (result.split, result.n) == ("held-out", 12)
    assert result.top1 == tiny_run.top1
    assert result.loss == pytest.approx(tiny_run.evaluation.loss, rel=1e-5)
    assert np.array_equal(result.confusion, tiny_run.evaluation.confusion)


def test_evaluate_knows_moved_data_and_takes_other_data_whole(
    tiny_run: TrainingResult, scans: Path, own_scans: Path, tmp_path: Path
) -> None:
    import shutil

    moved = shutil.copytree(scans, tmp_path / "elsewhere")
    assert crossvit.evaluate(tiny_run.run, moved).n == 12
    for extra in (
        "0/extra.png",
        "1/extra.png",
    ):  # a copy that has changed still has images it was trained on
        shutil.copy(next((scans / "2").iterdir()), moved / extra)
    assert crossvit.evaluate(tiny_run.run, moved).n == 12
    for path in list(own_scans.rglob("*.png")):
        path.rename(path.with_name(f"new-{path.name}"))
    other = crossvit.evaluate(tiny_run.run, own_scans)
    assert (other.split, other.n) == ("all", 24)
    assert crossvit.evaluate(tiny_run.run, scans, split="all").n == 60
    with pytest.raises(UsageError, match="has none of the images that this run held out"):
        crossvit.evaluate(tiny_run.run, own_scans, split="held-out")
    with pytest.raises(UnknownNameError, match="unknown split 'vall'"):
        crossvit.evaluate(tiny_run.run, scans, split="vall")


def test_evaluate_takes_classes_by_name_and_refuses_unknown_ones(
    tiny_run: TrainingResult, own_scans: Path
) -> None:
    import shutil

    shutil.rmtree(own_scans / "0")
    result = crossvit.evaluate(tiny_run.run, own_scans, split="all")
    assert [score.n for score in result.classes] == [0, 8, 8]
    (own_scans / "1").rename(own_scans / "one")
    with pytest.raises(
        UsageError, match=r"classes the run was not trained on: one \(it knows 0, 1, 2\)"
    ):
        crossvit.evaluate(tiny_run.run, own_scans)


def test_evaluate_refuses_a_batch_of_nothing(tiny_run: TrainingResult, scans: Path) -> None:
    with pytest.raises(UsageError, match="batch_size = 0: should be 1 or more"):
        crossvit.evaluate(tiny_run.run, scans, batch_size=0)


def test_evaluate_counts_and_names_broken_images(tiny_run: TrainingResult, own_scans: Path) -> None:
    (own_scans / "1" / "bad.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"1 of 25 images cannot be decoded: .*bad\.png.*--skip-bad"
    ):
        crossvit.evaluate(tiny_run.run, own_scans, split="all")
    assert crossvit.evaluate(tiny_run.run, own_scans, split="all", skip_bad=True).n == 24


def test_runs_that_cannot_be_read_are_refused_with_the_fix(
    tiny_run: TrainingResult, tmp_path: Path
) -> None:
    import shutil

    with pytest.raises(UsageError, match=r"is not a run folder \(no run\.json\)"):
        Run(tmp_path).record()
    run = Run(shutil.copytree(tiny_run.run, tmp_path / "copy"))
    record = run.record().to_dict()
    for text, error, says in (
        (json.dumps({**record, "schema": SCHEMA + 1}), RunError, "was made by a newer crossvit"),
        ("{", RunError, r"run\.json is damaged"),
        ("[]", RunError, r"run\.json is damaged"),
        ('{"schema": "one"}', RunError, r"run\.json is damaged"),
        (
            '{"schema": 1, "result": {"top1": 1}}',
            RunError,
            r"run\.json is damaged \(no crossvit, model, classes, preprocessing",
        ),
        (
            json.dumps({**record, "result": None}),
            UsageError,
            "has not finished training: go on with .* --resume",
        ),
    ):
        run.record_path.write_text(text)
        with pytest.raises(error, match=says):
            run.finished_record()


# ---------------------------------------------------------------- predict


def test_predictions_are_evaluations_to_the_bit(tiny_run: TrainingResult, scans: Path) -> None:
    """The same preprocessing and engine: what predict calls wrong is what evaluate counts as wrong."""
    result = crossvit.evaluate(tiny_run.run, scans, split="all")
    images = open_data(scans).parts["all"]
    predictor = crossvit.Predictor(tiny_run.run)
    predictions = predictor([images.path(index) for index in range(len(images))])
    right = [
        images.classes[label] == prediction.label
        for label, prediction in zip(images.labels, predictions, strict=True)
    ]
    assert np.mean(right) == result.top1
    for prediction in predictions:
        assert sum(label.probability for label in prediction.top) == pytest.approx(1.0)
        assert [label.probability for label in prediction.top] == sorted(
            (x.probability for x in prediction.top), reverse=True
        )


def test_every_kind_of_image_gives_the_same_prediction(
    tiny_run: TrainingResult, scans: Path
) -> None:
    path = next((scans / "0").iterdir())
    with Image.open(path) as image:
        image.load()
    predictor = crossvit.Predictor(tiny_run.run, top_k=2)
    kinds = predictor([path, str(path), path.read_bytes(), image, np.asarray(image)])
    for prediction in kinds:
        assert [label.label for label in prediction.top] == [label.label for label in kinds[0].top]
        assert prediction.top[0].probability == pytest.approx(
            kinds[0].top[0].probability, abs=1e-6
        )  # rows of one batch
    assert [prediction.label for prediction in predictor(iter([path, image]))] == [
        kinds[0].label
    ] * 2
    (alone,) = predictor(path)
    assert (alone.image, alone.label) == (str(path), kinds[0].label)
    assert len(kinds[0].top) == 2


def test_an_undecodable_image_is_a_result_with_an_error(
    tiny_run: TrainingResult, scans: Path
) -> None:
    good = next((scans / "0").iterdir())
    bad, fine = crossvit.Predictor(tiny_run.run)([b"not an image", good])
    assert (bad.label, bad.top) == (None, ())
    assert "not an image in a format read here" in str(bad.error)
    assert fine.error is None


def test_find_images_takes_files_folders_and_globs(scans: Path, tmp_path: Path) -> None:
    (tmp_path / "._hidden.png").write_bytes(b"what a Mac leaves beside a picture")
    assert len(find_images([str(scans)])) == 60
    assert len(find_images([str(scans / "0" / "*.png")])) == 20
    one = str(next((scans / "1").iterdir()))
    assert find_images([one]) == [one]
    assert find_images([one, "nowhere.png"]) == [
        one,
        "nowhere.png",
    ]  # to become a result with an error
    with pytest.raises(UsageError, match="no image at .*nowhere"):
        find_images([str(tmp_path / "nowhere.png")])
    with pytest.raises(UsageError, match="has no images"):
        find_images([str(tmp_path)])
