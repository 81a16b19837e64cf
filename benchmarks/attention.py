"""Fused attention against two products and a softmax, at the shapes of crossvit_9_240 and crossvit_small_240.

Prints milliseconds, forward and with the backward pass, and the ratio fused / plain: above 1 the plain form is faster.
`crossvit.model.attention.attention` chooses by these figures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SHAPES = [(16, 4, 401, 32), (16, 4, 197, 64), (16, 6, 197, 64), (64, 2, 65, 32)]  # (B, H, N, K)
ROUNDS = 11


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(dim=-1) @ value


def milliseconds(attend: Callable[..., Tensor], inputs: list[Tensor], *, backward: bool) -> float:
    started = time.perf_counter()
    output = attend(*inputs)
    if backward:
        output.backward(torch.ones_like(output))
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    print(
        f"{torch.get_num_threads()} threads; fused / plain, ms, median of {ROUNDS} interleaved rounds"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            for backward in (False, True):
                inputs = [torch.randn(shape).to(dtype).requires_grad_(backward) for _ in range(3)]
                kernels = (F.scaled_dot_product_attention, plain)
                rounds = [
                    [milliseconds(kernel, inputs, backward=backward) for kernel in kernels]
                    for _ in range(ROUNDS + 1)
                ][1:]
                fused, ours = (statistics.median(column) for column in zip(*rounds, strict=True))
                what = "forward + backward" if backward else "forward"
                print(
                    f"{str(dtype)[6:]:9} {shape!s:17} {what:18} {fused:7.2f} / {ours:7.2f}   ratio {fused / ours:.2f}"
                )


if __name__ == "__main__":
    main()
