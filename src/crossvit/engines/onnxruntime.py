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

MAPPED_BYTES = 1024  # a weight from this size on lies apart from the kept graph, where it is mapped into memory and not parsed

log = logging.getLogger("crossvit")


class OnnxRuntimeEngine:
    """`engine(images)`: (B, C, H, W) float32, normalised -> `EngineOutput`, on the CPU."""

    name = "onnxruntime"

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        """path: an ONNX file. keep: whether the graph that ONNX Runtime makes of it is kept beside it for the next process; for
        a file of the cache, whose name changes with what is in it. EngineError where it does not load."""
        try:
            self.session = _kept_session(path) if keep else _session(path)
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime cannot load the model ({first_line(error)})"
            ) from error
        self.precision = "fp32"

    @classmethod
    def load(cls, trained: Trained, *, precision: str = "fp32") -> OnnxRuntimeEngine:
        """EngineError where the model cannot be exported or loaded."""
        assert precision == "fp32"
        path = onnx_file(trained)
        engine = cls(path, keep=True)
        check_parity(engine, path, trained)
        return engine

    def __call__(self, images: Images) -> EngineOutput:
        return EngineOutput.of_branches(self.compute(images))

    def compute(self, images: Images) -> Logits:
        """The file's output as it is: of our graphs the branch logits (branches, B, classes)."""
        (logits,) = self.session.run(None, {"images": np.ascontiguousarray(images)})
        return logits  # type: ignore[no-any-return]


def _session(path: Path, *, optimised: bool = False, save_to: Path | None = None) -> Any:
    """A session on `path`. optimised: its graph is so already.  save_to: where to write the graph as it was optimised."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.log_severity_level = (
        4  # fatal: an error comes as an exception, and it writes the same on stderr itself
    )
    if optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
        weights = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{weights}file_name", f"{save_to.stem}.weights")
        options.add_session_config_entry(f"{weights}min_size_in_bytes", str(MAPPED_BYTES))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _kept_session(path: Path) -> Any:
    """A session on the graph that ONNX Runtime once made of `path`, which takes half the time of making it (docs/performance.md).

    It has operators of this version and layouts for this processor, so the name of its folder has both. One that does not load
    is removed, and `path` itself is loaded.
    """
    import onnxruntime

    machine = hashlib.sha256(instruction_sets().encode()).hexdigest()[:8]
    kept = path.with_suffix(f".onnxruntime-{onnxruntime.__version__}-{machine}")
    try:
        if not kept.is_dir():
            _keep_optimised(path, kept)
        return _session(kept / "graph.onnx", optimised=True)
    except Exception as error:  # noqa: BLE001  # ONNX Runtime's many, and a folder that cannot be written
        log.info("the optimised graph in %s is not used: %s", kept, first_line(error))
        shutil.rmtree(kept, ignore_errors=True)
        return _session(path)


def _keep_optimised(path: Path, kept: Path) -> None:
    """Make the folder `kept` with graph.onnx and graph.weights, whole and on disk or not at all."""
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".optimised-") as folder:
        made = Path(folder) / "made"
        made.mkdir()
        _session(path, save_to=made / "graph.onnx")
        for file in made.iterdir():
            with file.open("rb+") as written:  # Windows syncs what is open for writing
                os.fsync(written.fileno())
        try:
            made.rename(kept)
        except OSError:
            if not kept.is_dir():  # otherwise another process was first
                raise
