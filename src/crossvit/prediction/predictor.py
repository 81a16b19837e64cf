"""Classifying new images: load once, call many times. Files of results are written by `batch_prediction.py`.

Shapes: B images of a batch, V views of each, C channels, H and W of the model's input.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossvit.data.preprocess import ImageSource, Picture, source_name
from crossvit.engines.select import load_engine
from crossvit.errors import DataError, UsageError, unknown_name
from crossvit.results import Label, Prediction
from crossvit.trained import MULTI_LABEL, open_trained

BATCH_SIZE = 32
READ_AHEAD = 2  # batches that are decoded while one is computed; memory grows with it, speed does not beyond two
THRESHOLD = 0.5  # of a multi-label model that has none of its own: more likely there than not


class View(NamedTuple):
    """One look at a picture: the central `share` of each of its sides, mirrored left to right or not."""

    share: float = 1.0
    mirrored: bool = False


_ZOOMED = (View(), View(0.9), View(0.8))  # shares by trial: dev/LOG.md
VIEWS = {
    "none": (View(),),
    "flip": (View(), View(mirrored=True)),
    "zoom": _ZOOMED,
    "flip-zoom": (*_ZOOMED, *(View(view.share, mirrored=True) for view in _ZOOMED)),
}


class Predictor:
    """A trained model, ready to classify. `predictor(images)` takes paths, bytes of files, Pillow images or uint8 arrays.

    run: a run folder, a weight file or a name on the hub. Preprocessing, temperature T and thresholds are the model's own, those
    of its evaluation: p = softmax(z / T) of the logits z, or 1 / (1 + exp(−z / T)) for each class of a multi-label model.

    top_k: classes in `Prediction.top`, the surest first. `Prediction.labels` is the answer: the surest class, or of a multi-label
    model every class at or above its threshold (0.5 where it has none).
    batch_size: images in one forward pass. workers: threads that decode, None for one a processor and four that wait for disks.
    tta: test-time augmentation, a name of VIEWS. z is then the mean of the views' logits, as the model's own is the mean of its
    branches': one rule for both, and T keeps its meaning. Mirrored views are wrong for classes that are mirror images of each
    other (letters, left and right hands); each view costs a forward pass.
    abstain_below: a single-label model whose surest class has a lower probability gives no answer: `abstained` is set, `labels`
    is empty and `top` says what it would have been.

    An image that cannot be decoded gives a `Prediction` with `error` set; the others are classified all the same. Any number of
    threads may call one Predictor: nothing in it changes, and their forward passes take turns.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        top_k: int = 5,
        batch_size: int = BATCH_SIZE,
        tta: str = "none",
        abstain_below: float | None = None,
        workers: int | None = None,
        engine: str = "torch",
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        for name, value in (("top_k", top_k), ("batch_size", batch_size), ("workers", workers)):
            if value is not None and value < 1:
                raise UsageError(f"{name} = {value}: should be 1 or more")
        if tta not in VIEWS:
            raise unknown_name("test-time augmentation", tta, VIEWS)
        if abstain_below is not None and not 0 < abstain_below <= 1:
            raise UsageError(
                f"abstain_below = {abstain_below}: should be a probability, above 0 and at most 1"
            )
        self.trained = open_trained(run)
        self.multi_label = self.trained.task == MULTI_LABEL
        if abstain_below is not None and self.multi_label:
            raise UsageError(
                f"{run} has several labels an image: its thresholds say which are given, so leave out abstain_below"
            )
        self.classes = self.trained.classes
        self.preprocessing = self.trained.preprocessing
        self.thresholds = np.asarray(
            self.trained.thresholds or (THRESHOLD,) * len(self.classes)
        )  # (classes,)
        self.engine = load_engine(self.trained, engine=engine, device=device, precision=precision)
        self.top_k = min(top_k, len(self.classes))
        self.batch_size = batch_size
        self.tta = tta
        self.abstain_below = abstain_below
        self.workers = workers
        self._turn = threading.Lock()

    def __call__(self, images: Iterable[ImageSource] | ImageSource) -> list[Prediction]:
        """One Prediction an image, in the order given. A single image may come without a list around it; an array (B, H, W, 3)
        is B of them."""
        if isinstance(images, str | Path | bytes | Image.Image) or (
            isinstance(images, np.ndarray) and images.ndim < 4
        ):
            images = [images]
        return list(self.stream(images))

    def stream(self, images: Iterable[ImageSource]) -> Iterator[Prediction]:
        """As a call, in constant memory: images are taken as they are needed."""
        return chain.from_iterable(self.batches(images))

    def batches(self, images: Iterable[ImageSource]) -> Iterator[list[Prediction]]:
        """The predictions of each `batch_size` images. The next batches are decoded while one is computed.

        What an image's logits are may depend on its batch in their last bits, so the batches follow from the order alone.
        """
        remaining = iter(images)
        waiting: deque[tuple[list[ImageSource], list[Future[NDArray[np.float32] | DataError]]]] = (
            deque()
        )
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            while True:
                while len(waiting) <= READ_AHEAD and (
                    sources := list(islice(remaining, self.batch_size))
                ):
                    waiting.append(
                        (sources, [pool.submit(self._prepare, source) for source in sources])
                    )
                if not waiting:
                    return
                sources, prepared = waiting.popleft()
                yield self._classify(sources, [image.result() for image in prepared])
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepare(self, source: ImageSource) -> NDArray[np.float32] | DataError:
        """An image as the engine takes it, (V, C, H, W)."""
        try:
            picture = self.preprocessing.read(source)
            views = VIEWS[self.tta]
            fitted = {
                view.share: self.preprocessing.fit(centre(picture, view.share)) for view in views
            }  # (H, W, C) each
            inputs = {
                share: self.preprocessing.normalise(pixels) for share, pixels in fitted.items()
            }  # (C, H, W) each
            return np.stack(
                [
                    inputs[view.share][..., ::-1] if view.mirrored else inputs[view.share]
                    for view in views
                ]
            )
        except DataError as error:
            return error
        except Exception as error:  # noqa: BLE001  # whatever one picture does, the others are classified
            return DataError(
                f"{source_name(source)}: cannot be prepared ({' '.join(str(error).split()) or type(error).__name__})"
            )

    def _classify(
        self, sources: Sequence[ImageSource], prepared: Sequence[NDArray[np.float32] | DataError]
    ) -> list[Prediction]:
        decoded = [image for image in prepared if not isinstance(image, DataError)]
        probabilities = iter(self._probabilities(np.stack(decoded, axis=1)) if decoded else ())
        names = map(source_name, sources)
        return [
            Prediction(name, error=str(image))
            if isinstance(image, DataError)
            else self._answer(name, next(probabilities))
            for name, image in zip(names, prepared, strict=True)
        ]

    def _probabilities(self, views: NDArray[np.float32]) -> NDArray[np.float64]:
        """(V, B, C, H, W) -> (B, classes)."""
        with self._turn:
            outputs = [self.engine(view) for view in views]
        fused = np.mean([output.logits for output in outputs], axis=0)  # (B, classes)
        logits: NDArray[np.float64] = fused.astype(np.float64) / self.trained.temperature
        with np.errstate(invalid="ignore"):  # `_answer` says what is not finite
            total = (
                np.logaddexp(0, logits)
                if self.multi_label
                else np.logaddexp.reduce(logits, axis=1, keepdims=True)
            )
            probabilities: NDArray[np.float64] = np.exp(logits - total)
        return probabilities

    def _answer(self, name: str, probabilities: NDArray[np.float64]) -> Prediction:
        if not np.isfinite(probabilities).all():
            return Prediction(
                name,
                error=f"{name}: the model's answer is not a finite number; its weights may be damaged",
            )
        order = np.argsort(-probabilities, kind="stable")
        top = tuple(
            Label(self.classes[index], float(probabilities[index])) for index in order[: self.top_k]
        )
        if self.multi_label:
            said = (index for index in order if probabilities[index] >= self.thresholds[index])
            return Prediction(
                name,
                top,
                labels=tuple(
                    Label(self.classes[index], float(probabilities[index])) for index in said
                ),
            )
        if self.abstain_below is not None and top[0].probability < self.abstain_below:
            return Prediction(name, top, abstained=True)
        return Prediction(name, top, labels=top[:1])


def centre(picture: Picture, share: float) -> Picture:
    """The central `share` of each side of a Pillow picture or an array (H, W, C), at least one pixel."""
    if isinstance(picture, Image.Image):
        left, right = _middle_of(picture.width, share)
        top, bottom = _middle_of(picture.height, share)
        return picture.crop((left, top, right, bottom)) if share < 1 else picture
    return picture[
        slice(*_middle_of(picture.shape[0], share)), slice(*_middle_of(picture.shape[1], share))
    ]


def _middle_of(side: int, share: float) -> tuple[int, int]:
    kept = max(1, round(share * side))
    return (side - kept) // 2, (side - kept) // 2 + kept
