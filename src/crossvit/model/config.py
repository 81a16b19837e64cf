"""What a CrossViT is made of: frozen, validated records that go to and from a plain dict.

Standard library only. Branch 0 is the paper's S (small patches, the complement), branch 1 its L
(large patches, the primary): the order of the released weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from crossvit.errors import ConfigError
from crossvit.model.registry import BLOCKS, FUSIONS, TOKENISERS

KEYS_VALUES = ("lazy", "materialised")
INITIALISATIONS = ("paper", "xavier")
# The paper gives its convolution stem and its T2T tokeniser for these two patches only, and the
# width of the T2T tokens between two soft splits (docs/paper.md, Architecture).
PAPER_PATCHES = (12, 16)
T2T_DIM = 64
MOST_BRANCHES = 4
DEEP_FUSIONS = ("all-attention", "cross-attention")  # built in, and made of `fusion_depth` blocks


class Convolution(NamedTuple):
    """One convolution of a stem: square kernel, stride and padding in pixels of its input."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int

    def output_side(self, side: int) -> int:
        return (side + 2 * self.padding - self.kernel) // self.stride + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """One branch: how it sees the image and the transformer that reads it.

    Attributes:
        patch: Side of a patch in pixels of this branch's own image.
        dim: Width D of its tokens.
        heads: Attention heads, a divisor of `dim`.
        depth: Transformer blocks in each multi-scale encoder (the paper's N for S and M for L).
        mlp_ratio: Hidden width of the MLP over `dim` (the paper's r).
        image_scale: Side of this branch's image over the model's input side (the paper: 1 for S,
            224/240 for L).
        tokeniser: `linear` patch projection, the paper's `dagger` convolutions or `t2t` soft
            splits (patch 12 or 16), `halving`: as many stride-2 convolutions as it takes to reach a
            power-of-two patch, for small data; or a name of `register_tokeniser`.
        class_token: Whether the branch has one; without it the mean of its patches stands in
            (see `fusion.py`).

    Raises:
        ConfigError: For a value that cannot work; the message says what would.
    """

    patch: int
    dim: int
    heads: int
    depth: int
    mlp_ratio: float = 4.0
    image_scale: float = 1.0
    tokeniser: str = "linear"
    class_token: bool = True

    def __post_init__(self) -> None:
        for field in ("patch", "dim", "heads"):
            value = getattr(self, field)
            _require(_is_int(value) and value >= 1, self, field, "an integer of 1 or more")
        _require(_is_int(self.depth) and self.depth >= 0, self, "depth", "an integer of 0 or more")
        _require(self.dim % self.heads == 0, self, "heads", f"a divisor of dim={self.dim}")
        ratio, scale = self.mlp_ratio, self.image_scale
        holds = _is_number(ratio) and 0 < ratio <= 1000 and int(self.dim * ratio) >= 1
        _require(holds, self, "mlp_ratio", "a positive number")
        holds = _is_number(scale) and 0 < scale <= 8
        _require(holds, self, "image_scale", "a number above 0 and at most 8")
        _require(isinstance(self.class_token, bool), self, "class_token", "True or False")
        self._check_tokeniser()

    def _check_tokeniser(self) -> None:
        name = self.tokeniser
        TOKENISERS.check(name)
        if name in ("dagger", "t2t"):
            holds = self.patch in PAPER_PATCHES
            _require(holds, self, "patch", f"12 or 16 with tokeniser={name!r}")
        if name == "dagger":
            _require(self.dim % 4 == 0, self, "dim", "a multiple of 4 with tokeniser='dagger'")
        if name == "halving":
            holds = self.patch >= 2 and self.patch.bit_count() == 1
            _require(holds, self, "patch", "a power of two with tokeniser='halving'")

    @property
    def mlp_dim(self) -> int:
        return int(self.dim * self.mlp_ratio)

    def stem(self, in_channels: int) -> list[Convolution]:
        """The convolutions that turn the branch's image into its grid of patches, a ReLU between.

        linear: one whose stride is its kernel. dagger: the paper's three, widths D/4 → D/2 → D
        (docs/paper.md, Architecture). halving: stride-2 3x3 ones down to one patch, widths doubling
        up to D (16 at least), then a 3x3 one. t2t has none: see `soft_splits`.

        Raises:
            ConfigError: For a registered tokeniser, of which only its own code knows.
        """
        match self.tokeniser:
            case "t2t":
                return []
            case "linear":
                return [Convolution(in_channels, self.dim, self.patch, self.patch, 0)]
            case "dagger":
                quarter, half = self.dim // 4, self.dim // 2
                first = Convolution(in_channels, quarter, 7, 4, 3)
                if self.patch == 12:
                    second, third = (quarter, half, 3, 3, 0), (half, self.dim, 3, 1, 1)
                else:
                    second, third = (quarter, half, 3, 2, 1), (half, self.dim, 3, 2, 1)
                return [first, Convolution(*second), Convolution(*third)]
            case "halving":
                steps = self.patch.bit_length() - 1
                outputs = (max(self.dim >> left, 16) for left in reversed(range(steps)))
                widths = [in_channels, *outputs]
                down = [Convolution(a, b, 3, 2, 1) for a, b in itertools.pairwise(widths)]
                return [*down, Convolution(widths[-1], self.dim, 3, 1, 1)]
        raise ConfigError(f"tokeniser {self.tokeniser!r} is not built in: its layers are not known")

    def soft_splits(self) -> list[tuple[int, int, int]]:
        """(kernel, stride, padding) of the T2T tokeniser's three soft splits; none for others."""
        if self.tokeniser != "t2t":
            return []
        second = (3, 3, 1), (3, 1, 1)
        return [(7, 4, 2), *(second if self.patch == 12 else ((3, 2, 1), (3, 2, 1)))]

    def image_size(self, model_size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) at which this branch sees an input of `model_size`.

        The nearest non-zero multiple of the patch to `image_scale` times each side.
        """
        counts = (max(1, math.floor(self.image_scale * s / self.patch + 0.5)) for s in model_size)
        height, width = (count * self.patch for count in counts)
        return height, width

    def grid(self, model_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches for an input of `model_size`."""
        height, width = self.image_size(model_size)
        return height // self.patch, width // self.patch


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossViTConfig:
    """A whole model.

    Attributes:
        branches: One to four, smallest patches first by convention. One branch is a plain ViT
            and takes fusion `none`.
        image_size: (height, width) in pixels; an int is taken as a square.
        num_classes: Logits of each head.
        in_channels: Channels of the images.
        stages: Multi-scale encoders (the paper's K).
        drop: Dropout after the projections and in the MLP (0 in the paper).
        attention_drop: Dropout on the attention weights (0 in the paper).
        drop_path: The highest stochastic-depth rate; it grows linearly over the stages
            (docs/paper.md, Training recipes).
        init: `paper` (truncated normal, 0.02) or `xavier` (Xavier-uniform linear layers, He
            convolutions: for small data).
        dynamic_size: Take images of any size; position embeddings are resampled to each
            (`image_size` is their own).
        fusion: The paper's scheme at the end of each encoder: none, all-attention, class-token,
            pairwise, cross-attention; or a name of `register_fusion`.
        fusion_depth: Attention blocks in each fusion (the paper's L; all-attention and
            cross-attention have them).
        as_released: In cross-attention, blocks after the first see the class token alone, as in
            the authors' code (docs/paper.md, Faults of the released code).
        keys_values: How cross-attention may be computed: `lazy`, or `materialised`, the paper's
            form (see `crossvit.fast.cross_attention`).
        projection_norm, projection_gelu: Whether LayerNorm and GELU stand before the linear map
            in f and g.
        projection_identity: Whether f and g between equal widths are the identity.
        projection_shared: In all-attention and pairwise, whether class tokens and patches go
            through the same f and g.
        block: The encoder block: `pre-norm`, the paper's, or a name of `register_block`.

    Raises:
        ConfigError: For a value that cannot work; the message says what would.
    """

    branches: tuple[BranchConfig, ...]
    image_size: tuple[int, int] = (240, 240)
    num_classes: int = 1000
    in_channels: int = 3
    stages: int = 3
    drop: float = 0.0
    attention_drop: float = 0.0
    drop_path: float = 0.0
    init: str = "paper"
    dynamic_size: bool = False
    fusion: str = "cross-attention"
    fusion_depth: int = 1
    as_released: bool = False
    keys_values: str = "lazy"
    projection_norm: bool = True
    projection_gelu: bool = True
    projection_identity: bool = False
    projection_shared: bool = True
    block: str = "pre-norm"

    def __post_init__(self) -> None:
        if _is_int(self.image_size):
            object.__setattr__(self, "image_size", (self.image_size, self.image_size))
        pair = "a positive integer or a pair (height, width) of them"
        for field, right in (("image_size", pair), ("branches", "a tuple of BranchConfig")):
            _require(isinstance(getattr(self, field), tuple | list), self, field, right)
            object.__setattr__(self, field, tuple(getattr(self, field)))
        sides = self.image_size
        holds = len(sides) == 2 and all(_is_int(side) and side >= 1 for side in sides)
        _require(holds, self, "image_size", pair)
        for field in ("num_classes", "in_channels", "stages", "fusion_depth"):
            value = getattr(self, field)
            _require(_is_int(value) and value >= 1, self, field, "an integer of 1 or more")
        for field in ("drop", "attention_drop", "drop_path"):
            value = getattr(self, field)
            holds = _is_number(value) and 0.0 <= value < 1.0
            _require(holds, self, field, "a number from 0 up to (not including) 1")
        for flag in dataclasses.fields(self):
            if isinstance(flag.default, bool):
                holds = isinstance(getattr(self, flag.name), bool)
                _require(holds, self, flag.name, "True or False")
        for field, known in (("init", INITIALISATIONS), ("keys_values", KEYS_VALUES)):
            _require(getattr(self, field) in known, self, field, f"one of {', '.join(known)}")
        FUSIONS.check(self.fusion)
        BLOCKS.check(self.block)
        self._check_branches()

    def _check_branches(self) -> None:
        count = len(self.branches)
        if not 1 <= count <= MOST_BRANCHES:
            raise ConfigError(
                f"branches has {count} entries: a CrossViT has one to {MOST_BRANCHES}"
            )
        height, width = self.image_size
        for index, branch in enumerate(self.branches):
            if not isinstance(branch, BranchConfig):
                raise ConfigError(f"branches[{index}] = {branch!r}: should be a BranchConfig")
            if min(height, width) < branch.patch:
                raise ConfigError(
                    f"image_size = {height}x{width}: a side is shorter than the "
                    f"{branch.patch}-pixel patch of branch {index}; use {branch.patch} or more"
                )
        if len({branch.class_token for branch in self.branches}) > 1:
            values = ", ".join(str(branch.class_token) for branch in self.branches)
            raise ConfigError(
                f"class_token = {values} over the branches: should be the same in every branch"
            )
        if count == 1:
            _require(self.fusion == "none", self, "fusion", "'none' with a single branch")
        if self.fusion_depth > 1:
            holds = self.fusion in DEEP_FUSIONS or self.fusion not in FUSIONS.built_in
            right = f"{' or '.join(DEEP_FUSIONS)} with fusion_depth={self.fusion_depth}"
            _require(holds, self, "fusion", right)
        if self.as_released:
            holds = self.fusion == "cross-attention"
            _require(holds, self, "fusion", "'cross-attention' with as_released=True")

    def to_dict(self) -> dict[str, Any]:
        """A plain dict (numbers, strings, lists) from which `from_dict` makes an equal config.

        `block` is left out where it is the paper's, so that releases before it read the dict.
        """
        record = dataclasses.asdict(self)
        record["image_size"] = list(self.image_size)
        record["branches"] = list(record["branches"])
        if self.block == type(self).block:
            del record["block"]
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> CrossViTConfig:
        """The config of `to_dict`'s record.

        Raises:
            ConfigError: For an unknown or missing field, which it names.
        """
        branches = record.get("branches", ()) if isinstance(record, Mapping) else None
        if not isinstance(branches, tuple | list):
            raise ConfigError(
                "config: should be a dict as to_dict() gives, with a list of branches"
            )
        fields = {**record, "branches": tuple(_build(BranchConfig, branch) for branch in branches)}
        return _build(cls, fields)


T = TypeVar("T")


def _build(kind: type[T], fields: Mapping[str, Any]) -> T:
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{kind.__name__} = {fields!r}: should be a dict of its fields")
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ConfigError(f"unknown field of {kind.__name__}: {', '.join(unknown)}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise ConfigError(f"{kind.__name__}: {error}") from None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(holds: bool, record: object, field: str, right: str) -> None:
    if not holds:
        raise ConfigError(f"{field} = {getattr(record, field)!r}: should be {right}")
