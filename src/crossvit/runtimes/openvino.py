"""OpenVINO on the model's ONNX file, on the CPU.

Its first compile of a model runs in a child process, since on some processors it ends the process (openvino#35943); what it
compiled is kept, and is loaded from then on.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossvit.errors import EngineError, UsageError
from crossvit.machine import physical_cores, version_of
from crossvit.run import write_atomically
from crossvit.runtimes.onnx import onnx_file
from crossvit.trained import Trained

HINTS = {"fp32": "f32", "bf16": "bf16"}
COMPILE_SECONDS = 300  # a compile that takes longer hangs


class OpenVINOEngine:
    """`engine(images)`: (B, C, H, W) float32 normalised -> (branches, B, classes) float32 logits, on the CPU."""

    name = "openvino"

    def __init__(self, path: Path, *, precision: str = "fp32") -> None:
        self.precision = precision
        self.request = _compile(path, precision).create_infer_request()

    @classmethod
    def load(cls, trained: Trained, *, precision: str = "fp32") -> OpenVINOEngine:
        """UsageError for a precision the processor lacks; EngineError where the model cannot be exported or compiled."""
        if precision == "bf16" and "BF16" not in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UsageError("this processor has no bf16 for OpenVINO: use --precision fp32")
        path = onnx_file(trained)
        try_compiling(path, precision)
        return cls(path, precision=precision)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        found = self.request.infer({0: np.ascontiguousarray(images)})
        return np.array(found[0], dtype=np.float32)  # a copy: the request writes over its own


def try_compiling(path: Path, precision: str) -> None:
    """Compile in a child process, once for a file, precision and version. EngineError if the child does not come back well."""
    survived = path.with_suffix(f".{precision}.openvino-{version_of('openvino')}")
    if survived.is_file():
        return
    try:
        child = subprocess.run(  # noqa: S603  # this interpreter and module, on a file of our own
            [sys.executable, "-m", "crossvit.runtimes.openvino", str(path), precision],
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"OpenVINO did not compile the model within {COMPILE_SECONDS} s") from None
    if child.returncode:
        said = child.stderr.strip().splitlines()
        why = (
            f"signal {-child.returncode}" if child.returncode < 0 else (said[-1][:200] if said else f"status {child.returncode}")
        )
        raise EngineError(f"OpenVINO cannot compile the model here ({why})")
    write_atomically(survived, b"")


def _core() -> Any:
    import openvino

    return openvino.Core()


def _compile(path: Path, precision: str) -> Any:
    return _core().compile_model(
        str(path),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": HINTS[precision],  # it picks bf16 by itself otherwise
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": physical_cores(),
            "CACHE_DIR": str(path.parent / "openvino"),
        },
    )


if __name__ == "__main__":
    OpenVINOEngine(Path(sys.argv[1]), precision=sys.argv[2])
