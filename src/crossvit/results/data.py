"""What is in some data, and what is wrong with it."""

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
