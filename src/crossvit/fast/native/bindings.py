"""The compiled kernels, called with tensors. The C++ beside this file has the equations. Nothing here has a gradient.

Shapes: B batch, N tokens, D width, H heads, K = D / H width of a head, F what the first linear layer of half a block gives.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

TAPS = 4  # of a bicubic resize
LANES = 16  # a row's width is a multiple of it, as the C++ has it
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
NO_MEMORY = "not enough memory for half an encoder block"

NormKept = tuple[
    Tensor, Tensor
]  # the weight of a LayerNorm (D) and the statistics it had (B, N, 2)


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


class Norm(NamedTuple):
    """A LayerNorm's parameters, fp32."""

    weight: Tensor
    bias: Tensor
    eps: float


class Linear(NamedTuple):
    """A linear layer: its weight as `Native.pack` lays it out, transposed, and its bias, fp32."""

    packed: Tensor
    bias: Tensor


class Kept(NamedTuple):
    """What a LayerNorm gave, as a product took it, and its statistics (..., 2), mean and 1 / √(variance + eps); or nothing."""

    normalised: Tensor | None
    statistics: Tensor | None


class Native:
    """The kernels of one library. Tensors are on the CPU and dense; their sizes are the caller's to check (`takes`)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
        signatures = {
            **{
                f"attention_{name}": [pointer] * 3 + [count] * 4 + [number]
                for name in NAMES.values()
            },
            **{
                f"attention_gradient_{name}": [pointer] * 5 + [count] * 4 + [number]
                for name in NAMES.values()
            },
            "linear_gradient": [pointer] * 4 + [count] * 3 + [ctypes.c_int],
            **{
                f"pack_{name}": [pointer] * 2 + [count] * 2 + [ctypes.c_int]
                for name in NAMES.values()
            },
            **{
                f"norm_linear_{name}": [pointer] * 8 + [count] * 3 + [number]
                for name in NAMES.values()
            },
            **{f"linear_residual_{name}": [pointer] * 6 + [count] * 4 for name in NAMES.values()},
            **{f"mlp_{name}": [pointer] * 12 + [count] * 4 + [number] for name in NAMES.values()},
            **{f"patch_tokens_{name}": [pointer] * 6 + [count] * 7 for name in NAMES.values()},
            "linear_residual_gradient": [pointer] * 5 + [count] * 4,
            "norm_linear_gradient": [pointer] * 9 + [count] * 3,
            "mlp_gradient": [pointer] * 14 + [count] * 4,
            **{
                f"cross_read_{name}": [pointer] * 10 + [count] * 4 + [number]
                for name in NAMES.values()
            },
            "cross_read_gradient": [pointer] * 15 + [count] * 4,
            "resize": [pointer] * 2 + [count] * 5 + [pointer] * 4,
        }
        self.functions = {
            name: getattr(library, name) for name in signatures if hasattr(library, name)
        }
        for name, function in self.functions.items():
            function.argtypes = signatures[name]
        self.has_bf16 = "mlp_bf16" in self.functions

    def takes(self, qkv: Tensor, heads: int) -> bool:
        """Whether `attention` computes it: dense fp32 or bf16 on the CPU, heads of a whole number of registers."""
        width = qkv.shape[-1] // (3 * heads)
        known = f"attention_{NAMES.get(qkv.dtype)}" in self.functions and qkv.device.type == "cpu"
        fits = qkv.ndim == 3 and qkv.shape[-1] == 3 * heads * width and width % LANES == 0
        return known and fits and qkv.is_contiguous()

    def attention(
        self, qkv: Tensor, heads: int, *, scale: float = 1.0, log_sums: Tensor | None = None
    ) -> Tensor:
        """softmax(scale q kᵀ) v: (B, N, 3 D) -> (B, N, D), in the dtype of qkv. log_sums: (B, H, N) fp32, filled if given."""
        batch, tokens, triple = qkv.shape
        mixed = qkv.new_empty(batch, tokens, triple // 3)
        function = self.functions[f"attention_{NAMES[qkv.dtype]}"]
        failed = function(
            *_places(qkv, mixed, log_sums), batch, tokens, heads, triple // (3 * heads), scale
        )
        if failed:
            raise MemoryError("not enough memory for attention")
        return mixed

    def attention_gradient(
        self, qkv: Tensor, mixed: Tensor, gradient: Tensor, log_sums: Tensor, *, scale: float
    ) -> Tensor:
        """Of `attention`: the gradient of `mixed` (B, N, D) -> that of qkv (B, N, 3 D)."""
        batch, tokens, triple = qkv.shape
        heads = log_sums.shape[1]
        dense, found = gradient.contiguous(), torch.empty_like(qkv)
        function = self.functions[f"attention_gradient_{NAMES[qkv.dtype]}"]
        if function(
            *_places(qkv, mixed, dense, log_sums, found),
            batch,
            tokens,
            heads,
            triple // (3 * heads),
            scale,
        ):
            raise MemoryError("not enough memory for the gradient of attention")
        return found

    def pack(self, weight: Tensor, dtype: torch.dtype, *, transposed: bool) -> Tensor:
        """A matrix for products x M in `dtype`, laid out as they read it: M is `weight`, fp32, or its transpose."""
        packed = weight.new_empty(weight.numel(), dtype=dtype)
        self.functions[f"pack_{NAMES[dtype]}"](*_places(weight, packed), *weight.shape, transposed)
        return packed

    def linear_gradient(
        self, gradient: Tensor, x: Tensor, found: tuple[Tensor, Tensor], *, adds: bool
    ) -> None:
        """dyᵀ x (O, I) and Σ dy over rows (O) into the two of `found`, fp32, or added to them; dy (..., O), x (..., I) bf16."""
        outward, inward = found[0].shape
        rows = gradient.numel() // outward
        if self.functions["linear_gradient"](
            *_places(gradient, x, *found), rows, outward, inward, adds
        ):
            raise MemoryError("not enough memory for the gradient of a linear layer")

    def norm_linear(
        self, x: Tensor, norm: Norm, inward: Linear, *, keeps: bool
    ) -> tuple[Tensor, Kept]:
        """(In(LN x) in the dtype of its packed weight, what its gradient needs): (B, N, D) -> (B, N, F). x fp32."""
        rows, (width, inner), dtype = (
            x.numel() // x.shape[-1],
            (x.shape[-1], len(inward.bias)),
            inward.packed.dtype,
        )
        kept = _kept(x, dtype) if keeps else Kept(None, None)
        y = x.new_empty(*x.shape[:-1], inner, dtype=dtype)
        places = _places(x, norm.weight, norm.bias, *inward, *kept, y)
        if self.functions[f"norm_linear_{NAMES[dtype]}"](*places, rows, width, inner, norm.eps):
            raise MemoryError(NO_MEMORY)
        return y, kept

    def linear_residual(
        self,
        read: Tensor,
        outward: Linear,
        x: Tensor,
        factor: Tensor | None,
        *,
        in_place: bool = False,
    ) -> Tensor:
        """x + factor · Out(read): read (B, N, F), x (B, N, D) fp32, factor (B, 1, 1) fp32 or None for 1. in_place: into x."""
        rows, tokens, y = (
            x.numel() // x.shape[-1],
            x.shape[-2],
            x if in_place else torch.empty_like(x),
        )
        places = _places(read, *outward, x, factor, y)
        if self.functions[f"linear_residual_{NAMES[read.dtype]}"](
            *places, rows, tokens, read.shape[-1], x.shape[-1]
        ):
            raise MemoryError(NO_MEMORY)
        return y

    def mlp(
        self,
        x: Tensor,
        layers: tuple[Norm, Linear, Linear],
        factor: Tensor | None,
        *,
        keeps: bool,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor | None, Kept]:
        """(x + factor · Out(GELU(In(LN x))), what GELU takes if `keeps`, what the norm's gradient needs). in_place: into x."""
        norm, inward, outward = layers
        rows, tokens, width, inner = (
            x.numel() // x.shape[-1],
            x.shape[-2],
            x.shape[-1],
            len(inward.bias),
        )
        dtype, y = inward.packed.dtype, x if in_place else torch.empty_like(x)
        kept = _kept(x, dtype) if keeps else Kept(None, None)
        hidden = x.new_empty(*x.shape[:-1], inner, dtype=dtype) if keeps else None
        places = _places(x, norm.weight, norm.bias, *inward, *outward, factor, *kept, hidden, y)
        if self.functions[f"mlp_{NAMES[dtype]}"](*places, rows, tokens, width, inner, norm.eps):
            raise MemoryError(NO_MEMORY)
        return y, hidden, kept

    def linear_residual_gradient(
        self, gradient: Tensor, factor: Tensor | None, packed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of `linear_residual` in bf16, with Out's weight packed as it is: (factor · dy, the gradient of `read`)."""
        width, inner = gradient.shape[-1], packed.numel() // gradient.shape[-1]
        update = torch.empty_like(gradient, dtype=torch.bfloat16)
        found = update.new_empty(*update.shape[:-1], inner)
        rows, tokens = gradient.numel() // width, gradient.shape[-2]
        function = self.functions["linear_residual_gradient"]
        if function(*_places(gradient, factor, packed, update, found), rows, tokens, width, inner):
            raise MemoryError(NO_MEMORY)
        return update, found

    def norm_linear_gradient(
        self,
        gradient: Tensor,
        packed: Tensor,
        past: Tensor,
        x: Tensor,
        *,
        norm: NormKept,
        found: tuple[Tensor, ...],
    ) -> None:
        """Of `norm_linear` in bf16, with In's weight packed as it is. `past`: the gradient that x has of what goes past the
        norm; norm: its weight and statistics. found: that of x in all, which is written, and those of the norm's weight and
        bias, to which is added."""
        width, inner = x.shape[-1], gradient.shape[-1]
        places = _places(gradient, packed, past, x, *norm, *found)
        if self.functions["norm_linear_gradient"](*places, x.numel() // width, width, inner):
            raise MemoryError(NO_MEMORY)

    def mlp_gradient(
        self,
        gradient: Tensor,
        factor: Tensor | None,
        packed: tuple[Tensor, Tensor],
        hidden: Tensor,
        x: Tensor,
        *,
        norm: NormKept,
        found: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of `mlp` in bf16, with the weights of Out and In packed as they are: (factor · dy, GELU again, the gradient of what it
        takes). norm and found: as of `norm_linear_gradient`."""
        width, inner = x.shape[-1], hidden.shape[-1]
        update, activated, of_hidden = (
            torch.empty_like(x, dtype=torch.bfloat16),
            torch.empty_like(hidden),
            torch.empty_like(hidden),
        )
        outward, inward = packed
        places = _places(
            gradient,
            factor,
            outward,
            hidden,
            inward,
            x,
            *norm,
            update,
            activated,
            of_hidden,
            *found,
        )
        if self.functions["mlp_gradient"](*places, x.numel() // width, x.shape[-2], width, inner):
            raise MemoryError(NO_MEMORY)
        return update, activated, of_hidden

    def patch_tokens(
        self,
        images: Tensor,
        stem: Linear,
        patch: int,
        positions: Tensor,
        *,
        first: int,
        keeps: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """(tokens (B, N, D) fp32 but for the first ones, which are left empty; the patches read (B n, C P P), if `keeps`):
        images (B, C, H, W), positions (1, N, D) fp32, N = first + n."""
        batch, channels, height, across = images.shape
        tokens = images.new_empty(batch, *positions.shape[1:])
        shape = (batch * (positions.shape[1] - first), channels * patch**2)
        patches = images.new_empty(shape, dtype=stem.packed.dtype) if keeps else None
        function = self.functions[f"patch_tokens_{NAMES[stem.packed.dtype]}"]
        places = _places(images, *stem, positions, patches, tokens)
        if function(*places, batch, channels, height, across, patch, first, tokens.shape[-1]):
            raise MemoryError("not enough memory for the patches")
        return tokens, patches

    def cross_read(
        self, x: Tensor, probes: Tensor, fold: Fold | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(Σ_j softmax_j(probe · z_j) z_j of each probe, what its gradient needs): x (B, N, D), probes (B, H, D) fp32 ->
        (B, H, D). z is x, or what `fold` makes of it."""
        (batch, tokens, width), heads = x.shape, probes.shape[1]
        mixed, moments, eps = (
            torch.empty_like(probes),
            torch.empty_like(probes),
            0.0 if fold is None else fold.eps,
        )
        shares, dots = (
            probes.new_empty(batch, heads, tokens),
            probes.new_empty(batch, heads, tokens),
        )
        statistics = probes.new_empty(batch, tokens, 2)
        places = _places(x, *_folded(fold), probes, mixed, shares, dots, statistics, moments)
        self.functions[f"cross_read_{NAMES[x.dtype]}"](*places, batch, heads, tokens, width, eps)
        return mixed, (shares, dots, statistics, moments)

    def cross_read_gradient(
        self,
        x: Tensor,
        probes: Tensor,
        fold: Fold | None,
        kept: tuple[Tensor, ...],
        gradient: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of x, the probes, and the fold's first token, weight and bias, all fp32."""
        (batch, tokens, width), heads = x.shape, probes.shape[1]
        of_x, of_probes = torch.empty_like(x), torch.empty_like(probes)
        of_first, of_weight, of_bias = (
            None if fold is None else x.new_empty(batch, width) for _ in range(3)
        )
        places = _places(
            x,
            *_folded(fold),
            probes,
            *kept,
            gradient,
            of_x,
            of_first,
            of_probes,
            of_weight,
            of_bias,
        )
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
            *_places(planes, out),
            planes.numel() // (height * width),
            height,
            width,
            *size,
            *_places(*weights),
        )
        return out


def _kept(x: Tensor, dtype: torch.dtype) -> Kept:
    return Kept(torch.empty_like(x, dtype=dtype), x.new_empty(*x.shape[:-1], 2))


def _folded(fold: Fold | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if fold is None else (fold.first, fold.weight, fold.bias)


def _places(*tensors: Tensor | None) -> list[int | None]:
    """Addresses. Whoever calls holds the tensors: a copy made in the call itself would be gone before it is read."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
