"""What `--resume` restores, accepts, refuses and mends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from crossvit.data.augment import seed_generators
from crossvit.errors import UsageError
from crossvit.fast.native.build import native, without_kernels
from crossvit.run import Run
from crossvit.train.callbacks import Callback
from crossvit.train.distributed import Team
from crossvit.train.loop import fit
from crossvit.train.losses import Mixing
from crossvit.train.recipe import MixingRecipe, load_recipe
from crossvit.train.reproducibility import CUBLAS, deterministic, same_kernels, threads
from crossvit.train.resume import refuse_changes
from crossvit.train.trainer import Training
from support.runs import TINY, Heard, recipe, same_bits, weights_of

Command = Callable[..., tuple[int, str, str]]


class StopAfter(Callback):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step_end(self, epoch: int, loss: float, top1: float, images_per_second: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def cut(plan: Any, *, after: int) -> None:
    """A run of `plan` that is stopped when `after` steps are done."""
    with pytest.raises(KeyboardInterrupt):
        fit(plan, callback=StopAfter(after))


# ---- what is restored


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The scale of the loss before each step; the second step of a run is made to overflow. With one thread: several of them
    wait long for each other beside other tests."""
    found: list[float] = []
    step = Training.train_step

    def overflowing(
        training: Training, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[float, int]:
        found.append(training.scaler.get_scale())
        return step(training, images * float("inf") if training.step == 1 else images, labels)

    monkeypatch.setattr(Training, "train_step", overflowing)
    with threads(1):
        yield found


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_half_precision_is_resumed_to_the_bit(
    precision: str, scans: Path, tmp_path: Path, scales: list[float]
) -> None:
    """Four images, again and again: processors without half precision are slow at it."""
    plan = {"epochs": 5, "batch_size": 4, "overfit_one_batch": True, "precision": precision}
    whole = fit(recipe(scans, tmp_path / "whole", **plan))
    of_whole = scales.copy()
    scales.clear()
    cut(
        recipe(scans, tmp_path / "cut", **plan), after=3
    )  # the fourth step is done too, and not saved
    scales.clear()
    result = fit(recipe(scans, tmp_path / "cut", **plan), resume=True)
    assert same_bits(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))
    assert [entry.loss for entry in result.epochs] == [entry.loss for entry in whole.epochs]
    assert [entry.skipped for entry in whole.epochs] == [0, 1, 0, 0, 0]
    assert of_whole == ([2.0**16] * 2 + [2.0**15] * 3 if precision == "fp16" else [1.0] * 5)
    assert scales == of_whole[3:]
    plain = fit(recipe(scans, tmp_path / "plain", **plan | {"precision": "fp32"}))
    assert plain.epochs[0].loss != whole.epochs[0].loss


def test_threads_and_precision_are_the_runs_own(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor with other abilities goes on as the first one began; afterwards torch has its own threads again."""
    plan = recipe(scans, tmp_path / "run", epochs=2, precision="auto")
    before = torch.get_num_threads()
    seen: list[tuple[int, str]] = []
    step = Training.train_step

    def looked_at(training: Training, *given: Any) -> tuple[float, int]:
        seen.append((torch.get_num_threads(), training.precision))
        return step(training, *given)

    try:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
        torch.set_num_threads(1)
        cut(plan, after=4)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
        torch.set_num_threads(2)
        monkeypatch.setattr(Training, "train_step", looked_at)
        fit(plan, resume=True)
        assert seen == [(1, "fp32")] * 3
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    record = Run(tmp_path / "run").record()
    assert (record.threads, record.precision) == (1, "fp32")


@pytest.mark.parametrize("record", ["with", "without", "of before"])
def test_kernels_are_the_runs_own(
    record: str, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on with them if it was begun with them; runs of before they were recorded had none."""
    if native() is None:
        pytest.skip("no AVX-512, or no C++ compiler: there are no kernels here")
    seen: list[bool] = []
    step = Training.train_step

    def looked_at(training: Training, *given: Any) -> tuple[float, int]:
        seen.append(native() is not None)
        return step(training, *given)

    plan = {"epochs": 2, "precision": "bf16", "every": "1 steps"}
    run = Run(tmp_path / "run")
    had = record == "with"
    with contextlib.nullcontext() if had else without_kernels():
        fit(recipe(scans, tmp_path / "whole", **plan))
        cut(recipe(scans, run.path, **plan), after=2)
    assert run.record().kernels is had
    if record == "of before":
        older = run.record().to_dict()
        del older["kernels"]
        run.record_path.write_text(json.dumps(older))
    monkeypatch.setattr(Training, "train_step", looked_at)
    callback = Heard()
    result = fit(recipe(scans, run.path, **plan), resume=True, callback=callback)
    assert set(seen) == {had}
    assert result.record.kernels is had
    assert native() is not None
    assert not [line for line in callback.lines if line.startswith("warn") and "kernels" in line]
    assert same_bits(weights_of(run.path), weights_of(tmp_path / "whole"))


def test_a_run_whose_kernels_are_not_here_is_warned_about_and_goes_on(
    forgotten: None, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSVIT_KERNELS", "off")
    plan = recipe(scans, tmp_path / "run")
    cut(plan, after=1)
    run = Run(tmp_path / "run")
    assert run.record().kernels is False
    run.amend(kernels=True)
    callback = Heard()
    result = fit(plan, resume=True, callback=callback)
    problem = (
        "the run was computed with our kernels, and here there are none (CROSSVIT_KERNELS=off)"
    )
    assert [line for line in callback.lines if "kernels" in line] == [
        f"warn   {problem}: its last bits become others"
    ]
    assert result.record.kernels is False


def test_a_run_of_the_first_schema_is_read_as_one_without_kernels() -> None:
    old = Run(Path(__file__).parents[1] / "fixtures" / "run_schema_1").record()
    assert old.kernels is False
    with same_kernels(old, torch.device("cpu"), Heard(), Team()):
        assert native() is None


def test_kernels_compute_where_every_process_has_them(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process whose cache is full leaves torch to compute in all; a GPU has nothing to do with it."""
    here = native() is not None
    for reasons, there in ((["", ""], here), (["", "no space left"], False)):
        monkeypatch.setattr(Team, "gather", lambda team, own, reasons=reasons: reasons)
        with same_kernels(None, torch.device("cpu"), Heard(), Team(size=2)):
            assert (native() is not None) == there
        old = Run(Path(__file__).parents[1] / "fixtures" / "run_schema_1").record()
        with same_kernels(old, torch.device("cuda"), Heard(), Team(size=2)):
            assert (native() is not None) == here


def test_checkpoints_by_time_come_in_the_middle_of_an_epoch(scans: Path, tmp_path: Path) -> None:
    cut(recipe(scans, tmp_path / "run", epochs=2, every="0.001 s", keep=9), after=4)
    steps = [int(path.stem[-9:]) for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert steps == [0, 1, 2, 3, 4]
    callback = Heard()
    fit(
        recipe(scans, tmp_path / "run", epochs=2, every="1 h", keep=9),
        resume=True,
        callback=callback,
    )
    assert "resuming after epoch 1 of 2 and 1 steps" in callback.lines


@pytest.fixture
def cublas_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(CUBLAS, raising=False)
    yield
    os.environ.pop(CUBLAS, None)


@pytest.mark.usefixtures("cublas_as_it_was")
def test_a_gpu_adds_in_a_fixed_order_while_it_trains() -> None:
    with deterministic(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
        assert CUBLAS not in os.environ
    with deterministic(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[CUBLAS] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.filterwarnings("default:.*determinis")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_a_gpu_is_resumed_to_the_bit(precision: str, scans: Path, tmp_path: Path) -> None:
    plan = {
        "epochs": 3,
        "device": "cuda",
        "precision": precision,
        "drop_path": 0.2,
        "mixup": 0.8,
        "every": "1 steps",
    }
    fit(recipe(scans, tmp_path / "whole", **plan))
    cut(recipe(scans, tmp_path / "cut", **plan), after=4)
    fit(recipe(scans, tmp_path / "cut", **plan), resume=True)
    assert same_bits(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))


# ---- what is accepted and refused


def test_the_same_recipe_goes_on_though_the_run_has_changed_it(scans: Path, tmp_path: Path) -> None:
    """One batch is trained without what would vary it, and zeros are numbers that suit the images."""
    plan = load_recipe(
        "finetune",
        data=str(scans),
        out=str(tmp_path / "run"),
        **TINY | {"epochs": 3},
        overfit_one_batch=True,
    )
    cut(plan, after=1)
    recorded = Run(tmp_path / "run").record()
    assert recorded.given == plan.to_dict() != recorded.recipe
    with pytest.raises(UsageError, match=r"--resume cannot change --lr 0\.5 \("):
        fit(plan.changed(lr=0.5), resume=True)
    with pytest.raises(KeyboardInterrupt):
        fit(plan, resume=True, callback=StopAfter(0))
    fit(load_recipe(str(tmp_path / "run"), workers=0), resume=True)  # `--resume` and nothing else
    assert Run(tmp_path / "run").record().given == plan.to_dict()


def test_zero_epochs_leave_the_runs_own(scans: Path, tmp_path: Path) -> None:
    cut(recipe(scans, tmp_path / "run", epochs=2), after=1)
    result = fit(recipe(scans, tmp_path / "run", epochs=0), resume=True)
    assert len(result.epochs) == result.record.recipe["epochs"] == 2


def test_a_teacher_is_the_same_however_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begun = recipe("digits", Path("run"), teacher="runs/a")
    refuse_changes(begun.changed(teacher="./runs/a"), begun, begun)
    refuse_changes(begun.changed(teacher=str(tmp_path / "runs" / "a")), begun, begun)
    with pytest.raises(UsageError, match="--resume cannot change --teacher runs/b"):
        refuse_changes(begun.changed(teacher="runs/b"), begun, begun)


def test_a_run_that_has_recorded_patience_as_taking_the_best_goes_on(
    scans: Path, tmp_path: Path
) -> None:
    """As runs did before `select` was left as it was given."""
    plan = load_recipe(
        "finetune", data=str(scans), out=str(tmp_path / "run"), **TINY | {"epochs": 2}
    )
    cut(plan, after=1)
    run = Run(tmp_path / "run")
    older = run.record().to_dict()
    older["recipe"]["checkpoints"]["select"] = "best"
    del older["given"]
    run.record_path.write_text(json.dumps(older))
    with pytest.raises(
        UsageError,
        match=r"--resume cannot change --patience 0 epochs \(the run has 20 %\), --select last \(",
    ):
        fit(plan.changed(patience="0"), resume=True)
    assert len(fit(plan, resume=True).epochs) == 2


def test_a_run_begun_on_another_device_says_so(scans: Path, tmp_path: Path) -> None:
    plan = recipe(scans, tmp_path / "run", device="auto")
    cut(plan, after=1)
    run = Run(tmp_path / "run")
    run.amend(device="cuda")
    callback = Heard()
    fit(plan, resume=True, callback=callback)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert any(
        line.startswith(f"note   the run was on cuda and goes on on {here}")
        for line in callback.lines
    ) == (here != "cuda")


# ---- what is mended


def test_a_run_without_checkpoints_begins_again_and_what_a_kill_left_goes(
    scans: Path, tmp_path: Path
) -> None:
    """Killed between the record and the folder, and in the middle of writing two files."""
    fit(recipe(scans, tmp_path / "whole"))
    cut(recipe(scans, tmp_path / "cut"), after=1)
    shutil.rmtree(tmp_path / "cut" / "checkpoints")
    (tmp_path / "cut" / ".run.json.partial").write_bytes(b"{")
    with pytest.raises(KeyboardInterrupt):
        fit(recipe(scans, tmp_path / "cut"), resume=True, callback=StopAfter(0))
    partial = tmp_path / "cut" / "checkpoints" / ".step-000000003.ckpt.partial"
    partial.write_bytes(b"")
    fit(recipe(scans, tmp_path / "cut"), resume=True)
    assert same_bits(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))
    assert not list((tmp_path / "cut").rglob("*.partial"))


def test_the_weights_of_a_finished_run_are_made_again_from_its_last_checkpoint(
    scans: Path, tmp_path: Path
) -> None:
    plan = recipe(scans, tmp_path / "run")
    fit(plan)
    before = weights_of(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    heard = Heard()
    again = fit(plan, resume=True, callback=heard)
    assert same_bits(weights_of(tmp_path / "run"), before)
    assert not heard.epochs, "nothing was trained again"
    assert Run(tmp_path / "run").finished_record().result.top1 == again.top1


def test_a_report_that_a_kill_has_taken_is_written(
    own_scans: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "run"
    fit(recipe(own_scans, out))  # a run without a report, as after a kill at the very end
    words = ["train", own_scans, "--out", out, "--resume"]
    status, printed, _ = command(*words)
    assert status == 0
    assert "top-1" in printed
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "crossvit_pico_32" in page
    written = (out / "report.html").stat().st_mtime_ns
    assert command(*words)[0] == 0
    assert (out / "report.html").stat().st_mtime_ns == written
    (out / "report.html").unlink()
    shutil.rmtree(own_scans)
    status, printed, errors = command(*words)
    assert status == 0
    assert "crossvit: no report.html: " in errors
    assert not (out / "report.html").exists()


def test_the_draws_of_mixing_are_no_images_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even those of the first image of epoch `step` when it is taken a second time."""
    keys: list[tuple[int, ...]] = []

    def noted(*key: int) -> None:
        keys.append(key)
        seed_generators(*key)

    monkeypatch.setattr("crossvit.data.augment.seed_generators", noted)
    mixing = Mixing(MixingRecipe(mixup=0.8), classes=3, label_smoothing=0.1, seed=7)
    mixing(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), step=5)
    draws = []
    for key in (keys[0], (7, 5, 0, 1), (7, 5, 0)):
        seed_generators(*key)
        draws.append(torch.rand(1).item())
    assert len(set(draws)) == 3
