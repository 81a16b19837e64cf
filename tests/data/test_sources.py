"""CSV files and splits by group: what is read, what is refused, and the same accuracy as from the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from crossvit.data.images import grouped_split
from crossvit.data.sources import open_data
from crossvit.errors import UsageError
from crossvit.train.loop import fit
from support.runs import recipe, same_bits, weights_of
from support.tables import write_csv

Command = Callable[..., tuple[int, str, str]]


def rows_of(folder: Path, *, groups: int = 0) -> list[dict[str, str]]:
    images = open_data(folder).part("all")
    rows = []
    for index, (name, label) in enumerate(zip(images.names, images.labels, strict=True)):
        row = {"path": name, "label": images.classes[label]}
        rows.append(row | ({"group": f"burst-{index % groups}"} if groups else {}))
    return rows


def test_a_csv_trains_to_the_same_bits_as_its_folder(own_scans: Path, tmp_path: Path) -> None:
    table = write_csv(own_scans / "list.csv", rows_of(own_scans))
    from_folder = fit(recipe(own_scans, tmp_path / "folder"))
    from_csv = fit(recipe(table, tmp_path / "csv"))
    assert from_csv.top1 == from_folder.top1
    assert same_bits(weights_of(from_csv.run), weights_of(from_folder.run))


def test_a_csv_names_its_parts_and_takes_absolute_paths(own_scans: Path, tmp_path: Path) -> None:
    rows = rows_of(own_scans)
    for index, row in enumerate(rows):
        row |= {
            "path": str(own_scans / row["path"]),
            "split": "val" if index % 4 == 0 else "train",
            "camera": "x",
        }
    data = open_data(write_csv(tmp_path / "list.csv", rows))
    assert {part: len(images) for part, images in data.parts.items()} == {"train": 18, "val": 6}
    train, held_out = data.split(held_out=0.5, seed=0)
    assert (len(train), len(held_out)) == (18, 6)
    assert train.read(0).mode == "RGB"


def test_a_changed_label_is_other_data(own_scans: Path) -> None:
    rows = rows_of(own_scans)
    before = open_data(write_csv(own_scans / "list.csv", rows)).fingerprint
    rows[0]["label"] = "1"
    assert open_data(write_csv(own_scans / "list.csv", rows)).fingerprint != before


def test_groups_stay_on_one_side(own_scans: Path) -> None:
    images = open_data(write_csv(own_scans / "list.csv", rows_of(own_scans, groups=12))).part("all")
    for seed in range(4):
        train, held_out = grouped_split(images, held_out=0.25, seed=seed)
        assert not set(train.groups) & set(held_out.groups)
        assert sorted((*train.names, *held_out.names)) == sorted(images.names)
        assert min(*train.counts().values(), *held_out.counts().values()) >= 1
        assert 0.1 < len(held_out) / len(images) < 0.4
    assert (
        grouped_split(images, held_out=0.25, seed=1)[1].names
        == grouped_split(images, held_out=0.25, seed=1)[1].names
    )


def test_groups_that_cannot_be_split_are_said(own_scans: Path) -> None:
    rows = rows_of(own_scans)
    by_class = [row | {"group": row["label"]} for row in rows]
    with pytest.raises(UsageError, match="3 groups, too few to hold out 0.2"):
        open_data(write_csv(own_scans / "list.csv", by_class)).split(held_out=0.2, seed=0)
    with pytest.raises(UsageError, match="no split of its 3 groups has every class on both sides"):
        open_data(own_scans / "list.csv").split(held_out=0.34, seed=0)
    both = [
        row | {"group": f"g{index % 7}", "split": "val" if index % 3 else "train"}
        for index, row in enumerate(rows)
    ]
    with pytest.raises(
        UsageError,
        match=r"7 groups are in train and in val \(g0, g1, g2, g3, g4 and 2 more\): move each",
    ):
        open_data(write_csv(own_scans / "list.csv", both)).split(held_out=0.2, seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,label\n0/a.png,0\n",
            r"has no column 'path' \(it has file, label\): name it in the first line",
        ),
        ("path\n0/a.png\n", r"has no column 'label' \(it has path\)"),
        ("", r"has no column 'path' \(it has none\)"),
        ("path,label\n", "lists no image: add a line for each"),
        (
            "path,label\nnowhere.png,0\n",
            r"lists 1 of 1 images that are not below .*: line 2: nowhere\.png",
        ),
        ("path,label\n,0\n", "line 2: no path; fill it in or remove the line"),
        ("path,label\nx.png,\n", "line 2: no label; fill it in or remove the line"),
        ("path,label,group\nx.png,0,\n", "line 2: no group"),
        ("path,label,split\nx.png,0,trian\n", "line 2: unknown split 'trian': did you mean train"),
        (
            "path,label,split\nx.png,0,\n",
            "line 2: no split; give train, val or test in every line, or drop the column",
        ),
        ("path,label,split\nx.png,0,val\n", "has no line with the split train"),
        (
            "path,label,split\nx.png,0,train\nx.png,zero,val\n",
            "line 3: unknown label 'zero': .* no line to learn from has it",
        ),
        ("path,label\nx.png,0\nx.png,0\n", r"lists x\.png 2 times in one part"),
    ],
)
def test_a_csv_that_is_wrong_says_where(
    text: str, message: str, scans: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.csv").write_text(text)
    (tmp_path / "x.png").write_bytes(next((scans / "0").iterdir()).read_bytes())
    with pytest.raises(UsageError, match=message):
        open_data(tmp_path / "list.csv")


def test_a_csv_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no file .*nowhere\.csv: give a CSV with the columns path and label"
    ):
        open_data(tmp_path / "nowhere.csv")
    (tmp_path / "list.csv").write_bytes(b"path,label\n\xff\xfe,0\n")
    with pytest.raises(UsageError, match="cannot be read as a CSV in UTF-8"):
        open_data(tmp_path / "list.csv")


def test_a_run_from_a_csv_is_evaluated_on_its_held_out_images(
    own_scans: Path, tmp_path: Path, command: Command
) -> None:
    table = write_csv(own_scans / "list.csv", rows_of(own_scans, groups=10))
    result = fit(recipe(table, tmp_path / "run"))
    status, out, _ = command("evaluate", tmp_path / "run", table, "--json")
    assert status == 0
    assert f'"top1": {result.top1}, "n": {result.n}' in out
    assert '"split": "held-out"' in out
