"""What a CrossViT is made of: frozen, validated records that go to and from a plain dict.

Standard library only. Branch 0 is the paper's S (small patches, the complement), branch 1 its L (large patches, the
primary): the order of the released weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from crossvit.errors import ConfigError

TOKENISERS = ("linear", "dagger", "t2t", "halving")
FUSIONS = ("none", "all-attention", "class-token", "pairwise", "cross-attention")
KEYS_VALUES = ("lazy", "materialised")
INITIALISATIONS = ("paper", "xavier")
PAPERS_PATCHES = (
    12,
    16,
)  # the paper gives its convolution stem and its T2T tokeniser for these two only (PAPER, section 1)
MOST_BRANCHES = 4
T2T_DIM = 64  # width of the T2T tokens between two soft splits (PAPER, section 1)


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

    patch: side of a patch in pixels of this branch's own image.
    dim: width D of its tokens.  heads: attention heads, a divisor of `dim`.
    depth: transformer blocks in each multi-scale encoder (the paper's N for S and M for L).
    mlp_ratio: hidden width of the MLP over `dim` (the paper's r).
    image_scale: side of this branch's image over the model's input side (the paper: 1 for S, 224/240 for L).
    tokeniser: `linear` patch projection, the paper's `dagger` convolutions or `t2t` soft splits (patch 12 or 16), or
        `halving`: as many stride-2 convolutions as it takes to reach a power-of-two patch, for small data.
    class_token: whether the branch has one; without it the mean of its patches stands in (see `fusion.py`).
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
            _require(
                _is_int(getattr(self, field)) and getattr(self, field) >= 1,
                self,
                field,
                "an integer of 1 or more",
            )
        _require(_is_int(self.depth) and self.depth >= 0, self, "depth", "an integer of 0 or more")
        _require(self.dim % self.heads == 0, self, "heads", f"a divisor of dim={self.dim}")
        ratio, scale = self.mlp_ratio, self.image_scale
        _require(
            _is_number(ratio) and 0 < ratio <= 1000 and int(self.dim * ratio) >= 1,
            self,
            "mlp_ratio",
            "a positive number",
        )
        _require(
            _is_number(scale) and 0 < scale <= 8,
            self,
            "image_scale",
            "a number above 0 and at most 8",
        )
        _require(isinstance(self.class_token, bool), self, "class_token", "True or False")
        _require(self.tokeniser in TOKENISERS, self, "tokeniser", f"one of {', '.join(TOKENISERS)}")
        if self.tokeniser in ("dagger", "t2t"):
            _require(
                self.patch in PAPERS_PATCHES,
                self,
                "patch",
                f"12 or 16 with tokeniser={self.tokeniser!r}",
            )
        if self.tokeniser == "dagger":
            _require(self.dim % 4 == 0, self, "dim", "a multiple of 4 with tokeniser='dagger'")
        if self.tokeniser == "halving":
            _require(
                self.patch >= 2 and self.patch.bit_count() == 1,
                self,
                "patch",
                "a power of two with tokeniser='halving'",
            )

    @property
    def mlp_dim(self) -> int:
        return int(self.dim * self.mlp_ratio)

    def stem(self, in_channels: int) -> list[Convolution]:
        """The convolutions that turn the branch's image into its grid of patches; a ReLU stands between two.

        linear: one whose stride is its kernel. dagger: the paper's three, widths D/4 → D/2 → D (PAPER, section 1).
        halving: stride-2 3x3 ones down to one patch, widths doubling up to D (16 at least), then a 3x3 one.
        t2t has none: see `soft_splits`.
        """
        if self.tokeniser == "t2t":
            return []
        if self.tokeniser == "linear":
            return [Convolution(in_channels, self.dim, self.patch, self.patch, 0)]
        if self.tokeniser == "dagger":
            quarter, half = self.dim // 4, self.dim // 2
            first = Convolution(in_channels, quarter, 7, 4, 3)
            if self.patch == 12:
                return [
                    first,
                    Convolution(quarter, half, 3, 3, 0),
                    Convolution(half, self.dim, 3, 1, 1),
                ]
            return [
                first,
                Convolution(quarter, half, 3, 2, 1),
                Convolution(half, self.dim, 3, 2, 1),
            ]
        halvings = self.patch.bit_length() - 1
        widths = [
            in_channels,
            *(max(self.dim >> remaining, 16) for remaining in reversed(range(halvings))),
        ]
        down = [Convolution(width, wider, 3, 2, 1) for width, wider in itertools.pairwise(widths)]
        return [*down, Convolution(widths[-1], self.dim, 3, 1, 1)]

    def soft_splits(self) -> list[tuple[int, int, int]]:
        """(kernel, stride, padding) of the T2T tokeniser's three soft splits (PAPER, section 1); none for the others."""
        if self.tokeniser != "t2t":
            return []
        return (
            [(7, 4, 2), (3, 3, 1), (3, 1, 1)]
            if self.patch == 12
            else [(7, 4, 2), (3, 2, 1), (3, 2, 1)]
        )

    def image_size(self, model_size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) at which this branch sees an input of `model_size`: the nearest non-zero multiple of the patch to
        `image_scale` times each side."""
        height, width = (
            max(1, math.floor(self.image_scale * side / self.patch + 0.5)) * self.patch
            for side in model_size
        )
        return height, width

    def grid(self, model_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches for an input of `model_size`."""
        height, width = self.image_size(model_size)
        return height // self.patch, width // self.patch


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossViTConfig:
    """A whole model. `image_size` is (height, width) in pixels; an int is taken as a square.

    branches: one to four, smallest patches first by convention. One branch is a plain ViT and takes fusion `none`.
    stages: multi-scale encoders (the paper's K).
    dynamic_size: take images of any size; position embeddings are resampled to each (`image_size` is their own).

    fusion: the paper's scheme at the end of each encoder: none, all-attention, class-token, pairwise, cross-attention.
    fusion_depth: attention blocks in each fusion (the paper's L; all-attention and cross-attention have them).
    as_released: in cross-attention, blocks after the first see the class token alone, as in the authors' code
        (PAPER, "A fault worth knowing").
    keys_values: how cross-attention is computed, `lazy` or `materialised` (the paper's form; see `CrossAttention`).
    projection_norm, projection_gelu: whether LayerNorm and GELU stand before the linear map in f and g.
    projection_identity: whether f and g between equal widths are the identity.
    projection_shared: in all-attention and pairwise, whether class tokens and patches go through the same f and g.

    drop_path: the highest stochastic-depth rate; it grows linearly over the stages (PAPER, section 1).
    drop, attention_drop: dropout after the projections and the MLP, and on the attention weights (0 in the paper).
    init: `paper` (truncated normal, 0.02) or `xavier` (Xavier-uniform linear layers, He convolutions: for small data).
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

    def __post_init__(self) -> None:
        if _is_int(self.image_size):
            object.__setattr__(self, "image_size", (self.image_size, self.image_size))
        for field in ("image_size", "branches"):
            right = (
                "a positive integer or a pair (height, width) of them"
                if field == "image_size"
                else "a tuple of BranchConfig"
            )
            _require(isinstance(getattr(self, field), tuple | list), self, field, right)
            object.__setattr__(self, field, tuple(getattr(self, field)))
        _require(
            len(self.image_size) == 2
            and all(_is_int(side) and side >= 1 for side in self.image_size),
            self,
            "image_size",
            "a positive integer or a pair (height, width) of them",
        )
        for field in ("num_classes", "in_channels", "stages", "fusion_depth"):
            _require(
                _is_int(getattr(self, field)) and getattr(self, field) >= 1,
                self,
                field,
                "an integer of 1 or more",
            )
        for field in ("drop", "attention_drop", "drop_path"):
            value = getattr(self, field)
            _require(
                _is_number(value) and 0.0 <= value < 1.0,
                self,
                field,
                "a number from 0 up to (not including) 1",
            )
        for switch in dataclasses.fields(self):
            if isinstance(switch.default, bool):
                _require(
                    isinstance(getattr(self, switch.name), bool), self, switch.name, "True or False"
                )
        for field, known in (
            ("init", INITIALISATIONS),
            ("fusion", FUSIONS),
            ("keys_values", KEYS_VALUES),
        ):
            _require(getattr(self, field) in known, self, field, f"one of {', '.join(known)}")
        self._check_branches()

    def _check_branches(self) -> None:
        if not 1 <= len(self.branches) <= MOST_BRANCHES:
            raise ConfigError(
                f"branches has {len(self.branches)} entries: a CrossViT has one to {MOST_BRANCHES}"
            )
        for index, branch in enumerate(self.branches):
            if not isinstance(branch, BranchConfig):
                raise ConfigError(f"branches[{index}] = {branch!r}: should be a BranchConfig")
            if min(self.image_size) < branch.patch:
                raise ConfigError(
                    f"image_size = {self.image_size[0]}x{self.image_size[1]}: a side is shorter than the "
                    f"{branch.patch}-pixel patch of branch {index}; use {branch.patch} or more"
                )
        if len({branch.class_token for branch in self.branches}) > 1:
            given = ", ".join(str(branch.class_token) for branch in self.branches)
            raise ConfigError(
                f"class_token = {given} over the branches: should be the same in every branch"
            )
        if len(self.branches) == 1:
            _require(self.fusion == "none", self, "fusion", "'none' with a single branch")
        if self.fusion_depth > 1:
            deep = ("all-attention", "cross-attention")
            _require(
                self.fusion in deep,
                self,
                "fusion",
                f"{' or '.join(deep)} with fusion_depth={self.fusion_depth}",
            )
        if self.as_released:
            _require(
                self.fusion == "cross-attention",
                self,
                "fusion",
                "'cross-attention' with as_released=True",
            )

    def to_dict(self) -> dict[str, Any]:
        """A plain dict (numbers, strings, lists) from which `from_dict` makes an equal config."""
        record = dataclasses.asdict(self)
        record["image_size"] = list(self.image_size)
        record["branches"] = list(record["branches"])
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> CrossViTConfig:
        """The config of `to_dict`'s record. An unknown or missing field is a ConfigError that names it."""
        if not isinstance(record, Mapping) or not isinstance(
            record.get("branches", ()), tuple | list
        ):
            raise ConfigError(
                "config: should be a dict as to_dict() gives, with a list of branches"
            )
        fields = dict(record)
        fields["branches"] = tuple(
            _build(BranchConfig, branch) for branch in fields.get("branches", ())
        )
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
