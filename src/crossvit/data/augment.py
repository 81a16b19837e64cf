"""Training augmentation. What happens to an image follows from (seed, epoch, index) alone, so that the number of worker
processes, a resume or another order of loading changes nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from crossvit.data.preprocess import Preprocessing

VIEW_SCALE = 2  # pictures are kept at up to this multiple of the input's sides: enough detail for a crop of half the side


class Augment:
    """RGB picture -> (H, W, 3) uint8 training view, by torchvision's transforms.

    In order: a random crop that keeps at least the share `min_crop` of the area, resized to the input (1: the whole
    picture); a left-right flip with chance `flip`; rotation by up to `rotate` degrees with a shift and zoom of up to
    those shares of the side; brightness, contrast and saturation, each up to the share `colour`.
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
    ) -> None:
        self.preprocessing = preprocessing
        height, width = preprocessing.image_size
        steps: list[v2.Transform] = []
        if min_crop < 1.0:
            steps.append(v2.RandomResizedCrop((height, width), scale=(min_crop, 1.0), interpolation=v2.InterpolationMode.BICUBIC))
        if flip > 0:
            steps.append(v2.RandomHorizontalFlip(flip))
        if rotate or shift or zoom:
            steps.append(
                v2.RandomAffine(
                    rotate, (shift, shift), (1 - zoom, 1 + zoom), interpolation=v2.InterpolationMode.BILINEAR, fill=128
                )
            )
        if colour > 0:
            steps.append(v2.ColorJitter(brightness=colour, contrast=colour, saturation=colour))
        self.whole = min_crop >= 1.0
        self.transform = v2.Compose(steps or [v2.Identity()])

    def view(self, image: Image.Image) -> Image.Image:
        """The picture as it is kept in memory: the whole of it at the input's size, or up to VIEW_SCALE times that where
        crops are taken. A pure function of the picture."""
        if self.whole:
            return Image.fromarray(self.preprocessing.fit(image))
        height, width = (VIEW_SCALE * side for side in self.preprocessing.image_size)
        scale = max(height / image.height, width / image.width)
        if scale >= 1:
            return image
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)

    def __call__(self, view: Image.Image, *, seed: int, epoch: int, index: int) -> NDArray[np.uint8]:
        with seeded(seed, epoch, index):
            return np.asarray(self.transform(view))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, all three global generators (random, NumPy's, torch's CPU one) follow from `key`; afterwards they are as
    they were. Transforms draw from any of them, and without worker processes they are the model's generators too."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(words[0])
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
