"""Attention a few images at a time: equal to torch's own, forward and backward, at every way of cutting the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from crossvit.fast import chunked_attention as chunked
from crossvit.fast import eligibility, self_attention
from crossvit.fast.accelerate import accelerate
from crossvit.fast.chunked_attention import chunked_attention
from crossvit.model.attention import SelfAttention, attention_kernel
from crossvit.model.config import CrossViTConfig
from crossvit.model.presets import preset
from crossvit.train.setup import suitable_parts


def reference(qkv: Tensor, heads: int) -> Tensor:
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("part_bytes", [1, 3 * 2 * 17 * 17 * 8, 10**9])
@pytest.mark.parametrize("batch", [1, 7])
def test_values_and_gradients_are_those_of_the_fused_kernel(
    batch: int, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "PART_BYTES", part_bytes)
    generator = torch.Generator().manual_seed(batch)
    qkv = torch.randn(
        batch, 17, 3 * 2 * 8, dtype=torch.float64, generator=generator, requires_grad=True
    )
    weight = torch.randn(batch, 17, 2 * 8, dtype=torch.float64, generator=generator)
    ours, theirs = chunked_attention(qkv, 2), reference(qkv, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        *(torch.autograd.grad((mixed * weight).sum(), qkv)[0] for mixed in (ours, theirs)),
        rtol=1e-12,
        atol=1e-12,
    )
    with torch.no_grad():
        assert torch.equal(chunked_attention(qkv, 2), ours)


def test_the_gradient_is_that_of_finite_differences() -> None:
    qkv = torch.randn(2, 5, 3 * 2 * 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: chunked_attention(x, 2), qkv)


def test_self_attention_takes_it_where_the_processor_computes_in_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under autocast, with a backward pass; the figures are the fused kernel's up to bf16's rounding."""
    monkeypatch.setattr(eligibility, "HAS_BF16", True)
    taken: list[torch.dtype] = []
    monkeypatch.setattr(
        self_attention,
        "chunked_attention",
        lambda qkv, heads: taken.append(qkv.dtype) or chunked_attention(qkv, heads),
    )
    module = accelerate(SelfAttention(32, 4))
    x = torch.randn(3, 21, 32, requires_grad=True)
    results = {}
    for kernel in ("auto", "fused"):
        with attention_kernel(kernel), torch.autocast("cpu", torch.bfloat16):
            mixed = module(x)
        gradients = torch.autograd.grad(mixed.float().square().sum(), [x, *module.parameters()])
        results[kernel] = [mixed.detach().float(), *gradients]
    assert taken == [torch.bfloat16]
    for one, other in zip(results["auto"], results["fused"], strict=True):
        assert float((one - other).norm()) <= 0.02 * float(other.norm()) + 1e-6
    module.eval()(x)
    assert len(taken) == 1  # fp32 keeps the fused kernel


@pytest.mark.parametrize(
    ("name", "images", "parts"),
    [("crossvit_9_240", 16, 1), ("crossvit_9_240", 40, 3), ("crossvit_nano_64", 64, 1)],
)
def test_a_batch_of_a_large_model_is_taken_in_parts_on_a_cpu(
    name: str, images: int, parts: int
) -> None:
    config: CrossViTConfig = preset(name).config
    assert suitable_parts(config, images=images, device="cpu") == parts
    assert suitable_parts(config, images=images, device="cuda") == 1
