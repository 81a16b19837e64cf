"""Every fusion scheme of the paper: its equations written out, its options, and more than two branches."""

from __future__ import annotations

import pytest
import torch

from crossvit import BranchConfig, CrossViTConfig
from crossvit.model.attention import record_attention
from crossvit.model.crossvit import CrossViT
from support.models import SMALL


def equations_2_to_4(
    config: CrossViTConfig, fusion: torch.nn.Module, tokens: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The fusion schemes written out beside the paper for two branches on one grid, with the module's own f, g and MSA."""
    small, large = tokens
    if config.fusion == "all-attention":
        joined = torch.cat((fusion.project[0](small), fusion.project[1](large)), dim=1)
        joined = joined + fusion.attentions[0](fusion.norms[0](joined))
        return [
            fusion.restore[0](joined[:, : small.shape[1]]),
            fusion.restore[1](joined[:, small.shape[1] :]),
        ]
    if config.fusion == "class-token":
        total = fusion.project[0](small[:, :1]) + fusion.project[1](large[:, :1])
        return [
            torch.cat((restore(total), own[:, 1:]), dim=1)
            for restore, own in zip(fusion.restore, tokens, strict=True)
        ]
    total = fusion.project[0].patches(small) + fusion.project[1].patches(large)
    return [restore.patches(total) for restore in fusion.restore]


@pytest.mark.parametrize("scheme", ["all-attention", "class-token", "pairwise"])
def test_fusion_schemes_are_the_papers_equations(scheme: str) -> None:
    torch.manual_seed(0)
    branches = tuple(BranchConfig(patch=4, dim=dim, heads=2, depth=1) for dim in (8, 12))
    config = CrossViTConfig(
        branches=branches, image_size=12, stages=1, num_classes=2, fusion=scheme
    )
    fusion = CrossViT(config).double().encoders[0].fusion
    tokens = [
        torch.randn(2, 10, 8, dtype=torch.float64),
        torch.randn(2, 10, 12, dtype=torch.float64),
    ]
    for ours, theirs in zip(
        fusion(tokens, [(3, 3), (3, 3)]), equations_2_to_4(config, fusion, tokens), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_pairwise_meets_patches_where_they_lie_over_each_other() -> None:
    """A constant field stays constant through both interpolations, and a left half stays left."""
    branches = tuple(BranchConfig(patch=patch, dim=8, heads=2, depth=0) for patch in (2, 4))
    config = CrossViTConfig(
        branches=branches, image_size=16, stages=1, fusion="pairwise", projection_identity=True
    )
    fusion = CrossViT(config).encoders[0].fusion
    left = torch.zeros(1, 65, 8)
    left[:, 1:] = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]).repeat(8)[None, :, None]
    small, large = fusion([left, torch.ones(1, 17, 8)], [(8, 8), (4, 4)])
    image = large[0, 1:, 0].reshape(4, 4)
    assert torch.equal(image, torch.tensor([2.0, 2.0, 1.0, 1.0]).expand(4, 4))
    assert small[0, 1:, 0].reshape(8, 8)[:, :3].eq(2).all()


def test_none_leaves_the_branches_apart() -> None:
    torch.manual_seed(0)
    config = CrossViTConfig(**{**vars(SMALL), "fusion": "none"})
    model = CrossViT(config).eval()
    images = torch.randn(2, 3, 24, 36)
    before = model.branch_logits(images)
    with torch.no_grad():
        model.tokens[1].positions.add_(1.0)
    after = model.branch_logits(images)
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1])


def with_fusion_depth(depth: int, **changes: object) -> CrossViT:
    torch.manual_seed(0)
    return CrossViT(CrossViTConfig(**{**vars(SMALL), "fusion_depth": depth, **changes})).eval()


def test_every_fusion_block_sees_the_other_branchs_patches() -> None:
    right, released = with_fusion_depth(2), with_fusion_depth(2, as_released=True)
    images = torch.randn(1, 3, 24, 36)
    with record_attention(right) as maps, record_attention(released) as old_maps:
        right(images), released(images)
    spans = [
        [found.weights.shape[-1] for found in kept if found.kind == "cross"]
        for kept in (maps, old_maps)
    ]
    assert spans[0] == [1 + 20, 1 + 20, 1 + 54, 1 + 54] * 2
    assert spans[1] == [1 + 20, 1, 1 + 54, 1] * 2
    one = with_fusion_depth(1), with_fusion_depth(1, as_released=True)
    torch.testing.assert_close(one[0](images), one[1](images))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
def test_projections_have_the_parts_they_are_given(shared: bool, norm: bool, gelu: bool) -> None:
    config = CrossViTConfig(
        **{
            **vars(SMALL),
            "fusion": "pairwise",
            "projection_shared": shared,
            "projection_norm": norm,
            "projection_gelu": gelu,
        }
    )
    project = CrossViT(config).encoders[0].fusion.project[0]
    kinds = [type(layer).__name__ for layer in project.patches]
    assert kinds == ["LayerNorm"] * norm + ["GELU"] * gelu + ["Linear"]
    assert (project.class_token is None) == shared


def test_without_class_tokens_every_patch_gets_what_was_read() -> None:
    torch.manual_seed(0)
    branches = tuple(
        BranchConfig(patch=4, dim=dim, heads=2, depth=1, class_token=False) for dim in (8, 12)
    )
    model = CrossViT(
        CrossViTConfig(branches=branches, image_size=12, stages=1, num_classes=2)
    ).eval()
    assert not any("class_token" in name for name, _ in model.named_parameters())
    fusion = model.encoders[0].fusion
    tokens = [torch.randn(1, 9, 8), torch.randn(1, 9, 12)]
    for own, fused in zip(tokens, fusion(tokens, [(3, 3)] * 2), strict=True):
        added = fused - own
        torch.testing.assert_close(added, added[:, :1].expand_as(added))
        assert added.abs().max() > 0
    features = model.forward_features(torch.randn(1, 3, 12, 12))
    assert [tuple(own.shape) for own in features] == [(1, 9, 8), (1, 9, 12)]


@pytest.mark.parametrize(
    "scheme", ["none", "all-attention", "class-token", "pairwise", "cross-attention"]
)
@pytest.mark.parametrize("count", [3, 4])
def test_more_than_two_branches(scheme: str, count: int) -> None:
    torch.manual_seed(0)
    branches = tuple(
        BranchConfig(patch=3 + index, dim=8 + 4 * index, heads=2, depth=1) for index in range(count)
    )
    model = CrossViT(
        CrossViTConfig(branches=branches, image_size=24, stages=2, num_classes=3, fusion=scheme)
    )
    model(torch.randn(2, 3, 24, 24)).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_ring_of_three_reads_from_the_next() -> None:
    torch.manual_seed(0)
    branches = tuple(BranchConfig(patch=4, dim=8, heads=2, depth=1) for _ in range(3))
    fusion = CrossViT(CrossViTConfig(branches=branches, image_size=12, stages=1)).encoders[0].fusion
    tokens = [torch.randn(1, 10, 8, requires_grad=True) for _ in range(3)]
    for index, fused in enumerate(fusion(tokens, [(3, 3)] * 3)):
        gradients = torch.autograd.grad(fused[:, 0].sum(), tokens, allow_unused=True)
        read = [
            other
            for other, gradient in enumerate(gradients)
            if gradient is not None and gradient[:, 1:].abs().sum() > 0
        ]
        assert read == [(index + 1) % 3]
