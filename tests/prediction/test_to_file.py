"""Predictions into files: what is in them, going on after any interruption, and refusing to mix."""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from crossvit.errors import RunError, UsageError
from crossvit.prediction import result_files as prediction_files
from crossvit.prediction.image_paths import find_images
from crossvit.prediction.predictor import Predictor
from crossvit.prediction.result_files import open_results
from crossvit.prediction.to_file import predict_to_file
from crossvit.results import TrainingResult, plain_name
from crossvit.trained import open_trained
from support.tables import awkward, rows_of

KINDS = ("jsonl", "csv", "parquet")
ROWS_A_PART = 16  # of Parquet here, so that there are several parts


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_files, "ROWS_A_PART", ROWS_A_PART)


@pytest.fixture(scope="module")
def predictor(tiny_run: TrainingResult) -> Predictor:
    return Predictor(tiny_run.run, batch_size=8, top_k=2)


@pytest.fixture(scope="module")
def images(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return awkward(scans, tmp_path_factory.mktemp("awkward"))


def content(out: Path) -> Any:
    """What is in results, to be compared: bytes, or the parts' tables."""
    if out.is_dir():
        return [(part.name, pd.read_parquet(part).to_json()) for part in sorted(out.iterdir())]
    return out.read_bytes()


class Stopped(Exception):
    pass


def stop_after(done: int) -> Callable[[int], None]:
    def progress(n: int) -> None:
        if n >= done:
            raise Stopped

    return progress


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_what_the_predictor_says(
    kind: str, predictor: Predictor, images: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "new folder" / f"out.{kind}"
    result = predict_to_file(predictor, images, out)
    assert (result.n, result.failed, result.abstained, result.skipped) == (44, 1, 0, 0)
    expected = predictor(images)
    found = rows_of(out)
    assert [row["image"] for row in found] == [plain_name(image) for image in images]
    for row, prediction in zip(found, expected, strict=True):
        assert (row["label"] or None) == prediction.label
        assert (row["error"] or None) == prediction.error
        if kind == "csv":
            top = [
                (row[f"top_{place}"], row[f"probability_{place}"])
                for place in (1, 2)
                if row[f"top_{place}"]
            ]
            assert row["abstained"] == "false"
        else:
            top = [(label["label"], label["probability"]) for label in row["top"]]
            assert row["abstained"] is False
        assert [(name, float(share)) for name, share in top] == [
            (label.label, label.probability) for label in prediction.top
        ]
        assert (
            [float(row["probability"])] == [prediction.top[0].probability]
            if prediction.top
            else not row["probability"]
        )
    assert sorted(entry.name for entry in out.parent.iterdir()) == [
        out.name,
        f"{out.name}.options.json",
    ]
    if kind == "parquet":
        assert [len(pd.read_parquet(part)) for part in sorted(out.iterdir())] == [16, 16, 12]
        assert len(pd.read_parquet(out)) == 44


@pytest.mark.parametrize("kind", KINDS)
def test_several_labels_and_abstentions(
    kind: str,
    tiny_run: TrainingResult,
    images: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unsure = Predictor(tiny_run.run, abstain_below=1.0)
    out = tmp_path / f"unsure.{kind}"
    assert predict_to_file(unsure, images[:3], out).abstained == 3
    assert predict_to_file(unsure, images[:3], out, resume=True).abstained == 3
    assert [row["label"] or None for row in rows_of(out)] == [None] * 3

    trained = dataclasses.replace(
        open_trained(tiny_run.run), task="multi-label", thresholds=(0.0, 0.0, 1.0)
    )
    monkeypatch.setattr("crossvit.prediction.predictor.open_trained", lambda source: trained)
    several = Predictor(tiny_run.run, top_k=3)
    out = tmp_path / f"several.{kind}"
    predict_to_file(several, [*images[:2], "gone.png"], out)
    assert predict_to_file(several, [*images[:2], "gone.png"], out, resume=True).failed == 1
    said = [
        [label.label for label in prediction.labels]
        for prediction in several([*images[:2], "gone.png"])
    ]
    assert [sorted(labels) for labels in said] == [["0", "1"], ["0", "1"], []]
    assert [row["labels"] for row in rows_of(out)] == (
        ["; ".join(labels) for labels in said] if kind == "csv" else said
    )


# ---------------------------------------------------------------- going on


@pytest.fixture(scope="module")
def whole(
    predictor: Predictor, images: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with results in every format, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction_files, "ROWS_A_PART", ROWS_A_PART)
        for kind in KINDS:
            predict_to_file(predictor, images, folder / f"out.{kind}")
    return folder


def test_probabilities_survive_every_format_to_the_bit(
    predictor: Predictor, images: list[str], whole: Path
) -> None:
    expected = [
        prediction.top[0].probability if prediction.top else np.nan
        for prediction in predictor(images)
    ]
    for found in (
        pd.read_json(whole / "out.jsonl", lines=True, precise_float=True),
        pd.read_csv(whole / "out.csv"),
        pd.read_parquet(whole / "out.parquet"),
    ):
        assert np.array_equal(found.probability.astype(float), expected, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_after_any_batch_and_gone_on_with_is_the_same(
    kind: str, predictor: Predictor, images: list[str], whole: Path, tmp_path: Path
) -> None:
    for done in (0, 8, 16, 24, 32, 40, 44):
        out = tmp_path / str(done) / f"out.{kind}"
        with pytest.raises(Stopped):
            predict_to_file(predictor, images, out, progress=stop_after(done))
        result = predict_to_file(predictor, images, out, resume=True)
        assert (result.n, result.failed, result.skipped) == (44, 1, done)
        assert content(out) == content(whole / f"out.{kind}")
        assert {entry.name for entry in out.parent.iterdir()} == {
            out.name,
            f"{out.name}.options.json",
        }


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_torn_at_any_byte_and_gone_on_with_is_the_same(
    kind: str, predictor: Predictor, images: list[str], whole: Path, tmp_path: Path
) -> None:
    """What a kill in the middle of a write, or a power cut, may leave: any beginning, perhaps with zeros behind it."""
    out = tmp_path / f"out.{kind}"
    complete = (whole / out.name).read_bytes()
    shutil.copy(whole / f"{out.name}.options.json", tmp_path)
    newline_in_a_name = complete.index(b"two\n" if kind == "csv" else b"two\\n") + 4
    cuts = random.Random(0).sample(range(len(complete)), 12)
    for cut in (*cuts, 1, 20, newline_in_a_name, len(complete) - 1):
        out.write_bytes(complete[:cut] + bytes(cut % 3))
        result = predict_to_file(predictor, images, out, resume=True)
        assert out.read_bytes() == complete, cut
        assert result.skipped <= complete[:cut].count(b"\n")


@pytest.mark.parametrize("written", [False, True])
def test_a_kill_just_before_or_after_a_part_is_made(
    written: bool,
    predictor: Predictor,
    images: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Again and again: the tail is full and its part is not there, or the part is there and its tail is too."""
    out = tmp_path / "out.parquet"
    write = prediction_files.write_atomically

    def killed(path: Path, *content: Any) -> None:
        if written:
            write(path, *content)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(prediction_files, "write_atomically", killed)
        for _ in range(3):
            with pytest.raises(Stopped):
                predict_to_file(predictor, images, out, resume=True)
            assert (list(out.iterdir()) != []) is written
            assert list(tmp_path.glob("out.parquet.part-*.jsonl"))
    predict_to_file(predictor, images, out, resume=True)
    assert content(out) == content(whole / "out.parquet")
    assert not list(tmp_path.glob("out.parquet.part-*"))


@pytest.mark.parametrize("kind", KINDS)
def test_finished_results_are_left_as_they_are(
    kind: str, predictor: Predictor, images: list[str], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(images: object) -> None:
        raise AssertionError("nothing is left to compute")

    before = content(whole / f"out.{kind}")
    idle = {"name": "torch", "precision": "fp32", "__call__": staticmethod(compute)}
    monkeypatch.setattr(predictor, "engine", type("Idle", (), idle)())
    result = predict_to_file(predictor, images, whole / f"out.{kind}", resume=True)
    assert (result.n, result.failed, result.skipped, result.images_per_second) == (44, 1, 44, 0.0)
    assert content(whole / f"out.{kind}") == before


@pytest.mark.parametrize("kind", KINDS)
def test_images_added_at_the_end_are_gone_on_with(
    kind: str, predictor: Predictor, images: list[str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"out.{kind}"
    predict_to_file(predictor, images[:21], out)
    result = predict_to_file(predictor, images, out, resume=True)
    assert (result.n, result.skipped) == (44, 16)
    assert content(out) == content(whole / f"out.{kind}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments_it_ends_at_the_same_results(
    kind: str, tiny_run: TrainingResult, scans: Path, tmp_path: Path
) -> None:
    """SIGKILL after the first batches and some time more, again and again until it is through; then row for row the same."""
    chance = random.Random(kind)
    names = find_images([str(scans)]) * 100
    names[777] = str(tmp_path / "gone.png")
    (tmp_path / "list.txt").write_text("\n".join(names))
    words = [
        tiny_run.run,
        "--from",
        str(tmp_path / "list.txt"),
        "--batch-size",
        "16",
        "--device",
        "cpu",
    ]
    code = "import sys, crossvit.prediction.result_files as files; files.ROWS_A_PART = 256; from crossvit.cli import main; main()"

    def call(out: Path, *options: str) -> list[str]:
        return [sys.executable, "-c", code, "predict", *words, "--out", str(out), *options]

    def size(out: Path) -> int:
        return sum(
            path.stat().st_size
            for path in (out, *out.parent.glob(f"{out.name}.part-*"), *out.glob("*"))
            if path.is_file()
        )

    reference, out = tmp_path / f"reference.{kind}", tmp_path / f"killed.{kind}"
    assert subprocess.run(call(reference), capture_output=True, check=False).returncode == 1
    kills = 0
    for _ in range(4):
        before = size(out)
        process = subprocess.Popen(
            call(out, "--resume"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and size(out) <= before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.6)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    done = subprocess.run(
        call(out, "--resume", "--json"), capture_output=True, text=True, check=False
    )
    summary = json.loads(done.stdout)
    assert (done.returncode, done.stderr, summary["n"], summary["failed"]) == (1, "", 6000, 1)
    assert summary["skipped"] > 0
    assert content(out) == content(reference)
    assert [row["image"] for row in rows_of(out)] == names


# ---------------------------------------------------------------- refusing


def test_going_on_with_other_options_or_another_model_is_refused_by_name(
    tiny_run: TrainingResult, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.csv"
    predict_to_file(Predictor(tiny_run.run), images[:2], out)
    before = out.read_bytes()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"top_k": 1}, "--resume cannot change --top-k 1: .* was begun with 3"),
        ({"batch_size": 4}, "--batch-size 4: .* was begun with 32"),
        ({"tta": "flip"}, "--tta flip: .* was begun with none"),
        ({"abstain_below": 0.5}, "--abstain-below 0.5: .* was begun with None"),
        ({"precision": "bf16"}, "--precision bf16: .* was begun with fp32"),
    ]
    for options, says in changes:
        with pytest.raises(UsageError, match=says):
            predict_to_file(Predictor(tiny_run.run, **options), images[:2], out, resume=True)
    with pytest.raises(
        UsageError, match="exists: add --resume to go on with it, --overwrite to replace it"
    ):
        predict_to_file(Predictor(tiny_run.run), images[:2], out)
    trained = dataclasses.replace(open_trained(tiny_run.run), temperature=2.0, source=tiny_run.run)
    monkeypatch.setattr("crossvit.prediction.predictor.open_trained", lambda source: trained)
    with pytest.raises(UsageError, match=r"another model .*; its temperature differ from those of"):
        predict_to_file(Predictor(tiny_run.run), images[:2], out, resume=True)
    assert out.read_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_other_images_are_refused_by_name(
    kind: str, predictor: Predictor, images: list[str], whole: Path
) -> None:
    out = whole / f"out.{kind}"
    before = content(out)
    swapped = [*images[:20], images[21], images[20], *images[22:]]
    with pytest.raises(
        UsageError,
        match=f"goes on with {images[20]} where the images given now have {images[21]}: give the same",
    ):
        predict_to_file(predictor, swapped, out, resume=True)
    with pytest.raises(
        UsageError, match=f"goes on with {images[40]} where the images given now end"
    ):
        predict_to_file(predictor, images[:40], out, resume=True)
    assert content(out) == before


@pytest.mark.parametrize("kind", KINDS)
def test_overwriting_replaces_results_of_another_model(
    kind: str,
    predictor: Predictor,
    tiny_run: TrainingResult,
    images: list[str],
    whole: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / f"out.{kind}"
    predict_to_file(Predictor(tiny_run.run, top_k=1), images[:20], out)
    if kind == "parquet":
        (out / "part-00001.parquet").write_bytes(b"damaged")
        with pytest.raises(
            RunError, match="part-00001.parquet is damaged .* start again with --overwrite"
        ):
            predict_to_file(Predictor(tiny_run.run, top_k=1), images[:20], out, resume=True)
    predict_to_file(predictor, images, out, overwrite=True)
    assert content(out) == content(whole / f"out.{kind}")


def test_what_others_wrote_is_left_alone(
    predictor: Predictor, images: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    (tmp_path / "mine.parquet").mkdir()
    (tmp_path / "mine.parquet" / "notes.txt").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "file.parquet").write_bytes(b"PAR1")
    for name, says in {
        "mine.csv": "was not made by `crossvit predict`",
        "mine.parquet": r"holds other files than results \(notes.txt\)",
        "folder.jsonl": "something else already",
        "file.parquet": "Parquet is written as a folder",
        "out.txt": r"should end in \.jsonl, \.csv or \.parquet",
        "out": r"should end in \.jsonl, \.csv or \.parquet",
    }.items():
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UsageError, match=says):
                predict_to_file(predictor, images[:2], tmp_path / name, **options)
    with pytest.raises(UsageError, match="give one of them"):
        predict_to_file(predictor, images[:2], tmp_path / "new.csv", resume=True, overwrite=True)
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"
    assert not (tmp_path / "new.csv").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_do_not_write_to_one_file(
    kind: str, predictor: Predictor, images: list[str], tmp_path: Path
) -> None:
    out = tmp_path / f"out.{kind}"
    held = open_results(out, top_k=2, multi_label=False, batch_size=8)
    with pytest.raises(RunError, match="is being written by another process"):
        predict_to_file(predictor, images[:2], out, resume=True)
    held.close()
    assert predict_to_file(predictor, images[:2], out, resume=True).n == 2


def test_a_place_that_cannot_be_written_is_one_line(
    predictor: Predictor, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*out\.csv: (Not a directory|File exists)"):
        predict_to_file(predictor, images[:2], tmp_path / "file" / "out.csv")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        UsageError, match=r"needs the package pyarrow: pip install 'crossvit\[parquet\]'"
    ):
        predict_to_file(predictor, images[:2], tmp_path / "out.parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_full_loses_nothing_that_was_written(
    kind: str, predictor: Predictor, images: list[str], whole: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: a write goes through in part and then fails."""
    out = tmp_path / f"out.{kind}"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, before[1]))
    try:
        with pytest.raises(RunError, match="cannot write .*: File too large"):
            predict_to_file(predictor, images, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    predict_to_file(predictor, images, out, resume=True)
    assert content(out) == content(whole / f"out.{kind}")
