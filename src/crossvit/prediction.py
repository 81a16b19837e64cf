"""Classifying new images: load once, call many times."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossvit.data.preprocess import SUFFIXES, ImageSource, source_name
from crossvit.data.sources import is_image_file
from crossvit.errors import CrossViTError, DataError, UsageError
from crossvit.results import Label, Prediction
from crossvit.runtimes.choose import load_engine
from crossvit.trained import open_trained

BATCH_SIZE = 32


class Predictor:
    """A trained run, ready to classify. `predictor(images)` takes paths, bytes of files, Pillow images or uint8 arrays.

    The preprocessing is the run's own, the one its evaluation used. An image that cannot be decoded gives a `Prediction`
    with `error` set; the others are classified all the same. `top_k` classes are returned, the surest first.
    """

    def __init__(
        self, run: str | Path, *, top_k: int = 5, engine: str = "torch", device: str = "auto", precision: str = "auto"
    ) -> None:
        if top_k < 1:
            raise UsageError(f"top_k = {top_k}: should be 1 or more")
        self.trained = open_trained(run)
        self.classes = self.trained.classes
        self.preprocessing = self.trained.preprocessing
        self.engine = load_engine(self.trained, engine=engine, device=device, precision=precision)
        self.top_k = min(top_k, len(self.classes))

    def __call__(self, images: Iterable[ImageSource] | ImageSource) -> list[Prediction]:
        """One Prediction an image, in the order given. A single image may come without a list around it."""
        if isinstance(images, str | Path | bytes | Image.Image | np.ndarray):
            images = [images]
        return list(self.stream(images))

    def stream(self, images: Iterable[ImageSource]) -> Iterator[Prediction]:
        """As a call, a batch at a time, in constant memory."""
        remaining = iter(images)
        with ThreadPoolExecutor() as pool:
            while batch := list(islice(remaining, BATCH_SIZE)):
                prepared = list(pool.map(self._prepare, batch))
                decoded = [image for image in prepared if isinstance(image, np.ndarray)]
                answers = iter(self._classify(np.stack(decoded)) if decoded else ())
                for source, image in zip(batch, prepared, strict=True):
                    if isinstance(image, CrossViTError):
                        yield Prediction(source_name(source), error=str(image))
                    else:
                        yield Prediction(source_name(source), next(answers))

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
    """Files, folders (searched through) and globs as a list of image paths. A file that is not there stays in the list, to
    become a result with an error, unless nothing at all is there: then, and for an empty folder or glob, UsageError."""
    found: list[str] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            inside = sorted(str(file) for file in path.rglob("*") if is_image_file(file))
            if not inside:
                raise UsageError(f"folder {given} has no images (read here: {' '.join(SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(str(path))
        elif glob.has_magic(given):
            found += _glob(given)
        else:
            found.append(given)
    if not any(Path(path).exists() for path in found):
        raise UsageError(f"no image at {', '.join(paths)}: give files, folders or a glob such as 'photos/*.jpg'")
    return found


def _glob(pattern: str) -> list[str]:
    matches = sorted(match for match in glob.glob(pattern, recursive=True) if Path(match).is_file())
    if not matches:
        raise UsageError(f"no image at {pattern}: give files, folders or a glob such as 'photos/*.jpg'")
    return matches
