"""Classifying new images: load once, call many times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crossvit.data.preprocess import SUFFIXES, ImageSource, Preprocessing
from crossvit.errors import CrossViTError, DataError, UsageError
from crossvit.results import Label, Prediction
from crossvit.run import Run
from crossvit.runtimes.torch import TorchEngine

BATCH_SIZE = 32


class Predictor:
    """A trained run, ready to classify. `predictor(images)` takes paths, bytes of files, Pillow images or uint8 arrays.

    The preprocessing is the run's own, the one its evaluation used. An image that cannot be decoded gives a `Prediction`
    with `error` set; the others are classified all the same. `top_k` classes are returned, the surest first.
    """

    def __init__(self, run: str | Path, *, top_k: int = 5, device: str = "auto", precision: str = "auto") -> None:
        if top_k < 1:
            raise UsageError(f"top_k = {top_k}: should be 1 or more")
        folder = Run(run)
        record = folder.finished_record()
        self.classes: tuple[str, ...] = tuple(record["classes"])
        self.preprocessing = Preprocessing.from_dict(record["preprocessing"])
        self.engine = TorchEngine.load(folder, device=device, precision=precision)
        self.top_k = min(top_k, len(self.classes))

    def __call__(self, images: Sequence[ImageSource] | ImageSource) -> list[Prediction]:
        """One Prediction an image, in the order given. A single image may come without a list around it."""
        if not isinstance(images, list | tuple):
            images = [images]  # type: ignore[list-item]
        return list(self.stream(images))

    def stream(self, images: Sequence[ImageSource]) -> Iterator[Prediction]:
        """As a call, a batch at a time, in constant memory."""
        remaining = iter(images)
        with ThreadPoolExecutor() as pool:
            while batch := list(islice(remaining, BATCH_SIZE)):
                prepared = list(pool.map(self._prepare, batch))
                decoded = [image for image in prepared if isinstance(image, np.ndarray)]
                answers = iter(self._classify(np.stack(decoded)) if decoded else ())
                for source, image in zip(batch, prepared, strict=True):
                    name = str(source) if isinstance(source, str | Path) else f"<{type(source).__name__}>"
                    if isinstance(image, CrossViTError):
                        yield Prediction(name, error=str(image))
                    else:
                        yield Prediction(name, next(answers))

    def _prepare(self, source: ImageSource) -> NDArray[np.float32] | DataError:
        try:
            return self.preprocessing(source)
        except DataError as error:
            return error

    def _classify(self, images: NDArray[np.float32]) -> list[tuple[Label, ...]]:
        logits = self.engine(images).mean(axis=0).astype(np.float64)  # (B, classes)
        probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        surest = np.argsort(-probabilities, axis=1, kind="stable")[:, : self.top_k]
        return [
            tuple(Label(self.classes[index], float(row[index])) for index in order)
            for row, order in zip(probabilities, surest, strict=True)
        ]


def find_images(paths: Sequence[str]) -> list[str]:
    """Files, folders (searched through) and globs as a list of image paths. UsageError for one that names nothing."""
    found: list[str] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            inside = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise UsageError(f"folder {given} has no images (read here: {' '.join(SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(str(path))
        else:
            found += _glob(given)
    return found


def _glob(pattern: str) -> list[str]:
    import glob

    matches = sorted(match for match in glob.glob(pattern, recursive=True) if Path(match).is_file())
    if not matches:
        raise UsageError(f"no image at {pattern}: give files, folders or a glob such as 'photos/*.jpg'")
    return matches
