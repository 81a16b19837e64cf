"""What tests of the native kernels share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from crossvit.fast.native.build import native
from crossvit.model.config import BranchConfig, CrossViTConfig

needs_kernels = pytest.mark.skipif(
    native() is None, reason="no AVX-512, or no C++ compiler: there are no kernels here"
)


needs_layers = pytest.mark.skipif(
    not getattr(native(), "has_bf16", False), reason="this processor has no AVX-512 bf16"
)


NEAR = {
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3,
}  # of the largest, in the norm: half a step of bf16 is 2e-3


CONFIG = CrossViTConfig(
    branches=(
        BranchConfig(patch=8, dim=32, depth=1, heads=2, mlp_ratio=2.0),
        BranchConfig(patch=16, dim=64, depth=2, heads=2, mlp_ratio=2.0),
    ),
    stages=2,
    num_classes=7,
    image_size=(64, 64),
)


def counted(monkeypatch: pytest.MonkeyPatch, place: object, *names: str) -> list[str]:
    """Fills with the name of each of these functions of `place` as it is called."""
    seen: list[str] = []
    for name in names:
        real = getattr(place, name)
        monkeypatch.setattr(
            place, name, lambda *given, name=name, real=real: seen.append(name) or real(*given)
        )
    return seen


def error(found: Tensor, exact: Tensor) -> float:
    return float(
        ((found.double() - exact.double()).norm() / (exact.double().norm() + 1e-12)).detach()
    )


def exact_attention(qkv: Tensor, heads: int) -> Tensor:
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
