"""Fusion: how the branches exchange information at the end of a multi-scale encoder (Figure 3).

Every scheme has one signature: the branches' tokens and their grids in, the branches' tokens out,
all read before any is written (a parallel update). `registry.FUSIONS` has them by name.

Shapes: B batch, n patches, D width, D* the common width; X_b = [c_b ‖ P_b], (B, 1 + n_b, D_b), are
the tokens of branch b. f_b projects to another width, g_b back. A branch without a class token is
all patches: the mean of its patches stands in for c_b, and what would replace c_b is added to
every patch, since the paper does not say where it goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.model.attention import CrossAttention, SelfAttention
from crossvit.model.config import BranchConfig, CrossViTConfig
from crossvit.model.layers import NORM_EPS, DropPath

Grid = tuple[int, int]
T = TypeVar("T")


def summary(tokens: Tensor, has_class_token: bool) -> Tensor:
    """What stands for a branch, its class token or its patches' mean: (B, N, D) -> (B, 1, D)."""
    return tokens[:, :1] if has_class_token else tokens.mean(dim=1, keepdim=True)


def patches_of(tokens: Tensor, has_class_token: bool) -> Tensor:
    """(B, N, D) -> (B, n, D)."""
    return tokens[:, 1:] if has_class_token else tokens


def with_summary(tokens: Tensor, new: Tensor, has_class_token: bool) -> Tensor:
    """`tokens` with `new` (B, 1, D) as class token, or added to every patch if there is none."""
    return torch.cat((new, tokens[:, 1:]), dim=1) if has_class_token else tokens + new


def projection(dim: int, out_dim: int, config: CrossViTConfig) -> nn.Module:
    """f or g: LayerNorm → GELU → Linear as released; `projection_*` of the config leave parts out."""
    if dim == out_dim and config.projection_identity:
        return nn.Identity()
    norm = [nn.LayerNorm(dim, eps=NORM_EPS)] * config.projection_norm
    return nn.Sequential(*norm, *[nn.GELU()] * config.projection_gelu, nn.Linear(dim, out_dim))


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


def token_projections(config: CrossViTConfig, *, back: bool) -> nn.ModuleList:
    """f of every branch, to the widest branch's width D*; or g, `back` from it."""
    common = widest(config).dim
    pairs = [(common, b.dim) if back else (b.dim, common) for b in config.branches]
    has_class_token = config.branches[0].class_token
    return nn.ModuleList(
        TokenProjection(dim, out_dim, config, has_class_token=has_class_token)
        for dim, out_dim in pairs
    )


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
        dim, heads, depth = widest(config).dim, widest(config).heads, config.fusion_depth
        drops = {"drop": config.drop, "attention_drop": config.attention_drop}
        self.project = token_projections(config, back=False)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=NORM_EPS) for _ in range(depth))
        self.attentions = nn.ModuleList(SelfAttention(dim, heads, **drops) for _ in range(depth))
        self.drop_path = DropPath(drop_path)
        self.restore = token_projections(config, back=True)

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        projected = [project(x) for project, x in zip(self.project, tokens, strict=True)]
        joined = torch.cat(projected, dim=1)  # (B, sum of N_b, D*)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            joined = joined + self.drop_path(attention(norm(joined)))
        parts = joined.split([x.shape[1] for x in projected], dim=1)
        return [restore(part) for restore, part in zip(self.restore, parts, strict=True)]


class ClassTokenFusion(nn.Module):
    """Equation 3: the class tokens are added. Z_b = [g_b(Σ_a f_a c_a) ‖ P_b], the sum at width D*."""

    def __init__(self, config: CrossViTConfig, *, drop_path: float) -> None:
        super().__init__()
        common, branches = widest(config), config.branches
        self.has_class_token = common.class_token
        self.project = nn.ModuleList(projection(b.dim, common.dim, config) for b in branches)
        self.restore = nn.ModuleList(projection(common.dim, b.dim, config) for b in branches)

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        pairs = zip(self.project, tokens, strict=True)
        projected = (project(summary(x, self.has_class_token)) for project, x in pairs)
        shared = sum(projected, tokens[0].new_zeros(()))
        return [
            with_summary(x, restore(shared), self.has_class_token)
            for restore, x in zip(self.restore, tokens, strict=True)
        ]


class PairwiseFusion(nn.Module):
    """Equation 4: class tokens are added as in `ClassTokenFusion`, patches where they overlap.

    Z_b patches = g_b(Σ_a f_a P_a). f_a is taken on branch a's own grid, the sum on the widest
    branch's grid, and g_b on branch b's grid; between grids the tokens are interpolated
    bilinearly (the paper does not say how).
    """

    def __init__(self, config: CrossViTConfig, *, drop_path: float) -> None:
        super().__init__()
        self.common = config.branches.index(widest(config))
        self.has_class_token = widest(config).class_token
        self.project = token_projections(config, back=False)
        self.restore = token_projections(config, back=True)

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        common, zero = grids[self.common], tokens[0].new_zeros(())
        projected = [project(x) for project, x in zip(self.project, tokens, strict=True)]
        patches = sum(
            (
                interpolate_grid(patches_of(x, self.has_class_token), grid, common)
                for x, grid in zip(projected, grids, strict=True)
            ),
            zero,
        )
        # the class tokens' sum (B, 1, D*), if there are any
        class_tokens = [sum((x[:, :1] for x in projected), zero)] * self.has_class_token
        return [
            restore(torch.cat((*class_tokens, interpolate_grid(patches, common, grid)), dim=1))
            for restore, grid in zip(self.restore, grids, strict=True)
        ]


class CrossReadBlock(nn.Module):
    """t ← t + CrossAttention(LN[t ‖ P]): t (B, 1, D), P (B, n, D) -> (B, 1, D).

    The residual is in the projected space. There is no feed-forward.
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

    def forward(self, query: Tensor, patches: Tensor) -> Tensor:
        tokens = torch.cat((query, patches), dim=1)  # (B, 1 + n, D)
        return query + self.drop_path(self.attention(self.norm(tokens)))  # type: ignore[no-any-return]


class CrossRead(nn.Module):
    """Equations 5–7 for one branch: its class token reads the other branch's patches.

        t = f(c);  t ← t + CrossAttention(LN[t ‖ P_source]), L times;  Z = [g(t) ‖ P_target]

    target: (B, 1 + n, D), source: (B, 1 + n', D') -> (B, 1 + n, D). Every block sees the source's
    patches; with `as_released` only the first does, and the later ones see t alone.
    """

    def __init__(
        self,
        target: BranchConfig,
        source: BranchConfig,
        config: CrossViTConfig,
        *,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.has_class_token = target.class_token
        self.as_released = config.as_released
        self.project = projection(target.dim, source.dim, config)
        self.blocks = nn.ModuleList(
            CrossReadBlock(source, config, drop_path=drop_path) for _ in range(config.fusion_depth)
        )
        self.restore = projection(source.dim, target.dim, config)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        query = self.project(summary(target, self.has_class_token))  # (B, 1, D')
        patches = patches_of(source, self.has_class_token)
        for block in self.blocks:
            query = block(query, patches)
            if self.as_released:
                patches = patches[:, :0]
        return with_summary(target, self.restore(query), self.has_class_token)


class CrossAttentionFusion(nn.Module):
    """Every branch reads from the next around the ring; of two branches each reads from the other."""

    def __init__(self, config: CrossViTConfig, *, drop_path: float) -> None:
        super().__init__()
        pairs = zip(config.branches, next_around(config.branches), strict=True)
        self.reads = nn.ModuleList(
            CrossRead(target, source, config, drop_path=drop_path) for target, source in pairs
        )

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        triples = zip(self.reads, tokens, next_around(tokens), strict=True)
        return [read(target, source) for read, target, source in triples]


def interpolate_grid(patches: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Patches of one grid on another, bilinearly: (B, n, D) on `grid` -> (B, m, D) on `size`.

    The same grid is the identity.
    """
    if grid == size:
        return patches
    image = patches.transpose(1, 2).unflatten(2, grid)  # (B, D, rows, columns)
    image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    return image.flatten(2).transpose(1, 2)


def widest(config: CrossViTConfig) -> BranchConfig:
    """The branch whose width and grid are the common ones; of equally wide ones the last (L)."""
    return max(reversed(config.branches), key=lambda branch: branch.dim)


def next_around(ring: Sequence[T]) -> list[T]:
    """Of each entry the one after it, of the last the first."""
    return [*ring[1:], *ring[:1]]
