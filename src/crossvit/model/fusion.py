"""Fusion: how the branches exchange information at the end of a multi-scale encoder (the paper's Figure 3).

Every scheme has one signature: the branches' tokens and their grids in, the branches' tokens out, all read before any is
written (a parallel update). `registry.FUSIONS` has them by name.

Shapes: B batch, n patches, D width, D* the common width; X_b = [c_b ‖ P_b], (B, 1 + n_b, D_b), are the tokens of branch b.
f_b projects to another width, g_b back. A branch without a class token is all patches: the mean of its patches stands
in for c_b, and what would replace c_b is added to every patch, since the paper does not say where it goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.model.attention import CrossAttention, SelfAttention
from crossvit.model.config import BranchConfig, CrossViTConfig
from crossvit.model.drop_path import DropPath

NORM_EPS = 1e-6  # the released models' LayerNorm (PAPER, section 1)

Grid = tuple[int, int]
T = TypeVar("T")


def summary(tokens: Tensor, has_class_token: bool) -> Tensor:
    """What stands for a whole branch: its class token, or the mean of its patches. (B, N, D) -> (B, 1, D)."""
    return tokens[:, :1] if has_class_token else tokens.mean(dim=1, keepdim=True)


def patches_of(tokens: Tensor, has_class_token: bool) -> Tensor:
    """(B, N, D) -> (B, n, D)."""
    return tokens[:, 1:] if has_class_token else tokens


def with_summary(tokens: Tensor, new: Tensor, has_class_token: bool) -> Tensor:
    """`tokens` with the class token replaced by `new` (B, 1, D), or with `new` added to every patch if there is none."""
    return torch.cat((new, tokens[:, 1:]), dim=1) if has_class_token else tokens + new


def projection(dim: int, out_dim: int, config: CrossViTConfig) -> nn.Module:
    """f or g: LayerNorm → GELU → Linear as released; `projection_*` of the config leave parts out."""
    if dim == out_dim and config.projection_identity:
        return nn.Identity()
    before = [nn.LayerNorm(dim, eps=NORM_EPS)] * config.projection_norm + [
        nn.GELU()
    ] * config.projection_gelu
    return nn.Sequential(*before, nn.Linear(dim, out_dim))


class TokenProjection(nn.Module):
    """f or g over a branch's class token and its patches: the same for both, or one for each."""

    def __init__(
        self, dim: int, out_dim: int, config: CrossViTConfig, *, has_class_token: bool
    ) -> None:
        super().__init__()
        self.patches = projection(dim, out_dim, config)
        separate = has_class_token and not config.projection_shared
        self.class_token = projection(dim, out_dim, config) if separate else None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.class_token is None:
            return self.patches(tokens)  # type: ignore[no-any-return]
        return torch.cat((self.class_token(tokens[:, :1]), self.patches(tokens[:, 1:])), dim=1)


class NoFusion(nn.Module):
    """The branches go on side by side; only their logits meet."""

    def __init__(self, config: CrossViTConfig, *, drop_path: float) -> None:
        super().__init__()

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        return list(tokens)


class AllAttentionFusion(nn.Module):
    """Equation 2: all tokens of all branches attend to each other, at the widest branch's width D*.

    Y = [f_1 X_1 ‖ f_2 X_2 ‖ ...];  O = Y + MSA(LN Y), L times;  Z_b = g_b O_b.
    Quadratic in the sum of the branches' tokens. No feed-forward.
    """

    def __init__(self, config: CrossViTConfig, *, drop_path: float) -> None:
        super().__init__()
        widest = _widest(config)
        self.project = nn.ModuleList(
            TokenProjection(branch.dim, widest.dim, config, has_class_token=branch.class_token)
            for branch in config.branches
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(widest.dim, eps=NORM_EPS) for _ in range(config.fusion_depth)
        )
        self.attentions = nn.ModuleList(
            SelfAttention(
                widest.dim, widest.heads, drop=config.drop, attention_drop=config.attention_drop
            )
            for _ in range(config.fusion_depth)
        )
        self.drop_path = DropPath(drop_path)
        self.restore = nn.ModuleList(
            TokenProjection(widest.dim, branch.dim, config, has_class_token=branch.class_token)
            for branch in config.branches
        )

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        projected = [project(own) for project, own in zip(self.project, tokens, strict=True)]
        joined = torch.cat(projected, dim=1)  # (B, sum of N_b, D*)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            joined = joined + self.drop_path(attention(norm(joined)))
        parts = joined.split([own.shape[1] for own in projected], dim=1)
        return [restore(part) for restore, part in zip(self.restore, parts, strict=True)]


class ClassTokenFusion(nn.Module):
    """Equation 3: the class tokens are added. Z_b = [g_b(Σ_a f_a c_a) ‖ P_b], the sum at the widest branch's width."""

    def __init__(self, config: CrossViTConfig, *, drop_path: float) -> None:
        super().__init__()
        widest = _widest(config)
        self.has_class_token = widest.class_token
        self.project = nn.ModuleList(
            projection(branch.dim, widest.dim, config) for branch in config.branches
        )
        self.restore = nn.ModuleList(
            projection(widest.dim, branch.dim, config) for branch in config.branches
        )

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        pairs = zip(self.project, tokens, strict=True)
        shared = sum(
            (project(summary(own, self.has_class_token)) for project, own in pairs),
            tokens[0].new_zeros(()),
        )
        return [
            with_summary(own, restore(shared), self.has_class_token)
            for restore, own in zip(self.restore, tokens, strict=True)
        ]


class PairwiseFusion(nn.Module):
    """Equation 4: class tokens are added as in `ClassTokenFusion`, and patches where they lie over each other.

    Z_b patches = g_b(Σ_a f_a P_a). f_a is taken on branch a's own grid, the sum on the widest branch's grid, and g_b on
    branch b's grid; between grids the tokens are interpolated bilinearly (the paper does not say how).
    """

    def __init__(self, config: CrossViTConfig, *, drop_path: float) -> None:
        super().__init__()
        widest = _widest(config)
        self.common = config.branches.index(widest)
        self.has_class_token = widest.class_token
        self.project = nn.ModuleList(
            TokenProjection(branch.dim, widest.dim, config, has_class_token=branch.class_token)
            for branch in config.branches
        )
        self.restore = nn.ModuleList(
            TokenProjection(widest.dim, branch.dim, config, has_class_token=branch.class_token)
            for branch in config.branches
        )

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        common = grids[self.common]
        projected = [
            project(own) for project, own in zip(self.project, tokens, strict=True)
        ]  # (B, N_b, D*)
        zero = tokens[0].new_zeros(())
        patches = sum(
            (
                interpolate_grid(patches_of(own, self.has_class_token), grid, common)
                for own, grid in zip(projected, grids, strict=True)
            ),
            zero,
        )
        class_tokens = [
            sum((own[:, :1] for own in projected), zero)
        ] * self.has_class_token  # (B, 1, D*), if there are any
        return [
            restore(torch.cat((*class_tokens, interpolate_grid(patches, common, grid)), dim=1))
            for restore, grid in zip(self.restore, grids, strict=True)
        ]


class CrossReadBlock(nn.Module):
    """t ← t + CrossAttention(LN[t ‖ P]): (B, 1, D), (B, 1 + n, D) -> (B, 1, D). The residual is in the projected space.

    P comes with a row before it that t takes the place of, so that nothing is joined (`make bench-fusion`).
    """

    def __init__(self, branch: BranchConfig, config: CrossViTConfig, *, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(branch.dim, eps=NORM_EPS)
        self.attention = CrossAttention(
            branch.dim,
            branch.heads,
            drop=config.drop,
            attention_drop=config.attention_drop,
            keys_values=config.keys_values,
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, query: Tensor, other: Tensor) -> Tensor:
        first, attention = self.norm(query), self.attention
        if isinstance(attention, CrossAttention) and attention.folds(first, other, self.norm):
            read = attention.of_normalised(first, other, self.norm)
        else:
            joined = self.norm(other)
            joined[:, :1] = first
            read = attention(joined)
        return query + self.drop_path(read)  # type: ignore[no-any-return]


class CrossRead(nn.Module):
    """Equations 5–7 for one branch: its class token reads the other branch's patches.

        t = f(c_own);  t ← t + CrossAttention(LN[t ‖ P_other]), L times;  Z = [g(t) ‖ P_own]

    own: (B, 1 + n_own, D_own), other: (B, 1 + n_other, D_other) -> (B, 1 + n_own, D_own). There is no feed-forward. Every
    block sees the other branch's patches; with `as_released` only the first does, and the later ones see t alone.
    """

    def __init__(
        self, own: BranchConfig, other: BranchConfig, config: CrossViTConfig, *, drop_path: float
    ) -> None:
        super().__init__()
        self.has_class_token = own.class_token
        self.as_released = config.as_released
        self.project = projection(own.dim, other.dim, config)
        self.blocks = nn.ModuleList(
            CrossReadBlock(other, config, drop_path=drop_path) for _ in range(config.fusion_depth)
        )
        self.restore = projection(other.dim, own.dim, config)

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        if not self.has_class_token:
            return own + self.read(summary(own, has_class_token=False), other)
        first, patches = own.split(
            [1, own.shape[1] - 1], dim=1
        )  # whose gradient is made in one pass; that of two slices in five
        return torch.cat((self.read(first, other), patches), dim=1)

    def read(self, query: Tensor, other: Tensor) -> Tensor:
        """g(t), what the class token c_own becomes: (B, 1, D_own) -> the same."""
        query = self.project(query)  # (B, 1, D_other)
        if not self.has_class_token:
            other = torch.cat((query, other), dim=1)
        for block in self.blocks:
            query = block(query, other)
            if self.as_released:
                other = other[:, :1]
        return self.restore(query)  # type: ignore[no-any-return]


class CrossAttentionFusion(nn.Module):
    """Every branch reads from the next one around the ring; with two branches each reads from the other."""

    def __init__(self, config: CrossViTConfig, *, drop_path: float) -> None:
        super().__init__()
        pairs = zip(config.branches, _next_around(config.branches), strict=True)
        self.reads = nn.ModuleList(
            CrossRead(own, other, config, drop_path=drop_path) for own, other in pairs
        )

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        return [
            read(own, other)
            for read, own, other in zip(self.reads, tokens, _next_around(tokens), strict=True)
        ]


def interpolate_grid(patches: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Patches on one grid to another, bilinearly: (B, n, D) on `grid` -> (B, m, D) on `size`; the same grid is the identity."""
    if grid == size:
        return patches
    image = patches.transpose(1, 2).unflatten(2, grid)  # (B, D, rows, columns)
    return (
        F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        .flatten(2)
        .transpose(1, 2)
    )


def _widest(config: CrossViTConfig) -> BranchConfig:
    """The branch whose width and grid are the common ones; the last of several equally wide (the paper's L)."""
    return max(reversed(config.branches), key=lambda branch: branch.dim)


def _next_around(ring: Sequence[T]) -> list[T]:
    return [*ring[1:], *ring[:1]]
