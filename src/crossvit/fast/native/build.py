"""The compiled kernels: found or made, and checked.

Without a C++ compiler, on another processor, with another operating system or with CROSSVIT_KERNELS=off in the environment there
are none, and `native()` is None. Nothing here has a gradient; the files of crossvit/fast have.

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
from crossvit.fast.native.bindings import Native
from crossvit.fast.native.selftest import check
from crossvit.hardware import instruction_sets, processor

FOLDER = Path(__file__).parent
SOURCES = (
    "attention.cpp",
    "attention_gradient.cpp",
    "linear.cpp",
    "sublayers.cpp",
    "patch_embed.cpp",
    "resize.cpp",
    "cross_attention.cpp",
)
HEADERS = ("tiles.h", "rows.h")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
COMPILE_SECONDS = 120
SWITCH = "CROSSVIT_KERNELS"  # in the environment: `off` for none

log = logging.getLogger("crossvit")
_wanted = True


def native() -> Native | None:
    """The kernels, compiled where they have not been; None where there can be none or `without_kernels` is in force."""
    found = _found() if _wanted else None
    return found if isinstance(found, Native) else None


def kernels_here() -> Native:
    """The kernels, for who has asked whether they are there: also where `without_kernels` has come between, in another thread or
    before the backward pass."""
    found = _found()
    assert isinstance(found, Native)
    return found


def why_none() -> str:
    """Why `native()` is None, in a few words; empty where it is not."""
    found = _found() if _wanted else "they are switched off"
    return found if isinstance(found, str) else ""


def are_wanted() -> bool:
    """Whether kernels may be used here: false within `without_kernels`."""
    return _wanted


def without_kernels() -> contextlib.AbstractContextManager[None]:
    """Inside, torch computes everything."""
    return kernels_wanted(False)


@contextlib.contextmanager
def kernels_wanted(wanted: bool) -> Iterator[None]:
    """Inside, kernels may be used or not."""
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
def _found() -> Native | str:
    """The kernels, or why there are none, which is in the log too (at level INFO)."""
    if (asked := os.environ.get(SWITCH, "on").lower()) == "off":
        return f"{SWITCH}=off"
    if asked not in ("on", ""):
        log.warning("%s=%s means nothing: use off, or on", SWITCH, asked)
    if not sys.platform.startswith("linux") or not torch.cpu.get_capabilities().get("avx512_f"):
        return "no processor with AVX-512 under Linux"
    try:
        # torch is loaded, and its OpenMP goes by the system's name: both share one set of threads.
        kernels = Native(ctypes.CDLL(str(_library())))
        # Whatever mode the first caller is in.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            check(kernels)
    except (OSError, RuntimeError) as error:
        log.info("our kernels are not used: %s", error, exc_info=error.__cause__)
        return str(error)
    return kernels


def _library() -> Path:
    """The library for these sources on this machine, made where it is not in the cache or not as it was made."""
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
            file.write(hashlib.sha256(file.read()).digest())  # behind what the loader reads
        made.replace(path)
    return path


def _compiler() -> list[str]:
    """$CXX, a path or a command with arguments (`ccache g++`), or g++; empty where it is not there."""
    named = os.environ.get("CXX") or "g++"
    if there := shutil.which(named):
        return [there]
    first, *arguments = named.split() or [""]
    return [there, *arguments] if (there := shutil.which(first)) else []


def _is_whole(path: Path) -> bool:
    """Whether a library is there and as it was made: the system would load one that a crash cut short, and die of it later."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]
