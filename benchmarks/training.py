"""A training step of ours against timm's model: the same weights, batch, optimiser and precision, interleaved in one run.

Prints for each model and precision the milliseconds a step (median and spread), images a second, the ratio, and what each
holds at its peak beyond weights and optimiser (activations and gradients, as torch's profiler counts allocations).
`--rounds N` and `--models NAME...` choose.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time

import timm
import torch
from fusion import peak_megabytes

import crossvit
from crossvit.bench.training import stepper
from crossvit.train.setup import suitable_parts
from crossvit.weights.keys import to_ours

BATCH = 16
MODELS = ("crossvit_9_240", "crossvit_small_240")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    options = parser.parse_args()
    print(
        f"batch {BATCH}, {torch.get_num_threads()} threads, {options.rounds} interleaved rounds after 2 to warm up"
    )
    for name in options.models:
        theirs = timm.create_model(name)
        ours = crossvit.create_model(name)
        ours.load_state_dict(to_ours(theirs.state_dict(), ours.state_dict()))
        images, labels = (
            torch.randn(BATCH, 3, *ours.config.image_size),
            torch.randint(0, 1000, (BATCH,)),
        )
        for precision in options.precisions:
            parts = suitable_parts(
                ours.config, images=BATCH, device="cpu"
            )  # as training takes a batch
            steps = {
                "timm": stepper(theirs, precision, images, labels),
                "ours": stepper(ours, precision, images, labels, parts=parts),
            }
            times: dict[str, list[float]] = {who: [] for who in steps}
            for _ in range(options.rounds + 2):
                for who, step in steps.items():
                    started = time.perf_counter()
                    step()
                    times[who].append(1000 * (time.perf_counter() - started))
            median = {who: statistics.median(values[2:]) for who, values in times.items()}
            ratios = [
                there / here
                for there, here in zip(times["timm"][2:], times["ours"][2:], strict=True)
            ]
            memory = {who: peak_megabytes(step) for who, step in steps.items()}
            for who in steps:
                low, high = min(times[who][2:]), max(times[who][2:])
                print(
                    f"{name:20} {precision}  {who:5} {median[who]:7.0f} ms a step ({low:.0f} to {high:.0f})  "
                    f"{1000 * BATCH / median[who]:6.1f} img/s  {memory[who]:7.0f} MB"
                )
            print(
                f"{name:20} {precision}  ratio {median['timm'] / median['ours']:.2f}x ({min(ratios):.2f} to {max(ratios):.2f}), "
                f"memory {memory['ours'] / memory['timm']:.2f} of timm's"
            )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
