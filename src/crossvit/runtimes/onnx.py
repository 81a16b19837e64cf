"""The ONNX file of a trained model, kept in the cache, and ONNX Runtime on it."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crossvit.errors import EngineError
from crossvit.run import Run, write_atomically
from crossvit.runtimes.machine import physical_cores, version_of
from crossvit.trained import Trained
from crossvit.weights.hub import cache_folder

if TYPE_CHECKING:
    from torch import nn

EXPORT_FORM = 2  # raised when the graph that is exported changes


class OnnxRuntimeEngine:
    """`engine(images)`: (B, C, H, W) float32 normalised -> (branches, B, classes) float32 logits, on the CPU."""

    name = "onnxruntime"

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = physical_cores()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineError(f"ONNX Runtime cannot load the model ({_first_line(error)})") from error
        self.precision = "fp32"

    @classmethod
    def load(cls, trained: Trained, *, precision: str = "fp32") -> OnnxRuntimeEngine:
        """EngineError where the model cannot be exported or loaded."""
        assert precision == "fp32"
        return cls(onnx_file(trained))

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        (logits,) = self.session.run(None, {"images": np.ascontiguousarray(images)})
        return logits  # type: ignore[no-any-return]


def onnx_file(trained: Trained) -> Path:
    """The model as ONNX, images (batch, C, H, W) -> branch logits (branches, batch, classes): kept in the cache under the
    digest of its weights, and exported where it is not there. Finding a kept one imports no torch."""
    path = cache_folder() / "onnx" / f"{fingerprint(trained)}.onnx"
    if not path.is_file():
        export(trained, path)
    return path


def fingerprint(trained: Trained) -> str:
    """Digest of the weights' bytes and the config."""
    source = trained.weights.path if trained.weights is not None else Run(trained.source).weights_path
    digest = hashlib.sha256(json.dumps([EXPORT_FORM, trained.config.to_dict()], sort_keys=True).encode())
    with source.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def export(trained: Trained, path: Path) -> None:
    """Write `trained` to `path`, whole or not at all. EngineError where torch or ONNX cannot."""
    _require_packages()
    from crossvit.runtimes.graph import GraphForm

    config = trained.config
    export_module(GraphForm(trained.build()), path, in_channels=config.in_channels, image_size=config.image_size)


def export_module(module: nn.Module, path: Path, *, in_channels: int, image_size: tuple[int, int]) -> None:
    """Write any module of images (batch, C, H, W) as an ONNX file with that input, any batch, and one output `logits`."""
    _require_packages()
    import torch

    example = torch.zeros(2, in_channels, *image_size)  # a batch of 1 would be made a constant
    quiet = logging.getLogger("torch.onnx")
    before = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1 << 16)},),
            )
        assert program is not None
        write_atomically(path, program.model_proto.SerializeToString())
    except Exception as error:
        raise EngineError(f"the model cannot be exported to ONNX ({_first_line(error)})") from error
    finally:
        quiet.setLevel(before)


def _require_packages() -> None:
    missing = [package for package in ("onnx", "onnxscript") if not version_of(package)]
    if missing:
        raise EngineError(f"exporting to ONNX needs {' and '.join(missing)} (pip install 'crossvit[onnx]')")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
