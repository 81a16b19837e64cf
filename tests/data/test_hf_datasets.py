"""Hugging Face's datasets: parquet and saved to disk, with labels as numbers, names and texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossvit.data.shard_writing import write_shards
from crossvit.data.shards import MANIFEST
from crossvit.data.sources import open_data
from crossvit.errors import DataError, UsageError
from crossvit.train.loop import fit
from support.runs import recipe

datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")


def rows_of(folder: Path) -> dict[str, list[object]]:
    images = open_data(folder).part("all")
    content = [
        {"bytes": Path(images.path(index)).read_bytes(), "path": None}
        for index in range(len(images))
    ]
    return {"image": content, "label": list(images.labels)}  # type: ignore[dict-item]


def dataset_of(folder: Path, *, named: bool = True) -> object:
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["0", "1", "2"]) if named else datasets.Value("int64"),
    }
    return datasets.Dataset.from_dict(rows_of(folder), features=datasets.Features(features))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_dataset_trains_as_its_folder_does(kind: str, own_scans: Path, tmp_path: Path) -> None:
    place = tmp_path / ("scans.parquet" if kind == "parquet" else "scans")
    dataset = dataset_of(own_scans)
    dataset.to_parquet(str(place)) if kind == "parquet" else dataset.save_to_disk(str(place))  # type: ignore[attr-defined]
    rows, folder = open_data(place).part("all"), open_data(own_scans).part("all")
    assert (rows.classes, rows.labels, rows.file_sizes) == (
        folder.classes,
        folder.labels,
        folder.file_sizes,
    )
    assert [rows.source(index) for index in range(len(rows))] == [
        Path(folder.path(index)).read_bytes() for index in range(len(rows))
    ]
    one, other = fit(recipe(place, tmp_path / "rows")), fit(recipe(own_scans, tmp_path / "folder"))
    assert one.top1 == other.top1
    assert one.epochs[0].loss == other.epochs[0].loss
    two_workers = fit(recipe(place, tmp_path / "workers", workers=2))
    assert two_workers.epochs[0].loss == one.epochs[0].loss


def test_rows_become_shards_that_others_can_read(own_scans: Path, tmp_path: Path) -> None:
    dataset_of(own_scans).to_parquet(str(tmp_path / "scans.parquet"))  # type: ignore[attr-defined]
    write_shards(open_data(tmp_path / "scans.parquet"), tmp_path / "shards")
    (tmp_path / "shards" / MANIFEST).unlink()
    assert open_data(tmp_path / "shards").part("all").counts() == {"0": 8, "1": 8, "2": 8}


def test_a_row_that_is_no_picture_is_named_where_shards_are_written(
    own_scans: Path, tmp_path: Path
) -> None:
    next((own_scans / "1").iterdir()).write_bytes(b"no picture")
    dataset_of(own_scans).to_parquet(str(tmp_path / "scans.parquet"))  # type: ignore[attr-defined]
    with pytest.raises(
        DataError, match=r"scans\.parquet.*0+\d+: not an image in a format read here"
    ):
        write_shards(open_data(tmp_path / "scans.parquet"), tmp_path / "shards")


def test_splits_and_labels_as_texts(own_scans: Path, tmp_path: Path) -> None:
    rows = rows_of(own_scans) | {"label": ["cat", "dog", "eel"] * 8}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": dataset, "validation": dataset.select(range(6))}).save_to_disk(
        str(tmp_path / "split")
    )
    data = open_data(tmp_path / "split")
    assert data.classes == ("cat", "dog", "eel")
    assert {part: len(images) for part, images in data.parts.items()} == {"train": 24, "val": 6}


def test_what_is_wrong_is_said(own_scans: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no file .*nowhere\.parquet"):
        open_data(tmp_path / "nowhere.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match=r"torn\.parquet cannot be opened"):
        open_data(tmp_path / "torn.parquet")
    rows = rows_of(own_scans)
    plain = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["0", "1", "2"])}
    )
    wrong = datasets.Dataset.from_dict(rows | {"label": [-1, *rows["label"][1:]]}, features=plain)
    wrong.save_to_disk(str(tmp_path / "wrong"))
    with pytest.raises(UsageError, match="row 0: label is -1 and should be from 0 to 2"):
        open_data(tmp_path / "wrong")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "text.parquet"))
    with pytest.raises(
        UsageError, match=r"has no column of images \(it has text\): call one image"
    ):
        open_data(tmp_path / "text.parquet")
