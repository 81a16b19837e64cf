"""Sources of labelled images: `open_data` recognises which source DATA is, and opens it.

Folders of class folders and the scans inside scikit-learn are read here, lists in `csv_lists.py`,
tar shards in `shards.py`, Hugging Face's datasets in `hf_datasets.py`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from crossvit.data.csv_lists import TABLES, open_csv
from crossvit.data.hf_datasets import HUB, PARQUET, is_saved, open_rows
from crossvit.data.images import HELD_OUT_PARTS, Arrays, Data, Folder, ImageSet
from crossvit.data.preprocess import SUFFIXES
from crossvit.data.shards import MANIFEST, is_sharded, open_shards
from crossvit.errors import UsageError

BUILT_IN = "digits"


def open_data(location: str | Path) -> Data:
    """`digits`; a CSV; a parquet file, a dataset saved to disk, or `hub:owner/name`; a folder of tar shards, or its manifest,
    here or at an address; or a folder: class folders, or train/ with val/ or test/ that hold them.

    UsageError, in one line with the fix, for what is missing, empty, or has a class without an image.
    """
    text = str(location)
    place = Path(location).expanduser()
    if text == BUILT_IN:  # a folder of that name is ./digits
        images = _digits()
        data = Data(BUILT_IN, images.classes, {"all": images})
    elif text.startswith(HUB):
        data = open_rows(text)
    elif "://" in text or place.name == MANIFEST or is_sharded(place):
        data = open_shards(text if "://" in text else place)
    elif place.suffix.lower() in TABLES:
        data = open_csv(place)
    elif place.suffix.lower() in PARQUET or is_saved(place):
        data = open_rows(str(place))
    else:
        data = open_folder(place)
    return data


def is_elsewhere(location: str) -> bool:
    """Whether `location` is no path: what is built in, on the hub, or at an address."""
    return location == BUILT_IN or location.startswith(HUB) or "://" in location


def open_folder(root: Path) -> Data:
    """A folder of class folders, or train/ with val/ or test/ that hold them."""
    if not root.is_dir():
        raise UsageError(
            f"no folder {root}: give a folder of class folders, a CSV, a folder of shards, or `{BUILT_IN}`"
        )
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
        raise UsageError(
            f"{root} has no images: put them in {root}/<class>/ (read here: {' '.join(SUFFIXES)})"
        )
    if ignored:
        kinds = ", ".join(
            f"{count} {suffix or 'without an ending'}" for suffix, count in ignored.most_common()
        )
        notes.append(f"skipped {kinds}: files of a kind that is not read here")
    return Data(str(root), classes, sets, tuple(notes))


def _layout(root: Path) -> tuple[dict[str, Path], list[str]]:
    """(part -> its folder, notes): train/, val/ and test/ where they hold class folders, else `root` itself as `all`.

    Folders called train, val or test beside others are classes, unless train/ holds class folders itself.
    """
    folders = _folders(root)
    parts = [part for part in ("train", *HELD_OUT_PARTS) if part in folders]
    others = [name for name in folders if name not in parts]
    if not parts or (
        others and not _folders(root / "train" if "train" in parts else root / parts[0])
    ):
        return {"all": root}, []
    for part in parts:
        if not _folders(root / part) and any((root / part).iterdir()):
            raise UsageError(
                f"{root / part} has no class folders: put its images in {root / part}/<class>/, as in the other parts"
            )
    notes = (
        [f"{root} has train/, val/ or test/, so its other folders are ignored: {', '.join(others)}"]
        if others
        else []
    )
    return {part: root / part for part in parts}, notes


def is_image_file(path: Path) -> bool:
    """Whether `path` is a file that is not hidden and has an image's name ending."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _folders(root: Path) -> tuple[str, ...]:
    return tuple(
        sorted(
            entry.name
            for entry in root.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
    )


def _read_folder(root: Path, classes: tuple[str, ...], ignored: Counter[str]) -> ImageSet:
    """The images below `root`; files of other kinds are counted in `ignored` by their name's ending."""
    extra = sorted(set(_folders(root)) - set(classes))
    if extra:
        raise UsageError(
            f"{root} has classes that train/ does not have: {', '.join(extra)}; rename or remove them"
        )
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
    return ImageSet(Folder(str(root)), classes, tuple(names), tuple(labels), tuple(sizes))


def _digits() -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), ink 0..16
    classes = tuple(str(name) for name in digits.target_names)
    names = tuple(f"{index:04d}" for index in range(len(pixels)))
    labels = tuple(int(label) for label in digits.target)
    return ImageSet(
        Arrays(BUILT_IN, pixels), classes, names, labels, (pixels[0].nbytes,) * len(pixels)
    )
