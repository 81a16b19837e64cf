"""Tar shards: few large files in place of many small ones, for slow disks, network storage and object stores.

    OUT/manifest.json          classes; for each part its shards and where in them every image starts
    OUT/train-00000.tar        <number>.jpg, the file as it was, and <number>.cls, its class as a whole number; of multi-label
                               data <number>.json, {"labels": [its classes as whole numbers]}

The tar files are read by webdataset as they are. Ours are read by position through the manifest, so that the order of training is
global and resume exact, and nothing is unpacked. Places may be local or anything that fsspec opens (`s3://...`, `https://...`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any

from crossvit.data.images import HELD_OUT_PARTS, Data, ImageSet, Label, Store
from crossvit.data.preprocess import SUFFIXES
from crossvit.errors import DataError, UsageError
from crossvit.results import MULTI_LABEL, SINGLE_LABEL

MANIFEST = "manifest.json"
FORMAT = "crossvit shards 1"
PARTS = ("train", *HELD_OUT_PARTS)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one image's file lies: in shard number `shard`, from byte `offset` on."""

    shard: int
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Shards:
    """Images inside the tar files `shards` of `location`, by name."""

    location: str
    shards: tuple[str, ...]
    places: dict[str, Place]
    digests: tuple[str, ...] = ()  # sha256 of each tar file, where a manifest says them

    def path(self, name: str) -> str:
        return f"{self.location}/{self.shards[self.places[name].shard]}:{name}"

    def source(self, name: str) -> bytes:
        place = self.places[name]
        url = f"{self.location}/{self.shards[place.shard]}"
        try:
            content = _read_range(url, place.offset, place.size)
        except Exception as error:  # a disk, a network, a store that answers in its own words
            raise DataError(
                f"{self.path(name)}: cannot be fetched ({' '.join(str(error).split())})"
            ) from error
        if len(content) != place.size:
            raise DataError(f"{self.path(name)}: the shard ends too early; copy it again")
        return content


def is_sharded(folder: Path) -> bool:
    """Whether `folder` is one with a manifest of ours or with tar files."""
    return folder.is_dir() and ((folder / MANIFEST).is_file() or any(folder.glob("*.tar")))


def open_shards(place: str | Path) -> Data:
    """The images in the shards at `place`, a folder or the manifest in it: by the manifest, or else by reading through the tar
    files once for where what lies.

    UsageError where the manifest is not one, or does not fit the tar files.
    """
    location = str(place).removesuffix(MANIFEST).rstrip("/") or "."
    files, root = filesystem(location)
    if files.exists(f"{root}/{MANIFEST}"):
        return _from_manifest(location, files, root)
    return _by_reading_through(location, files, root)


def torn_shards(store: Store) -> Iterator[tuple[str, str]]:
    """(tar file, what is wrong) for every one whose content is not what its manifest says. Reads all of them."""
    if not isinstance(store, Shards):
        return
    files, root = filesystem(store.location)
    for name, expected in zip(store.shards, store.digests, strict=False):
        with files.open(f"{root}/{name}", "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
        if digest.hexdigest() != expected:
            yield name, f"{store.location}/{name}: its sha256 is not the manifest's; copy it again"


def filesystem(location: str) -> tuple[Any, str]:
    """(fsspec's file system, the place in it). UsageError for a protocol that is not known or not installed."""
    import fsspec  # takes as long to import as a folder of photos to open

    try:
        files, root = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{location}: {error}") from error
    return files, root


def _read_range(url: str, offset: int, size: int) -> bytes:
    if "://" not in url:
        with Path(url).open("rb") as file:
            file.seek(offset)
            return file.read(size)
    files, path = filesystem(url)
    content: bytes = files.cat_file(path, start=offset, end=offset + size)
    return content


def _from_manifest(location: str, files: Any, root: str) -> Data:
    place = f"{location}/{MANIFEST}"
    try:
        manifest = json.loads(files.cat_file(f"{root}/{MANIFEST}"))
        classes = tuple(map(str, manifest["classes"]))
        known = manifest["format"] == FORMAT
        parts = {
            part: _Columns.read(manifest["parts"][part])
            for part in (*PARTS, "all")
            if part in manifest["parts"]
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{place} is not a manifest of `crossvit data shard` ({error}): write the shards again"
        ) from error
    if not known:
        raise UsageError(
            f"{place} is of another version of crossvit: write the shards again, or update"
        )
    for part, columns in parts.items():
        columns.refuse_nonsense(f"{place}, {part}", len(classes))
        _refuse_other_sizes(columns.shards, location, files, root)
    return Data(
        location,
        classes,
        {part: columns.images(location, classes) for part, columns in parts.items()},
    )


@dataclasses.dataclass(frozen=True)
class _Columns:
    """One part of a manifest."""

    shards: list[tuple[str, int, str]]  # file, bytes, sha256
    names: list[str]
    labels: list[Label]
    groups: list[str]
    shard: list[int]
    offset: list[int]
    size: list[int]
    task: str

    @classmethod
    def read(cls, record: dict[str, Any]) -> _Columns:
        shards = [
            (str(shard["file"]), int(shard["bytes"]), str(shard["sha256"]))
            for shard in record["shards"]
        ]
        numbers = {
            name: [int(value) for value in record[name]] for name in ("shard", "offset", "size")
        }
        groups = [str(group) for group in record.get("groups", ())]
        names = [str(name) for name in record["names"]]
        task = str(
            record.get("task", SINGLE_LABEL)
        )  # of one label an image before there was another way
        labels: list[Label] = (
            [tuple(sorted({int(one) for one in label})) for label in record["labels"]]
            if task == MULTI_LABEL
            else [int(label) for label in record["labels"]]
        )
        return cls(shards=shards, names=names, labels=labels, groups=groups, task=task, **numbers)

    def refuse_nonsense(self, place: str, classes: int) -> None:
        """UsageError for what cannot be: a manifest may come from anywhere."""
        lengths = {
            len(column) for column in (self.names, self.labels, self.shard, self.offset, self.size)
        }
        if len(lengths) != 1 or (self.groups and len(self.groups) != len(self.names)):
            raise UsageError(f"{place}: its columns differ in length: write the shards again")
        if len(set(self.names)) < len(self.names):
            raise UsageError(f"{place}: a name is there twice: write the shards again")
        found = (
            one for label in self.labels for one in ((label,) if isinstance(label, int) else label)
        )
        wrong = next((one for one in found if not 0 <= one < classes), None)
        if wrong is not None:
            raise UsageError(
                f"{place}: label {wrong} of {classes} classes: labels are from 0 to {classes - 1}"
            )
        for name, _, _ in self.shards:
            if PurePosixPath(name).name != name or "\\" in name:
                raise UsageError(
                    f"{place}: a shard is called {name!r}; it should lie beside the manifest"
                )
        for shard, offset, size in zip(self.shard, self.offset, self.size, strict=True):
            if (
                not 0 <= shard < len(self.shards)
                or offset < 0
                or size < 0
                or offset + size > self.shards[shard][1]
            ):
                raise UsageError(
                    f"{place}: an image lies outside its shard: write the shards again"
                )

    def images(self, location: str, classes: tuple[str, ...]) -> ImageSet:
        positions = zip(self.shard, self.offset, self.size, strict=True)
        places = {
            name: Place(*position) for name, position in zip(self.names, positions, strict=True)
        }
        files, _, digests = zip(*self.shards, strict=True) if self.shards else ((), (), ())
        store = Shards(location, tuple(files), places, tuple(digests))
        return ImageSet(
            store,
            classes,
            tuple(self.names),
            tuple(self.labels),
            tuple(self.size),
            tuple(self.groups),
            self.task,
        )


def _refuse_other_sizes(
    shards: Sequence[tuple[str, int, str]], location: str, files: Any, root: str
) -> None:
    """UsageError that names the first shard that is missing or torn."""

    def size(name: str) -> int | None:
        try:
            return int(files.size(f"{root}/{name}"))
        except (OSError, FileNotFoundError):
            return None

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(size, (name for name, _, _ in shards)))
    for (name, expected, _), there in zip(shards, found, strict=True):
        if there is None:
            raise UsageError(
                f"{location}/{name} is missing: copy it there, or write the shards again"
            )
        if there != expected:
            raise UsageError(
                f"{location}/{name} has {there:,} bytes and the manifest says {expected:,}: copy it again"
            )


def _by_reading_through(location: str, files: Any, root: str) -> Data:
    """Tar files of another's making, as webdataset has them: <key>.jpg (or another image) beside <key>.cls with a number or a
    name. Where each image lies is found once, by their headers, so they too are read by position."""
    tars = (
        sorted(name for name in files.ls(root, detail=False) if name.endswith(".tar"))
        if files.exists(root)
        else []
    )
    if not tars:
        raise UsageError(f"{location} has no tar files and no {MANIFEST}")
    found: dict[str, list[tuple[str, str, Place]]] = {}
    shards = tuple(PurePosixPath(name).name for name in tars)
    for number, name in enumerate(tars):
        part = next((part for part in PARTS if PurePosixPath(name).name.startswith(part)), "all")
        with files.open(name, "rb") as file:
            found.setdefault(part, []).extend(
                _labelled(file, number, f"{location}/{shards[number]}")
            )
    if "all" in found and len(found) > 1:
        raise UsageError(
            f"{location}: some tar files are called train, val or test and others are not: rename them"
        )
    texts = {label for entries in found.values() for _, label, _ in entries}
    numbered = all(text.isdecimal() for text in texts)
    classes = tuple(sorted(texts, key=int if numbered else None))
    index = {text: label for label, text in enumerate(classes)}
    sets = {
        part: ImageSet(
            Shards(location, shards, {name: place for name, _, place in entries}),
            classes,
            tuple(name for name, _, _ in entries),
            tuple(index[label] for _, label, _ in entries),
            tuple(place.size for _, _, place in entries),
        )
        for part, entries in found.items()
    }
    return Data(location, classes, sets)


def _labelled(file: IO[bytes], number: int, place: str) -> list[tuple[str, str, Place]]:
    """(name, label, where) of every image in a tar file."""
    images: dict[str, tuple[str, Place]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, last = member.name.rpartition("/")
                key, _, suffix = last.partition(".")
                key = f"{folder}/{key}"
                if not member.isfile():
                    continue
                if f".{suffix.lower()}" in SUFFIXES:
                    images[key] = member.name, Place(number, member.offset_data, member.size)
                elif suffix == "cls":
                    content = tar.extractfile(member)
                    labels[key] = (
                        content.read(1000).decode("utf-8", "replace").strip() if content else ""
                    )
    except tarfile.TarError as error:
        raise UsageError(f"{place} is torn or not a tar file ({error}): copy it again") from error
    without = next((name for key, (name, _) in images.items() if not labels.get(key)), None)
    if without is not None:
        raise UsageError(
            f"{place}: {without} has no label beside it: add <key>.cls with a number or a name"
        )
    if not images:
        raise UsageError(f"{place} has no images (read here: {' '.join(SUFFIXES)})")
    return [
        (f"{PurePosixPath(place).name}/{name}", labels[key], where)
        for key, (name, where) in images.items()
    ]
