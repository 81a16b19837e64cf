"""What each change of the inference form on a CPU gives: the form without it, in turn with the form as it is.

Prints for each precision the milliseconds of a batch (median and spread) and how many times as long it takes without the
change: the median over rounds, and the fastest rounds compared, which a disturbance spares. `--model NAME`, `--batch N` and
`--rounds N` choose.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

import crossvit
from crossvit.engines.torch import autocast
from crossvit.fast.cpu_form import CpuForm
from crossvit.fast.native.build import without_kernels

CPU = torch.device("cpu")


def candidates(
    model: crossvit.CrossViT, dtype: torch.dtype
) -> dict[str, Callable[[Tensor], Tensor]]:
    precision = "fp32" if dtype == torch.float32 else "bf16"

    def eager(images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(CPU, precision):
            return model(images)  # type: ignore[no-any-return]

    form = CpuForm(model, dtype=dtype)
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "the form": form,
        "the model as it trains": eager,
    }
    with without_kernels():
        torchs = CpuForm(model, dtype=dtype)
        with mock.patch("crossvit.fast.packed_linear._has_onednn", return_value=False):
            plain = CpuForm(model, dtype=dtype)

    def apart(form: CpuForm) -> Callable[[Tensor], Tensor]:
        def logits(images: Tensor) -> Tensor:
            with without_kernels():
                return form(images)  # type: ignore[no-any-return]

        return logits

    found["without our kernels"] = apart(torchs)
    found["and without oneDNN's packed products"] = apart(plain)
    for images_a_pass in (1, 2, 4, 8, 16):
        cut = CpuForm(model, dtype=dtype)
        cut.images_a_pass = images_a_pass
        found[f"{images_a_pass} images a pass (the form: {form.images_a_pass})"] = cut
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="crossvit_9_240")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    model = crossvit.create_model(options.model).eval()
    images = torch.randn(options.batch, 3, *model.config.image_size)
    print(
        f"{options.model}, batch {options.batch}, {torch.get_num_threads()} threads, {options.rounds} rounds"
    )
    for dtype in (torch.float32, torch.bfloat16):
        calls = candidates(model, dtype)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options.rounds + 1):
            for name, call in calls.items():
                started = time.perf_counter()
                call(images)
                times[name].append(1000 * (time.perf_counter() - started))
        whole = times["the form"][1:]
        for name, found in times.items():
            kept = found[1:]
            ratio = statistics.median(one / other for one, other in zip(kept, whole, strict=True))
            spread, fastest = f"{min(kept):.1f} to {max(kept):.1f}", min(kept) / min(whole)
            print(
                f"{str(dtype)[6:]:9} {name:38} {statistics.median(kept):7.1f} ms ({spread})  {ratio:.2f}x, fastest {fastest:.2f}x"
            )


if __name__ == "__main__":
    main()
