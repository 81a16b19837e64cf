"""The ONNX file of a trained model, kept in the cache, and ONNX Runtime on it."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crossvit.cache import cache_folder, digest_of
from crossvit.engines.protocol import EngineOutput, Images, Logits
from crossvit.errors import EngineError
from crossvit.files import write_atomically
from crossvit.hardware import instruction_sets, is_installed, physical_cores
from crossvit.model.config import CrossViTConfig
from crossvit.model.registry import BLOCKS, FUSIONS, TOKENISERS
from crossvit.run import Run
from crossvit.trained import Trained

if TYPE_CHECKING:
    from torch import nn

PACKAGE = Path(__file__).parents[1]
EXPORT_FORM = 2  # raised when the graph that is exported changes
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
                f"ONNX Runtime cannot load the model ({_first_line(error)})"
            ) from error
        self.precision = "fp32"

    @classmethod
    def load(cls, trained: Trained, *, precision: str = "fp32") -> OnnxRuntimeEngine:
        """EngineError where the model cannot be exported or loaded."""
        assert precision == "fp32"
        return cls(onnx_file(trained), keep=True)

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
        log.info("the optimised graph in %s is not used: %s", kept, _first_line(error))
        shutil.rmtree(kept, ignore_errors=True)
        return _session(path)


def _keep_optimised(path: Path, kept: Path) -> None:
    """Make the folder `kept` with graph.onnx and graph.weights, whole and on disk or not at all."""
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".optimised-") as folder:
        made = Path(folder) / "made"
        made.mkdir()
        _session(path, save_to=made / "graph.onnx")
        for file in made.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        try:
            made.rename(kept)
        except OSError:
            if not kept.is_dir():  # otherwise another process was first
                raise


def onnx_file(trained: Trained) -> Path:
    """The model as ONNX, images (batch, C, H, W) -> branch logits (branches, batch, classes): kept in the cache under the
    digest of its weights, and exported where it is not there. Finding a kept one imports no torch."""
    path = cache_folder() / "onnx" / f"{fingerprint(trained)}.onnx"
    if not path.is_file():
        export(trained, path)
    return path


def fingerprint(trained: Trained) -> str:
    """Digest of the weights' bytes, the config, and the code that a graph is made from: an edited block never finds the graph
    of before. Imports no torch unless the model has parts of somebody's own."""
    source = (
        trained.weights.path if trained.weights is not None else Run(trained.source).weights_path
    )
    digest = hashlib.sha256(
        json.dumps([EXPORT_FORM, trained.config.to_dict()], sort_keys=True).encode()
    )
    digest.update(bytes.fromhex(digest_of(source)))
    for file in [
        *sorted((PACKAGE / "model").glob("*.py")),
        *sorted((PACKAGE / "fast").glob("*.py")),
    ]:
        digest.update(file.read_bytes())
    for part in _registered_parts(trained.config):
        digest.update(_source_of(part))
    return digest.hexdigest()[:32]


def _registered_parts(config: CrossViTConfig) -> list[Any]:
    """The classes that a config's names stand for, of those that are not built in."""
    tokenisers = [(TOKENISERS, branch.tokeniser) for branch in config.branches]
    named = [(BLOCKS, config.block), (FUSIONS, config.fusion), *tokenisers]
    return [registry[name] for registry, name in named if name not in registry.built_in]


def _source_of(part: Any) -> bytes:
    """The file that a class is written in; of one that has none, something that is never the same."""
    try:
        return Path(inspect.getfile(part)).read_bytes()
    except (OSError, TypeError):
        return os.urandom(16)


def export(trained: Trained, path: Path) -> None:
    """Write `trained` to `path`, whole or not at all. EngineError where torch or ONNX cannot."""
    _require_packages()
    from crossvit.fast.export_form import GraphForm

    config = trained.config
    export_module(
        GraphForm(trained.build()),
        path,
        in_channels=config.in_channels,
        image_size=config.image_size,
    )


def export_module(
    module: nn.Module, path: Path, *, in_channels: int, image_size: tuple[int, int]
) -> None:
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
    missing = [package for package in ("onnx", "onnxscript") if not is_installed(package)]
    if missing:
        raise EngineError(
            f"exporting to ONNX needs {' and '.join(missing)} (pip install 'crossvit[onnx]')"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
