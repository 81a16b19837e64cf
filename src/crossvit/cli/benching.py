"""The verb `crossvit bench`."""

from __future__ import annotations

from json import dumps
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from crossvit.cli.switch import Switch

if TYPE_CHECKING:
    from crossvit.results import Bench

TABLE_WIDTH = 120  # columns that a row of the table takes
Many = Parameter(consume_multiple=True, negative=())


def bench(
    *,
    models: Annotated[tuple[str, ...], Many] = ("crossvit_9_240", "crossvit_15_dagger_240"),
    engines: Annotated[tuple[str, ...], Many] = (),
    batch: Annotated[tuple[int, ...], Many] = (16, 1),
    precision: Annotated[tuple[str, ...], Many] = ("fp32", "bf16"),
    image_size: int | None = None,
    seconds: float = 30.0,
    device: str = "auto",
    train: Switch = False,
    skip_growth: Switch = False,
    out: str | None = None,
    json: Switch = False,
) -> int:
    """Time our models against timm's, through every engine that is installed, with the same weights in one run.

    A model takes a few minutes, most of them for compiling. Close other programs: they disturb it.

    Parameters
    ----------
    models
        Names of released models.
    engines
        Contestants such as ours-torch or timm-openvino, or a word of one: ours, openvino. All by default.
    batch
        Images in a call; each is timed by itself.
    precision
        fp32, bf16 or both.
    image_size
        Side of the images in pixels, if not the model's own.
    seconds
        Of timing for each model and batch.
    device
        auto, cpu, cuda or mps.
    train
        Time a training step as well.
    skip_growth
        Leave out how the first model's time grows with batch and image size, about a minute.
    out
        A folder for bench.json and bench.svg.
    json
        Print one JSON object on stdout.
    """
    from pathlib import Path

    from rich.console import Console

    from crossvit.bench.measure import bench as run
    from crossvit.bench.plot import plot
    from crossvit.errors import UsageError
    from crossvit.results import to_json
    from crossvit.run import write_atomically

    if any(size < 1 for size in batch) or set(precision) - {"fp32", "bf16"} or seconds <= 0:
        raise UsageError("--batch should be 1 or more, --precision fp32 or bf16, --seconds above 0")
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    found = run(
        models,
        engines=engines,
        batches=batch,
        precisions=precision,
        image_size=image_size,
        device=device,
        train=train,
        growth=not skip_growth,
        seconds=seconds,
        say=lambda line: progress.print(line, markup=False),
    )
    record = to_json(found)
    if out is not None:
        folder = Path(out).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "bench.json", dumps(record, indent=1, allow_nan=False).encode())
        plot(found, folder / "bench.svg")
    if json:
        print(dumps(record, allow_nan=False))
    else:
        print_bench(found)
    return 0


def print_bench(found: Bench) -> None:
    """A table for each model and batch, ratios to timm eager in fp32 (a training step's: to timm in its precision)."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    versions = ", ".join(f"{package} {version}" for package, version in found.versions.items())
    limits = ", ".join(f"{precision} {limit:.0f}" for precision, limit in found.limits.items())
    console.print(f"{found.processor}, {found.threads} threads, {versions}", soft_wrap=True)
    console.print(f"a large matrix product: {limits} GFLOP/s", soft_wrap=True)
    for model, batch in dict.fromkeys((row.model, row.batch) for row in found.rows):
        table = Table(title=f"{model}, batch {batch}", title_justify="left", box=None)
        for heading in ("", "", "ms (spread)", "img/s", "ratio (spread)", "difference", "top-1", "MB", "of limit"):
            table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
        for row in found.rows:
            if (row.model, row.batch) != (model, batch):
                continue
            table.add_row(
                row.contestant,
                row.precision,
                f"{row.milliseconds:.1f} ({row.fastest:.1f}–{row.slowest:.1f})",
                f"{row.images_per_second:.1f}",
                f"{row.ratio:.2f}x ({row.ratio_low:.2f}–{row.ratio_high:.2f})",
                "" if row.difference is None else f"{row.difference:.1e}",
                "" if row.same_top1 is None else f"{100 * row.same_top1:.0f} %",
                "" if row.megabytes is None else f"{row.megabytes:.0f}",
                "" if row.limit_share is None else f"{100 * row.limit_share:.0f} %",
            )
        console.print(table)
    for point in found.growth:
        console.print(
            f"{point.contestant:12} by {point.by:10}  batch {point.batch:3}  {point.image_size[0]:4} px  "
            f"{point.tokens:5} tokens  {point.milliseconds:7.1f} ms an image",
            soft_wrap=True,
        )
    for name, reason in found.skipped.items():
        console.print(f"left out: {name} ({reason})", soft_wrap=True, markup=False)
