"""How good a run is: accuracy of the model and of each branch alone, per class, confusion and the surest mistakes."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossvit.data.images import Data, ImageSet
from crossvit.data.preprocess import Preprocessing
from crossvit.data.sources import open_data
from crossvit.errors import DataError, UsageError
from crossvit.results import BranchScore, ClassScore, Evaluation, Mistake
from crossvit.runtimes.choose import load_engine
from crossvit.trained import Trained, open_trained

BATCH_SIZE = 64
MISTAKES_KEPT = 24
CLASSES_NAMED = 20  # in a message; the rest are counted
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
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluation:
    """Evaluate a finished run on labelled images.

    data: `digits` or a folder. Of DATA with val/ or test/ that part is taken; of DATA with images the run held out, those;
    otherwise every image. `split` names a part instead (`train`, `val`, `test`, `all`,
    `held-out`). progress is called with (images done, images in all). Raises UsageError where classes differ from the
    run's, DataError for an image that cannot be decoded (unless `skip_bad`).
    """
    if batch_size < 1:
        raise UsageError(f"batch_size = {batch_size}: should be 1 or more")
    trained = open_trained(run)
    found = open_data(data)
    images, part = choose_part(found, trained, split)
    forward = load_engine(trained, engine=engine, device=device, precision=precision)
    logits, images = measure(forward, images, trained.preprocessing, batch_size=batch_size, skip_bad=skip_bad, progress=progress)
    patches = [branch.patch for branch in trained.config.branches]
    return summarise(logits, images, patches=patches, run=trained.source, data=str(data), split=part)


def choose_part(data: Data, trained: Trained, split: str | None) -> tuple[ImageSet, str]:
    """(images, name of the part) of DATA that `evaluate` takes, under the run's own class indices.

    Images that the run held out are known by name and size, wherever they lie now: where there are some, the others may
    have been trained on, so those are taken alone unless `split` says otherwise.
    """
    whole = data.parts.get("all") or data.parts.get("train")
    known = trained.record.get("data", {}).get("held_out", {})
    files = zip(whole.names, whole.file_sizes, strict=True) if whole is not None else ()
    held_out = [index for index, (name, size) in enumerate(files) if known.get(name) == size]
    if whole is not None and held_out and split in (None, "held-out"):
        images, part = whole.take(held_out), "held-out"
    elif split == "held-out":
        raise UsageError(f"{data.location} has none of the images that this run held out: leave out --split held-out")
    elif split is not None:
        images, part = data.part(split), split
    else:
        images = data.evaluation_part()
        part = next(name for name, candidate in data.parts.items() if candidate is images)
    return _relabelled(images, trained), part


def _relabelled(images: ImageSet, trained: Trained) -> ImageSet:
    """`images` under the model's own class indices; their classes may go by any name that the model's have."""
    positions = trained.positions()
    unknown = sorted(set(images.classes) - set(positions))
    if unknown:
        raise UsageError(
            f"{images.location} has classes the run was not trained on: {_listed(unknown)} (it knows {_listed(trained.classes)})"
        )
    labels = tuple(positions[images.classes[label]] for label in images.labels)
    return dataclasses.replace(images, classes=trained.classes, labels=labels)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - CLASSES_NAMED} more" if len(names) > CLASSES_NAMED else ""
    return ", ".join(names[:CLASSES_NAMED]) + more


def measure(
    forward: Forward,
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    batch_size: int = BATCH_SIZE,
    skip_bad: bool = False,
    kept: dict[int, NDArray[np.uint8]] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> tuple[NDArray[np.float32], ImageSet]:
    """(branch logits of every image, (branches, n, classes); the images that are in them), a batch at a time.

    kept: fitted pictures by index; read from and filled, so that a second call decodes nothing. Images that cannot be
    decoded are a DataError that counts them and names the first, or are left out with `skip_bad`.
    """
    pictures = {} if kept is None else kept
    logits: list[NDArray[np.float32]] = []
    bad: dict[int, DataError] = {}

    def fit(index: int) -> NDArray[np.uint8] | DataError:
        try:
            return pictures[index] if index in pictures else preprocessing.fit(images.read(index))
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(images), batch_size):
            indices = range(start, min(start + batch_size, len(images)))
            fitted = dict(zip(indices, pool.map(fit, indices), strict=True))
            bad |= {index: result for index, result in fitted.items() if isinstance(result, DataError)}
            good = {index: result for index, result in fitted.items() if not isinstance(result, DataError)}
            if good and (skip_bad or not bad):
                logits.append(forward(preprocessing.normalise(np.stack(list(good.values())))))
            if kept is not None:
                kept.update(good)
            progress(indices.stop, len(images))
    if bad and not skip_bad:
        raise DataError(
            f"{len(bad)} of {len(images)} images cannot be decoded: {next(iter(bad.values()))}; mend them or add --skip-bad"
        )
    if not logits:
        raise DataError(f"{images.location} has no image that can be decoded")
    return np.concatenate(logits, axis=1), images.take([index for index in range(len(images)) if index not in bad])


def summarise(
    branch_logits: NDArray[np.float32],
    images: ImageSet,
    *,
    patches: Sequence[int],
    run: str,
    data: str,
    split: str,
) -> Evaluation:
    """Metrics of branch logits (branches, n, classes) against the images' labels. See `Evaluation` for each one."""
    labels = np.asarray(images.labels)
    logits = branch_logits.mean(axis=0).astype(np.float64)  # (n, classes)
    log_probabilities = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    predicted = logits.argmax(axis=1)
    rank = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(axis=1)  # 0 where the true class is the surest
    confusion = np.zeros((len(images.classes), len(images.classes)), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    classes = _class_scores(confusion, images.classes)
    present = [score.f1 for score in classes if score.n]
    return Evaluation(
        top1=float((predicted == labels).mean()),
        n=len(labels),
        run=run,
        data=data,
        split=split,
        top5=float((rank < 5).mean()),
        macro_f1=float(np.mean(present)),
        loss=float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        branches=tuple(
            BranchScore(name, patch, float((own.argmax(axis=1) == labels).mean()))
            for name, patch, own in zip(branch_names(len(patches)), patches, branch_logits, strict=True)
        ),
        classes=classes,
        confusion=confusion,
        mistakes=_surest_mistakes(np.exp(log_probabilities), predicted, labels, images),
    )


def branch_names(count: int) -> list[str]:
    """S and L, the paper's names for its two branches; numbers otherwise."""
    return ["S", "L"] if count == 2 else [str(index) for index in range(count)]


def _class_scores(confusion: NDArray[np.int64], classes: Sequence[str]) -> tuple[ClassScore, ...]:
    right, true, guessed = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    precision = right / np.maximum(guessed, 1)
    recall = right / np.maximum(true, 1)
    f1 = 2 * right / np.maximum(true + guessed, 1)
    rows = zip(classes, true, precision, recall, f1, strict=True)
    return tuple(ClassScore(name, int(n), float(p), float(r), float(f)) for name, n, p, r, f in rows)


def _surest_mistakes(
    probabilities: NDArray[np.float64],
    predicted: NDArray[np.int64],
    labels: NDArray[np.int64],
    images: ImageSet,
) -> tuple[Mistake, ...]:
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:MISTAKES_KEPT]
    return tuple(
        Mistake(
            images.path(int(index)),
            images.classes[labels[index]],
            images.classes[predicted[index]],
            float(probabilities[index, predicted[index]]),
            _png(images.read(int(index))),
        )
        for index in surest
    )


def _png(image: Image.Image) -> bytes:
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
