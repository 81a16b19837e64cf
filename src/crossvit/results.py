"""The records that verbs return: frozen, plain, and the same for people (`crossvit ...`) and programs (`--json`).

Standard library and NumPy only; pictures are kept as encoded bytes and left out of JSON.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_json(record: Any) -> Any:
    """A record, nested as it may be, as dicts, lists, numbers and strings in the order of its fields. Bytes are left out."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        fields = ((field.name, getattr(record, field.name)) for field in dataclasses.fields(record))
        return {name: to_json(value) for name, value in fields if not isinstance(value, bytes)}
    if isinstance(record, np.ndarray):
        return record.tolist()
    if isinstance(record, np.generic):
        return record.item()
    if isinstance(record, dict):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_json(value) for value in record]
    return record


@dataclasses.dataclass(frozen=True)
class Label:
    """A class and its probability, 0 to 1."""

    label: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says of one image: the surest classes first; or why there is no answer, in `error`."""

    image: str
    top: tuple[Label, ...] = ()
    error: str | None = None

    @property
    def label(self) -> str | None:
        """The surest class, None if the image could not be read."""
        return self.top[0].label if self.top else None


@dataclasses.dataclass(frozen=True)
class BranchScore:
    """One branch alone: its patch in pixels and the accuracy of its own head, 0 to 1 (the paper's Table 6 columns)."""

    name: str
    patch: int
    top1: float


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """One class: images, precision, recall and F1, 0 to 1 (0 where nothing was predicted or present)."""

    label: str
    n: int
    precision: float
    recall: float
    f1: float


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A wrong answer: the true and the predicted class, how sure the model was (0 to 1), and the picture as PNG bytes."""

    image: str
    label: str
    predicted: str
    probability: float
    picture: bytes = dataclasses.field(default=b"", repr=False)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Accuracy of a run on labelled images. top1, top5, macro_f1: 0 to 1; loss: mean cross-entropy in nats.

    confusion: (classes, classes) counts, rows true, columns predicted. mistakes: the surest first.
    """

    top1: float
    n: int
    run: str
    data: str
    split: str
    top5: float
    macro_f1: float
    loss: float
    branches: tuple[BranchScore, ...]
    classes: tuple[ClassScore, ...]
    confusion: NDArray[np.int64]
    mistakes: tuple[Mistake, ...] = ()


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One line of a run's log. Accuracies are 0 to 1, `lr` is the last step's, `seconds` are of training alone, `skipped` counts
    steps whose loss or gradient was not finite."""

    epoch: int
    step: int
    loss: float
    train_top1: float
    val_top1: float
    val_loss: float
    lr: float
    seconds: float
    images_per_second: float
    skipped: int = 0


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """A finished run: where it is, its record (`run.json`), its epochs and its evaluation on the held-out images, which is
    None for a run that had finished before it was asked for."""

    run: str
    top1: float
    n: int
    seconds: float
    record: dict[str, Any]
    epochs: tuple[Epoch, ...]
    evaluation: Evaluation | None


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What one step of everything shows of a run: its time in seconds and its memory in bytes (the process's peak on a CPU,
    torch's on a GPU). `loss` is of the step."""

    model: str
    steps: int
    loss: float
    seconds_a_step: float
    evaluation_seconds: float
    checkpoint_seconds: float
    checkpoint_bytes: int
    total_seconds: float
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class ShardSummary:
    """What `crossvit data shard` wrote: images in tar files, and the bytes of those."""

    location: str
    images: int
    shards: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class PartCheck:
    """One part of the data: its images, how many of each class, and their smallest, median and largest (height, width)."""

    part: str
    n: int
    classes: dict[str, int]
    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class BrokenImage:
    """An image that cannot be decoded, and why."""

    part: str
    image: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ImagePair:
    """Two images that are the same, or nearly: `bits` of 64 in which their perceptual hashes differ."""

    images: tuple[str, str]
    parts: tuple[str, str]
    labels: tuple[str, str]
    bits: int
    first_picture: bytes = b""  # small JPEGs
    second_picture: bytes = b""

    @property
    def leak(self) -> bool:
        """Whether they stand on both sides of a split."""
        return self.parts[0] != self.parts[1]

    @property
    def conflict(self) -> bool:
        return self.labels[0] != self.labels[1]


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """What `crossvit data check` found. imbalance: images of the largest class over those of the smallest. Counts are of all
    pairs; `identical` and `near` list the first ones, leaks and conflicts before others. `leak_count` is of pairs of either
    kind across parts, `conflict_count` of identical images with different labels."""

    data: str
    n: int
    parts: tuple[PartCheck, ...]
    imbalance: float
    modes: dict[str, int]
    broken: tuple[BrokenImage, ...]
    identical_count: int
    near_count: int
    leak_count: int
    conflict_count: int
    near_bits: int  # in which two nearly identical images differ at most
    identical: tuple[ImagePair, ...]
    near: tuple[ImagePair, ...]
    notes: tuple[str, ...]
