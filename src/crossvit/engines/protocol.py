"""The protocol of every inference engine: normalised images in, logits out. Imports no torch.

Shapes: B images, C channels, H x W pixels of the model's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]
Logits = NDArray[np.float32]


class EngineOutput(NamedTuple):
    """The output of a forward pass, float32.

    Attributes:
        logits: (B, classes), of the whole model.
        branch_logits: (branches, B, classes), of each branch.
    """

    logits: Logits
    branch_logits: Logits

    @classmethod
    def of_branches(cls, branch_logits: Logits) -> EngineOutput:
        """The output of a model whose logits are the mean over its branches.

        Args:
            branch_logits: (branches, B, classes).
        """
        return cls(branch_logits.mean(axis=0), branch_logits)

    @classmethod
    def join(cls, outputs: Sequence[EngineOutput]) -> EngineOutput:
        """Concatenate the outputs of consecutive batches along B."""
        if len(outputs) == 1:
            return outputs[0]
        return cls(
            np.concatenate([output.logits for output in outputs]),
            np.concatenate([output.branch_logits for output in outputs], axis=1),
        )


class Engine(Protocol):
    """`engine(images)`: (B, C, H, W) float32, normalised -> `EngineOutput`."""

    name: str
    precision: str

    def __call__(self, images: Images) -> EngineOutput: ...
