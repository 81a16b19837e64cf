"""Tar shards: written and read back to the bit, through webdataset's layout, and refused when they are torn."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from crossvit.data.check import check
from crossvit.data.shard_writing import write_shards
from crossvit.data.shards import MANIFEST
from crossvit.data.sources import open_data
from crossvit.errors import DataError, UsageError
from crossvit.train.loop import fit
from support.runs import recipe, same_bits, weights_of

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shards(own_scans: Path, tmp_path: Path) -> Path:
    write_shards(open_data(own_scans), tmp_path / "shards", shard_bytes=20_000)
    return tmp_path / "shards"


def test_every_file_comes_back_to_the_bit_in_the_same_order(own_scans: Path, shards: Path) -> None:
    folder, tars = open_data(own_scans), open_data(shards)
    assert len(list(shards.glob("*.tar"))) > 2
    before, after = folder.part("all"), tars.part("all")
    assert (after.names, after.labels, after.classes) == (
        before.names,
        before.labels,
        before.classes,
    )
    assert all(
        after.source(index) == Path(before.path(index)).read_bytes() for index in range(len(before))
    )
    assert tars.fingerprint == folder.fingerprint
    assert open_data(shards / MANIFEST).fingerprint == folder.fingerprint
    assert after.path(0).endswith(f".tar:{after.names[0]}")


def test_training_on_shards_is_training_on_the_folder(
    own_scans: Path, shards: Path, tmp_path: Path
) -> None:
    folder = fit(recipe(own_scans, tmp_path / "folder"))
    tars = fit(recipe(shards, tmp_path / "tars"))
    assert same_bits(weights_of(tars.run), weights_of(folder.run))
    assert tars.top1 == folder.top1


def test_the_same_images_give_the_same_shards(
    own_scans: Path, shards: Path, tmp_path: Path
) -> None:
    write_shards(open_data(own_scans), tmp_path / "again", shard_bytes=20_000)
    for tar in shards.iterdir():
        assert (tmp_path / "again" / tar.name).read_bytes() == tar.read_bytes()


def test_the_layout_is_webdatasets(own_scans: Path, shards: Path) -> None:
    images = open_data(own_scans).part("all")
    seen = {}
    for tar in sorted(shards.glob("*.tar")):
        with tarfile.open(tar) as opened:
            members = opened.getmembers()
            for picture, label in zip(
                members[::2], members[1::2], strict=True
            ):  # a sample's files stand together
                key, suffix = picture.name.split(".", 1)
                assert (suffix, label.name) == ("png", f"{key}.cls")
                seen[int(key)] = int(opened.extractfile(label).read())  # type: ignore[union-attr]
    assert [seen[index] for index in range(len(images))] == list(images.labels)
    first = tarfile.open(shards / "all-00000.tar")  # noqa: SIM115
    with first:
        labels = [
            first.extractfile(member).read() for member in first if member.name.endswith(".cls")
        ]  # type: ignore[union-attr]
    assert len(set(labels)) == 3  # shuffled


def test_tar_files_of_others_are_read_by_position_too(
    own_scans: Path, shards: Path, tmp_path: Path
) -> None:
    (shards / MANIFEST).unlink()
    foreign, own = open_data(shards).part("all"), open_data(own_scans).part("all")
    assert foreign.classes == ("0", "1", "2")
    assert foreign.counts() == own.counts()
    whole = {Path(own.path(index)).read_bytes(): label for index, label in enumerate(own.labels)}
    assert all(whole[foreign.source(index)] == label for index, label in enumerate(foreign.labels))  # type: ignore[index]
    fit(recipe(shards, tmp_path / "run"))
    fit(recipe(shards, tmp_path / "run"), resume=True)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_tar_files_of_others_with_names_for_classes_and_parts(scans: Path, tmp_path: Path) -> None:
    picture = next((scans / "0").iterdir()).read_bytes()
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}-0.tar", "w") as tar:
            for number, label in enumerate(("cat", "dog", "cat")):
                add(tar, f"photos/{number}.png", picture)
                add(tar, f"photos/{number}.cls", label.encode())
                add(tar, f"photos/{number}.json", b"{}")
    data = open_data(tmp_path)
    assert {part: images.counts() for part, images in data.parts.items()} == {
        part: {"cat": 2, "dog": 1} for part in ("train", "val")
    }
    with tarfile.open(tmp_path / "train-1.tar", "w") as tar:
        add(tar, "9.png", picture)
    with pytest.raises(
        UsageError, match=r"train-1\.tar: 9\.png has no label beside it: add <key>\.cls"
    ):
        open_data(tmp_path)


def test_shards_may_be_elsewhere(own_scans: Path) -> None:
    place = "memory://bucket/shards"
    write_shards(open_data(own_scans), place, shard_bytes=20_000)
    data = open_data(place)
    assert data.fingerprint == open_data(own_scans).fingerprint
    assert data.part("all").read(5).tobytes() == open_data(own_scans).part("all").read(5).tobytes()
    fsspec.filesystem("memory").rm("/bucket/shards/all-00001.tar")
    with pytest.raises(UsageError, match=r"memory://bucket/shards/all-00001\.tar is missing"):
        open_data(place)
    with pytest.raises(UsageError, match="nosuch"):
        open_data("nosuch://bucket/shards")


def test_torn_and_missing_shards_are_said(shards: Path) -> None:
    tar = shards / "all-00001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1024])
    with pytest.raises(
        UsageError,
        match=rf"all-00001\.tar has {len(whole) - 1024:,} bytes and the manifest says .*: copy it again",
    ):
        open_data(shards)
    tar.unlink()
    with pytest.raises(UsageError, match=r"all-00001\.tar is missing: copy it there"):
        open_data(shards)


def test_a_shard_with_other_bytes_is_found_by_the_check(shards: Path) -> None:
    tar = shards / "all-00001.tar"
    content = bytearray(tar.read_bytes())
    content[-1] ^= 1  # in the padding at the end: every image is still whole
    tar.write_bytes(content)
    (broken,) = check(open_data(shards)).broken
    assert broken.reason.endswith("all-00001.tar: its sha256 is not the manifest's; copy it again")


def test_a_shard_that_goes_while_it_is_read_is_an_error_of_that_image(shards: Path) -> None:
    images = open_data(shards).part("all")
    for tar in shards.glob("*.tar"):
        tar.write_bytes(b"")
    with pytest.raises(DataError, match=r"\.tar:0/.*: the shard ends too early"):
        images.read(0)
    for tar in shards.glob("*.tar"):
        tar.unlink()
    with pytest.raises(DataError, match=r"\.tar:0/.*: cannot be fetched"):
        images.read(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="crossvit shards 9"), "of another version of crossvit"),
        (lambda m: m.pop("classes"), "is not a manifest of `crossvit data shard`"),
        (
            lambda m: m["parts"]["all"]["labels"].__setitem__(0, 3),
            "label 3 of 3 classes: labels are from 0 to 2",
        ),
        (lambda m: m["parts"]["all"]["labels"].__setitem__(0, -1), "label -1 of 3 classes"),
        (lambda m: m["parts"]["all"]["labels"].pop(), "its columns differ in length"),
        (
            lambda m: m["parts"]["all"]["names"].__setitem__(0, m["parts"]["all"]["names"][1]),
            "a name is there twice",
        ),
        (
            lambda m: m["parts"]["all"]["offset"].__setitem__(0, 10**9),
            "an image lies outside its shard",
        ),
        (
            lambda m: m["parts"]["all"]["shard"].__setitem__(0, 99),
            "an image lies outside its shard",
        ),
        (
            lambda m: m["parts"]["all"]["shards"][0].update(file="../../etc/passwd"),
            "it should lie beside the manifest",
        ),
        (
            lambda m: m["parts"]["all"]["size"].__setitem__(0, "x"),
            "is not a manifest of `crossvit data shard`",
        ),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(
    change: Callable[[dict], object], message: str, shards: Path
) -> None:  # type: ignore[type-arg]
    manifest = json.loads((shards / MANIFEST).read_text())
    change(manifest)
    (shards / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=message):
        open_data(shards)


def test_a_place_that_holds_something_is_kept(
    own_scans: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    for more in ((), ("--overwrite",)):
        status, _, err = command("data", "shard", own_scans, tmp_path / "out", *more)
        assert status == 2
        assert "is not empty" in err or "holds other files than shards" in err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"
    status, out, _ = command("data", "shard", own_scans, tmp_path / "shards", "--json")
    assert status == 0
    assert json.loads(out)["images"] == 24
    assert command("data", "shard", own_scans, tmp_path / "shards")[0] == 2
    status, out, _ = command("data", "shard", own_scans, tmp_path / "shards", "--overwrite")
    assert status == 0
    assert "24 images in 1 tar file of" in out
    assert "crossvit train" in out


def test_shards_are_never_written_into_what_they_are_made_of(own_scans: Path, shards: Path) -> None:
    for place, data in ((shards, shards), (own_scans / "shards", own_scans)):
        with pytest.raises(UsageError, match="lies inside the images that are to be written"):
            write_shards(open_data(data), place, overwrite=True)
    assert open_data(shards).fingerprint == open_data(own_scans).fingerprint


def test_a_place_that_cannot_be_written_is_one_line(own_scans: Path, command: Command) -> None:
    status, _, err = command("data", "shard", own_scans, "/proc/nowhere")
    assert status == 1
    assert err == "crossvit: cannot write to /proc/nowhere: No such file or directory\n"


def test_built_in_scans_become_pictures(tmp_path: Path) -> None:
    write_shards(open_data("digits"), tmp_path / "digits")
    before, after = open_data("digits").part("all"), open_data(tmp_path / "digits").part("all")
    assert all(np.array_equal(before.read(index), after.read(index)) for index in (0, 700, 1796))
