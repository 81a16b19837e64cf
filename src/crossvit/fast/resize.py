"""The branch's bicubic resize along each side.

torch's own kernel on a CPU computes all sixteen taps of every pixel.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from crossvit.fast.native.bindings import TAPS, Taps
from crossvit.fast.native.build import kernels_here


def bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """torch's bicubic resize without antialiasing, corners not aligned.

    (B, C, H, W) fp32 -> (B, C, *size), by the native kernel; `why_no_resize_kernel` says where.
    """
    height, width = images.shape[-2:]
    return kernels_here().resize(
        images.contiguous(), size, _taps(height, size[0]), _taps(width, size[1])
    )


@lru_cache(maxsize=64)
def _taps(side: int, size: int) -> Taps:
    """torch's own weights, from the resize of a unit matrix: four in a row, summed at an edge."""
    with torch.inference_mode(False), torch.no_grad():
        unit = torch.eye(
            side, dtype=torch.float32, device="cpu"
        )  # whatever torch's defaults are set to
        matrix = F.interpolate(
            unit[None, None], size=(size, side), mode="bicubic", align_corners=False
        )[0, 0]
        first = (matrix != 0).int().argmax(dim=1).clamp(max=side - TAPS)
        weights = matrix.gather(1, first[:, None] + torch.arange(TAPS, device="cpu"))
        return Taps(first.int(), weights.contiguous(), weights.t().contiguous())
