"""Attention by our kernel, with its gradient.

Shapes: B batch, N tokens, D width, H heads, K = D / H width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossvit.kernels.native import Native, native


def takes_attention(qkv: Tensor, num_heads: int) -> bool:
    """Whether `attention` computes it: bf16, or fp32 with a backward pass (without one torch's fused kernel keeps its place),
    and nothing that traces or transforms is at work."""
    wanted = qkv.dtype == torch.bfloat16 or (torch.is_grad_enabled() and qkv.requires_grad)
    return wanted and is_eager(qkv) and (kernels := native()) is not None and kernels.takes(qkv, num_heads)


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q kᵀ / √K) v of every head, side by side: (B, N, 3 D) -> (B, N, D), in the dtype of `qkv`.

    The last axis of `qkv` is [queries ‖ keys ‖ values], each of them head after head. The backward pass computes the weights
    again. Differentiable once.
    """
    return _Attention.apply(qkv, num_heads)  # type: ignore[no-any-return]


def is_eager(x: Tensor) -> bool:
    """Whether x is a plain tensor on the CPU and what is done with it is done at once: not compiled, exported, transformed or
    counted (as FLOPs are)."""
    if type(x) is not Tensor or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    inner = torch._C
    return not (inner._is_tracing() or inner._are_functorch_transforms_active() or inner._len_torch_dispatch_stack())


def kernels_here() -> Native:
    """The kernels, for who has asked whether they are there."""
    kernels = native()
    assert kernels is not None
    return kernels


class _Attention(torch.autograd.Function):
    """attention_gradient.cpp has the equations."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> Tensor:
        ctx.scale = math.sqrt(3 * num_heads / qkv.shape[-1])
        log_sums = torch.empty(qkv.shape[0], num_heads, qkv.shape[1])
        mixed = kernels_here().attention(qkv, num_heads, scale=ctx.scale, log_sums=log_sums)
        ctx.save_for_backward(qkv, mixed, log_sums)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        qkv, mixed, log_sums = ctx.saved_tensors
        return kernels_here().attention_gradient(qkv, mixed, gradient, log_sums, scale=ctx.scale), None
