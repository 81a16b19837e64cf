"""What an epoch adds up to: loss, right answers, skipped steps and time."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass
class EpochMeter:
    """Sums over the epoch so far."""

    loss: float = 0.0
    right: int = 0
    seen: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def means(self) -> tuple[float, float] | None:
        """(loss, top-1) of an image; None where every step so far was skipped."""
        return (self.loss / self.seen, self.right / self.seen) if self.seen else None


def count_correct(logits: Tensor, targets: Tensor) -> int:
    """Images (B, C) whose surest class is theirs: of labels (B,), or one of those in (B, C)."""
    surest = logits.argmax(dim=1, keepdim=True)
    if targets.ndim == 1:
        return int((surest[:, 0] == targets).sum())
    return int((targets.gather(1, surest) > 0).sum())
