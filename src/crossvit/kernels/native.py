"""The compiled kernels: found or made, checked, and called with tensors. The C++ beside this file has the equations.

Without a C++ compiler, on another processor, with another operating system or with CROSSVIT_KERNELS=off in the environment there
are none, and `native()` is None. Nothing here has a gradient; kernels/functions.py has.

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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from crossvit.cache import cache_folder
from crossvit.machine import instruction_sets, processor

FOLDER = Path(__file__).parent
SOURCES = ("attention.cpp", "attention_gradient.cpp", "linear.cpp", "layers.cpp", "resize.cpp", "cross.cpp")
HEADERS = ("tiles.h",)
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
COMPILE_SECONDS = 120
SWITCH = "CROSSVIT_KERNELS"  # in the environment: `off` for none
TAPS = 4  # of a bicubic resize
LANES = 16  # a row's width is a multiple of it, as the C++ has it
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

log = logging.getLogger("crossvit")
_wanted = True


class Taps(NamedTuple):
    """Which TAPS inputs an output of a resize along one side is the sum of, and their weights."""

    starts: Tensor  # (outputs), int32: the first of them
    weights: Tensor  # (outputs, TAPS)
    by_tap: Tensor  # (TAPS, outputs)


class Fold(NamedTuple):
    """What is read of tokens x: `first` (B, D) in the place of the first, and the LayerNorm of the others."""

    first: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


class Native:
    """The kernels of one library. Tensors are on the CPU and dense; their sizes are the caller's to check (`takes`)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
        signatures = {
            **{f"attention_{name}": [pointer] * 3 + [count] * 4 + [number] for name in NAMES.values()},
            **{f"attention_gradient_{name}": [pointer] * 5 + [count] * 4 + [number] for name in NAMES.values()},
            "linear_gradient": [pointer] * 4 + [count] * 3 + [ctypes.c_int],
            "gelu": [pointer] * 2 + [count],
            "gelu_gradient": [pointer] * 4 + [count],
            "residual": [pointer] * 4 + [count] * 2,
            **{f"cross_read_{name}": [pointer] * 10 + [count] * 4 + [number] for name in NAMES.values()},
            "cross_read_gradient": [pointer] * 15 + [count] * 4,
            "resize": [pointer] * 2 + [count] * 5 + [pointer] * 4,
            "layer_norm": [pointer] * 5 + [count] * 2 + [number],
            "layer_norm_gradient": [pointer] * 8 + [count] * 2,
        }
        self.functions = {name: getattr(library, name) for name in signatures if hasattr(library, name)}
        for name, function in self.functions.items():
            function.argtypes = signatures[name]
        self.has_layers = "gelu" in self.functions  # and with them bf16

    def takes(self, qkv: Tensor, heads: int) -> bool:
        """Whether `attention` computes it: dense fp32 or bf16 on the CPU, heads of a whole number of registers."""
        width = qkv.shape[-1] // (3 * heads)
        known = f"attention_{NAMES.get(qkv.dtype)}" in self.functions and qkv.device.type == "cpu"
        fits = qkv.ndim == 3 and qkv.shape[-1] == 3 * heads * width and width % LANES == 0
        return known and fits and qkv.is_contiguous()

    def attention(self, qkv: Tensor, heads: int, *, scale: float = 1.0, log_sums: Tensor | None = None) -> Tensor:
        """softmax(scale q kᵀ) v: (B, N, 3 D) -> (B, N, D), in the dtype of qkv. log_sums: (B, H, N) fp32, filled if given."""
        batch, tokens, triple = qkv.shape
        mixed = qkv.new_empty(batch, tokens, triple // 3)
        function = self.functions[f"attention_{NAMES[qkv.dtype]}"]
        failed = function(*_places(qkv, mixed, log_sums), batch, tokens, heads, triple // (3 * heads), scale)
        if failed:
            raise MemoryError("not enough memory for attention")
        return mixed

    def attention_gradient(self, qkv: Tensor, mixed: Tensor, gradient: Tensor, log_sums: Tensor, *, scale: float) -> Tensor:
        """Of `attention`: the gradient of `mixed` (B, N, D) -> that of qkv (B, N, 3 D)."""
        batch, tokens, triple = qkv.shape
        heads = log_sums.shape[1]
        dense, found = gradient.contiguous(), torch.empty_like(qkv)
        function = self.functions[f"attention_gradient_{NAMES[qkv.dtype]}"]
        if function(*_places(qkv, mixed, dense, log_sums, found), batch, tokens, heads, triple // (3 * heads), scale):
            raise MemoryError("not enough memory for the gradient of attention")
        return found

    def linear_gradient(self, gradient: Tensor, x: Tensor, found: tuple[Tensor, Tensor], *, adds: bool) -> None:
        """dyᵀ x (O, I) and Σ dy over rows (O) into the two of `found`, fp32, or added to them; dy (..., O), x (..., I) bf16."""
        outward, inward = found[0].shape
        rows = gradient.numel() // outward
        if self.functions["linear_gradient"](*_places(gradient, x, *found), rows, outward, inward, adds):
            raise MemoryError("not enough memory for the gradient of a linear layer")

    def gelu(self, x: Tensor) -> Tensor:
        """x Φ(x), bf16."""
        y = torch.empty_like(x)
        self.functions["gelu"](*_places(x, y), x.numel())
        return y

    def gelu_gradient(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(GELU of x again, the gradient of x), bf16."""
        y, found = torch.empty_like(x), torch.empty_like(x)
        self.functions["gelu_gradient"](*_places(x, gradient, y, found), x.numel())
        return y, found

    def residual(self, x: Tensor, update: Tensor, factor: Tensor | None, out: Tensor) -> None:
        """out = x + factor · update: x (B, ...) fp32, update bf16, factor (B, 1, ...) fp32 or None for 1."""
        self.functions["residual"](*_places(x, update, factor, out), len(x), x[0].numel())

    def cross_read(self, x: Tensor, probes: Tensor, fold: Fold | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(Σ_j softmax_j(probe · z_j) z_j of each probe, what its gradient needs): x (B, N, D), probes (B, H, D) fp32 ->
        (B, H, D). z is x, or what `fold` makes of it."""
        (batch, tokens, width), heads = x.shape, probes.shape[1]
        mixed, moments, eps = torch.empty_like(probes), torch.empty_like(probes), 0.0 if fold is None else fold.eps
        shares, dots = probes.new_empty(batch, heads, tokens), probes.new_empty(batch, heads, tokens)
        statistics = probes.new_empty(batch, tokens, 2)
        places = _places(x, *_folded(fold), probes, mixed, shares, dots, statistics, moments)
        self.functions[f"cross_read_{NAMES[x.dtype]}"](*places, batch, heads, tokens, width, eps)
        return mixed, (shares, dots, statistics, moments)

    def cross_read_gradient(
        self, x: Tensor, probes: Tensor, fold: Fold | None, kept: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of x, the probes, and the fold's first token, weight and bias, all fp32."""
        (batch, tokens, width), heads = x.shape, probes.shape[1]
        of_x, of_probes = torch.empty_like(x), torch.empty_like(probes)
        of_first, of_weight, of_bias = (None if fold is None else x.new_empty(batch, width) for _ in range(3))
        places = _places(x, *_folded(fold), probes, *kept, gradient, of_x, of_first, of_probes, of_weight, of_bias)
        self.functions["cross_read_gradient"](*places, batch, heads, tokens, width)
        if of_weight is None or of_bias is None:
            return of_x, of_probes, None, None, None
        return of_x, of_probes, of_first, of_weight.sum(dim=0), of_bias.sum(dim=0)

    def resize(self, planes: Tensor, size: tuple[int, int], rows: Taps, columns: Taps) -> Tensor:
        """(..., H, W) fp32 -> (..., *size): each output the sum of TAPS inputs along each side."""
        height, width = planes.shape[-2:]
        out = planes.new_empty(*planes.shape[:-2], *size)
        weights = (rows.starts, rows.weights, columns.starts, columns.by_tap)
        self.functions["resize"](
            *_places(planes, out), planes.numel() // (height * width), height, width, *size, *_places(*weights)
        )
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(LayerNorm of x in bf16, its statistics): x (..., D), weight and bias (D) fp32."""
        width = x.shape[-1]
        normalised, statistics = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(x.numel() // width, 2)
        self.functions["layer_norm"](*_places(x, weight, bias, normalised, statistics), len(statistics), width, eps)
        return normalised, statistics

    def layer_norm_gradient(
        self, given: tuple[Tensor, Tensor, Tensor], weight: Tensor, statistics: Tensor, found: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """given: dy (bf16), the gradient that x has of what goes past the norm, and x, all (..., D).  found: dx in all, which
        is written, dweight and dbias (D), to which is added. fp32 but for dy."""
        self.functions["layer_norm_gradient"](*_places(*given, weight, statistics, *found), len(statistics), weight.numel())


def _folded(fold: Fold | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if fold is None else (fold.first, fold.weight, fold.bias)


def _places(*tensors: Tensor | None) -> list[int | None]:
    """Addresses. Whoever calls holds the tensors: a copy made in the call itself would be gone before it is read."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


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


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, torch computes everything."""
    global _wanted  # noqa: PLW0603  # one setting for the process, like torch's own
    before, _wanted = _wanted, False
    try:
        yield
    finally:
        _wanted = before


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
            _check(kernels)
    except (OSError, RuntimeError) as error:
        log.info("our kernels are not used: %s", error, exc_info=error.__cause__)
        return str(error)
    return kernels


def _library() -> Path:
    """The library for these sources on this machine, made where it is not in the cache or not as it was made."""
    compiler = _compiler()
    texts = b"".join((FOLDER / name).read_bytes() for name in (*HEADERS, *SOURCES))
    machine = f"{processor()} {instruction_sets()} {compiler} {FLAGS}"  # what -march=native goes by
    path = cache_folder() / "kernels" / f"{hashlib.sha256(texts + machine.encode()).hexdigest()[:24]}.so"
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


def _check(kernels: Native) -> None:
    """RuntimeError if what was compiled does not compute what it should."""
    tokens, heads, width = 19, 2, 32
    plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are set to
    exact_qkv = torch.linspace(-1, 1, tokens * 3 * width, **plain).sin().reshape(1, tokens, 3 * width)
    given = torch.linspace(1, -1, tokens * width, **plain).cos().reshape(1, tokens, width)
    query, key, value = exact_qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (query @ key.mT).softmax(dim=-1)
    exact = (weights @ value).transpose(1, 2).flatten(2)
    of_mixed = given.unflatten(-1, (heads, -1)).transpose(1, 2)  # autograd would load the compiler's mathematics
    of_weights = of_mixed @ value.mT
    of_scores = weights * (of_weights - (weights * of_weights).sum(dim=-1, keepdim=True))
    of_heads = torch.stack((of_scores @ key, of_scores.mT @ query, weights.mT @ of_mixed))  # (3, B, H, N, K)
    exact_gradient = of_heads.permute(1, 3, 0, 2, 4).flatten(2)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        qkv = exact_qkv.to(dtype)
        if not kernels.takes(qkv, heads):
            continue
        log_sums = given.new_empty(1, heads, tokens)
        mixed = kernels.attention(qkv, heads, log_sums=log_sums)
        gradient = kernels.attention_gradient(qkv, mixed, given.to(dtype), log_sums, scale=1.0)
        _near(f"attention in {dtype}", mixed, exact, near)
        _near(f"the gradient of attention in {dtype}", gradient, exact_gradient, near)
    probes, ones = given[:, :heads], given.new_ones(width)
    exact = (probes @ given.mT).softmax(dim=-1) @ given
    mixed, kept = kernels.cross_read(given, probes, None)
    _near("cross-attention", mixed, exact, 1e-5)
    weights, of_mixed = (probes @ given.mT).softmax(dim=-1), probes.cos()
    of_weights = of_mixed @ given.mT
    of_scores = weights * (of_weights - (weights * of_weights).sum(dim=-1, keepdim=True))
    of_x, of_probes, *_ = kernels.cross_read_gradient(given, probes, None, kept, of_mixed)
    _near("the gradient of cross-attention", of_x, of_scores.mT @ probes + weights.mT @ of_mixed, 1e-4)
    _near("the gradient of its probes", of_probes, of_scores @ given, 1e-4)
    normalised = torch.cat((ones.expand(1, 1, -1), F.layer_norm(given, (width,), ones, ones, 1e-6)[:, 1:]), dim=1)
    exact = (probes @ normalised.mT).softmax(dim=-1) @ normalised
    folded, _ = kernels.cross_read(given, probes, Fold(ones[None], ones, ones, 1e-6))
    _near("cross-attention of a LayerNorm", folded, exact, 1e-3)  # of tokens that hardly vary
    if "cross_read_bf16" in kernels.functions:
        reduced = given.bfloat16()
        exact, _ = kernels.cross_read(reduced.float(), probes, None)
        _near("cross-attention in bf16", kernels.cross_read(reduced, probes, None)[0], exact, 1e-5)
    if kernels.has_layers:
        x = given[0]
        normalised, _ = kernels.layer_norm(x, ones, ones, 1e-6)
        _near("LayerNorm", normalised, F.layer_norm(x, (width,), ones, ones, 1e-6), 2e-2)
        _near("GELU", kernels.gelu(normalised), F.gelu(normalised.float()), 2e-2)
        kernels.residual(x, normalised, None, total := torch.empty_like(x))
        _near("the residual", total, x + normalised.float(), 1e-6)
        weight_gradient, bias_gradient = x.new_empty(width, width), x.new_empty(width)
        kernels.linear_gradient(normalised, normalised, (weight_gradient, bias_gradient), adds=False)
        _near("the gradient of a weight", weight_gradient, normalised.float().t() @ normalised.float(), 1e-4)
        _near("the gradient of a bias", bias_gradient, normalised.float().sum(dim=0), 1e-4)


def _near(name: str, found: Tensor, exact: Tensor, near: float) -> None:
    if not torch.allclose(found.float(), exact, rtol=near, atol=near):
        raise RuntimeError(f"compiled wrongly: {name}")
