"""What the options of training do: parts of a batch, averages, early stopping, one batch, a rehearsal."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crossvit.data.loader import Order
from crossvit.data.sources import open_data
from crossvit.engines.torch import TorchEngine
from crossvit.errors import ConfigError, UsageError
from crossvit.results import Epoch, Evaluation
from crossvit.run import Run
from crossvit.train.callbacks import Callback
from crossvit.train.dry_run import checkpoints_of, peak_bytes, time_step
from crossvit.train.loop import dry_run, fit, prepare
from crossvit.train.recipe import load_recipe
from crossvit.train.setup import prepare_run, suitable_batch, suitable_epochs
from crossvit.train.validation import Validator
from support.runs import ONE_THREAD, TINY, Heard, recipe, same_bits, weights_of, words

Command = Callable[..., tuple[int, str, str]]
PLAIN = {
    "epochs": 2,
    "optimiser": "sgd",
    "lr": 0.01,
}  # AdamW turns rounding into steps: its first ones go by the sign alone


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    "changes", [{"accumulate": 3}, {"gradient_checkpointing": True}, {"channels_last": True}]
)
def test_what_saves_memory_or_time_changes_nothing_but_rounding(
    changes: dict[str, object], scans: Path, tmp_path: Path
) -> None:
    plain = fit(recipe(scans, tmp_path / "plain", **PLAIN))
    saving = fit(recipe(scans, tmp_path / "saving", **PLAIN, **changes))
    start = fit(recipe(scans, tmp_path / "start", **(PLAIN | {"lr": 1e-12})))
    moved = distance(weights_of(plain.run), weights_of(start.run))
    assert distance(weights_of(plain.run), weights_of(saving.run)) < 1e-3 * moved


@pytest.mark.slow
def test_compiled_training_is_the_same_but_for_rounding(scans: Path, tmp_path: Path) -> None:
    plain = fit(recipe(scans, tmp_path / "plain", **PLAIN))
    compiled = fit(recipe(scans, tmp_path / "compiled", **PLAIN, compile=True))
    start = fit(recipe(scans, tmp_path / "start", **(PLAIN | {"lr": 1e-12})))
    moved = distance(weights_of(plain.run), weights_of(start.run))
    assert distance(weights_of(plain.run), weights_of(compiled.run)) < 1e-3 * moved


def test_compile_without_a_compiler_is_refused(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        UsageError, match=r"--compile needs a C\+\+ compiler and finds none: install g\+\+"
    ):
        fit(recipe(scans, tmp_path / "run", compile=True))
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_average_of_the_weights_is_kept_and_evaluated(scans: Path, tmp_path: Path) -> None:
    plain = fit(recipe(scans, tmp_path / "plain", epochs=3))
    averaged = fit(recipe(scans, tmp_path / "averaged", epochs=3, ema=0.9))
    assert [entry.loss for entry in averaged.epochs] == [
        entry.loss for entry in plain.epochs
    ]  # the same training
    assert averaged.epochs[-1].val_loss != plain.epochs[-1].val_loss
    assert not same_bits(weights_of(averaged.run), weights_of(plain.run))


def test_the_average_follows_the_weights_at_its_literal_values(scans: Path, tmp_path: Path) -> None:
    """After the step s > 1 it is d·average + (1 − d)·weights with d = min(ema, 1 − s^(−2/3)), and before that the weights."""
    training = prepare(
        recipe(scans, tmp_path / "run", epochs=4, ema=0.6), Run(tmp_path / "run"), Callback()
    )
    name = "heads.0.weight"
    images, labels = next(iter(training.loader.epoch(0)))
    averages, decays = [training.model.state_dict()[name].clone()], []
    for step in range(6):
        training.step = step
        training.train_step(images, labels)
        decays.append(min(0.6, 1 - step ** (-2 / 3)) if step > 1 else 0.0)
        own = training.model.state_dict()[name]
        averages.append(decays[-1] * averages[-1] + (1 - decays[-1]) * own)
        torch.testing.assert_close(training.evaluated.state_dict()[name], averages[-1])
        assert torch.equal(training.evaluated.state_dict()[name], own) == (step <= 1)
    assert decays == pytest.approx([0, 0, 0.3700, 0.5193, 0.6, 0.6], abs=1e-4)


def test_training_stops_when_the_score_no_longer_rises_and_takes_the_best(
    scans: Path, tmp_path: Path
) -> None:
    """A rate so high that the first epochs are the best."""
    callback = Heard()
    result = fit(
        recipe(scans, tmp_path / "run", epochs=40, lr=0.05, warmup="0", patience="3 epochs"),
        callback=callback,
    )
    scores = [(entry.val_top1, -entry.val_loss) for entry in callback.epochs]
    best = max(range(len(scores)), key=lambda index: scores[index])
    assert result.record.result.selected_epoch == best + 1
    assert result.top1 == callback.epochs[best].val_top1
    assert len(callback.epochs) == min(best + 1 + 3, 40)
    last = fit(recipe(scans, tmp_path / "last", epochs=2, lr=0.05, warmup="0"))
    assert last.record.result.selected_epoch is None


def test_patience_may_be_a_share_of_the_run(scans: Path, tmp_path: Path) -> None:
    settings = {"lr": 0.05, "warmup": "0", "epochs": 20}
    share, epochs = (Heard(), Heard())
    fit(recipe(scans, tmp_path / "share", **settings, patience="10 %"), callback=share)
    fit(recipe(scans, tmp_path / "epochs", **settings, patience="2 epochs"), callback=epochs)
    assert len(share.epochs) == len(epochs.epochs) < 20


def test_one_batch_is_learnt_by_heart(scans: Path, tmp_path: Path) -> None:
    result = fit(recipe(scans, tmp_path / "run", epochs=60, lr=3e-3, overfit_one_batch=True))
    assert result.n == 16  # the batch itself is what is measured
    assert result.top1 == 1.0
    assert result.epochs[-1].loss < 0.05
    assert len(result.epochs) == result.epochs[-1].step == 60


def test_one_batch_is_taken_as_it_is_whatever_the_recipe_does(scans: Path, tmp_path: Path) -> None:
    """That of `finetune` has stochastic depth and stops early; and a teacher is not asked."""
    asked = {
        "overfit_one_batch": True,
        "sampling": "balanced",
        "repeats": 3,
        "teacher": "timm:no_such_model",
        "mixup": 0.8,
    }
    given = load_recipe("finetune", data=str(scans), out=str(tmp_path / "run"), **TINY, **asked)
    training = prepare(
        given, Run(tmp_path / "run"), Callback(), teacher=lambda images: torch.zeros(len(images), 3)
    )
    assert training.prepared.config.drop_path == 0.0
    first = Order(open_data(str(scans)).split(held_out=0.2, seed=0)[0].labels, seed=0).epoch(0)[:16]
    assert len({key.image for key in first}) == len(training.prepared.train) == 16
    assert training.criterion.teacher is None
    assert training.recipe.sampling == "all"
    assert training.recipe.augmentation.repeats == 1
    assert training.recipe.checkpoints.waits(epochs=100) == 0
    training.model.train()
    images, _ = next(iter(training.loader.epoch(0)))
    again, _ = next(iter(training.loader.epoch(0)))
    assert torch.equal(images, again)
    with torch.no_grad():
        assert torch.equal(training.forward(images), training.forward(images))  # nothing is dropped


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"warmup": "1 epochs"},
            "the warm-up of 1 epochs takes the whole run of 1 epochs, so that the rate never comes to 0.001",
        ),
        (
            {"warmup": "1 steps", "warmup_lr": 0.1},
            "the warm-up starts from 0.1, above the highest rate of 0.001: it falls",
        ),
        (
            {"sampling": "balanced", "repeats": 2},
            "--sampling balanced draws each image by itself, so that --repeats does nothing",
        ),
        ({"sampling": "balanced", "class_weights": "balanced"}, "make up for rare classes twice"),
    ],
)
def test_options_that_do_less_than_asked_are_said(
    changes: dict[str, object], says: str, scans: Path, tmp_path: Path
) -> None:
    callback = Heard()
    prepare_run(recipe(scans, tmp_path / "run", **changes), callback)
    assert [line for line in callback.lines if line.startswith("warn") and says in line]
    plain = Heard()
    prepare_run(recipe(scans, tmp_path / "run", epochs=2), plain)
    assert not [line for line in plain.lines if line.startswith("warn")]


def test_a_rehearsal_says_time_and_memory_and_leaves_nothing(
    scans: Path, tmp_path: Path, command: Command
) -> None:
    words = [
        "train",
        scans,
        "--out",
        tmp_path / "run",
        "--model",
        "crossvit_pico_32",
        "--device",
        "cpu",
        "--dry-run",
    ]
    status, out, _ = command(*words, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["steps"] == 40
    assert found["total_seconds"] > found["steps"] * found["seconds_a_step"] > 0
    assert found["peak_bytes"] > found["checkpoint_bytes"] > 1_000_000
    assert not (tmp_path / "run").exists()
    status, out, _ = command(*words)
    assert [line.split()[0] for line in out.splitlines()] == ["time", "and", "memory", "disk"]
    assert "MB a checkpoint" in out
    for flag in ("--resume", "--overwrite"):
        status, _, err = command(*words, flag)
        assert (status, err) == (
            2,
            "crossvit: --dry-run starts no run and writes nothing to --out: leave out --resume and --overwrite\n",
        )


def test_a_rehearsal_measures_one_batch_and_counts_checkpoints(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out images from all over stand for the rest, and `every` says how many checkpoints are paid for."""
    monkeypatch.setattr("crossvit.train.dry_run.BATCH_SIZE", 4)
    measured: list[int] = []

    def evaluate(
        self: Validator, engine: TorchEngine, *, thorough: bool = False
    ) -> tuple[Evaluation, tuple[float, ...]]:
        measured.append(len(self.prepared.held_out))
        assert {
            self.prepared.held_out.labels[index] for index in range(len(self.prepared.held_out))
        } == {
            0,
            1,
            2,
        }
        time.sleep(0.2)
        return whole(self, engine, thorough=thorough)

    whole = Validator.evaluate
    monkeypatch.setattr(Validator, "evaluate", evaluate)
    found = dry_run(recipe(scans, tmp_path / "run", epochs=10, every="7 steps"))
    assert measured == [4, 4]  # of 12; the second one by what ends a run
    assert found.evaluation_seconds >= 3 * 0.2
    assert (found.steps, found.checkpoints, found.processes) == (
        30,
        1 + 5,
        1,
    )  # at 0, 7, 14, 21, 28 and 30
    paid = (
        found.steps * found.seconds_a_step
        + 10 * found.evaluation_seconds
        + 6 * found.checkpoint_seconds
    )
    assert found.total_seconds == pytest.approx(paid)


def test_a_rehearsal_under_torchrun_is_of_all_its_processes(scans: Path, tmp_path: Path) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command = [*torchrun, *words(scans, tmp_path / "run", {"epochs": 2}), "--dry-run", "--json"]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # one process speaks
    assert (found["processes"], found["steps"]) == (2, 6)
    assert found["checkpoint_bytes"] > 1_000_000
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("every", "count"), [("1 epochs", 11), ("3 epochs", 5), ("10 s", 11), ("1 h", 2)]
)
def test_checkpoints_are_counted_by_steps_or_time(
    every: str, count: int, scans: Path, tmp_path: Path
) -> None:
    training = prepare(
        recipe(scans, tmp_path / "run", epochs=10, every=every), Run(tmp_path / "run"), Callback()
    )
    assert checkpoints_of(training, seconds=100.0) == count


def test_a_step_is_timed_after_slow_first_ones_though_an_epoch_has_no_more(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps an epoch. The clock is one that the steps move on."""
    training = prepare(recipe(scans, tmp_path / "run"), Run(tmp_path / "run"), Callback())
    assert training.per_epoch == 3
    taken, now, forward = [0.9, 0.9, 0.9, 0.1, 0.4, 0.2, 0.3, 0.5, 99.0], [0.0], training.forward

    def timed(images: torch.Tensor) -> torch.Tensor:
        now[0] += taken.pop(0)
        return forward(images)

    training.forward = timed
    with monkeypatch.context() as patch:
        patch.setattr("crossvit.train.dry_run.time", SimpleNamespace(perf_counter=lambda: now[0]))
        assert time_step(training) == pytest.approx(
            0.3
        )  # the median of the five that follow the warm-up
    assert taken == [99.0]


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="another process's memory is read from /proc"
)
def test_the_memory_of_a_rehearsal_has_that_of_its_loading_processes(
    scans: Path, tmp_path: Path
) -> None:
    training = prepare(recipe(scans, tmp_path / "run"), Run(tmp_path / "run"), Callback())
    alone = peak_bytes(training)
    waiting = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    waiting.start()
    deadline = time.monotonic() + 30
    try:
        while (found := peak_bytes(training)) < alone + 5_000_000 and time.monotonic() < deadline:
            time.sleep(0.05)  # until Python is there
    finally:
        waiting.terminate()
        waiting.join()
    assert found >= alone + 5_000_000


def test_epochs_are_chosen_by_the_number_of_images_and_stay(scans: Path, tmp_path: Path) -> None:
    counts = (10, 50, 100, 200, 1_000, 2_000, 10_000, 10**6)
    assert [suitable_epochs(images) for images in counts] == [240, 240, 120, 60, 60, 30, 6, 6]
    assert [suitable_batch(images) for images in (10, 399, 400, 10**6)] == [16, 16, 32, 32]

    class Stop(Callback):
        def __init__(self, *, at: int) -> None:
            self.at = at

        def on_epoch_end(self, entry: Epoch) -> None:
            if entry.epoch == self.at:
                raise KeyboardInterrupt

    plan = recipe(scans, tmp_path / "run", epochs=0, batch_size=0, lr=0.0001)
    with pytest.raises(KeyboardInterrupt):
        fit(plan, callback=Stop(at=2))
    recorded = Run(tmp_path / "run").record().recipe
    assert (recorded["epochs"], recorded["batch_size"]) == (240, 16)
    with pytest.raises(KeyboardInterrupt):  # what was chosen is not a change
        fit(plan, resume=True, callback=Stop(at=4))
    assert [entry["epoch"] for entry in Run(tmp_path / "run").entries()] == [1, 2, 3, 4]


def test_balanced_sampling_takes_every_class_and_every_image_of_it_equally_often() -> None:
    """Of 90 images of one class and 10 of another, half the draws are of each: 200 epochs of 100 draws, to within 4 standard
    deviations, 1.4 %; of an image of the rare class 5 in a hundred, of the other 0.56."""
    order = Order(labels=(0,) * 90 + (1,) * 10, seed=3, balanced=True)
    drawn = [key.image for epoch in range(200) for key in order.epoch(epoch)]
    assert len(drawn) == 20_000
    assert sum(image >= 90 for image in drawn) / len(drawn) == pytest.approx(0.5, abs=0.014)
    each = Counter(drawn)
    assert all(
        each[image] / len(drawn) == pytest.approx(0.05, abs=0.0065) for image in range(90, 100)
    )
    assert all(
        each[image] / len(drawn) == pytest.approx(0.5 / 90, abs=0.0025) for image in range(90)
    )
    assert order.epoch(0) != order.epoch(1)
    assert order.epoch(1) == Order(labels=(0,) * 90 + (1,) * 10, seed=3, balanced=True).epoch(1)
    for key in order.epoch(0):  # what is drawn again is varied anew
        assert key.again < [taken.image for taken in order.epoch(0)].count(key.image)
    assert len(set(order.epoch(0))) == 100


def test_repeats_follow_each_other_and_the_pass_stays_as_long() -> None:
    plain = [key.image for key in Order(labels=(0,) * 8, seed=5).epoch(2)]
    assert sorted(plain) == list(range(8))
    first, second, third = plain[:3]
    assert Order(labels=(0,) * 8, seed=5, repeats=3).epoch(2) == [
        (2, first, 0), (2, first, 1), (2, first, 2), (2, second, 0), (2, second, 1), (2, second, 2), (2, third, 0), (2, third, 1),
    ]  # fmt: skip


def test_balanced_sampling_and_weights_train(scans: Path, tmp_path: Path) -> None:
    plain = fit(recipe(scans, tmp_path / "plain"))
    balanced = fit(
        recipe(scans, tmp_path / "balanced", sampling="balanced", class_weights="balanced")
    )
    assert balanced.epochs[0].loss != plain.epochs[0].loss


def test_frozen_parts_keep_their_weights(scans: Path, tmp_path: Path) -> None:
    start = fit(recipe(scans, tmp_path / "start", lr=1e-30, weight_decay=0.0, final_lr=0.0))
    frozen = fit(recipe(scans, tmp_path / "frozen", freeze=("backbone",), weights=start.run))
    before, after = weights_of(start.run), weights_of(frozen.run)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("heads.")}
    with pytest.raises(ConfigError, match="nothing would be left to train"):
        fit(recipe(scans, tmp_path / "none", freeze=("backbone", "heads")))


def test_checkpoints_are_kept_as_many_and_as_often_as_asked(scans: Path, tmp_path: Path) -> None:
    fit(recipe(scans, tmp_path / "steps", epochs=2, every="2 steps", keep=3))
    assert [path.stem for path in sorted((tmp_path / "steps" / "checkpoints").iterdir())] == [
        f"step-{step:09d}" for step in (2, 4, 6)
    ]
    fit(recipe(scans, tmp_path / "hours", epochs=2, every="1 h"))
    assert [path.stem for path in sorted((tmp_path / "hours" / "checkpoints").iterdir())] == [
        "step-000000000",
        "step-000000006",
    ]
