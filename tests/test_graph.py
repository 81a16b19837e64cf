"""What is exported is the model: every fusion, tokeniser and head of the paper, in torch and through both engines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import crossvit
from conftest import SMALL
from crossvit import CrossViTConfig
from crossvit.model.crossvit import CrossViT
from crossvit.runtimes.choose import installed_engines
from crossvit.runtimes.graph import GraphForm

NO_CLASS_TOKEN = tuple(dataclasses.replace(branch, class_token=False) for branch in SMALL.branches)
CONFIGS = {
    "cross-attention": SMALL,
    "as released": dataclasses.replace(SMALL, fusion_depth=2, as_released=True),
    "materialised": dataclasses.replace(SMALL, keys_values="materialised"),
    "all-attention": dataclasses.replace(SMALL, fusion="all-attention"),
    "pairwise": dataclasses.replace(SMALL, fusion="pairwise"),
    "class-token": dataclasses.replace(SMALL, fusion="class-token"),
    "no fusion": dataclasses.replace(SMALL, fusion="none"),
    "single": dataclasses.replace(SMALL, branches=SMALL.branches[1:], fusion="none"),
    "no class token": dataclasses.replace(SMALL, branches=NO_CLASS_TOKEN),
    "T2T": dataclasses.replace(
        SMALL, branches=tuple(dataclasses.replace(branch, tokeniser="t2t", patch=16) for branch in SMALL.branches), image_size=(64, 64)
    ),
    "convolutions": crossvit.create_model("crossvit_9_dagger_240", image_size=96, num_classes=5).config,
    "plain": crossvit.create_model("crossvit_tiny_240", image_size=96, num_classes=5).config,
    "small images": crossvit.create_model("crossvit_nano_64", num_classes=5).config,
    "not square": dataclasses.replace(SMALL, image_size=(48, 32)),
}  # fmt: skip


def lively(config: CrossViTConfig) -> CrossViT:
    """A model whose LayerNorms and biases are not those it starts with, and whose logits differ from image to image."""
    torch.manual_seed(0)
    model = CrossViT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def given(config: CrossViTConfig, count: int) -> tuple[Tensor, CrossViT, Tensor]:
    """Images, a model, and its branches' logits."""
    model = lively(config)
    images = torch.randn(count, config.in_channels, *config.image_size)
    with torch.no_grad():
        return images, model, model.branch_logits(images)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_graph_form_is_the_model_to_1e_5(name: str) -> None:
    images, model, exact = given(CONFIGS[name], 3)
    found = GraphForm(model)(images)
    assert found.shape == exact.shape
    assert relative(found, exact) < 1e-5
    assert relative(exact[:, 1:], exact[:, :-1]) > 1e-2  # the images are told apart, so that the line above can fail


def test_the_form_is_a_copy() -> None:
    images, model, exact = given(SMALL, 2)
    form = GraphForm(model)
    with torch.no_grad():
        assert torch.equal(model.branch_logits(images), exact)
        before = form(images)
        for parameter in model.parameters():
            parameter.add_(1.0)
        assert torch.equal(form(images), before)
