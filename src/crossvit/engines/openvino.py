"""OpenVINO on the model's ONNX file, on the CPU.

The first compilation of a model runs in a child process, since on some processors it ends the
process (openvino#35943). OpenVINO caches the compiled model and loads it from then on.

A large batch is computed in parts of a fixed size, several at a time on fewer threads each: threads
do not synchronise after every matmul, a part's activations stay in the processor's caches, and a
model compiled for a fixed size is faster (docs/performance.md).
"""

from __future__ import annotations

import subprocess
import sys
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossvit.engines.onnx_graph import check_parity, onnx_file
from crossvit.engines.protocol import EngineOutput, Images, Logits
from crossvit.errors import EngineError, UsageError
from crossvit.files import write_atomically
from crossvit.hardware import physical_cores, version_of
from crossvit.trained import Trained

HINTS = {"fp32": "f32", "bf16": "bf16"}
COMPILE_SECONDS = 600  # two compiles that take longer hang
PART_IMAGES = 4  # images in a part of a large batch
MAX_STREAMS = 4  # parts at a time; on a machine with more cores each has several threads


class OpenVINOEngine:
    """`engine(images)`: (B, C, H, W) float32, normalised -> `EngineOutput`, on the CPU.

    The model for whole batches and the model for parts are each compiled when first needed, since
    each holds a copy of the weights.
    """

    name = "openvino"

    def __init__(self, path: Path, *, precision: str = "fp32", in_parts: bool = True) -> None:
        """
        Args:
            path: An ONNX file of images (batch, C, H, W) whose output has the batch as its last
                axis but one.
            precision: fp32 or bf16.
            in_parts: Whether large batches are computed in parts; otherwise whole.
        """
        self.path = path
        self.precision = precision
        self.streams = stream_count() if in_parts else 1

    @classmethod
    def load(cls, trained: Trained, *, precision: str = "fp32") -> OpenVINOEngine:
        """The engine of a trained model, checked against the plain model's logits.

        Raises:
            UsageError: For a precision that the processor lacks.
            EngineError: Where the model cannot be exported or compiled, or its logits differ.
        """
        if precision == "bf16" and "BF16" not in _core().get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            raise UsageError("this processor has no bf16 for OpenVINO: use --precision fp32")
        path = onnx_file(trained)
        try_compiling(path, precision)
        engine = cls(path, precision=precision)
        check_parity(engine, path, trained, version=version_of("openvino"))
        return engine

    def __call__(self, images: Images) -> EngineOutput:
        return EngineOutput.of_branches(self.compute(images))

    def compute(self, images: Images) -> Logits:
        """The graph's output; for graphs of `onnx_graph`, branch logits (branches, B, classes)."""
        images = np.ascontiguousarray(images)
        at_once = self.streams * PART_IMAGES
        in_parts = len(images) // at_once * at_once if self.streams > 1 else 0
        logits = self._in_parts(images[:in_parts])
        if in_parts < len(images):
            outputs = self.request.infer({0: images[in_parts:]})
            logits.append(np.array(outputs[0], dtype=np.float32))  # the request reuses its buffer
        return np.concatenate(logits, axis=-2) if len(logits) > 1 else logits[0]

    def _in_parts(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """The logits of each part of `images`, in order; an empty list for no images."""
        parts: dict[int, NDArray[np.float32]] = {}
        if not len(images):
            return []
        requests = self.part_requests
        requests.set_callback(
            lambda request, start: parts.update(
                {start: np.array(request.get_output_tensor(0).data)}
            )
        )
        for start in range(0, len(images), PART_IMAGES):
            requests.start_async({0: images[start : start + PART_IMAGES]}, start)
        requests.wait_all()
        return [parts[start] for start in sorted(parts)]

    @cached_property
    def request(self) -> Any:
        """The request for any number of images, on all threads."""
        return _compile(self.path, self.precision).create_infer_request()

    @cached_property
    def part_requests(self) -> Any:
        """A request per stream, for PART_IMAGES each."""
        import openvino

        return openvino.AsyncInferQueue(
            _compile(self.path, self.precision, streams=self.streams), self.streams
        )


def try_compiling(path: Path, precision: str) -> None:
    """Compile in a child process, once for a file, precision and version.

    Raises:
        EngineError: Where the child fails or takes too long.
    """
    success_mark = path.with_suffix(f".{precision}.openvino-{version_of('openvino')}")
    if success_mark.is_file():
        return
    try:
        child = subprocess.run(  # noqa: S603  # this interpreter and module, a file of the cache
            [sys.executable, "-m", "crossvit.engines.openvino", str(path), precision],
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"OpenVINO did not compile the model within {COMPILE_SECONDS} s"
        ) from None
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        why = (
            f"signal {-child.returncode}"
            if child.returncode < 0
            else (lines[-1][:200] if lines else f"status {child.returncode}")
        )
        raise EngineError(f"OpenVINO cannot compile the model here ({why})")
    write_atomically(success_mark, b"")


def stream_count() -> int:
    """Number of parts computed at a time; at 1 batches are computed whole."""
    return min(physical_cores(), MAX_STREAMS)


@lru_cache
def _core() -> Any:
    """OpenVINO's core, a single one until the process ends.

    Each core installs a signal stack for the thread and restores the earlier one when it is freed.
    Of two freed in the order of their creation, the second restores the first's stack, whose memory
    is gone, and the next signal that Python handles ends the process.
    """
    import openvino

    return openvino.Core()


def _compile(path: Path, precision: str, *, streams: int = 1) -> Any:
    """The model compiled for any batch on all threads, or for `streams` parts of PART_IMAGES."""
    core = _core()
    model = core.read_model(path)
    if streams > 1:
        model.reshape({0: [PART_IMAGES, *list(model.input(0).get_partial_shape())[1:]]})
    return core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": HINTS[precision],  # its default may be bf16
            "PERFORMANCE_HINT": "THROUGHPUT" if streams > 1 else "LATENCY",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": physical_cores(),
            "CACHE_DIR": str(path.parent / "openvino"),
        },
    )


if __name__ == "__main__":
    _compile(Path(sys.argv[1]), sys.argv[2])
    _compile(Path(sys.argv[1]), sys.argv[2], streams=stream_count())
