"""Which images are meant: files, folders that are searched through, globs, lists of names."""

from __future__ import annotations

import contextlib
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from crossvit.data.preprocess import SUFFIXES
from crossvit.errors import UsageError

STANDARD_INPUT = "-"


def scan_images(paths: Sequence[str]) -> Iterator[str]:
    """The images at files, folders and globs: in the order of `paths`, within each sorted by path.

    Folders are read as the images are taken; only the names within one folder are held in memory.
    A missing file is yielded like the others, so that it becomes a result with an error.

    Args:
        paths: Files, folders (searched recursively) and globs.

    Raises:
        UsageError: At once, where no path exists, or a folder or glob has no images.
    """
    first_images = [_first_image(path) for path in paths]
    if not any(Path(image).exists() for image in first_images):
        raise UsageError(
            f"no image at {', '.join(paths)}: give files, folders or a glob such as 'photos/*.jpg'"
        )
    return chain.from_iterable(map(_images_at, paths))


def find_images(paths: Sequence[str]) -> list[str]:
    """The images of `scan_images`, as a list."""
    return list(scan_images(paths))


def listed_images(file: str) -> Iterator[str]:
    """The image names in a list, a line each; empty lines are skipped.

    Args:
        file: The list, in any encoding of the file system; `-` is standard input.

    Raises:
        UsageError: Where there is no such file.
    """
    if file != STANDARD_INPUT and not Path(file).is_file():
        raise UsageError(
            f"no file {file}: --from takes a list of images, a name a line, or - for standard input"
        )
    return _names_in(file)


def _names_in(file: str) -> Iterator[str]:
    with (
        contextlib.nullcontext(sys.stdin.buffer)
        if file == STANDARD_INPUT
        else Path(file).open("rb") as lines
    ):
        names = (os.fsdecode(line.rstrip(b"\r\n")) for line in lines)
        yield from filter(None, names)


def _first_image(path: str) -> str:
    first = next(_images_at(path), None)
    if first is None and Path(path).expanduser().is_dir():
        raise UsageError(f"folder {path} has no images (read here: {' '.join(SUFFIXES)})")
    if first is None:
        raise UsageError(
            f"no image at {path}: give files, folders or a glob such as 'photos/*.jpg'"
        )
    return first


def _images_at(text: str) -> Iterator[str]:
    path = Path(text).expanduser()
    if path.is_dir():
        yield from _images_below(str(path))
    elif path.is_file():
        yield str(path)
    elif glob.has_magic(text):
        yield from sorted(
            match for match in glob.glob(text, recursive=True) if Path(match).is_file()
        )
    else:
        yield text


def _images_below(folder: str) -> Iterator[str]:
    """The images of a folder and its subfolders, sorted by path; a folder's name ends with a slash.

    A folder that cannot be read is yielded itself, so that it becomes a result with an error.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name + "/" * entry.is_dir(follow_symlinks=False)
                for entry in entries
                if _is_folder_or_image(entry)
            )
    except OSError:
        names = []
        yield folder
    for name in names:
        path = str(Path(folder, name))
        if name.endswith("/"):
            yield from _images_below(path)
        else:
            yield path


def _is_folder_or_image(entry: os.DirEntry[str]) -> bool:
    """A folder (no link to one: it might form a loop), or a visible file with an image's suffix."""
    if entry.is_dir(follow_symlinks=False):
        return True
    return (
        entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
    )
