"""Timing contestants in turn: medians, spreads and ratios of one run; what they agree on; memory; the machine's limit."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from crossvit.bench.contestants import CONTESTANTS, REFERENCE, Call, Pair, make_pair, prepare
from crossvit.bench.memory import memory_before, memory_since
from crossvit.engines.select import SETTLE_SECONDS
from crossvit.engines.torch import resolve_device
from crossvit.errors import UsageError
from crossvit.fast.packed_linear import PackedLinear
from crossvit.hardware import physical_cores, processor, version_of
from crossvit.model.config import CrossViTConfig
from crossvit.model.cost import cost
from crossvit.model.presets import list_models, preset
from crossvit.results import Bench, BenchRow, Growth

MODELS = ("crossvit_9_240", "crossvit_15_dagger_240")
BATCHES = (16, 1)
PRECISIONS = ("fp32", "bf16")
SECONDS = 30.0  # of timing for a model and a batch
FEWEST_ROUNDS = 5
LIMIT_SHAPE = (
    4096,
    1024,
    1024,
)  # rows, in, out of the product that is the limit: large, and in the last cache
GROWTH_BATCHES = (1, 4, 16, 64)
GROWTH_SIZES = (120, 240, 360, 480)
GROWTH_BATCH = 4
GROWTH_ROUNDS = 3
PACKAGES = ("torch", "timm", "onnxruntime", "openvino", "zentorch")

Say = Callable[[str], object]


@contextlib.contextmanager
def a_thread_a_core() -> Iterator[None]:
    """torch on as many threads as the other engines take, whatever OMP_NUM_THREADS says."""
    before = torch.get_num_threads()
    torch.set_num_threads(physical_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@a_thread_a_core()
def bench(
    models: Sequence[str] = MODELS,
    *,
    engines: Sequence[str] = (),
    batches: Sequence[int] = BATCHES,
    precisions: Sequence[str] = PRECISIONS,
    image_size: int | None = None,
    device: str = "auto",
    train: bool = False,
    growth: bool = True,
    seconds: float = SECONDS,
    say: Say = lambda line: None,
) -> Bench:
    """Time every contestant on every model, in turn, in this process.

    models: released ones, by timm's name or the authors'.
    engines: contestants by name (`ours-torch`, `timm-openvino`, ...) or by a word of it (`ours`, `openvino`); none is all.
    What is not installed or fails is left out with a line to `say`. timm-eager in fp32 is always there: ratios are to it.
    seconds: of timing for a model and a batch; `train` times a training step as well; `growth` how cost grows.
    """
    from crossvit.bench.training import training_rows

    chosen = choose(engines)
    place = resolve_device(device)
    models = [released(name) for name in models]  # a wrong name is said before anything is built
    limits = {precision: matrix_limit(precision, place) for precision in precisions}
    rows: list[BenchRow] = []
    skipped: dict[str, str] = {}
    for name in models:
        with tempfile.TemporaryDirectory(prefix="crossvit-bench-") as folder:
            pair = make_pair(name, image_size=image_size, device=place, folder=Path(folder))
            say(f"{name}: preparing")
            calls, memory = _prepared(
                pair, chosen, precisions, batches=batches, skipped=skipped, say=say
            )
            for batch in batches:
                say(f"{name}: batch {batch}, {len(calls)} contestants")
                rows += _timed(
                    name, pair, calls, memory=memory, batch=batch, limits=limits, seconds=seconds
                )
            if train:
                say(f"{name}: training steps")
                rows += training_rows(name, pair, precisions, max(batches))
        torch.compiler.reset()  # what was compiled for this model
    return Bench(
        processor=torch.cuda.get_device_name(place) if place.type == "cuda" else processor(),
        threads=torch.get_num_threads(),
        cores=physical_cores(),
        device=place.type,
        versions={package: found for package in PACKAGES if (found := version_of(package))},
        limits=limits,
        rows=tuple(rows),
        growth=tuple(_growth(models[0], place, image_size, say)) if growth else (),
        skipped=skipped,
    )


def released(name: str) -> str:
    """timm's name of a released model. UsageError for a model that timm lacks: there would be nothing to time it against."""
    row = preset(name)
    if not row.released:
        others = ", ".join(other for other in list_models() if preset(other).released)
        raise UsageError(
            f"{name} is not among timm's models, against which the bench times: use {others}"
        )
    return row.name


def choose(engines: Sequence[str]) -> list[str]:
    """The contestants meant, timm-eager first. UsageError for a name that is none."""
    for name in engines:
        if not any(name in (contestant, *contestant.split("-")) for contestant in CONTESTANTS):
            raise UsageError(
                f"no contestant {name!r}: use {', '.join(CONTESTANTS)}, or a word of one"
            )
    return [
        contestant
        for contestant in CONTESTANTS
        if contestant == REFERENCE
        or not engines
        or any(name in (contestant, *contestant.split("-")) for name in engines)
    ]


def matrix_limit(precision: str, device: torch.device) -> float:
    """GFLOP/s (two a multiply-accumulate) of one large linear layer, the better of torch's and oneDNN's own."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    rows, inward, outward = LIMIT_SHAPE
    x, weight = (
        torch.randn(shape, device=device).to(dtype) for shape in ((rows, inward), (outward, inward))
    )
    bias = torch.zeros(outward, dtype=dtype, device=device)
    calls: list[Callable[[], object]] = [lambda: F.linear(x, weight, bias)]
    if device.type == "cpu":
        packed = PackedLinear(weight, bias, rows=rows)
        calls.append(lambda: packed(x))
    best = 0.0
    with torch.inference_mode():
        for _ in range(8):
            for call in calls:
                best = max(best, 2 * rows * inward * outward / _seconds(call, device) / 1e9)
    return best


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _prepared(
    pair: Pair,
    chosen: Sequence[str],
    precisions: Sequence[str],
    *,
    batches: Sequence[int],
    skipped: dict[str, str],
    say: Say,
) -> tuple[dict[tuple[str, str], Call], dict[tuple[str, str], float]]:
    """(calls by (contestant, precision), megabytes that each took to come up and compute a batch)."""
    images = [_images(pair, batch) for batch in sorted(batches, reverse=True)]
    calls: dict[tuple[str, str], Call] = {}
    memory: dict[tuple[str, str], float] = {}
    for contestant in chosen:
        for precision in CONTESTANTS[contestant]:
            key = (contestant, precision)
            if precision not in precisions and key != (REFERENCE, "fp32"):
                continue
            started = time.perf_counter()
            before = memory_before(pair.device)
            try:
                call = prepare(contestant, precision, pair)
                for given in images:  # each size may be compiled by itself
                    call(given)
            except Exception as error:  # noqa: BLE001  # a compiler's or an engine's own, of any kind
                skipped[f"{contestant} {precision}"] = (
                    str(error).splitlines() or [type(error).__name__]
                )[0][:200]
                say(f"  {contestant} {precision} left out: {skipped[f'{contestant} {precision}']}")
                continue
            calls[key], memory[key] = call, memory_since(before, pair.device)
            say(f"  {contestant} {precision} ready in {time.perf_counter() - started:.0f} s")
    return calls, memory


def _images(pair: Pair, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    config = pair.ours.config
    return torch.randn(batch, config.in_channels, *config.image_size, generator=generator).to(
        pair.device
    )


def _timed(
    name: str,
    pair: Pair,
    calls: dict[tuple[str, str], Call],
    *,
    memory: dict[tuple[str, str], float],
    batch: int,
    limits: dict[str, float],
    seconds: float,
) -> list[BenchRow]:
    images = _images(pair, batch)
    logits = {key: call(images).float().cpu() for key, call in calls.items()}
    times = _rounds(
        {key: _bound(call, images) for key, call in calls.items()}, pair.device, seconds
    )
    exact = logits[REFERENCE, "fp32"]
    reference = times[REFERENCE, "fp32"]
    flops = 2 * cost(pair.ours.config)["total"].macs * batch
    rows = []
    for (contestant, precision), found in times.items():
        median = statistics.median(found)
        ratios = [there / here for there, here in zip(reference, found, strict=True)]
        own = logits[contestant, precision]
        rows.append(
            BenchRow(
                model=name,
                contestant=contestant,
                precision=precision,
                batch=batch,
                image_size=pair.ours.config.image_size,
                milliseconds=1000 * median,
                fastest=1000 * min(found),
                slowest=1000 * max(found),
                rounds=len(found),
                images_per_second=batch / median,
                ratio=statistics.median(ratios),
                ratio_low=min(ratios),
                ratio_high=max(ratios),
                difference=float((own - exact).abs().max() / exact.abs().max()),
                same_top1=float((own.argmax(1) == exact.argmax(1)).float().mean()),
                megabytes=memory[contestant, precision],
                limit_share=flops / median / 1e9 / limits[precision]
                if precision in limits
                else None,
            )
        )
    return rows


def _bound(call: Call, images: Tensor) -> Callable[[], object]:
    return lambda: call(images)


def _rounds(
    calls: dict[tuple[str, str], Callable[[], object]], device: torch.device, seconds: float
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every call, round after round, so that what disturbs the machine disturbs them all."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    began = time.perf_counter()
    while len(next(iter(times.values()))) < FEWEST_ROUNDS or time.perf_counter() - began < seconds:
        for key, call in calls.items():
            time.sleep(SETTLE_SECONDS)
            times[key].append(_seconds(call, device))
    return times


# ---------------------------------------------------------------- how cost grows


def _growth(name: str, device: torch.device, image_size: int | None, say: Say) -> list[Growth]:
    """Milliseconds an image of timm eager and ours, fp32, by batch size and by image size (with its tokens)."""
    say(f"{name}: how cost grows")
    points = [("batch", batch, image_size) for batch in GROWTH_BATCHES]
    points += [("image size", GROWTH_BATCH, size) for size in GROWTH_SIZES]
    found = []
    for by, batch, size in points:
        with tempfile.TemporaryDirectory(prefix="crossvit-bench-") as folder:
            pair = make_pair(name, image_size=size, device=device, folder=Path(folder))
            images = _images(pair, batch)
            calls = {
                (who, "fp32"): _bound(prepare(who, "fp32", pair), images)
                for who in (REFERENCE, "ours-torch")
            }
            for call in calls.values():
                call()
            times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
            for _ in range(GROWTH_ROUNDS):
                for key, call in calls.items():
                    times[key].append(_seconds(call, device))
        config = pair.ours.config
        for (who, _), seconds in times.items():
            found.append(
                Growth(
                    contestant=who,
                    by=by,
                    batch=batch,
                    image_size=config.image_size,
                    tokens=tokens_of(config),
                    milliseconds=1000 * statistics.median(seconds) / batch,
                )
            )
    return found


def tokens_of(config: CrossViTConfig) -> int:
    """Tokens of all branches, class tokens with them."""
    grids = [branch.grid(config.image_size) for branch in config.branches]
    return sum(
        rows * columns + branch.class_token
        for (rows, columns), branch in zip(grids, config.branches, strict=True)
    )
