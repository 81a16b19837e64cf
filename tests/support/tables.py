"""Tables of images and of results."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.dataset

from crossvit.prediction.image_paths import find_images


def write_csv(place: Path, rows: list[dict[str, str]]) -> Path:
    with place.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return place


def awkward(scans: Path, folder: Path) -> list[str]:
    """44 images, the last batch of 8 not full, with awkward names and a broken one among them, which are in `folder`."""
    paths = find_images([str(scans)])[:44]
    for index, name in enumerate(
        ("two\nlines.png", "写真 é.png", 'a,"quoted".png', "not utf-8 \udcff.png", "broken.png")
    ):
        copy = folder / name
        if name == "broken.png":
            copy.write_bytes(b"no")
        else:
            shutil.copy(paths[7 * index], copy)
        paths[7 * index + 3] = str(copy)
    return paths


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The results, read as other software would."""
    if out.suffix == ".jsonl":
        return [json.loads(line) for line in out.read_text().splitlines()]
    if out.suffix == ".csv":
        with out.open(newline="") as file:
            return list(csv.DictReader(file))
    rows: list[dict[str, Any]] = pyarrow.dataset.dataset(out).to_table().to_pylist()
    return rows
