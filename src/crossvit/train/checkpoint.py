"""Checkpoints: the whole state of training in one file, written whole, verified when read.

A file is a magic line, the sha256 of the rest, and a torch archive that is read with `weights_only=True`. A torn file is
noticed by its sum, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from crossvit.errors import CheckpointError
from crossvit.run import write_atomically

MAGIC = b"crossvit checkpoint 2\n"


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


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.ckpt"), reverse=True)
