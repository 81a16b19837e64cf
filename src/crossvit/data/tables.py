"""A list of images as a CSV file: one line an image, with its path and its class, and if wanted its group and its part.

    path,label,group,split
    cats/1.jpg,cat,burst-7,train

Paths are below the CSV's own folder, or absolute. `group` names what must stay on one side of a split (a patient, a burst);
`split` is train, val or test, in every line or in none. Other columns are ignored.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from crossvit.data.images import HELD_OUT_PARTS, NAMED_AT_MOST, Data, Folder, ImageSet
from crossvit.errors import UsageError, unknown_name

TABLES = (".csv",)
PATH, LABEL, GROUP, SPLIT = "path", "label", "group", "split"
PARTS = ("train", *HELD_OUT_PARTS)


def open_csv(place: Path) -> Data:
    """The images that `place` lists. UsageError that names the column, or the first lines, that are wrong."""
    lines = _read(place)
    columns = lines[0][1].keys()
    for number, line in lines:
        for column in (PATH, LABEL, *(GROUP,) * (GROUP in columns)):
            if not line[column]:
                raise UsageError(f"{place}, line {number}: no {column}; fill it in or remove the line")
    parts = _parts(place, lines)
    train = parts.get("train") or parts.get("all") or []
    if not train:
        raise UsageError(f"{place} has no line with the {SPLIT} train: a part to learn from is needed")
    classes = tuple(sorted({line[LABEL] for _, line in train}))
    return Data(str(place), classes, {part: _image_set(place, lines, classes) for part, lines in parts.items()})


Line = tuple[int, dict[str, str]]  # its number in the file, and its fields


def _read(place: Path) -> list[Line]:
    try:
        with place.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            lines = [(reader.line_num, {key: (value or "").strip() for key, value in line.items() if key}) for line in reader]
    except FileNotFoundError:
        raise UsageError(f"no file {place}: give a CSV with the columns {PATH} and {LABEL}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{place} cannot be read as a CSV in UTF-8 ({error})") from error
    for needed in (PATH, LABEL):
        if needed not in columns:
            raise UsageError(
                f"{place} has no column {needed!r} (it has {', '.join(columns) or 'none'}): name it in the first line"
            )
    if not lines:
        raise UsageError(f"{place} lists no image: add a line for each, with its {PATH} and {LABEL}")
    return lines


def _parts(place: Path, lines: list[Line]) -> dict[str, list[Line]]:
    if SPLIT not in lines[0][1]:
        return {"all": lines}
    parts: dict[str, list[Line]] = {}
    for number, line in lines:
        if line[SPLIT] not in PARTS:
            if not line[SPLIT]:
                raise UsageError(f"{place}, line {number}: no {SPLIT}; give train, val or test in every line, or drop the column")
            raise UsageError(f"{place}, line {number}: {unknown_name(SPLIT, line[SPLIT], PARTS)}")
        parts.setdefault(line[SPLIT], []).append((number, line))
    return {part: parts[part] for part in PARTS if part in parts}


def _image_set(place: Path, lines: list[Line], classes: tuple[str, ...]) -> ImageSet:
    root = place.parent
    number_of = {name: number for number, name in enumerate(classes)}
    absent: list[str] = []
    sizes: list[int] = []
    for number, line in lines:
        if line[LABEL] not in number_of:
            raise UsageError(
                f"{place}, line {number}: {unknown_name('label', line[LABEL], classes)}; no line to learn from has it"
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
    return ImageSet(
        Folder(str(root)),
        classes,
        names,
        tuple(number_of[line[LABEL]] for _, line in lines),
        tuple(sizes),
        tuple(line[GROUP] for _, line in lines) if GROUP in lines[0][1] else (),
    )
