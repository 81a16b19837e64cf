"""Relevance followed through two grids and every fusion: properties, literal cases, and what a known answer hangs on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from crossvit import BranchConfig, CrossViTConfig
from crossvit.explanation.relevance import (
    Flow,
    GradientWeighted,
    Rollout,
    density,
    read,
    summary_row,
)
from crossvit.model.attention import CrossAttention, record_attention
from crossvit.model.crossvit import CrossViT
from crossvit.model.fusion import Grid
from crossvit.model.registry import FUSIONS
from support.models import SMALL

THIRD = BranchConfig(patch=12, dim=16, heads=2, depth=1)


def built(**changes: object) -> CrossViT:
    torch.manual_seed(0)
    model = CrossViT(dataclasses.replace(SMALL, **changes)).eval()
    for parameter in model.parameters():  # far from an even attention
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def variants() -> list[dict[str, object]]:
    found: list[dict[str, object]] = [{"branches": SMALL.branches[:1], "fusion": "none"}]
    for fusion in FUSIONS:
        for branches in (SMALL.branches, (*SMALL.branches, THIRD)):
            for class_token in (True, False):
                own = tuple(
                    dataclasses.replace(branch, class_token=class_token) for branch in branches
                )
                found.append({"branches": own, "fusion": fusion})
    deep = [
        {"fusion": fusion, "fusion_depth": 2} for fusion in ("all-attention", "cross-attention")
    ]
    return [
        *found,
        *deep,
        {"fusion_depth": 2, "as_released": True},
        {"keys_values": "materialised"},
    ]


def name(changes: dict[str, object]) -> str:
    branches = changes.get("branches", SMALL.branches)
    assert isinstance(branches, tuple)
    words = [str(changes.get("fusion", "cross-attention")), str(len(branches))]
    return "-".join(
        words
        + ["no-class"] * (not branches[0].class_token)
        + [key for key in changes if key not in ("fusion", "branches")]
    )


@pytest.mark.parametrize("changes", variants(), ids=name)
def test_rows_of_the_rollout_sum_to_one_and_what_crosses_is_what_the_fusion_lets(
    changes: dict[str, object],
) -> None:
    model = built(**changes)
    reading = read(model, torch.randn(3, 3, *SMALL.image_size))
    count = len(model.config.branches)
    torch.testing.assert_close(reading.rollout.sum(dim=-1), torch.ones(count, 3))
    assert (reading.rollout >= 0).all()
    assert (reading.gradient >= 0).all()
    for relevance in (reading.rollout, reading.gradient):
        parts = reading.on_grids(relevance)  # one (branches, 3, rows, columns) a grid
        assert [tuple(part.shape) for part in parts] == [
            (count, 3, *grid) for grid in reading.grids
        ]
        for reader in range(count):
            for on in range(count):
                mass = parts[on][reader].sum(dim=(-2, -1))
                if reader != on and model.config.fusion == "none":
                    assert (mass == 0).all()
                elif model.config.fusion == "none" or count == 2 or reader == on:
                    assert (mass > 0).all(), (reader, on)
    for seen in reading.attention:
        torch.testing.assert_close(seen.weights.sum(dim=-1), torch.ones(seen.weights.shape[:-1]))
        assert not seen.weights.requires_grad


def test_reading_leaves_the_model_as_it_was_and_gives_its_logits() -> None:
    model = built().train()
    images = torch.randn(2, 3, *SMALL.image_size)
    with torch.inference_mode():  # even from within
        reading = read(model, images)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(reading.logits, model.eval().branch_logits(images))
    assert torch.equal(reading.targets, reading.logits.mean(dim=0).argmax(dim=1))
    assert all(module.listener is None for module in model.modules() if hasattr(module, "listener"))


def test_images_of_a_batch_do_not_mix() -> None:
    model = built()
    images = torch.randn(3, 3, *SMALL.image_size)
    targets = torch.tensor([4, 0, 2])
    together = read(model, images, targets)
    alone = read(model, images[1:2], targets[1:2])
    torch.testing.assert_close(together.rollout[:, 1:2], alone.rollout)
    torch.testing.assert_close(together.gradient[:, 1:2], alone.gradient, rtol=1e-4, atol=1e-7)


def test_even_attention_has_a_value_on_paper() -> None:
    """One stage, one block a branch, n = 6 and 2 patches, every attention even: with N = 1 + n,

    after the blocks R_b[i] = (e_i + 1/N_b) / 2, and the read of b from a gives, with w = 1/(1 + n_a) for itself and each patch,
        an own patch: (1 + w)/2 · 1/(2 N_b),   a patch of a: w/2 · (1/2 + n_a/(2 N_a)).
    """
    config = CrossViTConfig(
        image_size=(8, 12),
        num_classes=2,
        stages=1,
        branches=(
            BranchConfig(patch=4, dim=8, heads=2, depth=1),
            BranchConfig(patch=6, dim=8, heads=2, depth=1),
        ),
    )
    grids = [(2, 3), (1, 2)]
    weights = {
        ("self", 0, 0, 0): torch.full((1, 2, 7, 7), 1 / 7),
        ("self", 0, 1, 0): torch.full((1, 2, 3, 3), 1 / 3),
        ("cross", 0, 0, 0): torch.full((1, 2, 1, 3), 1 / 3),
        ("cross", 0, 1, 0): torch.full((1, 2, 1, 7), 1 / 7),
    }
    first, second = (
        summary_row(rows, True)[0, 0]
        for rows in Flow(config, grids, Rollout(weights)).follow(torch.zeros(1))[0]
    )
    torch.testing.assert_close(first[1:7], torch.full((6,), (1 + 1 / 3) / 2 / 14))
    torch.testing.assert_close(first[8:], torch.full((2,), 1 / 6 * (1 / 2 + 2 / 6)))
    torch.testing.assert_close(second[8:], torch.full((2,), (1 + 1 / 7) / 2 / 6))
    torch.testing.assert_close(second[1:7], torch.full((6,), 1 / 14 * (1 / 2 + 6 / 14)))


def test_gradient_weighting_by_hand() -> None:
    """One patch a branch. Ā is the positive part of gradient times weight; what S reads of L has its mixing normalised."""
    config = CrossViTConfig(
        image_size=4,
        num_classes=2,
        stages=1,
        branches=(
            BranchConfig(patch=4, dim=8, heads=1, depth=1),
            BranchConfig(patch=4, dim=8, heads=1, depth=1),
        ),
    )
    weights = {
        ("self", 0, 0, 0): torch.tensor([[[[0.5, 0.5], [0.2, 0.8]]]]),
        ("self", 0, 1, 0): torch.tensor([[[[0.25, 0.75], [0.5, 0.5]]]]),
        ("cross", 0, 0, 0): torch.tensor([[[[0.4, 0.6]]]]),
        ("cross", 0, 1, 0): torch.tensor([[[[0.5, 0.5]]]]),
    }
    slopes = {
        ("self", 0, 0, 0): torch.tensor([[[[2.0, -1.0], [0.0, 1.0]]]]),
        ("self", 0, 1, 0): torch.tensor([[[[0.0, 4.0], [1.0, 1.0]]]]),
        ("cross", 0, 0, 0): torch.tensor([[[[1.0, 10.0]]]]),
        ("cross", 0, 1, 0): torch.tensor([[[[0.0, -2.0]]]]),
    }
    (small, large), _ = Flow(config, [(1, 1), (1, 1)], GradientWeighted(weights, slopes)).follow(
        torch.zeros(1)
    )
    # c_S after its block: (2, 0 | 0, 0). It reads itself with 0.4 and L's patch, (0.5, 0.5) + its identity, with 6.
    torch.testing.assert_close(small[0, 0], torch.tensor([2.8, 0.0, 3.0, 9.0]))
    torch.testing.assert_close(small[0, 1], torch.tensor([0.0, 1.8, 0.0, 0.0]))
    torch.testing.assert_close(
        large[0, 0], torch.tensor([0.0, 0.0, 1.0, 3.0])
    )  # what it read spoke against the class


@pytest.mark.parametrize("keys_values", ["lazy", "materialised"])
def test_recorded_cross_attention_can_be_differentiated(keys_values: str) -> None:
    """∂(v·out)/∂p_hj = (x_j W_v + b_v)_h · (W_oᵀ v)_h, in both forms alike."""
    torch.manual_seed(0)
    module = CrossAttention(12, 3, keys_values=keys_values).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x, direction = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    heard: list[Tensor] = []
    module.listener = heard.append
    out = module(x)
    (slope,) = torch.autograd.grad((out @ direction).sum(), heard)
    values = module.value(x).unflatten(-1, (3, 4))  # (B, N, H, K)
    pulled = (direction @ module.out.weight).unflatten(-1, (3, 4))
    torch.testing.assert_close(slope[:, :, 0], torch.einsum("bnhk,hk->bhn", values, pulled))


def test_every_attention_of_a_branch_has_a_gradient_of_its_own_logit() -> None:
    model = built()
    with record_attention(model) as maps:
        logits = model.branch_logits(torch.randn(1, 3, *SMALL.image_size))
    for branch, own in enumerate(logits):
        slopes = torch.autograd.grad(
            own[0, 0], [one.weights for one in maps], retain_graph=True, allow_unused=True
        )
        for one, slope in zip(maps, slopes, strict=True):
            if one.branch == branch or (one.kind == "self" and one.stage == 0):
                assert slope is not None, one
                assert slope.abs().sum() > 0


@pytest.mark.parametrize("fusion", ["none", "cross-attention", "all-attention", "class-token"])
def test_maps_move_with_the_picture(fusion: str) -> None:
    """Without positions, and by whole patches of both branches, a picture shifted round has its maps shifted round."""
    branches = (
        BranchConfig(patch=4, dim=16, heads=2, depth=1),
        BranchConfig(patch=8, dim=16, heads=2, depth=1),
    )
    config = CrossViTConfig(
        image_size=(24, 32), num_classes=3, stages=2, branches=branches, fusion=fusion
    )
    torch.manual_seed(0)
    model = CrossViT(config).double().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.0 if name.endswith("positions") else 0.3)
    images = torch.randn(1, 3, 24, 32, dtype=torch.float64)
    target = torch.tensor([1])
    here, there = (
        read(model, images, target),
        read(model, images.roll((8, 16), dims=(2, 3)), target),
    )
    for relevance, moved in ((here.rollout, there.rollout), (here.gradient, there.gradient)):
        for part, other, patch in zip(
            here.on_grids(relevance), there.on_grids(moved), (4, 8), strict=True
        ):
            torch.testing.assert_close(part.roll((8 // patch, 16 // patch), dims=(-2, -1)), other)


def test_density_joins_grids_by_area() -> None:
    fine = torch.zeros(4, 4)
    fine[0, 0] = 0.5
    coarse = torch.full((2, 2), 0.125)  # the other half, evenly
    joined = density([fine, coarse], (4, 4))
    assert joined.mean() == pytest.approx(1.0)
    torch.testing.assert_close(joined[1:], torch.full((3, 4), 0.5))
    assert joined[0, 0] == pytest.approx(0.5 * 16 + 0.5)
    assert torch.equal(density([torch.zeros(2, 2)], (4, 4)), torch.ones(4, 4))


def test_a_picture_of_another_shape_and_grids_that_do_not_divide() -> None:
    model = built(dynamic_size=True)
    reading = read(model, torch.randn(1, 3, 40, 25))
    grids: list[Grid] = [branch.grid((40, 25)) for branch in SMALL.branches]
    assert list(reading.grids) == grids
    torch.testing.assert_close(reading.rollout.sum(dim=-1), torch.ones(2, 1))
