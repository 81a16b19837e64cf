"""Training augmentation. What happens to an image follows from (seed, epoch, index) alone, so that the number of worker
processes, a resume or another order of loading changes nothing."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms import v2

from crossvit.data.preprocess import Picture, Preprocessing
from crossvit.errors import ConfigError

COLOURED = (1, 3)  # channels that have brightness, contrast and (of three) saturation
VIEW_SCALE = 2  # pictures are kept at up to this multiple of the input's sides: enough detail for a crop of half the side


class Augment:
    """Picture -> training view by torchvision's and timm's transforms: (H, W, 3) uint8 of an RGB picture, (H, W, C) float32 in
    0..1 of any number of channels, or with `erasing` either one normalised, (C, H, W) float32.

    In order: a random crop that keeps at least the share `min_crop` of the area, resized to the input (1: the whole
    picture); a left-right flip with chance `flip`; rotation by up to `rotate` degrees with a shift and zoom of up to
    those shares of the side; RandAugment by timm's name for its setting; brightness, contrast and saturation, each up to
    the share `colour`; with chance `erasing` a rectangle of noise. Where channels are no colours, `colour` and `randaugment`
    are left out, and `left_out` says so; RandAugment, which is Pillow's work, is for 8-bit RGB alone.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        *,
        min_crop: float,
        flip: float,
        rotate: float,
        shift: float,
        zoom: float,
        colour: float,
        randaugment: str = "",
        erasing: float = 0.0,
    ) -> None:
        self.preprocessing = preprocessing
        height, width = preprocessing.image_size
        channels = preprocessing.channels
        fill = [128] * 3 if channels == 0 else list(preprocessing.mean)
        steps: list[Callable[[Any], Any]] = []
        if min_crop < 1.0:
            steps.append(
                v2.RandomResizedCrop(
                    (height, width),
                    scale=(min_crop, 1.0),
                    interpolation=v2.InterpolationMode.BICUBIC,
                )
            )
        if flip > 0:
            steps.append(v2.RandomHorizontalFlip(flip))
        if rotate or shift or zoom:
            steps.append(
                v2.RandomAffine(
                    rotate,
                    (shift, shift),
                    (1 - zoom, 1 + zoom),
                    interpolation=v2.InterpolationMode.BILINEAR,
                    fill=fill,
                )
            )
        if randaugment and channels == 0:
            steps.append(_randaugment(randaugment, preprocessing))
        if colour > 0 and (channels or 3) in COLOURED:
            steps.append(v2.ColorJitter(brightness=colour, contrast=colour, saturation=colour))
        self.left_out = tuple(
            f"{name} is for {which} and left out with {channels} channels"
            for name, given, which in (
                (
                    "colour",
                    colour > 0 and channels and channels not in COLOURED,
                    "one or three channels",
                ),
                ("randaugment", randaugment and channels, "8-bit RGB (--channels 0)"),
            )
            if given
        )
        self.whole = min_crop >= 1.0
        self.at_least = VIEW_SCALE * max(
            height, width
        )  # pixels of a picture's sides that a view is made from
        self.erase = _erasing(erasing) if erasing > 0 else None
        self.transform = v2.Compose(steps or [v2.Identity()])

    def view(self, picture: Picture) -> Picture:
        """The picture as it is kept in memory: the whole of it at the input's size, or up to VIEW_SCALE times that where
        crops are taken. A pure function of the picture."""
        if self.whole:
            fitted = self.preprocessing.fit(picture)
            return Image.fromarray(fitted) if isinstance(picture, Image.Image) else fitted
        (wide, high) = picture.size if isinstance(picture, Image.Image) else picture.shape[1::-1]
        height, width = (VIEW_SCALE * side for side in self.preprocessing.image_size)
        scale = max(height / high, width / wide)
        if scale >= 1:
            return picture
        size = (max(1, round(wide * scale)), max(1, round(high * scale)))
        if isinstance(picture, Image.Image):
            return picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        return dataclasses.replace(self.preprocessing, image_size=size[::-1], crop=None).fit(
            picture
        )

    def __call__(
        self, view: Picture, *, seed: int, epoch: int, index: int, again: int = 0
    ) -> NDArray[Any]:
        """`again` counts how often the image was taken before in the same epoch. Draws from the global generators, which it
        seeds: call it inside `generators_kept`."""
        seed_generators(seed, epoch, index, *[again] * (again > 0))
        if isinstance(view, Image.Image):
            pixels = np.asarray(self.transform(view))
        else:
            planes = torch.from_numpy(
                np.ascontiguousarray(np.moveaxis(view, -1, 0))
            )  # (C, H, W), as torchvision has it
            pixels = np.moveaxis(self.transform(planes).numpy(), 0, -1)
        if self.erase is None:
            return pixels
        erased: NDArray[np.float32] = self.erase(
            torch.from_numpy(self.preprocessing.normalise(pixels))
        ).numpy()
        return erased


def _randaugment(
    setting: str, preprocessing: Preprocessing
) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment as its `create_transform` sets it up. ConfigError for a setting that it does not know."""
    from timm.data.auto_augment import rand_augment_transform

    hints = {
        "translate_const": int(min(preprocessing.image_size) * 0.45),
        "img_mean": tuple(round(255 * mean) for mean in preprocessing.mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        transform = rand_augment_transform(setting, hints)
    except Exception as error:  # an assertion or a conversion in timm
        raise ConfigError(
            f"randaugment = {setting!r}: should be like 'rand-m9-mstd0.5-inc1'"
        ) from error
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform  # type: ignore[no-any-return]


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm's, but that no bits at all is black, as it was before Pillow 13 refused it: magnitude 10 asks for it."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


def _erasing(chance: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """timm's random erasing in pixel mode: every pixel of the rectangle a draw from N(0, 1), after normalisation."""
    from timm.data.random_erasing import RandomErasing

    erase: Callable[[torch.Tensor], torch.Tensor] = RandomErasing(
        chance, mode="pixel", device="cpu"
    )  # type: ignore[no-untyped-call]
    return erase


def seed_generators(*key: int) -> None:
    """All three global generators (random, NumPy's, torch's CPU one) follow from `key`: transforms draw from any of them."""
    words = np.random.SeedSequence(key).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(words[0])
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))


@contextmanager
def generators_kept() -> Iterator[None]:
    """After it the three generators are as they were before: without worker processes they are the model's too."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, the generators follow from `key`; afterwards they are as they were."""
    with generators_kept():
        seed_generators(*key)
        yield
