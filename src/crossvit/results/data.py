"""Results of checking and of sharding data."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ShardSummary:
    """What `crossvit data shard` wrote: images in tar files, and the bytes of those."""

    location: str
    images: int
    shards: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class PartCheck:
    """One part of the data.

    Number of images in all and by class, and their smallest, median and largest (height, width).
    """

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
    """Two identical images or near-duplicates.

    `bits` of the 64 of their perceptual hashes differ.
    """

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
    """Result of `crossvit data check`.

    Attributes:
        data: The data, as they were given.
        n: Number of images.
        parts: Each part of the data.
        imbalance: Images of the largest class over those of the smallest.
        modes: Number of images by Pillow's mode.
        broken: Images that cannot be decoded.
        identical_count: Number of pairs of identical images.
        near_count: Number of pairs of near-duplicates.
        leak_count: Number of pairs of either kind across parts.
        conflict_count: Number of pairs of identical images with different labels.
        near_bits: Most bits in which the hashes of near-duplicates differ.
        identical: The first such pairs, leaks and conflicts before others.
        near: The first such pairs, leaks before others.
        notes: What was left out or skipped.
    """

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
    near_bits: int
    identical: tuple[ImagePair, ...]
    near: tuple[ImagePair, ...]
    notes: tuple[str, ...]
