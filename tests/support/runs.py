"""Training runs of a very small model, and what two of them are compared by."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from crossvit.results import Epoch
from crossvit.train.callbacks import Callback
from crossvit.train.recipe import Recipe, load_recipe

# One epoch of a very small model: enough to go through everything.
TINY = {
    "model": "crossvit_pico_32",
    "epochs": 1,
    "batch_size": 16,
    "precision": "fp32",
    "device": "cpu",
}


class Heard(Callback):
    """Remembers what a training run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.epochs: list[Epoch] = []

    def on_message(self, line: str) -> None:
        self.lines.append(line)

    def on_epoch_end(self, entry: Epoch) -> None:
        self.epochs.append(entry)


ONE_THREAD = os.environ | {
    "OMP_NUM_THREADS": "1"
}  # several processes with two threads each stand in each other's way


def recipe(data: Path | str, out: Path, **changes: object) -> Recipe:
    return load_recipe("small", data=str(data), out=str(out), **(TINY | changes))


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def weights_of(run: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model.safetensors")


# Everything whose state must come back: mixing, stochastic depth, an average, several parts a batch, repeats, a teacher's rate
EVERYTHING = {
    "epochs": 3, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.2, "ema": 0.9, "accumulate": 2, "repeats": 2,
    "erasing": 0.5, "randaugment": "rand-m9-mstd0.5-inc1", "layer_decay": 0.8, "every": "1 steps", "patience": "9 epochs",
}  # fmt: skip


def words(scans: Path, out: Path, changes: dict[str, object]) -> list[str]:
    settings = {
        "model": "crossvit_pico_32",
        "batch_size": 16,
        "precision": "fp32",
        "device": "cpu",
    } | changes
    options = [
        text
        for key, value in settings.items()
        for text in ("--" + key.replace("_", "-"), str(value))
    ]
    return ["-m", "crossvit", "train", str(scans), "--out", str(out), *options]
