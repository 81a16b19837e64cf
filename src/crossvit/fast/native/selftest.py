"""Compares compiled kernels with torch on small inputs, without autograd: it would load sympy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crossvit.fast.native.bindings import NAMES, FusedNorm, Linear, NativeKernels, Norm


def check(kernels: NativeKernels) -> None:
    """Compares every kernel with torch.

    Raises:
        RuntimeError: A kernel gives other numbers.
    """
    tokens, heads, width = 19, 2, 32
    plain: dict[str, Any] = {
        "dtype": torch.float32,
        "device": "cpu",
    }  # whatever torch's defaults are set to
    exact_qkv = (
        torch.linspace(-1, 1, tokens * 3 * width, **plain).sin().reshape(1, tokens, 3 * width)
    )
    grad_out = torch.linspace(1, -1, tokens * width, **plain).cos().reshape(1, tokens, width)
    query, key, value = exact_qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (query @ key.mT).softmax(dim=-1)
    exact = (weights @ value).transpose(1, 2).flatten(2)
    grad_context = grad_out.unflatten(-1, (heads, -1)).transpose(
        1, 2
    )  # autograd would load the compiler's mathematics
    grad_weights = grad_context @ value.mT
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True))
    grad_heads = torch.stack(
        (grad_scores @ key, grad_scores.mT @ query, weights.mT @ grad_context)
    )  # (3, B, H, N, K)
    exact_grad = grad_heads.permute(1, 3, 0, 2, 4).flatten(2)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        qkv = exact_qkv.to(dtype)
        if not kernels.takes(qkv, heads):
            continue
        log_sums = grad_out.new_empty(1, heads, tokens)
        context = kernels.attention(qkv, heads, log_sums=log_sums)
        gradient = kernels.attention_backward(qkv, context, grad_out.to(dtype), log_sums, scale=1.0)
        _near(f"attention in {dtype}", context, exact, near)
        _near(f"the gradient of attention in {dtype}", gradient, exact_grad, near)
    probes, ones = grad_out[:, :heads], grad_out.new_ones(width)
    exact = (probes @ grad_out.mT).softmax(dim=-1) @ grad_out
    context, saved = kernels.cross_read(grad_out, probes, None)
    _near("cross-attention", context, exact, 1e-5)
    weights, grad_context = (probes @ grad_out.mT).softmax(dim=-1), probes.cos()
    grad_weights = grad_context @ grad_out.mT
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True))
    grad_x, grad_probes, *_ = kernels.cross_read_backward(
        grad_out, probes, None, saved, grad_context
    )
    _near(
        "the gradient of cross-attention",
        grad_x,
        grad_scores.mT @ probes + weights.mT @ grad_context,
        1e-4,
    )
    _near("the gradient of its probes", grad_probes, grad_scores @ grad_out, 1e-4)
    normalised = torch.cat(
        (ones.expand(1, 1, -1), F.layer_norm(grad_out, (width,), ones, ones, 1e-6)[:, 1:]), dim=1
    )
    exact = (probes @ normalised.mT).softmax(dim=-1) @ normalised
    folded, _ = kernels.cross_read(grad_out, probes, FusedNorm(ones[None], ones, ones, 1e-6))
    _near("cross-attention of a LayerNorm", folded, exact, 1e-3)  # of tokens that hardly vary
    if "cross_read_bf16" in kernels.functions:
        reduced = grad_out.bfloat16()
        exact, _ = kernels.cross_read(reduced.float(), probes, None)
        _near("cross-attention in bf16", kernels.cross_read(reduced, probes, None)[0], exact, 1e-5)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        if f"mlp_{NAMES[dtype]}" in kernels.functions:
            _check_sublayers(
                kernels,
                torch.arange(tokens * width, **plain).sin().reshape(grad_out.shape),
                dtype,
                near,
            )
    if kernels.has_bf16:
        x = grad_out[0].bfloat16()
        found = (
            x.new_empty(width, width, dtype=torch.float32),
            x.new_empty(width, dtype=torch.float32),
        )
        kernels.linear_backward(x, x, found, adds=False)
        _near("the gradient of a weight", found[0], x.float().t() @ x.float(), 1e-4)
        _near("the gradient of a bias", found[1], x.float().sum(dim=0), 1e-4)


def _check_sublayers(kernels: NativeKernels, x: Tensor, dtype: torch.dtype, near: float) -> None:
    width = x.shape[-1]
    weight, bias = x[0, :16].cos() / width, x[0, 0, :16]
    norm = Norm(x.new_ones(width), x.new_zeros(width), 1e-6)
    linear_in = Linear(kernels.pack(weight, dtype, transposed=True), bias)
    linear_out = Linear(kernels.pack(weight, dtype, transposed=False), norm.bias)
    hidden = F.linear(F.layer_norm(x, (width,), eps=norm.eps), weight, bias)
    found, _ = kernels.norm_linear(x, norm, linear_in, keeps=False)
    _near(f"a linear layer of a LayerNorm in {dtype}", found, hidden, near)
    _near(
        f"a residual in {dtype}",
        kernels.linear_residual(hidden.to(dtype), linear_out, x, None),
        x + hidden @ weight,
        near,
    )
    images, patch = x.flatten()[: 2 * 12 * 20].reshape(1, 2, 12, 20), 4
    filters = x.flatten()[:512].reshape(16, 2, patch, patch)
    stem, positions = (
        Linear(kernels.pack(filters.flatten(1), dtype, transposed=True), bias),
        x.new_ones(1, 16, 16),
    )
    patches, _ = kernels.patch_tokens(images, stem, patch, positions, first=1, keeps=False)
    exact = F.conv2d(images, filters, bias, stride=patch).flatten(2).transpose(1, 2) + 1
    _near(f"patches in {dtype}", patches[:, 1:], exact, near)
    found, taken, saved = kernels.mlp(
        x, (norm, linear_in, linear_out), None, keeps=dtype == torch.bfloat16
    )
    _near(f"an MLP in {dtype}", found, x + F.gelu(hidden) @ weight, near)
    if taken is None or saved.statistics is None:
        return
    grad_out, packed, saved_norm = (
        x.cos(),
        (linear_in.packed, linear_out.packed),
        (norm.weight, saved.statistics),
    )
    into = (torch.empty_like(x), torch.zeros_like(norm.weight), torch.zeros_like(norm.bias))
    _, _, grad_hidden = kernels.mlp_backward(
        grad_out, None, packed, taken, x, norm=saved_norm, grad_buffers=into
    )
    exact = torch.ops.aten.gelu_backward(grad_out @ weight.t(), hidden)
    _near("the gradient of GELU", grad_hidden, exact, near)
    means = saved.statistics.movedim(-1, 0).contiguous()
    exact, *grad_parameters = torch.ops.aten.native_layer_norm_backward(
        exact @ weight, x, [width], *means, *norm[:2], [True] * 3
    )
    for name, one, other in zip(
        ("x", "scale", "shift"), into, (grad_out + exact, *grad_parameters), strict=True
    ):
        _near(f"the gradient of an MLP's {name}", one, other, near)
    again = tuple(torch.zeros_like(one) for one in into)
    kernels.norm_linear_backward(
        grad_hidden, linear_out.packed, grad_out, x, norm=saved_norm, grad_buffers=again
    )
    _near("the gradient of a LayerNorm", again[0], into[0], near)
    _near(
        "the gradient of a residual",
        kernels.linear_residual_backward(grad_out, None, linear_in.packed)[1],
        grad_out @ weight.t(),
        near,
    )


def _near(name: str, found: Tensor, exact: Tensor, near: float) -> None:
    if not torch.allclose(
        found.float(), exact, rtol=near, atol=near * max(1.0, float(exact.abs().max()))
    ):
        raise RuntimeError(f"compiled wrongly: {name}")
