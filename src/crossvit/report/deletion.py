"""The picture of a check of maps: deletion and insertion curves. Reads results alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from crossvit.results import Curve, Faithfulness

CONTROLS = {
    "random": ("#8a939d", "--"),
    "random blobs": ("#8a939d", "-."),
    "centre": ("#1b1f24", ":"),
}
COLOURS = (
    "#c4500a",
    "#0b5fa5",
    "#2a8f5b",
    "#8b4fb0",
    "#c99a00",
    "#d1406f",
    "#4aa3b8",
    "#7a5c3e",
    "#5b6570",
    "#9c2f2f",
)
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}


def faithfulness_png(result: Faithfulness) -> bytes:
    """Deletion and insertion curves of every kind of map, PNG bytes; shades are 95 % intervals."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.4), dpi=100, layout="constrained")
        deletion, insertion = figure.subplots(1, 2, sharey=True)
        free = iter(COLOURS * 2)
        for score in result.scores:
            colour, line = CONTROLS.get(score.kind) or (next(free), "-")
            for axes, curve in ((deletion, score.deletion), (insertion, score.insertion)):
                _draw(axes, result.shares, curve, score.kind, color=colour, linestyle=line)
        deletion.set_title(
            "Deletion: the most relevant cells first (low is good)", loc="left", fontsize=12
        )
        insertion.set_title(
            "Insertion: the most relevant cells first (high is good)", loc="left", fontsize=12
        )
        deletion.set_xlabel("cells taken away")
        insertion.set_xlabel("cells put back")
        deletion.set_ylabel("mean probability of the model's answer")
        rows, columns = result.grid
        title = f"{result.n:,} {result.split} images of {result.data}, cells {rows}x{columns}"
        figure.suptitle(f"{title}, fill {result.fill}", fontsize=12, x=0.01, ha="left")
        for axes in (deletion, insertion):
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.grid(alpha=0.2)
            axes.legend(
                frameon=False,
                fontsize=9,
                title="area under the curve",
                title_fontsize=9,
                alignment="left",
            )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def _draw(axes: Axes, shares: Sequence[float], curve: Curve, kind: str, **style: str) -> None:
    low, high = zip(*((interval.low, interval.high) for interval in curve.intervals), strict=True)
    label = f"{curve.area:.3f}  {kind}"
    (line,) = axes.plot(shares, curve.mean, linewidth=1.8, label=label, **style)  # type: ignore[arg-type]
    axes.fill_between(shares, low, high, color=line.get_color(), alpha=0.08, linewidth=0)
