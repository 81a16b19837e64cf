"""How long a run will take, and how much memory: a few of its steps, timed and thrown away."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import statistics
import time
from pathlib import Path

import torch

from crossvit.engines.torch import autocast
from crossvit.evaluation.evaluator import BATCH_SIZE
from crossvit.hardware import peak_memory
from crossvit.text import duration
from crossvit.train.durations import parse_duration
from crossvit.train.trainer import Training
from crossvit.train.validation import Validator

TIMED_STEPS, WARM_UP_STEPS = 8, 3  # the first ones are slower
TIMED_SECONDS = 10.0  # no further step is timed after this long


def described(training: Training) -> list[str]:
    """What is trained, and how long what is left of it will take: two lines for people."""
    prepared, recipe = training.prepared, training.recipe
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    trained = sum(
        parameter.numel() for parameter in training.model.parameters() if parameter.requires_grad
    )
    frozen = "" if trained == parameters else f", {trained / 1e6:.2f} M of them trained"
    height, width = prepared.config.image_size
    evaluation = (
        len(prepared.held_out) / recipe.batch_size / 3
    )  # in steps: forward alone is about a third of one
    left = time_step(training) * (
        training.steps - training.step + evaluation * (recipe.epochs - len(training.epochs))
    )
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
    workforce = (
        threads if training.team.size == 1 else f"{training.team.size} processes of {threads}"
    )
    return [
        f"model  {prepared.model_name}: {parameters / 1e6:.2f} M parameters{frozen} at {height}x{width}{prepared.why_model}",
        f"train  {recipe.epochs} x {training.per_epoch} steps, batch {recipe.batch_size}, "
        f"{training.precision} on {training.device.type} with {workforce}, about {duration(left)}",
    ]


def time_step(training: Training) -> float:
    """Seconds a step, from a few on the next images whose gradients are thrown away: of so many epochs as it takes."""
    epochs = itertools.count(training.step // training.per_epoch)
    batches = itertools.chain.from_iterable(map(training.loader.epoch, epochs))
    times: list[float] = []
    device = training.device
    training.model.train()
    started = time.perf_counter()
    for images, labels in itertools.islice(batches, TIMED_STEPS):
        chunk = max(1, math.ceil(len(images) / training.recipe.accumulate))
        for part, wanted in zip(
            images.to(device).split(chunk), labels.to(device).split(chunk), strict=True
        ):
            with training.no_sync(True):
                with autocast(device, training.precision):
                    logits = training.forward(part)
                loss = training.criterion(logits, wanted, part)
                loss.backward()
            loss.item()  # waits for the device
        times.append(time.perf_counter() - started)
        started = time.perf_counter()
        if sum(times) > TIMED_SECONDS:
            break
    training.optimiser.zero_grad()
    return statistics.median(times[WARM_UP_STEPS:] or times[-1:])


def evaluate_few(training: Training) -> None:
    """Have `training` measured on a batch of held-out images for each process, from all over them, in place of all."""
    images, team = training.prepared.held_out, training.team
    few = images.take(range(0, len(images), math.ceil(len(images) / (team.size * BATCH_SIZE))))
    training.prepared = dataclasses.replace(training.prepared, held_out=few)
    training.held_out = Validator(training.prepared, run=str(training.run.path), team=team)


def checkpoints_of(training: Training, *, seconds: float) -> int:
    """How many checkpoints a whole run of `seconds` writes, with those of its beginning and its end."""
    every = parse_duration(training.recipe.checkpoints.every, name="every")
    if every.seconds is not None:
        return 1 + math.ceil(max(seconds, 1e-9) / every.seconds)
    return 1 + math.ceil(
        training.steps / max(1, every.steps(per_epoch=training.per_epoch, total=training.steps))
    )


def peak_bytes(training: Training) -> int:
    """The most memory that was taken so far: on a GPU torch's, of the process with the most; else that of all processes
    together, those that load images too where /proc tells of them."""
    if training.device.type == "cuda":
        return max(training.team.gather(torch.cuda.max_memory_allocated(training.device)))
    own = peak_memory()
    workers = sum(_peak_of(child.pid) for child in multiprocessing.active_children())
    return sum(training.team.gather(own + workers))


def _peak_of(process: int | None) -> int:
    """Bytes, 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0
