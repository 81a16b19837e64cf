"""Runs: the same bits every time, stopped and gone on with, refused, and what is said of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

import crossvit
from crossvit.data.loader import _interrupts_left_to_this_process
from crossvit.data.sources import open_data
from crossvit.errors import RunError, TrainingError, UsageError
from crossvit.results import Epoch, TrainingResult
from crossvit.run import Run
from crossvit.train.callbacks import Callback
from crossvit.train.checkpoint import checkpoint_path
from crossvit.train.loop import fit
from support.runs import ONE_THREAD, recipe, same_bits, weights_of


def test_a_full_disk_ends_training_with_one_line_and_the_last_checkpoint(
    scans: Path, tmp_path: Path
) -> None:
    """A real limit on file size in a process of its own: the first write over it fails as a full disk does."""
    out = tmp_path / "run"
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "from crossvit.cli import main; main(sys.argv[1:])"
    )
    words = [
        "train",
        str(scans),
        "--out",
        str(out),
        "--model",
        "crossvit_pico_32",
        "--epochs",
        "1",
        "--precision",
        "fp32",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("crossvit: cannot write")
    assert "File too large" in last
    assert not list((out / "checkpoints").iterdir())  # nothing half-written
    assert Run(out).record().result is None


def test_a_run_has_everything_and_is_the_same_to_the_bit_when_repeated(
    scans: Path, tmp_path: Path
) -> None:
    results = [fit(recipe(scans, tmp_path / name)) for name in ("one", "two")]
    assert sorted(path.name for path in (tmp_path / "one").iterdir() if path.name != ".lock") == [
        "checkpoints",
        "log.jsonl",
        "model.safetensors",
        "run.json",
    ]
    assert same_bits(weights_of(tmp_path / "one"), weights_of(tmp_path / "two"))
    assert results[0].evaluation.loss == results[1].evaluation.loss
    record = Run(tmp_path / "one").record()
    assert record.schema == 1
    assert record.classes == ("0", "1", "2")
    assert record.result.n == 12
    assert len(record.data.held_out) == 12
    assert record.precision == "fp32"
    assert len(Run(tmp_path / "one").entries()) == 1


class Stop(Callback):
    """Interrupts after some epochs, or in the middle of one."""

    def __init__(self, *, epochs: int, steps: int = 0) -> None:
        self.epochs, self.steps, self.lines = epochs, steps, []

    def on_message(self, line: str) -> None:
        self.lines.append(line)

    def on_epoch_end(self, entry: Epoch) -> None:
        if entry.epoch == self.epochs and not self.steps:
            raise KeyboardInterrupt

    def on_step_end(self, epoch: int, loss: float, top1: float, images_per_second: float) -> None:
        if epoch == self.epochs and self.steps:
            self.steps -= 1
            if not self.steps:
                raise KeyboardInterrupt


@pytest.mark.parametrize("steps_into_the_next", [0, 2])
def test_a_resumed_run_equals_one_never_stopped(
    steps_into_the_next: int, scans: Path, tmp_path: Path
) -> None:
    plan = {"epochs": 3, "drop_path": 0.3}
    fit(recipe(scans, tmp_path / "whole", **plan))
    with pytest.raises(KeyboardInterrupt):
        fit(
            recipe(scans, tmp_path / "cut", **plan),
            callback=Stop(epochs=1, steps=steps_into_the_next),
        )
    callback = Stop(epochs=99)
    result = fit(recipe(scans, tmp_path / "cut", **plan), resume=True, callback=callback)
    assert "resuming after epoch 1 of 3" in callback.lines
    assert same_bits(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))
    assert [entry.epoch for entry in result.epochs] == [1, 2, 3]
    logged = [
        [line["loss"] for line in Run(tmp_path / name).entries()] for name in ("whole", "cut")
    ]
    assert logged[0] == logged[1]


def test_resume_goes_on_from_the_checkpoint_before_a_torn_one(scans: Path, tmp_path: Path) -> None:
    plan = {"epochs": 3}
    fit(recipe(scans, tmp_path / "whole", **plan))
    with pytest.raises(KeyboardInterrupt):
        fit(recipe(scans, tmp_path / "cut", **plan), callback=Stop(epochs=2))
    newest = checkpoint_path(tmp_path / "cut" / "checkpoints", 6)  # three steps an epoch
    newest.write_bytes(newest.read_bytes()[:1000])
    callback = Stop(epochs=99)
    fit(recipe(scans, tmp_path / "cut", **plan), resume=True, callback=callback)
    assert any(
        "step-000000006.ckpt is torn" in line and "using the one before it" in line
        for line in callback.lines
    )
    assert same_bits(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))


def test_resume_from_nothing_starts_and_on_a_finished_run_returns(
    scans: Path, tmp_path: Path
) -> None:
    first = fit(recipe(scans, tmp_path / "run"), resume=True)
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.unlink()  # a finished run needs none
    again = fit(recipe(scans, tmp_path / "run"), resume=True)
    assert (again.top1, again.seconds, again.epochs) == (first.top1, first.seconds, first.epochs)
    assert again.evaluation is None
    with pytest.raises(UsageError, match="give one of them"):
        fit(recipe(scans, tmp_path / "run"), resume=True, overwrite=True)
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_killed_before_its_first_checkpoint_starts_from_its_weights_again(
    tiny_run: TrainingResult, scans: Path, tmp_path: Path
) -> None:
    plan = {"weights": tiny_run.run, "epochs": 1}
    fit(recipe(scans, tmp_path / "whole", **plan))
    with pytest.raises(KeyboardInterrupt):
        fit(recipe(scans, tmp_path / "cut", **plan), callback=Stop(epochs=0, steps=1))
    fit(recipe(scans, tmp_path / "cut", **plan), resume=True)
    assert same_bits(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))


def test_resume_refuses_changes_by_name(
    tiny_run: TrainingResult, scans: Path, own_scans: Path
) -> None:
    out = Path(tiny_run.run)
    with pytest.raises(
        UsageError,
        match=r"--resume cannot change --epochs 9 \(the run has 1\), --lr 0.5 \(the run has 0.001\)",
    ):
        fit(recipe(scans, out, epochs=9, lr=0.5), resume=True)
    with pytest.raises(UsageError, match="--resume cannot change DATA"):
        fit(recipe(own_scans, out), resume=True)


def test_resume_takes_the_same_folder_however_it_is_written(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(recipe(scans, tmp_path / "run", epochs=2), callback=Stop(epochs=1))
    monkeypatch.chdir(scans.parent)
    assert fit(recipe(f"./{scans.name}/", tmp_path / "run", epochs=2), resume=True).n == 12


def test_a_loss_that_is_not_finite_stops_with_one_line(scans: Path, tmp_path: Path) -> None:
    callback = Stop(epochs=99)
    with pytest.raises(
        TrainingError, match=r"not finite .*, at half the rate too: .* lower --lr \(now 1e\+09\)"
    ):
        fit(recipe(scans, tmp_path / "run", epochs=30, lr=1e9), callback=callback)
    assert any("not finite" in line and "going back to step" in line for line in callback.lines)


def test_the_classifier_comes_along_for_the_same_classes_only(
    tiny_run: TrainingResult, scans: Path, own_scans: Path, tmp_path: Path
) -> None:
    """Told by name: three other classes are other classes."""
    for name in "012":
        (own_scans / name).rename(own_scans / f"class {name}")
    said = []
    for data in (scans, own_scans):
        callback = Stop(epochs=99)
        fit(
            recipe(data, tmp_path / "runs" / data.name, model=None, weights=tiny_run.run),
            callback=callback,
        )
        said.append(
            any("new classifier: 3 classes in place of 3" in line for line in callback.lines)
        )
    assert said == [False, True]


def test_resume_refuses_data_that_has_changed(own_scans: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(recipe(own_scans, tmp_path / "run", epochs=2), callback=Stop(epochs=1))
    next((own_scans / "0").iterdir()).unlink()
    with pytest.raises(UsageError, match="are not those .* was trained on"):
        fit(recipe(own_scans, tmp_path / "run", epochs=2), resume=True)


def test_a_folder_that_is_taken_is_refused_or_replaced(scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit(recipe(scans, out))
    with pytest.raises(
        UsageError, match="exists: add --resume to go on with it, --overwrite to replace it"
    ):
        fit(recipe(scans, out))
    fit(recipe(scans, out, seed=1), overwrite=True)
    assert Run(out).record().recipe["seed"] == 1
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.txt").write_text("keep me")
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(
            UsageError,
            match="has files and is not a run, so it is left alone: choose another --out",
        ):
            fit(recipe(scans, tmp_path / "photos"), **how)
    assert (tmp_path / "photos" / "dear.txt").read_text() == "keep me"


def test_two_processes_cannot_train_into_one_run(scans: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.lock(), pytest.raises(RunError, match="is being trained by another process"):
        fit(recipe(scans, tmp_path / "run"))


def test_starting_from_another_runs_weights_takes_its_model(
    tiny_run: TrainingResult, own_scans: Path, tmp_path: Path
) -> None:
    for path in list((own_scans / "2").iterdir()):
        path.unlink()
    (own_scans / "2").rmdir()
    callback = Stop(epochs=99)
    result = fit(
        recipe(own_scans, tmp_path / "run", model=None, weights=tiny_run.run), callback=callback
    )
    assert result.record.model == "crossvit_pico_32"
    assert any("new classifier: 2 classes in place of 3" in line for line in callback.lines)
    started, before = weights_of(tmp_path / "run"), weights_of(tiny_run.run)
    assert len(started["heads.0.weight"]) == 2
    moved = (started["tokens.0.positions"] - before["tokens.0.positions"]).abs().max()
    assert moved < 0.02  # one epoch away from where it began, not a new draw


def test_bad_images_stop_training_before_it_starts_or_are_skipped(
    own_scans: Path, tmp_path: Path
) -> None:
    (own_scans / "0" / "zero.png").write_bytes(b"")
    (own_scans / "1" / "text.jpg").write_text("hello")
    with pytest.raises(
        crossvit.CrossViTError,
        match=r"cannot be decoded: .*Repair or delete them, or add --skip-bad",
    ):
        fit(recipe(own_scans, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        crossvit.CrossViTError, match="2 of 26 images cannot be decoded"
    ):  # of both parts together
        fit(recipe(own_scans, tmp_path / "run"))
    callback = Stop(epochs=99)
    result = fit(recipe(own_scans, tmp_path / "run", skip_bad=True), callback=callback)
    skipped = " ".join(line for line in callback.lines if "skipped: 2 of 26" in line)
    assert "zero.png: the file is empty (0 bytes)" in skipped
    assert "text.jpg: not an image" in skipped
    assert result.record.data.train + result.n == 24
    for name in ("0/zero.png", "1/text.jpg"):
        (own_scans / name).unlink()  # what was skipped is no part of the data
    record = Run(tmp_path / "run").record()
    assert open_data(own_scans).fingerprint == record.data.fingerprint


def test_a_run_inside_its_images_is_refused(own_scans: Path) -> None:
    with pytest.raises(UsageError, match="lies inside the images of"):
        fit(recipe(own_scans, own_scans / "run"))


def test_the_first_lines_say_what_was_found_the_model_and_the_time(
    scans: Path, tmp_path: Path
) -> None:
    class Listen(Stop):
        def on_train_start(self, lines: list[str], **_: object) -> None:  # type: ignore[override]
            self.lines += lines

    callback = Listen(epochs=99)
    fit(recipe(scans, tmp_path / "run", model=None), callback=callback)
    text = "\n".join(callback.lines)
    assert "3 classes, 60 images (48 train, 12 held out), 8x8 pixels" in text
    assert "crossvit_pico_32: 1.1" in text
    assert "chosen for 48 images with sides around 8 (--model takes another)" in text
    assert "1 x 3 steps, batch 16, fp32 on cpu" in text
    assert "about " in text


@pytest.fixture
def interrupts_heard() -> Iterator[None]:
    """Processes started inside hear SIGINT where the tests do not, as in a background job of a script: who is started ignores
    what its parent ignores, and does not what its parent handles."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts_heard")
@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0])
def test_ctrl_c_with_workers_is_one_line(delay: float, scans: Path, tmp_path: Path) -> None:
    """To the whole process group, as a terminal sends it, while the workers start and later."""
    words = [
        "train",
        str(scans),
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "500",
        "--workers",
        "2",
    ]
    command = [sys.executable, "-m", "crossvit", *words]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=ONE_THREAD,
    )
    try:
        deadline = time.monotonic() + 240  # to begin, beside other tests
        while not (tmp_path / "run" / "run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("crossvit: stopped")


@pytest.mark.usefixtures("interrupts_heard")
def test_ctrl_c_while_workers_are_started_is_heard_when_they_are() -> None:
    started = []
    with pytest.raises(KeyboardInterrupt), _interrupts_left_to_this_process():  # noqa: PT012  # what comes after it has its turn
        signal.raise_signal(signal.SIGINT)
        code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
        started.append(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )
    assert started == ["True\n"], "a process that was started inside does not hear it"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.usefixtures("interrupts_heard")
def test_ctrl_c_between_two_epochs_is_not_lost(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without workers too, where an epoch's first batch is asked for."""
    begin = DataLoader.__iter__

    def interrupted(loader: DataLoader[Any]) -> Any:
        signal.raise_signal(signal.SIGINT)
        return begin(loader)

    monkeypatch.setattr(DataLoader, "__iter__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe(scans, tmp_path / "run"))


@pytest.mark.usefixtures("interrupts_heard")
@pytest.mark.parametrize("moment", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_resumes_to_the_same_bits(
    moment: signal.Signals, scans: Path, tmp_path: Path
) -> None:
    words = [
        "--model",
        "crossvit_pico_32",
        "--epochs",
        "4",
        "--batch-size",
        "16",
        "--precision",
        "fp32",
        "--device",
        "cpu",
    ]

    def start(name: str, *more: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "crossvit",
            "train",
            str(scans),
            "--out",
            str(tmp_path / name),
            *words,
            *more,
        ]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD
        )

    whole = start("whole")
    stopped = start("cut")
    log = tmp_path / "cut" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 1) and time.monotonic() < deadline:
        time.sleep(0.02)
    stopped.send_signal(moment)
    _, errors = stopped.communicate(timeout=120)
    if moment == signal.SIGINT:
        assert stopped.returncode == 130
        assert "crossvit: stopped; go on with `crossvit train" in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    resumed = start("cut", "--resume")
    for process in (whole, resumed):
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    assert "top-1" in out
    assert same_bits(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))
