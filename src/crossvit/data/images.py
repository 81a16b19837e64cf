"""Labelled images: where their pictures are, what they show, and how they are divided into those learnt from and those held out.

A `Store` knows where pictures are, an `ImageSet` is some of them with labels, a `Data` is all that DATA turned out to be.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossvit.data import splits
from crossvit.data.preprocess import ImageSource, Picture, Preprocessing, file_format, read_image
from crossvit.errors import DataError, UsageError, unknown_name
from crossvit.results import MULTI_LABEL, SINGLE_LABEL

HELD_OUT_PARTS = ("val", "test")
NAMED_AT_MOST = 5  # of anything, in a message; the rest are counted

Label = (
    int | tuple[int, ...]
)  # the class of an image, or of multi-label data its classes, ascending; it may have none
T = TypeVar("T")


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
    task: `single-label`, where a label is an int, or `multi-label`, where it is a tuple of them; `targets()` has both as
    arrays.
    """

    store: Store
    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[Label, ...]
    file_sizes: tuple[int, ...]
    groups: tuple[str, ...] = ()
    task: str = SINGLE_LABEL

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
        """The picture as people see it, upright and RGB. DataError, with the path, if it cannot be decoded."""
        return self._read(index, read_image)

    def picture(self, index: int, preprocessing: Preprocessing, *, at_least: int = 0) -> Picture:
        """The picture as `preprocessing.fit` takes it; at_least: see `preprocess.decode`. DataError, with the path, if it cannot
        be decoded so."""
        return self._read(index, functools.partial(preprocessing.read, at_least=at_least))

    def file_format(self, index: int) -> str:
        """Pillow's name of the format of an image whose source is the content of a file. DataError, with the path, if it is in
        none that is read here."""
        return self._read(index, file_format)

    def _read(self, index: int, read: Callable[[ImageSource], T]) -> T:
        source = self.source(index)
        try:
            return read(source)
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

    def targets(self) -> NDArray[Any]:
        """What the images show, as metrics take it: (n,) int64 class numbers, or of multi-label data (n, classes) uint8, 1
        where an image has a class."""
        if self.task == SINGLE_LABEL:
            return np.asarray(self.labels, dtype=np.int64)
        return np.array([multi_hot(label, len(self.classes)) for label in self.labels]).reshape(
            len(self), len(self.classes)
        )

    def counts(self) -> dict[str, int]:
        """Images per class, in the order of `classes`."""
        targets = self.targets()
        if self.task == SINGLE_LABEL:
            counted = np.bincount(targets, minlength=len(self.classes))
        else:
            counted = targets.sum(axis=0, dtype=np.int64)
        return dict(zip(self.classes, counted.tolist(), strict=True))

    def said(self, index: int) -> str:
        """The label of image `index` for people: the names of its classes."""
        label = self.labels[index]
        return BETWEEN_LABELS.join(
            self.classes[one] for one in ((label,) if isinstance(label, int) else label)
        )

    def under(self, classes: tuple[str, ...], numbers: Sequence[int]) -> ImageSet:
        """These images under other classes: what was class number i here is `numbers[i]` there."""
        labels = tuple(
            numbers[label]
            if isinstance(label, int)
            else tuple(sorted({numbers[one] for one in label}))
            for label in self.labels
        )
        return dataclasses.replace(self, classes=classes, labels=labels)


BETWEEN_LABELS = ";"  # the labels of one image where they are written into one text, in a CSV too


def multi_hot(label: Label, classes: int) -> NDArray[np.uint8]:
    """(classes,): 1 where the image has a class."""
    found = np.zeros(classes, dtype=np.uint8)
    found[list(label) if isinstance(label, tuple) else label] = 1
    return found


@dataclasses.dataclass(frozen=True)
class Data:
    """What DATA turned out to be. `parts` is {"train": ..., "val": ...} as found, or {"all": ...}."""

    location: str
    classes: tuple[str, ...]
    parts: dict[str, ImageSet]
    notes: tuple[str, ...] = ()  # what was passed over, a line each

    @property
    def task(self) -> str:
        """`single-label` or `multi-label`, the same for every part."""
        return next(iter(self.parts.values())).task

    @property
    def fingerprint(self) -> str:
        """sha256 over every image's name, size and class: the same for the same images, wherever they lie."""
        digest = hashlib.sha256()
        for part, images in sorted(self.parts.items()):
            for index, (name, size) in enumerate(zip(images.names, images.file_sizes, strict=True)):
                digest.update(
                    f"{part} {name} {size} {images.said(index)}\n".encode(
                        "utf-8", "surrogateescape"
                    )
                )
        return digest.hexdigest()

    def without(self, broken: Mapping[str, Collection[str]]) -> Data:
        """This data less the images named for each part."""
        kept = {part: images.without(broken.get(part, ())) for part, images in self.parts.items()}
        return dataclasses.replace(self, parts=kept)

    def split(self, *, held_out: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """(train, held-out) images: the parts DATA has, or a split of all of them, stratified and with groups kept whole."""
        train = self.parts.get("train") or self.parts.get("all")
        if train is None:
            raise UsageError(
                f"{self.location} has no train part: put the images to learn from in train/<class>/"
            )
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
    both sides. UsageError where the label sets of multi-label images do not allow that."""
    if images.task == MULTI_LABEL:
        return _split_at(
            images,
            splits.of_label_sets(images.targets(), (), held_out=held_out, seed=seed),
            "images",
        )
    return _split_at(
        images,
        splits.of_labels(
            images.targets(), classes=len(images.classes), held_out=held_out, seed=seed
        ),
        "images",
    )


def grouped_split(images: ImageSet, *, held_out: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """As `stratified_split`, with no group on both sides. UsageError where the groups leave a class out of one side."""
    count, needed = len(set(images.groups)), splits.fold_count(held_out)
    if count < needed:
        raise UsageError(
            f"{images.location} has {count} groups, too few to hold out {held_out:g} of the images: give a "
            f"split column, or --held-out {1 / max(2, count):.2g} or more"
        )
    targets = images.targets()
    if images.task == MULTI_LABEL:
        found = splits.of_label_sets(targets, images.groups, held_out=held_out, seed=seed)
    else:
        found = splits.of_groups(
            targets, images.groups, classes=len(images.classes), held_out=held_out, seed=seed
        )
    return _split_at(images, found, f"{count} groups")


def _split_at(images: ImageSet, held: list[int] | None, units: str) -> tuple[ImageSet, ImageSet]:
    if held is None:
        raise UsageError(
            f"{images.location}: no split of its {units} has every class on both sides: a class that all comes together "
            "cannot be learnt and measured; give a split column, more of them, or leave the group column out"
        )
    return images.take(sorted(set(range(len(images))) - set(held))), images.take(held)


def _require_groups_apart(train: ImageSet, other: ImageSet, part: str) -> None:
    both = sorted(set(train.groups) & set(other.groups))
    if both:
        more = f" and {len(both) - NAMED_AT_MOST} more" if len(both) > NAMED_AT_MOST else ""
        named = ", ".join(both[:NAMED_AT_MOST]) + more
        raise UsageError(
            f"{train.location}: {len(both)} groups are in train and in {part} ({named}): move each to one side"
        )


def _require_trainable(images: ImageSet, location: str) -> None:
    counts = images.counts()
    if len(counts) < 2 and images.task == SINGLE_LABEL:
        raise UsageError(
            f"{location} has one class only ({images.classes[0]}): a classifier needs two or more"
        )
    for name, count in counts.items():
        if count < 2:
            found = "no image" if count == 0 else "one image"
            raise UsageError(
                f"class {name!r} has {found} in {images.location}: add images (two or more) or remove the class"
            )
