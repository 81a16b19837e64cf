"""Each native kernel against the scalar reference above it in the C++, on the same numbers.

A bf16 kernel is compared with the reference, which is fp32, of its inputs rounded to bf16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossvit.fast.native.bindings import (
    ARGUMENTS,
    FusedNorm,
    Linear,
    NativeKernels,
    Norm,
    SavedNorm,
)
from crossvit.fast.native.build import native
from crossvit.fast.resize import _taps
from support.kernels import NEAR, error, needs_kernels, needs_layers

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(2, 17, 32, 48), (3, 67, 96, 176), (1, 5, 64, 16), (2, 1, 112, 64)]  # B, N, D, F

pytestmark = needs_kernels


def kernels_and_reference(
    dtype: torch.dtype = torch.float32,
) -> tuple[NativeKernels, NativeKernels]:
    kernels = native()
    assert kernels is not None
    if dtype == torch.bfloat16 and not kernels.has_bf16:
        pytest.skip("this processor has no AVX-512 bf16")
    return kernels, NativeKernels(kernels.library, reference=True)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def rounded(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """fp32 numbers that `dtype` holds exactly."""
    return normal(*shape, dtype=dtype, seed=seed).float()


def assert_near(outputs: tuple[Tensor, ...], references: tuple[Tensor, ...], near: float) -> None:
    for index, (output, reference) in enumerate(zip(outputs, references, strict=True)):
        assert error(output, reference) < near, index


def test_every_kernel_has_a_reference_and_every_struct_the_size_of_the_librarys() -> None:
    kernels, reference = kernels_and_reference()
    assert set(reference.functions) == {f"{kernel}_fp32" for kernel in ARGUMENTS}
    assert kernels.library.arguments_size(b"unknown") == -1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"), [(1, 1, 1, 16), (2, 17, 2, 32), (1, 530, 1, 16)]
)
def test_attention(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    kernels, reference = kernels_and_reference(dtype)
    qkv = 1.5 * normal(batch, tokens, 3 * heads * width)
    qkv, scale = qkv.to(dtype), width**-0.5
    log_sums, exact_log_sums = (torch.empty(batch, heads, tokens) for _ in range(2))
    context = kernels.attention(qkv, heads, scale=scale, log_sums=log_sums)
    exact = reference.attention(qkv.float(), heads, scale=scale, log_sums=exact_log_sums)
    assert_near((context, log_sums), (exact, exact_log_sums), NEAR[dtype])
    grad = normal(*context.shape, dtype=dtype)
    grad_qkv = kernels.attention_backward(qkv, context, grad, log_sums, scale=scale)
    exact_grad_qkv = reference.attention_backward(
        qkv.float(), context.float(), grad.float(), exact_log_sums, scale=scale
    )
    size = width * heads  # a lone token has gradients of its values alone
    compared = slice(2 * size, None) if tokens == 1 else slice(None)
    assert_near((grad_qkv[..., compared],), (exact_grad_qkv[..., compared],), 2 * NEAR[dtype])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(16, 16), (48, 112), (64, 64), (80, 32)])
def test_pack_is_a_layout(rows: int, cols: int, transposed: bool) -> None:
    kernels, reference = kernels_and_reference()
    weight = normal(rows, cols)
    packed = kernels.pack(weight, torch.float32, transposed=transposed)
    assert torch.equal(packed, reference.pack(weight, torch.float32, transposed=transposed))


@needs_layers
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    ("rows", "in_dim", "out_dim"), [(1, 16, 16), (197, 48, 112), (500, 96, 32)]
)
def test_the_backward_pass_of_a_linear_layer(
    rows: int, in_dim: int, out_dim: int, adds: bool
) -> None:
    kernels, reference = kernels_and_reference(torch.bfloat16)
    grad, x = (normal(rows, size, dtype=torch.bfloat16) for size in (out_dim, in_dim))
    grads = normal(out_dim, in_dim), normal(out_dim)
    exact = grads[0].clone(), grads[1].clone()
    kernels.linear_backward(grad, x, grads, adds=adds)
    reference.linear_backward(grad.float(), x.float(), exact, adds=adds)
    assert_near(grads, exact, 1e-5)


class Sublayer:
    """A LayerNorm and two linear layers for the kernels and for the references."""

    def __init__(
        self, width: int, hidden_dim: int, dtype: torch.dtype, kernels: NativeKernels
    ) -> None:
        self.norm = Norm(normal(width), normal(width, seed=1), 1e-6)
        self.up = rounded(dtype, hidden_dim, width) / 8
        self.down = rounded(dtype, width, hidden_dim) / 8
        self.exact = Linear(self.up, normal(hidden_dim)), Linear(self.down, normal(width))
        self.packed = tuple(
            Linear(kernels.pack(linear.packed, dtype, transposed=True), linear.bias)
            for linear in self.exact
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_scale", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "width", "hidden_dim"), SHAPES)
def test_layers_of_a_sublayer(
    batch: int, tokens: int, width: int, hidden_dim: int, has_scale: bool, dtype: torch.dtype
) -> None:
    kernels, reference = kernels_and_reference(dtype)
    layers = Sublayer(width, hidden_dim, dtype, kernels)
    x, scale = normal(batch, tokens, width), normal(batch, 1, 1) if has_scale else None
    hidden, saved = kernels.norm_linear(x, layers.norm, layers.packed[0], keeps=True)
    exact, exact_saved = reference.norm_linear(x, layers.norm, layers.exact[0], keeps=True)
    assert_near((hidden, *present(saved)), (exact, *present(exact_saved)), NEAR[dtype])
    out = kernels.linear_residual(hidden, layers.packed[1], x, scale)
    exact = reference.linear_residual(hidden.float(), layers.exact[1], x, scale)
    assert_near((out,), (exact,), NEAR[dtype])
    out, hidden, saved = kernels.mlp(x, (layers.norm, *layers.packed), scale, keeps=True)
    exact, exact_hidden, exact_saved = reference.mlp(
        x, (layers.norm, *layers.exact), scale, keeps=True
    )
    assert hidden is not None
    assert exact_hidden is not None
    assert_near(
        (out, hidden, *present(saved)),
        (exact, exact_hidden, *present(exact_saved)),
        2 * NEAR[dtype],
    )


def present(saved: SavedNorm) -> tuple[Tensor, Tensor]:
    assert saved.normalized is not None
    assert saved.statistics is not None
    return saved.normalized, saved.statistics


@needs_layers
@pytest.mark.parametrize("has_scale", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "width", "hidden_dim"), SHAPES)
def test_the_backward_pass_of_a_sublayer(
    batch: int, tokens: int, width: int, hidden_dim: int, has_scale: bool
) -> None:
    dtype = torch.bfloat16
    kernels, reference = kernels_and_reference(dtype)
    layers = Sublayer(width, hidden_dim, dtype, kernels)
    up, down = (
        kernels.pack(weight, dtype, transposed=False) for weight in (layers.up, layers.down)
    )
    x, grad_out = normal(batch, tokens, width), normal(batch, tokens, width, seed=1)
    scale = normal(batch, 1, 1) if has_scale else None
    _, hidden, saved = kernels.mlp(x, (layers.norm, *layers.packed), scale, keeps=True)
    assert hidden is not None
    norm = layers.norm.weight, present(saved)[1]

    outputs = kernels.linear_residual_backward(grad_out, scale, down)
    exact = reference.linear_residual_backward(grad_out, scale, layers.down)
    assert_near(outputs, exact, 2 * NEAR[dtype])

    grad_hidden = outputs[1]
    buffers, exact_buffers = (
        (torch.empty_like(x), normal(width), normal(width, seed=1)) for _ in range(2)
    )
    kernels.norm_linear_backward(grad_hidden, up, grad_out, x, norm=norm, grad_buffers=buffers)
    reference.norm_linear_backward(
        grad_hidden.float(), layers.up, grad_out, x, norm=norm, grad_buffers=exact_buffers
    )
    assert_near(buffers, exact_buffers, NEAR[dtype])

    outputs = kernels.mlp_backward(
        grad_out, scale, (down, up), hidden, x, norm=norm, grad_buffers=buffers
    )
    exact = reference.mlp_backward(
        grad_out,
        scale,
        (layers.down, layers.up),
        hidden.float(),
        x,
        norm=norm,
        grad_buffers=exact_buffers,
    )
    assert_near((*outputs, *buffers), (*exact, *exact_buffers), 2 * NEAR[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "patch", "dim", "first"), [(3, 12, 48, 1), (4, 4, 32, 0)])
def test_patches_as_tokens(
    channels: int, patch: int, dim: int, first: int, dtype: torch.dtype
) -> None:
    kernels, reference = kernels_and_reference(dtype)
    images = rounded(dtype, 2, channels, 4 * patch, 3 * patch)
    weight, bias = rounded(dtype, dim, channels * patch**2), normal(dim)
    positions = normal(1, first + 12, dim)
    stem = Linear(kernels.pack(weight, dtype, transposed=True), bias)
    tokens, patches = kernels.patch_tokens(images, stem, patch, positions, first=first, keeps=True)
    exact, exact_patches = reference.patch_tokens(
        images, Linear(weight, bias), patch, positions, first=first, keeps=True
    )
    assert patches is not None
    assert exact_patches is not None
    assert torch.equal(patches.float(), exact_patches)
    assert_near((tokens[:, first:],), (exact[:, first:],), NEAR[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "heads"), [(2, 9, 48, 3), (1, 197, 96, 5), (2, 17, 80, 4)]
)
def test_a_cross_read(
    batch: int, tokens: int, width: int, heads: int, has_norm: bool, dtype: torch.dtype
) -> None:
    kernels, reference = kernels_and_reference(dtype)
    x, probes = normal(batch, tokens, width, dtype=dtype), normal(batch, heads, width) / 4
    norm = FusedNorm(normal(batch, width), normal(width), normal(width, seed=1), 1e-6)
    fused = norm if has_norm else None
    context, saved = kernels.cross_read(x, probes, fused)
    exact, exact_saved = reference.cross_read(x.float(), probes, fused)
    if not has_norm:  # the statistics of nothing: mean 0, rstd 1
        assert torch.equal(saved[2], exact_saved[2])
    start = int(has_norm)  # of the first token, the score is the first dot
    weights, dots, _, moments = saved
    exact_weights, exact_dots, _, exact_moments = exact_saved
    assert_near(
        (context, weights, dots[..., start:], moments),
        (exact, exact_weights, exact_dots[..., start:], exact_moments),
        1e-5,
    )
    if dtype == torch.float32:
        grad = normal(batch, heads, width, seed=1)
        grads = kernels.cross_read_backward(x, probes, fused, saved, grad)
        exact_grads = reference.cross_read_backward(x, probes, fused, exact_saved, grad)
        pairs = [(a, b) for a, b in zip(grads, exact_grads, strict=True) if a is not None]
        assert len(pairs) == (5 if has_norm else 2)
        for index, (a, b) in enumerate(pairs):
            assert b is not None
            assert error(a, b) < 1e-5, index


@pytest.mark.parametrize(
    ("image", "size"), [((50, 37), (224, 224)), ((96, 80), (40, 53)), ((4, 5), (7, 3))]
)
def test_a_bicubic_resize(image: tuple[int, int], size: tuple[int, int]) -> None:
    kernels, reference = kernels_and_reference()
    planes = normal(2, 3, *image)
    taps = _taps(image[0], size[0]), _taps(image[1], size[1])
    out = kernels.resize(planes, size, *taps)
    assert_near((out,), (reference.resize(planes, size, *taps),), NEAR[torch.float32])
