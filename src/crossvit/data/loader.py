"""The order of training images and their batches: both follow from (seed, epoch), whatever the number of workers."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crossvit.data.augment import Augment, generators_kept
from crossvit.data.images import ImageSet, Label, multi_hot
from crossvit.data.preprocess import Picture, Preprocessing
from crossvit.results import MULTI_LABEL

View = NDArray[Any]  # as Augment gives it
DECODING_THREADS = min(8, os.cpu_count() or 1)  # where there are no worker processes
CACHE_BYTES = (
    2 * 2**30
)  # decoded pictures kept in memory, over all workers; beyond it every epoch decodes again


Bounds = Callable[
    [int], tuple[int, int]
]  # of a batch of so many, the part that is loaded here: from, to


def whole(count: int) -> tuple[int, int]:
    """All of a batch."""
    return 0, count


class Key(NamedTuple):
    """One training view: image number `image` in `epoch`, which was taken `again` times before in that epoch."""

    epoch: int
    image: int
    again: int


@dataclasses.dataclass(frozen=True)
class Order:
    """Which image comes when: a pure function of (seed, epoch), as long as there are images.

    repeats: every image is taken so often in a row, and the pass is cut off at its length (repeated augmentation).
    balanced: images are drawn with replacement, every class equally often on average; for one label an image.
    """

    labels: tuple[Label, ...]
    seed: int
    repeats: int = 1
    balanced: bool = False

    def epoch(self, epoch: int) -> list[Key]:
        count = len(self.labels)
        generator = np.random.default_rng((self.seed, epoch))
        if self.balanced:
            labels = np.asarray(self.labels)
            chances = 1.0 / np.bincount(labels)[labels]
            order = generator.choice(count, size=count, p=chances / chances.sum())
        else:
            order = np.repeat(generator.permutation(count), self.repeats)[:count]
        taken: Counter[int] = Counter()
        keys = []
        for index in order.tolist():
            keys.append(Key(epoch, index, taken[index]))
            taken[index] += 1
        return keys


class TrainingSet(Dataset[tuple[View, Any]]):
    """(augmented view, target) of training images: a class number, or (classes,) uint8 of multi-label images. An item is
    asked for by its Key, so it never depends on who loads it when. threads: that decode, 0 for none."""

    def __init__(
        self, images: ImageSet, augment: Augment, *, seed: int, cache_bytes: int, threads: int = 0
    ) -> None:
        self.images = images
        self.augment = augment
        self.seed = seed
        self.cache_bytes = cache_bytes
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._kept: dict[int, NDArray[Any]] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[Key]) -> list[tuple[View, Any]]:
        """A batch: its pictures are decoded in threads, then varied one after the other, for what they draw is global."""
        views = list(self._map(self._view, [key.image for key in keys]))
        for key, view in zip(keys, views, strict=True):
            self._keep(key.image, view)
        with generators_kept():
            return [
                (self._varied(key, view), self._target(key.image))
                for key, view in zip(keys, views, strict=True)
            ]

    def __getitem__(self, key: Key) -> tuple[View, Any]:
        return self.__getitems__([key])[0]

    def _map(self, do: Callable[[int], Picture], indices: list[int]) -> Iterable[Picture]:
        if not self.threads:
            return map(do, indices)
        if self._pool is None:  # not before: what goes to another process holds no threads
            self._pool = ThreadPoolExecutor(self.threads)
        return self._pool.map(do, indices)

    def _varied(self, key: Key, view: Picture) -> View:
        return self.augment(view, seed=self.seed, epoch=key.epoch, index=key.image, again=key.again)

    def _target(self, index: int) -> Any:
        label = self.images.labels[index]
        return (
            multi_hot(label, len(self.images.classes)) if self.images.task == MULTI_LABEL else label
        )

    def _view(self, index: int) -> Picture:
        if index in self._kept:
            kept = self._kept[index]
            return Image.fromarray(kept) if kept.dtype == np.uint8 else kept
        picture = self.images.picture(
            index, self.augment.preprocessing, at_least=self.augment.at_least
        )
        return self.augment.view(picture)

    def _keep(self, index: int, view: Picture) -> None:
        if index in self._kept:
            return
        pixels = np.asarray(view)
        if self._kept_bytes + pixels.nbytes <= self.cache_bytes:
            self._kept[index] = pixels
            self._kept_bytes += pixels.nbytes


class EpochBatches:
    """Batches of keys for the DataLoader; `epoch` and `start`, the first batch of the pass, are set before each pass.

    Of each batch the part within `bounds`, but one image at least: a process without a share has to take part all the same,
    and gives it no weight.
    """

    def __init__(self, order: Order, *, batch_size: int, bounds: Bounds) -> None:
        self.order = order
        self.batch_size = batch_size
        self.bounds = bounds
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return -(-len(self.order.labels) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        keys = self.order.epoch(self.epoch)
        for start in range(self.start * self.batch_size, len(keys), self.batch_size):
            batch = keys[start : start + self.batch_size]
            first, last = self.bounds(len(batch))
            yield batch[first:last] or batch[:1]

    def shares(self, index: int) -> tuple[int, int]:
        """(images of batch `index` of a pass that are loaded here, images in all of it)."""
        size = min(self.batch_size, len(self.order.labels) - index * self.batch_size)
        first, last = self.bounds(size)
        return last - first, size


class TrainingLoader:
    """One epoch after another of (images, targets): (B, C, H, W) float32 normalised; (B,) int64, or of multi-label images
    (B, classes) float32, 1 where an image has a class.

    workers: processes that decode and augment (0: this one). They are spawned, so nothing of this process leaks in.
    """

    def __init__(
        self,
        images: ImageSet,
        augment: Augment,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        seed: int,
        repeats: int = 1,
        balanced: bool = False,
        workers: int = 0,
        bounds: Bounds = whole,
    ) -> None:
        self.preprocessing = preprocessing
        self.normalised = augment.erase is not None
        order = Order(images.labels, seed, repeats=repeats, balanced=balanced)
        self.batches = EpochBatches(order, batch_size=batch_size, bounds=bounds)
        self.loader = DataLoader(
            TrainingSet(
                images,
                augment,
                seed=seed,
                cache_bytes=CACHE_BYTES // max(1, workers),
                threads=0 if workers else DECODING_THREADS,
            ),
            batch_sampler=self.batches,  # keys rather than positions
            num_workers=workers,
            collate_fn=_stack,
            persistent_workers=workers > 0,
            multiprocessing_context="spawn" if workers else None,
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.batches)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `epoch` from batch `start` on."""
        self.batches.epoch, self.batches.start = epoch, start
        with _interrupts_left_to_this_process() if self.loader.num_workers else nullcontext():
            batches = iter(self.loader)  # starts the workers, the first time
        for pixels, targets in batches:
            images = pixels if self.normalised else self.preprocessing.normalise(pixels)
            yield torch.from_numpy(images), torch.from_numpy(targets)


@contextmanager
def _interrupts_left_to_this_process() -> Iterator[None]:
    """Processes started inside never hear Ctrl-C: they inherit that it is blocked. This one hears it when all are started, and
    ends them; none is lost."""
    heard: list[int] = []
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # starting it later would unblock the signal
    here = (
        threading.current_thread() is threading.main_thread()
    )  # elsewhere handlers cannot be set, and none is run
    before = signal.getsignal(signal.SIGINT) if here else None  # None: not Python's to put back
    if before is not None:
        signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    # Windows has no such mask: there each worker hears Ctrl-C too, and ends of it
    mask = getattr(signal, "pthread_sigmask", None)
    blocked = mask(signal.SIG_BLOCK, {signal.SIGINT}) if mask else None
    try:
        yield
    finally:
        if mask:
            mask(signal.SIG_SETMASK, blocked)
        if before is not None:
            signal.signal(signal.SIGINT, before)
        if heard:
            signal.raise_signal(signal.SIGINT)


def _stack(items: list[tuple[View, Any]]) -> tuple[View, NDArray[Any]]:
    targets = np.array([target for _, target in items])
    return np.stack([view for view, _ in items]), targets.astype(
        np.int64 if targets.ndim == 1 else np.float32
    )
