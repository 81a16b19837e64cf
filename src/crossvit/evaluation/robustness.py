"""How accuracy falls where pictures get worse: common corruptions at five severities, and low resolution.

The corruptions are those of Hendrycks and Dietterich (Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations, ICLR 2019) as the package `imagecorruptions-imaug` has them for pictures of any size. Pictures are spoilt as they
are decoded, before the preprocessing; each from a seed of its own, so that figures do not depend on order or processes.
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
from crossvit.errors import UsageError, unknown_name
from crossvit.evaluation.metrics import hits
from crossvit.results import CorruptionScore, Robustness, SizeScore

CORRUPTIONS = (  # the paper's fifteen, in its order: noise, blur, weather, digital
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
SEVERITIES = (1, 2, 3, 4, 5)
LARGEST_SIDE = 256  # the shorter side that the published severities, in pixels, are for; larger pictures are scaled down to it
COLOURS = (0, 1, 3, 4)  # channels (0: as RGB) that an 8-bit colour picture can become
SMALLEST_SIDE = 32  # the least the package takes; smaller pictures are enlarged to it
IMAGES = 1000  # that are measured: a share of them is right to about 3 %, and 75 times so many take minutes

Forward = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Spoiling(Protocol):
    """Something done to a picture before the preprocessing. Goes to other processes."""

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
        own = (
            {"seed": seed} if self.name in ("glass_blur", "impulse_noise") else {}
        )  # the others draw from NumPy's generator
        before = np.random.get_state()
        np.random.seed(seed)
        try:
            return Image.fromarray(
                corrupt(
                    np.asarray(picture), severity=self.severity, corruption_name=self.name, **own
                )
            )
        finally:
            np.random.set_state(before)


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """Scaled down to a shorter side of `pixels`, bicubic; a picture that has no more than that is left as it is."""

    pixels: int

    def __call__(self, picture: Image.Image, *, seed: int) -> Image.Image:  # noqa: ARG002  # of every Spoiling
        return _scaled(picture, min(1.0, self.pixels / min(picture.size)))


def _scaled(picture: Image.Image, factor: float) -> Image.Image:
    if factor == 1.0:
        return picture
    width, height = (max(1, round(factor * side)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def spoilings(
    corruptions: Sequence[str], sizes: Sequence[int], *, channels: int = 0
) -> tuple[Spoiling, ...]:
    """Every corruption at every severity, then the sizes, for the pictures of a `Preprocessing` of `channels`.

    UsageError for a name, a size or a package that is not there, and for channels that no picture in colour has.
    """
    if (corruptions or sizes) and channels not in COLOURS:
        raise UsageError(
            f"pictures of {channels} channels cannot be spoilt: leave --corruptions and --sizes out"
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
    forward: Forward,
    images: ImageSet,
    preprocessing: Preprocessing,
    asked: Sequence[Spoiling],
    *,
    sample: int = IMAGES,
    batch_size: int = 64,
    workers: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Robustness:
    """Accuracy of `forward` on images made worse in the ways `asked`, and as they are.

    sample: so many of the images are measured, evenly spread over them.  workers: processes that spoil pictures, 0 for this one.
    progress is called with (pictures done, pictures in all).
    """
    chosen = images.take(
        np.unique(
            np.linspace(0, len(images) - 1, min(sample, len(images))).round().astype(int)
        ).tolist()
    )
    truth = chosen.targets()
    total = len(chosen) * (len(asked) + 1)
    accuracy: dict[Spoiling | None, float] = {}
    with _fitting(chosen, preprocessing, workers) as fit:
        for spoiling in (None, *asked):
            right = 0
            for start in range(0, len(chosen), batch_size):
                indices = range(start, min(start + batch_size, len(chosen)))
                logits = forward(
                    preprocessing.normalise(np.stack(list(fit(spoiling, indices))))
                ).mean(axis=0)
                right += int(hits(logits, truth[start : indices.stop]).sum())
                progress(len(accuracy) * len(chosen) + indices.stop, total)
            accuracy[spoiling] = right / len(chosen)
    names = dict.fromkeys(spoiling.name for spoiling in asked if isinstance(spoiling, Corruption))
    corruptions = tuple(
        CorruptionScore(name, tuple(accuracy[Corruption(name, s)] for s in SEVERITIES))
        for name in names
    )
    shrunk = (spoiling for spoiling in asked if isinstance(spoiling, Shrunk))
    return Robustness(
        corruptions=corruptions,
        sizes=tuple(SizeScore(spoiling.pixels, accuracy[spoiling]) for spoiling in shrunk),
        mean=float(np.mean([score.top1 for score in corruptions])) if corruptions else None,
        n=len(chosen),
        unspoilt=accuracy[None],
    )


Fit = Callable[[Spoiling | None, Sequence[int]], Iterator[NDArray[Any]]]


@contextmanager
def _fitting(images: ImageSet, preprocessing: Preprocessing, workers: int) -> Iterator[Fit]:
    """fit(spoiling, indices): the fitted pictures, in this process or in others that hold `images` too."""
    if not workers:
        yield lambda spoiling, indices: map(
            functools.partial(_fitted, images, preprocessing, spoiling), indices
        )
        return
    begin = functools.partial(_hold, images, preprocessing)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=begin) as pool:
        yield lambda spoiling, indices: pool.map(
            _held, [spoiling] * len(indices), indices, chunksize=4
        )


def _fitted(
    images: ImageSet, preprocessing: Preprocessing, spoiling: Spoiling | None, index: int
) -> NDArray[Any]:
    if spoiling is None:
        return preprocessing.fit(images.picture(index, preprocessing))
    seed = zlib.crc32(f"{images.names[index]} {spoiling}".encode("utf-8", "surrogateescape"))
    return preprocessing.fit(preprocessing.read(spoiling(images.read(index), seed=seed)))


_HELD: list[
    tuple[ImageSet, Preprocessing]
] = []  # of a worker process, whose whole life is one measurement


def _hold(images: ImageSet, preprocessing: Preprocessing) -> None:
    _HELD.append((images, preprocessing))


def _held(spoiling: Spoiling | None, index: int) -> NDArray[Any]:
    images, preprocessing = _HELD[-1]
    return _fitted(images, preprocessing, spoiling, index)
