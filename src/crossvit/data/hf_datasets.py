"""Datasets of Hugging Face: parquet files, datasets saved to disk, and names on the hub. Needs the package `datasets`.

Rows are memory-mapped and fetched one at a time; images stay encoded until they are read here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from crossvit.data.images import Data, ImageSet, Label
from crossvit.errors import DataError, UsageError
from crossvit.results import MULTI_LABEL, SINGLE_LABEL

HUB = "hub:"
SAVED = ("dataset_dict.json", "dataset_info.json")  # what `save_to_disk` leaves
PARQUET = (".parquet",)
PARTS = {
    "train": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "dev": "val",
    "test": "test",
}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Images in the column `column` of a dataset whose images are not decoded; a name is a row's number."""

    location: str
    dataset: Any
    column: str

    def path(self, name: str) -> str:
        return f"{self.location}:{name}"

    def source(self, name: str) -> bytes | str:
        row = self.dataset[int(name)][self.column]
        content: bytes | None = row["bytes"] if isinstance(row, dict) else row
        if content is not None:
            return content
        if isinstance(row, dict) and row["path"]:
            return str(row["path"])
        raise DataError(f"{self.path(name)}: the row has no image")


def is_saved(place: Path) -> bool:
    """Whether `place` is a folder that `save_to_disk` made."""
    return any((place / name).is_file() for name in SAVED)


def open_rows(location: str) -> Data:
    """`hub:owner/name`, a .parquet file, or a folder that `save_to_disk` made. UsageError where it has no column of images, or
    none of labels."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{location} needs the package datasets: pip install 'crossvit[datasets]'"
        ) from error
    if location.endswith(PARQUET) and not Path(location).is_file():
        raise UsageError(
            f"no file {location}: give a parquet file with a column of images and one of labels"
        )
    datasets.disable_progress_bars()
    try:
        if location.startswith(HUB):
            found = datasets.load_dataset(location.removeprefix(HUB))
        elif location.endswith(PARQUET):
            found = datasets.load_dataset("parquet", data_files=location)
        else:
            found = datasets.load_from_disk(location)
    except Exception as error:  # a network, a name, a damaged file: in that package's words
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{location} cannot be opened ({reason})") from error
    whole = {"all": found} if isinstance(found, datasets.Dataset) else dict(found)
    if len(whole) == 1:
        whole = {"all": next(iter(whole.values()))}
    else:
        unknown = [name for name in whole if name not in PARTS]
        if unknown:
            raise UsageError(
                f"{location} has splits that are not known here: {', '.join(unknown)}; keep {', '.join(PARTS)}"
            )
        whole = {PARTS[name]: part for name, part in whole.items()}
    first = next(iter(whole.values()))
    image, label = _columns(location, first)
    classes = _classes(location, whole.get("train", first), label)
    return Data(
        location,
        classes,
        {
            part: _image_set(f"{location}", rows, image, label, classes)
            for part, rows in whole.items()
        },
    )


def _columns(location: str, dataset: Any) -> tuple[str, str]:
    """The names of the columns of images and of labels."""
    import datasets

    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images = images or [name for name in ("image", "img", "picture") if name in features]
    labels = [
        name for name, feature in features.items() if isinstance(_one(feature), datasets.ClassLabel)
    ]
    labels = [
        name for name in ("label", "labels", "fine_label", "class") if name in features
    ] or labels
    for found, what in ((images, "image"), (labels, "label")):
        if not found:
            raise UsageError(
                f"{location} has no column of {what}s (it has {', '.join(features)}): call one {what}"
            )
    return images[0], labels[0]


def _one(feature: Any) -> Any:
    """What a list column has many of; another column's own type."""
    return feature.feature if _is_list(feature) else feature


def _is_list(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.List | datasets.LargeList)


def _classes(location: str, dataset: Any, label: str) -> tuple[str, ...]:
    feature = dataset.features[label]
    names = getattr(_one(feature), "names", None)
    if names:
        return tuple(names)
    if _is_list(feature):
        values = {value for own in dataset[label] for value in own or ()}
    else:
        values = set(dataset.unique(label)) if hasattr(feature, "dtype") else {None}
    if any(isinstance(value, list | dict) or value is None for value in values):
        raise UsageError(
            f"{location}: its column {label} is neither one label for each image nor a list of labels"
        )
    if not values:
        raise UsageError(f"{location} has no label in its column {label}")
    if all(isinstance(value, int) for value in values):
        return tuple(str(value) for value in sorted(values))
    return tuple(sorted(map(str, values)))


def _image_set(
    location: str, dataset: Any, image: str, label: str, classes: tuple[str, ...]
) -> ImageSet:
    import datasets
    from pyarrow import compute

    if isinstance(dataset.features[image], datasets.Image):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    number_of = {name: number for number, name in enumerate(classes)}
    feature = dataset.features[label]
    encoded = hasattr(_one(feature), "names")

    def number(row: int, value: Any) -> int:
        found = (
            (value if isinstance(value, int) else -1) if encoded else number_of.get(str(value), -1)
        )
        if not 0 <= found < len(classes):
            known = (
                f"from 0 to {len(classes) - 1}" if encoded else f"one of {', '.join(classes[:5])}"
            )
            raise UsageError(f"{location}, row {row}: {label} is {value!r} and should be {known}")
        return found

    several = _is_list(feature)
    labels: list[Label] = []
    for row, value in enumerate(dataset[label]):
        if several and value is None:
            raise UsageError(
                f"{location}, row {row}: {label} is None: give a list, an empty one where no class is shown"
            )
        labels.append(
            tuple(sorted({number(row, one) for one in value})) if several else number(row, value)
        )
    table = dataset.with_format("arrow")[:][image]
    content = (
        compute.struct_field(table, "bytes")
        if hasattr(table.type, "num_fields") and table.type.num_fields
        else table
    )
    sizes = tuple(int(size or 0) for size in compute.binary_length(content).to_pylist())
    names = tuple(f"{row:09d}" for row in range(len(dataset)))
    task = MULTI_LABEL if several else SINGLE_LABEL
    return ImageSet(Rows(location, dataset, image), classes, names, tuple(labels), sizes, task=task)
