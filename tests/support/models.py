"""Models that are small enough for tests."""

from __future__ import annotations

import torch

from crossvit import BranchConfig, CrossViTConfig
from crossvit.fast.accelerate import accelerate
from crossvit.model.crossvit import CrossViT

# Two branches of different grids, widths and depths on an oblong image: small enough for double precision.
SMALL = CrossViTConfig(
    image_size=(24, 36),
    num_classes=5,
    stages=2,
    branches=(
        BranchConfig(patch=4, dim=16, heads=2, depth=1, tokeniser="halving"),
        BranchConfig(patch=6, dim=24, heads=3, depth=2, image_scale=0.9),
    ),
)


def lively(config: CrossViTConfig, seed: int = 0) -> CrossViT:
    """A model whose logits differ from image to image."""
    torch.manual_seed(seed)
    model = accelerate(CrossViT(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
