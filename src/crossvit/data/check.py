"""The cheap look at every image before training starts: can it be decoded, and how large is it?"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from crossvit.data.sources import ImageSet
from crossvit.errors import DataError


@dataclasses.dataclass(frozen=True)
class Findings:
    """`broken`: name -> why it cannot be decoded. `sizes`: (height, width) of every image that can."""

    broken: dict[str, str]
    sizes: list[tuple[int, int]]


def look_at(images: ImageSet, *, progress: Callable[[], object] = lambda: None) -> Findings:
    """Decode every image of `images` whole, in parallel. `progress` is called once an image."""

    def size_or_reason(index: int) -> tuple[int, int] | str:
        try:
            picture = images.read(index)
            return picture.height, picture.width
        except DataError as error:
            return str(error)
        finally:
            progress()

    with ThreadPoolExecutor(max_workers=min(32, (os.cpu_count() or 1) + 2)) as pool:
        found = list(pool.map(size_or_reason, range(len(images))))
    broken = {name: reason for name, reason in zip(images.names, found, strict=True) if isinstance(reason, str)}
    return Findings(broken, [size for size in found if not isinstance(size, str)])
