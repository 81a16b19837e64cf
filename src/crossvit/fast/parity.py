"""The last gate, after eligibility: whether an engine gives what the plain model gives in fp32.

The plain model's logits of seeded images are kept beside an exported graph, as its witness, so that
an engine is compared when it is loaded without torch being imported.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crossvit.errors import EngineError
from crossvit.files import write_atomically

if TYPE_CHECKING:
    from crossvit.model.config import CrossViTConfig
    from crossvit.model.crossvit import CrossViT

Logits = NDArray[np.float32]

# Largest difference from the plain model in fp32, over the largest logit, that is the same
# function: bf16 has 8 bits, and over a whole model 2 to 3 % is what autocast gives as well
# (docs/performance.md).
TOLERANCE = {"fp32": 1e-4, "bf16": 6e-2, "fp16": 1e-2}
SEED, IMAGES = 0, 2


def witness_images(config: CrossViTConfig) -> NDArray[np.float32]:
    """Images (B, C, H, W) of noise, the same for every model of one input."""
    shape = (IMAGES, config.in_channels, *config.image_size)
    return np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)


def plain_logits(model: CrossViT) -> Logits:
    """The branch logits (branches, B, classes) of `witness_images` by the plain model in fp32."""
    import torch

    from crossvit.fast.accelerate import decelerate
    from crossvit.fast.native.build import without_kernels

    plain = decelerate(copy.deepcopy(model)).float().eval()
    with torch.no_grad(), without_kernels():
        logits = plain.branch_logits(torch.from_numpy(witness_images(model.config)))
    return logits.numpy()


def difference(logits: Iterable[Logits], expected: Iterable[Logits]) -> float:
    """Largest difference over the largest expected logit, of pairs of arrays."""
    pairs = list(zip(logits, expected, strict=True))
    largest = max(float(np.abs(array).max()) for _, array in pairs)
    distance = max(float(np.abs(array - exact).max()) for array, exact in pairs)
    return distance / max(largest, 1e-6)


def write_witness(path: Path, model: CrossViT) -> None:
    """Write the logits that an engine on `model` is compared with."""
    content = io.BytesIO()
    np.save(content, plain_logits(model), allow_pickle=False)
    write_atomically(path, content.getvalue())


def compare(logits: Logits, witness: Path, *, engine: str, precision: str) -> None:
    """Compare an engine's branch logits of `witness_images` with a witness.

    Raises:
        EngineError: Where they are further apart than the precision explains, or not finite.
    """
    apart = difference([logits], [np.load(witness, allow_pickle=False)])
    if not apart <= TOLERANCE[precision]:
        raise EngineError(
            f"engine {engine} in {precision} differs from the plain model by {apart:.1e} of the "
            f"largest logit ({TOLERANCE[precision]:.0e} is let through)"
        )
