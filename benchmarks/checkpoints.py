"""How long training stands still for its checkpoints: without any, written in line, and written beside the training.

Takes steps of `train` with a checkpoint every `--every` of them, the three ways interleaved. Prints for each model the size of
a checkpoint, the milliseconds a step, how long training stands still for a checkpoint, and what it adds to the time in all,
since a file that is written beside the training takes from its cores too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

import crossvit
from crossvit.run import Run
from crossvit.train.callbacks import Callback
from crossvit.train.loop import prepare
from crossvit.train.trainer import Training

WAYS = ("none", "in line", "beside")


def seconds(
    training: Training, batch: tuple[Tensor, Tensor], *, way: str, steps: int
) -> tuple[float, float]:
    """(of `steps` steps and one checkpoint in the middle of them, of those in which training stood still)."""
    still = 0.0
    started = time.perf_counter()
    for step in range(steps):
        training.train_step(*batch)
        training.step += 1
        if step == steps // 2 and way != "none":
            stopped = time.perf_counter()
            training.save()
            if way == "in line":
                training.writer.flush()
            still = time.perf_counter() - stopped
    spent = time.perf_counter() - started
    training.writer.flush()
    return spent, still


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["crossvit_nano_64", "crossvit_9_240"])
    parser.add_argument(
        "--every", nargs="+", type=int, default=[20, 10], help="steps, for each model"
    )
    parser.add_argument(
        "--batch-size", nargs="+", type=int, default=[64, 16], help="for each model"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(
        f"{torch.get_num_threads()} threads, {options.rounds} interleaved rounds after one to warm up"
    )
    for name, steps, batch_size in zip(
        options.models, options.every, options.batch_size, strict=True
    ):
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder) / "run")
            recipe = crossvit.load_recipe(
                "small", data="digits", out=str(run.path), model=name, batch_size=batch_size
            )
            training = prepare(recipe, run, Callback())
            run.path.mkdir()
            run.prepare(training.record(result=None), overwrite=False)
            training.model.train()
            height, width = training.prepared.config.image_size
            batch = torch.randn(batch_size, 3, height, width), torch.randint(0, 10, (batch_size,))
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            stills: dict[str, list[float]] = {way: [] for way in WAYS}
            with training.writer:
                for _ in range(options.rounds + 1):
                    for way in WAYS:
                        spent, still = seconds(training, batch, way=way, steps=steps)
                        times[way].append(spent)
                        stills[way].append(still)
            size = max(path.stat().st_size for path in run.checkpoints.iterdir())
        print(
            f"{name}: a checkpoint of {size / 1e6:.0f} MB every {steps} steps of batch {batch_size}"
        )
        alone = statistics.median(times["none"][1:])
        for way in WAYS:
            spent = statistics.median(times[way][1:])
            added = statistics.median(
                one - other for one, other in zip(times[way][1:], times["none"][1:], strict=True)
            )
            still = statistics.median(stills[way][1:])
            more = (
                ""
                if way == "none"
                else f"  stands still {1000 * still:4.0f} ms; in all {100 * added / alone:+.1f} %"
            )
            print(f"  {way:8} {1000 * spent / steps:7.1f} ms a step{more}")


if __name__ == "__main__":
    main()
