"""Every model by name, in one table: configuration, alias, test-time crop and the accuracy printed for it.

Released models carry timm's names; the authors' names are aliases. Accuracies are top-1 on ImageNet-1k in percent:
`paper` is Table 1 (Table 4 at 408), `timm` is timm's re-evaluation of the released weights. The small-image presets are
this project's own; dev/LOG.md has the measurements behind them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from crossvit.errors import unknown_name
from crossvit.model.config import BranchConfig, CrossViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """One row of the table. `crop` is the share of the resized picture kept by the centre crop at test time; None
    means that the whole picture is resized to the input and nothing is cut off."""

    name: str
    config: CrossViTConfig
    alias: str | None = None
    crop: float | None = None
    paper_top1: float | None = None
    timm_top1: float | None = None


def _released(
    name: str, alias: str, *, dims: tuple[int, int], heads: int, depth: int, mlp_ratio: float,
    paper: float, timm: float, size: int = 240, large_size: int = 224,
) -> Preset:  # fmt: skip
    tokeniser = "dagger" if "dagger" in name else "linear"
    shared: dict[str, Any] = {"heads": heads, "mlp_ratio": mlp_ratio, "tokeniser": tokeniser}
    small = BranchConfig(patch=12, dim=dims[0], depth=1, **shared)
    large = BranchConfig(patch=16, dim=dims[1], depth=depth, image_scale=large_size / size, **shared)
    config = CrossViTConfig(branches=(small, large), image_size=(size, size))
    crop = 0.875 if size == 240 else 1.0
    return Preset(name=name, alias=alias, config=config, crop=crop, paper_top1=paper, timm_top1=timm)


def _small_image(
    name: str, *, size: int, patches: tuple[int, int], dims: tuple[int, int], heads: tuple[int, int], depths: tuple[int, int],
    stages: int,
) -> Preset:  # fmt: skip
    branches = tuple(
        BranchConfig(patch=patch, dim=dim, heads=head, depth=depth, mlp_ratio=2.0, tokeniser="halving")
        for patch, dim, head, depth in zip(patches, dims, heads, depths, strict=True)
    )
    return Preset(name=name, config=CrossViTConfig(branches=branches, image_size=(size, size), stages=stages, init="xavier"))


# fmt: off
_ROWS = (
    #         name                      authors' name              dS/dL            heads    M        r                                  top-1
    _released("crossvit_tiny_240", "crossvit_tiny_224", dims=(96, 192), heads=3, depth=4, mlp_ratio=4, paper=73.4, timm=73.352),
    _released("crossvit_small_240", "crossvit_small_224", dims=(192, 384), heads=6, depth=4, mlp_ratio=4, paper=81.0, timm=81.036),
    _released("crossvit_base_240", "crossvit_base_224", dims=(384, 768), heads=12, depth=4, mlp_ratio=4, paper=82.2, timm=82.212),
    _released("crossvit_9_240", "crossvit_9_224", dims=(128, 256), heads=4, depth=3, mlp_ratio=3, paper=73.9, timm=73.994),
    _released("crossvit_9_dagger_240", "crossvit_9_dagger_224", dims=(128, 256), heads=4, depth=3, mlp_ratio=3, paper=77.1, timm=76.990),
    _released("crossvit_15_240", "crossvit_15_224", dims=(192, 384), heads=6, depth=5, mlp_ratio=3, paper=81.5, timm=81.522),
    _released("crossvit_15_dagger_240", "crossvit_15_dagger_224", dims=(192, 384), heads=6, depth=5, mlp_ratio=3, paper=82.3, timm=82.302),
    _released("crossvit_15_dagger_408", "crossvit_15_dagger_384", dims=(192, 384), heads=6, depth=5, mlp_ratio=3, paper=83.5, timm=83.842, size=408, large_size=384),
    _released("crossvit_18_240", "crossvit_18_224", dims=(224, 448), heads=7, depth=6, mlp_ratio=3, paper=82.5, timm=82.390),
    _released("crossvit_18_dagger_240", "crossvit_18_dagger_224", dims=(224, 448), heads=7, depth=6, mlp_ratio=3, paper=82.8, timm=82.494),
    _released("crossvit_18_dagger_408", "crossvit_18_dagger_384", dims=(224, 448), heads=7, depth=6, mlp_ratio=3, paper=83.9, timm=84.198, size=408, large_size=384),
    _small_image("crossvit_pico_32", size=32, patches=(4, 8), dims=(64, 128), heads=(2, 4), depths=(1, 2), stages=2),
    _small_image("crossvit_nano_64", size=64, patches=(8, 16), dims=(64, 128), heads=(2, 4), depths=(1, 2), stages=2),
    _small_image("crossvit_micro_96", size=96, patches=(8, 16), dims=(96, 192), heads=(3, 6), depths=(1, 3), stages=2),
)
# fmt: on

PRESETS = {preset.name: preset for preset in _ROWS}
ALIASES = {preset.alias: preset.name for preset in _ROWS if preset.alias}


def preset(name: str) -> Preset:
    """The row called `name` (or its alias). UnknownNameError suggests the nearest names."""
    canonical = ALIASES.get(name, name)
    if canonical not in PRESETS:
        raise unknown_name("model", name, [*PRESETS, *ALIASES], listing="`crossvit models`")
    return PRESETS[canonical]


def list_models() -> list[str]:
    """The names that `create_model` takes, released models first, in the order of the paper's tables."""
    return list(PRESETS)
