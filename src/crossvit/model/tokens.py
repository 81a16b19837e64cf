"""Image to tokens: the branch's view of the image, its patches as vectors, class token, positions.

Shapes: B batch, C channels, H x W pixels, n = rows x columns patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.model.config import BranchConfig
from crossvit.model.registry import TOKENISERS


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic, without antialiasing, as the released models were trained.

    (B, C, H, W) -> (B, C, *size); the same size is the identity.
    """
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False)


def resample_positions(positions: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Position embeddings of `grid` for a grid of `size`: (1, [1 +] n, D) -> (1, [1 +] m, D).

    Bicubic, the paper's way to another resolution. A class token's row stays as it is, and the
    same grid is the identity.
    """
    if grid == size:
        return positions
    rest = positions.shape[1] - grid[0] * grid[1]
    image = positions[:, rest:].transpose(1, 2).unflatten(2, grid)  # (1, D, rows, columns)
    resampled = F.interpolate(image.float(), size=size, mode="bicubic", align_corners=False)
    patches = resampled.to(positions.dtype).flatten(2).transpose(1, 2)
    return torch.cat((positions[:, :rest], patches), dim=1)


def convolutions(branch: BranchConfig, in_channels: int) -> nn.Module:
    """The stem of `BranchConfig.stem`, a ReLU between two: (B, C, H, W) -> (B, D, rows, columns)."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride, padding in branch.stem(in_channels):
        conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding)
        layers += [conv, nn.ReLU(inplace=True)]
    layers.pop()
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


class Tokens(nn.Module):
    """[c ‖ P] + positions for one branch: (B, C, H, W) -> (B, 1 + n, D), (B, n, D) without c.

    The images are the model's input; the branch resizes them to its own size
    (`BranchConfig.image_size`). Positions are those of `image_size` and are resampled for an
    input of another size.
    """

    def __init__(
        self,
        branch: BranchConfig,
        *,
        in_channels: int,
        image_size: tuple[int, int],
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.grid = branch.grid(image_size)
        rows, columns = self.grid
        self.patches = TOKENISERS[branch.tokeniser](branch, in_channels)
        self.class_token = (
            nn.Parameter(torch.zeros(1, 1, branch.dim)) if branch.class_token else None
        )
        count = branch.class_token + rows * columns
        self.positions = nn.Parameter(torch.zeros(1, count, branch.dim))
        self.drop = nn.Dropout(drop)

    def forward(self, images: Tensor) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        images = resize(images, self.branch.image_size(size))
        positions = resample_positions(self.positions, self.grid, self.branch.grid(size))
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # (B, n, D)
        if self.class_token is not None:
            tokens = torch.cat((self.class_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        return self.drop(tokens + positions)  # type: ignore[no-any-return]
