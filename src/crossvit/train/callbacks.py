"""What training tells whoever looks on. The command line draws it; this base says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crossvit.results import Epoch


class Callback:
    """Override what you want to hear of. Nothing a callback does changes the training."""

    def on_message(self, line: str) -> None:
        """One line that people should read."""

    def on_check_start(self, total: int) -> None:
        """The images are being looked at, `total` of them; `checked` follows for each."""

    def on_image_checked(self) -> None:
        """One more image has been looked at."""

    def on_train_start(self, lines: Sequence[str], *, epochs: int, done: float, steps: int) -> None:
        """Training begins, after `done` of `epochs` epochs (part of one too); an epoch has `steps` steps. `lines` say what and
        how long."""

    def on_step_end(self, epoch: int, loss: float, top1: float, images_per_second: float) -> None:
        """One step of epoch `epoch` (from 0) is done; loss and accuracy (0 to 1) are the epoch's means so far."""

    def on_epoch_end(self, entry: Epoch) -> None:
        """An epoch is done, evaluated and on disk."""
