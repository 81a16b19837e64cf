"""A look at every image: can it be decoded, how large is it, is it there twice, and is it on both sides of the split?

`look_at` looks at the images of one part, `compare` at what was seen of all parts together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from crossvit.data.images import Data, ImageSet
from crossvit.data.multichannel import kept_whole
from crossvit.data.preprocess import ImageSource, Preprocessing, decode
from crossvit.data.shards import torn_shards
from crossvit.errors import DataError
from crossvit.results import BrokenImage, DataCheck, ImagePair, PartCheck

NEAR = 4  # of the 64 bits of a perceptual hash in which near-identical images differ at most; see dev/LOG.md
BANDS = (
    NEAR + 1
)  # a hash is cut into so many bands: two that differ in NEAR bits have one band in common
PAIRS_KEPT = 200  # of each kind, those across a split and with other labels first
PICTURE_SIDE = 160  # pixels, in the report
NO_LABEL = "no label"  # of a multi-label image that shows none of the classes
THREADS = min(32, (os.cpu_count() or 1) + 2)


class Look(NamedTuple):
    """What was seen of one image. mode: Pillow's word for how its pixels are stored, or such as `5 x uint16` where it has none.
    digest: of the file, 16 bytes."""

    size: tuple[int, int]  # height, width
    mode: str
    digest: bytes
    near: int  # perceptual hash, 0 where it was not asked for


@dataclasses.dataclass(frozen=True)
class Findings:
    """Of one part. `broken`: name -> why it cannot be decoded. `looks`: name -> what was seen of every image that can."""

    broken: dict[str, str]
    looks: dict[str, Look]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [look.size for look in self.looks.values()]


def look_at(
    images: ImageSet,
    *,
    near: bool = False,
    preprocessing: Preprocessing | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Findings:
    """Decode every image of `images` whole, in parallel. `near` computes perceptual hashes too. preprocessing: an image that it
    cannot read, for its channels, is a broken one. `progress` is called once an image."""

    def seen(index: int) -> Look | str:
        try:
            return _look(images, index, near=near, preprocessing=preprocessing)
        except DataError as error:
            return str(error)
        finally:
            progress()

    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        found = dict(zip(images.names, pool.map(seen, range(len(images))), strict=True))
    return Findings(
        {name: reason for name, reason in found.items() if isinstance(reason, str)},
        {name: look for name, look in found.items() if isinstance(look, Look)},
    )


def _look(images: ImageSet, index: int, *, near: bool, preprocessing: Preprocessing | None) -> Look:
    picture = images.read(index) if preprocessing is None else images.picture(index, preprocessing)
    content, mode = _content_and_mode(images.source(index))
    digest = hashlib.sha256(content).digest()[:16]
    size = (
        (picture.height, picture.width) if isinstance(picture, Image.Image) else picture.shape[:2]
    )
    bits = (
        imagehash.phash(
            picture if isinstance(picture, Image.Image) else images.read(index)
        ).hash.flatten()
        if near
        else np.zeros(64, dtype=bool)
    )
    return Look(size, mode, digest, int.from_bytes(np.packbits(bits).tobytes(), "big"))


def _content_and_mode(source: ImageSource) -> tuple[bytes, str]:
    """Of an image that can be decoded."""
    if isinstance(source, np.ndarray):
        return source.tobytes(), Image.fromarray(source).mode
    assert isinstance(source, str | bytes)
    content = Path(source).read_bytes() if isinstance(source, str) else source
    with (
        contextlib.suppress(UnidentifiedImageError),
        Image.open(io.BytesIO(content)) as image,
    ):  # reads the header alone
        return content, image.mode if kept_whole(image) else f"{image.mode} of a TIFF that has more"
    found = decode(content)
    assert isinstance(found, np.ndarray)
    return content, f"{found.shape[2]} x {found.dtype}"


# ---- pairs


class Where(NamedTuple):
    """An image: its part and its position in it."""

    part: str
    position: int


def identical(data: Data, looks: Mapping[str, Findings]) -> list[tuple[Where, Where]]:
    """Every pair of images whose files are the same bytes; of many that are the same, each with the first."""
    groups: defaultdict[bytes, list[Where]] = defaultdict(list)
    for where, look in _seen(data, looks):
        groups[look.digest].append(where)
    return [(group[0], other) for group in groups.values() for other in group[1:]]


def near_identical(data: Data, looks: Mapping[str, Findings]) -> list[tuple[Where, Where, int]]:
    """Every pair of images, not of the same bytes, whose perceptual hashes differ in at most NEAR of 64 bits, and in how many."""
    seen = list(_seen(data, looks))
    hashes = np.array([look.near for _, look in seen], dtype=np.uint64)
    pairs: set[tuple[int, int]] = set()
    edges = [round(64 * band / BANDS) for band in range(BANDS + 1)]
    for low, high in itertools.pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        pairs |= {pair for bucket in _buckets(band) for pair in _close(hashes, bucket)}
    found = []
    for one, other in sorted(pairs):
        if seen[one][1].digest != seen[other][1].digest:
            found.append(
                (seen[one][0], seen[other][0], int(np.bitwise_count(hashes[one] ^ hashes[other])))
            )
    return found


def _seen(data: Data, looks: Mapping[str, Findings]) -> Iterator[tuple[Where, Look]]:
    for part, images in data.parts.items():
        for index, name in enumerate(images.names):
            if name in looks[part].looks:
                yield Where(part, index), looks[part].looks[name]


def _buckets(band: NDArray[np.uint64]) -> Iterator[NDArray[np.intp]]:
    """Positions whose values in `band` are equal, two or more together."""
    order = np.argsort(band, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(band[order]) != 0])
    for bucket in np.split(order, starts[1:]):
        if len(bucket) > 1:
            yield bucket


def _close(hashes: NDArray[np.uint64], bucket: NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    own = hashes[bucket]
    for position in range(len(bucket) - 1):
        apart = np.bitwise_count(own[position] ^ own[position + 1 :])
        for other in np.flatnonzero(apart <= NEAR).tolist():
            first, second = sorted((int(bucket[position]), int(bucket[position + 1 + other])))
            yield first, second


# ---- the whole


def check(
    data: Data,
    *,
    progress: Callable[[int, int], object] = lambda done, total: None,
    pictures: bool = False,
) -> DataCheck:
    """Everything that `crossvit data check` says of `data`. `pictures` puts small copies into the pairs, for the page."""
    total = sum(len(images) for images in data.parts.values())
    seen = itertools.count(1)  # a whole step in CPython: the images are looked at in threads
    looks = {
        part: look_at(images, near=True, progress=lambda: progress(next(seen), total))
        for part, images in data.parts.items()
    }
    same = [(one, other, 0) for one, other in identical(data, looks)]
    near = near_identical(data, looks)
    counts: Counter[str] = Counter()
    for part, images in data.parts.items():
        counts.update(images.without(looks[part].broken).counts())
    present = [count for count in counts.values() if count]
    return DataCheck(
        data=data.location,
        n=total,
        parts=tuple(_part(part, images, looks[part]) for part, images in data.parts.items()),
        imbalance=max(present) / min(present) if present else 1.0,
        modes=dict(
            Counter(
                look.mode for found in looks.values() for look in found.looks.values()
            ).most_common()
        ),
        broken=(
            *(
                BrokenImage(part, name, reason)
                for part, found in looks.items()
                for name, reason in found.broken.items()
            ),
            *(
                BrokenImage(part, *torn)
                for part, images in data.parts.items()
                for torn in torn_shards(images.store)
            ),
        ),
        identical_count=len(same),
        near_count=len(near),
        leak_count=sum(one.part != other.part for one, other, _ in (*same, *near)),
        conflict_count=sum(_label(data, one) != _label(data, other) for one, other, _ in same),
        near_bits=NEAR,
        identical=_shown(data, same, pictures=pictures),
        near=_shown(data, near, pictures=pictures),
        notes=data.notes,
    )


def warnings_of(
    data: Data, looks: Mapping[str, Findings], parts: Mapping[str, ImageSet]
) -> list[str]:
    """What `train` says of the bytes it has seen anyway: images in both `parts` (of a split), conflicting labels."""
    side = {
        images.path(index): part for part, images in parts.items() for index in range(len(images))
    }
    leaks, conflicts = [], []
    for one, other in identical(data, looks):
        sides = [side.get(_path(data, where)) for where in (one, other)]
        leaks += [(one, other)] * (sides[0] != sides[1])
        conflicts += [(one, other)] * (_label(data, one) != _label(data, other))
    lines = []
    for pairs, what in (
        (leaks, "images are on both sides of the split"),
        (conflicts, "images are filed under two classes"),
    ):
        if pairs:
            named = " and ".join(_path(data, where) for where in pairs[0])
            lines.append(
                f"{len(pairs)} {what}, such as {named}: see `crossvit data check {data.location}`"
            )
    return lines


def _part(part: str, images: ImageSet, found: Findings) -> PartCheck:
    heights, widths = zip(*found.sizes, strict=True) if found.sizes else ((0,), (0,))
    return PartCheck(
        part,
        len(images),
        images.counts(),
        (min(heights), min(widths)),
        (round(statistics.median(heights)), round(statistics.median(widths))),
        (max(heights), max(widths)),
    )


def _shown(
    data: Data, pairs: list[tuple[Where, Where, int]], *, pictures: bool
) -> tuple[ImagePair, ...]:
    """The first PAIRS_KEPT: those across parts and with other labels first, then the nearest."""
    ranked = sorted(
        pairs,
        key=lambda pair: (
            pair[0].part == pair[1].part,
            _label(data, pair[0]) == _label(data, pair[1]),
            pair[2],
        ),
    )
    return tuple(
        ImagePair(
            images=(_path(data, one), _path(data, other)),
            parts=(one.part, other.part),
            labels=(_label(data, one), _label(data, other)),
            bits=bits,
            first_picture=_picture(data, one) if pictures else b"",
            second_picture=_picture(data, other) if pictures else b"",
        )
        for one, other, bits in ranked[:PAIRS_KEPT]
    )


def _label(data: Data, where: Where) -> str:
    return data.parts[where.part].said(where.position) or NO_LABEL


def _path(data: Data, where: Where) -> str:
    return data.parts[where.part].path(where.position)


def _picture(data: Data, where: Where) -> bytes:
    image = data.parts[where.part].read(where.position)
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()
