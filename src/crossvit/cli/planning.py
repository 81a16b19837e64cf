"""The verb `crossvit plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from crossvit.cli.flag import Switch
from crossvit.train.gpu_budget import IMAGENET

if TYPE_CHECKING:
    from crossvit.results import ScaledRun


def plan(
    model: str,
    /,
    *,
    rate: str,
    gpus: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative=())] = (8, 32),
    recipe: str = "imagenet",
    batch_size: int | None = None,
    at_once: int | None = None,
    images: int = IMAGENET[0],
    held_out: int = IMAGENET[1],
    json: Switch = False,
) -> int:
    """What a long run comes to on so many GPUs: batch, learning rate, steps, the loading it needs, and hours. Starts nothing.

    Parameters
    ----------
    model
        A name from `crossvit models`.
    rate
        Images a second that one GPU trains on, measured: a number, or a JSON file that has it as images_per_second.
    gpus
        How many, in all machines together; several numbers give several plans.
    recipe
        A shipped recipe (see `crossvit recipes`), a TOML file, or a run folder.
    batch_size
        Another batch than the recipe's, over all GPUs; the learning rate is scaled in proportion.
    at_once
        Images that fit into the memory of one GPU; a larger share of the batch is taken in parts.
    images
        Images to learn from. Default: ImageNet-1k's.
    held_out
        Images to evaluate on after every epoch.
    json
        Print one JSON object on stdout.
    """
    from crossvit.errors import UsageError
    from crossvit.model.presets import preset
    from crossvit.results import to_json
    from crossvit.text import json_line
    from crossvit.train.gpu_budget import measured_rate, scaled
    from crossvit.train.recipe import load_recipe

    preset(model)
    if min(*gpus, images, batch_size or 1, at_once or 1) < 1 or held_out < 0:
        raise UsageError(
            "--gpus, --images, --batch-size and --at-once should be 1 or more, --held-out 0 or more"
        )
    chosen = load_recipe(recipe)
    speed = measured_rate(rate, model)
    runs = [
        scaled(
            chosen,
            gpus=count,
            rate=speed,
            images=images,
            held_out=held_out,
            batch_size=batch_size,
            at_once=at_once,
        )
        for count in gpus
    ]
    if json:
        print(
            json_line(
                {"model": model, "recipe": recipe, "epochs": chosen.epochs, "plans": to_json(runs)}
            )
        )
    else:
        print(
            f"{model} by the recipe {recipe}: {chosen.epochs} epochs of {images:,} images, {held_out:,} held out,"
        )
        print(f"{speed:,.0f} images a second on each GPU, none of it lost in going together")
        _print_table(runs)
    return 0


def _print_table(runs: Sequence[ScaledRun]) -> None:
    rows = [
        ("GPUs", [f"{run.gpus}" for run in runs]),
        ("batch, over all", [f"{run.batch_size:,}" for run in runs]),
        (
            "batch on each",
            [
                f"{run.batch_on_each:,}" + f" in {run.accumulate} parts" * (run.accumulate > 1)
                for run in runs
            ],
        ),
        ("learning rate", [f"{run.lr:g}" for run in runs]),
        ("steps an epoch", [f"{run.steps_an_epoch:,}" for run in runs]),
        ("steps in all", [f"{run.steps:,}" for run in runs]),
        ("of them warm-up", [f"{run.warmup_steps:,}" for run in runs]),
        ("images/s to load, in all", [f"{run.images_per_second:,.0f}" for run in runs]),
        (
            "images/s to load, each process",
            [f"{run.images_per_second_on_each:,.0f}" for run in runs],
        ),
        ("hours", [f"{run.hours:,.1f}" for run in runs]),
    ]
    width = max(14, *(len(cell) + 2 for _, cells in rows for cell in cells))
    for name, cells in rows:
        print(f"{name:32}" + "".join(f"{cell:>{width}}" for cell in cells))
