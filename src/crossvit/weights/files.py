"""Reading weight files. Nothing in a file is ever run: safetensors, or a pickle with `weights_only=True`."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crossvit.errors import UsageError, WeightsError

WEIGHTS_NAME = "model.safetensors"  # in a run folder


def weight_file(source: str | Path) -> Path:
    """The file meant by a run folder or a path. UsageError if there is none."""
    path = Path(source).expanduser()
    if (path / "run.json").is_file() and not (path / WEIGHTS_NAME).is_file():
        raise UsageError(f"the run {path} has no weights yet: let it finish with --resume")
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if not path.is_file():
        raise UsageError(f"no weights at {path}: give a run folder, a .safetensors or a .pth file")
    return path


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a run folder, a `.safetensors` file or a `.pth`/`.pt` state dict (flat, or under `model`).

    UsageError if there is no such file; WeightsError if it is damaged or holds something other than tensors.
    """
    path = weight_file(source)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an untrusted file can make the unpickler fail in any way
        known = isinstance(error, SafetensorError | pickle.UnpicklingError | RuntimeError | OSError)
        reason = str(error).strip().splitlines()[0] if known and str(error).strip() else "not a file of tensors"
        raise WeightsError(f"{path} cannot be read as weights ({reason}): fetch or save it again") from error
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} is not a state dict: it should map names to tensors, flat or under 'model'")
    return state
