"""How fast models are beside their peers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One contestant in one precision on one batch, from rounds in turn with the others.

    contestant: `who-how`, such as `timm-openvino`.  milliseconds: of a call, the median; fastest and slowest of the rounds.
    ratio: times as fast as timm eager in fp32 (a training step: as timm's in its precision), the median over rounds.
    difference: largest from timm eager in fp32, over the largest logit.  same_top1: share of images with the same class.
    megabytes: what it took to come up and compute a batch (a training step: beyond weights and optimiser).
    limit_share: of a large matrix product's rate in its precision.  What does not go with a row is None.
    """

    model: str
    contestant: str
    precision: str
    batch: int
    image_size: tuple[int, int]
    milliseconds: float
    fastest: float
    slowest: float
    rounds: int
    images_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float
    difference: float | None = None
    same_top1: float | None = None
    megabytes: float | None = None
    limit_share: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """Time of an image in fp32 as `by` grows: `batch` (at the model's own size) or `image size` (at one batch)."""

    contestant: str
    by: str
    batch: int
    image_size: tuple[int, int]
    tokens: int
    milliseconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """`crossvit bench`: the machine, GFLOP/s of a large matrix product by precision, rows, and what was left out and why."""

    processor: str
    device: str
    threads: int
    cores: int
    versions: dict[str, str]
    limits: dict[str, float]
    rows: tuple[BenchRow, ...]
    growth: tuple[Growth, ...]
    skipped: dict[str, str]
