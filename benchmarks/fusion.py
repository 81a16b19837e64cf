"""Cross-attention with lazy keys and values against the paper's form: time and peak memory, by number of tokens.

Prints for each number of tokens and precision the milliseconds of both forms, inference and forward with backward, their
ratio, and what each holds at its peak beyond its input (activations and gradients, as torch's profiler counts allocations).
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler is silent about itself

import torch
from torch.profiler import ProfilerActivity, profile

from crossvit.model.attention import CrossAttention

DIM, HEADS, BATCH = 256, 4, 4  # crossvit_9's L branch
TOKENS = (197, 401, 577, 1157, 4096)
FORMS = ("materialised", "lazy")
ROUNDS = 15


def milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def peak_megabytes(work: Callable[[], object]) -> float:
    """The highest sum of live allocations while `work` runs, in 10^6 bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():  # in the order they happened
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak / 1e6


def main() -> None:
    print(f"dim {DIM}, {HEADS} heads, batch {BATCH}, {torch.get_num_threads()} threads; median of {ROUNDS} interleaved rounds")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            forms = {form: CrossAttention(DIM, HEADS, keys_values=form).to(dtype) for form in FORMS}
            x = torch.randn(BATCH, tokens, DIM).to(dtype)

            def infer(form: str, forms: dict[str, CrossAttention] = forms, x: torch.Tensor = x) -> None:
                with torch.inference_mode():
                    forms[form](x)

            def learn(form: str, forms: dict[str, CrossAttention] = forms, x: torch.Tensor = x) -> None:
                forms[form](x.detach().requires_grad_()).sum().backward()

            for what, work in (("inference", infer), ("forward + backward", learn)):
                rounds = [[milliseconds(functools.partial(work, form)) for form in FORMS] for _ in range(ROUNDS + 2)][2:]
                paper, lazy = (statistics.median(column) for column in zip(*rounds, strict=True))
                memory = [peak_megabytes(functools.partial(work, form)) for form in FORMS]
                print(
                    f"{str(dtype)[6:]:9}{tokens:5} tokens  {what:18}  {paper:8.2f} / {lazy:6.2f} ms  {paper / lazy:5.1f}x   "
                    f"{memory[0]:7.2f} / {memory[1]:5.2f} MB"
                )


if __name__ == "__main__":
    main()
