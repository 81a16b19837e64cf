"""Metrics of a model on labelled images, with their uncertainty."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from crossvit.results.run_record import SINGLE_LABEL


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
    """A wrong prediction: the true and the predicted class, the confidence (0 to 1), and the picture as PNG bytes."""

    image: str
    label: str
    predicted: str
    probability: float
    picture: bytes = dataclasses.field(default=b"", repr=False)
    map: bytes = dataclasses.field(
        default=b"", repr=False
    )  # what it looked at, laid over the picture, as PNG bytes


@dataclasses.dataclass(frozen=True)
class Interval:
    """95 % bootstrap interval of a metric over the images, from low to high."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class ReliabilityBin:
    """Images with a confidence from low to high: number, mean confidence and accuracy (0 to 1)."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Whether a confidence of 80 % means 80 % correct. ece: expected calibration error, 0 to 1, of logits divided by `temperature`.

    suggested_temperature: the one that makes the cross-entropy of these images least; suggested_ece: the error with it, each
    image under the temperature fitted to the others (two halves), so that it does not flatter. replaced: what there was
    before `--calibrate` stored this temperature in the run.
    """

    ece: float
    temperature: float
    bins: tuple[ReliabilityBin, ...]
    suggested_temperature: float
    suggested_ece: float
    replaced: Calibration | None = None

    @property
    def stored(self) -> bool:
        """Whether `temperature` was fitted to these images and is the run's own now."""
        return self.replaced is not None


@dataclasses.dataclass(frozen=True)
class RiskPoint:
    """Answers with a confidence of `threshold` or more: their share of the images, and the share of them that is wrong."""

    threshold: float
    coverage: float
    risk: float


@dataclasses.dataclass(frozen=True)
class Selective:
    """Risk against coverage. area: under the curve, lower is better. threshold: suggested, the lowest confidence from which at
    most `target_risk` of the answers are wrong, with the coverage and risk it has here; None where none reaches it."""

    points: tuple[RiskPoint, ...]
    area: float
    target_risk: float
    suggested: RiskPoint | None


@dataclasses.dataclass(frozen=True)
class LabelScore:
    """One class of a multi-label model: images that have it, average precision, and at `threshold` precision, recall and F1."""

    label: str
    n: int
    average_precision: float
    threshold: float
    precision: float
    recall: float
    f1: float


@dataclasses.dataclass(frozen=True)
class MultiLabel:
    """Several classes an image. map: mean average precision over classes that occur. exact: share of images whose set of
    classes is right at the thresholds. micro_f1: over all decisions; the mean over classes is `Evaluation.macro_f1`."""

    map: float
    exact: float
    micro_f1: float
    classes: tuple[LabelScore, ...]


@dataclasses.dataclass(frozen=True)
class CorruptionScore:
    """Accuracy (0 to 1) on the same images with one corruption, at severities 1 to 5."""

    name: str
    top1: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class SizeScore:
    """Accuracy (0 to 1) on the same images scaled down to a shorter side of so many pixels before the preprocessing."""

    pixels: int
    top1: float


@dataclasses.dataclass(frozen=True)
class Robustness:
    """Accuracy on corrupted images, and on the same images clean (`unspoilt`). n: images, of which there may be fewer than were evaluated.
    mean: over corruptions and severities, None where none were asked for."""

    corruptions: tuple[CorruptionScore, ...] = ()
    sizes: tuple[SizeScore, ...] = ()
    mean: float | None = None
    n: int = 0
    unspoilt: float = 0.0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Accuracy of a run on labelled images. top1, top5, macro_f1: 0 to 1; loss: mean cross-entropy in nats.

    confusion: (classes, classes) counts, rows true, columns predicted. mistakes: the most confident first. intervals: of top1, top5,
    macro_f1 (and map). Of a multi-label model top1 is the share of images whose most likely class is one of theirs, loss the mean
    binary cross-entropy, and confusion, calibration and selective are left out. correct: of each image, in the order of
    `images`, whether its prediction is correct (of a multi-label model: its whole set of classes), what a paired test of two runs
    needs; left out of JSON.
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
    task: str = SINGLE_LABEL
    intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)
    calibration: Calibration | None = None
    selective: Selective | None = None
    multi_label: MultiLabel | None = None
    robustness: Robustness | None = None
    seconds: float = 0.0
    precision: str = "fp32"
    engine: str = "torch"
    images: tuple[str, ...] = dataclasses.field(default=(), repr=False, metadata={"json": False})
    correct: tuple[bool, ...] = dataclasses.field(default=(), repr=False, metadata={"json": False})


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs on the same n images. accuracies: 0 to 1, of each. only_first, only_second: images that one of them alone gets
    right. difference: second minus first, with its 95 % interval. p: of McNemar's exact test, the chance of so uneven a pair of
    counts if the two were equally good."""

    runs: tuple[str, str]
    n: int
    accuracies: tuple[float, float]
    only_first: int
    only_second: int
    difference: float
    interval: Interval
    p: float
