"""The bench as a picture: images a second by contestant, and how the time of an image grows."""

from __future__ import annotations

from pathlib import Path

from crossvit.results import Bench

COLOURS = {"timm": "#8a94a6", "ours": "#c2410c"}


def plot(found: Bench, path: Path) -> None:
    """Write `path` (.svg or .png): a panel for each model at its largest batch, and one each for batch and image size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row.model for row in found.rows))
    kinds = list(dict.fromkeys(point.by for point in found.growth))
    figure, panels = pyplot.subplots(1, len(models) + len(kinds), figsize=(5.2 * (len(models) + len(kinds)), 4.6), squeeze=False)
    axes = list(panels[0])
    for axis, model in zip(axes, models, strict=False):
        largest = max(row.batch for row in found.rows if row.model == model)
        rows = [row for row in found.rows if row.model == model and row.batch == largest and "training" not in row.contestant]
        rows.sort(key=lambda row: row.images_per_second)
        axis.barh(
            [f"{row.contestant} {row.precision}" for row in rows],
            [row.images_per_second for row in rows],
            color=[COLOURS[row.contestant.split("-")[0]] for row in rows],
        )
        axis.set_title(f"{model}, batch {largest}", fontsize=10)
        axis.set_xlabel("images a second")
    for axis, kind in zip(axes[len(models) :], kinds, strict=True):
        for who in dict.fromkeys(point.contestant for point in found.growth):
            points = [point for point in found.growth if point.by == kind and point.contestant == who]
            along = [point.batch if kind == "batch" else point.image_size[0] for point in points]
            axis.plot(along, [point.milliseconds for point in points], "o-", label=who, color=COLOURS[who.split("-")[0]])
        axis.set_xlabel("images in a batch" if kind == "batch" else "side of the image, pixels")
        axis.set_ylabel("milliseconds an image (fp32)")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"{found.processor}, {found.threads} threads", fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
