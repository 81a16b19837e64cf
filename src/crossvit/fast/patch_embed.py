"""Patches as tokens in bf16 on a CPU, where the stem is one product with patches side by side.

Shapes: B batch, C channels, P side of a patch, n patches, N = n tokens and the class token, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.fast.eligibility import (
    fused_form,
    why_no_patch_kernel,
    why_no_resize_kernel,
    why_not,
)
from crossvit.fast.native.bindings import Linear
from crossvit.fast.native.build import kernels_here
from crossvit.fast.recompute import gradients_with_graph
from crossvit.fast.resize import bicubic
from crossvit.model.tokens import Tokens, resample_positions, resize


@fused_form(Tokens)
class FusedTokens(Tokens):
    """`Tokens` whose resize and stem are native kernels where they can be."""

    def forward(self, images: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or why_not(self, images):
            return super().forward(images)
        size = (images.shape[-2], images.shape[-1])
        view = fast_resize(images, self.branch.image_size(size))
        positions = resample_positions(self.positions, self.grid, self.branch.grid(size))
        if why_no_patch_kernel(view, self.patches, self.class_token, positions) is None:
            assert isinstance(self.patches, nn.Conv2d)  # which is asked above
            return self.drop(patch_tokens(view, self.patches, self.class_token, positions))  # type: ignore[no-any-return]
        tokens = self.patches(view).flatten(2).transpose(1, 2)  # (B, n, D)
        if self.class_token is not None:
            tokens = torch.cat((self.class_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        return self.drop(tokens + positions)  # type: ignore[no-any-return]


def fast_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """`crossvit.model.tokens.resize` by the native kernel where it takes the images."""
    if images.shape[-2:] != size and why_no_resize_kernel(images) is None:
        return bicubic(images, size)
    return resize(images, size)


def patch_tokens(
    images: Tensor, stem: nn.Conv2d, class_token: Tensor | None, positions: Tensor
) -> Tensor:
    """[class token ‖ stem(images)] + positions: (B, C, H, W) -> (B, N, D) fp32."""
    return _PatchTokens.apply(images, positions, class_token, stem.weight, stem.bias)  # type: ignore[no-any-return]


def _plain_patch_tokens(
    patches: Tensor | None,
    positions: Tensor,
    class_token: Tensor | None,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """The same in fp32 of the patches (B n, C P²), differentiable any number of times.

    Without patches, which are saved where the stem has gradients, it is their share alone.
    """
    count = positions.shape[1] - (class_token is not None)
    if patches is None:
        tokens = positions.new_zeros(1, count, positions.shape[2])
    else:
        tokens = F.linear(patches.float(), weight.flatten(1), bias).unflatten(0, (-1, count))
    if class_token is not None:
        tokens = torch.cat((class_token.expand(len(tokens), -1, -1), tokens), dim=1)
    return tokens + positions


class _PatchTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, positions: Tensor, class_token: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        kernels, saves = kernels_here(), any(ctx.needs_input_grad[3:])
        weight, bias = parameters
        ctx.first = int(class_token is not None)
        packed = kernels.pack(weight.flatten(1).contiguous(), torch.bfloat16, transposed=True)
        stem, side = Linear(packed, bias.contiguous()), weight.shape[-1]
        tokens, patches = kernels.patch_tokens(
            images.contiguous(),
            stem,
            side,
            positions.contiguous(),
            first=ctx.first,
            keeps=saves,
        )
        if class_token is not None:
            tokens[:, :1] = class_token + positions[:, :1]
        ctx.save_for_backward(patches, positions, class_token, weight, bias)
        return tokens

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # unpacked once: a checkpoint allows no more
        if torch.is_grad_enabled():
            return gradients_with_graph(_plain_patch_tokens, tensors, grad_tokens)
        patches, _, _, weight, _ = tensors
        grad_weight = grad_bias = None
        if patches is not None:
            grad_weight = grad_tokens.new_empty(len(weight), patches.shape[1])
            grad_bias = grad_tokens.new_empty(len(weight))
            grad_patches = grad_tokens[:, ctx.first :].to(
                torch.bfloat16, memory_format=torch.contiguous_format
            )
            kernels_here().linear_backward(
                grad_patches, patches, (grad_weight, grad_bias), adds=False
            )
            grad_weight = grad_weight.reshape(weight.shape)
        grad_positions = grad_tokens.sum(dim=0, keepdim=True)
        grad_class_token = grad_positions[:, :1].clone() if ctx.first else None
        return None, grad_positions, grad_class_token, grad_weight, grad_bias
