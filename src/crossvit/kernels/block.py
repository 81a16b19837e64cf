"""An encoder block in bf16 on a CPU, a few images at a time: each half is one function, so that what it makes stays in the cache.

    attention half:  y = x + m · Out(Attention(QKV(LN x)))        MLP half:  y = x + m · Down(GELU(Up(LN x)))

x, y and parameters are fp32; what goes into a product or comes out of one is bf16, as under torch's autocast. m is the factor
of stochastic depth, one a sample. Kept for the backward pass: x, its norm, and qkv with what was mixed, or what GELU takes;
weights of attention and GELU are computed again. Gradients of weights are summed in fp32. Differentiable once.

Shapes: B batch, b images of a part, N tokens, D width, H heads, F hidden width of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crossvit.kernels.functions import is_eager
from crossvit.kernels.native import LANES, kernels_here, native

PART_TOKENS = 3300  # that are worked on at once: the best of 800 to 6,500; see dev/LOG.md

# What was kept of what lies between the linear layers, and the gradient of what the second reads -> (what it reads, the gradient
# of what the first gives).
Between = Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor]]


class Half(NamedTuple):
    """The parameters of one half: its LayerNorm (weight and bias (D), eps), its linear layers in and out."""

    norm_weight: Tensor
    norm_bias: Tensor
    in_weight: Tensor  # (3 D, D) or (F, D)
    in_bias: Tensor
    out_weight: Tensor  # (D, D) or (D, F)
    out_bias: Tensor
    eps: float

    @classmethod
    def of(cls, norm: nn.LayerNorm, inward: nn.Linear, outward: nn.Linear) -> Half:
        return cls(norm.weight, norm.bias, inward.weight, inward.bias, outward.weight, outward.bias, norm.eps)


def takes(x: Tensor, half: Half, *, head_width: int) -> bool:
    """Whether a half is computed here: on a CPU with the kernels, under bf16 autocast, fp32 tokens and parameters, all widths
    whole registers, and nothing that traces or transforms."""
    if (
        not x.numel()
        or not is_eager(x)
        or not torch.is_autocast_enabled("cpu")
        or torch.get_autocast_dtype("cpu") != torch.bfloat16
    ):
        return False
    if not all(_is_plain(tensor) for tensor in (x, *half[:-1])) or x.ndim != 3:
        return False
    (inner, width), (_, outer) = half.in_weight.shape, half.out_weight.shape
    fits = x.shape[-1] == width == len(half.norm_weight) == len(half.out_weight)  # else torch says what is wrong
    whole = all(size % LANES == 0 for size in (width, inner, outer, head_width))
    return fits and whole and torch.backends.mkldnn.is_available() and (kernels := native()) is not None and kernels.has_layers


def _is_plain(tensor: Tensor | None) -> bool:
    """Whether its numbers are fp32 in this machine's memory."""
    known = type(tensor) in (Tensor, nn.Parameter)
    return known and tensor is not None and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def attention_half(x: Tensor, half: Half, num_heads: int, factor: Tensor | None) -> Tensor:
    """x + factor · Out(Attention(QKV(LN x))): (B, N, D) -> (B, N, D). factor: (B, 1, 1) or None."""
    return _AttentionHalf.apply(x, factor, num_heads, half.eps, *half[:-1])  # type: ignore[no-any-return]


def mlp_half(x: Tensor, half: Half, factor: Tensor | None) -> Tensor:
    """x + factor · Down(GELU(Up(LN x))): (B, N, D) -> (B, N, D). factor: (B, 1, 1) or None."""
    return _MLPHalf.apply(x, factor, half.eps, *half[:-1])  # type: ignore[no-any-return]


def _parts(x: Tensor) -> Iterator[slice]:
    batch, tokens = x.shape[:2]
    size = max(1, PART_TOKENS // max(1, tokens))
    return (slice(start, min(start + size, batch)) for start in range(0, batch, size))


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W ᵀ + b in bf16 through oneDNN, the bias added in registers."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _narrow(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(torch.bfloat16) for tensor in tensors)


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor | None, num_heads: int, eps: float, *parameters: Tensor) -> Tensor:
        kernels, x = kernels_here(), x.contiguous()
        norm_weight, norm_bias = (parameter.contiguous() for parameter in parameters[:2])
        in_weight, in_bias, out_weight, out_bias = _narrow(*parameters[2:])
        ctx.scale = math.sqrt(num_heads / x.shape[-1])
        y, kept = torch.empty_like(x), []
        for part in _parts(x):
            own = x[part]
            normalised, statistics = kernels.layer_norm(own, norm_weight, norm_bias, eps)
            qkv = _linear(normalised, in_weight, in_bias)  # (b, N, 3 D)
            log_sums = own.new_empty(len(own), num_heads, own.shape[1])
            mixed = kernels.attention(qkv, num_heads, scale=ctx.scale, log_sums=log_sums)
            kernels.residual(own, _linear(mixed, out_weight, out_bias), None if factor is None else factor[part], y[part])
            kept += [normalised, statistics, qkv, mixed, log_sums] if any(ctx.needs_input_grad) else []
        ctx.save_for_backward(x, factor, norm_weight, in_weight, out_weight, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        def between(kept: list[Tensor], of_mixed: Tensor) -> tuple[Tensor, Tensor]:
            qkv, mixed, log_sums = kept
            return mixed, kernels_here().attention_gradient(qkv, mixed, of_mixed, log_sums, scale=ctx.scale)

        of_x, of_parameters = _gradients(ctx, gradient, between)
        return of_x, None, None, None, *of_parameters


class _MLPHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor | None, eps: float, *parameters: Tensor) -> Tensor:
        kernels, x = kernels_here(), x.contiguous()
        norm_weight, norm_bias = (parameter.contiguous() for parameter in parameters[:2])
        in_weight, in_bias, out_weight, out_bias = _narrow(*parameters[2:])
        y, kept = torch.empty_like(x), []
        for part in _parts(x):
            normalised, statistics = kernels.layer_norm(x[part], norm_weight, norm_bias, eps)
            hidden = _linear(normalised, in_weight, in_bias)  # (b, N, F)
            update = _linear(kernels.gelu(hidden), out_weight, out_bias)
            kernels.residual(x[part], update, None if factor is None else factor[part], y[part])
            kept += [normalised, statistics, hidden] if any(ctx.needs_input_grad) else []
        ctx.save_for_backward(x, factor, norm_weight, in_weight, out_weight, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        def between(kept: list[Tensor], of_activated: Tensor) -> tuple[Tensor, Tensor]:
            (hidden,) = kept
            return kernels_here().gelu_gradient(hidden, of_activated)

        of_x, of_parameters = _gradients(ctx, gradient, between)
        return of_x, None, None, *of_parameters


def _gradients(ctx: Any, gradient: Tensor, between: Between) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gradients of x and of the parameters of a half, part by part."""
    x, factor, norm_weight, in_weight, out_weight, *kept = ctx.saved_tensors
    kernels, gradient = kernels_here(), gradient.contiguous()
    found = _Gradients(x, norm_weight, in_weight, out_weight)
    parts = list(_parts(x))
    each = len(kept) // len(parts)
    for number, part in enumerate(parts):
        normalised, statistics, *own = kept[each * number : each * (number + 1)]
        update = _update_gradient(gradient[part], None if factor is None else factor[part])
        read, of_hidden = between(own, update @ out_weight)
        kernels.linear_gradient(update, read, found.of_out, adds=number > 0)
        kernels.linear_gradient(of_hidden, normalised, found.of_in, adds=number > 0)
        given = (of_hidden @ in_weight, gradient[part], x[part])
        kernels.layer_norm_gradient(given, norm_weight, statistics, (found.x[part], *found.of_norm))
    return found.x, (*found.of_norm, *found.of_in, *found.of_out)


class _Gradients:
    """Where the gradients of one half go, in fp32: of x, and (weight, bias) of the norm and of both linear layers."""

    def __init__(self, x: Tensor, norm_weight: Tensor, in_weight: Tensor, out_weight: Tensor) -> None:
        self.x = torch.empty_like(x)
        self.of_norm = (torch.zeros_like(norm_weight), torch.zeros_like(norm_weight))
        self.of_in, self.of_out = ((x.new_empty(one.shape), x.new_empty(len(one))) for one in (in_weight, out_weight))


def _update_gradient(gradient: Tensor, factor: Tensor | None) -> Tensor:
    return (gradient if factor is None else gradient * factor).to(torch.bfloat16)
