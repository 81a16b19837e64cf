"""Self-attention computed by the fastest way that is there: a native kernel, parts of a batch, torch.

Shapes: B batch, N tokens, D width, H heads, K = D / H width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crossvit.fast.chunked_attention import chunked_attention
from crossvit.fast.eligibility import (
    fused_form,
    products_beat_fused,
    why_no_attention_kernel,
    why_not,
)
from crossvit.fast.native.build import kernels_here
from crossvit.fast.recompute import gradients_with_graph
from crossvit.model.attention import SelfAttention, attention, attention_weights, split_heads


@fused_form(SelfAttention)
class FusedSelfAttention(SelfAttention):
    """`SelfAttention` whose softmax(q kᵀ / √K) v is the fastest known here: (B, N, D) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or why_not(self, x):
            return super().forward(x)
        qkv = self.qkv(x)  # (B, N, 3 D)
        dropout = self.attention_drop if self.training else 0.0
        return self.drop(self.out(fast_attention(qkv, self.num_heads, dropout)))  # type: ignore[no-any-return]


def fast_attention(qkv: Tensor, num_heads: int, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √K) v of every head, side by side.

    Args:
        qkv: (B, N, 3 D), queries ‖ keys ‖ values, each of them head after head.
        num_heads: H.
        dropout: Chance of dropping an attention weight, 0 to 1.

    Returns:
        (B, N, D), in the dtype of `qkv`.
    """
    if dropout == 0 and why_no_attention_kernel(qkv, num_heads) is None:
        return native_attention(qkv, num_heads)
    if dropout == 0 and products_beat_fused(qkv):
        with torch.autocast(qkv.device.type, enabled=False):  # which would widen the softmax
            return chunked_attention(qkv, num_heads)
    query, key, value = split_heads(qkv, num_heads)  # (B, H, N, K) each
    return attention_by_shape(query, key, value, dropout).transpose(1, 2).flatten(2)


def attention_by_shape(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √K) v as two products where they beat torch's fused kernel, else by it.

    Args:
        query, key, value: (B, H, N, K), one floating dtype.
        dropout: Chance of dropping an attention weight, 0 to 1.

    Returns:
        (B, H, N, K) in the dtype of the query.
    """
    if not products_beat_fused(query):
        return attention(query, key, value, dropout=dropout)
    with torch.autocast(query.device.type, enabled=False):  # which would widen the softmax
        return F.dropout(attention_weights(query, key), dropout) @ value


def native_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q kᵀ / √K) v by the native kernel: (B, N, 3 D) -> (B, N, D), in the dtype of `qkv`.

    The backward pass computes the weights again. `why_no_attention_kernel` says where it is there.
    """
    return _Attention.apply(qkv, num_heads)  # type: ignore[no-any-return]


def plain_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """The same in torch's own products, differentiable any number of times."""
    query, key, value = split_heads(qkv, num_heads)
    return (attention_weights(query, key) @ value).transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    """attention_backward.cpp has the equations."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> Tensor:
        ctx.num_heads, ctx.scale = num_heads, math.sqrt(3 * num_heads / qkv.shape[-1])
        log_sums = qkv.new_empty(qkv.shape[0], num_heads, qkv.shape[1], dtype=torch.float32)
        context = kernels_here().attention(qkv, num_heads, scale=ctx.scale, log_sums=log_sums)
        ctx.save_for_backward(qkv, context, log_sums)
        return context

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor) -> tuple[Tensor | None, ...]:
        qkv, context, log_sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *gradients_with_graph(
                lambda x: plain_attention(x, ctx.num_heads), (qkv,), grad_context
            ), None
        grad_qkv = kernels_here().attention_backward(
            qkv, context, grad_context, log_sums, scale=ctx.scale
        )
        return grad_qkv, None
