"""Compiles, loads and checks the kernels.

Without a C++ compiler, on another processor or operating system, or with CROSSVIT_KERNELS=off in
the environment there are none, and `native()` is None. Nothing here has a gradient; the files of
crossvit/fast have.

Shapes: B batch, N tokens, D width, H heads, K = D / H width of a head.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from crossvit.cache import cache_folder
from crossvit.fast.native.bindings import NativeKernels
from crossvit.fast.native.selftest import check
from crossvit.hardware import instruction_sets, processor

FOLDER = Path(__file__).parent
SOURCES = (
    "arguments.cpp",
    "attention.cpp",
    "attention_backward.cpp",
    "linear.cpp",
    "sublayers.cpp",
    "patch_embed.cpp",
    "resize.cpp",
    "cross_attention.cpp",
)
HEADERS = ("arguments.h", "simd.h", "layers.h")
# GCC 12 takes undefined registers in its own immintrin.h for uninitialised variables.
WARNINGS = ("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", *WARNINGS)
COMPILE_SECONDS = 120
SWITCH = "CROSSVIT_KERNELS"  # in the environment: `off` for none

log = logging.getLogger("crossvit")
_wanted = True


def native() -> NativeKernels | None:
    """Returns the kernels, compiled if needed; None without any or in `without_kernels()`."""
    found = _found() if _wanted else None
    return found if isinstance(found, NativeKernels) else None


def kernels_here() -> NativeKernels:
    """Returns the loaded kernels, ignoring `without_kernels()`.

    A backward pass uses what its forward pass used, and another thread may switch in between.
    """
    found = _found()
    assert isinstance(found, NativeKernels)
    return found


def why_none() -> str:
    """Returns why `native()` is None, in a few words; empty where it is not."""
    found = _found() if _wanted else "they are switched off"
    return found if isinstance(found, str) else ""


def are_wanted() -> bool:
    """Returns whether kernels may be used: false within `without_kernels()`."""
    return _wanted


def without_kernels() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which torch computes everything."""
    return kernels_wanted(False)


@contextlib.contextmanager
def kernels_wanted(wanted: bool) -> Iterator[None]:
    """A context in which kernels may be used, or not."""
    global _wanted  # noqa: PLW0603  # one setting for the process, like torch's own
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def look_again() -> None:
    """Forget what was found, so that the next call looks at the environment and the compiler anew."""
    _found.cache_clear()


@lru_cache
def _found() -> NativeKernels | str:
    """Returns the kernels, or why there are none, which is logged too (at level INFO)."""
    if (asked := os.environ.get(SWITCH, "on").lower()) == "off":
        return f"{SWITCH}=off"
    if asked not in ("on", ""):
        log.warning("%s=%s means nothing: use off, or on", SWITCH, asked)
    if not sys.platform.startswith("linux") or not torch.cpu.get_capabilities().get("avx512_f"):
        return "no processor with AVX-512 under Linux"
    try:
        # torch is loaded, and its OpenMP goes by the system's name: both share one set of threads.
        kernels = NativeKernels(ctypes.CDLL(str(_library())))
        # Whatever mode the first caller is in.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            check(kernels)
    except (OSError, RuntimeError) as error:
        log.info("native kernels are not used: %s", error, exc_info=error.__cause__)
        return str(error)
    return kernels


def _library() -> Path:
    """Returns the library of these sources for this machine, compiled if the cache lacks it whole."""
    compiler = _compiler()
    texts = b"".join((FOLDER / name).read_bytes() for name in (*HEADERS, *SOURCES))
    machine = f"{processor()} {instruction_sets()} {compiler} {FLAGS}"  # what -march=native goes by
    path = (
        cache_folder()
        / "kernels"
        / f"{hashlib.sha256(texts + machine.encode()).hexdigest()[:24]}.so"
    )
    if _is_whole(path):
        return path
    if not compiler:
        raise RuntimeError("no C++ compiler (g++, or $CXX)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "kernels.so"
        try:
            subprocess.run(  # noqa: S603  # the user's compiler on our own files
                [*compiler, *FLAGS, "-o", str(made), *(str(FOLDER / name) for name in SOURCES)],
                check=True,
                capture_output=True,
                timeout=COMPILE_SECONDS,
            )
        except subprocess.SubprocessError as error:
            raise RuntimeError(f"{compiler[0]} does not compile them") from error
        with made.open("rb+") as file:
            file.write(hashlib.sha256(file.read()).digest())  # after what the loader reads
        made.replace(path)
    return path


def _compiler() -> list[str]:
    """Returns $CXX, a path or a command with arguments (`ccache g++`), or g++; empty if missing."""
    named = os.environ.get("CXX") or "g++"
    if there := shutil.which(named):
        return [there]
    first, *arguments = named.split() or [""]
    return [there, *arguments] if (there := shutil.which(first)) else []


def _is_whole(path: Path) -> bool:
    """Returns whether the library is complete: a truncated one would load, and crash later."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]
