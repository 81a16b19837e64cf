"""An encoder block in bf16 on a CPU, a few images at a time: each half is one function, so that what it makes stays in the cache.

    attention half:  y = x + m · Out(Attention(QKV(LN x)))        MLP half:  y = x + m · Down(GELU(Up(LN x)))

x, y and parameters are fp32; what goes into a product or comes out of one is bf16, as under torch's autocast. m is the factor
of stochastic depth, one a sample. Kept for the backward pass: x, its norm, and qkv with what was mixed, or what GELU takes;
weights of attention and GELU are computed again. Gradients of weights are summed in fp32. Differentiable once.

Shapes: B batch, b images of a part, N tokens, D width, H heads, F hidden width of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crossvit.fast.native.bindings import LANES, Linear, Norm
from crossvit.fast.native.build import kernels_here, native
from crossvit.fast.self_attention import is_eager, is_plain, is_reduced

PART_TOKENS = 3300  # that are worked on at once: the best of 800 to 6,500; see dev/LOG.md


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
        return cls(
            norm.weight,
            norm.bias,
            inward.weight,
            inward.bias,
            outward.weight,
            outward.bias,
            norm.eps,
        )


def takes(x: Tensor, half: Half, *, head_width: int) -> bool:
    """Whether a half is computed here: on a CPU with the kernels, under bf16 autocast, fp32 tokens and parameters, all widths
    whole registers, and nothing that traces or transforms."""
    if not (x.numel() and is_eager(x) and is_reduced()):
        return False
    if not all(is_plain(tensor) for tensor in (x, *half[:-1])) or x.ndim != 3:
        return False
    (inner, width), (_, outer) = half.in_weight.shape, half.out_weight.shape
    fits = (
        x.shape[-1] == width == len(half.norm_weight) == len(half.out_weight)
    )  # else torch says what is wrong
    whole = all(size % LANES == 0 for size in (width, inner, outer, head_width))
    return fits and whole and (kernels := native()) is not None and kernels.has_bf16


def attention_half(x: Tensor, half: Half, num_heads: int, factor: Tensor | None) -> Tensor:
    """x + factor · Out(Attention(QKV(LN x))): (B, N, D) -> (B, N, D). factor: (B, 1, 1) or None."""
    return _AttentionHalf.apply(x, factor, num_heads, half.eps, *half[:-1])  # type: ignore[no-any-return]


def mlp_half(x: Tensor, half: Half, factor: Tensor | None) -> Tensor:
    """x + factor · Down(GELU(Up(LN x))): (B, N, D) -> (B, N, D). factor: (B, 1, 1) or None."""
    return _MLPHalf.apply(x, factor, half.eps, *half[:-1])  # type: ignore[no-any-return]


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: Tensor | None, num_heads: int, eps: float, *parameters: Tensor
    ) -> Tensor:
        kernels, x, keeps = kernels_here(), x.contiguous(), any(ctx.needs_input_grad)
        norm, inward, outward = _layers(parameters, eps)
        ctx.scale = math.sqrt(num_heads / x.shape[-1])
        qkv, kept = kernels.norm_linear(x, norm, inward, keeps=keeps)
        log_sums = x.new_empty(len(x), num_heads, x.shape[1]) if keeps else None
        mixed = kernels.attention(qkv, num_heads, scale=ctx.scale, log_sums=log_sums)
        if keeps:
            ctx.save_for_backward(factor, *_weights(parameters), x, *kept, qkv, mixed, log_sums)
        return kernels.linear_residual(mixed, outward, x, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernels = kernels_here()
        factor, norm_weight, in_weight, out_weight, *kept = ctx.saved_tensors
        found = _Gradients(ctx.needs_input_grad[-6:], kept[0], norm_weight, in_weight, out_weight)
        in_packed, out_packed = _packed(in_weight), _packed(out_weight)
        for part in _parts(kept[0]):
            own_factor = None if factor is None else factor[part]
            x, normalised, statistics, qkv, mixed, log_sums = (one[part] for one in kept)
            past = gradient[part].contiguous()
            update, of_mixed = kernels.linear_residual_gradient(past, own_factor, out_packed)
            of_qkv = kernels.attention_gradient(qkv, mixed, of_mixed, log_sums, scale=ctx.scale)
            kernels.norm_linear_gradient(
                of_qkv, in_packed, past, x, norm=(norm_weight, statistics), found=found.behind(part)
            )
            found.add((of_qkv, normalised), (update, mixed))
        return found.x, None, None, None, *found.of_parameters()


class _MLPHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: Tensor | None, eps: float, *parameters: Tensor
    ) -> Tensor:
        x, keeps = x.contiguous(), any(ctx.needs_input_grad)
        y, hidden, kept = kernels_here().mlp(x, _layers(parameters, eps), factor, keeps=keeps)
        if keeps:
            ctx.save_for_backward(factor, *_weights(parameters), x, *kept, hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernels = kernels_here()
        factor, norm_weight, in_weight, out_weight, *kept = ctx.saved_tensors
        found = _Gradients(ctx.needs_input_grad[-6:], kept[0], norm_weight, in_weight, out_weight)
        packed = _packed(out_weight), _packed(in_weight)
        for part in _parts(kept[0]):
            own_factor = None if factor is None else factor[part]
            x, normalised, statistics, hidden = (one[part] for one in kept)
            norm, past = (norm_weight, statistics), gradient[part].contiguous()
            update, activated, of_hidden = kernels.mlp_gradient(
                past, own_factor, packed, hidden, x, norm=norm, found=found.behind(part)
            )
            found.add((of_hidden, normalised), (update, activated))
        return found.x, None, None, *found.of_parameters()


def _layers(parameters: Sequence[Tensor], eps: float) -> tuple[Norm, Linear, Linear]:
    """A half's layers, ready for products in bf16."""
    norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias = (
        one.contiguous() for one in parameters
    )
    inward, outward = (
        kernels_here().pack(weight, torch.bfloat16, transposed=True)
        for weight in (in_weight, out_weight)
    )
    return Norm(norm_weight, norm_bias, eps), Linear(inward, in_bias), Linear(outward, out_bias)


def _weights(parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a backward pass needs of the parameters."""
    return tuple(parameters[index].contiguous() for index in (0, 2, 4))


def _packed(weight: Tensor) -> Tensor:
    return kernels_here().pack(weight, torch.bfloat16, transposed=False)


def _parts(x: Tensor) -> Iterator[slice]:
    batch, tokens = x.shape[:2]
    size = max(1, PART_TOKENS // max(1, tokens))
    return (slice(start, min(start + size, batch)) for start in range(0, batch, size))


class _Gradients:
    """Where the gradients of one half go, in fp32: of x, and (weight, bias) of the norm and, if wanted, of each linear layer."""

    def __init__(
        self,
        wanted: Sequence[bool],
        x: Tensor,
        norm_weight: Tensor,
        in_weight: Tensor,
        out_weight: Tensor,
    ) -> None:
        self.x = torch.empty_like(x)
        self.of_norm = (torch.zeros_like(norm_weight), torch.zeros_like(norm_weight))
        self.of_linear: list[tuple[Tensor, Tensor] | None] = [
            (x.new_empty(weight.shape), x.new_empty(len(weight)))
            if any(wanted[first : first + 2])
            else None
            for first, weight in ((2, in_weight), (4, out_weight))
        ]
        self._adds = False

    def behind(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Where what comes out at the norm's far side goes."""
        return self.x[part], *self.of_norm

    def add(self, inward: tuple[Tensor, Tensor], outward: tuple[Tensor, Tensor]) -> None:
        """Of each linear layer: the gradient of what it gave in a part, and what it read."""
        for found, (gradient, read) in zip(self.of_linear, (inward, outward), strict=True):
            if found is not None:
                kernels_here().linear_gradient(gradient, read, found, adds=self._adds)
        self._adds = True

    def of_parameters(self) -> tuple[Tensor | None, ...]:
        return (*self.of_norm, *(one for found in self.of_linear for one in found or (None, None)))
