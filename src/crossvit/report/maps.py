"""Pictures of explanations: maps laid over the photo they were made for. Reads results alone.

Every map is drawn in multiples of its average: 1 is average attention, on any grid.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from crossvit.report.overlay import HEAT, Colours, Scene, Values, scale
from crossvit.results import BranchAnswer, Explanation, Label, TokenMap
from crossvit.text import percent

DPI = 100
WIDTH = 12.0  # inches of the sheet for up to two branches: 1,200 pixels
HEADLINE, SECTION, TITLE, SMALL_TITLE = 1.05, 0.72, 0.36, 0.2  # inches above what they head
MARGIN, GAP = 0.012, 0.008  # shares of the width
INK, QUIET, PAPER = "#1b1f24", "#5b6570", "#ffffff"
FEATURES = matplotlib.colormaps["viridis"]
MOST_FEATURES = 24  # channels on a branch's sheet
NOTE = {"facecolor": PAPER, "alpha": 0.85, "linewidth": 0, "boxstyle": "round,pad=0.25"}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlepad": 5,
    "axes.titlelocation": "left",
    "text.parse_math": False,  # names come from people's files
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
    ),
    "axes.edgecolor": "#c9ced4",
}


def explanation_png(explanation: Explanation) -> bytes:
    """The sheet of one image as PNG bytes: the photo, relevance, every stage's attention.

    First row: the photo with what was cut off, rollout, the gradient-weighted map of the class, and
    where the branches disagree. Second row: the maps of each branch. Then a row a stage: attention
    within each branch and between branches, the mean of the heads large and every head small. All
    heat maps of a block share the scale that its bar states.
    """
    stages = max((item.stage for item in explanation.maps if item.stage is not None), default=0)
    readings = _readings(explanation)
    several = len(explanation.branches) > 1
    width = WIDTH * max(1.0, len(readings) / 4, len(explanation.branches) / 2)
    aspect = _aspect(explanation)
    summary = _rows_height(2 if several else 1, width / _summary_columns(explanation) * aspect)
    attention = _rows_height(stages, width / (2 * max(len(readings), 2)) * aspect)
    heights = [HEADLINE, SECTION, summary, *([SECTION, attention] if readings else [])]
    with _drawing():
        figure = Figure(figsize=(width, sum(heights)), dpi=DPI, facecolor=PAPER)
        blocks: Any = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0)
        _headline(blocks[0], explanation)
        _summary(blocks[1], blocks[2], explanation)
        if readings:
            _attention(blocks[3], blocks[4], explanation, readings, stages)
        return _png(figure)


def features_png(explanation: Explanation) -> bytes:
    """Feature maps as in the paper's Figure 5, PNG bytes.

    For each branch, the channels of the last encoder's patch tokens that vary most over the
    picture, at most 24, on the branch's grid. Every channel is
    scaled from its lowest to its highest value.
    """
    sheet = _rows_height(3, WIDTH / 8 * _aspect(explanation), title=SMALL_TITLE)
    heights = [0.6, *([0.4, sheet] * len(explanation.features))]
    with _drawing():
        figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, facecolor=PAPER)
        blocks: Any = figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0)
        title = f"{_name(explanation)}: features after the last encoder"
        blocks[0].text(MARGIN, 0.5, title, fontsize=17, fontweight="bold", va="center")
        sheets = zip(
            blocks[1::2], blocks[2::2], explanation.branches, explanation.features, strict=True
        )
        for head, block, branch, values in sheets:
            _feature_sheet(head, block, branch, values, _extent_aspect(explanation))
        return _png(figure)


def _readings(explanation: Explanation) -> list[tuple[str, str, str]]:
    """(kind, reader, on) of the attention that there is, own attention first."""
    found = dict.fromkeys(
        (item.kind, item.reader, item.on) for item in explanation.maps if item.stage is not None
    )
    return sorted(found, key=lambda reading: reading[0])


def _headline(block: SubFigure, explanation: Explanation) -> None:
    assert explanation.top is not None
    assert explanation.explained is not None
    block.text(MARGIN, 0.72, _name(explanation), fontsize=17, fontweight="bold", va="center")
    parts = [f"answer: {_labelled(explanation.top)}"]
    if explanation.explained.label != explanation.top.label:
        parts.append(f"explained: {_labelled(explanation.explained)}")
    if len(explanation.branches) > 1:
        parts += [
            f"branch {branch.name}: {_labelled(branch.top)}" for branch in explanation.branches
        ]
    block.text(MARGIN, 0.40, "     ".join(parts), fontsize=12, va="center")
    grids = [
        f"{branch.name} has {branch.grid[0]}x{branch.grid[1]} patches of {branch.patch} pixels"
        for branch in explanation.branches
    ]
    block.text(MARGIN, 0.14, "     ".join(grids), fontsize=10, color=QUIET, va="center")


def _section(block: SubFigure, title: str, note: str, normal: Normalize) -> None:
    """A title, a note on its maps, and their common scale."""
    block.add_artist(Line2D((MARGIN, 1 - MARGIN), (0.98, 0.98), color="#d5dae0", linewidth=1))
    block.text(MARGIN, 0.70, title, fontsize=13, fontweight="bold", va="center")
    block.text(MARGIN, 0.34, note, fontsize=10, color=QUIET, va="center")
    axes = block.add_axes((0.70, 0.52, 0.288, 0.2))
    bar = block.colorbar(
        ScalarMappable(normal, HEAT), cax=axes, orientation="horizontal", extend="max"
    )
    bar.ax.tick_params(labelsize=9, length=2)
    bar.outline.set_visible(False)
    block.text(
        0.988,
        0.86,
        "1 = average attention",
        fontsize=9,
        color=QUIET,
        va="center",
        ha="right",
    )


def _summary(head: SubFigure, block: SubFigure, explanation: Explanation) -> None:
    """The photo, relevance for the answer, where the branches disagree, and each branch's maps."""
    assert explanation.explained is not None
    class_name = _short(explanation.explained.label)
    names = [branch.name for branch in explanation.branches]
    several = len(names) > 1
    fused = [
        ("rollout: all that was read", _whole(explanation, "rollout", "all")),
        (f"gradient-weighted: for {class_name}", _whole(explanation, "gradient", "all")),
    ]
    by_branch: list[tuple[str, Values]] = []
    if several:
        for branch in explanation.branches:
            crossed = percent(branch.from_other, decimals=0)
            title = f"{branch.name}, rollout ({crossed} from other branches)"
            by_branch.append((title, _whole(explanation, "rollout", branch.name)))
        by_branch += [
            (f"{name}, for {class_name}", _whole(explanation, "gradient", name)) for name in names
        ]
    normal = scale([values for _, values in (*fused, *by_branch)])
    note = "on the finest grid; below, for each branch" if several else "one value a patch"
    _section(
        head,
        "What the answer was read from",
        f"Through all stages, from every branch's patches, {note}.",
        normal,
    )
    axes = _panels(block, 2 if several else 1, _summary_columns(explanation))
    _photo(axes[0][0], explanation)
    for place, (title, values) in zip(axes[0][1:], fused, strict=False):
        _heat(place, explanation, title, values, normal)
    if several:
        for place, name in zip(axes[0][3:], names if len(names) > 2 else names[:1], strict=False):
            _difference(place, explanation, name, names)
        for place, (title, values) in zip(axes[1], by_branch, strict=True):
            _heat(place, explanation, title, values, normal)


def _summary_columns(explanation: Explanation) -> int:
    """Two maps a branch in the second row; photo, two maps, a difference or more in the first."""
    branches = len(explanation.branches)
    return max(4, 2 * branches)


def _attention(
    head: SubFigure,
    block: SubFigure,
    explanation: Explanation,
    readings: Sequence[tuple[str, str, str]],
    stages: int,
) -> None:
    """One row a stage, one column a reading: the last block's mean of heads, and each head."""
    maps = [item for item in explanation.maps if item.stage is not None]
    drawn = [_last(maps, reading, stage) for stage in range(1, stages + 1) for reading in readings]
    normal = scale(
        [_even(item.values.mean(axis=0)) for item in drawn if item is not None], share=0.995
    )
    note = (
        "Weights of the class token (or the mean of patches) in each stage's last block: "
        "mean of heads, then each."
    )
    _section(head, "Attention, stage by stage", note, normal)
    axes = _panels(block, stages, 2 * max(len(readings), 2))
    for row in range(stages):
        for column, reading in enumerate(readings):
            item = _last(maps, reading, row + 1)
            if item is not None:
                mean, heads = axes[row][2 * column], axes[row][2 * column + 1]
                _heat(
                    mean,
                    explanation,
                    f"{_reading_name(*reading)}, stage {row + 1}",
                    _even(item.values.mean(axis=0)),
                    normal,
                )
                heads.set_title(
                    f"{len(item.values)} head{'s' * (len(item.values) > 1)}",
                    color=QUIET,
                    loc="right",
                )
                _mosaic(heads, explanation, item, normal)


def _photo(axes: Axes, explanation: Explanation) -> None:
    assert explanation.photo is not None
    assert explanation.seen is not None
    assert explanation.size is not None
    width, height = explanation.size
    left, top, right, bottom = explanation.seen
    axes.imshow(explanation.photo, extent=(0, width, height, 0), interpolation="bilinear")
    cut = left > 0.5 or top > 0.5 or right < width - 0.5 or bottom < height - 0.5
    if cut:
        for x, y, across, down in (
            (0, 0, left, height),
            (right, 0, width - right, height),
            (left, 0, right - left, top),
            (left, bottom, right - left, height - bottom),
        ):
            axes.add_patch(
                Rectangle((x, y), across, down, facecolor=PAPER, alpha=0.65, linewidth=0)
            )
        axes.add_patch(
            Rectangle(
                (left, top), right - left, bottom - top, fill=False, edgecolor=INK, linewidth=1.2
            )
        )
    axes.set_title(f"photo, {width}x{height}" + (" (pale: cut off, not seen)" if cut else ""))


def _heat(
    axes: Axes, explanation: Explanation, title: str, values: Values, normal: Normalize
) -> None:
    """One map over the greyed photo, smooth between patch centres."""
    _lay(axes, explanation, _scene(explanation).heat(values, normal))
    axes.set_title(title)


def _difference(axes: Axes, explanation: Explanation, name: str, names: Sequence[str]) -> None:
    (item,) = explanation.select("difference", reader=name)
    values = item.values[0]
    reach = max(float(np.quantile(np.abs(values), 0.99)), 1.0)
    _lay(axes, explanation, _scene(explanation).difference(values, reach))
    rest = [label for label in names if label != name]
    than = rest[0] if len(rest) == 1 else "the others"
    axes.set_title(f"{name} more (orange) or {than} (blue)")
    if len(rest) == 1 and explanation.disagreement is not None:
        distance = percent(explanation.disagreement, decimals=0)
        note = f"branches differ by {distance}; colours to ±{reach:.1f}"
        axes.text(0.03, 0.03, note, transform=axes.transAxes, fontsize=7.5, bbox=NOTE)


def _lay(axes: Axes, explanation: Explanation, laid: Colours) -> None:
    """An overlay where it belongs in the picture, whose pixels are the coordinates."""
    assert explanation.size is not None
    assert explanation.seen is not None
    width, height = explanation.size
    left, top, right, bottom = explanation.seen
    axes.imshow(_scene(explanation).faded(), extent=(0, width, height, 0), interpolation="bilinear")
    axes.imshow(laid, extent=(left, right, bottom, top), interpolation="bilinear")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _scene(explanation: Explanation) -> Scene:
    assert explanation.photo is not None
    assert explanation.size is not None
    assert explanation.seen is not None
    left, top, right, bottom = explanation.seen
    width, height = explanation.size
    return Scene(explanation.photo, (left / width, top / height, right / width, bottom / height))


def _mosaic(axes: Axes, explanation: Explanation, item: TokenMap, normal: Normalize) -> None:
    """Every head's map as it is, patch by patch, in as square an arrangement as they allow."""
    heads, rows, columns = item.values.shape
    across = int(np.ceil(np.sqrt(heads)))
    down = -(-heads // across)
    scale = max(1, 48 // max(rows, columns))
    gap = 3
    high, wide = rows * scale, columns * scale
    tiled = np.full((down * (high + gap) - gap, across * (wide + gap) - gap, 4), 0.0)
    for head in range(heads):
        y, x = (head // across) * (high + gap), (head % across) * (wide + gap)
        cell = HEAT(normal(_even(item.values[head]))).repeat(scale, axis=0).repeat(scale, axis=1)
        tiled[y : y + high, x : x + wide] = cell
    axes.imshow(tiled, interpolation="nearest", aspect=_extent_aspect(explanation) * wide / high)
    axes.set_anchor("N")


def _feature_sheet(
    head: SubFigure,
    block: SubFigure,
    branch: BranchAnswer,
    values: NDArray[np.float32],
    aspect: float,
) -> None:
    channels = np.argsort(-values.var(axis=(1, 2)), kind="stable")[:MOST_FEATURES]
    rows, columns = branch.grid
    places = (item for row in _panels(block, 3, 8, title=SMALL_TITLE) for item in row)
    for place, channel in zip(places, channels, strict=False):
        place.imshow(
            values[channel], cmap=FEATURES, interpolation="nearest", aspect=aspect * columns / rows
        )
        place.set_title(str(channel), fontsize=8, color=QUIET, pad=1)
    about = (
        f"Branch {branch.name}: the {len(channels)} of {len(values)} channels that vary most "
        f"on its {rows}x{columns} patches"
    )
    head.text(
        MARGIN,
        0.4,
        f"{about}, each from its lowest (dark) to its highest value",
        fontsize=11,
        va="center",
    )


def _rows_height(rows: int, panel: float, title: float = TITLE) -> float:
    """Inches that `rows` of panels take, each with its title above."""
    return rows * (panel + title)


def _panels(block: SubFigure, rows: int, columns: int, title: float = TITLE) -> list[list[Axes]]:
    """Panels in rows and columns, each with `title` inches above it."""
    height = block.bbox.height / DPI
    across, down = (1 - 2 * MARGIN + GAP) / columns, 1 / rows
    axes = [
        [
            block.add_axes(
                (
                    MARGIN + column * across,
                    1 - (row + 1) * down + 0.04 / height,
                    across - GAP,
                    down - title / height,
                )
            )
            for column in range(columns)
        ]
        for row in range(rows)
    ]
    for item in (item for row in axes for item in row):
        item.set_axis_off()
        item.set_anchor("NW")
    return axes


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """The style of a sheet; a letter that the font lacks is drawn as a box and is no news."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _last(maps: Sequence[TokenMap], reading: tuple[str, str, str], stage: int) -> TokenMap | None:
    """The last block's map of a reading in a stage."""
    of_it = [
        item
        for item in maps
        if (item.kind, item.reader, item.on) == reading and item.stage == stage
    ]
    return of_it[-1] if of_it else None


def _whole(explanation: Explanation, kind: str, reader: str) -> Values:
    (item,) = explanation.select(kind, reader=reader, on="all")
    values: Values = item.values[0]
    return values


def _reading_name(kind: str, reader: str, on: str) -> str:
    return f"{reader} attends to" if kind == "attention" else f"{reader} reads {on}"


def _even(values: Values) -> Values:
    """In multiples of the average."""
    mean = values.mean()
    return np.asarray(values / mean, dtype=np.float32) if mean > 0 else np.ones_like(values)


def _aspect(explanation: Explanation) -> float:
    """Height over width of the picture, kept from extremes so that a sheet stays a sheet."""
    assert explanation.size is not None
    return float(np.clip(explanation.size[1] / explanation.size[0], 0.4, 1.8))


def _extent_aspect(explanation: Explanation) -> float:
    """Height over width of what was seen, as it lies in the picture."""
    assert explanation.seen is not None
    left, top, right, bottom = explanation.seen
    return (bottom - top) / (right - left)


def _labelled(label: Label) -> str:
    return f"{_short(label.label)} {percent(label.probability)}"


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _name(explanation: Explanation) -> str:
    """The file and the folder it is in."""
    return "/".join(Path(explanation.image).parts[-2:])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
