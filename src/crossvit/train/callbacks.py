"""What training tells whoever looks on. The command line draws it; this base says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crossvit.results import Epoch


class Watch:
    """Override what you want to hear of. Nothing a watch does changes the training."""

    def say(self, line: str) -> None:
        """One line that people should read."""

    def checking(self, total: int) -> None:
        """The images are being looked at, `total` of them; `checked` follows for each."""

    def checked(self) -> None:
        """One more image has been looked at."""

    def started(self, lines: Sequence[str], *, epochs: int, done: float, steps: int) -> None:
        """Training begins, after `done` of `epochs` epochs (part of one too); an epoch has `steps` steps. `lines` say what and
        how long."""

    def stepped(self, epoch: int, loss: float, top1: float, images_per_second: float) -> None:
        """One step of epoch `epoch` (from 0) is done; loss and accuracy (0 to 1) are the epoch's means so far."""

    def epoch_done(self, entry: Epoch) -> None:
        """An epoch is done, evaluated and on disk."""
