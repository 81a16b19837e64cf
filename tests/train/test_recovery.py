"""Losses that are not finite, and runs that are killed: at any moment, and at every system call of a save."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from crossvit.cli.terminal import TerminalCallback
from crossvit.errors import RunError, TrainingError
from crossvit.report.plots import curves
from crossvit.run import Run
from crossvit.train.callbacks import Callback
from crossvit.train.checkpoint import best_path, copied, load_newest, save_checkpoint
from crossvit.train.loop import fit
from crossvit.train.step import BAD_IN_A_ROW
from crossvit.train.trainer import Training
from support.runs import EVERYTHING, Heard, recipe, same_bits, weights_of


class Poison(Heard):
    """Makes the loss of some steps not a number; remembers what was said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, poisoned: Any) -> None:
        super().__init__()
        step = Training.train_step

        def poisoned_step(
            training: Training, images: torch.Tensor, labels: torch.Tensor
        ) -> tuple[float, int]:
            bad = poisoned(training)
            return step(training, images * float("nan") if bad else images, labels)

        monkeypatch.setattr(Training, "train_step", poisoned_step)


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = Poison(monkeypatch, lambda training: training.step in (1, 4))
    result = fit(recipe(scans, tmp_path / "run", epochs=3), callback=callback)
    assert [entry.skipped for entry in callback.epochs] == [1, 1, 0]
    assert all(torch.isfinite(value).all() for value in weights_of(result.run).values())
    assert [line["skipped"] for line in Run(result.run).entries()] == [1, 1, 0]


def test_many_in_a_row_go_back_to_the_last_checkpoint_with_half_the_rate(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = Poison(
        monkeypatch, lambda training: training.step >= 6 and training.rate_factor == 1
    )
    result = fit(recipe(scans, tmp_path / "run", epochs=8), callback=callback)
    told = [line for line in callback.lines if "not finite" in line]
    assert told == [
        f"the loss or its gradient was not finite for {BAD_IN_A_ROW} steps in a row in epoch 6: "
        "going back to step 6 of 24 with half the rate"
    ]
    assert len(result.epochs) == 8
    assert [entry.skipped for entry in result.epochs] == [0] * 8
    assert [line["epoch"] for line in Run(result.run).entries()] == [*range(1, 9)]


def test_if_that_fails_too_training_stops_with_a_clear_line(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = Poison(monkeypatch, lambda training: training.step >= 4)
    with pytest.raises(
        TrainingError,
        match=r"in epoch 5, at half the rate too: train anew with a lower --lr \(now 0\.001\)",
    ):
        fit(recipe(scans, tmp_path / "run", epochs=8), callback=callback)
    assert load_newest(tmp_path / "run" / "checkpoints")[0] is not None


def test_a_failure_that_comes_again_goes_one_checkpoint_further_back(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the newest checkpoint holds leads to it: nothing is mended until step 3 to 5 are gone through anew."""
    gone_through: set[int] = set()

    def poisoned(training: Training) -> bool:
        if training.rate_factor < 1 and training.step < 6:
            gone_through.add(training.step)
        return training.step >= 6 and not gone_through

    callback = Poison(monkeypatch, poisoned)
    result = fit(recipe(scans, tmp_path / "run", epochs=8), callback=callback)
    told = [line.partition(": ")[2] for line in callback.lines if "not finite" in line]
    assert told == [
        "going back to step 6 of 24 with half the rate",
        "going back to step 3 of 24 with half the rate",
    ]
    assert gone_through == {3, 4, 5}
    assert [entry.epoch for entry in result.epochs] == [*range(1, 9)]


def test_weights_that_an_update_made_infinite_are_never_saved(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of that step is finite, and a checkpoint is due after each."""
    step = Training.train_step

    def exploding(
        training: Training, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[float, int]:
        done = step(training, images, labels)
        if training.step == 4 and training.rate_factor == 1:
            with torch.no_grad():
                next(training.model.parameters()).mul_(float("inf"))
        return done

    monkeypatch.setattr(Training, "train_step", exploding)
    callback = Heard()
    result = fit(recipe(scans, tmp_path / "run", epochs=8, every="1 steps"), callback=callback)
    assert [line.partition(": ")[2] for line in callback.lines if "not finite" in line] == [
        "going back to step 4 of 24 with half the rate"
    ]
    assert [entry.skipped for entry in result.epochs] == [0] * 8
    assert all(weight.isfinite().all() for weight in weights_of(result.run).values())


def test_an_epoch_whose_steps_were_all_skipped_has_no_loss(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = Poison(monkeypatch, lambda training: 3 <= training.step < 6)
    result = fit(recipe(scans, tmp_path / "run", epochs=3), callback=callback)
    assert [
        (entry.loss is None, entry.train_top1 is None, entry.skipped) for entry in result.epochs
    ] == [
        (False, False, 0),
        (True, True, 3),
        (False, False, 0),
    ]
    assert [line["loss"] is None for line in Run(result.run).entries()] == [False, True, False]
    terminal = TerminalCallback()
    terminal.epochs = 3
    terminal.on_epoch_end(result.epochs[1])
    assert "epoch 2/3  loss -  train -  held out " in capsys.readouterr().err
    assert len(curves(result.epochs)) == 2


# ---- the best epoch


class Scored:
    """Gives the held-out score of each epoch; remembers the weights that had it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, score: Any) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        evaluate = Training.evaluate

        def scored(training: Training, **how: Any) -> Any:
            evaluation, thresholds = evaluate(training, **how)
            if training.rate_factor == 1:
                self.weights.setdefault(training.step, copied(training.model.state_dict()))
            return dataclasses.replace(evaluation, top1=score(training)), thresholds

        monkeypatch.setattr(Training, "evaluate", scored)


def test_the_best_of_a_way_that_was_left_is_not_taken(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epoch 4 (step 12) is the best, and lost when the run goes back to the checkpoint after epoch 3: then it is epoch 2."""
    Poison(monkeypatch, lambda training: training.step >= 12 and training.rate_factor == 1)
    scored = Scored(
        monkeypatch,
        lambda training: {6: 0.5, 12: 1.0 if training.rate_factor == 1 else 0.1}.get(
            training.step, 0.1
        ),
    )
    result = fit(recipe(scans, tmp_path / "run", epochs=9, every="3 epochs", select="best"))
    assert result.record.result.selected_epoch == 2
    assert same_bits(weights_of(result.run), scored.weights[6])


def test_a_torn_file_of_the_best_weights_ends_at_the_same_bits(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epoch but the last is better than the one before."""
    Scored(monkeypatch, lambda training: training.step / 100 if training.step < 12 else 0.0)
    settings: dict[str, Any] = {"epochs": 4, "select": "best"}
    fit(recipe(scans, tmp_path / "whole", **settings))
    with pytest.raises(KeyboardInterrupt):
        fit(recipe(scans, tmp_path / "cut", **settings), callback=StopAfter(steps=10))
    torn = best_path(tmp_path / "cut" / "checkpoints", 9)
    torn.write_bytes(torn.read_bytes()[:-1000])
    callback = Heard()
    result = fit(recipe(scans, tmp_path / "cut", **settings), resume=True, callback=callback)
    assert any("names best weights that are lost" in line for line in callback.lines)
    assert "resuming after epoch 2 of 4" in callback.lines
    assert result.record.result.selected_epoch == 3
    assert same_bits(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))


@pytest.fixture(scope="module")
def uninterrupted(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run of EVERYTHING for each seed, never stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for seed in (0, 1, 2):
        fit(recipe(scans, folder / str(seed), seed=seed, **EVERYTHING))
    return {seed: folder / str(seed) for seed in (0, 1, 2)}


COMMAND = "import sys, torch; torch.set_num_threads(int(sys.argv[1])); from crossvit.cli import main; main(sys.argv[2:])"


def words(scans: Path, out: Path, seed: int) -> list[str]:
    settings = recipe(scans, out, seed=seed, **EVERYTHING).to_dict()
    flat = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    for table in settings.values():
        flat |= table if isinstance(table, dict) else {}
    given = ["--" + key.replace("_", "-") for key in flat]
    options = [
        text
        for name, (key, value) in zip(given, flat.items(), strict=True)
        if key not in ("data", "out") and value not in (None, False, [], "")
        for text in (name, str(value))
    ]
    return [
        sys.executable,
        "-c",
        COMMAND,
        str(torch.get_num_threads()),
        "train",
        str(scans),
        "--out",
        str(out),
        *options,
    ]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_killed_at_random_moments_ends_at_the_same_bits(
    seed: int, uninterrupted: dict[int, Path], scans: Path, tmp_path: Path
) -> None:
    """SIGKILL after the first checkpoint and some steps more, again and again until the run is through."""
    out = tmp_path / "killed"
    chance = random.Random(seed)
    kills = 0
    for _ in range(3):
        before = _newest(out)
        process = subprocess.Popen(
            [*words(scans, out, seed), "--resume"],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and _newest(out) <= before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(chance.random() * 0.5)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 1
    done = subprocess.run(
        [*words(scans, out, seed), "--resume"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert same_bits(weights_of(out), weights_of(uninterrupted[seed]))
    assert [line["loss"] for line in Run(out).entries()] == [
        line["loss"] for line in Run(uninterrupted[seed]).entries()
    ]


def _newest(out: Path) -> int:
    return max(
        (
            int(path.stem.removeprefix("step-"))
            for path in (out / "checkpoints").glob("step-*.ckpt")
        ),
        default=-1,
    )


def test_every_step_is_a_place_to_stop_and_go_on_from(
    uninterrupted: dict[int, Path], scans: Path, tmp_path: Path
) -> None:
    """Stopped after each step in turn, the ends of epochs included."""
    out = tmp_path / "stopped"
    for _ in range(12):
        try:
            fit(recipe(scans, out, **EVERYTHING), resume=True, callback=StopAfter(steps=1))
        except KeyboardInterrupt:
            continue
        break
    assert same_bits(weights_of(out), weights_of(uninterrupted[0]))


class StopAfter(Callback):
    def __init__(self, *, steps: int) -> None:
        self.left = steps

    def on_step_end(self, epoch: int, loss: float, top1: float, images_per_second: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


# ---- every system call of a save

FAULTS = ["open", "write", "short write", "fsync", "replace", "folder open", "folder fsync"]

SAVE = """
import errno, os, sys
from pathlib import Path
import torch
import crossvit.files as files
from crossvit.train.checkpoint import save_checkpoint

fault, how, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
calls = {"fsync": 0, "os.open": 0}


def fail(path=None):
    if how == "kill":
        os._exit(9)
    raise OSError(errno.EIO, "Input/output error")


class Torn:
    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, part):
        if fault == "write":
            fail()
        self.file.write(bytes(part)[: len(part) // 2])
        self.file.flush()
        fail()


real_open, real_fsync, real_replace, real_os_open = open, os.fsync, os.replace, os.open


def faulty_open(path, mode="r", *rest, **more):
    if fault == "open":
        fail()
    file = real_open(path, mode, *rest, **more)
    return Torn(file) if fault in ("write", "short write") else file


def faulty_fsync(number):
    calls["fsync"] += 1
    if fault == ("fsync" if calls["fsync"] == 1 else "folder fsync"):
        fail()
    real_fsync(number)


def faulty_replace(*paths):
    fail() if fault == "replace" else real_replace(*paths)


def faulty_os_open(*arguments, **more):
    return fail() if fault == "folder open" else real_os_open(*arguments, **more)


files.open = faulty_open
os.fsync, os.replace, os.open = faulty_fsync, faulty_replace, faulty_os_open
save_checkpoint(folder, {"step": 2, "x": torch.ones(1000)}, step=2)
"""


@pytest.mark.parametrize("how", ["error", "kill"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_any_call_of_a_save_leaves_a_checkpoint_that_loads(
    fault: str, how: str, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, {"step": 1, "x": torch.zeros(1000)}, step=1)
    done = subprocess.run(
        [sys.executable, "-c", SAVE, fault, how, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (9 if how == "kill" else 1)
    if how == "error":
        assert "crossvit.errors.RunError: cannot write" in done.stderr
    state, _ = load_newest(tmp_path)
    assert state is not None
    step = (
        2 if fault in ("folder open", "folder fsync") else 1
    )  # renamed already: the new one is whole
    assert state["step"] == step
    assert torch.equal(state["x"], torch.full((1000,), float(step - 1)))
    save_checkpoint(tmp_path, {"step": 3, "x": torch.ones(1)}, step=3)  # and the next save works
    assert load_newest(tmp_path)[0]["step"] == 3  # type: ignore[index]


def test_a_failing_save_in_a_run_ends_it_with_one_line_and_it_goes_on(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(recipe(scans, tmp_path / "whole", epochs=2))
    count = 0
    replace = os.replace

    def failing(source: Any, destination: Any) -> None:
        nonlocal count
        count += str(destination).endswith(".ckpt")
        if count == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, destination)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing)
        with pytest.raises(
            RunError,
            match=r"cannot write .*\.ckpt: No space left on device; what was there before is kept",
        ):
            fit(recipe(scans, tmp_path / "cut", epochs=2))
    fit(recipe(scans, tmp_path / "cut", epochs=2), resume=True)
    assert same_bits(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))
