"""Speed of models and of their peers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One contestant in one precision on one batch, from rounds taken in turn with the others.

    Attributes:
        model: Name of the preset.
        contestant: `who-how`, such as `timm-openvino`.
        precision: fp32 or bf16.
        batch: Images.
        image_size: (height, width) in pixels.
        milliseconds: Median of a call.
        fastest: Fastest round, in milliseconds.
        slowest: Slowest round, in milliseconds.
        rounds: Number of rounds.
        images_per_second: At the median.
        ratio: Speed over timm eager in fp32 (of a training step, over timm's in the same
            precision): median over the rounds.
        ratio_low: Lowest ratio of a round.
        ratio_high: Highest ratio of a round.
        difference: Largest difference from the logits of timm eager in fp32, over the largest
            logit; None for a training step.
        same_top1: Share of images with the same class; None for a training step.
        megabytes: Memory to start and compute a batch (of a training step, beyond weights and
            optimiser); None where it was not measured.
        limit_share: Share of the rate of a large matrix product in the same precision; None where
            it was not measured.
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
    """Milliseconds of an image in fp32 as `by` grows.

    `by` is `batch` (at the model's image size) or `image size` (at one batch).
    """

    contestant: str
    by: str
    batch: int
    image_size: tuple[int, int]
    tokens: int
    milliseconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Result of `crossvit bench`.

    The machine, `limits` (GFLOP/s of a large matrix product by precision), the rows, and what was
    left out with the reason (`skipped`).
    """

    processor: str
    device: str
    threads: int
    cores: int
    versions: dict[str, str]
    limits: dict[str, float]
    rows: tuple[BenchRow, ...]
    growth: tuple[Growth, ...]
    skipped: dict[str, str]
