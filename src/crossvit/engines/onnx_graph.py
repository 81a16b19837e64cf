"""Graphs for engines: a trained model as an ONNX file, kept under the digest of what it was made from.

ONNX Runtime and OpenVINO read the same file. Finding a kept one imports no torch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from crossvit.cache import cache_folder, digest_of
from crossvit.engines.protocol import Engine
from crossvit.errors import EngineError
from crossvit.fast.parity import compare, witness_images, write_witness
from crossvit.files import write_atomically
from crossvit.hardware import instruction_sets, is_installed, version_of
from crossvit.model.config import CrossViTConfig
from crossvit.model.registry import BLOCKS, FUSIONS, TOKENISERS
from crossvit.run import Run
from crossvit.trained import Trained

if TYPE_CHECKING:
    from torch import nn

PACKAGE = Path(__file__).parents[1]
_IMPORTED_FROM = {"crossvit", "torch", *sys.stdlib_module_names}
EXPORT_FORM = 2  # raised when the graph that is exported changes

log = logging.getLogger("crossvit")


def onnx_file(trained: Trained) -> Path:
    """The model as ONNX, images (batch, C, H, W) -> branch logits (branches, batch, classes): kept in the cache under the
    digest of its weights, and exported where it is not there. Finding a kept one imports no torch."""
    path = cache_folder() / "onnx" / f"{fingerprint(trained)}.onnx"
    if not (path.is_file() and witness_of(path).is_file()):
        export(trained, path)
    return path


def witness_of(path: Path) -> Path:
    """The file with the plain model's logits that belongs to an exported graph."""
    return path.with_suffix(".witness.npy")


def check_parity(engine: Engine, path: Path, trained: Trained) -> None:
    """Compare an engine on an exported graph with the graph's witness.

    Once for a graph, engine, version, precision and processor: that they agreed is kept beside it.

    Raises:
        EngineError: Where they differ.
    """
    machine = hashlib.sha256(instruction_sets().encode()).hexdigest()[:8]
    # looking a version up takes longer than asking a package that is loaded already
    version = getattr(sys.modules.get(engine.name), "__version__", "") or version_of(engine.name)
    kind = f"{engine.name}-{version}-{engine.precision}-{machine}"
    agreed = path.with_suffix(f".{kind}.agrees")
    if agreed.is_file():
        return
    logits = engine(witness_images(trained.config)).branch_logits
    compare(logits, witness_of(path), engine=engine.name, precision=engine.precision)
    try:
        write_atomically(agreed, b"")
    except Exception as error:  # noqa: BLE001  # of the system or of ours: compared again next time
        log.info("that %s agrees is not kept: %s", kind, error)


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
    for text in _patched_code():
        digest.update(text)
    return digest.hexdigest()[:32]


def _patched_code() -> Iterator[bytes]:
    """Functions that this process has put in place of the model's own, each as text.

    Nothing where the model has not been imported: then it is what its files say.
    """
    for module_name in sorted(name for name in sys.modules if name.startswith("crossvit.model.")):
        module = sys.modules[module_name]
        for name, item in vars(module).items():
            home = str(getattr(item, "__module__", "")).partition(".")[0]
            if inspect.isfunction(item) and home not in _IMPORTED_FROM:
                yield f"{module_name}.{name} = {_text_of(item.__code__)}".encode()
            if not inspect.isclass(item) or item.__module__ != module_name:
                continue
            for method_name, method in vars(item).items():
                if not inspect.isfunction(method) or method.__code__.co_filename == "<string>":
                    continue  # a dataclass's own
                home = method.__globals__["__name__"].partition(".")[0]
                if home not in _IMPORTED_FROM:
                    text = _text_of(method.__code__)
                    yield f"{item.__qualname__}.{method_name} = {text}".encode()


def _text_of(code: CodeType) -> str:
    constants = (_text_of(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts)
    return f"{code.co_code.hex()} {code.co_names} {' '.join(constants)}"


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

    config, model = trained.config, trained.build()
    export_module(
        GraphForm(model),
        path,
        in_channels=config.in_channels,
        image_size=config.image_size,
    )
    write_witness(witness_of(path), model)


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
        raise EngineError(f"the model cannot be exported to ONNX ({first_line(error)})") from error
    finally:
        quiet.setLevel(before)


def _require_packages() -> None:
    missing = [package for package in ("onnx", "onnxscript") if not is_installed(package)]
    if missing:
        raise EngineError(
            f"exporting to ONNX needs {' and '.join(missing)} (pip install 'crossvit[onnx]')"
        )


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
