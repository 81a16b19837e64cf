"""The parts of the inference form that native kernels compute.

Tokens are in fp32, what goes into products in fp32 or bf16.

Shapes: B batch, C channels, H x W pixels, N tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossvit.fast.eligibility import why_no_patch_product
from crossvit.fast.native.bindings import LANES, NAMES, Linear, NativeKernels, Norm
from crossvit.fast.native.build import native
from crossvit.fast.packed_linear import scaled_qkv
from crossvit.fast.patch_embed import fast_resize
from crossvit.model.crossvit import CrossViT
from crossvit.model.layers import EncoderBlock
from crossvit.model.tokens import Tokens, resample_positions


def kernels_for(model: CrossViT, dtype: torch.dtype) -> NativeKernels | None:
    """The native kernels, where they compute all of its blocks: widths that are whole registers."""
    if (kernels := native()) is None or f"mlp_{NAMES[dtype]}" not in kernels.functions:
        return None
    widths = (
        size
        for branch in model.config.branches
        for size in (branch.dim, branch.dim // branch.heads, branch.mlp_dim)
    )
    return kernels if all(width % LANES == 0 for width in widths) else None


def why_no_kernel_stem(embed: Tokens, dtype: torch.dtype, kernels: NativeKernels) -> str | None:
    """Why `KernelTokens` does not compute the stem of `embed`."""
    if f"patch_tokens_{NAMES[dtype]}" not in kernels.functions:
        return f"no kernel in {NAMES[dtype]}"
    return why_no_patch_product(embed.patches)


class KernelTokens(nn.Module):
    """`Tokens` whose stem is a product with the patches: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, embed: Tokens, dtype: torch.dtype, kernels: NativeKernels) -> None:
        super().__init__()
        self.branch, self.grid, self.kernels = embed.branch, embed.grid, kernels
        stem = embed.patches
        assert isinstance(stem, nn.Conv2d)
        self.stem = _linear(kernels, stem.weight.flatten(1), stem.bias, dtype)
        self.class_token = (
            None if embed.class_token is None else embed.class_token.detach().float().clone()
        )
        self.positions = embed.positions.detach().float().clone()

    def forward(self, images: Tensor) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        view = fast_resize(images, self.branch.image_size(size)).contiguous()
        positions = resample_positions(self.positions, self.grid, self.branch.grid(size))
        positions = positions.contiguous()
        first = int(self.class_token is not None)
        tokens, _ = self.kernels.patch_tokens(
            view, self.stem, self.branch.patch, positions, first=first, keeps=False
        )
        if self.class_token is not None:
            tokens[:, :1] = self.class_token + positions[:, :1]
        return tokens


class KernelBlock(nn.Module):
    """`EncoderBlock`: (B, N, D) -> the same, in place."""

    def __init__(self, block: EncoderBlock, dtype: torch.dtype, kernels: NativeKernels) -> None:
        super().__init__()
        attention, self.kernels = block.attention, kernels
        self.num_heads = attention.num_heads
        self.norm = _norm(block.attention_norm)
        weight, bias = scaled_qkv(attention.qkv.weight, attention.qkv.bias, self.num_heads)
        self.qkv = _linear(kernels, weight, bias, dtype)
        self.out = _linear(kernels, *_parameters(attention.out), dtype)
        up, down = (_linear(kernels, *_parameters(block.mlp[index]), dtype) for index in (0, 3))
        self.mlp = _norm(block.mlp_norm), up, down

    def forward(self, x: Tensor) -> Tensor:
        qkv, _ = self.kernels.norm_linear(x, self.norm, self.qkv, keeps=False)
        context = self.kernels.attention(qkv, self.num_heads)
        self.kernels.linear_residual(context, self.out, x, None, in_place=True)
        self.kernels.mlp(x, self.mlp, None, keeps=False, in_place=True)
        return x


def _linear(
    kernels: NativeKernels, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Linear:
    assert bias is not None
    dense = weight.detach().float().contiguous()
    return Linear(kernels.pack(dense, dtype, transposed=True), bias.detach().float().clone())


def _parameters(linear: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(linear, nn.Linear)
    return linear.weight, linear.bias


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach().float().clone(), norm.bias.detach().float().clone(), norm.eps)
