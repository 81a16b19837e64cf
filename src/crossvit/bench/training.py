"""A training step of ours against timm's: forward, backward and AdamW, in turn.

Ours takes a batch in the parts that `crossvit train` would; timm's takes it whole, as timm's script does.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.bench.contestants import Pair
from crossvit.bench.memory import memory_before, memory_since
from crossvit.engines.torch import autocast
from crossvit.results import BenchRow
from crossvit.train.setup import suitable_parts

ROUNDS = 5


def training_rows(name: str, pair: Pair, precisions: Sequence[str], batch: int) -> list[BenchRow]:
    """One row each for `timm-training` and `ours-training` in each precision; ratios are to timm in the same precision."""
    config = pair.ours.config
    images = torch.randn(batch, config.in_channels, *config.image_size, device=pair.device)
    labels = torch.randint(0, config.num_classes, (batch,), device=pair.device)
    parts = {"timm": 1, "ours": suitable_parts(config, images=batch, device=pair.device.type)}
    rows = []
    for precision in precisions:
        steps = {
            who: stepper(copy.deepcopy(getattr(pair, who)), precision, images, labels, parts=count)
            for who, count in parts.items()
        }
        times: dict[str, list[float]] = {who: [] for who in steps}
        for _ in range(ROUNDS + 1):
            for who, step in steps.items():
                started = time.perf_counter()
                step()
                times[who].append(time.perf_counter() - started)
        memory = {who: _megabytes(step, pair.device) for who, step in steps.items()}
        kept = {who: found[1:] for who, found in times.items()}  # the first allocates
        for who, found in kept.items():
            ratios = [there / here for there, here in zip(kept["timm"], found, strict=True)]
            median = statistics.median(found)
            rows.append(
                BenchRow(
                    model=name,
                    contestant=f"{who}-training",
                    precision=precision,
                    batch=batch,
                    image_size=config.image_size,
                    milliseconds=1000 * median,
                    fastest=1000 * min(found),
                    slowest=1000 * max(found),
                    rounds=ROUNDS,
                    images_per_second=batch / median,
                    ratio=statistics.median(ratios),
                    ratio_low=min(ratios),
                    ratio_high=max(ratios),
                    megabytes=memory[who],
                )
            )
    return rows


def stepper(
    model: nn.Module, precision: str, images: Tensor, labels: Tensor, *, parts: int = 1
) -> Callable[[], None]:
    """One step of AdamW as training takes it, the batch in so many parts whose gradients add up."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        for part, wanted in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            with autocast(images.device, precision):
                logits = model(part)
            loss = F.cross_entropy(logits.float(), wanted) * (len(part) / len(images))
            loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)

    return step


def _megabytes(step: Callable[[], None], device: torch.device) -> float:
    """What a step takes beyond the model and the optimiser's state: activations and gradients."""
    before = memory_before(device)
    step()
    return memory_since(before, device)
