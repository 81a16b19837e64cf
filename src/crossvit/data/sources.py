"""Where labelled images come from: a folder of class folders, or the scans inside scikit-learn.

`open_data` gives a `Data`: its classes and its parts (`train`, `val`, `test`, or one `all`), each an `ImageSet`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossvit.data.preprocess import SUFFIXES, read_image
from crossvit.errors import UsageError, unknown_name

BUILT_IN = "digits"
HELD_OUT_PARTS = ("val", "test")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Labelled images of one part. `names` tell them apart (paths below `root`), `labels` index `classes`."""

    root: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    pixels: NDArray[np.uint8] | None = None  # (n, H, W) for images that are not files

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """Where image `index` is: a path, or `digits/0001` for a built-in one."""
        return str(Path(self.root) / self.names[index])

    def read(self, index: int) -> Image.Image:
        """The picture, upright and RGB. DataError, with the path, if it cannot be decoded."""
        return read_image(self.path(index) if self.pixels is None else self.pixels[index])

    def take(self, indices: Sequence[int]) -> ImageSet:
        """The images at `indices`, in that order."""
        return dataclasses.replace(
            self,
            names=tuple(self.names[index] for index in indices),
            labels=tuple(self.labels[index] for index in indices),
            pixels=None if self.pixels is None else self.pixels[list(indices)],
        )

    def without(self, names: set[str]) -> ImageSet:
        return self.take([index for index, name in enumerate(self.names) if name not in names])

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
    fingerprint: str  # sha256 over every file's name and size: the same for the same files, wherever they lie
    ignored: int = 0  # files without an image's name ending

    def split(self, *, held_out: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """(train, held-out) images: the parts DATA has, or a stratified split of all of them."""
        train = self.parts.get("train") or self.parts.get("all")
        if train is None:
            raise UsageError(f"{self.location} has no train/ folder: put the images to learn from in train/<class>/")
        _require_trainable(train, self.location)
        for part in HELD_OUT_PARTS:
            if part in self.parts:
                return train, self.parts[part]
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


def open_data(location: str | Path) -> Data:
    """`digits`, or a folder: class folders, or train/ with val/ or test/ that hold them.

    UsageError, in one line with the fix, for a folder that is missing, empty, or has a class without an image.
    """
    if str(location) == BUILT_IN:  # a folder of that name is ./digits
        images = _digits()
        assert images.pixels is not None
        return Data(BUILT_IN, images.classes, {"all": images}, hashlib.sha256(images.pixels.tobytes()).hexdigest())
    root = Path(location).expanduser()
    if not root.is_dir():
        raise UsageError(f"no folder {root}: give a folder of class folders, or `{BUILT_IN}`")
    parts = [part for part in ("train", *HELD_OUT_PARTS) if (root / part).is_dir() and _folders(root / part)]
    layout = {part: root / part for part in parts} or {"all": root}
    classes = _folders(layout.get("train") or next(iter(layout.values())))
    if not classes:
        raise UsageError(
            f"{root} has no class folders: put each class's images in a folder of its name, {root}/<class>/photo.jpg"
        )
    sets, ignored, digest = {}, 0, hashlib.sha256()
    for part, folder in sorted(layout.items()):
        digest.update(f"{part}\n".encode())
        sets[part], skipped = _read_folder(folder, classes, digest)
        ignored += skipped
    if not any(len(images) for images in sets.values()):
        raise UsageError(f"{root} has no images: put them in {root}/<class>/ (read here: {' '.join(SUFFIXES)})")
    return Data(str(root), classes, sets, digest.hexdigest(), ignored)


def stratified_split(images: ImageSet, *, held_out: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """(train, held-out): the share `held_out` of every class, at least one image, drawn by `seed`."""
    from sklearn.model_selection import train_test_split

    size = max(math.ceil(len(images) * held_out), len(images.classes))
    train, test = train_test_split(range(len(images)), test_size=size, stratify=images.labels, random_state=seed)
    return images.take(sorted(train)), images.take(sorted(test))


def _require_trainable(images: ImageSet, location: str) -> None:
    counts = images.counts()
    if len(counts) < 2:
        raise UsageError(f"{location} has one class only ({images.classes[0]}): a classifier needs two or more class folders")
    for name, count in counts.items():
        if count < 2:
            found = "no image" if count == 0 else "one image"
            raise UsageError(f"class {name!r} has {found} in {images.root}: add images (two or more) or remove the folder")


def _folders(root: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _read_folder(root: Path, classes: tuple[str, ...], digest: hashlib._Hash) -> tuple[ImageSet, int]:
    """(images, files passed over); every image's name and size goes into `digest`."""
    extra = sorted(set(_folders(root)) - set(classes))
    if extra:
        raise UsageError(f"{root} has classes that train/ does not have: {', '.join(extra)}; rename or remove them")
    names, labels, ignored = [], [], 0
    for label, name in enumerate(classes):
        for path in sorted((root / name).rglob("*")):
            if path.name.startswith(".") or not path.is_file():
                continue
            if path.suffix.lower() not in SUFFIXES:
                ignored += 1
                continue
            names.append(path.relative_to(root).as_posix())
            digest.update(f"{names[-1]} {path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
            labels.append(label)
    return ImageSet(str(root), classes, tuple(names), tuple(labels)), ignored


def _digits() -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), ink 0..16
    classes = tuple(str(name) for name in digits.target_names)
    names = tuple(f"{index:04d}" for index in range(len(pixels)))
    return ImageSet(BUILT_IN, classes, names, tuple(int(label) for label in digits.target), pixels)
