"""Attention by our kernel, with its gradient.

Shapes: B batch, N tokens, D width, H heads, K = D / H width of a head.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from crossvit.fast.native.build import kernels_here, native


def takes_attention(qkv: Tensor, num_heads: int) -> bool:
    """Whether `attention` computes it: bf16, or fp32 with a backward pass (without one torch's fused kernel keeps its place),
    and nothing that traces or transforms is at work."""
    wanted = qkv.dtype == torch.bfloat16 or (torch.is_grad_enabled() and qkv.requires_grad)
    return (
        wanted
        and is_eager(qkv)
        and (kernels := native()) is not None
        and kernels.takes(qkv, num_heads)
    )


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q kᵀ / √K) v of every head, side by side: (B, N, 3 D) -> (B, N, D), in the dtype of `qkv`.

    The last axis of `qkv` is [queries ‖ keys ‖ values], each of them head after head. The backward pass computes the weights
    again. Differentiable once.
    """
    return _Attention.apply(qkv, num_heads)  # type: ignore[no-any-return]


def is_eager(x: Tensor) -> bool:
    """Whether x is a plain tensor on the CPU and what is done with it is done at once: not compiled, exported, transformed or
    counted (as FLOPs are)."""
    if (
        type(x) is not Tensor
        or x.device.type != "cpu"
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
    ):
        return False
    inner = torch._C
    return not (
        inner._is_tracing()
        or inner._are_functorch_transforms_active()
        or inner._len_torch_dispatch_stack()
    )


def is_reduced() -> bool:
    """Whether autocast to bf16 is at work on the CPU."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def is_plain(tensor: Tensor | None) -> bool:
    """Whether its numbers are fp32 in this machine's memory."""
    known = type(tensor) in (Tensor, nn.Parameter)
    return (
        known
        and tensor is not None
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
    )


def is_as_written(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling it is what `kind` says and nothing more: no other class in its place, no hook, no other `forward`."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if type(module) is not kind or any(hooks) or "forward" in module.__dict__:
        return False
    parameters = {"weight", "bias"} if kind in (nn.Linear, nn.LayerNorm, nn.Conv2d) else set()
    extra = set(module._parameters) - parameters or module._buffers
    return not extra and is_unpatched(kind)


def is_unpatched(kind: type[nn.Module]) -> bool:
    """Whether the class's `forward` is the one that its own file has, and nobody's put in its place."""
    code = getattr(kind.forward, "__code__", None)
    owner = next(base for base in kind.__mro__ if "forward" in base.__dict__)
    module = sys.modules.get(owner.__module__)
    if code is None or module is None:
        return False
    place: tuple[Any, str] = (code.co_filename, code.co_qualname)
    return place == (module.__file__, f"{owner.__qualname__}.forward")


class _Attention(torch.autograd.Function):
    """attention_gradient.cpp has the equations."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> Tensor:
        ctx.scale = math.sqrt(3 * num_heads / qkv.shape[-1])
        log_sums = qkv.new_empty(qkv.shape[0], num_heads, qkv.shape[1], dtype=torch.float32)
        mixed = kernels_here().attention(qkv, num_heads, scale=ctx.scale, log_sums=log_sums)
        ctx.save_for_backward(qkv, mixed, log_sums)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        qkv, mixed, log_sums = ctx.saved_tensors
        return kernels_here().attention_gradient(
            qkv, mixed, gradient, log_sums, scale=ctx.scale
        ), None
