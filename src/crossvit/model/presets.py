"""Every model by name, in one table: configuration, alias, test-time crop and reported accuracy.

Released models carry timm's names; the authors' names are aliases. `crossvit_small_240_*` are the
paper's ablations (Tables 6 and 7, and its "no class tokens"), `vit_*` the single-branch twins of
Table 8. The presets for small images are this project's; dev/LOG.md has the measurements behind
them. `paper_tables.py` has what the paper prints for each model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from crossvit.errors import unknown_name
from crossvit.model.config import BranchConfig, CrossViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """One row of the table.

    Attributes:
        name: What `create_model` takes.
        config: The model's configuration.
        alias: The authors' name of a released model.
        crop: Share of the resized image that the centre crop keeps at test time, 0 to 1; None
            resizes the whole image to the input and cuts nothing off.
        paper_top1: Top-1 accuracy on ImageNet-1k in percent, as the paper prints it.
        timm_top1: The same, as timm measured it with the released weights.
        sha256: Digest of the hub's `model.safetensors`, where the hub prints it; the digests of
            other files are recorded when they are first used.
    """

    name: str
    config: CrossViTConfig
    alias: str | None = None
    crop: float | None = None
    paper_top1: float | None = None
    timm_top1: float | None = None
    sha256: str | None = None

    @property
    def released(self) -> bool:
        """Whether its authors released weights."""
        return self.alias is not None

    @property
    def hub(self) -> str:
        """Repository of the released weights on the hub, in timm's keys.

        Source: docs/paper.md, Released weights and key names.
        """
        return f"timm/{self.name}.in1k"

    @property
    def url(self) -> str:
        """Address of the authors' file of the released weights, in their keys.

        Source: docs/paper.md, Released weights and key names.
        """
        return f"https://github.com/IBM/CrossViT/releases/download/weights-0.1/{self.alias}.pth"


def _two_branches(
    *, dims: tuple[int, int], heads: int, depth: int, mlp_ratio: float, small_depth: int = 1, small_patch: int = 12,
    size: int = 240, large_size: int = 224, tokeniser: str = "linear", class_token: bool = True, **model: Any,
) -> CrossViTConfig:  # fmt: skip
    shared: dict[str, Any] = {
        "heads": heads,
        "mlp_ratio": mlp_ratio,
        "tokeniser": tokeniser,
        "class_token": class_token,
    }
    small = BranchConfig(patch=small_patch, dim=dims[0], depth=small_depth, **shared)
    large = BranchConfig(
        patch=16, dim=dims[1], depth=depth, image_scale=large_size / size, **shared
    )
    return CrossViTConfig(branches=(small, large), image_size=(size, size), **model)


def _paper(
    name: str, alias: str | None, *, paper: float, timm: float | None = None, size: int = 240, **config: Any
) -> Preset:  # fmt: skip
    tokeniser = "dagger" if "dagger" in name else config.pop("tokeniser", "linear")
    built = _two_branches(size=size, tokeniser=tokeniser, **config)
    crop = 0.875 if size < 400 else 1.0  # timm's evaluation of the released weights
    return Preset(
        name=name, alias=alias, config=built, crop=crop, paper_top1=paper, timm_top1=timm, sha256=_SHA256.get(name)
    )  # fmt: skip


def _small(change: str, *, paper: float, **config: Any) -> Preset:
    """CrossViT-small with one change: an ablation of the paper."""
    base = {"dims": (192, 384), "heads": 6, "depth": 4, "mlp_ratio": 4}
    return _paper(f"crossvit_small_240_{change}", None, paper=paper, **{**base, **config})


def _single_branch(name: str, *, dim: int, heads: int, depth: int, paper: float) -> Preset:
    """A twin of Table 8: the L branch alone, at 224, all 3·M blocks in a row."""
    tokeniser = "dagger" if "dagger" in name else "linear"
    branch = BranchConfig(
        patch=16, dim=dim, heads=heads, depth=depth, mlp_ratio=3, tokeniser=tokeniser
    )
    config = CrossViTConfig(branches=(branch,), image_size=(224, 224), fusion="none")
    return Preset(name=name, config=config, crop=0.875, paper_top1=paper)


def _small_image(
    name: str, *, size: int, patches: tuple[int, int], dims: tuple[int, int], heads: tuple[int, int], depths: tuple[int, int],
    stages: int,
) -> Preset:  # fmt: skip
    branches = tuple(
        BranchConfig(
            patch=patch, dim=dim, heads=head, depth=depth, mlp_ratio=2.0, tokeniser="halving"
        )
        for patch, dim, head, depth in zip(patches, dims, heads, depths, strict=True)
    )
    return Preset(
        name=name,
        config=CrossViTConfig(
            branches=branches, image_size=(size, size), stages=stages, init="xavier"
        ),
    )


# sha256 of timm/NAME.in1k/model.safetensors, as huggingface.co/timm/NAME.in1k/blob/main/model.safetensors prints it
_SHA256 = {
    "crossvit_small_240": "f71a8685182a0ac0b74a36b3b1d9053e5db5e40c08ad583156ae64f8ade11169",
    "crossvit_9_240": "5b45ceb819816111d69a80dd4df1404ae574df5835962854276550fefe07878f",
    "crossvit_18_dagger_408": "64f24c9f4daf58b8b410ef4f62402a00e6d2e4a28fba6e78a9921c3d8a9f02cd",
}
# How the rows of Table 6 were built, most likely (docs/paper.md, Ablations).
_LINEAR = {"projection_norm": False, "projection_gelu": False}

# fmt: off
_ROWS = (
    #      name                      authors' name              dS/dL            heads    M        r                                  top-1
    _paper("crossvit_tiny_240", "crossvit_tiny_224", dims=(96, 192), heads=3, depth=4, mlp_ratio=4, paper=73.4, timm=73.352),
    _paper("crossvit_small_240", "crossvit_small_224", dims=(192, 384), heads=6, depth=4, mlp_ratio=4, paper=81.0, timm=81.036),
    _paper("crossvit_base_240", "crossvit_base_224", dims=(384, 768), heads=12, depth=4, mlp_ratio=4, paper=82.2, timm=82.212),
    _paper("crossvit_9_240", "crossvit_9_224", dims=(128, 256), heads=4, depth=3, mlp_ratio=3, paper=73.9, timm=73.994),
    _paper("crossvit_9_dagger_240", "crossvit_9_dagger_224", dims=(128, 256), heads=4, depth=3, mlp_ratio=3, paper=77.1, timm=76.990),
    _paper("crossvit_15_240", "crossvit_15_224", dims=(192, 384), heads=6, depth=5, mlp_ratio=3, paper=81.5, timm=81.522),
    _paper("crossvit_15_dagger_240", "crossvit_15_dagger_224", dims=(192, 384), heads=6, depth=5, mlp_ratio=3, paper=82.3, timm=82.302),
    _paper("crossvit_15_dagger_408", "crossvit_15_dagger_384", dims=(192, 384), heads=6, depth=5, mlp_ratio=3, paper=83.5, timm=83.842, size=408, large_size=384),
    _paper("crossvit_18_240", "crossvit_18_224", dims=(224, 448), heads=7, depth=6, mlp_ratio=3, paper=82.5, timm=82.390),
    _paper("crossvit_18_dagger_240", "crossvit_18_dagger_224", dims=(224, 448), heads=7, depth=6, mlp_ratio=3, paper=82.8, timm=82.494),
    _paper("crossvit_18_dagger_408", "crossvit_18_dagger_384", dims=(224, 448), heads=7, depth=6, mlp_ratio=3, paper=83.9, timm=84.198, size=408, large_size=384),
    _paper("crossvit_18_dagger_504", None, dims=(224, 448), heads=7, depth=6, mlp_ratio=3, paper=84.1, size=504, large_size=480),
    _paper("crossvit_18_t2t_240", None, dims=(224, 448), heads=7, depth=6, mlp_ratio=3, paper=83.0, tokeniser="t2t"),
    # Table 6: fusion schemes
    _small("none", paper=80.2, fusion="none"),
    _small("all_attention", paper=80.0, fusion="all-attention", **_LINEAR),
    _small("class_token", paper=80.3, fusion="class-token", projection_identity=True, **_LINEAR),
    _small("pairwise", paper=80.3, fusion="pairwise", projection_identity=True, **_LINEAR),
    # Table 7: one change at a time
    _small("a", paper=80.8, small_patch=8, size=224),
    _small("b", paper=80.1, dims=(384, 384), projection_identity=True),
    _small("c", paper=80.7, small_depth=2),
    _small("d", paper=81.0, fusion_depth=2),
    _small("e", paper=80.9, depth=2, stages=6),
    _small("no_class_token", paper=80.0, class_token=False),
    # Table 8: single-branch twins
    _single_branch("vit_9_224", dim=256, heads=4, depth=3, paper=72.9),
    _single_branch("vit_9_dagger_224", dim=256, heads=4, depth=3, paper=75.6),
    _single_branch("vit_15_224", dim=384, heads=6, depth=5, paper=80.8),
    _single_branch("vit_15_dagger_224", dim=384, heads=6, depth=5, paper=81.7),
    _single_branch("vit_18_224", dim=448, heads=7, depth=6, paper=81.4),
    _single_branch("vit_18_dagger_224", dim=448, heads=7, depth=6, paper=81.2),
    # Ours, for small images
    _small_image("crossvit_pico_32", size=32, patches=(4, 8), dims=(64, 128), heads=(2, 4), depths=(1, 2), stages=2),
    _small_image("crossvit_nano_64", size=64, patches=(8, 16), dims=(64, 128), heads=(2, 4), depths=(1, 2), stages=2),
    _small_image("crossvit_micro_96", size=96, patches=(8, 16), dims=(96, 192), heads=(3, 6), depths=(1, 3), stages=2),
)
# fmt: on

PRESETS = {preset.name: preset for preset in _ROWS}
ALIASES = {preset.alias: preset.name for preset in _ROWS if preset.alias}


def preset(name: str) -> Preset:
    """The row of the model called `name`.

    Args:
        name: A name of `list_models` or an alias.

    Raises:
        UnknownNameError: For another name; the message suggests the nearest ones.
    """
    canonical = ALIASES.get(name, name)
    if canonical not in PRESETS:
        raise unknown_name("model", name, [*PRESETS, *ALIASES], listing="`crossvit models`")
    return PRESETS[canonical]


def list_models() -> list[str]:
    """Names that `create_model` takes.

    Returns:
        Released models first, in the order of the paper's tables.
    """
    return list(PRESETS)
