"""Checkpoints: the whole state of training in one file, written whole, verified when read.

A file is a magic line, the sha256 of the rest, and a torch archive that is read with `weights_only=True`. A torn file is
noticed by its sum, and the one before it is used. `Writer` writes beside the training, which waits for a copy in memory only.

    step-000000012.ckpt   the state after 12 steps
    best-000000009.ckpt   the weights of the best epoch, which ended with step 9; a state names its own as `best_step`
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from crossvit.errors import CheckpointError
from crossvit.files import write_atomically

MAGIC = b"crossvit checkpoint 2\n"
WAITING_AT_MOST = 2  # files: each holds a copy of what it writes in memory


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.ckpt"


def best_path(folder: Path, step: int) -> Path:
    return folder / f"best-{step:09d}.ckpt"


def save_checkpoint(folder: Path, state: dict[str, Any], *, step: int, keep: int = 2) -> Path:
    """Write `state` after `step` steps, then drop what came before but the newest `keep` with it, and best weights that none of
    them names. RunError if it cannot be written; the older ones are then still there. One that cannot be dropped stays."""
    path = checkpoint_path(folder, step)
    _write(path, state)
    older = [one for one in _newest_first(folder, "step") if _step(one) < _step(path)]
    kept = [path, *older][:keep]
    # Best steps only rise, so the oldest state that is kept names the last of those that are not later than itself.
    best = [one for one in _newest_first(folder, "best") if _step(one) <= _step(kept[-1])]
    for old in (*older[keep - 1 :], *best[1:]):
        _drop(old)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `path` holds. CheckpointError if it cannot be read, is torn or not one of ours. Nothing in it is run."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    start = len(MAGIC) + hashlib.sha256().digest_size
    payload = content[start:]
    if (
        not content.startswith(MAGIC)
        or hashlib.sha256(payload).digest() != content[len(MAGIC) : start]
    ):
        raise CheckpointError(f"{path} is torn or not a checkpoint (its checksum does not match)")
    try:
        state: dict[str, Any] = torch.load(
            io.BytesIO(payload), map_location="cpu", weights_only=True
        )
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return state


def load_newest(
    folder: Path, *, before: int | None = None
) -> tuple[dict[str, Any] | None, list[str]]:
    """(state, what was passed over): the newest checkpoint in `folder` that is whole, as are the best weights it names; where no
    such weights are, the newest whole one with `best_step` None; None if there is not one file. before: only those of fewer
    steps.

    CheckpointError if there are files and none is whole."""
    passed_over: list[str] = []
    bereft: tuple[dict[str, Any], list[str]] | None = None  # whole, but for its best weights
    for path in _newest_first(folder, "step"):
        if before is not None and _step(path) >= _step(checkpoint_path(folder, before)):
            continue
        try:
            state = load_checkpoint(path)
        except CheckpointError as error:
            passed_over.append(str(error))
            continue
        try:
            if state.get("best_step") is not None:
                load_best(folder, state["best_step"])
        except CheckpointError as error:
            bereft = bereft or (state | {"best_step": None}, passed_over.copy())
            passed_over.append(f"{path} names best weights that are lost: {error}")
        else:
            return state, passed_over
    if bereft is not None:
        return bereft
    if passed_over:
        raise CheckpointError(
            f"no whole checkpoint in {folder}: {passed_over[0]}; start again with --overwrite"
        )
    return None, []


def drop_later(folder: Path, step: int) -> None:
    """Drop the files of more than `step` steps: torn, or of a way that was left when the run went back to that step."""
    for kind in ("step", "best"):
        for path in _newest_first(folder, kind):
            if _step(path) > _step(checkpoint_path(folder, step)):
                _drop(path)


def save_best(folder: Path, weights: dict[str, Tensor], *, step: int) -> None:
    """Keep the weights of the best epoch so far, which ended with step `step`."""
    _write(best_path(folder, step), weights)


def load_best(folder: Path, step: int) -> dict[str, Tensor]:
    return load_checkpoint(best_path(folder, step))


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


def _write(path: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getbuffer()
    write_atomically(path, MAGIC, hashlib.sha256(payload).digest(), payload)


def _newest_first(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"{kind}-*.ckpt"), reverse=True)


def _step(path: Path) -> str:
    """The digits in a file's name, which sort as the steps do."""
    return path.stem.partition("-")[2]


def _drop(path: Path) -> None:
    with contextlib.suppress(OSError):  # it only takes room, and is dropped the next time
        path.unlink(missing_ok=True)
