"""Checkpoints: the whole state of training in one file, written whole, verified when read.

A file is a magic line, the sha256 of the rest, and a torch archive that is read with `weights_only=True`. A torn file is
noticed by its sum, and the one before it is used. `Writer` writes beside the training, which waits for a copy in memory only.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from crossvit.errors import CheckpointError
from crossvit.run import write_atomically

MAGIC = b"crossvit checkpoint 2\n"
BEST_NAME = "best.safetensors"
WAITING_AT_MOST = 2  # files: each holds a copy of what it writes in memory


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.ckpt"


def save_checkpoint(folder: Path, state: dict[str, Any], *, step: int, keep: int = 2) -> Path:
    """Write `state` after `step` steps, then drop all but the newest `keep`. RunError if it cannot be written; the older ones
    are then still there."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    path = checkpoint_path(folder, step)
    write_atomically(path, MAGIC, hashlib.sha256(payload).digest(), payload)
    for old in _newest_first(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in `path`. CheckpointError if it is torn or not one of ours. Nothing in it is run."""
    content = path.read_bytes()
    start = len(MAGIC) + hashlib.sha256().digest_size
    payload = content[start:]
    if not content.startswith(MAGIC) or hashlib.sha256(payload).digest() != content[len(MAGIC) : start]:
        raise CheckpointError(f"{path} is torn or not a checkpoint (its checksum does not match)")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return state


def load_newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """(state, what was passed over): the newest whole checkpoint in `folder`, None if there is not one file.

    CheckpointError if there are files and none is whole."""
    passed_over: list[str] = []
    for path in _newest_first(folder):
        try:
            return load_checkpoint(path), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    if passed_over:
        raise CheckpointError(f"no whole checkpoint in {folder}: {passed_over[0]}; start again with --overwrite")
    return None, []


def save_best(folder: Path, state: dict[str, Tensor]) -> None:
    """Keep the weights of the best epoch so far, beside the checkpoints."""
    write_atomically(folder / BEST_NAME, to_safetensors({name: tensor.contiguous() for name, tensor in state.items()}))


def load_best(folder: Path) -> dict[str, Tensor]:
    return from_safetensors((folder / BEST_NAME).read_bytes())


def copied(state: Any) -> Any:
    """`state` with its tensors copied to the CPU's memory, so that training may go on changing them."""
    match state:
        case Tensor():
            return state.detach().to("cpu", copy=True)
        case dict():
            return {key: copied(value) for key, value in state.items()}
        case list() | tuple():
            return type(state)(copied(value) for value in state)
    return state


class Writer:
    """Writes files in the order given, in a thread of its own. What failed is raised in the thread that trains: when the next
    file is given, by `flush`, and on leaving. Leaving on an error or Ctrl-C waits for what is being written."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._waiting: list[Future[Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            self.flush()

    def submit(self, write: Callable[..., Any], *given: Any, **named: Any) -> None:
        """Call `write` with what is given after all that waits. Waits itself where WAITING_AT_MOST are waiting."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= WAITING_AT_MOST):
            self._waiting.pop(0).result()
        self._waiting.append(self._thread.submit(write, *given, **named))

    def flush(self) -> None:
        """Wait until all is written."""
        while self._waiting:
            self._waiting.pop(0).result()


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.ckpt"), reverse=True)
