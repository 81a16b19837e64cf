"""Our kernels against torch's own layers in double precision, and the model with them against the model without."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import crossvit
from crossvit.fast import sublayers
from crossvit.fast.accelerate import accelerate
from crossvit.fast.cross_attention import read, read_normalised
from crossvit.fast.eligibility import (
    why_no_attention_kernel,
    why_no_patch_kernel,
    why_no_resize_kernel,
)
from crossvit.fast.native import build as module
from crossvit.fast.native.bindings import NAMES, FusedNorm, Linear, Norm
from crossvit.fast.native.build import native, without_kernels
from crossvit.fast.patch_embed import fast_resize, patch_tokens
from crossvit.fast.resize import bicubic
from crossvit.fast.self_attention import native_attention
from crossvit.fast.sublayers import Sublayer, attention_sublayer, mlp_sublayer
from crossvit.model.attention import SelfAttention, attention_kernel
from support.kernels import CONFIG, NEAR, error, exact_attention, needs_kernels, needs_layers
from support.models import lively


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"),
    [
        (1, 1, 1, 16),
        (2, 17, 2, 32),
        (3, 48, 1, 48),
        (1, 197, 4, 64),
        (2, 401, 1, 32),
        (1, 600, 1, 16),
        (1, 1157, 2, 64),
    ],
)
def test_attention_and_its_gradient_are_torchs(
    batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype
) -> None:
    """Every remainder of registers, of blocks of rows, and more keys than a chunk."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = 1.5 * torch.randn(batch, tokens, 3 * heads * width, generator=generator)
    given = torch.randn(batch, tokens, heads * width, generator=generator).to(dtype)
    qkv = qkv.to(dtype).requires_grad_()
    if why_no_attention_kernel(qkv, heads):
        pytest.skip(f"no {dtype} in this processor")
    wide = qkv.detach().double().requires_grad_()
    ours, exact = native_attention(qkv, heads), exact_attention(wide, heads)
    (ours_gradient,) = torch.autograd.grad(ours, qkv, given)
    (exact_gradient,) = torch.autograd.grad(exact, wide, given.double())
    assert error(ours, exact) < NEAR[dtype]
    assert (
        error(ours_gradient, exact_gradient) < NEAR[dtype]
        if tokens > 1
        else error(ours_gradient, exact_gradient) < 1e-6
    )


@needs_kernels
def test_scores_far_from_zero_neither_overflow_nor_vanish() -> None:
    qkv = 40 * torch.randn(1, 33, 96, generator=torch.Generator().manual_seed(0))
    qkv.requires_grad_()
    wide = qkv.detach().double().requires_grad_()
    ours, exact = native_attention(qkv, 2), exact_attention(wide, 2)
    gradients = [
        torch.autograd.grad(mixed.square().sum(), given)[0]
        for mixed, given in ((ours, qkv), (exact, wide))
    ]
    assert error(ours, exact) < 1e-4
    assert error(*gradients) < 1e-3


@needs_kernels
def test_the_number_of_threads_changes_no_bit() -> None:
    qkv, x = (
        torch.randn(3, 50, 3 * 64, requires_grad=True),
        torch.randn(3, 77, 32, requires_grad=True),
    )
    sublayer = Sublayer(
        *(
            torch.randn(size, requires_grad=True)
            for size in ((32,), (32,), (64, 32), (64,), (32, 64), (32,))
        ),
        eps=1e-6,
    )
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        mixed = native_attention(qkv, 4)
        found.append([mixed.detach(), *torch.autograd.grad(mixed.sum(), qkv)])
        if native().has_bf16:  # type: ignore[union-attr]
            mixed = mlp_sublayer(x, sublayer, None)
            found[-1] += [
                mixed.detach(),
                *torch.autograd.grad(mixed.sin().sum(), [x, *sublayer[:-1]]),
            ]
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def halves(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_is_exact_to_the_last_bit_of_bf16_over_all_its_range(dtype: torch.dtype) -> None:
    """In an MLP whose norm gives zeros, whose first layer's bias is what GELU takes and whose second layer is the identity."""
    kernels, size = native(), 512
    assert kernels is not None
    if dtype == torch.bfloat16 and not kernels.has_bf16:
        pytest.skip("this processor has no AVX-512 bf16")
    near, tiny = {torch.float32: (1e-6, 3e-7), torch.bfloat16: (1 / 256, 1e-5)}[dtype]
    zeros, identity = (
        torch.zeros(1, 1, size),
        kernels.pack(torch.eye(size), dtype, transposed=False),
    )
    norm, outward = Norm(zeros[0, 0], zeros[0, 0], 1e-6), Linear(identity, zeros[0, 0])
    for values in torch.linspace(-12, 12, 4096).to(dtype).split(size):
        inward = Linear(
            kernels.pack(torch.zeros(size, size), dtype, transposed=True), values.float()
        )
        found, hidden, _ = kernels.mlp(zeros, (norm, inward, outward), None, keeps=True)
        assert hidden is not None
        assert torch.equal(hidden[0, 0], values)
        wide = values.double().requires_grad_()
        exact = F.gelu(wide)
        assert ((found[0, 0] - exact).abs() <= near * exact.abs() + tiny).all()
        if dtype == torch.bfloat16:
            (slope,) = torch.autograd.grad(exact.sum(), wide)
            ones, statistics, packed = (
                torch.ones(1, 1, size),
                torch.zeros(1, 1, 2),
                (identity, identity),
            )
            into = (zeros.clone(), torch.zeros(size), torch.zeros(size))
            _, again, gradient = kernels.mlp_backward(
                ones, None, packed, hidden, zeros, norm=(norm.weight, statistics), grad_buffers=into
            )
            assert torch.equal(again[0, 0], found[0, 0].bfloat16())
            assert ((gradient[0, 0] - slope).abs() <= slope.abs() / 256 + 1e-4).all()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "inner"),
    [(1, 16, 32), (7, 48, 64), (65, 64, 112), (200, 80, 16), (130, 128, 256)],
)
def test_linear_layers_are_torchs(rows: int, width: int, inner: int, dtype: torch.dtype) -> None:
    """Every remainder of columns, rows and steps; a factor for each of two images."""
    kernels, generator = native(), torch.Generator().manual_seed(rows)
    assert kernels is not None
    if dtype == torch.bfloat16 and not kernels.has_bf16:
        pytest.skip("this processor has no AVX-512 bf16")
    weight, x = (
        torch.randn(inner, width, generator=generator) / math.sqrt(width),
        torch.randn(2, rows, width, generator=generator),
    )
    scale, shift, bias = (torch.randn(size, generator=generator) for size in (width, width, inner))
    norm, inward = (
        Norm(scale, shift, 1e-6),
        Linear(kernels.pack(weight, dtype, transposed=True), bias),
    )
    found, kept = kernels.norm_linear(x, norm, inward, keeps=True)
    normalised = F.layer_norm(x.double(), (width,), scale.double(), shift.double(), 1e-6)
    assert kept.normalized is not None
    assert error(kept.normalized, normalised) < NEAR[dtype]
    assert (
        error(found, F.linear(kept.normalized.double(), weight.double(), bias.double()))
        < 2 * NEAR[dtype]
    )
    assert torch.equal(found, kernels.norm_linear(x, norm, inward, keeps=False)[0])
    factor, outward = (
        torch.tensor([0.0, 2.0])[:, None, None],
        Linear(kernels.pack(weight, dtype, transposed=False), shift),
    )
    exact = x + factor.double() * (found.double() @ weight.double() + shift)
    assert error(sums := kernels.linear_residual(found, outward, x, factor), exact) < NEAR[dtype]
    assert kernels.linear_residual(found, outward, x, factor, in_place=True) is x
    assert torch.equal(x, sums)


@needs_layers
@pytest.mark.parametrize(
    ("rows", "inward", "outward"),
    [(1, 32, 48), (9, 32, 48), (301, 80, 16), (520, 48, 112), (256, 64, 16)],
)
def test_the_gradient_of_a_linear_layer_is_written_or_added(
    rows: int, inward: int, outward: int
) -> None:
    kernels, x, gradient = native(), halves(rows, inward), halves(rows, outward, seed=1)
    assert kernels is not None
    exact = (gradient.double().t() @ x.double(), gradient.double().sum(dim=0))
    for adds in (False, True):
        found = (torch.ones(outward, inward), torch.ones(outward))
        kernels.linear_backward(gradient, x, found, adds=adds)
        assert all(
            error(one - float(adds), other) < 1e-5 for one, other in zip(found, exact, strict=True)
        )


@needs_layers
@pytest.mark.parametrize(("inward", "outward"), [(16, 16), (16, 96), (112, 16), (48, 64)])
def test_the_gradient_of_a_linear_layer_has_the_same_bits_however_it_is_shared_out(
    inward: int, outward: int
) -> None:
    """Also where there are more threads than registers of rows or columns."""
    kernels, x, gradient = native(), halves(450, inward), halves(450, outward, seed=1)
    assert kernels is not None
    exact = (gradient.double().t() @ x.double(), gradient.double().sum(dim=0))
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 3, 4, 8):
        torch.set_num_threads(threads)
        found = (torch.full((outward, inward), torch.nan), torch.full((outward,), torch.nan))
        kernels.linear_backward(gradient, x, found, adds=False)
        written = [one.clone() for one in found]
        kernels.linear_backward(gradient, x, found, adds=True)
        runs.append((*written, *found))
    torch.set_num_threads(before)
    assert all(
        torch.equal(one, other) for run in runs for one, other in zip(run, runs[0], strict=True)
    )
    assert all(
        error(one, other) < 1e-5
        for one, other in zip(runs[0], [*exact, *(2 * one for one in exact)], strict=True)
    )


@needs_layers
@pytest.mark.parametrize(
    "shape", [(1, 1, 32), (1, 77, 96), (5, 40, 64), (1, 256, 32), (1, 259, 32)]
)
@pytest.mark.parametrize("has_factor", [False, True])
@pytest.mark.parametrize("which", ["attention", "mlp"])
def test_half_a_block_and_its_gradients_are_those_of_its_equation(
    which: str, has_factor: bool, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In double precision from the same numbers; several parts, the last of them smaller."""
    monkeypatch.setattr(sublayers, "PART_TOKENS", 2 * shape[1])
    generator = torch.Generator().manual_seed(shape[1])
    width, between = shape[2], {"attention": 3 * shape[2], "mlp": 2 * shape[2]}[which]
    inner = {"attention": width, "mlp": between}[which]
    sizes = [shape, (width,), (width,), (between, width), (between,), (width, inner), (width,)]
    leaves = [
        torch.randn(size, generator=generator) / (math.sqrt(size[-1]) if len(size) == 2 else 1)
        for size in sizes
    ]
    given = torch.randn(shape, generator=generator)
    factor = (
        torch.tensor([0.0, 1.25, 1.25, 0.0, 1.25])[: shape[0], None, None] if has_factor else None
    )
    sublayer = Sublayer(*(leaf.requires_grad_() for leaf in leaves[1:]), eps=1e-6)
    x = leaves[0].requires_grad_()
    ours = (
        attention_sublayer(x, sublayer, 2, factor)
        if which == "attention"
        else mlp_sublayer(x, sublayer, factor)
    )

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    hidden = F.linear(F.layer_norm(wide[0], (width,), wide[1], wide[2], 1e-6), wide[3], wide[4])
    between_them = exact_attention(hidden, 2) if which == "attention" else F.gelu(hidden)
    exact = wide[0] + F.linear(between_them, wide[5], wide[6]) * (
        1 if factor is None else factor.double()
    )
    assert ours.dtype == torch.float32
    assert error(ours, exact) < 3 * NEAR[torch.bfloat16]
    found = torch.autograd.grad(ours, leaves, given)
    for one, other in zip(found, torch.autograd.grad(exact, wide, given.double()), strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm()) < 4 * NEAR[torch.bfloat16] * float(other.norm()) + 1e-4


@needs_layers
@pytest.mark.parametrize(
    ("channels", "patch", "side", "width"),
    [(3, 12, 48, 32), (3, 16, 64, 112), (1, 4, 20, 16), (2, 40, 80, 48)],
)
@pytest.mark.parametrize("has_class_token", [False, True])
def test_patches_and_their_gradients_are_a_convolutions(
    has_class_token: bool, channels: int, patch: int, side: int, width: int
) -> None:
    """Patches narrower and wider than a register, images that are not square."""
    generator = torch.Generator().manual_seed(side)
    images = torch.randn(3, channels, side, side + 2 * patch, generator=generator)
    stem = nn.Conv2d(channels, width, patch, stride=patch)
    tokens = (side // patch) * (side // patch + 2) + has_class_token
    positions = torch.randn(1, tokens, width, generator=generator).requires_grad_()
    class_token = (
        torch.randn(1, 1, width, generator=generator).requires_grad_() if has_class_token else None
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert not why_no_patch_kernel(images, stem, class_token, positions)
        ours = patch_tokens(images, stem, class_token, positions)
    assert why_no_patch_kernel(images, stem, class_token, positions)
    leaves = [*stem.parameters(), positions, *([] if class_token is None else [class_token])]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = F.conv2d(images.double(), wide[0], wide[1], stride=patch).flatten(2).transpose(1, 2)
    exact = torch.cat((*(one.expand(3, -1, -1) for one in wide[3:]), exact), dim=1) + wide[2]
    assert ours.dtype == torch.float32
    assert error(ours, exact) < NEAR[torch.bfloat16]
    given = torch.randn(ours.shape, generator=generator)
    found = torch.autograd.grad(ours, leaves, given)
    for one, other in zip(found, torch.autograd.grad(exact, wide, given.double()), strict=True):
        assert error(one, other) < NEAR[torch.bfloat16]


@needs_layers
def test_a_stem_that_is_more_than_its_patches_is_left_to_torch() -> None:
    images, positions = torch.zeros(1, 3, 32, 32), torch.zeros(1, 5, 32)
    plain = nn.Conv2d(3, 32, 16, stride=16)
    with torch.autocast("cpu", torch.bfloat16):
        assert not why_no_patch_kernel(images, plain, positions[:, :1], positions)
        others = [
            nn.Conv2d(3, 32, 16, stride=8),
            nn.Conv2d(3, 32, 16, stride=16, padding=1),
            nn.Conv2d(3, 32, 16, 16, bias=False),
        ]
        others += [
            nn.Conv2d(3, 33, 16, stride=16),
            nn.Conv2d(3, 32, 5, stride=5),
            nn.Sequential(plain),
        ]
        assert all(
            why_no_patch_kernel(images, stem, positions[:, :1], positions) for stem in others
        )
        assert why_no_patch_kernel(
            images.clone().requires_grad_(), plain, positions[:, :1], positions
        )
        assert why_no_patch_kernel(images, plain, None, positions)  # a position too many
        assert why_no_patch_kernel(images[:, :2], plain, positions[:, :1], positions)
        assert why_no_patch_kernel(images[..., :8], plain, positions[:, :1], positions[:, :1])
        plain.register_forward_hook(lambda *_: None)
        assert why_no_patch_kernel(images, plain, positions[:, :1], positions)


@needs_kernels
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"),
    [(1, 1, 1, 16), (3, 2, 4, 32), (2, 77, 6, 96), (5, 401, 3, 144)],
)
def test_a_cross_read_and_its_gradients_are_those_of_its_equation(
    batch: int, tokens: int, heads: int, width: int, folded: bool
) -> None:
    """Tokens with a mean far from zero; heads and widths that leave remainders."""
    generator = torch.Generator().manual_seed(tokens)
    x = 2 * torch.randn(batch, tokens, width, generator=generator) + 3
    probes = torch.randn(batch, heads, width, generator=generator) / math.sqrt(width)
    leaves = [x, probes] + [
        torch.randn(size, generator=generator) for size in ((batch, width), (width,), (width,))
    ] * folded
    leaves = [leaf.requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    ours = (
        read_normalised(*leaves[:2], FusedNorm(*leaves[2:], eps=1e-6)) if folded else read(*leaves)
    )
    tokens_read = wide[0]
    if folded:
        normalised = F.layer_norm(wide[0], (width,), wide[3], wide[4], 1e-6)
        tokens_read = torch.cat((wide[2][:, None], normalised[:, 1:]), dim=1)
    exact = (wide[1] @ tokens_read.mT).softmax(dim=-1) @ tokens_read
    assert error(ours, exact) < 1e-5
    given = torch.randn(ours.shape, generator=generator)
    found = torch.autograd.grad(ours, leaves, given)
    for one, other in zip(
        found, torch.autograd.grad(exact, wide, given.double(), materialize_grads=True), strict=True
    ):
        assert float((one - other).norm()) < 2e-5 * float(other.norm()) + 1e-5
    if torch.bfloat16 in NAMES and f"cross_read_{NAMES[torch.bfloat16]}" in getattr(
        native(), "functions", {}
    ):
        with torch.no_grad():
            reduced = x.bfloat16()
            fold = FusedNorm(*leaves[2:], eps=1e-6) if folded else None
            again = read_normalised(reduced, probes, fold) if fold else read(reduced, probes)
            same = (
                read_normalised(reduced.float(), probes, fold)
                if fold
                else read(reduced.float(), probes)
            )
        torch.testing.assert_close(again, same, rtol=1e-6, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize(
    ("given", "size"),
    [
        ((240, 240), (224, 224)),
        ((36, 50), (24, 70)),
        ((4, 300), (100, 9)),
        ((17, 5), (1, 1)),
        ((8, 8), (90, 31)),
    ],
)
def test_the_resize_is_torchs_bicubic(given: tuple[int, int], size: tuple[int, int]) -> None:
    """Smaller, larger, by factors that are no ratio of small numbers, and every edge."""
    images = torch.randn(2, 3, *given, generator=torch.Generator().manual_seed(0))
    assert why_no_resize_kernel(images) is None
    exact = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
    torch.testing.assert_close(bicubic(images, size), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast_resize(images, size), exact, rtol=1e-5, atol=1e-5)
    assert why_no_resize_kernel(images.requires_grad_())


@needs_layers
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_with_them_as_without(checkpointing: bool) -> None:
    """Loss and every gradient under autocast, against fp32, are as near as torch's layers bring them."""
    model = lively(CONFIG)
    model.set_gradient_checkpointing(checkpointing)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4)

    def gradients(*, autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(images)
        found = torch.autograd.grad(
            F.cross_entropy(logits.float(), labels), list(model.parameters())
        )
        return torch.cat([gradient.flatten() for gradient in found])

    with without_kernels():
        exact, torchs = gradients(autocast=False), gradients(autocast=True)
    ours = gradients(autocast=True)
    assert not torch.equal(ours, torchs)  # they were used
    assert error(ours, exact) < 1.2 * error(torchs, exact)


@needs_kernels
def test_they_step_aside_for_whoever_traces_or_listens() -> None:
    attention = accelerate(SelfAttention(32, 2))
    x = torch.randn(2, 9, 32, requires_grad=True)
    seen: list[str] = []
    kernels = native()
    assert kernels is not None
    real = kernels.functions["attention_fp32"]
    kernels.functions["attention_fp32"] = lambda *given: seen.append("called") or real(*given)
    try:
        attention(x)
        assert seen == ["called"]
        with attention_kernel("fused"):
            attention(x)
        with without_kernels():
            attention(x)
        torch.func.vjp(attention, x.detach())
        torch.compile(attention, backend="eager", fullgraph=True)(x)
        attention.listener = lambda weights: None
        attention(x)
        attention.listener = None
        attention.attention_drop = 0.5
        attention(x)
        assert seen == ["called"]
    finally:
        kernels.functions["attention_fp32"] = real


def test_without_a_compiler_or_with_one_that_fails_torch_computes(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CROSSVIT_CACHE", str(tmp_path))
    for compiler in ("no-such-compiler", "false"):
        monkeypatch.setenv("CXX", compiler)
        module.look_again()
        assert native() is None
    model = lively(CONFIG)
    form = crossvit.optimize(model)
    assert form(torch.zeros(1, 3, 64, 64)).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(1, 3, 64, 64)).float().sum().backward()


@needs_kernels
@pytest.mark.parametrize(
    "wrong",
    [
        "attention",
        "attention_backward",
        "mlp",
        "norm_linear",
        "linear_residual",
        "cross_read",
        "cross_read_backward",
    ],
)
def test_kernels_that_were_compiled_wrong_are_not_used(
    forgotten: None, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module.look_again()
    real = getattr(module.NativeKernels, wrong)

    def off(found: object) -> object:
        return (
            tuple(map(off, found))
            if isinstance(found, tuple)
            else found * 1.1 + 0.1
            if isinstance(found, Tensor)
            else found
        )

    monkeypatch.setattr(
        module.NativeKernels, wrong, lambda self, *given, **named: off(real(self, *given, **named))
    )
    assert native() is None


@needs_kernels
def test_they_are_found_whatever_mode_the_first_caller_is_in(forgotten: None) -> None:
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        module.look_again()
        with mode:
            assert native() is not None
