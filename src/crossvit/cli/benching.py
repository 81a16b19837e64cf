"""The verb `crossvit bench`."""

from __future__ import annotations

from json import dumps
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from crossvit.cli.flag import Switch
from crossvit.text import json_line, percent

if TYPE_CHECKING:
    from rich.table import Table

    from crossvit.results import Bench

TABLE_WIDTH = 120  # columns that a row of the table takes
Many = Parameter(
    consume_multiple=True, negative=(), show_default=lambda values: " ".join(map(str, values))
)
AllByDefault = Parameter(consume_multiple=True, negative=(), show_default=False)


def bench(
    *,
    models: Annotated[tuple[str, ...], Many] = ("crossvit_9_240", "crossvit_15_dagger_240"),
    engines: Annotated[tuple[str, ...], AllByDefault] = (),
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
        Time a training step as well, of the largest batch: ratios are to timm in the same precision.
    skip_growth
        Leave out how the first model's time grows with batch, image size and tokens, about a minute.
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
    from crossvit.files import write_atomically
    from crossvit.results import to_json

    if not models:
        raise UsageError("--models takes names of released models: --models crossvit_9_240")
    if not batch or any(size < 1 for size in batch):
        raise UsageError("--batch takes numbers of images, 1 or more: --batch 16 1")
    if not precision or set(precision) - {"fp32", "bf16"}:
        raise UsageError("--precision takes fp32, bf16 or both: --precision fp32 bf16")
    if seconds <= 0:
        raise UsageError("--seconds should be above 0")
    folder = None if out is None else Path(out).expanduser()
    if folder is not None:  # now, not after the minutes that a run takes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {out} cannot be made: {error.strerror}") from None
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
    if folder is not None:
        write_atomically(folder / "bench.json", dumps(record, indent=1, allow_nan=False).encode())
        plot(found, folder / "bench.svg")
    if json:
        print(json_line(record))
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
        for heading in (
            "",
            "",
            "ms (spread)",
            "img/s",
            "ratio (spread)",
            "difference",
            "top-1",
            "MB",
            "of limit",
        ):
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
                "" if row.same_top1 is None else f"{percent(row.same_top1, decimals=0)}",
                "" if row.megabytes is None else f"{row.megabytes:.0f}",
                "" if row.limit_share is None else f"{percent(row.limit_share, decimals=0)}",
            )
        console.print(table)
    for by in dict.fromkeys(point.by for point in found.growth):
        console.print(_growth_table(found, by))
    for name, reason in found.skipped.items():
        console.print(f"left out: {name} ({reason})", soft_wrap=True, markup=False)


def _growth_table(found: Bench, by: str) -> Table:
    """How the milliseconds of an image, in fp32, grow by `by`: beside each the times that of the row before."""
    from rich.table import Table

    points = [point for point in found.growth if point.by == by]
    names = list(dict.fromkeys(point.contestant for point in points))
    table = Table(
        title=f"{found.rows[0].model}, ms an image in fp32 by {by}", title_justify="left", box=None
    )
    for heading in (
        "batch",
        "pixels",
        "tokens",
        *(column for name in names for column in (name, "grown")),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    before: dict[str, float] = {}
    for key in dict.fromkeys((point.batch, point.image_size, point.tokens) for point in points):
        batch, (height, width), tokens = key
        cells = [f"{batch}", f"{height}x{width}", f"{tokens}"]
        for point in points:
            if (point.batch, point.image_size, point.tokens) == key:
                last = before.get(point.contestant)
                cells += [
                    f"{point.milliseconds:.1f}",
                    "" if last is None else f"{point.milliseconds / last:.2f}x",
                ]
                before[point.contestant] = point.milliseconds
        table.add_row(*cells)
    return table
