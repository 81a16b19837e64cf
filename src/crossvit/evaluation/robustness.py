"""Robustness: accuracy under common corruptions at five severities, and at low resolution.

The corruptions are those of Hendrycks and Dietterich (Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations, ICLR 2019) as the package `imagecorruptions-imaug` has them
for pictures of any size. Pictures are corrupted after decoding, before the preprocessing, each with
a seed from its name, so that results depend neither on order nor on processes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossvit.data.images import ImageSet
from crossvit.data.preprocess import Preprocessing
from crossvit.engines.protocol import Engine
from crossvit.errors import UsageError, unknown_name
from crossvit.evaluation.metrics import topk_correct
from crossvit.results import CorruptionScore, Robustness, SizeScore

CORRUPTIONS = (  # the paper's fifteen, in its order: noise, blur, weather, digital
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
SEVERITIES = (1, 2, 3, 4, 5)
LARGEST_SIDE = 256  # shorter side, in pixels, that the published severities are for
SMALLEST_SIDE = 32  # shorter side, in pixels, that the package takes at least
COLOURS = (0, 1, 3, 4)  # channels (0: as RGB) that an 8-bit colour picture can become
IMAGES = 1000  # measured by default: accuracy to about 3 %; 75 corruptions of them take minutes


class Transform(Protocol):
    """Makes a picture worse before the preprocessing. It is pickled for other processes."""

    def __call__(self, picture: Image.Image, *, seed: int) -> Image.Image: ...


@dataclasses.dataclass(frozen=True)
class Corruption:
    """One of CORRUPTIONS at one of SEVERITIES. The same seed gives the same picture."""

    name: str
    severity: int

    def __call__(self, picture: Image.Image, *, seed: int) -> Image.Image:
        from imagecorruptions import corrupt

        shorter = min(picture.size)
        picture = _scaled(picture, min(max(shorter, SMALLEST_SIDE), LARGEST_SIDE) / shorter)
        # the others draw from NumPy's global generator
        seeded = {"seed": seed} if self.name in ("glass_blur", "impulse_noise") else {}
        before = np.random.get_state()
        np.random.seed(seed)
        try:
            return Image.fromarray(
                corrupt(
                    np.asarray(picture), severity=self.severity, corruption_name=self.name, **seeded
                )
            )
        finally:
            np.random.set_state(before)


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """Scales down to a shorter side of `pixels`, bicubic; a smaller picture stays as it is."""

    pixels: int

    def __call__(self, picture: Image.Image, *, seed: int) -> Image.Image:  # noqa: ARG002  # of every Transform
        return _scaled(picture, min(1.0, self.pixels / min(picture.size)))


def _scaled(picture: Image.Image, factor: float) -> Image.Image:
    if factor == 1.0:
        return picture
    width, height = (max(1, round(factor * side)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def transforms(
    corruptions: Sequence[str], sizes: Sequence[int], *, channels: int = 0
) -> tuple[Transform, ...]:
    """Every corruption at every severity, then every size from the largest.

    Args:
        corruptions: Names, of CORRUPTIONS.
        sizes: Shorter sides in pixels.
        channels: Of the model's `Preprocessing`.

    Raises:
        UsageError: For an unknown name, a size below 1, a missing package, and channels that no
            colour picture has.
    """
    if (corruptions or sizes) and channels not in COLOURS:
        raise UsageError(
            f"pictures of {channels} channels cannot be corrupted: "
            "leave out --corruptions and --sizes"
        )
    for name in corruptions:
        if name not in CORRUPTIONS:
            raise unknown_name("corruption", name, CORRUPTIONS)
    for pixels in sizes:
        if pixels < 1:
            raise UsageError(
                f"sizes has {pixels}: each should be a shorter side of 1 pixel or more"
            )
    if corruptions and importlib.util.find_spec("imagecorruptions") is None:
        raise UsageError(
            "corruptions need a package that is not installed: pip install 'crossvit[robustness]'"
        )
    each = (
        Corruption(name, severity) for name in dict.fromkeys(corruptions) for severity in SEVERITIES
    )
    return (*each, *(Shrunk(pixels) for pixels in sorted(set(sizes), reverse=True)))


def measure_robustness(
    engine: Engine,
    images: ImageSet,
    preprocessing: Preprocessing,
    requested: Sequence[Transform],
    *,
    sample: int = IMAGES,
    batch_size: int = 64,
    workers: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Robustness:
    """Accuracy on clean images, and on the same images after each transform.

    Args:
        engine: What computes.
        images: Labelled images.
        preprocessing: The model's.
        requested: What `transforms` gives.
        sample: Number of images to measure, spread evenly over `images`.
        batch_size: Images in a forward pass.
        workers: Processes that corrupt pictures; 0 for this one.
        progress: Called with (pictures done, pictures in all).
    """
    chosen = images.take(
        np.unique(
            np.linspace(0, len(images) - 1, min(sample, len(images))).round().astype(int)
        ).tolist()
    )
    truth = chosen.targets()
    total = len(chosen) * (len(requested) + 1)
    accuracy: dict[Transform | None, float] = {}
    with _fitting(chosen, preprocessing, workers) as fit:
        for transform in (None, *requested):
            n_correct = 0
            for start in range(0, len(chosen), batch_size):
                indices = range(start, min(start + batch_size, len(chosen)))
                pixels = np.stack(list(fit(transform, indices)))
                output = engine(preprocessing.normalise(pixels))
                n_correct += int(topk_correct(output.logits, truth[start : indices.stop]).sum())
                progress(len(accuracy) * len(chosen) + indices.stop, total)
            accuracy[transform] = n_correct / len(chosen)
    names = dict.fromkeys(item.name for item in requested if isinstance(item, Corruption))
    corruptions = tuple(
        CorruptionScore(name, tuple(accuracy[Corruption(name, s)] for s in SEVERITIES))
        for name in names
    )
    shrunk = (item for item in requested if isinstance(item, Shrunk))
    return Robustness(
        corruptions=corruptions,
        sizes=tuple(SizeScore(item.pixels, accuracy[item]) for item in shrunk),
        mean=float(np.mean([score.top1 for score in corruptions])) if corruptions else None,
        n=len(chosen),
        unspoilt=accuracy[None],
    )


Fit = Callable[[Transform | None, Sequence[int]], Iterator[NDArray[Any]]]


@contextmanager
def _fitting(images: ImageSet, preprocessing: Preprocessing, workers: int) -> Iterator[Fit]:
    """fit(transform, indices): the fitted pictures, computed here or in worker processes."""
    if not workers:
        yield lambda transform, indices: map(
            functools.partial(_fitted, images, preprocessing, transform), indices
        )
        return
    begin = functools.partial(_start_worker, images, preprocessing)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=begin) as pool:
        yield lambda transform, indices: pool.map(
            _fitted_in_worker, [transform] * len(indices), indices, chunksize=4
        )


def _fitted(
    images: ImageSet, preprocessing: Preprocessing, transform: Transform | None, index: int
) -> NDArray[Any]:
    if transform is None:
        return preprocessing.fit(images.picture(index, preprocessing))
    seed = zlib.crc32(f"{images.names[index]} {transform}".encode("utf-8", "surrogateescape"))
    return preprocessing.fit(preprocessing.read(transform(images.read(index), seed=seed)))


_WORKER_INPUT: list[tuple[ImageSet, Preprocessing]] = []  # of a worker process


def _start_worker(images: ImageSet, preprocessing: Preprocessing) -> None:
    _WORKER_INPUT.append((images, preprocessing))


def _fitted_in_worker(transform: Transform | None, index: int) -> NDArray[Any]:
    images, preprocessing = _WORKER_INPUT[-1]
    return _fitted(images, preprocessing, transform, index)
