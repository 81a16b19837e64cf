"""The order of training images and their batches: both follow from (seed, epoch), whatever the number of workers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crossvit.data.augment import Augment
from crossvit.data.preprocess import Preprocessing
from crossvit.data.sources import ImageSet

CACHE_BYTES = 2 * 2**30  # decoded pictures kept in memory, over all workers; beyond it every epoch decodes again


def epoch_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of `count` images that epoch `epoch` goes through."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class TrainingSet(Dataset[tuple[NDArray[np.uint8], int]]):
    """Augmented training views. An item is asked for by (epoch, index), so it never depends on who loads it when."""

    def __init__(self, images: ImageSet, augment: Augment, *, seed: int, cache_bytes: int) -> None:
        self.images = images
        self.augment = augment
        self.seed = seed
        self.cache_bytes = cache_bytes
        self._kept: dict[int, NDArray[np.uint8]] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[NDArray[np.uint8], int]:
        epoch, index = key
        view = self.augment(self._view(index), seed=self.seed, epoch=epoch, index=index)
        return view, self.images.labels[index]

    def _view(self, index: int) -> Image.Image:
        if index in self._kept:
            return Image.fromarray(self._kept[index])
        view = self.augment.view(self.images.read(index))
        pixels = np.asarray(view)
        if self._kept_bytes + pixels.nbytes <= self.cache_bytes:
            self._kept[index] = pixels
            self._kept_bytes += pixels.nbytes
        return view


class EpochBatches:
    """Batches of (epoch, index) keys for the DataLoader; `epoch` is set before each pass."""

    def __init__(self, count: int, *, batch_size: int, seed: int) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = epoch_order(self.count, seed=self.seed, epoch=self.epoch)
        for start in range(0, self.count, self.batch_size):
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]


class TrainingLoader:
    """One epoch after another of (images, labels): (B, 3, H, W) float32 normalised, (B,) int64.

    workers: processes that decode and augment (0: this one). They are spawned, so nothing of this process leaks in.
    """

    def __init__(
        self, images: ImageSet, augment: Augment, preprocessing: Preprocessing, *, batch_size: int, seed: int, workers: int = 0
    ) -> None:
        self.preprocessing = preprocessing
        self.batches = EpochBatches(len(images), batch_size=batch_size, seed=seed)
        self.loader = DataLoader(
            TrainingSet(images, augment, seed=seed, cache_bytes=CACHE_BYTES // max(1, workers)),
            batch_sampler=self.batches,  # keys rather than positions
            num_workers=workers,
            collate_fn=_stack,
            persistent_workers=workers > 0,
            multiprocessing_context="spawn" if workers else None,
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.batches)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.batches.epoch = epoch
        with _interrupts_left_to_this_process():
            batches = iter(self.loader)  # starts the workers, the first time
        for pixels, labels in batches:
            yield torch.from_numpy(self.preprocessing.normalise(pixels)), torch.from_numpy(labels)


@contextmanager
def _interrupts_left_to_this_process() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C from their first moment: this one hears it, a fraction of a second later at
    the earliest, and ends them. (A blocked signal would wait, but multiprocessing unblocks it.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stack(items: list[tuple[NDArray[np.uint8], int]]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return np.stack([view for view, _ in items]), np.array([label for _, label in items], dtype=np.int64)
