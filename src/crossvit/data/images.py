"""Labelled images: where their pictures are, what they show, and how they are divided into those learnt from and those held out.

A `Store` knows where pictures are, an `ImageSet` is some of them with labels, a `Data` is all that DATA turned out to be.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossvit.data.preprocess import ImageSource, read_image
from crossvit.errors import DataError, UsageError, unknown_name

HELD_OUT_PARTS = ("val", "test")
NAMED_AT_MOST = 5  # of anything, in a message; the rest are counted


class Store(Protocol):
    """Where the pictures of a part are, by name. Goes to worker processes as it is, so it holds no open file."""

    @property
    def location(self) -> str:
        """What to call it in messages."""

    def path(self, name: str) -> str:
        """Where the picture `name` is, for people."""

    def source(self, name: str) -> ImageSource:
        """The picture `name` as `read_image` takes it. DataError if it cannot be fetched."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """Files below a folder, by their paths."""

    location: str

    def path(self, name: str) -> str:
        return str(Path(self.location) / name)

    def source(self, name: str) -> str:
        return self.path(name)


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Pictures in memory, (n, H, W) or (n, H, W, 3) uint8; a name is an index written out."""

    location: str
    pixels: NDArray[np.uint8]

    def path(self, name: str) -> str:
        return f"{self.location}/{name}"

    def source(self, name: str) -> NDArray[np.uint8]:
        picture: NDArray[np.uint8] = self.pixels[int(name)]
        return picture


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Labelled images of one part. `names` tell them apart, `labels` index `classes`, `file_sizes` are in bytes.

    groups: of each image, what must stay on one side of a split (a patient, a burst); empty where there are none.
    """

    store: Store
    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    file_sizes: tuple[int, ...]
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def location(self) -> str:
        return self.store.location

    def path(self, index: int) -> str:
        """Where image `index` is, for people: a path, or `digits/0001` for a built-in one."""
        return self.store.path(self.names[index])

    def source(self, index: int) -> ImageSource:
        """Image `index` as a path, the bytes of a file, or an array. DataError if it cannot be fetched."""
        return self.store.source(self.names[index])

    def read(self, index: int) -> Image.Image:
        """The picture, upright and RGB. DataError, with the path, if it cannot be decoded."""
        source = self.source(index)
        try:
            return read_image(source)
        except DataError as error:
            if isinstance(source, str):
                raise
            reason = str(error).split(": ", 1)[-1]
            raise DataError(f"{self.path(index)}: {reason}") from error

    def take(self, indices: Sequence[int]) -> ImageSet:
        """The images at `indices`, in that order."""
        return dataclasses.replace(
            self,
            names=tuple(self.names[index] for index in indices),
            labels=tuple(self.labels[index] for index in indices),
            file_sizes=tuple(self.file_sizes[index] for index in indices),
            groups=tuple(self.groups[index] for index in indices) if self.groups else (),
        )

    def without(self, names: Collection[str]) -> ImageSet:
        return self.take([index for index, name in enumerate(self.names) if name not in names])

    def targets(self) -> NDArray[np.int64]:
        """What the images show, as metrics take it: (n,) class indices."""
        return np.asarray(self.labels, dtype=np.int64)

    def counts(self) -> dict[str, int]:
        """Images per class, in the order of `classes`."""
        counted = Counter(self.labels)
        return {name: counted[label] for label, name in enumerate(self.classes)}


@dataclasses.dataclass(frozen=True)
class Data:
    """What DATA turned out to be. `parts` is {"train": ..., "val": ...} as found, or {"all": ...}."""

    location: str
    classes: tuple[str, ...]
    parts: dict[str, ImageSet]
    notes: tuple[str, ...] = ()  # what was passed over, a line each

    @property
    def fingerprint(self) -> str:
        """sha256 over every image's name, size and class: the same for the same images, wherever they lie."""
        digest = hashlib.sha256()
        for part, images in sorted(self.parts.items()):
            for name, size, label in zip(images.names, images.file_sizes, images.labels, strict=True):
                digest.update(f"{part} {name} {size} {images.classes[label]}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def without(self, broken: Mapping[str, Collection[str]]) -> Data:
        """This data less the images named for each part."""
        kept = {part: images.without(broken.get(part, ())) for part, images in self.parts.items()}
        return dataclasses.replace(self, parts=kept)

    def split(self, *, held_out: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """(train, held-out) images: the parts DATA has, or a split of all of them, stratified and with groups kept whole."""
        train = self.parts.get("train") or self.parts.get("all")
        if train is None:
            raise UsageError(f"{self.location} has no train part: put the images to learn from in train/<class>/")
        _require_trainable(train, self.location)
        for part in HELD_OUT_PARTS:
            if part in self.parts:
                if not len(self.parts[part]):
                    raise UsageError(
                        f"{self.location}/{part} has no images: add some, or remove it to have a part of train held out"
                    )
                _require_groups_apart(train, self.parts[part], part)
                return train, self.parts[part]
        if train.groups:
            return grouped_split(train, held_out=held_out, seed=seed)
        return stratified_split(train, held_out=held_out, seed=seed)

    def part(self, name: str) -> ImageSet:
        if name not in self.parts:
            raise unknown_name("split", name, self.parts)
        return self.parts[name]

    def evaluation_part(self) -> ImageSet:
        """`val`, else `test`, else everything there is."""
        for name in (*HELD_OUT_PARTS, "all", "train"):
            if name in self.parts:
                return self.parts[name]
        raise UsageError(f"{self.location} has no images to evaluate")


def stratified_split(images: ImageSet, *, held_out: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """(train, held-out): the share `held_out` of every class, drawn by `seed`, with at least one image of each class on
    both sides. scikit-learn's stratified split, unless it leaves a rare class out of one side."""
    from sklearn.model_selection import train_test_split

    size = math.ceil(len(images) * held_out)
    classes = len(images.classes)
    if classes <= size <= len(images) - classes:
        train, test = train_test_split(range(len(images)), test_size=size, stratify=images.labels, random_state=seed)
        parts = images.take(sorted(train)), images.take(sorted(test))
        if all(min(part.counts().values()) >= 1 for part in parts):
            return parts
    return _split_with_every_class(images, held_out=held_out, seed=seed)


def grouped_split(images: ImageSet, *, held_out: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """(train, held-out) with no group on both sides: one of 1 / `held_out` folds of scikit-learn's StratifiedGroupKFold, the
    one whose classes are nearest to the share `held_out`. UsageError where the groups leave a class out of one side."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = max(2, round(1 / held_out))
    if len(set(images.groups)) < folds:
        raise UsageError(
            f"{images.location} has {len(set(images.groups))} groups, too few to hold out {held_out:g} of the images: give a "
            f"split column, or --held-out {1 / max(2, len(set(images.groups))):.2g} or more"
        )
    labels = np.asarray(images.labels)
    counts = np.bincount(labels, minlength=len(images.classes))
    best: tuple[float, list[int], list[int]] | None = None
    folder = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in folder.split(np.zeros(len(labels)), labels, images.groups):
        held = np.bincount(labels[test], minlength=len(images.classes))
        if held.min() >= 1 and (counts - held).min() >= 1:
            off = float(np.abs(held / counts - held_out).max())
            if best is None or off < best[0]:
                best = off, train.tolist(), test.tolist()
    if best is None:
        raise UsageError(
            f"{images.location}: no split of its {len(set(images.groups))} groups has every class on both sides: a class with "
            "one group cannot be learnt and measured; give a split column, more groups, or leave the group column out"
        )
    return images.take(best[1]), images.take(best[2])


def _split_with_every_class(images: ImageSet, *, held_out: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """The share `held_out` of each class, rounded, but at least one image and all but one at most."""
    generator = np.random.default_rng(seed)
    labels = np.asarray(images.labels)
    test: list[int] = []
    for label in range(len(images.classes)):
        own = generator.permutation(np.flatnonzero(labels == label))
        test += own[: int(np.clip(round(len(own) * held_out), 1, len(own) - 1))].tolist()
    return images.take(sorted(set(range(len(images))) - set(test))), images.take(sorted(test))


def _require_groups_apart(train: ImageSet, other: ImageSet, part: str) -> None:
    both = sorted(set(train.groups) & set(other.groups))
    if both:
        more = f" and {len(both) - NAMED_AT_MOST} more" if len(both) > NAMED_AT_MOST else ""
        named = ", ".join(both[:NAMED_AT_MOST]) + more
        raise UsageError(f"{train.location}: {len(both)} groups are in train and in {part} ({named}): move each to one side")


def _require_trainable(images: ImageSet, location: str) -> None:
    counts = images.counts()
    if len(counts) < 2:
        raise UsageError(f"{location} has one class only ({images.classes[0]}): a classifier needs two or more")
    for name, count in counts.items():
        if count < 2:
            found = "no image" if count == 0 else "one image"
            raise UsageError(f"class {name!r} has {found} in {images.location}: add images (two or more) or remove the class")
