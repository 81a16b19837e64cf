"""Patches as tokens in bf16 on a CPU, where the stem is one convolution whose stride is its kernel: a product with the patches.

Shapes: B batch, C channels, P side of a patch, n patches, N = n tokens, and the class token where there is one, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crossvit.fast.native.bindings import LANES, Linear
from crossvit.fast.native.build import kernels_here, native
from crossvit.fast.self_attention import is_as_written, is_eager, is_plain, is_reduced


def takes_patches(
    images: Tensor, stem: nn.Module, class_token: Tensor | None, positions: Tensor
) -> bool:
    """Whether `patch_tokens` computes it: under bf16 autocast on a CPU, with the kernels, a stem that is nothing but its patches'
    product, no gradient for the images, and nothing that traces or transforms."""
    if not (
        isinstance(stem, nn.Conv2d)
        and is_as_written(stem, nn.Conv2d)
        and is_reduced()
        and is_eager(images)
    ):
        return False
    tensors = (
        images,
        stem.weight,
        stem.bias,
        positions,
        *(() if class_token is None else (class_token,)),
    )
    if (
        not all(is_plain(tensor) for tensor in tensors)
        or images.requires_grad
        or not images.numel()
        or not has_patches(stem)
    ):
        return False
    side, first = stem.kernel_size[0], int(class_token is not None)
    count = (images.shape[-2] // side) * (images.shape[-1] // side)
    fits = images.ndim == 4 and images.shape[1] == stem.in_channels  # else torch says what is wrong
    fits = fits and count > 0 and positions.shape == (1, first + count, stem.out_channels)
    return fits and (kernels := native()) is not None and kernels.has_bf16


def has_patches(stem: nn.Module) -> bool:
    """Whether it is one convolution of patches side by side, of whole registers."""
    if (
        not isinstance(stem, nn.Conv2d)
        or stem.kernel_size != stem.stride
        or stem.kernel_size[0] != stem.kernel_size[1]
    ):
        return False
    plain = (
        stem.padding == (0, 0)
        and stem.dilation == (1, 1)
        and stem.groups == 1
        and stem.bias is not None
    )
    return plain and all(size % LANES == 0 for size in (len(stem.weight), stem.weight[0].numel()))


def patch_tokens(
    images: Tensor, stem: nn.Conv2d, class_token: Tensor | None, positions: Tensor
) -> Tensor:
    """[class token ‖ stem(images)] + positions: (B, C, H, W) -> (B, N, D) fp32. Differentiable once."""
    return _PatchTokens.apply(images, positions, class_token, stem.weight, stem.bias)  # type: ignore[no-any-return]


class _PatchTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, positions: Tensor, class_token: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        kernels, keeps, positions = (
            kernels_here(),
            any(ctx.needs_input_grad[3:]),
            positions.contiguous(),
        )
        weight, bias = parameters
        ctx.shape, ctx.first = weight.shape, int(class_token is not None)
        packed = kernels.pack(weight.flatten(1).contiguous(), torch.bfloat16, transposed=True)
        stem, side = Linear(packed, bias.contiguous()), weight.shape[-1]
        tokens, patches = kernels.patch_tokens(
            images.contiguous(), stem, side, positions, first=ctx.first, keeps=keeps
        )
        if class_token is not None:
            tokens[:, :1] = class_token + positions[:, :1]
        ctx.save_for_backward(patches)
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (patches,) = ctx.saved_tensors
        of_weight = of_bias = None
        if patches is not None:
            of_weight, of_bias = (
                gradient.new_empty(ctx.shape[0], patches.shape[1]),
                gradient.new_empty(ctx.shape[0]),
            )
            of_patches = gradient[:, ctx.first :].to(
                torch.bfloat16, memory_format=torch.contiguous_format
            )
            kernels_here().linear_gradient(of_patches, patches, (of_weight, of_bias), adds=False)
            of_weight = of_weight.reshape(ctx.shape)
        of_positions = gradient.sum(dim=0, keepdim=True)
        return (
            None,
            of_positions,
            of_positions[:, :1].clone() if ctx.first else None,
            of_weight,
            of_bias,
        )
