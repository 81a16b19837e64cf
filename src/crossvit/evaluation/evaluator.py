"""Evaluation of a trained model on labelled images: the engine's logits, and every metric of them.

The metrics are in `metrics`, `calibration` and `bootstrap`, corrupted pictures in `robustness`.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossvit.data.eval_batches import fitted_batches
from crossvit.data.images import BETWEEN_LABELS, HELD_OUT_PARTS, Data, ImageSet
from crossvit.data.preprocess import Preprocessing
from crossvit.data.sources import open_data
from crossvit.engines.protocol import Engine, EngineOutput
from crossvit.engines.select import load_engine
from crossvit.errors import CrossViTError, DataError, UsageError
from crossvit.evaluation import metrics
from crossvit.evaluation.bootstrap import multi_label_intervals, single_label_intervals
from crossvit.evaluation.calibration import calibration, fit_temperature, selective
from crossvit.evaluation.robustness import IMAGES as ROBUSTNESS_IMAGES
from crossvit.evaluation.robustness import measure_robustness, transforms
from crossvit.results import MULTI_LABEL, ClassScore, Evaluation, Mistake
from crossvit.run import Run
from crossvit.trained import Trained, open_trained

if TYPE_CHECKING:
    from crossvit.model.crossvit import CrossViT

BATCH_SIZE = 64
MISTAKES_SHOWN = 24  # the most confident ones
PICTURE_SIDE = 128  # pixels of a mistake's picture in the report


def evaluate(
    run: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    batch_size: int = BATCH_SIZE,
    engine: str = "torch",
    device: str = "auto",
    precision: str = "auto",
    skip_bad: bool = False,
    target_risk: float | None = None,
    calibrate: bool = False,
    corruptions: Sequence[str] = (),
    sizes: Sequence[int] = (),
    robustness_images: int = ROBUSTNESS_IMAGES,
    workers: int = 0,
    maps: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluation:
    """Evaluate a trained model on labelled images.

    Args:
        run: A run folder, a weight file or a name on the hub.
        data: As for training.
        split: Part of `data`: train, val, test, all or held-out. By default val or test where there
            is one, else the images that the run held out, else all.
        batch_size: Images in a forward pass.
        engine: torch, onnxruntime, openvino or auto.
        device: auto, cpu, cuda or mps.
        precision: auto (fp32), fp32 or bf16.
        skip_bad: Leave out images that cannot be decoded.
        target_risk: Share of wrong answers to stay below, 0 to 1, for the suggested confidence
            threshold; None for half of the error rate.
        calibrate: Store the temperature that fits these images in the run, and measure with it.
        corruptions: Names of `robustness.CORRUPTIONS`, each at five severities.
        sizes: Shorter sides in pixels to scale pictures down to.
        robustness_images: Number of images for `corruptions` and `sizes`.
        workers: Processes that corrupt pictures; 0 for this one.
        maps: Show what each of the most confident mistakes was read from (`Mistake.map`).
        progress: Called with (images done, images in all).

    Raises:
        UsageError: For classes that the model does not have, and for a wrong call.
        DataError: For an image that cannot be decoded (unless `skip_bad`).
        RunError: Where the temperature cannot be written.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size = {batch_size}: should be 1 or more")
    if target_risk is not None and not 0 <= target_risk <= 1:
        raise UsageError(f"target_risk = {target_risk:g}: should be a share of the answers, 0 to 1")
    if robustness_images < 1:
        raise UsageError(f"robustness_images = {robustness_images}: should be 1 or more")
    trained = open_trained(run)
    requested = transforms(corruptions, sizes, channels=trained.preprocessing.channels)
    opened = open_data(data)
    images, part = trained.select(opened, split)
    if calibrate:
        refuse_uncalibratable(trained, opened, images, part)
    model = trained.build() if maps else None
    loaded = load_engine(trained, engine=engine, device=device, precision=precision, model=model)
    total = len(images) + (len(requested) + 1) * min(len(images), robustness_images) * bool(
        requested
    )
    started = time.perf_counter()
    output, images = measure(
        loaded,
        images,
        trained.preprocessing,
        batch_size=batch_size,
        skip_bad=skip_bad,
        progress=lambda done, _: progress(done, total),
    )
    fused = output.logits.astype(np.float64)
    temperature = fitted_temperature(fused, images) if calibrate else trained.temperature
    evaluation = dataclasses.replace(
        summarise(
            output,
            images,
            patches=[branch.patch for branch in trained.config.branches],
            run=trained.source,
            data=str(data),
            split=part,
            temperature=temperature,
            thresholds=trained.thresholds,
            thorough=True,
            target_risk=target_risk,
        ),
        seconds=time.perf_counter() - started,
        precision=loaded.precision,
        engine=loaded.name,
    )
    if calibrate:
        Run(run).amend(temperature=temperature)
        assert evaluation.calibration is not None
        before = calibration(fused, images.targets(), temperature=trained.temperature)
        evaluation = dataclasses.replace(
            evaluation, calibration=dataclasses.replace(evaluation.calibration, replaced=before)
        )
    if requested:
        measured = measure_robustness(
            loaded,
            images,
            trained.preprocessing,
            requested,
            sample=robustness_images,
            batch_size=batch_size,
            workers=workers,
            progress=lambda done, all_done: progress(total - all_done + done, total),
        )
        evaluation = dataclasses.replace(evaluation, robustness=measured)
    return with_pictures(evaluation, images, trained.preprocessing, model=model)


def with_pictures(
    evaluation: Evaluation,
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    model: CrossViT | None = None,
) -> Evaluation:
    """Add a small picture of each of the most confident mistakes, decoded once more.

    Args:
        evaluation: What was measured.
        images: The images that it was measured on.
        preprocessing: The model's.
        model: Adds its relevance map of each picture (`Mistake.map`).
    """
    index_of = {images.path(index): index for index in range(len(images))}
    indices = [index_of[mistake.image] for mistake in evaluation.mistakes]
    pictures = [images.read(index) for index in indices]
    maps = [b""] * len(indices)
    if model is not None:
        from crossvit.explanation.explainer import mistake_maps  # imports torch

        seen = (  # of other channels than RGB, a decoding of its own
            pictures
            if preprocessing.channels == 0
            else [images.picture(index, preprocessing) for index in indices]
        )
        fitted = [preprocessing.fit(picture) for picture in seen]
        maps = mistake_maps(model, preprocessing, pictures, fitted=fitted)
    mistakes = (
        dataclasses.replace(mistake, picture=_png(picture), map=overlaid)
        for mistake, picture, overlaid in zip(evaluation.mistakes, pictures, maps, strict=True)
    )
    return dataclasses.replace(evaluation, mistakes=tuple(mistakes))


def refuse_uncalibratable(trained: Trained, data: Data, images: ImageSet, part: str) -> None:
    """Refuse to calibrate where the temperature cannot be stored, or on training images.

    A model is too confident on images that it was trained on.

    Raises:
        UsageError: With the fix.
    """
    if trained.record is None:
        raise UsageError(
            f"{trained.source} is not a run, so no temperature can be stored in it: "
            "leave out --calibrate"
        )
    if trained.task == MULTI_LABEL:
        raise UsageError(
            f"{trained.source} gives several classes an image, and a temperature is of one: "
            "leave out --calibrate"
        )
    recorded = trained.record.data
    if part == "held-out" or (data.fingerprint == recorded.fingerprint and part in HELD_OUT_PARTS):
        return
    fix = f"give {recorded.location} itself, or images that are new to it"
    if part == "train":
        raise UsageError(
            f"{images.location} may have been trained on, and --calibrate needs images that "
            f"were not: {fix}"
        )
    try:
        source = open_data(recorded.location)
    except CrossViTError as error:
        raise UsageError(
            f"--calibrate needs images that {trained.source} was not trained on, and those it was "
            f"trained on are not to be found ({error})"
        ) from error
    train = source.parts.get("train") or source.part("all")
    trained_on = set(zip(train.names, train.file_sizes, strict=True))
    trained_on -= set(recorded.held_out.items())
    files = zip(images.names, images.file_sizes, strict=True)
    count = sum(file in trained_on for file in files)
    if count:
        raise UsageError(
            f"{count:,} of the {len(images):,} images of {images.location} were trained on, "
            f"and --calibrate needs images that were not: {fix}"
        )


def fitted_temperature(fused: NDArray[np.float64], images: ImageSet) -> float:
    """The temperature that fits; DataError where none does."""
    labels = images.targets()
    if metrics.topk_correct(fused, labels).all():
        raise DataError(
            f"all {len(images):,} images of {images.location} are predicted correctly, "
            "so no temperature is the best: calibrate with more images"
        )
    return fit_temperature(fused, labels)


def measure(
    engine: Engine,
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    batch_size: int = BATCH_SIZE,
    skip_bad: bool = False,
    kept: dict[int, NDArray[Any]] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> tuple[EngineOutput, ImageSet]:
    """What an engine gives of images, a batch at a time.

    Args:
        engine: What computes.
        images: The images.
        preprocessing: The model's.
        batch_size: Images in a forward pass.
        skip_bad: Leave out images that cannot be decoded.
        kept: Fitted pictures by index, to read from and to fill; see `fitted_batches`.
        progress: Called with (images done, images in all).

    Returns:
        (output, the n images that it is of).
    """
    outputs: list[EngineOutput] = []
    decoded: list[int] = []
    for indices, pixels in fitted_batches(
        images,
        preprocessing,
        batch_size=batch_size,
        skip_bad=skip_bad,
        kept=kept,
        progress=progress,
    ):
        outputs.append(engine(preprocessing.normalise(pixels)))
        decoded += indices
    return EngineOutput.join(outputs), images.take(decoded)


def summarise(
    output: EngineOutput,
    images: ImageSet,
    *,
    patches: Sequence[int],
    run: str,
    data: str,
    split: str,
    temperature: float = 1.0,
    thresholds: Sequence[float] = (),
    thorough: bool = False,
    target_risk: float | None = None,
) -> Evaluation:
    """The metrics of logits against the labels; see `Evaluation` for each one.

    The prediction is the class with the highest logit; `temperature` changes its confidence and
    never the class.

    Args:
        output: What an engine gave of the images.
        images: The n images.
        patches: Patch size of each branch in pixels.
        run: What was evaluated, for the record.
        data: What it was evaluated on, for the record.
        split: The part of it, for the record.
        temperature: What the logits are divided by.
        thresholds: Decision threshold of each class of a multi-label model.
        thorough: With intervals, calibration and risk against coverage, which take seconds.
        target_risk: See `evaluate`.
    """
    truth = images.targets()
    fused = output.logits.astype(np.float64)  # (n, classes)
    shared: dict[str, Any] = {
        "top1": float(metrics.topk_correct(fused, truth).mean()),
        "n": len(images),
        "run": run,
        "data": data,
        "split": split,
        "top5": float(metrics.topk_correct(fused, truth, k=5).mean()),
        "branches": metrics.branch_scores(output.branch_logits, truth, patches),
        "images": images.names,
    }
    if images.task != MULTI_LABEL:
        specific = _single_label(
            fused,
            truth,
            images,
            temperature=temperature,
            thorough=thorough,
            target_risk=target_risk,
        )
    else:
        specific = _multi_label(
            fused, truth, images, temperature=temperature, thresholds=thresholds, thorough=thorough
        )
    return Evaluation(**shared, **specific)


def _single_label(
    fused: NDArray[np.float64],
    labels: NDArray[np.int64],
    images: ImageSet,
    *,
    temperature: float,
    thorough: bool,
    target_risk: float | None,
) -> dict[str, Any]:
    """The fields of `Evaluation` that are particular to single-label images."""
    predicted = fused.argmax(axis=1)
    correct = predicted == labels
    confidences = metrics.confidence(fused, temperature)
    confusion = metrics.confusion_matrix(labels, predicted, len(images.classes))
    names = images.classes
    fields = {
        "macro_f1": metrics.macro_f1(*metrics.class_counts(confusion)),
        "loss": metrics.cross_entropy(fused, labels, temperature=temperature),
        "classes": metrics.class_scores(confusion, names),
        "confusion": confusion,
        "mistakes": _confident_mistakes(
            confidences, correct, images, lambda i: (names[labels[i]], names[predicted[i]])
        ),
        "correct": tuple(correct.tolist()),
    }
    if thorough:
        fields |= {
            "intervals": single_label_intervals(
                labels, predicted, metrics.topk_correct(fused, labels, k=5)
            ),
            "calibration": calibration(fused, labels, temperature=temperature),
            "selective": selective(confidences, correct, target_risk=target_risk),
        }
    return fields


def _multi_label(
    fused: NDArray[np.float64],
    targets: NDArray[np.integer[Any]],
    images: ImageSet,
    *,
    temperature: float,
    thresholds: Sequence[float],
    thorough: bool,
) -> dict[str, Any]:
    """The fields of `Evaluation` that are particular to multi-label images."""
    names = images.classes
    limits = np.array(thresholds or (metrics.THRESHOLD,) * len(names))
    probabilities = metrics.probabilities(fused, task=MULTI_LABEL, temperature=temperature)
    predicted, positive = probabilities >= limits, targets > 0
    scores = metrics.multi_label_scores(probabilities, targets, limits, names)
    wrong = predicted != positive
    correct = ~wrong.any(axis=1)
    confidences = np.where(predicted, probabilities, 1 - probabilities)  # of each decision
    most_confident = np.where(wrong, confidences, 0.0).max(axis=1)

    def labels_of(i: int) -> tuple[str, str]:
        answer = BETWEEN_LABELS.join(names[c] for c in np.flatnonzero(predicted[i]))
        return images.said(i) or "none", answer or "none"

    fields = {
        "task": MULTI_LABEL,
        "macro_f1": float(np.mean([score.f1 for score in scores.classes if score.n] or [0.0])),
        "loss": metrics.binary_cross_entropy(fused, targets, temperature=temperature),
        "classes": tuple(
            ClassScore(score.label, score.n, score.precision, score.recall, score.f1)
            for score in scores.classes
        ),
        "confusion": np.zeros((0, 0), dtype=np.int64),
        "mistakes": _confident_mistakes(most_confident, correct, images, labels_of),
        "correct": tuple(correct.tolist()),
        "multi_label": scores,
    }
    if thorough:
        fields["intervals"] = multi_label_intervals(probabilities, targets, limits)
    return fields


def _confident_mistakes(
    confidences: NDArray[np.float64],
    correct: NDArray[np.bool_],
    images: ImageSet,
    labels_of: Callable[[int], tuple[str, str]],
) -> tuple[Mistake, ...]:
    """The wrong predictions with the highest confidence. labels_of: index -> (true, predicted)."""
    wrong = np.flatnonzero(~correct)
    first = wrong[np.argsort(-confidences[wrong], kind="stable")][:MISTAKES_SHOWN].tolist()
    return tuple(Mistake(images.path(i), *labels_of(i), float(confidences[i])) for i in first)


def _png(image: Image.Image) -> bytes:
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
