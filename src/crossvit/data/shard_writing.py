"""Writing tar shards: every image as it is, in a shuffled order, and a manifest of where it lies. `shards.py` says what for, and
reads them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import Image

from crossvit.data.images import Data, ImageSet, Label
from crossvit.data.multichannel import NUMPY_MAGIC, TIFF_MAGICS
from crossvit.data.shards import FORMAT, MANIFEST, filesystem
from crossvit.errors import DataError, UsageError
from crossvit.results import MULTI_LABEL, ShardSummary

SHARD_BYTES = (
    256 * 2**20
)  # webdataset's usual size is 0.1 to 1 GB; a shard is the unit of copying, not of reading
SHUFFLE_SEED = 0  # images are written in a shuffled order, so that readers that only stream see every class early


def write_shards(
    data: Data,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> ShardSummary:
    """Write every image of `data` into tar shards of about `shard_bytes` below `out`, the files as they are, then the manifest.

    UsageError where `out` holds something and not `overwrite`. Without its manifest, which comes last, a folder of shards that
    was begun is nothing.
    """
    location = str(out).rstrip("/")
    files, root = filesystem(location)
    if _within(location, data):
        raise UsageError(
            f"{location} lies inside the images that are to be written: choose another place"
        )
    with _writing(location):
        there = files.ls(root, detail=False) if files.exists(root) else []
        ours = [name for name in there if name.endswith((".tar", ".partial", f"/{MANIFEST}"))]
        if there and not overwrite:
            raise UsageError(
                f"{location} is not empty: choose another place, or add --overwrite to replace the shards in it"
            )
        if len(ours) < len(there):
            raise UsageError(f"{location} holds other files than shards: choose another place")
        for name in ours:
            files.rm(name)
        files.makedirs(root, exist_ok=True)
        total = sum(len(images) for images in data.parts.values())
        count = itertools.count(1)
        parts = {
            part: _write_part(
                part,
                images,
                files,
                root,
                shard_bytes=shard_bytes,
                written=lambda: progress(next(count), total),
            )
            for part, images in data.parts.items()
        }
        manifest = {"format": FORMAT, "classes": list(data.classes), "parts": parts}
        with _whole(files, f"{root}/{MANIFEST}") as file:
            file.write(json.dumps(manifest, ensure_ascii=False).encode("utf-8", "surrogateescape"))
    shards = [shard for record in parts.values() for shard in record["shards"]]
    return ShardSummary(location, total, len(shards), sum(shard["bytes"] for shard in shards))


def _within(location: str, data: Data) -> bool:
    """Whether `location` is, or lies below, the folder that `data` is read from."""
    if "://" in location or "://" in data.location:
        return location == data.location
    place, source = (Path(text).expanduser().resolve() for text in (location, data.location))
    return source.is_dir() and (source == place or source in place.parents)


def _write_part(
    part: str,
    images: ImageSet,
    files: Any,
    root: str,
    *,
    shard_bytes: int,
    written: Callable[[], object],
) -> dict[str, Any]:
    """The tar files of one part, and its columns in the manifest, in the order of `images`."""
    count = len(images)
    columns: dict[str, list[int]] = {name: [0] * count for name in ("shard", "offset", "size")}
    shards: list[dict[str, Any]] = []
    order = np.random.default_rng(SHUFFLE_SEED).permutation(count).tolist()
    sidecar = ".json" if images.task == MULTI_LABEL else ".cls"
    while order:
        name = f"{part}-{len(shards):05d}.tar"
        taken = 0
        with (
            _whole(files, f"{root}/{name}") as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            while order and file.written < shard_bytes:
                index = order.pop()
                content, suffix = _file_of(images, index)
                columns["shard"][index], columns["size"][index] = len(shards), len(content)
                columns["offset"][index] = _add(tar, f"{index:09d}{suffix}", content)
                _add(tar, f"{index:09d}{sidecar}", _written(images.labels[index]))
                taken += 1
                written()
        shards.append(
            {
                "file": name,
                "bytes": file.written,
                "sha256": file.digest.hexdigest(),
                "images": taken,
            }
        )
    groups = {"groups": list(images.groups)} if images.groups else {}
    return {
        "task": images.task,
        "shards": shards,
        "counts": images.counts(),
        "names": list(images.names),
        "labels": list(images.labels),
        **groups,
        **columns,
    }


def _written(label: Label) -> bytes:
    """The content of the file beside an image."""
    return str(label).encode() if isinstance(label, int) else json.dumps({"labels": label}).encode()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a file; returns where its content starts."""
    member = tarfile.TarInfo(name)  # without times and owners: the same images give the same shards
    member.size = len(content)
    start = tar.offset + tarfile.BLOCKSIZE  # a short name has a header of one block
    tar.addfile(member, io.BytesIO(content))
    return start


def _file_of(images: ImageSet, index: int) -> tuple[bytes, str]:
    """(content, name ending) of an image: its file as it is; a picture that is no file becomes a PNG."""
    source = images.source(index)
    if isinstance(source, str):
        try:
            return Path(source).read_bytes(), Path(source).suffix.lower()
        except OSError as error:
            raise DataError(f"{source}: cannot be read ({error.strerror or error})") from error
    if isinstance(source, bytes):
        return source, PurePosixPath(images.names[index]).suffix.lower() or _suffix_of(
            images, index, source
        )
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(source)).save(buffer, format="PNG")
    return buffer.getvalue(), ".png"


def _suffix_of(images: ImageSet, index: int, content: bytes) -> str:
    """The name ending of an encoded picture without a name, such as a parquet file's."""
    if content.startswith(NUMPY_MAGIC):
        return ".npy"
    if content.startswith(TIFF_MAGICS):  # of which Pillow knows not every kind
        return ".tiff"
    return f".{images.file_format(index).lower()}".replace(".jpeg", ".jpg")


class _Hashed:
    """A file that is written, with its length and sha256 so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.written = 0
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.written += len(content)
        return self.file.write(content)

    def tell(self) -> int:
        return self.written


@contextlib.contextmanager
def _whole(files: Any, path: str) -> Iterator[Any]:
    """A file at `path`, which is there under its name once it is whole."""
    with files.open(f"{path}.partial", "wb") as file:
        yield _Hashed(file)
    files.mv(f"{path}.partial", path)


@contextlib.contextmanager
def _writing(location: str) -> Iterator[None]:
    """DataError in one line for a place that cannot be written to."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write to {location}: {error.strerror or error}") from error
