"""Our kernel of a cross read where something is out of the ordinary, and the module that uses it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from crossvit.fast import cross_attention
from crossvit.fast.accelerate import accelerate, decelerate
from crossvit.fast.cross_attention import read, read_normalised
from crossvit.fast.eligibility import why_no_cross_kernel
from crossvit.fast.native.bindings import FusedNorm
from crossvit.fast.native.build import native, without_kernels
from crossvit.model.attention import CrossAttention
from crossvit.model.config import BranchConfig, CrossViTConfig
from crossvit.model.fusion import CrossRead, CrossReadBlock
from support.kernels import counted, error, needs_kernels

WIDTH = 48


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with a word for every read that our kernel computes."""
    return counted(monkeypatch, cross_attention, "read", "read_normalised")


def cross_read(**changes: object) -> CrossRead:
    """A read of one block, f and g the identity: a class token (B, 1, D), tokens -> (B, 1, D)."""
    torch.manual_seed(0)
    branch = BranchConfig(patch=8, dim=WIDTH, depth=1, heads=3, mlp_ratio=2.0)
    config = CrossViTConfig(
        branches=(branch, branch),
        stages=1,
        num_classes=3,
        image_size=(32, 32),
        projection_identity=True,
        **changes,  # type: ignore[arg-type]
    )
    module = CrossRead(branch, branch, config, drop_path=0.0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return accelerate(module)


def block_of(module: CrossRead) -> CrossReadBlock:
    block = module.blocks[0]
    assert isinstance(block, CrossReadBlock)
    return block


def given(batch: int = 2, tokens: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(batch, 1, WIDTH, generator=generator), torch.randn(
        batch, tokens, WIDTH, generator=generator
    )


def as_without(block: CrossRead, query: Tensor, other: Tensor, near: float = 1e-4) -> None:
    """Output and every gradient are those without kernels."""
    found = []
    for kernels in (True, False):
        own = [query.detach().requires_grad_(), other.detach().requires_grad_()]
        leaves = [*own, *block.parameters()]
        if kernels:
            after = block(*own)
        else:
            with without_kernels():
                after = block(*own)
        found.append((after, *torch.autograd.grad(after.float().square().sum(), leaves)))
    for one, other_one in zip(*found, strict=True):
        assert one.dtype == other_one.dtype
        torch.testing.assert_close(
            one, other_one, rtol=near, atol=near * float(1 + other_one.detach().abs().max())
        )


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 2, 17, 4097])
def test_a_block_is_what_it_is_without_kernels(tokens: int, calls: list[str]) -> None:
    block = cross_read()
    as_without(block, *given(tokens=tokens))
    assert calls == ["read_normalised"]
    (after,) = torch.autograd.grad(block(*given()).sum(), [block_of(block).attention.key.bias])
    assert not after.any()


@needs_kernels
@pytest.mark.parametrize("heads", [5, 16])
def test_many_heads_and_tokens_far_from_zero_are_as_near_as_torchs_layers(heads: int) -> None:
    """A LayerNorm that is folded in takes a mean away after the product, of a thousand deviations here."""
    generator = torch.Generator().manual_seed(heads)
    x = torch.randn(2, 50, 80, generator=generator) + 1000
    first, probes = (
        torch.randn(2, 80, generator=generator),
        torch.randn(2, heads, 80, generator=generator) / 9,
    )
    weight, bias = torch.randn(2, 80, generator=generator)

    def by_torch(x: Tensor, first: Tensor, probes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        joined = torch.cat(
            (first[:, None], F.layer_norm(x, (80,), weight, bias, 1e-6)[:, 1:]), dim=1
        )
        return (probes @ joined.mT).softmax(dim=-1) @ joined

    leaves = [x, first, probes, weight, bias]
    exact = by_torch(*(leaf.double() for leaf in leaves))
    ours = read_normalised(x, probes, FusedNorm(first, weight, bias, 1e-6))
    assert error(ours, exact) < 4 * error(by_torch(*leaves), exact) + 1e-6


@needs_kernels
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [1, 5, 15, 16, 32])
def test_what_is_not_finite_in_a_token_is_seen(place: int, bad: float) -> None:
    query, other = given(tokens=33)
    other[1, place, 3] = bad
    assert cross_read()(query, other).isfinite().flatten(1).all(dim=1).tolist() == [True, False]
    probes = torch.ones(2, 2, WIDTH)
    assert read(other, probes).isfinite().flatten(1).all(dim=1).tolist() == [True, False]


@needs_kernels
def test_the_number_of_threads_changes_no_bit_and_a_graph_serves_twice() -> None:
    (first, x), parameters = given(batch=3), torch.randn(2, WIDTH)
    probes, before, found = torch.randn(3, 3, WIDTH), torch.get_num_threads(), []
    leaves = [x, probes, first[:, 0], *parameters]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            after = read_normalised(*leaves[:2], FusedNorm(*leaves[2:], 1e-6))
            loss = after.square().sum()
            once = torch.autograd.grad(loss, leaves, retain_graph=True)
            found += [(after, *once), (after, *torch.autograd.grad(loss, leaves))]
    finally:
        torch.set_num_threads(before)
    assert all(
        torch.equal(one, other)
        for rest in found[1:]
        for one, other in zip(found[0], rest, strict=True)
    )


CHANGES: dict[str, Callable[[CrossReadBlock], object]] = {
    "a hook on the attention": lambda block: block.attention.register_forward_hook(
        lambda module, given, out: 2 * out
    ),
    "a hook on the norm": lambda block: block.norm.register_forward_hook(
        lambda module, given, out: 2 * out
    ),
    "a norm without a bias": lambda block: setattr(block, "norm", nn.LayerNorm(WIDTH, bias=False)),
    "a norm without weights": lambda block: setattr(
        block, "norm", nn.LayerNorm(WIDTH, elementwise_affine=False)
    ),
    "another forward": lambda block: setattr(
        block.attention, "forward", lambda x: x[:, :1] + x.mean()
    ),
    "attention of another kind": lambda block: setattr(
        block, "attention", nn.Sequential(block.attention)
    ),
    "doubles": lambda block: block.double(),
}


@needs_kernels
@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_is_not_as_built_is_computed_as_it_is(change: str, calls: list[str]) -> None:
    block = cross_read()
    CHANGES[change](block_of(block))
    dtype = torch.float64 if change == "doubles" else torch.float32
    query, other = (tokens.to(dtype) for tokens in given())
    with torch.no_grad():
        found = block(query, other)
        joined = block_of(block).norm(torch.cat((query, other[:, 1:]), dim=1))
        expected = query + block_of(block).attention(joined)
    torch.testing.assert_close(found, expected)
    assert "read_normalised" not in calls


@needs_kernels
def test_a_hook_on_every_module_sees_norm_and_attention() -> None:
    block, seen = cross_read(), []
    handle = register_module_forward_hook(lambda module, given, out: seen.append(type(module)))
    try:
        block(*given())
    finally:
        handle.remove()
    assert seen.count(nn.LayerNorm) == 1
    assert any(issubclass(kind, CrossAttention) for kind in seen)


@needs_kernels
def test_shapes_that_do_not_fit_are_refused_as_the_plain_module_does() -> None:
    block, (query, other) = cross_read(), given()
    for wrong in ((query[:1], other), (query, torch.randn(2, 9, 2 * WIDTH))):
        for module in (block, decelerate(cross_read())):
            with pytest.raises(RuntimeError):
                module(*wrong)


@needs_kernels
def test_tokens_that_are_not_dense_and_no_images_at_all() -> None:
    block, (query, other) = cross_read(), given()
    assert why_no_cross_kernel(other[:, :1])
    as_without(block, query, other[:, :1])
    as_without(block, *(given(tokens=18)[0], given(tokens=18)[1][:, ::2]))
    assert block(query[:0], other[:0]).shape == (0, 1, WIDTH)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_reduced_models(dtype: torch.dtype) -> None:
    block, (query, other) = cross_read(), given()
    exact = block(query, other)
    with torch.autocast("cpu", dtype):
        as_without(block, query, other, near=5e-2)
        with torch.no_grad():
            assert error(block(query, other), exact) < 2e-2
            wide = cross_read().double()(
                query.double(), other.double()
            )  # autocast leaves doubles alone
    assert wide.dtype == torch.float64
    assert error(wide, exact) < 1e-5
    reduced = block.to(dtype)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            assert error(reduced(query.to(dtype), other.to(dtype)), exact) < 3e-2


@needs_kernels
@pytest.mark.parametrize("frozen", ["norm", "query", "key", "value"])
def test_what_is_frozen_changes_no_other_gradient(frozen: str) -> None:
    block, whole = cross_read(), cross_read()
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(frozen not in name)
    for one in (block, whole):
        one(*given()).square().sum().backward()
    for (name, own), other in zip(block.named_parameters(), whole.parameters(), strict=True):
        assert (own.grad is None) == (frozen in name)
        assert own.grad is None or torch.equal(own.grad, other.grad)  # type: ignore[arg-type]


@needs_kernels
def test_it_steps_aside_for_whoever_traces_transforms_listens_or_drops(calls: list[str]) -> None:
    block, (query, other) = cross_read(), given()
    expected = block(query, other)
    calls.clear()
    found = [
        torch.compile(block, backend="eager", fullgraph=True)(query, other),
        torch.func.vjp(block, query, other)[0],
    ]
    block_of(block).attention.listener = lambda weights: None
    found.append(block(query, other))
    block_of(block).attention.listener = None
    block_of(block).attention.keys_values = "materialised"
    found.append(block(query, other))
    block_of(block).attention.keys_values = "lazy"
    found.append(torch.export.export(block, (query, other)).module()(query, other))
    block_of(block).attention.attention_drop.p = 0.5
    block(query, other)
    assert not calls
    assert native() is not None
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)
