"""Cross-attention without keys and values, by torch or by a native kernel, and the read around it.

There is one query, so keys and values never need to be built. With x = LN[t ‖ P], q = x_0 W_q:

    q·(x_j W_k + b_k) = (q W_kᵀ)·x_j + q·b_k,    Σ p_j (x_j W_v + b_v) = (Σ p_j x_j) W_v + (Σ p_j) b_v,

which takes 2·H·N·D multiply–adds in place of 2·N·D². The heads' probes q W_kᵀ are so many queries
over the same keys and values x. q·b_k is the same for every j and cancels in the softmax, so b_k
has a gradient of zero; Σ p_j is 1 but under attention dropout.

Shapes: B batch, N = 1 + n tokens, D width, H heads with a probe each, K = D / H width of a head.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.fast.eligibility import (
    fused_form,
    products_beat_fused,
    why_no_cross_kernel,
    why_no_norm_fold,
    why_not,
    why_not_exact,
)
from crossvit.fast.native.bindings import FusedNorm
from crossvit.fast.native.build import kernels_here
from crossvit.fast.recompute import gradients_with_graph
from crossvit.model.attention import CrossAttention, chosen_kernel
from crossvit.model.fusion import CrossRead, CrossReadBlock, summary


@fused_form(CrossAttention)
class FusedCrossAttention(CrossAttention):
    """`CrossAttention` that builds neither keys nor values: (B, N, D) -> (B, 1, D)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or why_not(self, x):
            return super().forward(x)
        return lazy_cross_attention(self, x)


class LazyCrossAttention(CrossAttention):
    """The same without conditions, for a form: whoever puts it in a model's copy has asked them."""

    def forward(self, x: Tensor) -> Tensor:
        return lazy_cross_attention(self, x)


def lazy_cross_attention(module: CrossAttention, x: Tensor) -> Tensor:
    """Equation 6 by the parameters of `module`, without keys and values.

    Args:
        module: With `key` and `value` as built; its listener is given the weights (B, H, 1, N).
        x: The normalised tokens (B, N, D), the query's first.

    Returns:
        (B, 1, D).
    """
    context = _context(module, x)  # (B, D)
    return module.drop(module.out(context.unsqueeze(1)))  # type: ignore[no-any-return]


def normalised_cross_attention(
    module: CrossAttention, query: Tensor, x: Tensor, norm: nn.LayerNorm
) -> Tensor:
    """`lazy_cross_attention` of [query ‖ LN(x_1), LN(x_2), ...] by a kernel, none of which is made.

    query: (B, 1, D), x: (B, N, D) -> (B, 1, D).
    """
    fold = FusedNorm(query[:, 0], norm.weight, norm.bias, norm.eps)
    tokens = read_normalised(x, scaled_probes(module, query[:, 0]), fold)
    return module.drop(module.out(_values(module, tokens).unsqueeze(1)))  # type: ignore[no-any-return]


def _context(module: CrossAttention, x: Tensor) -> Tensor:
    has_dropout = module.training and module.attention_drop.p > 0
    needs_weights = has_dropout or module.listener is not None
    if not needs_weights and why_no_cross_kernel(x) is None:
        return _values(module, read(x, scaled_probes(module, x[:, 0])))
    device = x.device.type
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        # which would cast it at each of its uses, but never doubles
        x = x.to(torch.get_autocast_dtype(device))
    kernel = chosen_kernel()
    if not needs_weights and (
        kernel == "fused" or (kernel == "auto" and not products_beat_fused(x))
    ):
        probes, x = scaled_probes(module, x[:, 0]).unsqueeze(1), x.unsqueeze(1)  # a head, H queries
        tokens = F.scaled_dot_product_attention(probes, x, x, scale=1.0).squeeze(1)
        return _values(module, tokens)
    weights = (scaled_probes(module, x[:, 0]) @ x.transpose(1, 2)).softmax(dim=-1)  # (B, H, N)
    if module.listener is not None:
        heard = weights.unsqueeze(2)
        module.listener(heard)
        weights = heard.squeeze(2)  # so that what was heard is on the way to the logits
    weights = module.attention_drop(weights)
    # Σ p_j is one, but its gradient is not zero: a listener is given that of the paper's form
    total = weights.sum(dim=-1, keepdim=True) if needs_weights else None
    return _values(module, weights @ x, total)


def scaled_probes(module: CrossAttention, query: Tensor) -> Tensor:
    """q W_kᵀ / √K of each head: the normalised query (B, D) -> (B, H, D)."""
    heads = (module.num_heads, -1)
    by_head = module.query(query).unflatten(-1, heads).transpose(0, 1)  # (H, B, K)
    probes = (by_head @ module.key.weight.unflatten(0, heads)).transpose(0, 1)
    return probes / math.sqrt(by_head.shape[-1])  # type: ignore[no-any-return]


def _values(module: CrossAttention, tokens: Tensor, total: Tensor | None = None) -> Tensor:
    """Each head's mixture of tokens times its W_v, and b_v: (B, H, D) -> (B, D).

    Args:
        module: Whose W_v and b_v.
        tokens: Σ p_j x_j.
        total: Σ p_j (B, H, 1); 1 where it is not given.
    """
    heads = (module.num_heads, -1)
    bias: Tensor = module.value.bias
    if torch.is_grad_enabled():
        # so that b_k has its gradient, which distributed training insists on
        bias = bias + 0 * module.key.bias
    if total is not None:
        bias = (total * bias.unflatten(0, heads)).flatten(1)
    tokens = tokens.to(module.value.weight.dtype)  # the native kernel gives fp32
    weight = module.value.weight.unflatten(0, heads).transpose(1, 2)
    value = tokens.transpose(0, 1) @ weight  # (H, B, K)
    return value.transpose(0, 1).flatten(1) + bias  # type: ignore[no-any-return]


# --------------------------------------------------------------- the read around it


@fused_form(CrossRead)
class FusedCrossRead(CrossRead):
    """`CrossRead` that joins nothing: the query takes the place of the source's class token."""

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or why_not(self, target):
            return super().forward(target, source)
        if not self.has_class_token:
            new = cross_read(self, summary(target, has_class_token=False), source)
            return target + new
        # `split`, whose gradient is made in one pass; that of two slices in five
        class_token, patches = target.split([1, target.shape[1] - 1], dim=1)
        return torch.cat((cross_read(self, class_token, source), patches), dim=1)


def cross_read(module: CrossRead, query: Tensor, source: Tensor) -> Tensor:
    """g(t), what the class token of equations 5–7 becomes.

    Args:
        module: With its blocks as built.
        query: The class token (B, 1, D), before f.
        source: The other branch's tokens (B, N, D').

    Returns:
        (B, 1, D).
    """
    query = module.project(query)  # (B, 1, D')
    if not module.has_class_token:
        source = torch.cat((query, source), dim=1)
    for block in module.blocks:
        assert isinstance(block, CrossReadBlock)
        query = query + block.drop_path(_read_by_block(block, query, source))
        if module.as_released:
            source = source[:, :1]
    return module.restore(query)  # type: ignore[no-any-return]


def _read_by_block(block: CrossReadBlock, query: Tensor, source: Tensor) -> Tensor:
    normalised, attention = block.norm(query), block.attention
    if _folds(attention, normalised, source, block.norm):
        return normalised_cross_attention(attention, normalised, source, block.norm)
    tokens = block.norm(source)
    tokens[:, :1] = normalised  # where the source's class token was
    return attention(tokens)  # type: ignore[no-any-return]


def _folds(attention: nn.Module, query: Tensor, source: Tensor, norm: nn.LayerNorm) -> bool:
    """Whether the native kernel takes the LayerNorm of `source` too."""
    if why_no_cross_kernel(source) is not None or why_no_norm_fold(norm, query, source) is not None:
        return False
    if not isinstance(attention, CrossAttention) or attention.listener is not None:
        return False
    if attention.keys_values != "lazy" or (attention.training and attention.attention_drop.p > 0):
        return False
    return isinstance(attention, LazyCrossAttention) or (
        why_not_exact(attention, CrossAttention) is None and why_not(attention, source) is None
    )


# ------------------------------------------------------------------------- the kernel


def read(x: Tensor, probes: Tensor) -> Tensor:
    """Σ_j softmax_j(probe · x_j) x_j of each probe: (B, N, D), (B, H, D) -> (B, H, D) fp32."""
    return _Read.apply(x, probes, 0.0)  # type: ignore[no-any-return]


def read_normalised(x: Tensor, probes: Tensor, fold: FusedNorm) -> Tensor:
    """`read` of [first ‖ LayerNorm of x without its first token], none of which is made.

    x: (B, N, D), probes: (B, H, D), fold.first: (B, D) -> (B, H, D) fp32.
    """
    return _Read.apply(x, probes, fold.eps, fold.first, fold.weight, fold.bias)  # type: ignore[no-any-return]


def _plain_read(eps: float, x: Tensor, probes: Tensor, *folded: Tensor) -> Tensor:
    """`read` in torch's own products, differentiable any number of times."""
    if folded:
        first, weight, bias = folded
        rest = F.layer_norm(x[:, 1:], x.shape[-1:], weight, bias, eps)
        x = torch.cat((first.unsqueeze(1), rest), dim=1)
    return (probes.float() @ x.float().transpose(1, 2)).softmax(dim=-1) @ x.float()


def _fold(folded: list[Tensor], eps: float) -> FusedNorm | None:
    if not folded:
        return None
    first, weight, bias = folded
    return FusedNorm(first, weight, bias, eps)


class _Read(torch.autograd.Function):
    """cross_attention.cpp has the equations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probes: Tensor, eps: float, *folded: Tensor) -> Tensor:
        ctx.eps, ctx.count = eps, len(folded)
        inputs = (x, probes, *folded)
        ctx.dtypes = [tensor.dtype for tensor in inputs[1:]]
        dense_probes, *dense = (tensor.float().contiguous() for tensor in (probes, *folded))
        tokens, saved = kernels_here().cross_read(x, dense_probes, _fold(dense, eps))
        ctx.save_for_backward(*inputs, *saved)
        return tokens

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # unpacked once: a checkpoint allows no more
        inputs, saved = tensors[: 2 + ctx.count], tensors[2 + ctx.count :]
        if torch.is_grad_enabled():
            grads = gradients_with_graph(
                functools.partial(_plain_read, ctx.eps), inputs, grad_tokens
            )
            return *grads[:2], None, *grads[2:]
        x, probes, *folded = inputs
        probes, *folded = (tensor.float().contiguous() for tensor in (probes, *folded))
        grad_x, *grads_by_kernel = kernels_here().cross_read_backward(
            x, probes, _fold(folded, ctx.eps), saved, grad_tokens.contiguous()
        )
        grad_probes, *grad_folded = (
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip(grads_by_kernel, ctx.dtypes, strict=False)
        )
        return grad_x, grad_probes, None, *grad_folded
