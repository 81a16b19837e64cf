"""Products and kernels that the inference form on a CPU is made of: oneDNN's linear layers, attention, the branch resize.

Shapes: B batch, N tokens, D width, H heads, K = D / H width of a head; R rows, all tokens of a batch.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.fast.native.bindings import NativeKernels

RESIZE_BLOCK = 32  # outputs a product of the resize makes at once; their taps lie in about as many inputs and four more


class PackedLinear(nn.Module):
    """x W ᵀ + b through oneDNN with W laid out for it once: (..., I) -> (..., O), in the dtype of `weight`.

    On AMD processors MKL, which `F.linear` takes in fp32, is slower; and an activation or a residual is computed while the
    result is still in registers. Without oneDNN, and in bf16 without AVX-512 or AVX-NE-CONVERT, it is `F.linear`. No gradients.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, rows: int) -> None:
        """rows: how many rows a call typically has; oneDNN chooses the layout by them."""
        super().__init__()
        self.packs = _has_onednn(weight.dtype)
        dense = weight.detach().clone(memory_format=torch.contiguous_format)
        # oneDNN's layout is opaque: it can be neither saved nor copied, so it is no buffer.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(dense, rows) if self.packs else dense
        self.bias = bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        if not self.packs:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]

    def gelu(self, x: Tensor) -> Tensor:
        """GELU(x W ᵀ + b)."""
        if not self.packs:
            return F.gelu(F.linear(x, self.weight, self.bias))
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "none")  # type: ignore[no-any-return]

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + x W ᵀ + b."""
        if not self.packs:
            return F.linear(x, self.weight, self.bias).add_(residual)
        pointwise = torch.ops.mkldnn._linear_pointwise.binary
        return pointwise(x, residual, self.weight, self.bias, "add")  # type: ignore[no-any-return]


@lru_cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN's linear layer, which torch keeps for its compiler, is there and works in `dtype` on this processor."""
    eye = torch.eye(16, dtype=dtype)
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(eye, 16)
        return bool(
            torch.ops.mkldnn._linear_pointwise(eye, weight, None, "none", [], "").equal(eye)
        )
    except (AttributeError, RuntimeError):
        return False


def scaled_qkv(weight: Tensor, bias: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """A block's (3 D, D) projection and bias with 1 / √K in its query, so that no score is scaled."""
    dim = weight.shape[1]
    scale = torch.ones(3 * dim, dtype=weight.dtype, device=weight.device)
    scale[:dim] = math.sqrt(num_heads / dim)
    return weight * scale[:, None], bias * scale


def attention_of(qkv: Tensor, num_heads: int, kernels: NativeKernels | None = None) -> Tensor:
    """softmax(q kᵀ) v with the scale in q: (B, N, 3 D) -> (B, N, D), by our own kernel where it is there and takes them.

    Otherwise in fp32 torch's fused kernel; in bf16 two products and a softmax, which beat it two- to threefold for few enough
    images that the scores stay in the cache, with the heads copied together first since oneDNN's products want them dense.
    """
    if kernels is not None and kernels.takes(qkv, num_heads):
        return kernels.attention(qkv, num_heads)
    heads = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, N, K)
    if qkv.dtype == torch.float32:
        query, key, value = heads.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    else:
        query, key, value = heads.contiguous().unbind(0)
        mixed = (query @ key.transpose(-2, -1)).softmax(dim=-1) @ value
    return mixed.transpose(1, 2).flatten(2)  # (B, N, D)


class Resize(nn.Module):
    """torch's bicubic resize without antialiasing as products along each side: (B, C, H, W) -> (B, C, *size), fp32.

    out = R_h image R_wᵀ, and R is banded (four taps a row), so it is cut into blocks of rows with the inputs they read.
    torch's own kernel on a CPU computes all sixteen taps of every pixel.
    """

    def __init__(self, given: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self.rows = _bands(given[0], size[0])
        self.columns = _bands(given[1], size[1])

    def forward(self, images: Tensor) -> Tensor:
        images = torch.cat(
            [band @ images[..., start:stop, :] for start, stop, band in self.rows], dim=-2
        )
        return torch.cat(
            [images[..., start:stop] @ band.T for start, stop, band in self.columns], dim=-1
        )


def _bands(given: int, size: int) -> list[tuple[int, int, Tensor]]:
    """(first input, end of inputs, (outputs, inputs) weights) of each block of outputs."""
    eye = torch.eye(given)[None, None]
    matrix = F.interpolate(eye, size=(size, given), mode="bicubic", align_corners=False)[
        0, 0
    ]  # torch's own weights
    bands = []
    for block in matrix.split(RESIZE_BLOCK):
        used = block.any(dim=0).nonzero().flatten()
        start, stop = int(used[0]), int(used[-1]) + 1
        bands.append((start, stop, block[:, start:stop].contiguous()))
    return bands
