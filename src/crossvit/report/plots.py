"""Plots as SVG text with the page's colours: readable in light, in dark and on paper."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from crossvit.results import Calibration, Epoch, Selective, SizeScore
from crossvit.text import percent

# Placeholders, which the colours of the page's style (style.css) replace in the SVG.
INK = "#123456"
SERIES = (
    "#a10001",
    "#a10002",
    "#a10003",
    "#a10004",
    "#a10005",
    "#a10006",
)  # --s1 ... --s6, distinguishable for the colour-blind
HELD_OUT, TRAIN = SERIES[:2]
DASHES = (
    "-",
    "--",
    ":",
    "-.",
    (0, (5, 1)),
    (0, (1, 1)),
)  # beside the colour, for the colour-blind and grey paper
SIZE = (4.7, 3.1)  # inches, of one of two plots side by side

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # runs are folders, whose names may have dollars
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.grid": True,
    "grid.alpha": 0.13,
    "grid.color": INK,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    **dict.fromkeys(
        (
            "text.color",
            "axes.labelcolor",
            "axes.edgecolor",
            "axes.titlecolor",
            "xtick.color",
            "ytick.color",
        ),
        INK,
    ),
}


def curves(epochs: Sequence[Epoch]) -> list[str]:
    """Loss and accuracy over the epochs, on training and held-out images: two SVGs."""
    with matplotlib.rc_context(STYLE):
        (loss_figure, loss), (accuracy_figure, accuracy) = _axes(), _axes()
        numbers = [entry.epoch for entry in epochs]
        marker = "o" if len(epochs) == 1 else None
        for axes, train, held_out in (
            (loss, [_gap(e.loss) for e in epochs], [e.val_loss for e in epochs]),
            (accuracy, [_gap(e.train_top1) for e in epochs], [e.val_top1 for e in epochs]),
        ):
            axes.plot(
                numbers,
                train,
                color=TRAIN,
                marker=marker,
                linewidth=1.6,
                linestyle="--",
                label="training (augmented)",
            )
            axes.plot(
                numbers, held_out, color=HELD_OUT, marker=marker, linewidth=2.0, label="held out"
            )
        _over_epochs(loss, accuracy)
        loss.legend(loc="upper right")
        last = epochs[-1]
        return [
            _svg(
                loss_figure,
                f"Loss over {len(epochs)} epochs; held out {last.val_loss:.2f} at the end",
            ),
            _svg(
                accuracy_figure,
                f"Accuracy over {len(epochs)} epochs; held out {percent(last.val_top1)} at the end",
            ),
        ]


def _gap(value: float | None) -> float:
    """What is drawn of a mean: a gap for an epoch whose steps were all skipped."""
    return math.nan if value is None else value


def overlaid(runs: Sequence[tuple[str, Sequence[Epoch]]]) -> list[str]:
    """Held-out loss and accuracy of several runs over their epochs: two SVGs.

    Each (name, epochs) has a colour and a dash.
    """
    with matplotlib.rc_context(STYLE):
        (loss_figure, loss), (accuracy_figure, accuracy) = _axes(), _axes()
        for index, (name, epochs) in enumerate(runs):
            numbers = [entry.epoch for entry in epochs]
            look: dict[str, Any] = {
                "color": SERIES[index % len(SERIES)],
                "linestyle": DASHES[index % len(DASHES)],
                "marker": "o" if len(epochs) == 1 else None,
                "linewidth": 1.9,
                "label": name,
            }
            loss.plot(numbers, [entry.val_loss for entry in epochs], **look)
            accuracy.plot(numbers, [entry.val_top1 for entry in epochs], **look)
        _over_epochs(loss, accuracy, of="held-out ")
        loss.legend(loc="upper right")
        names = ", ".join(name for name, _ in runs)
        return [
            _svg(loss_figure, f"Held-out loss over the epochs of {names}"),
            _svg(accuracy_figure, f"Held-out accuracy over the epochs of {names}"),
        ]


def reliability(calibration: Calibration) -> str:
    """Reliability diagram: accuracy against confidence, and the number of predictions below it."""
    bins = [row for row in calibration.bins if row.n]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0], 4.1), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot(
            [0, 1],
            [0, 1],
            color=INK,
            alpha=0.45,
            linewidth=1,
            linestyle="--",
            label="perfectly calibrated",
        )
        left, widths = [row.low for row in bins], [row.high - row.low for row in bins]
        upper.bar(
            left,
            [row.accuracy for row in bins],
            widths,
            align="edge",
            color=HELD_OUT,
            alpha=0.28,
            linewidth=0,
        )
        confidence, accuracy = [row.confidence for row in bins], [row.accuracy for row in bins]
        most = max(row.n for row in bins)
        upper.plot(confidence, accuracy, color=HELD_OUT, linewidth=1.4, label="this model")
        upper.scatter(
            confidence,
            accuracy,
            [8 + 40 * row.n / most for row in bins],
            color=HELD_OUT,
            zorder=3,
            clip_on=False,
        )
        upper.set(xlim=(0, 1), ylim=(0, 1.02), title="Accuracy")
        upper.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        upper.legend(loc="lower right")
        lower.bar(
            left,
            [row.n for row in bins],
            widths,
            align="edge",
            color=TRAIN,
            alpha=0.75,
            linewidth=0,
        )
        lower.set(title="Predictions", xlabel="confidence")
        lower.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        lower.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
        return _svg(
            figure, f"Reliability diagram: expected calibration error {percent(calibration.ece)}"
        )


def risk_coverage(selective: Selective) -> str:
    """Risk against coverage: wrong answers against images answered, most confident first."""
    coverage, risk = (
        [point.coverage for point in selective.points],
        [point.risk for point in selective.points],
    )
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(height=4.1)
        axes.plot(
            coverage, risk, color=HELD_OUT, linewidth=2.0, marker="o" if len(risk) == 1 else None
        )
        axes.fill_between(coverage, risk, color=HELD_OUT, alpha=0.12, linewidth=0)
        top = max([*risk, selective.target_risk, 0.01]) * 1.3
        target = f"target: at most {percent(selective.target_risk)} wrong"
        axes.axhline(
            selective.target_risk, color=INK, alpha=0.45, linewidth=1, linestyle="--", label=target
        )
        if selective.suggested is not None:
            point = selective.suggested
            axes.plot(
                [point.coverage],
                [point.risk],
                color=TRAIN,
                marker="o",
                markersize=8,
                linestyle="",
                label="suggested",
            )
        axes.legend(loc="upper left")
        axes.set(
            xlim=(0, 1.01),
            ylim=(0, top),
            xlabel="coverage: share of the images with an answer",
            title="Wrong answers",
        )
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None if top >= 0.05 else 1))
        return _svg(
            figure, f"Risk against coverage: {100 * risk[-1]:.1f} % wrong where all are answered"
        )


def sizes(scores: Sequence[SizeScore], top1: float) -> str:
    """Accuracy on scaled-down images, against their shorter side; dashed: unchanged images."""
    ordered = sorted(scores, key=lambda score: score.pixels)
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        axes.axhline(top1, color=INK, alpha=0.45, linewidth=1, linestyle="--")
        axes.plot(
            [score.pixels for score in ordered],
            [score.top1 for score in ordered],
            color=HELD_OUT,
            marker="o",
            linewidth=2.0,
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(
            [score.pixels for score in ordered], [str(score.pixels) for score in ordered]
        )
        axes.minorticks_off()
        axes.set(
            ylim=(0, 1.02), xlabel="shorter side of the image, pixels", title="Accuracy (top-1)"
        )
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        figures = ", ".join(f"{percent(score.top1)} at {score.pixels}" for score in ordered)
        return _svg(figure, f"Accuracy by the side of the image in pixels: {figures}")


def _axes(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    return figure, figure.subplots()


def _over_epochs(loss: Axes, accuracy: Axes, of: str = "") -> None:
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    loss.set_title(f"{of}loss (cross-entropy, nats)".capitalize())
    loss.set_ylim(bottom=0)
    accuracy.set_title(f"{of}accuracy (top-1)".capitalize())
    accuracy.set_ylim(0, 1.02)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _svg(figure: Figure, description: str) -> str:
    """`figure` as an <svg> in the page's colours; `description` is for screen readers."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": description}):  # the same data gives the same bytes
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = buffer.getvalue().replace(INK, "currentColor")
    for index, placeholder in enumerate(SERIES, start=1):
        text = text.replace(placeholder, f"var(--s{index})")
    text = re.sub(
        r'<g id="[^"]*"', "<g", text[text.index("<svg") :]
    )  # ids that a second plot on the page has too
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
