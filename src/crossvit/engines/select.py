"""Selection of the inference engine, for evaluation, prediction and explanation alike.

`auto` times the installed engines, once for a model on a machine, and caches the name of the
fastest whose logits agree with torch in fp32. For an engine that is missing or fails the log has one
line, and torch computes in its place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from crossvit.cache import cache_folder
from crossvit.engines.protocol import Engine, EngineOutput, Images
from crossvit.errors import EngineError, UsageError
from crossvit.fast.parity import TOLERANCE, difference
from crossvit.files import write_atomically
from crossvit.hardware import is_installed, processor, version_of
from crossvit.trained import Trained

if TYPE_CHECKING:
    from crossvit.model.crossvit import CrossViT

ENGINES = ("torch", "onnxruntime", "openvino")  # each named after the package it needs
EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino"}  # pip install 'crossvit[...]'
PRECISIONS = {
    "torch": ("fp32", "bf16", "fp16"),
    "onnxruntime": ("fp32",),
    "openvino": ("fp32", "bf16"),
}
TRIAL_SECONDS = 2.0  # of timing in all, on first use of `auto`
TRIAL_BATCH = 8
# Before each timed call: an engine's threads keep spinning on the cores for a while after its last.
SETTLE_SECONDS = 0.1

log = logging.getLogger("crossvit")


def load_engine(
    trained: Trained,
    *,
    engine: str = "torch",
    device: str = "auto",
    precision: str = "auto",
    model: CrossViT | None = None,
) -> Engine:
    """The inference engine of a trained model.

    Where the requested engine is not installed or cannot compute the model, torch computes instead
    and the log has one line.

    Args:
        trained: The trained model.
        engine: torch, onnxruntime, openvino, or auto: the fastest on this machine, by trial. All
            but torch compute on the CPU.
        device: auto, cpu, cuda or mps.
        precision: fp32, bf16 or fp16; auto is fp32, so that results do not depend on the processor.
        model: `trained.build()`, for a caller that has it already; the torch engine computes with
            a form of it, and moves it to the device.

    Raises:
        UsageError: For an unknown or unavailable engine, device or precision.
    """
    if engine not in ("auto", *ENGINES):
        raise UsageError(f"engine {engine!r}: use auto, {', '.join(ENGINES)}")
    if engine not in ("auto", "torch") and precision not in ("auto", *PRECISIONS[engine]):
        raise UsageError(
            f"engine {engine} computes in {' or '.join(PRECISIONS[engine])}, not {precision!r}"
        )
    if engine == "auto":
        return BatchSplitting(_fastest(trained, device=device, precision=precision, model=model))
    try:
        return BatchSplitting(
            _load(trained, engine, device=device, precision=precision, model=model)
        )
    except EngineError as error:
        log.warning("%s; torch computes instead", error)
        return BatchSplitting(
            _load(trained, "torch", device=device, precision=precision, model=model)
        )


def installed_engines() -> list[str]:
    """The engines whose packages are installed, torch first."""
    return [engine for engine in ENGINES if is_installed(engine)]


def _load(
    trained: Trained, engine: str, *, device: str, precision: str, model: CrossViT | None = None
) -> Engine:
    """The engine by name.

    Raises:
        EngineError: Where it is not installed or does not load.
    """
    if not is_installed(engine):
        raise EngineError(
            f"engine {engine} is not installed (pip install 'crossvit[{EXTRAS[engine]}]')"
        )
    if engine == "torch":
        from crossvit.engines.torch import TorchEngine

        return TorchEngine.load(trained, device=device, precision=precision, model=model)
    if device not in ("auto", "cpu"):
        raise UsageError(
            f"engine {engine} computes on the CPU here, not on {device!r}: "
            "leave out --device, or take --engine torch"
        )
    precision = "fp32" if precision == "auto" else precision
    if engine == "onnxruntime":
        from crossvit.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine.load(trained, precision=precision)
    from crossvit.engines.openvino import OpenVINOEngine

    return OpenVINOEngine.load(trained, precision=precision)


# ---------------------------------------------------------------- auto


def _fastest(trained: Trained, *, device: str, precision: str, model: CrossViT | None) -> Engine:
    """The fastest engine that agrees with torch, from the cache or by trial.

    On a GPU there is no trial: only torch computes there.
    """
    reference = _load(trained, "torch", device=device, precision=precision, model=model)
    if getattr(reference, "on_gpu", False):
        return reference
    resolved = reference.precision
    names = [name for name in installed_engines() if resolved in PRECISIONS[name]]
    key = trial_key(trained, resolved, names)
    known = _remembered().get(key)
    if known in names:
        try:
            return (
                reference
                if known == "torch"
                else _load(trained, known, device="cpu", precision=resolved)
            )
        except EngineError as error:
            log.warning("%s; engines are tried again", error)
    engines: dict[str, Engine] = {"torch": reference}
    for name in names[1:]:
        try:
            engines[name] = _load(trained, name, device="cpu", precision=resolved)
        # UsageError: a precision that the engine lacks on this processor
        except (EngineError, UsageError) as error:
            log.warning("%s; left out", error)
    exact = (
        reference
        if resolved == "fp32"
        else _load(trained, "torch", device="cpu", precision="fp32", model=model)
    )
    height, width = trained.config.image_size
    images = np.random.default_rng(0).standard_normal(
        (TRIAL_BATCH, trained.config.in_channels, height, width), dtype=np.float32
    )
    expected = exact(images)
    agreed = {
        name: engine
        for name, engine in engines.items()
        if _agrees(name, engine, images, expected, resolved)
    }
    speeds = race(
        {name: _call(engine, images) for name, engine in agreed.items()}, seconds=TRIAL_SECONDS
    )
    best = min(speeds, key=lambda name: speeds[name])
    log.info(
        "engine %s: %s",
        best,
        ", ".join(
            f"{name} {1000 * time / TRIAL_BATCH:.1f} ms an image" for name, time in speeds.items()
        ),
    )
    _remember(key, best)
    return agreed[best]


def _call(engine: Engine, images: Images) -> Callable[[], object]:
    return lambda: engine(images)


def _agrees(name: str, engine: Engine, images: Images, exact: EngineOutput, precision: str) -> bool:
    if name == "torch":
        return True
    try:
        output = engine(images)
    except Exception as error:  # noqa: BLE001  # engines raise exceptions of any kind
        log.warning(
            "engine %s fails (%s); left out",
            name,
            (str(error).splitlines() or [type(error).__name__])[0][:200],
        )
        return False
    deviation = difference(output, exact)
    if deviation <= TOLERANCE[precision]:
        return True
    log.warning(
        "engine %s differs from torch by %.1e of the largest logit (%.0e is let through); left out",
        name, deviation, TOLERANCE[precision],
    )  # fmt: skip
    return False


def race(calls: dict[str, Callable[[], object]], *, seconds: float) -> dict[str, float]:
    """Time calls in turn, round after round.

    Args:
        calls: The calls by name.
        seconds: Of timing in all, about; there are at least three rounds.

    Returns:
        The median seconds of each call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(next(iter(times.values()))) < 3:
        for name, call in calls.items():
            time.sleep(SETTLE_SECONDS)
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: float(np.median(samples)) for name, samples in times.items()}


def trial_key(trained: Trained, precision: str, engines: list[str]) -> str:
    """Digest of what a trial's outcome depends on: config, precision, machine and versions."""
    versions = {name: version_of(name) for name in engines}
    machine = [platform.machine(), processor(), os.cpu_count()]
    described = json.dumps(
        [trained.config.to_dict(), precision, machine, versions, version_of("crossvit")],
        sort_keys=True,
    )
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def _remembered() -> dict[str, str]:
    try:
        choices = json.loads((cache_folder() / "engines.json").read_text())
    except (OSError, ValueError):
        return {}
    return choices if isinstance(choices, dict) else {}


def _remember(key: str, engine: str) -> None:
    """Write the choice to the cache; where that fails there is another trial next time."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_atomically(
            cache_folder() / "engines.json",
            json.dumps({**_remembered(), key: engine}, indent=1).encode(),
        )
    except Exception as error:  # noqa: BLE001  # a failed write stops no prediction
        log.info("the choice of engine is not cached: %s", error)


# ---------------------------------------------------------------- too little memory


class BatchSplitting:
    """An engine that halves its batch where memory runs out, and logs the new size."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.name, self.precision = engine.name, engine.precision
        self.max_batch: int | None = None  # images in one call

    def __call__(self, images: Images) -> EngineOutput:
        parts = []
        done = 0
        while done < len(images):
            size = min(self.max_batch or len(images), len(images) - done)
            try:
                parts.append(self.engine(images[done : done + size]))
            except Exception as error:  # ONNX Runtime's have no common base
                if size == 1 or not _out_of_memory(error):
                    raise
                self.max_batch = size // 2
                log.warning(
                    "memory does not hold %d images at once: going on with %d", size, self.max_batch
                )
                continue
            done += size
        return EngineOutput.join(parts)


def _out_of_memory(error: BaseException) -> bool:
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(
        mark in message
        for mark in (
            "out of memory",
            "not enough memory",
            "can't allocate memory",
            "bad_alloc",
            "failed to allocate",
        )
    )
