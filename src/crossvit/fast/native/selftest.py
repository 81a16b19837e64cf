"""Whether compiled kernels compute what they should, on small inputs. Without autograd, which would load sympy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crossvit.fast.native.bindings import NAMES, Fold, Linear, Native, Norm


def check(kernels: Native) -> None:
    """RuntimeError if what was compiled does not compute what it should."""
    tokens, heads, width = 19, 2, 32
    plain: dict[str, Any] = {
        "dtype": torch.float32,
        "device": "cpu",
    }  # whatever torch's defaults are set to
    exact_qkv = (
        torch.linspace(-1, 1, tokens * 3 * width, **plain).sin().reshape(1, tokens, 3 * width)
    )
    given = torch.linspace(1, -1, tokens * width, **plain).cos().reshape(1, tokens, width)
    query, key, value = exact_qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (query @ key.mT).softmax(dim=-1)
    exact = (weights @ value).transpose(1, 2).flatten(2)
    of_mixed = given.unflatten(-1, (heads, -1)).transpose(
        1, 2
    )  # autograd would load the compiler's mathematics
    of_weights = of_mixed @ value.mT
    of_scores = weights * (of_weights - (weights * of_weights).sum(dim=-1, keepdim=True))
    of_heads = torch.stack(
        (of_scores @ key, of_scores.mT @ query, weights.mT @ of_mixed)
    )  # (3, B, H, N, K)
    exact_gradient = of_heads.permute(1, 3, 0, 2, 4).flatten(2)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        qkv = exact_qkv.to(dtype)
        if not kernels.takes(qkv, heads):
            continue
        log_sums = given.new_empty(1, heads, tokens)
        mixed = kernels.attention(qkv, heads, log_sums=log_sums)
        gradient = kernels.attention_gradient(qkv, mixed, given.to(dtype), log_sums, scale=1.0)
        _near(f"attention in {dtype}", mixed, exact, near)
        _near(f"the gradient of attention in {dtype}", gradient, exact_gradient, near)
    probes, ones = given[:, :heads], given.new_ones(width)
    exact = (probes @ given.mT).softmax(dim=-1) @ given
    mixed, kept = kernels.cross_read(given, probes, None)
    _near("cross-attention", mixed, exact, 1e-5)
    weights, of_mixed = (probes @ given.mT).softmax(dim=-1), probes.cos()
    of_weights = of_mixed @ given.mT
    of_scores = weights * (of_weights - (weights * of_weights).sum(dim=-1, keepdim=True))
    of_x, of_probes, *_ = kernels.cross_read_gradient(given, probes, None, kept, of_mixed)
    _near(
        "the gradient of cross-attention", of_x, of_scores.mT @ probes + weights.mT @ of_mixed, 1e-4
    )
    _near("the gradient of its probes", of_probes, of_scores @ given, 1e-4)
    normalised = torch.cat(
        (ones.expand(1, 1, -1), F.layer_norm(given, (width,), ones, ones, 1e-6)[:, 1:]), dim=1
    )
    exact = (probes @ normalised.mT).softmax(dim=-1) @ normalised
    folded, _ = kernels.cross_read(given, probes, Fold(ones[None], ones, ones, 1e-6))
    _near("cross-attention of a LayerNorm", folded, exact, 1e-3)  # of tokens that hardly vary
    if "cross_read_bf16" in kernels.functions:
        reduced = given.bfloat16()
        exact, _ = kernels.cross_read(reduced.float(), probes, None)
        _near("cross-attention in bf16", kernels.cross_read(reduced, probes, None)[0], exact, 1e-5)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        if f"mlp_{NAMES[dtype]}" in kernels.functions:
            _check_halves(
                kernels,
                torch.arange(tokens * width, **plain).sin().reshape(given.shape),
                dtype,
                near,
            )
    if kernels.has_bf16:
        x = given[0].bfloat16()
        found = (
            x.new_empty(width, width, dtype=torch.float32),
            x.new_empty(width, dtype=torch.float32),
        )
        kernels.linear_gradient(x, x, found, adds=False)
        _near("the gradient of a weight", found[0], x.float().t() @ x.float(), 1e-4)
        _near("the gradient of a bias", found[1], x.float().sum(dim=0), 1e-4)


def _check_halves(kernels: Native, x: Tensor, dtype: torch.dtype, near: float) -> None:
    width = x.shape[-1]
    weight, bias = x[0, :16].cos() / width, x[0, 0, :16]
    norm = Norm(x.new_ones(width), x.new_zeros(width), 1e-6)
    inward = Linear(kernels.pack(weight, dtype, transposed=True), bias)
    outward = Linear(kernels.pack(weight, dtype, transposed=False), norm.bias)
    hidden = F.linear(F.layer_norm(x, (width,), eps=norm.eps), weight, bias)
    found, _ = kernels.norm_linear(x, norm, inward, keeps=False)
    _near(f"a linear layer of a LayerNorm in {dtype}", found, hidden, near)
    _near(
        f"a residual in {dtype}",
        kernels.linear_residual(hidden.to(dtype), outward, x, None),
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
    found, taken, kept = kernels.mlp(
        x, (norm, inward, outward), None, keeps=dtype == torch.bfloat16
    )
    _near(f"an MLP in {dtype}", found, x + F.gelu(hidden) @ weight, near)
    if taken is None or kept.statistics is None:
        return
    given, packed, of_norm = (
        x.cos(),
        (inward.packed, outward.packed),
        (norm.weight, kept.statistics),
    )
    into = (torch.empty_like(x), torch.zeros_like(norm.weight), torch.zeros_like(norm.bias))
    _, _, of_hidden = kernels.mlp_gradient(given, None, packed, taken, x, norm=of_norm, found=into)
    exact = torch.ops.aten.gelu_backward(given @ weight.t(), hidden)
    _near("the gradient of GELU", of_hidden, exact, near)
    means = kept.statistics.movedim(-1, 0).contiguous()
    exact, *of_parameters = torch.ops.aten.native_layer_norm_backward(
        exact @ weight, x, [width], *means, *norm[:2], [True] * 3
    )
    for name, one, other in zip(
        ("x", "scale", "shift"), into, (given + exact, *of_parameters), strict=True
    ):
        _near(f"the gradient of an MLP's {name}", one, other, near)
    again = tuple(torch.zeros_like(one) for one in into)
    kernels.norm_linear_gradient(of_hidden, outward.packed, given, x, norm=of_norm, found=again)
    _near("the gradient of a LayerNorm", again[0], into[0], near)
    _near(
        "the gradient of a residual",
        kernels.linear_residual_gradient(given, None, inward.packed)[1],
        given @ weight.t(),
        near,
    )


def _near(name: str, found: Tensor, exact: Tensor, near: float) -> None:
    if not torch.allclose(
        found.float(), exact, rtol=near, atol=near * max(1.0, float(exact.abs().max()))
    ):
        raise RuntimeError(f"compiled wrongly: {name}")
