"""Where labelled images come from: a folder of class folders, or the scans inside scikit-learn.

`open_data` gives a `Data`: its classes and its parts (`train`, `val`, `test`, or one `all`), each an `ImageSet`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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
    """Labelled images of one part. `names` tell them apart (paths below `root`), `labels` index `classes`, `file_sizes`
    are in bytes."""

    root: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]
    file_sizes: tuple[int, ...]
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
            file_sizes=tuple(self.file_sizes[index] for index in indices),
            pixels=None if self.pixels is None else self.pixels[list(indices)],
        )

    def without(self, names: Collection[str]) -> ImageSet:
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
    notes: tuple[str, ...] = ()  # what was passed over, a line each

    @property
    def fingerprint(self) -> str:
        """sha256 over every image's name and size: the same for the same files, wherever they lie."""
        digest = hashlib.sha256()
        for part, images in sorted(self.parts.items()):
            for name, size in zip(images.names, images.file_sizes, strict=True):
                digest.update(f"{part} {name} {size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def without(self, broken: Mapping[str, Collection[str]]) -> Data:
        """This data less the images named for each part."""
        kept = {part: images.without(broken.get(part, ())) for part, images in self.parts.items()}
        return dataclasses.replace(self, parts=kept)

    def split(self, *, held_out: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """(train, held-out) images: the parts DATA has, or a stratified split of all of them."""
        train = self.parts.get("train") or self.parts.get("all")
        if train is None:
            raise UsageError(f"{self.location} has no train/ folder: put the images to learn from in train/<class>/")
        _require_trainable(train, self.location)
        for part in HELD_OUT_PARTS:
            if part in self.parts:
                if not len(self.parts[part]):
                    raise UsageError(
                        f"{self.location}/{part} has no images: add some, or remove it to have a part of train/ held out"
                    )
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
        return Data(BUILT_IN, images.classes, {"all": images})
    root = Path(location).expanduser()
    if not root.is_dir():
        raise UsageError(f"no folder {root}: give a folder of class folders, or `{BUILT_IN}`")
    layout, notes = _layout(root)
    classes = _folders(layout.get("train") or next(iter(layout.values())))
    if not classes:
        raise UsageError(
            f"{root} has no class folders: put each class's images in a folder of its name, {root}/<class>/photo.jpg"
        )
    sets: dict[str, ImageSet] = {}
    ignored: Counter[str] = Counter()
    for part, folder in layout.items():
        sets[part] = _read_folder(folder, classes, ignored)
    if not any(len(images) for images in sets.values()):
        raise UsageError(f"{root} has no images: put them in {root}/<class>/ (read here: {' '.join(SUFFIXES)})")
    if ignored:
        kinds = ", ".join(f"{count} {suffix or 'without an ending'}" for suffix, count in ignored.most_common())
        notes.append(f"files of a kind that is not read here are ignored: {kinds}")
    return Data(str(root), classes, sets, tuple(notes))


def _layout(root: Path) -> tuple[dict[str, Path], list[str]]:
    """(part -> its folder, notes): train/, val/ and test/ where they hold class folders, else `root` itself as `all`.

    Folders called train, val or test beside others are classes, unless train/ holds class folders itself.
    """
    folders = _folders(root)
    parts = [part for part in ("train", *HELD_OUT_PARTS) if part in folders]
    others = [name for name in folders if name not in parts]
    if not parts or (others and not _folders(root / "train" if "train" in parts else root / parts[0])):
        return {"all": root}, []
    for part in parts:
        if not _folders(root / part) and any((root / part).iterdir()):
            raise UsageError(
                f"{root / part} has no class folders: put its images in {root / part}/<class>/, as in the other parts"
            )
    notes = [f"{root} has train/, val/ or test/, so its other folders are ignored: {', '.join(others)}"] if others else []
    return {part: root / part for part in parts}, notes


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


def _split_with_every_class(images: ImageSet, *, held_out: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """The share `held_out` of each class, rounded, but at least one image and all but one at most."""
    generator = np.random.default_rng(seed)
    labels = np.asarray(images.labels)
    test: list[int] = []
    for label in range(len(images.classes)):
        own = generator.permutation(np.flatnonzero(labels == label))
        test += own[: int(np.clip(round(len(own) * held_out), 1, len(own) - 1))].tolist()
    return images.take(sorted(set(range(len(images))) - set(test))), images.take(sorted(test))


def is_image_file(path: Path) -> bool:
    """Whether `path` is a file that is not hidden and has an image's name ending."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


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


def _read_folder(root: Path, classes: tuple[str, ...], ignored: Counter[str]) -> ImageSet:
    """The images below `root`; files of other kinds are counted in `ignored` by their name's ending."""
    extra = sorted(set(_folders(root)) - set(classes))
    if extra:
        raise UsageError(f"{root} has classes that train/ does not have: {', '.join(extra)}; rename or remove them")
    names: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    for label, name in enumerate(classes):
        for path in sorted((root / name).rglob("*")):
            if is_image_file(path):
                names.append(path.relative_to(root).as_posix())
                labels.append(label)
                sizes.append(path.stat().st_size)
            elif path.is_file() and not path.name.startswith("."):
                ignored[path.suffix.lower()] += 1
    return ImageSet(str(root), classes, tuple(names), tuple(labels), tuple(sizes))


def _digits() -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), ink 0..16
    classes = tuple(str(name) for name in digits.target_names)
    names = tuple(f"{index:04d}" for index in range(len(pixels)))
    return ImageSet(
        BUILT_IN, classes, names, tuple(int(label) for label in digits.target), (pixels[0].nbytes,) * len(pixels), pixels
    )
