"""Classification of new images: load once, call many times. `to_file.py` writes results to files.

Shapes: B images of a batch, V views of each, C channels, H x W pixels of the model's input.
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
READ_AHEAD = 2  # batches decoded ahead of the computation; more takes memory and gives no speed
THRESHOLD = 0.5  # for a multi-label model without thresholds: more likely present than not


class View(NamedTuple):
    """A view for test-time augmentation: the centre of a picture, perhaps mirrored left to right.

    Attributes:
        share: The part of each side that is kept, in (0, 1].
        mirrored: Whether left and right are exchanged.
    """

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
    """A trained model, ready to classify.

    Call it with images: paths, bytes of files, Pillow images or uint8 arrays. Probabilities are
    p = softmax(z / T) of the logits z, or 1 / (1 + exp(−z / T)) for each class of a multi-label
    model. Preprocessing, temperature T and thresholds are those of the model's evaluation.

    `Prediction.labels` is the answer: the most probable class, or every class of a multi-label
    model at or above its threshold (0.5 where it has none). An image that cannot be decoded gives
    a `Prediction` with `error` set; the others are classified all the same. Any number of threads
    may call one Predictor: it has no changing state, and forward passes take turns.
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
        """
        Args:
            run: A run folder, a weight file or a name on the hub.
            top_k: Number of classes in `Prediction.top`, the most probable first.
            batch_size: Images in a forward pass.
            tta: Test-time augmentation, a name in `VIEWS`. The logits are then the mean over the
                views, as the model's are the mean over its branches, so T keeps its meaning. Each
                view costs a forward pass. Mirrored views are wrong for classes that are mirror
                images of each other (letters, left and right hands).
            abstain_below: Probability in (0, 1] below which a single-label model gives no answer:
                `abstained` is set, `labels` is empty and `top` has what it would have been.
            workers: Decoding threads; None for one per processor and four that wait for disks.
            engine: Inference engine: torch, onnxruntime, openvino, or auto for the fastest here.
            device: auto, cpu, cuda or mps.
            precision: auto (fp32), fp32, bf16 or fp16.

        Raises:
            UsageError: For an argument outside its range, or a run that cannot be found.
        """
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
                f"{run} has several labels an image: its thresholds say which are given, "
                "so leave out abstain_below"
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
        self._forward_lock = threading.Lock()

    def __call__(self, images: Iterable[ImageSource] | ImageSource) -> list[Prediction]:
        """Classify images.

        Args:
            images: Images, or a single one; an array (B, H, W, 3) is B images.

        Returns:
            A Prediction per image, in their order.
        """
        if isinstance(images, str | Path | bytes | Image.Image) or (
            isinstance(images, np.ndarray) and images.ndim < 4
        ):
            images = [images]
        return list(self.stream(images))

    def stream(self, images: Iterable[ImageSource]) -> Iterator[Prediction]:
        """As a call, in constant memory: images are taken from the iterable as needed."""
        return chain.from_iterable(self.batches(images))

    def batches(self, images: Iterable[ImageSource]) -> Iterator[list[Prediction]]:
        """Yield the predictions of each `batch_size` images; later ones are decoded meanwhile.

        The last bits of an image's logits may depend on its batch, so batches follow from the
        order of the images alone.
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
        """The engine's input for an image, (V, C, H, W), or the error."""
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
        except Exception as error:  # noqa: BLE001  # the other images are classified all the same
            reason = " ".join(str(error).split()) or type(error).__name__
            return DataError(f"{source_name(source)}: cannot be prepared ({reason})")

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
        with self._forward_lock:
            outputs = [self.engine(view) for view in views]
        fused = np.mean([output.logits for output in outputs], axis=0)  # (B, classes)
        logits: NDArray[np.float64] = fused.astype(np.float64) / self.trained.temperature
        with np.errstate(invalid="ignore"):  # `_answer` reports what is not finite
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
                error=f"{name}: the model's answer is not a finite number; "
                "its weights may be damaged",
            )
        order = np.argsort(-probabilities, kind="stable")
        top = tuple(
            Label(self.classes[index], float(probabilities[index])) for index in order[: self.top_k]
        )
        if self.multi_label:
            positive = (index for index in order if probabilities[index] >= self.thresholds[index])
            return Prediction(
                name,
                top,
                labels=tuple(
                    Label(self.classes[index], float(probabilities[index])) for index in positive
                ),
            )
        if self.abstain_below is not None and top[0].probability < self.abstain_below:
            return Prediction(name, top, abstained=True)
        return Prediction(name, top, labels=top[:1])


def centre(picture: Picture, share: float) -> Picture:
    """The centre of a picture.

    Args:
        picture: A Pillow image or an array (H, W, C).
        share: The part of each side that is kept, in (0, 1]; at least one pixel.
    """
    if isinstance(picture, Image.Image):
        left, right = _middle_of(picture.width, share)
        top, bottom = _middle_of(picture.height, share)
        return picture.crop((left, top, right, bottom)) if share < 1 else picture
    return picture[
        slice(*_middle_of(picture.shape[0], share)), slice(*_middle_of(picture.shape[1], share))
    ]


def _middle_of(side: int, share: float) -> tuple[int, int]:
    length = max(1, round(share * side))
    return (side - length) // 2, (side - length) // 2 + length
