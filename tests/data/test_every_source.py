"""The same real photos from every kind of source train to the same weights, so to the same accuracy; and faults that are planted
among real photos are all found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from crossvit.data.check import check
from crossvit.data.images import Data
from crossvit.data.shard_writing import write_shards
from crossvit.data.sources import open_data
from crossvit.results import TrainingResult
from crossvit.train.loop import fit
from support.runs import recipe, same_bits, weights_of
from support.tables import write_csv

pytestmark = pytest.mark.slow


def table_of(data: Data, place: Path) -> Path:
    """A CSV of every image, with its part where there are parts."""
    rows = []
    for part, images in data.parts.items():
        split = {} if part == "all" else {"split": part}
        rows += [
            {"path": images.path(index), "label": images.said(index)} | split
            for index in range(len(images))
        ]
    return write_csv(place, rows)


def datasets_of(data: Data) -> dict[str, object]:
    """Each part as a dataset of Hugging Face."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(data.classes))}
    )
    found = {}
    for part, images in data.parts.items():
        content = [
            {"bytes": Path(images.path(index)).read_bytes(), "path": None}
            for index in range(len(images))
        ]
        found[part] = datasets.Dataset.from_dict(
            {"image": content, "label": list(images.labels)}, features=features
        )
    return found


def test_every_source_gives_the_folders_accuracy(
    pack: Callable[[str], Path], tmp_path: Path
) -> None:
    import datasets

    photos = pack("sign_digits_64")
    parts, whole = open_data(photos), open_data(photos / "train")
    write_shards(parts, tmp_path / "shards", shard_bytes=10**6)
    datasets.DatasetDict(datasets_of(parts)).save_to_disk(str(tmp_path / "saved"))
    datasets_of(whole)["all"].to_parquet(str(tmp_path / "photos.parquet"))  # type: ignore[attr-defined]
    sources = {  # with train and val; and one part, of which some are held out
        "folder": (
            photos,
            table_of(parts, tmp_path / "parts.csv"),
            tmp_path / "shards",
            tmp_path / "saved",
        ),
        "train": (
            photos / "train",
            table_of(whole, tmp_path / "whole.csv"),
            tmp_path / "photos.parquet",
        ),
    }
    for kind, places in sources.items():
        runs: list[TrainingResult] = [
            fit(recipe(place, tmp_path / f"{kind}-{number}", epochs=4, batch_size=16))
            for number, place in enumerate(places)
        ]
        for place, run in zip(places, runs, strict=True):
            print(f"{kind:7} {place.name:16} {100 * run.top1:.2f} % of {run.n}")
            assert (run.top1, run.n) == (runs[0].top1, runs[0].n)
            assert same_bits(weights_of(run.run), weights_of(runs[0].run))
        assert runs[0].top1 > 0.2  # ten classes: something was learnt


def test_everything_that_is_planted_among_photos_is_found(
    pack: Callable[[str], Path], tmp_path: Path
) -> None:
    photos = pack("caltech101_subset_160")
    classes = sorted(path.name for path in (photos / "train").iterdir())[10:40]
    for part in ("train", "val"):
        for name in classes:
            shutil.copytree(photos / part / name, tmp_path / part / name)
    before = check(open_data(tmp_path))
    photos_of = {
        name: sorted((tmp_path / "train" / name).iterdir()) for name in classes
    }  # before anything is planted
    for name, following in zip(classes, (*classes[1:], classes[0]), strict=True):
        copied, resized, relabelled, torn, *_ = photos_of[name]
        shutil.copy(copied, tmp_path / "val" / name / "leak.jpg")
        with Image.open(resized) as image:
            half = (image.width // 2, image.height // 2)
            image.resize(half, Image.Resampling.LANCZOS).save(
                tmp_path / "val" / name / "smaller.jpg", quality=70
            )
        shutil.copy(relabelled, tmp_path / "train" / following / "conflict.jpg")
        torn.write_bytes(torn.read_bytes()[:2000])
    found = check(open_data(tmp_path))
    assert len(found.broken) - len(before.broken) == len(classes)
    assert found.conflict_count - before.conflict_count == len(classes)
    assert found.identical_count - before.identical_count == 2 * len(classes)
    near = {
        image
        for pair in found.near
        if pair.leak
        for image in pair.images
        if image.endswith("smaller.jpg")
    }
    assert len(near) == len(classes)
