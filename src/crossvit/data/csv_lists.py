"""A list of images as a CSV file: one line an image, with its path and its class, and if wanted its group and its part.

    path,label,group,split                  path,labels
    cats/1.jpg,cat,burst-7,train            streets/1.jpg,car;person

`labels` in place of `label` makes it multi-label data: any number of classes in a cell, between semicolons; none in an empty one.
Paths are below the CSV's own folder, or absolute. `group` names what must stay on one side of a split (a patient, a burst);
`split` is train, val or test, in every line or in none. Other columns are ignored.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from crossvit.data.images import (
    BETWEEN_LABELS,
    HELD_OUT_PARTS,
    NAMED_AT_MOST,
    Data,
    Folder,
    ImageSet,
)
from crossvit.errors import UsageError, unknown_name
from crossvit.results import MULTI_LABEL, SINGLE_LABEL

TABLES = (".csv",)
PATH, LABEL, LABELS, GROUP, SPLIT = "path", "label", "labels", "group", "split"
PARTS = ("train", *HELD_OUT_PARTS)


def open_csv(place: Path) -> Data:
    """The images that `place` lists. UsageError that names the column, or the first lines, that are wrong."""
    lines = _read(place)
    columns = lines[0][1].keys()
    for number, line in lines:
        for column in (PATH, LABEL, GROUP):
            if column in columns and not line[column]:
                raise UsageError(
                    f"{place}, line {number}: no {column}; fill it in or remove the line"
                )
    parts = _parts(place, lines)
    train = parts.get("train") or parts.get("all") or []
    if not train:
        raise UsageError(
            f"{place} has no line with the {SPLIT} train: a part to learn from is needed"
        )
    classes = tuple(sorted({label for _, line in train for label in _labels(line)}))
    if not classes:
        raise UsageError(
            f"{place} has no label in any line to learn from: fill in the column {LABELS}"
        )
    return Data(
        str(place),
        classes,
        {part: _image_set(place, lines, classes) for part, lines in parts.items()},
    )


Line = tuple[int, dict[str, str]]  # its number in the file, and its fields


def _labels(line: dict[str, str]) -> list[str]:
    """The classes that a line names."""
    return (
        [line[LABEL]]
        if LABEL in line
        else [text for part in line[LABELS].split(BETWEEN_LABELS) if (text := part.strip())]
    )


def _read(place: Path) -> list[Line]:
    try:
        with place.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            lines = [
                (
                    reader.line_num,
                    {key: (value or "").strip() for key, value in line.items() if key},
                )
                for line in reader
            ]
    except FileNotFoundError:
        raise UsageError(
            f"no file {place}: give a CSV with the columns {PATH} and {LABEL} (or {LABELS})"
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{place} cannot be read as a CSV in UTF-8 ({error})") from error
    if LABEL in columns and LABELS in columns:
        raise UsageError(
            f"{place} has both columns {LABEL!r} and {LABELS!r}: keep one, {LABELS!r} for several classes an image"
        )
    for needed in (PATH, LABEL):
        if needed not in columns and not (needed == LABEL and LABELS in columns):
            raise UsageError(
                f"{place} has no column {needed!r} (it has {', '.join(columns) or 'none'}): name it in the first line"
            )
    if not lines:
        raise UsageError(
            f"{place} lists no image: add a line for each, with its {PATH} and {LABEL}"
        )
    return lines


def _parts(place: Path, lines: list[Line]) -> dict[str, list[Line]]:
    if SPLIT not in lines[0][1]:
        return {"all": lines}
    parts: dict[str, list[Line]] = {}
    for number, line in lines:
        if line[SPLIT] not in PARTS:
            if not line[SPLIT]:
                raise UsageError(
                    f"{place}, line {number}: no {SPLIT}; give train, val or test in every line, or drop the column"
                )
            raise UsageError(f"{place}, line {number}: {unknown_name(SPLIT, line[SPLIT], PARTS)}")
        parts.setdefault(line[SPLIT], []).append((number, line))
    return {part: parts[part] for part in PARTS if part in parts}


def _image_set(place: Path, lines: list[Line], classes: tuple[str, ...]) -> ImageSet:
    root = place.parent
    number_of = {name: number for number, name in enumerate(classes)}
    absent: list[str] = []
    sizes: list[int] = []
    for number, line in lines:
        unknown = next((label for label in _labels(line) if label not in number_of), None)
        if unknown is not None:
            raise UsageError(
                f"{place}, line {number}: {unknown_name('label', unknown, classes)}; no line to learn from has it"
            )
        try:
            sizes.append((root / line[PATH]).stat().st_size)
        except OSError:
            absent.append(f"line {number}: {line[PATH]}")
    if absent:
        more = f"; and {len(absent) - NAMED_AT_MOST} more" if len(absent) > NAMED_AT_MOST else ""
        raise UsageError(
            f"{place} lists {len(absent)} of {len(lines)} images that are not below {root}: "
            f"{'; '.join(absent[:NAMED_AT_MOST])}{more}"
        )
    names = tuple(line[PATH] for _, line in lines)
    again, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{place} lists {again} {times} times in one part: keep one line of it")
    single = LABEL in lines[0][1]
    found = [tuple(sorted({number_of[label] for label in _labels(line)})) for _, line in lines]
    return ImageSet(
        Folder(str(root)),
        classes,
        names,
        tuple(own[0] for own in found) if single else tuple(found),
        tuple(sizes),
        tuple(line[GROUP] for _, line in lines) if GROUP in lines[0][1] else (),
        SINGLE_LABEL if single else MULTI_LABEL,
    )
