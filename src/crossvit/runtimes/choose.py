"""Which engine computes: the one place that evaluation, prediction and explanation ask for a forward pass."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from crossvit.trained import Trained


class Engine(Protocol):
    """`engine(images)`: (B, C, H, W) float32 normalised -> (branches, B, classes) float32 logits."""

    precision: str

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]: ...


def load_engine(trained: Trained, *, device: str = "auto", precision: str = "auto") -> Engine:
    """The engine for `trained`. UsageError for a device or precision that is not there."""
    from crossvit.runtimes.torch import TorchEngine

    return TorchEngine.load(trained, device=device, precision=precision)
