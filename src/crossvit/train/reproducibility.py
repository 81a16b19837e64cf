"""On what the last bits of a run depend: the seeds of its steps, whether our kernels compute, and settings of torch. What is set
is put back afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

from crossvit.fast.native.build import native, why_none, without_kernels
from crossvit.results import RunRecord
from crossvit.train.callbacks import Callback
from crossvit.train.distributed import Team

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # without a fixed workspace cuBLAS may add in another order; see its documentation


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch computes with `count` threads: sums over another number of them have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def computes_with_kernels(device: torch.device) -> bool:
    """Whether our kernels take part in what is trained on `device`: they round otherwise than torch."""
    return device.type == "cpu" and native() is not None


def same_kernels(
    recorded: RunRecord | None, device: torch.device, callback: Callback, team: Team
) -> AbstractContextManager[None]:
    """Inside, our kernels compute if they did in the run that is gone on with (`recorded`, None for a new one), and only where
    every process of `team` has them. A run whose kernels are not to be had is warned about."""
    if device.type != "cpu":
        return nullcontext()
    goes_on = recorded is not None and recorded.device == "cpu"
    if recorded is not None and goes_on and not recorded.kernels:
        return without_kernels()
    missing = next(filter(None, team.gather(why_none())), "")
    if missing and goes_on:
        callback.on_message(
            f"warn   the run was computed with our kernels, and here there are none ({missing}): its last bits become others"
        )
    return without_kernels() if missing else nullcontext()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Inside, kernels on a CUDA `device` add in a fixed order, and torch warns by name of those that have none. The CPU's always
    do, for a given number of threads."""
    if device.type != "cuda":
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark, torch.backends.cudnn.benchmark = (
        torch.backends.cudnn.benchmark,
        False,
    )  # its choice hangs on timing
    os.environ.setdefault(CUBLAS, ":4096:8")  # read when cuBLAS begins; stays, as cuBLAS does
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of the generators in step `step` of process `rank`: follows from the numbers alone, so a resumed run draws the
    same."""
    key = (seed, step, rank) if rank else (seed, step)
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
