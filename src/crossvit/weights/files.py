"""Reading weight files. Nothing in a file is ever run: safetensors, or a pickle with `weights_only=True`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from crossvit.errors import UsageError, WeightsError


def weight_file(source: str | Path) -> Path:
    """The file meant by a run folder or a path. UsageError if there is none."""
    path = Path(source)
    if path.is_dir():
        path = path / "model.safetensors"
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{path} cannot be read as weights ({reason}): fetch or save it again") from error
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} is not a state dict: it should map names to tensors, flat or under 'model'")
    return state
