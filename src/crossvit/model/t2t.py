"""The Tokens-to-Token tokeniser (Yuan et al., ICCV 2021), the paper's "+T2T" row.

Three soft splits (overlapping unfolds); after each of the first two the tokens attend to each
other at width 64 and are laid out as an image again; the third is projected to the branch's width.

Shapes: B batch, C channels, H x W pixels, n tokens of the current grid, E = 64 the width between
splits, D the branch's width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.model.attention import attention
from crossvit.model.config import T2T_DIM, BranchConfig
from crossvit.model.layers import NORM_EPS


class TokenTransformer(nn.Module):
    """One head, MLP ratio 1 (docs/paper.md, Architecture), to another width than its input's.

        v = W_v LN x;  y = v + W_o softmax(q kᵀ/√E) v;  z = y + MLP(LN y).   (B, n, C') -> (B, n, E)

    The residual is the values, since the input is wider. Linear layers have biases, as everywhere
    in this model.
    """

    def __init__(self, dim: int, out_dim: int = T2T_DIM) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.qkv = nn.Linear(dim, 3 * out_dim)
        self.out = nn.Linear(out_dim, out_dim)
        self.mlp_norm = nn.LayerNorm(out_dim, eps=NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(out_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)  # (B, 1, n, E)
        x = (value + self.out(attention(query, key, value))).squeeze(1)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class TokensToToken(nn.Module):
    """(B, C, H, W) -> (B, D, rows, columns), as the other stems."""

    def __init__(self, branch: BranchConfig, in_channels: int) -> None:
        super().__init__()
        self.splits = branch.soft_splits()
        first, *later = (kernel**2 for kernel, _, _ in self.splits)
        widths = [in_channels * first, *(T2T_DIM * window for window in later)]
        self.transformers = nn.ModuleList(TokenTransformer(width) for width in widths[:-1])
        self.project = nn.Linear(widths[-1], branch.dim)

    def forward(self, images: Tensor) -> Tensor:
        layers = [*self.transformers, self.project]
        for (kernel, stride, padding), layer in zip(self.splits, layers, strict=True):
            grid = tuple((side + 2 * padding - kernel) // stride + 1 for side in images.shape[-2:])
            windows = F.unfold(images, kernel, stride=stride, padding=padding).transpose(1, 2)
            tokens = layer(windows)  # (B, n, C k²) -> (B, n, E or D)
            images = tokens.transpose(1, 2).unflatten(2, torch.Size(grid))  # (B, ., rows, columns)
        return images
