"""An encoder block in bf16 on a CPU, a few images at a time: each sublayer is one function.

    attention:  y = x + m · Out(Attention(QKV(LN x)))        MLP:  y = x + m · Down(GELU(Up(LN x)))

What a part of the batch makes stays in the cache. x, y and parameters are fp32; what goes into a
product or comes out of one is bf16, as under torch's autocast. m is the scale of stochastic depth,
one a sample. Saved for the backward pass: x, its norm, and qkv with the context, or what GELU
takes; weights of attention and GELU are computed again. Gradients of weights are summed in fp32.

Shapes: B batch, b images of a part, N tokens, D width, H heads, F hidden width of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.fast.eligibility import fused_form, why_not
from crossvit.fast.native.bindings import Linear, Norm
from crossvit.fast.native.build import kernels_here
from crossvit.fast.recompute import gradients_with_graph
from crossvit.fast.self_attention import plain_attention
from crossvit.model.layers import EncoderBlock

PART_TOKENS = 3300  # that are worked on at once: the best of 800 to 6,500; see dev/LOG.md


@fused_form(EncoderBlock)
class FusedEncoderBlock(EncoderBlock):
    """`EncoderBlock` by native kernels, a sublayer each: (B, N, D) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or why_not(self, x):
            return super().forward(x)
        attention, mlp = self.attention, self.mlp
        up, down = mlp[0], mlp[3]
        assert isinstance(up, nn.Linear)  # as built, which is asked above
        assert isinstance(down, nn.Linear)
        first = Sublayer.of(self.attention_norm, attention.qkv, attention.out)
        second = Sublayer.of(self.mlp_norm, up, down)
        x = attention_sublayer(x, first, attention.num_heads, self.drop_path.scale(x))
        return mlp_sublayer(x, second, self.drop_path.scale(x))


class Sublayer(NamedTuple):
    """The parameters of one sublayer: its LayerNorm, its linear layers in and out."""

    norm_weight: Tensor
    norm_bias: Tensor
    in_weight: Tensor  # (3 D, D) or (F, D)
    in_bias: Tensor
    out_weight: Tensor  # (D, D) or (D, F)
    out_bias: Tensor
    eps: float

    @classmethod
    def of(cls, norm: nn.LayerNorm, linear_in: nn.Linear, linear_out: nn.Linear) -> Sublayer:
        return cls(
            norm.weight,
            norm.bias,
            linear_in.weight,
            linear_in.bias,
            linear_out.weight,
            linear_out.bias,
            norm.eps,
        )


def attention_sublayer(
    x: Tensor, sublayer: Sublayer, num_heads: int, drop_path_scale: Tensor | None
) -> Tensor:
    """x + m · Out(Attention(QKV(LN x))): (B, N, D) -> (B, N, D).

    drop_path_scale: m, (B, 1, 1) fp32 or None for 1.
    """
    return _AttentionSublayer.apply(  # type: ignore[no-any-return]
        x, drop_path_scale, num_heads, sublayer.eps, *sublayer[:-1]
    )


def mlp_sublayer(x: Tensor, sublayer: Sublayer, drop_path_scale: Tensor | None) -> Tensor:
    """x + m · Down(GELU(Up(LN x))): (B, N, D) -> (B, N, D).

    drop_path_scale: m, (B, 1, 1) fp32 or None for 1.
    """
    return _MLPSublayer.apply(x, drop_path_scale, sublayer.eps, *sublayer[:-1])  # type: ignore[no-any-return]


def _plain_attention_sublayer(
    num_heads: int, eps: float, x: Tensor, scale: Tensor | None, *parameters: Tensor
) -> Tensor:
    """The same in fp32 by torch, differentiable any number of times."""
    norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias = parameters
    normalised = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    context = plain_attention(F.linear(normalised, in_weight, in_bias), num_heads)
    update = F.linear(context, out_weight, out_bias)
    return x + (update if scale is None else update * scale)


def _plain_mlp_sublayer(eps: float, x: Tensor, scale: Tensor | None, *parameters: Tensor) -> Tensor:
    """The same in fp32 by torch, differentiable any number of times."""
    norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias = parameters
    normalised = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    hidden = F.gelu(F.linear(normalised, in_weight, in_bias))
    update = F.linear(hidden, out_weight, out_bias)
    return x + (update if scale is None else update * scale)


class _AttentionSublayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor | None, num_heads: int, eps: float, *parameters: Tensor
    ) -> Tensor:
        kernels, dense, saves = kernels_here(), x.contiguous(), any(ctx.needs_input_grad)
        norm, linear_in, linear_out = _layers(parameters, eps)
        ctx.num_heads, ctx.eps, ctx.scale = num_heads, eps, math.sqrt(num_heads / x.shape[-1])
        qkv, normalised = kernels.norm_linear(dense, norm, linear_in, keeps=saves)
        log_sums = x.new_empty(len(x), num_heads, x.shape[1]) if saves else None
        context = kernels.attention(qkv, num_heads, scale=ctx.scale, log_sums=log_sums)
        if saves:
            ctx.save_for_backward(x, scale, *parameters, *normalised, qkv, context, log_sums)
        return kernels.linear_residual(context, linear_out, dense, scale)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # unpacked once: a checkpoint allows no more
        inputs, saved = tensors[:8], tensors[8:]
        if torch.is_grad_enabled():
            grads = gradients_with_graph(
                lambda *tensors: _plain_attention_sublayer(ctx.num_heads, ctx.eps, *tensors),
                inputs,
                grad_out,
            )
            return *grads[:2], None, None, *grads[2:]
        kernels, scale = kernels_here(), inputs[1]
        dense, norm_weight, in_weight, out_weight = _of_backward(inputs)
        grads_of = _Gradients(ctx.needs_input_grad[-6:], dense, norm_weight, in_weight, out_weight)
        in_packed, out_packed = _packed(in_weight), _packed(out_weight)
        for part in _parts(dense):
            part_scale = None if scale is None else scale[part]
            x, normalised, statistics, qkv, context, log_sums = (
                tensor[part] for tensor in (dense, *saved)
            )
            residual_grad = grad_out[part].contiguous()
            grad_update, grad_context = kernels.linear_residual_backward(
                residual_grad, part_scale, out_packed
            )
            grad_qkv = kernels.attention_backward(
                qkv, context, grad_context, log_sums, scale=ctx.scale
            )
            kernels.norm_linear_backward(
                grad_qkv,
                in_packed,
                residual_grad,
                x,
                norm=(norm_weight, statistics),
                grad_buffers=grads_of.norm_buffers(part),
            )
            grads_of.add((grad_qkv, normalised), (grad_update, context))
        return grads_of.x, None, None, None, *grads_of.parameters()


class _MLPSublayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor | None, eps: float, *parameters: Tensor
    ) -> Tensor:
        dense, saves = x.contiguous(), any(ctx.needs_input_grad)
        ctx.eps = eps
        out, hidden, normalised = kernels_here().mlp(
            dense, _layers(parameters, eps), scale, keeps=saves
        )
        if saves:
            ctx.save_for_backward(x, scale, *parameters, *normalised, hidden)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # unpacked once: a checkpoint allows no more
        inputs, saved = tensors[:8], tensors[8:]
        if torch.is_grad_enabled():
            grads = gradients_with_graph(
                lambda *tensors: _plain_mlp_sublayer(ctx.eps, *tensors), inputs, grad_out
            )
            return *grads[:2], None, *grads[2:]
        kernels, scale = kernels_here(), inputs[1]
        dense, norm_weight, in_weight, out_weight = _of_backward(inputs)
        grads_of = _Gradients(ctx.needs_input_grad[-6:], dense, norm_weight, in_weight, out_weight)
        packed = _packed(out_weight), _packed(in_weight)
        for part in _parts(dense):
            part_scale = None if scale is None else scale[part]
            x, normalised, statistics, hidden = (tensor[part] for tensor in (dense, *saved))
            grad_update, activated, grad_hidden = kernels.mlp_backward(
                grad_out[part].contiguous(),
                part_scale,
                packed,
                hidden,
                x,
                norm=(norm_weight, statistics),
                grad_buffers=grads_of.norm_buffers(part),
            )
            grads_of.add((grad_hidden, normalised), (grad_update, activated))
        return grads_of.x, None, None, *grads_of.parameters()


def _layers(parameters: Sequence[Tensor], eps: float) -> tuple[Norm, Linear, Linear]:
    """A sublayer's layers, ready for products in bf16."""
    norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias = (
        parameter.contiguous() for parameter in parameters
    )
    packed_in, packed_out = (
        kernels_here().pack(weight, torch.bfloat16, transposed=True)
        for weight in (in_weight, out_weight)
    )
    return (
        Norm(norm_weight, norm_bias, eps),
        Linear(packed_in, in_bias),
        Linear(packed_out, out_bias),
    )


def _of_backward(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of x, m and the parameters what a backward pass needs, dense: x and the three weights."""
    return tuple(inputs[index].contiguous() for index in (0, 2, 4, 6))


def _packed(weight: Tensor) -> Tensor:
    return kernels_here().pack(weight, torch.bfloat16, transposed=False)


def _parts(x: Tensor) -> Iterator[slice]:
    batch, tokens = x.shape[:2]
    size = max(1, PART_TOKENS // max(1, tokens))
    return (slice(start, min(start + size, batch)) for start in range(0, batch, size))


class _Gradients:
    """The fp32 buffers of one sublayer's gradients: of x, the norm, and each linear layer if wanted."""

    def __init__(
        self,
        wanted: Sequence[bool],
        x: Tensor,
        norm_weight: Tensor,
        in_weight: Tensor,
        out_weight: Tensor,
    ) -> None:
        """
        Args:
            wanted: Of the norm's weight and bias, the first layer's, the second's.
            x: The input (B, N, D); the others are parameters, for their shapes.
        """
        self.x = torch.empty_like(x)
        self.norm = (torch.zeros_like(norm_weight), torch.zeros_like(norm_weight))
        self.linear: list[tuple[Tensor, Tensor] | None] = [
            (x.new_empty(weight.shape), x.new_empty(len(weight)))
            if any(wanted[first : first + 2])
            else None
            for first, weight in ((2, in_weight), (4, out_weight))
        ]
        self._adds = False

    def norm_buffers(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """What the LayerNorm's backward pass writes and adds to: (grad_x, grad_weight, grad_bias)."""
        return self.x[part], *self.norm

    def add(self, linear_in: tuple[Tensor, Tensor], linear_out: tuple[Tensor, Tensor]) -> None:
        """Of each linear layer: the gradient of its output in a part, and its input."""
        for buffers, (grad, inp) in zip(self.linear, (linear_in, linear_out), strict=True):
            if buffers is not None:
                kernels_here().linear_backward(grad, inp, buffers, adds=self._adds)
        self._adds = True

    def parameters(self) -> tuple[Tensor | None, ...]:
        """In the order of `Sublayer`."""
        pairs = (buffers or (None, None) for buffers in self.linear)
        return (*self.norm, *(grad for pair in pairs for grad in pair))
