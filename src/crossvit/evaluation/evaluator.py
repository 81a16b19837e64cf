"""How good a trained model is on labelled images: the pictures through the engine, and every figure of what comes out.

The figures themselves are in `metrics`, `calibration` and `bootstrap`, what is done to pictures in `robustness`.
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
from crossvit.engines.select import load_engine
from crossvit.errors import CrossViTError, DataError, UsageError
from crossvit.evaluation import metrics
from crossvit.evaluation.bootstrap import multi_label_intervals, single_label_intervals
from crossvit.evaluation.calibration import calibration, fit_temperature, selective
from crossvit.evaluation.robustness import IMAGES as ROBUSTNESS_IMAGES
from crossvit.evaluation.robustness import measure_robustness, spoilings
from crossvit.results import MULTI_LABEL, ClassScore, Evaluation, Mistake
from crossvit.run import Run
from crossvit.trained import Trained, open_trained

if TYPE_CHECKING:
    from crossvit.model.crossvit import CrossViT

BATCH_SIZE = 64
MISTAKES_KEPT = 24
PICTURE_SIDE = 128  # pixels of a mistake's picture in the report

Forward = Callable[[NDArray[np.float32]], NDArray[np.float32]]


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

    run: a run folder, a weight file or a name on the hub.
    data: as for training. Of DATA with val/ or test/ that part is taken; of DATA with images the run held out, those; otherwise
    every image. `split` names a part instead (`train`, `val`, `test`, `all`, `held-out`).
    target_risk: the share of answers that may be wrong, for the suggested threshold; None is half the error of always answering.
    calibrate: store the temperature that fits these images in the run, whose logits are divided by it from then on; the figures
    returned are with it.
    corruptions: names of `robustness.CORRUPTIONS`, each at five severities; sizes: shorter sides in pixels. Both are measured on
    `robustness_images` of the images, their pictures spoilt in `workers` processes (0: in this one).
    maps: show what each of the surest mistakes was read from (`Mistake.map`).
    progress: called with (images done, images in all).

    Raises UsageError where classes differ from the model's or what was asked cannot be, DataError for an image that cannot be
    decoded (unless `skip_bad`), RunError where the temperature cannot be written.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size = {batch_size}: should be 1 or more")
    if target_risk is not None and not 0 <= target_risk <= 1:
        raise UsageError(f"target_risk = {target_risk:g}: should be a share of the answers, 0 to 1")
    if robustness_images < 1:
        raise UsageError(f"robustness_images = {robustness_images}: should be 1 or more")
    trained = open_trained(run)
    asked = spoilings(corruptions, sizes, channels=trained.preprocessing.channels)
    found = open_data(data)
    images, part = trained.select(found, split)
    if calibrate:
        refuse_uncalibratable(trained, found, images, part)
    model = trained.build() if maps else None
    forward = load_engine(trained, engine=engine, device=device, precision=precision, model=model)
    total = len(images) + (len(asked) + 1) * min(len(images), robustness_images) * bool(asked)
    started = time.perf_counter()
    logits, images = measure(
        forward,
        images,
        trained.preprocessing,
        batch_size=batch_size,
        skip_bad=skip_bad,
        progress=lambda done, _: progress(done, total),
    )
    fused = logits.mean(axis=0).astype(np.float64)
    temperature = fitted_temperature(fused, images) if calibrate else trained.temperature
    evaluation = dataclasses.replace(
        summarise(
            logits,
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
        precision=forward.precision,
        engine=forward.name,
    )
    if calibrate:
        Run(run).amend(temperature=temperature)
        assert evaluation.calibration is not None
        before = calibration(fused, images.targets(), temperature=trained.temperature)
        evaluation = dataclasses.replace(
            evaluation, calibration=dataclasses.replace(evaluation.calibration, replaced=before)
        )
    if asked:
        measured = measure_robustness(
            forward,
            images,
            trained.preprocessing,
            asked,
            sample=robustness_images,
            batch_size=batch_size,
            workers=workers,
            progress=lambda done, own: progress(total - own + done, total),
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
    """Add a small picture of each of the most confident mistakes, for which it is decoded once more.

    Args:
        evaluation: What was measured.
        images: The images that it was measured on.
        preprocessing: The model's.
        model: Lays what this model read its answer from over the picture, too (`Mistake.map`).
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
    """UsageError unless a temperature can be stored, and `images`, the `part` of `data`, are known not to have been trained on:
    on those a model is surer than it should be."""
    if trained.record is None:
        raise UsageError(
            f"{trained.source} is not a run, so no temperature can be stored in it: leave out --calibrate"
        )
    if trained.task == MULTI_LABEL:
        raise UsageError(
            f"{trained.source} gives several classes an image, and a temperature is of one: leave out --calibrate"
        )
    recorded = trained.record.data
    if part == "held-out" or (data.fingerprint == recorded.fingerprint and part in HELD_OUT_PARTS):
        return
    fix = f"give {recorded.location} itself, or images that are new to it"
    if part == "train":
        raise UsageError(
            f"{images.location} may have been trained on, and --calibrate needs images that were not: {fix}"
        )
    try:
        source = open_data(recorded.location)
    except CrossViTError as error:
        raise UsageError(
            f"--calibrate needs images that {trained.source} was not trained on, and those it was trained on are not to be "
            f"found ({error})"
        ) from error
    learnt = source.parts.get("train") or source.part("all")
    known = set(zip(learnt.names, learnt.file_sizes, strict=True)) - set(recorded.held_out.items())
    seen = sum(own in known for own in zip(images.names, images.file_sizes, strict=True))
    if seen:
        raise UsageError(
            f"{seen:,} of the {len(images):,} images of {images.location} were trained on, and --calibrate needs images that "
            f"were not: {fix}"
        )


def fitted_temperature(fused: NDArray[np.float64], images: ImageSet) -> float:
    """The temperature that fits. DataError where none does."""
    labels = images.targets()
    if metrics.hits(fused, labels).all():
        raise DataError(
            f"all {len(images):,} images of {images.location} are answered right, so the surer the better, and no temperature "
            "fits: calibrate with more images"
        )
    return fit_temperature(fused, labels)


def measure(
    forward: Forward,
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    batch_size: int = BATCH_SIZE,
    skip_bad: bool = False,
    kept: dict[int, NDArray[Any]] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> tuple[NDArray[np.float32], ImageSet]:
    """(branch logits of every image, (branches, n, classes); the images that are in them), a batch at a time.

    kept, and images that cannot be decoded: as `fitted_batches` has them.
    """
    logits: list[NDArray[np.float32]] = []
    taken: list[int] = []
    for indices, pixels in fitted_batches(
        images,
        preprocessing,
        batch_size=batch_size,
        skip_bad=skip_bad,
        kept=kept,
        progress=progress,
    ):
        logits.append(forward(preprocessing.normalise(pixels)))
        taken += indices
    return np.concatenate(logits, axis=1), images.take(taken)


def summarise(
    branch_logits: NDArray[np.float32],
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
    """Figures of branch logits (branches, n, classes) against what the images show. See `Evaluation` for each one.

    The answer is the class with the highest mean of the branches' logits; `temperature` changes how sure it is and never which.
    thorough: with intervals, calibration and risk against coverage, which take seconds on many images.
    """
    truth = images.targets()
    fused = branch_logits.mean(axis=0).astype(np.float64)  # (n, classes)
    shared: dict[str, Any] = {
        "top1": float(metrics.hits(fused, truth).mean()),
        "n": len(images),
        "run": run,
        "data": data,
        "split": split,
        "top5": float(metrics.hits(fused, truth, k=5).mean()),
        "branches": metrics.branch_scores(branch_logits, truth, patches),
        "images": images.names,
    }
    if images.task != MULTI_LABEL:
        own = _single_label(
            fused,
            truth,
            images,
            temperature=temperature,
            thorough=thorough,
            target_risk=target_risk,
        )
    else:
        own = _multi_label(
            fused, truth, images, temperature=temperature, thresholds=thresholds, thorough=thorough
        )
    return Evaluation(**shared, **own)


def _single_label(
    fused: NDArray[np.float64],
    labels: NDArray[np.int64],
    images: ImageSet,
    *,
    temperature: float,
    thorough: bool,
    target_risk: float | None,
) -> dict[str, Any]:
    """The fields of `Evaluation` that differ where an image shows one class."""
    answers = fused.argmax(axis=1)
    correct = answers == labels
    sure = metrics.confidence(fused, temperature)
    confusion = metrics.confusion_matrix(labels, answers, len(images.classes))
    right, true, guessed = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    names = images.classes
    found = {
        "macro_f1": metrics.macro_f1(right, true, guessed),
        "loss": metrics.cross_entropy(fused, labels, temperature=temperature),
        "classes": metrics.class_scores(confusion, names),
        "confusion": confusion,
        "mistakes": _surest_mistakes(
            sure, correct, images, lambda i: (names[labels[i]], names[answers[i]])
        ),
        "correct": tuple(correct.tolist()),
    }
    if thorough:
        found |= {
            "intervals": single_label_intervals(labels, answers, metrics.hits(fused, labels, k=5)),
            "calibration": calibration(fused, labels, temperature=temperature),
            "selective": selective(sure, correct, target_risk=target_risk),
        }
    return found


def _multi_label(
    fused: NDArray[np.float64],
    targets: NDArray[np.integer[Any]],
    images: ImageSet,
    *,
    temperature: float,
    thresholds: Sequence[float],
    thorough: bool,
) -> dict[str, Any]:
    """The fields of `Evaluation` that differ where an image shows any number of classes."""
    names = images.classes
    limits = np.array(thresholds or (metrics.THRESHOLD,) * len(names))
    sure = metrics.probabilities(fused, task=MULTI_LABEL, temperature=temperature)
    said, shown = sure >= limits, targets > 0
    scores = metrics.multi_label_scores(sure, targets, limits, names)
    correct = (said == shown).all(axis=1)
    surest_wrong = np.where(said == shown, 0.0, np.where(said, sure, 1 - sure)).max(axis=1)

    def named(i: int) -> tuple[str, str]:
        return images.said(i) or "none", BETWEEN_LABELS.join(
            names[c] for c in np.flatnonzero(said[i])
        ) or "none"

    found = {
        "task": MULTI_LABEL,
        "macro_f1": float(np.mean([score.f1 for score in scores.classes if score.n] or [0.0])),
        "loss": metrics.binary_cross_entropy(fused, targets, temperature=temperature),
        "classes": tuple(
            ClassScore(one.label, one.n, one.precision, one.recall, one.f1)
            for one in scores.classes
        ),
        "confusion": np.zeros((0, 0), dtype=np.int64),
        "mistakes": _surest_mistakes(surest_wrong, correct, images, named),
        "correct": tuple(correct.tolist()),
        "multi_label": scores,
    }
    if thorough:
        found["intervals"] = multi_label_intervals(sure, targets, limits)
    return found


def _surest_mistakes(
    sure: NDArray[np.float64],
    correct: NDArray[np.bool_],
    images: ImageSet,
    named: Callable[[int], tuple[str, str]],
) -> tuple[Mistake, ...]:
    """The wrong answers the model was surest of. named: of an image, what it shows and what was said."""
    wrong = np.flatnonzero(~correct)
    surest = wrong[np.argsort(-sure[wrong], kind="stable")][:MISTAKES_KEPT].tolist()
    return tuple(Mistake(images.path(i), *named(i), float(sure[i])) for i in surest)


def _png(image: Image.Image) -> bytes:
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
