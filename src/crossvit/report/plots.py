"""Plots as SVG text that takes its ink from the page, so that one picture is readable in light and in dark."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from crossvit.results import Epoch

INK = "#123456"  # stands for the page's text colour; replaced by `currentColor` in the SVG
TRAIN, VAL = "#e07b39", "#2a78c2"

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "crossvit",  # the same data gives the same bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK),
}


def curves(epochs: Sequence[Epoch]) -> list[str]:
    """Loss and accuracy over the epochs, trained-on and held-out images: two SVGs, to stand side by side or stacked."""
    with matplotlib.rc_context(STYLE):
        figures = [Figure(figsize=(4.6, 3.0), layout="constrained") for _ in range(2)]
        loss, accuracy = (figure.subplots() for figure in figures)
        numbers = [entry.epoch for entry in epochs]
        marker = "o" if len(epochs) == 1 else None
        for axes, train, held_out, title in (
            (loss, [e.loss for e in epochs], [e.val_loss for e in epochs], "Loss (cross-entropy, nats)"),
            (accuracy, [e.train_top1 for e in epochs], [e.val_top1 for e in epochs], "Accuracy (top-1)"),
        ):
            axes.plot(numbers, train, color=TRAIN, marker=marker, linewidth=1.6, label="training (augmented)")
            axes.plot(numbers, held_out, color=VAL, marker=marker, linewidth=2.0, label="held out")
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            axes.grid(alpha=0.18, color=INK)
        loss.set_ylim(bottom=0)
        accuracy.set_ylim(0, 1.005)
        accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        loss.legend(frameon=False, loc="upper right")
        return [_svg(figure) for figure in figures]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().replace(INK, "currentColor")
    return text[text.index("<svg") :]
