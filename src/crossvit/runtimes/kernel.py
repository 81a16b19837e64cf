"""Our attention kernel for CPUs with AVX-512 (attention.cpp): compiled once on the machine that uses it, where it can be.

Without a C++ compiler, on another processor or with another operating system there is none, and `attention_of` takes torch's.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from crossvit.cache import cache_folder
from crossvit.runtimes.machine import processor

SOURCE = Path(__file__).with_name("attention.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
COMPILE_SECONDS = 120
LANES = 16  # a head's width is a multiple of it, as attention.cpp has it

log = logging.getLogger("crossvit")


class Kernel:
    """`kernel(qkv, heads)`: softmax(q kᵀ) v of (B, N, 3 D) fp32 or bf16, the scale in q -> (B, N, D)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        names = {torch.float32: "attention_fp32", torch.bfloat16: "attention_bf16"}
        self.functions = {dtype: getattr(library, name) for dtype, name in names.items() if hasattr(library, name)}
        for function in self.functions.values():
            function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_long] * 4

    def takes(self, qkv: Tensor, heads: int) -> bool:
        width = qkv.shape[-1] // (3 * heads)
        return width % LANES == 0 and qkv.dtype in self.functions and qkv.is_contiguous()

    def __call__(self, qkv: Tensor, heads: int) -> Tensor:
        batch, tokens, triple = qkv.shape
        mixed = torch.empty(batch, tokens, triple // 3, dtype=qkv.dtype)
        failed = self.functions[qkv.dtype](qkv.data_ptr(), mixed.data_ptr(), batch, tokens, heads, triple // (3 * heads))
        if failed:
            raise MemoryError("not enough memory for attention")
        return mixed


@lru_cache
def attention_kernel() -> Kernel | None:
    """The kernel, compiled where it has not been; None where there can be none. Why not is in the log (at level INFO)."""
    if not sys.platform.startswith("linux") or not torch.cpu.get_capabilities().get("avx512_f"):
        return None
    try:
        # torch is loaded, and its OpenMP goes by the system's name: both share one set of threads.
        kernel = Kernel(ctypes.CDLL(str(_library())))
        _check(kernel)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.info("attention is torch's: %s", error)
        return None
    return kernel


def _library() -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    source = SOURCE.read_bytes()
    machine = f"{processor()} {sorted(torch.cpu.get_capabilities().items())} {compiler} {FLAGS}"
    path = cache_folder() / "kernels" / f"attention-{hashlib.sha256(source + machine.encode()).hexdigest()[:24]}.so"
    if path.is_file():
        return path
    if compiler is None:
        raise RuntimeError("no C++ compiler (g++, or $CXX)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "attention.so"
        subprocess.run(  # noqa: S603  # the user's compiler on our own file
            [compiler, *FLAGS, "-o", str(made), str(SOURCE)], check=True, capture_output=True, timeout=COMPILE_SECONDS
        )
        made.replace(path)
    return path


def _check(kernel: Kernel) -> None:
    """RuntimeError if what was compiled does not compute attention."""
    qkv = torch.linspace(-1, 1, 19 * 96).sin().reshape(1, 19, 96)
    query, key, value = qkv.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
    exact = ((query @ key.transpose(-2, -1)).softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        if dtype in kernel.functions and not torch.allclose(kernel(qkv.to(dtype), 2).float(), exact, rtol=0, atol=near):
            raise RuntimeError(f"the compiled kernel is wrong in {dtype}")
