"""The records that verbs return: frozen, plain, and the same for people (`crossvit ...`) and programs (`--json`).

Standard library and NumPy only; pictures are kept as encoded bytes and left out of JSON.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

SINGLE_LABEL, MULTI_LABEL = "single-label", "multi-label"  # one class an image, or any number of them


def to_json(record: Any) -> Any:
    """A record, nested as it may be, as dicts, lists, numbers and strings in the order of its fields. Bytes are left out."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        shown = (field for field in dataclasses.fields(record) if field.metadata.get("json", True))
        fields = ((field.name, getattr(record, field.name)) for field in shown)
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


def branch_names(count: int) -> list[str]:
    """S and L, the paper's names for its two branches; numbers otherwise."""
    return ["S", "L"] if count == 2 else [str(index) for index in range(count)]


@dataclasses.dataclass(frozen=True)
class Label:
    """A class and its probability, 0 to 1."""

    label: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says of one image, or why there is no answer, in `error`.

    top: the surest classes first.  labels: the answer: the surest class; of a multi-label model every class at or above its
    threshold, the surest first; empty if the image could not be read or the model `abstained`.
    """

    image: str
    top: tuple[Label, ...] = ()
    error: str | None = None
    labels: tuple[Label, ...] = ()
    abstained: bool = False

    @property
    def label(self) -> str | None:
        """The surest class of the answer, None where there is none."""
        return self.labels[0].label if self.labels else None


@dataclasses.dataclass(frozen=True)
class BatchPrediction:
    """What `crossvit predict --out` wrote: `n` results, `failed` of them errors and `abstained` without an answer. `skipped` were
    there already; the others took `seconds`."""

    run: str
    out: str
    n: int
    failed: int
    abstained: int
    skipped: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return (self.n - self.skipped) / self.seconds if self.seconds else 0.0


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
    map: bytes = dataclasses.field(default=b"", repr=False)  # what it looked at, laid over the picture, as PNG bytes


@dataclasses.dataclass(frozen=True)
class Interval:
    """What a figure would be on other images like these: 95 % of bootstrap resamplings of the images lie from low to high."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class ReliabilityBin:
    """Images answered with a confidence from low to high: how many, how sure on average, and how many of them right (0 to 1)."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Whether 80 % sure means 80 % right. ece: expected calibration error, 0 to 1, of logits divided by `temperature`.

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
    """Answering only where the model is at least `threshold` sure: the share answered, and the share of those that is wrong."""

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
    """Accuracy on images made worse, and `unspoilt`: as they are. n: images, of which there may be fewer than were evaluated.
    mean: over corruptions and severities, None where none were asked for."""

    corruptions: tuple[CorruptionScore, ...] = ()
    sizes: tuple[SizeScore, ...] = ()
    mean: float | None = None
    n: int = 0
    unspoilt: float = 0.0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Accuracy of a run on labelled images. top1, top5, macro_f1: 0 to 1; loss: mean cross-entropy in nats.

    confusion: (classes, classes) counts, rows true, columns predicted. mistakes: the surest first. intervals: of top1, top5,
    macro_f1 (and map). Of a multi-label model top1 is the share of images whose surest class is one of theirs, loss the mean
    binary cross-entropy, and confusion, calibration and selective are left out. correct: of each image, in the order of
    `images`, whether its answer is right (of a multi-label model: its whole set of classes), what a paired test of two runs
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


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One line of a run's log. Accuracies are 0 to 1, `lr` is the last step's, `seconds` are of training alone, `skipped` counts
    steps whose loss or gradient was not finite. val_map: mean average precision of several labels an image; None of one."""

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
    val_map: float | None = None


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
    """What one step of everything shows of a run: its time in seconds and its memory in bytes (on a CPU the peaks of all its
    processes, those that load images too, added up; on a GPU torch's, of the process with the most). `loss` is of the step;
    evaluation_seconds is of all held-out images, from a batch of them; checkpoints is how many the run writes."""

    model: str
    steps: int
    loss: float
    seconds_a_step: float
    evaluation_seconds: float
    checkpoint_seconds: float
    checkpoint_bytes: int
    total_seconds: float
    peak_bytes: int
    checkpoints: int = 0
    processes: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledRun:
    """A run on so many GPUs, as arithmetic has it. batch_on_each: images of a step on one GPU, taken in `accumulate` parts;
    images_per_second: what has to be loaded, in all and by each process; hours: training and evaluation."""

    gpus: int
    batch_size: int
    batch_on_each: int
    accumulate: int
    lr: float
    steps_an_epoch: int
    steps: int
    warmup_steps: int
    images_per_second: float
    images_per_second_on_each: float
    hours: float


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


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """One of several runs: a short name that no other has, what it costs (parameters, and multiply-accumulates of one image as it
    computes them), the seconds it was trained for, and how it did. record (`run.json`) and epochs are left out of JSON."""

    name: str
    run: str
    model: str
    parameters: int
    macs: int
    seconds: float
    evaluation: Evaluation
    record: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, metadata={"json": False})
    epochs: tuple[Epoch, ...] = dataclasses.field(default=(), repr=False, metadata={"json": False})


@dataclasses.dataclass(frozen=True)
class RunsCompared:
    """Runs on the same n images. tests: of each run but the first against the first. differing: of each field of the recipe that
    is not the same in all, its values in the order of `runs` (None where a run has no such field)."""

    data: str
    split: str
    n: int
    runs: tuple[ComparedRun, ...]
    tests: tuple[Comparison, ...]
    differing: dict[str, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class TokenMap:
    """How much of something each patch of one grid has: (heads, rows, columns), or (1, rows, columns) where heads are joined.

    kind: `attention` (what the class token of branch `reader` attended to in its own block; the mean over its patches in a model
    without class tokens), `cross` (what it read from another branch in a fusion), `rollout` and `gradient` (what its answer was
    read from, through all stages; gradient for one class), `difference` (its gradient map less the mean of the others').
    reader: a branch, or `all` for the mean of their logits. on: the branch whose grid it is, or `all` for every grid's map
    brought to the finest one. share: of what was read, the part that lies on these patches, 0 to 1: the rest is on class tokens
    and on other grids (for gradient on other grids alone). stage, block: from 1, None for what goes through all of them.

    Values of attention, cross, rollout and gradient are shares of what was read; on `all` they are times the even share (their
    mean is 1), and a difference is one of those.
    """

    kind: str
    reader: str
    on: str
    share: float
    values: NDArray[np.float32] = dataclasses.field(repr=False, metadata={"json": False})
    stage: int | None = None
    block: int | None = None

    @property
    def name(self) -> str:
        """What it is called among the arrays of an explanation: `attention.L.on-L.stage3.block4`."""
        place = "" if self.stage is None else f".stage{self.stage}.block{self.block}"
        return f"{self.kind}.{self.reader}.on-{self.on}{place}"


@dataclasses.dataclass(frozen=True)
class BranchAnswer:
    """One branch alone: its patch in pixels, its grid (rows, columns), its own answer, and what it gives the explained class.

    from_other: of what it read (rollout), the share that came from other branches' patches.
    """

    name: str
    patch: int
    grid: tuple[int, int]
    top: Label
    explained: Label
    from_other: float


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What an answer was read from; or why there is none, in `error`.

    top: the model's answer. explained: the class the gradient maps are for. disagreement: how far apart the branches' gradient
    maps are, 0 (the same) to 1 (on different patches): the share of a branch's that would have to be moved to make it the mean
    of the others', on average over the branches. size: (width, height) of the picture, upright; seen: (left, top, right,
    bottom), the part of it that the model saw, in its pixels. photo: the picture, made smaller, (H, W, 3) uint8. features: of
    each branch the last encoder's patch tokens, (D, rows, columns). picture, arrays: the files that were written.
    """

    image: str
    top: Label | None = None
    explained: Label | None = None
    branches: tuple[BranchAnswer, ...] = ()
    disagreement: float | None = None
    size: tuple[int, int] | None = None
    seen: tuple[float, float, float, float] | None = None
    maps: tuple[TokenMap, ...] = dataclasses.field(default=(), repr=False)
    photo: NDArray[np.uint8] | None = dataclasses.field(default=None, repr=False, metadata={"json": False})
    features: tuple[NDArray[np.float32], ...] = dataclasses.field(default=(), repr=False, metadata={"json": False})
    picture: str | None = None
    arrays: str | None = None
    features_picture: str | None = None
    error: str | None = None

    def select(self, kind: str, *, reader: str | None = None, on: str | None = None, stage: int | None = None) -> list[TokenMap]:
        """The maps of one kind, in the order of stages and blocks."""
        asked = {"reader": reader, "on": on, "stage": stage}
        given = {name: value for name, value in asked.items() if value is not None}
        return [one for one in self.maps if one.kind == kind and all(getattr(one, name) == given[name] for name in given)]


@dataclasses.dataclass(frozen=True)
class Curve:
    """The mean probability of the class (0 to 1) at each share of changed cells, its intervals and the area under it."""

    mean: tuple[float, ...]
    intervals: tuple[Interval, ...]
    area: float


@dataclasses.dataclass(frozen=True)
class MapScore:
    """How well one kind of map says what the answer hangs on.

    deletion: the most relevant cells taken away first; the lower the better. insertion: put back first; the higher the better.
    deletion_gain, insertion_gain: by how much the area is better than that of random maps on the same images (positive is
    better), with their 95 % intervals. verdict: `better` where that lies above zero, `worse` where below, else `no different`.
    """

    kind: str
    deletion: Curve
    insertion: Curve
    deletion_gain: float
    deletion_gain_interval: Interval
    insertion_gain: float
    insertion_gain_interval: Interval
    deletion_verdict: str
    insertion_verdict: str


@dataclasses.dataclass(frozen=True)
class Faithfulness:
    """Deletion and insertion of cells of the finest grid, for each kind of map, on `n` images; `fill` stands where one is away.

    shares: of cells changed, the places of the curves. intact, emptied: mean probability of the class (the model's own answer on
    the whole picture) with every cell there and with none. scores: every kind of map, then the controls.
    """

    run: str
    data: str
    split: str
    n: int
    fill: str
    grid: tuple[int, int]
    shares: tuple[float, ...]
    intact: float
    emptied: float
    scores: tuple[MapScore, ...]
