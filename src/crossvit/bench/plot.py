"""The bench as a picture: images a second by contestant, and how the time of an image grows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from crossvit.results import Bench, BenchRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"timm": "#8a94a6", "ours": "#c2410c"}
PALE = 0.55  # opacity of fp32's bars beside those of other precisions
PANEL = 5.2  # inches across
COLUMNS = 2  # panels in a row, so that a page of text holds the picture


def plot(found: Bench, path: Path) -> None:
    """Write `path` (.svg or .png): a panel for each model at its largest batch, one for training steps where they were timed,
    and one each for batch and image size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    inference = [row for row in found.rows if not row.contestant.endswith("-training")]
    models = list(dict.fromkeys(row.model for row in inference))
    training = [row for row in found.rows if row.contestant.endswith("-training")]
    kinds = list(dict.fromkeys(point.by for point in found.growth))
    count = len(models) + bool(training) + len(kinds)
    columns = min(COLUMNS, count)
    bars = max(sum(row.model == model for row in inference) for model in models)
    shape = (PANEL * columns, max(3.4, 1.4 + 0.13 * bars) * math.ceil(count / columns) + 0.4)
    figure, panels = pyplot.subplots(
        math.ceil(count / columns), columns, figsize=shape, squeeze=False, layout="constrained"
    )
    axes = iter(panels.flat)
    for model in models:
        largest = max(row.batch for row in inference if row.model == model)
        rows = [row for row in inference if row.model == model and row.batch == largest]
        _bars(
            next(axes),
            rows,
            [f"{row.contestant} {row.precision}" for row in rows],
            f"{model}, batch {largest}",
        )
    if training:
        names = [f"{row.contestant.removesuffix('-training')} {row.precision}" for row in training]
        if len(models) > 1:
            names = [f"{row.model} {name}" for row, name in zip(training, names, strict=True)]
        _bars(next(axes), training, names, f"a training step, batch {training[0].batch}")
    for kind in kinds:
        _growth(next(axes), found, kind)
    for axis in axes:
        axis.set_axis_off()
    figure.suptitle(f"{found.processor}, {found.threads} threads", fontsize=10)
    figure.savefig(path)
    pyplot.close(figure)


def _bars(axis: Axes, rows: list[BenchRow], names: list[str], title: str) -> None:
    """Images a second, the fastest on top, each with its figure."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].images_per_second)
    drawn = axis.barh(
        [names[index] for index in order], [rows[index].images_per_second for index in order]
    )
    for bar, index in zip(drawn, order, strict=True):
        bar.set_color(COLOURS[rows[index].contestant.split("-")[0]])
        bar.set_alpha(PALE if rows[index].precision == "fp32" else 1.0)
    axis.bar_label(
        drawn,
        fmt="%.0f" if rows[order[-1]].images_per_second >= 100 else "%.1f",
        padding=2,
        fontsize=7,
    )
    axis.margins(x=0.1, y=0.02)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("images a second", fontsize=8)
    _plain(axis)


def _growth(axis: Axes, found: Bench, kind: str) -> None:
    """Milliseconds of an image by batch (each twice or four times the one before) or by image size."""
    ticks: dict[int, str] = {}
    for who in dict.fromkeys(point.contestant for point in found.growth):
        points = [point for point in found.growth if point.by == kind and point.contestant == who]
        along = [point.batch if kind == "batch" else point.image_size[0] for point in points]
        ticks = {
            where: str(where) if kind == "batch" else f"{where}\n({point.tokens})"
            for where, point in zip(along, points, strict=True)
        }
        axis.plot(
            along,
            [point.milliseconds for point in points],
            "o-",
            label=who,
            color=COLOURS[who.split("-")[0]],
        )
    if kind == "batch":
        axis.set_xscale("log", base=2)
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_ylim(bottom=0)
    axis.set_title(f"{found.rows[0].model}, by {kind}", fontsize=10)
    axis.set_xlabel(
        "images in a batch" if kind == "batch" else "side of the image in pixels (tokens)",
        fontsize=8,
    )
    axis.set_ylabel("milliseconds an image, fp32", fontsize=8)
    axis.legend(frameon=False, fontsize=8)
    _plain(axis)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
