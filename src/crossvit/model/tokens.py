"""Image to tokens: the branch's own view of the image, its patches as vectors, its class token and positions.

Shapes: B batch, C channels, H x W pixels, n = rows x columns patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.model.config import BranchConfig


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic, without antialiasing, as the released models were trained. (B, C, H, W) -> (B, C, *size)."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False)


def make_stem(branch: BranchConfig, in_channels: int) -> nn.Module:
    """The branch's convolutions (`BranchConfig.stem`) with a ReLU between two: (B, C, H, W) -> (B, D, rows, columns)."""
    layers: list[nn.Module] = []
    for inward, outward, kernel, stride, padding in branch.stem(in_channels):
        layers += [nn.Conv2d(inward, outward, kernel, stride=stride, padding=padding), nn.ReLU(inplace=True)]
    convolutions = layers[:-1]
    return convolutions[0] if len(convolutions) == 1 else nn.Sequential(*convolutions)


class Tokens(nn.Module):
    """[c ‖ P] + positions for one branch: (B, C, H, W) -> (B, 1 + n, D).

    The images are the model's input; the branch resizes them to its own size (`BranchConfig.image_size`).
    """

    def __init__(self, branch: BranchConfig, *, in_channels: int, image_size: tuple[int, int], drop: float = 0.0) -> None:
        super().__init__()
        self.image_size = branch.image_size(image_size)
        rows, columns = branch.grid(image_size)
        self.patches = make_stem(branch, in_channels)
        self.class_token = nn.Parameter(torch.zeros(1, 1, branch.dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + rows * columns, branch.dim))
        self.drop = nn.Dropout(drop)

    def forward(self, images: Tensor) -> Tensor:
        grid = self.patches(resize(images, self.image_size))  # (B, D, rows, columns)
        patches = grid.flatten(2).transpose(1, 2)  # (B, n, D)
        class_token = self.class_token.expand(patches.shape[0], -1, -1)
        return self.drop(torch.cat((class_token, patches), dim=1) + self.positions)  # type: ignore[no-any-return]
