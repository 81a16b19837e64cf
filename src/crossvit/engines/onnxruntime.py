"""ONNX Runtime on the graph of a trained model."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from crossvit.engines.onnx_graph import check_parity, first_line, onnx_file
from crossvit.engines.protocol import EngineOutput, Images, Logits
from crossvit.errors import EngineError
from crossvit.hardware import instruction_sets, physical_cores
from crossvit.trained import Trained

# Weights from this size on lie in a file beside the graph, mapped into memory and not parsed.
MAPPED_BYTES = 1024

log = logging.getLogger("crossvit")


class OnnxRuntimeEngine:
    """`engine(images)`: (B, C, H, W) float32, normalised -> `EngineOutput`, on the CPU."""

    name = "onnxruntime"

    def __init__(self, path: Path, *, cache_optimised: bool = False) -> None:
        """
        Args:
            path: An ONNX file.
            cache_optimised: Whether ONNX Runtime's optimised graph is kept beside it for the next
                process; only for a file whose name changes with its content.

        Raises:
            EngineError: Where it does not load.
        """
        try:
            self.session = _cached_session(path) if cache_optimised else _session(path)
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime cannot load the model ({first_line(error)})"
            ) from error
        self.precision = "fp32"

    @classmethod
    def load(cls, trained: Trained, *, precision: str = "fp32") -> OnnxRuntimeEngine:
        """The engine of a trained model, checked against the plain model's logits.

        Raises:
            EngineError: Where the model cannot be exported or loaded, or its logits differ.
        """
        assert precision == "fp32"
        path = onnx_file(trained)
        engine = cls(path, cache_optimised=True)
        import onnxruntime

        # importlib.metadata takes longer than an attribute of a loaded package
        check_parity(engine, path, trained, version=onnxruntime.__version__)
        return engine

    def __call__(self, images: Images) -> EngineOutput:
        return EngineOutput.of_branches(self.compute(images))

    def compute(self, images: Images) -> Logits:
        """The graph's output; for graphs of `onnx_graph`, branch logits (branches, B, classes)."""
        (logits,) = self.session.run(None, {"images": np.ascontiguousarray(images)})
        return logits  # type: ignore[no-any-return]


def _session(path: Path, *, optimised: bool = False, save_to: Path | None = None) -> Any:
    """A session on an ONNX file.

    Args:
        path: The file.
        optimised: Whether its graph is optimised already.
        save_to: Where to write the optimised graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.log_severity_level = 4  # fatal: errors come as exceptions too, once is enough
    if optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
        weights = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{weights}file_name", f"{save_to.stem}.weights")
        options.add_session_config_entry(f"{weights}min_size_in_bytes", str(MAPPED_BYTES))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _cached_session(path: Path) -> Any:
    """A session on the cached optimised graph of `path`: half the time (docs/performance.md).

    The graph has operators of this version and layouts for this processor, so its folder is named
    after both. A graph that does not load is removed, and `path` itself is loaded.
    """
    import onnxruntime

    machine = hashlib.sha256(instruction_sets().encode()).hexdigest()[:8]
    folder = path.with_suffix(f".onnxruntime-{onnxruntime.__version__}-{machine}")
    try:
        if not folder.is_dir():
            _write_optimised(path, folder)
        return _session(folder / "graph.onnx", optimised=True)
    except Exception as error:  # noqa: BLE001  # ONNX Runtime's, or of an unwritable folder
        log.info("the optimised graph in %s is not used: %s", folder, first_line(error))
        shutil.rmtree(folder, ignore_errors=True)
        return _session(path)


def _write_optimised(path: Path, folder: Path) -> None:
    """Write graph.onnx and graph.weights into `folder`, synced and renamed in one step."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".optimised-") as temporary:
        unfinished = Path(temporary) / "graph"
        unfinished.mkdir()
        _session(path, save_to=unfinished / "graph.onnx")
        for file in unfinished.iterdir():
            with file.open("rb+") as written:  # Windows syncs what is open for writing
                os.fsync(written.fileno())
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first
                raise
