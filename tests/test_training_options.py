"""What the options of training do: parts of a batch, averages, early stopping, one batch, a rehearsal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import Heard
from crossvit.errors import ConfigError, UsageError
from crossvit.results import Epoch
from crossvit.run import Run
from crossvit.train.loop import fit
from crossvit.train.plan import suitable_batch, suitable_epochs
from crossvit.train.watch import Watch
from test_training import recipe, same_bits, weights_of

Command = Callable[..., tuple[int, str, str]]
PLAIN = {"epochs": 2, "optimiser": "sgd", "lr": 0.01}  # AdamW turns rounding into steps: its first ones go by the sign alone


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("changes", [{"accumulate": 3}, {"gradient_checkpointing": True}, {"channels_last": True}])
def test_what_saves_memory_or_time_changes_nothing_but_rounding(changes: dict[str, object], scans: Path, tmp_path: Path) -> None:
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


def test_compile_without_a_compiler_is_refused(scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UsageError, match=r"--compile needs a C\+\+ compiler and finds none: install g\+\+"):
        fit(recipe(scans, tmp_path / "run", compile=True))
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_average_of_the_weights_is_kept_and_evaluated(scans: Path, tmp_path: Path) -> None:
    plain = fit(recipe(scans, tmp_path / "plain", epochs=3))
    averaged = fit(recipe(scans, tmp_path / "averaged", epochs=3, ema=0.9))
    assert [entry.loss for entry in averaged.epochs] == [entry.loss for entry in plain.epochs]  # the same training
    assert averaged.epochs[-1].val_loss != plain.epochs[-1].val_loss
    assert not same_bits(weights_of(averaged.run), weights_of(plain.run))


def test_training_stops_when_the_score_no_longer_rises_and_takes_the_best(scans: Path, tmp_path: Path) -> None:
    """A rate so high that the first epochs are the best."""
    watch = Heard()
    result = fit(recipe(scans, tmp_path / "run", epochs=40, lr=0.05, warmup="0", patience="3 epochs"), watch=watch)
    scores = [(entry.val_top1, -entry.val_loss) for entry in watch.epochs]
    best = max(range(len(scores)), key=lambda index: scores[index])
    assert result.record["result"]["selected_epoch"] == best + 1
    assert result.top1 == watch.epochs[best].val_top1
    assert len(watch.epochs) == min(best + 1 + 3, 40)
    last = fit(recipe(scans, tmp_path / "last", epochs=2, lr=0.05, warmup="0"))
    assert "selected_epoch" not in last.record["result"]


def test_patience_may_be_a_share_of_the_run(scans: Path, tmp_path: Path) -> None:
    settings = {"lr": 0.05, "warmup": "0", "epochs": 20}
    share, epochs = (Heard(), Heard())
    fit(recipe(scans, tmp_path / "share", **settings, patience="10 %"), watch=share)
    fit(recipe(scans, tmp_path / "epochs", **settings, patience="2 epochs"), watch=epochs)
    assert len(share.epochs) == len(epochs.epochs) < 20


def test_one_batch_is_learnt_by_heart(scans: Path, tmp_path: Path) -> None:
    result = fit(recipe(scans, tmp_path / "run", epochs=60, lr=3e-3, overfit_one_batch=True))
    assert result.n == 16  # the batch itself is what is measured
    assert result.top1 == 1.0
    assert result.epochs[-1].loss < 0.05
    assert len(result.epochs) == result.epochs[-1].step == 60


def test_a_rehearsal_says_time_and_memory_and_leaves_nothing(scans: Path, tmp_path: Path, command: Command) -> None:
    words = ["train", scans, "--out", tmp_path / "run", "--model", "crossvit_pico_32", "--device", "cpu", "--dry-run"]
    status, out, _ = command(*words, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["steps"] == 40
    assert found["total_seconds"] > found["steps"] * found["seconds_a_step"] > 0
    assert found["peak_bytes"] > found["checkpoint_bytes"] > 1_000_000
    assert not (tmp_path / "run").exists()
    status, out, _ = command(*words)
    assert [line.split()[0] for line in out.splitlines()[:1]] == ["time"]
    assert "MB a checkpoint" in out


def test_epochs_are_chosen_by_the_number_of_images_and_stay(scans: Path, tmp_path: Path) -> None:
    counts = (10, 50, 100, 200, 1_000, 2_000, 10_000, 10**6)
    assert [suitable_epochs(images) for images in counts] == [240, 240, 120, 60, 60, 30, 6, 6]
    assert [suitable_batch(images) for images in (10, 399, 400, 10**6)] == [16, 16, 32, 32]

    class Stop(Watch):
        def __init__(self, *, at: int) -> None:
            self.at = at

        def epoch_done(self, entry: Epoch) -> None:
            if entry.epoch == self.at:
                raise KeyboardInterrupt

    plan = recipe(scans, tmp_path / "run", epochs=0, batch_size=0, lr=0.0001)
    with pytest.raises(KeyboardInterrupt):
        fit(plan, watch=Stop(at=2))
    recorded = Run(tmp_path / "run").record()["recipe"]
    assert (recorded["epochs"], recorded["batch_size"]) == (240, 16)
    with pytest.raises(KeyboardInterrupt):  # what was chosen is not a change
        fit(plan, resume=True, watch=Stop(at=4))
    assert [entry["epoch"] for entry in Run(tmp_path / "run").entries()] == [1, 2, 3, 4]


def test_balanced_sampling_and_weights_train(scans: Path, tmp_path: Path) -> None:
    plain = fit(recipe(scans, tmp_path / "plain"))
    balanced = fit(recipe(scans, tmp_path / "balanced", sampling="balanced", class_weights="balanced"))
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
    assert [path.stem for path in sorted((tmp_path / "hours" / "checkpoints").iterdir())] == ["step-000000000", "step-000000006"]
