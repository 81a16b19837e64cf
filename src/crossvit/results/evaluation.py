"""Metrics of a model on labelled images, with their uncertainty."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from crossvit.results.run_record import SINGLE_LABEL


@dataclasses.dataclass(frozen=True)
class BranchScore:
    """Accuracy of one branch's head (0 to 1), a column of the paper's Table 6; `patch` in pixels.

    Source: docs/paper.md, Ablations.
    """

    name: str
    patch: int
    top1: float


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """Support `n`, precision, recall and F1 of one class.

    The last three are 0 to 1, and 0 where the class was neither predicted nor present.
    """

    label: str
    n: int
    precision: float
    recall: float
    f1: float


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A wrong prediction.

    Attributes:
        image: Name of the image.
        label: True class.
        predicted: Predicted class.
        probability: Confidence, 0 to 1.
        picture: The image as PNG bytes.
        map: Relevance laid over the image, as PNG bytes.
    """

    image: str
    label: str
    predicted: str
    probability: float
    picture: bytes = dataclasses.field(default=b"", repr=False)
    map: bytes = dataclasses.field(default=b"", repr=False)


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
    """Whether a confidence of 80 % means 80 % correct.

    Attributes:
        ece: Expected calibration error, 0 to 1, of the logits divided by `temperature`.
        temperature: The run's.
        bins: Reliability diagram.
        suggested_temperature: The one of least cross-entropy on these images.
        suggested_ece: ECE with it, cross-fitted: the images are divided into two parts, and each is
            measured with the temperature fitted on the other.
        replaced: The calibration before `--calibrate` stored this temperature in the run.
    """

    ece: float
    temperature: float
    bins: tuple[ReliabilityBin, ...]
    suggested_temperature: float
    suggested_ece: float
    replaced: Calibration | None = None

    @property
    def stored(self) -> bool:
        """Whether `temperature` was fitted to these images and stored in the run."""
        return self.replaced is not None


@dataclasses.dataclass(frozen=True)
class RiskPoint:
    """Answers with a confidence of at least `threshold`.

    Attributes:
        threshold: Confidence, 0 to 1.
        coverage: Share of the images with such an answer, 0 to 1.
        risk: Share of wrong answers among these, 0 to 1.
    """

    threshold: float
    coverage: float
    risk: float


@dataclasses.dataclass(frozen=True)
class Selective:
    """Risk against coverage, for abstention.

    Attributes:
        points: The curve.
        area: Area under it (AURC); lower is better.
        target_risk: Share of wrong answers to stay below, 0 to 1.
        suggested: The point of lowest confidence at which at most `target_risk` of the answers are
            wrong; None where there is none.
    """

    points: tuple[RiskPoint, ...]
    area: float
    target_risk: float
    suggested: RiskPoint | None


@dataclasses.dataclass(frozen=True)
class LabelScore:
    """Results of one class of a multi-label model, 0 to 1.

    Support `n`, average precision, and precision, recall and F1 at `threshold`.
    """

    label: str
    n: int
    average_precision: float
    threshold: float
    precision: float
    recall: float
    f1: float


@dataclasses.dataclass(frozen=True)
class MultiLabel:
    """Results of a multi-label model, 0 to 1.

    Attributes:
        map: Mean average precision over the classes that occur.
        exact: Share of images whose whole set of classes is correct at the thresholds.
        micro_f1: F1 over all decisions; the mean over the classes is `Evaluation.macro_f1`.
        classes: Results by class.
    """

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
    """Accuracy (0 to 1) on the same images scaled down to a shorter side of `pixels` beforehand."""

    pixels: int
    top1: float


@dataclasses.dataclass(frozen=True)
class Robustness:
    """Accuracy on corrupted and on scaled-down images, 0 to 1.

    Attributes:
        corruptions: By corruption.
        sizes: By shorter side.
        mean: Over corruptions and severities; None without corruptions.
        n: Number of images; possibly fewer than were evaluated.
        unspoilt: Accuracy on the same images clean.
    """

    corruptions: tuple[CorruptionScore, ...] = ()
    sizes: tuple[SizeScore, ...] = ()
    mean: float | None = None
    n: int = 0
    unspoilt: float = 0.0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics of a run on labelled images.

    Attributes:
        top1: Accuracy, 0 to 1. For a multi-label model, the share of images whose most probable
            class is one of theirs.
        n: Number of images.
        run: The model, as it was given.
        data: The data, as they were given.
        split: Part of the data.
        top5: Share of images whose class is among the five most probable, 0 to 1.
        macro_f1: Mean F1 over the classes that occur, 0 to 1.
        loss: Mean cross-entropy in nats; for a multi-label model, mean binary cross-entropy.
        branches: Accuracy of each branch's head.
        classes: Results by class.
        confusion: Counts (classes, classes), rows true, columns predicted; empty for a multi-label
            model.
        mistakes: The most confident first.
        task: Single-label or multi-label.
        intervals: 95 % intervals of top1, top5, macro_f1 (and map).
        calibration: None for a multi-label model.
        selective: Risk against coverage; None for a multi-label model.
        multi_label: None for a single-label model.
        robustness: None where it was not measured.
        seconds: Duration.
        precision: fp32 or bf16.
        engine: What computed the logits.
        images: Names, left out of JSON.
        correct: Whether the prediction for each of `images` is correct (for a multi-label model:
            its whole set of classes), as a paired test of two runs needs; left out of JSON.
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
    """Two runs on the same `n` images.

    Attributes:
        runs: First and second run.
        n: Number of images.
        accuracies: Of each, 0 to 1.
        only_first: Number of images that only the first predicts correctly.
        only_second: Number of images that only the second predicts correctly.
        difference: Accuracy of the second minus the first.
        interval: 95 % interval of the difference.
        p: p value of McNemar's exact test.
    """

    runs: tuple[str, str]
    n: int
    accuracies: tuple[float, float]
    only_first: int
    only_second: int
    difference: float
    interval: Interval
    p: float
