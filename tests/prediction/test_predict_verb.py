"""`crossvit predict`: what it prints, into what it writes, where it takes names from, and what it says of wrong calls."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crossvit.prediction.image_paths import find_images
from crossvit.prediction.predictor import Predictor
from crossvit.results import BatchPrediction, TrainingResult, plain_name
from crossvit.trained import open_trained
from support.tables import awkward, rows_of

Command = Callable[..., tuple[int, str, str]]


def test_the_command_writes_resumes_and_tells(
    command: Command, tiny_run: TrainingResult, own_scans: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    words = ("predict", tiny_run.run, own_scans, "--out", out)
    status, printed, err = command(*words)
    assert (status, err) == (0, "")
    assert printed.startswith("images  24 (")
    assert printed.endswith(f"results {out}\n")
    status, printed, err = command(*words)
    assert (status, printed) == (2, "")
    assert (
        err
        == f"crossvit: {out} exists: add --resume to go on with it, --overwrite to replace it, or choose another --out\n"
    )
    (own_scans / "2" / "zzz.png").write_bytes(b"")
    status, printed, _ = command(*words, "--resume", "--json")
    summary = json.loads(printed)
    assert BatchPrediction(**summary).n == 25
    assert (status, summary["failed"], summary["skipped"]) == (1, 1, 0)
    status, printed, _ = command(*words, "--overwrite", "--abstain-below", 1.0)
    assert status == 1
    assert "failed  1 could not be read" in printed
    assert "unsure  24 without an answer" in printed


def test_the_command_prints_what_is_unsure_and_what_is_several(
    command: Command, tiny_run: TrainingResult, own_scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = find_images([str(own_scans)])[0]
    assert command("predict", tiny_run.run, path, "--abstain-below", 1.0)[1].startswith(
        f"{path}  no answer  ("
    )
    trained = dataclasses.replace(
        open_trained(tiny_run.run), task="multi-label", thresholds=(0.0, 1.0, 1.0)
    )
    monkeypatch.setattr("crossvit.prediction.predictor.open_trained", lambda source: trained)
    line = command("predict", tiny_run.run, path)[1]
    assert line.startswith(f"{path}  0 ")
    assert line.split("(")[0].count("%") == 1
    monkeypatch.setattr(
        "crossvit.prediction.predictor.open_trained",
        lambda source: dataclasses.replace(trained, thresholds=(1.0,) * 3),
    )
    assert command("predict", tiny_run.run, path)[1].startswith(f"{path}  no label  (")


def test_names_come_from_a_list_or_standard_input(
    command: Command,
    tiny_run: TrainingResult,
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = [image for image in awkward(scans, tmp_path) if "\n" not in image]
    text = "\r\n".join(["", *named, ""]).encode("utf-8", "surrogateescape")
    (tmp_path / "list.txt").write_bytes(text)
    out = tmp_path / "out.jsonl"
    for place in (tmp_path / "list.txt", "-"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert (
            command("predict", tiny_run.run, "--from", place, "--out", out, "--overwrite")[0] == 1
        )
        assert [row["image"] for row in rows_of(out)] == [plain_name(name) for name in named]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    status, printed, _ = command("predict", tiny_run.run, "--from", "-", "--json")
    assert (status, json.loads(printed)["n"], json.loads(printed)["failed"]) == (1, len(named), 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["SCANS", "--from", "list.txt"], "give one of them"),
        (["--from", "gone.txt"], "no file gone.txt: --from takes a list of images"),
        (["--from", "EMPTY"], "it should have names, one a line"),
        (["SCANS", "--resume"], "add --out results.jsonl"),
        (["SCANS", "--out", "results.xlsx"], "should end in .jsonl, .csv or .parquet"),
        (["SCANS", "--tta", "flop"], "did you mean flip"),
    ],
)
def test_a_wrong_call_is_one_line(
    words: list[str],
    says: str,
    command: Command,
    tiny_run: TrainingResult,
    scans: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    places = {"SCANS": str(scans), "EMPTY": str(tmp_path / "empty.txt")}
    status, printed, err = command(
        "predict", tiny_run.run, *(places.get(word, word) for word in words)
    )
    assert (status, printed, len(err.splitlines())) == (2, "", 1)
    assert says in err


def test_ctrl_c_says_how_to_go_on(
    command: Command,
    tiny_run: TrainingResult,
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def batches(self: Predictor, images: Iterator[str]) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "batches", batches)
        status, printed, err = command("predict", tiny_run.run, scans, "--out", out)
    assert (status, printed) == (130, "")
    assert err == f"crossvit: stopped; go on with the same command and --resume ({out} is kept)\n"
    assert command("predict", tiny_run.run, scans, "--out", out, "--resume")[0] == 0


def test_progress_in_a_log_has_the_speed_and_the_time_left(
    command: Command,
    tiny_run: TrainingResult,
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("crossvit.cli.predicting.SECONDS_A_LINE", 0.0)
    monkeypatch.setattr("threading.Thread.start", lambda thread: thread.run())
    with monkeypatch.context() as patch:
        patch.setattr("crossvit.prediction.predictor.ThreadPoolExecutor", Inline)
        err = command("predict", tiny_run.run, scans, "--out", tmp_path / "out.jsonl")[2]
    lines = err.splitlines()
    assert lines[1].startswith("32 of 60, ")
    assert lines[1].endswith("images/s)")
    assert " left (" in lines[1]


class Inline:
    """A pool without threads."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Any:
        from concurrent.futures import Future

        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future

    def shutdown(self, **_: object) -> None:
        pass
