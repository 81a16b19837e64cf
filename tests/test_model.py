"""The model's mathematics: twins that must agree and properties that must hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from crossvit import BranchConfig, CrossViTConfig, create_model
from crossvit.model.attention import CrossAttention, attention
from crossvit.model.crossvit import CrossViT
from crossvit.model.drop_path import DropPath, drop_path_rates

SMALL = CrossViTConfig(
    image_size=(24, 36),
    num_classes=5,
    stages=2,
    branches=(
        BranchConfig(patch=4, dim=16, heads=2, depth=1, tokeniser="halving"),
        BranchConfig(patch=6, dim=24, heads=3, depth=2, image_scale=0.9),
    ),
)


def papers_cross_attention(module: CrossAttention, x: Tensor) -> Tensor:
    """Equation 6 as printed, keys and values built for every token."""
    batch, _, dim = x.shape
    shape = (batch, -1, module.num_heads, dim // module.num_heads)
    query = module.query(x[:, :1]).reshape(shape).transpose(1, 2)
    key = module.key(x).reshape(shape).transpose(1, 2)
    value = module.value(x).reshape(shape).transpose(1, 2)
    weights = (query @ key.transpose(-2, -1) / (dim // module.num_heads) ** 0.5).softmax(dim=-1)
    return module.out((weights @ value).transpose(1, 2).reshape(batch, 1, dim))


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_lazy_cross_attention_equals_the_papers(tokens: int) -> None:
    torch.manual_seed(0)
    module = CrossAttention(24, 3).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, tokens, 24, dtype=torch.float64, requires_grad=True)
    results = []
    for form in (module, lambda x: papers_cross_attention(module, x)):
        output = form(x)
        inputs = [x, *module.parameters()]
        results.append((output, torch.autograd.grad(output.square().sum(), inputs)))
    (lazy, lazy_gradients), (paper, paper_gradients) = results
    assert lazy.shape == (2, 1, 24)
    torch.testing.assert_close(lazy, paper, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(lazy_gradients, paper_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_attention_dropout_scales_the_value_bias_with_what_is_kept() -> None:
    torch.manual_seed(0)
    module = CrossAttention(8, 2, attention_drop=0.5).double().train()
    with torch.no_grad():
        module.value.weight.zero_()
        module.value.bias.fill_(1.0)
        module.out.weight.copy_(torch.eye(8))
        module.out.bias.zero_()
    outputs = torch.cat([module(torch.randn(64, 5, 8, dtype=torch.float64)) for _ in range(50)])
    assert outputs.std() > 0.1  # a constant 1 would mean that the dropped weights were forgotten
    assert abs(outputs.mean() - 1.0) < 0.05


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_attention_kernels_agree_in_reduced_precision(needs_gradient: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 50, 16).bfloat16().requires_grad_(needs_gradient).unbind(0)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    torch.testing.assert_close(attention(query, key, value).double(), exact, rtol=0.03, atol=0.03)


def test_patches_in_another_order_change_nothing_without_positions() -> None:
    torch.manual_seed(0)
    model = CrossViT(SMALL).double().eval()
    tokens = [torch.randn(2, 1 + 6 * 9, 16, dtype=torch.float64), torch.randn(2, 1 + 4 * 5, 24, dtype=torch.float64)]
    shuffled = [torch.cat((own[:, :1], own[:, 1:][:, torch.randperm(own.shape[1] - 1)]), dim=1) for own in tokens]
    for encoder in model.encoders:
        tokens, shuffled = encoder(tokens), encoder(shuffled)
    for own, other in zip(tokens, shuffled, strict=True):
        torch.testing.assert_close(own[:, 0], other[:, 0], rtol=1e-10, atol=1e-10)


def test_every_parameter_has_a_gradient_and_logits_are_the_branches_mean() -> None:
    torch.manual_seed(0)
    model = CrossViT(SMALL)
    images = torch.randn(3, 3, 24, 36)
    logits = model(images)
    logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert logits.shape == (3, 5)
    torch.testing.assert_close(model.branch_logits(images).mean(dim=0), logits)
    assert [tuple(own.shape) for own in model.forward_features(images)] == [(3, 1 + 6 * 9, 16), (3, 1 + 4 * 5, 24)]


def test_each_direction_of_the_fusion_reads_the_other_branch() -> None:
    torch.manual_seed(0)
    fusion = CrossViT(SMALL).encoders[0].fusion
    tokens = [torch.randn(1, 55, 16, requires_grad=True), torch.randn(1, 21, 24, requires_grad=True)]
    small, large = fusion(tokens)
    torch.testing.assert_close(small[:, 1:], tokens[0][:, 1:])  # patches are handed on as they are
    read_by_small = torch.autograd.grad(small[:, 0].sum(), tokens, retain_graph=True)
    assert read_by_small[0][:, 1:].abs().sum() == 0
    assert read_by_small[1][:, 0].abs().sum() == 0  # the other's patches, not its class token
    assert (read_by_small[1][:, 1:].abs().sum(dim=-1) > 0).all()
    assert torch.autograd.grad(large[:, 0].sum(), tokens)[0][:, 1:].abs().sum() > 0


def test_branches_see_the_image_at_the_papers_sizes() -> None:
    for name, sizes in {
        "crossvit_9_240": [(240, 240), (224, 224)],
        "crossvit_15_dagger_408": [(408, 408), (384, 384)],
        "crossvit_pico_32": [(32, 32), (32, 32)],
    }.items():
        config = create_model(name).config
        assert [branch.image_size(config.image_size) for branch in config.branches] == sizes
    small, large = create_model("crossvit_9_240", image_size=(256, 128)).config.branches
    assert small.image_size((256, 128)) == (252, 132)  # nearest multiples of 12 to 256 and 128
    assert large.image_size((256, 128)) == (240, 112)  # nearest multiples of 16 to 238.9 and 119.5


def test_a_wide_image_goes_through() -> None:
    model = create_model("crossvit_9_240", image_size=(96, 192), num_classes=3).eval()
    assert model(torch.randn(1, 3, 96, 192)).shape == (1, 3)


def test_an_image_of_another_size_is_refused_with_the_right_one() -> None:
    with pytest.raises(ValueError, match=r"this model takes \(B, 3, 24, 36\)"):
        CrossViT(SMALL)(torch.randn(1, 3, 36, 24))


def test_drop_path_rates_grow_over_all_blocks_and_fusion_takes_the_last() -> None:
    assert drop_path_rates(0.1, 3) == pytest.approx([0.0, 0.05, 0.1])
    model = create_model("crossvit_9_240", drop_path=0.8)
    step = 0.8 / 8  # K·M = 9 blocks
    for stage, encoder in enumerate(model.encoders):
        small, large = encoder.blocks
        assert [block.drop_path.rate for block in small] == pytest.approx([step * 3 * stage])
        assert [block.drop_path.rate for block in large] == pytest.approx([step * (3 * stage + i) for i in range(3)])
        assert [read.drop_path.rate for read in encoder.fusion.reads] == pytest.approx([step * (3 * stage + 2)] * 2)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    dropped = drop(torch.ones(4000, 3, 2))
    kept = dropped[:, 0, 0] != 0
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (dropped == dropped[:, :1, :1]).all()
    assert abs(kept.float().mean() - 0.75) < 0.03
    assert drop.eval()(torch.ones(2, 2)).eq(1).all()


def test_the_papers_initialisation() -> None:
    torch.manual_seed(0)
    model = create_model("crossvit_9_240")
    block = model.encoders[0].blocks[1][0]
    for weight in (block.attention.qkv.weight, model.tokens[1].positions, model.heads[1].weight):
        assert abs(weight.std() - 0.02) < 0.001
    assert block.attention.qkv.bias.abs().max() == 0
    assert block.mlp_norm.weight.eq(1).all()


def test_same_seed_same_model() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(create_model("crossvit_pico_32"))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
