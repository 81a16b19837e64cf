"""What a recipe comes to on so many GPUs: arithmetic from one measured speed, before a machine is asked for. Standard library
only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossvit.errors import UsageError
from crossvit.results import ScaledRun
from crossvit.train.durations import parse_duration
from crossvit.train.recipe import Recipe

IMAGENET = 1_281_167, 50_000  # images of ImageNet-1k (ILSVRC 2012) to learn from and to validate on
FORWARD_SHARE = (
    1 / 3
)  # of a training step's time that evaluating its images takes: the backward pass is about two forward ones
RATE_KEY = "images_per_second"


def scaled(
    recipe: Recipe,
    *,
    gpus: int,
    rate: float,
    images: int,
    held_out: int,
    batch_size: int | None = None,
    at_once: int | None = None,
) -> ScaledRun:
    """`recipe` on `gpus` GPUs that each train on `rate` images a second, without loss in going together.

    The batch is the recipe's, or `batch_size` with the rate scaled in proportion (Goyal et al., 2017; the paper: 5e-4 B / 512);
    at_once: images that fit into one GPU's memory: a larger share of the batch is taken in parts (`--accumulate`).
    UsageError for a batch that does not give each GPU an image.
    """
    batch = batch_size or recipe.batch_size
    if batch < gpus:
        raise UsageError(
            f"a batch of {batch} for {gpus} GPUs: give each at least one image (--batch-size)"
        )
    share = math.ceil(batch / gpus)
    steps = math.ceil(images / batch)
    total = recipe.epochs * steps
    seconds = recipe.epochs * (images + held_out * FORWARD_SHARE) / (gpus * rate)
    return ScaledRun(
        gpus=gpus,
        batch_size=batch,
        batch_on_each=share,
        accumulate=math.ceil(share / (at_once or share)),
        lr=recipe.optimiser.lr * batch / recipe.batch_size,
        steps_an_epoch=steps,
        steps=total,
        warmup_steps=parse_duration(recipe.optimiser.warmup, name="warmup").steps(
            per_epoch=steps, total=total
        ),
        images_per_second=gpus * rate,
        images_per_second_on_each=rate,
        hours=seconds / 3600,
    )


def measured_rate(given: str, model: str) -> float:
    """Images a second on one GPU: a number, or a JSON file that has it under `images_per_second`, of `model` where its entries
    name models. UsageError for a file without it or with several."""
    try:
        rate = float(given)
    except ValueError:
        rate = _rate_in(Path(given), model)
    if not 0 < rate < math.inf:
        raise UsageError(
            f"--rate {given}: should be a positive number of images a second, or a JSON file that has it"
        )
    return rate


def _rate_in(path: Path, model: str) -> float:
    try:
        found = sorted(
            {
                float(entry[RATE_KEY])
                for entry in _entries(json.loads(path.read_text(encoding="utf-8")))
                if entry.get("model", model) == model
            }
        )
    except FileNotFoundError:
        raise UsageError(
            f"--rate {path}: no such file, and not a number of images a second"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--rate {path}: not a JSON file with {RATE_KEY} ({error})") from error
    if len(found) != 1:
        several = f"has {len(found)} different values" if found else "has none"
        raise UsageError(
            f"--rate {path}: {several} of {RATE_KEY} for {model}: give the number itself"
        )
    return found[0]


def _entries(record: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value that has a rate."""
    if isinstance(record, dict) and RATE_KEY in record:
        yield record
    for value in (
        record.values() if isinstance(record, dict) else record if isinstance(record, list) else ()
    ):
        yield from _entries(value)
