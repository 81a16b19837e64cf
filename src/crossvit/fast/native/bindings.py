"""The compiled kernels, called with tensors. The C++ beside this file has the equations.

Nothing here has a gradient.

Shapes: B batch, N tokens, D width, H heads, K = D / H width of a head, F hidden width: the output
of a sublayer's first linear layer.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

TAPS = 4  # of a bicubic resize
LANES = 16  # fp32 numbers in a register: widths are multiples of it
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def _arguments(pointers: str, sizes: str, numbers: str = "") -> type[ctypes.Structure]:
    """A struct of these fields in this order, as in arguments.h."""
    fields = (
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, ctypes.c_long) for name in sizes.split()),
        *((name, ctypes.c_float) for name in numbers.split()),
    )
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


ARGUMENTS = {
    "attention": _arguments("qkv out log_sums", "batch tokens heads head_dim", "scale"),
    "attention_backward": _arguments(
        "qkv out grad_out log_sums grad_qkv", "batch tokens heads head_dim", "scale"
    ),
    "pack": _arguments("weight packed", "rows cols transposed"),
    "linear_backward": _arguments(
        "grad_out inp grad_weight grad_bias", "rows out_dim in_dim accumulate"
    ),
    "norm_linear": _arguments(
        "inp norm_weight norm_bias packed bias normalized statistics out",
        "rows in_dim out_dim",
        "eps",
    ),
    "linear_residual": _arguments(
        "inp packed bias residual drop_path_scale out", "rows tokens in_dim out_dim"
    ),
    "mlp": _arguments(
        "inp norm_weight norm_bias up_packed up_bias down_packed down_bias drop_path_scale "
        "normalized statistics hidden out",
        "rows tokens width hidden_dim",
        "eps",
    ),
    "linear_residual_backward": _arguments(
        "grad_out drop_path_scale packed grad_update grad_inp", "rows tokens out_dim in_dim"
    ),
    "norm_linear_backward": _arguments(
        "grad_out packed residual_grad inp norm_weight statistics "
        "grad_inp grad_norm_weight grad_norm_bias",
        "rows in_dim out_dim",
    ),
    "mlp_backward": _arguments(
        "grad_out drop_path_scale down_packed hidden up_packed inp norm_weight statistics "
        "grad_update activated grad_hidden grad_inp grad_norm_weight grad_norm_bias",
        "rows tokens width hidden_dim",
    ),
    "patch_tokens": _arguments(
        "images packed bias positions patches tokens",
        "batch channels height width patch first dim",
    ),
    "cross_read": _arguments(
        "inp first norm_weight norm_bias probes context weights dots statistics moments",
        "batch heads tokens width",
        "eps",
    ),
    "cross_read_backward": _arguments(
        "inp first norm_weight norm_bias probes weights dots statistics moments grad_context "
        "grad_inp grad_first grad_probes grad_norm_weight grad_norm_bias",
        "batch heads tokens width",
    ),
    "resize": _arguments(
        "planes out row_starts row_weights column_starts column_weights",
        "count height width out_height out_width",
    ),
}
_FIELDS = {
    kernel: {field[0] for field in arguments._fields_} for kernel, arguments in ARGUMENTS.items()
}

NormSaved = tuple[Tensor, Tensor]  # a LayerNorm's weight (D) and statistics (B, N, 2)


class Taps(NamedTuple):
    """The TAPS inputs that each output of a resize along one side sums, and their weights."""

    starts: Tensor  # (outputs), int32: the first input
    weights: Tensor  # (outputs, TAPS)
    by_tap: Tensor  # (TAPS, outputs)


class FusedNorm(NamedTuple):
    """A LayerNorm computed within a cross-read, but for the first token: `first` (B, D)."""

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
    """A linear layer: its weight packed by `NativeKernels.pack`, transposed, and its bias, fp32."""

    packed: Tensor
    bias: Tensor


class SavedNorm(NamedTuple):
    """A LayerNorm's output in the dtype of matmuls and its statistics (..., 2), or nothing.

    Statistics are the mean and 1 / √(variance + eps).
    """

    normalized: Tensor | None
    statistics: Tensor | None


class NativeKernels:
    """The kernels of one library.

    Tensors are on the CPU and dense; the caller checks their sizes (`takes`).
    """

    def __init__(self, library: ctypes.CDLL, *, reference: bool = False) -> None:
        """
        Args:
            library: The compiled kernels.
            reference: Call the scalar references instead: fp32, for tests. Where a kernel reads a
                packed weight, its reference reads the weight itself, as torch has it (out, in).

        Raises:
            RuntimeError: A struct of arguments has another size in the library than here.
        """
        self.library = library
        for kernel, arguments in ARGUMENTS.items():
            size = library.arguments_size(kernel.encode())
            if size != ctypes.sizeof(arguments):
                raise RuntimeError(f"arguments of {kernel}: {size} bytes in C++, not as in Python")
        names = {"fp32": "reference"} if reference else {name: name for name in NAMES.values()}
        self.functions = {
            f"{kernel}_{dtype}": getattr(library, f"{kernel}_{name}")
            for kernel in ARGUMENTS
            for dtype, name in names.items()
            if hasattr(library, f"{kernel}_{name}")
        }
        self.has_bf16 = "mlp_bf16" in self.functions

    def _call(self, kernel: str, dtype: torch.dtype, **values: Tensor | float | None) -> None:
        assert values.keys() == _FIELDS[kernel], kernel
        arguments = ARGUMENTS[kernel](
            **{
                name: value.data_ptr() if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
        )
        if self.functions[f"{kernel}_{NAMES[dtype]}"](ctypes.byref(arguments)):
            raise MemoryError(f"not enough memory for the kernel {kernel}")

    def takes(self, qkv: Tensor, heads: int) -> bool:
        """Whether `attention` computes it: dense fp32 or bf16 on the CPU, K a multiple of LANES."""
        width = qkv.shape[-1] // (3 * heads)
        known = f"attention_{NAMES.get(qkv.dtype)}" in self.functions and qkv.device.type == "cpu"
        fits = qkv.ndim == 3 and qkv.shape[-1] == 3 * heads * width and width % LANES == 0
        return known and fits and qkv.is_contiguous()

    def attention(
        self, qkv: Tensor, heads: int, *, scale: float = 1.0, log_sums: Tensor | None = None
    ) -> Tensor:
        """softmax(scale q kᵀ) v of every head.

        Args:
            qkv: (B, N, 3 D) fp32 or bf16.
            heads: H.
            scale: Factor of the scores.
            log_sums: (B, H, N) fp32, filled if given.

        Returns:
            (B, N, D) in the dtype of `qkv`.
        """
        batch, tokens, triple = qkv.shape
        context = qkv.new_empty(batch, tokens, triple // 3)
        self._call(
            "attention",
            qkv.dtype,
            qkv=qkv,
            out=context,
            log_sums=log_sums,
            batch=batch,
            tokens=tokens,
            heads=heads,
            head_dim=triple // (3 * heads),
            scale=scale,
        )
        return context

    def attention_backward(
        self, qkv: Tensor, context: Tensor, grad_context: Tensor, log_sums: Tensor, *, scale: float
    ) -> Tensor:
        """Backward pass of `attention`: gradient of the context (B, N, D) -> of qkv (B, N, 3 D)."""
        batch, tokens, triple = qkv.shape
        heads, grad_qkv = log_sums.shape[1], torch.empty_like(qkv)
        self._call(
            "attention_backward",
            qkv.dtype,
            qkv=qkv,
            out=context,
            grad_out=grad_context.contiguous(),
            log_sums=log_sums,
            grad_qkv=grad_qkv,
            batch=batch,
            tokens=tokens,
            heads=heads,
            head_dim=triple // (3 * heads),
            scale=scale,
        )
        return grad_qkv

    def pack(self, weight: Tensor, dtype: torch.dtype, *, transposed: bool) -> Tensor:
        """Packs M for matmuls x M in `dtype`: M is `weight`, 2-D fp32, or its transpose."""
        packed = weight.new_empty(weight.numel(), dtype=dtype)
        rows, cols = weight.shape
        self._call(
            "pack", dtype, weight=weight, packed=packed, rows=rows, cols=cols, transposed=transposed
        )
        return packed

    def linear_backward(
        self, grad_out: Tensor, x: Tensor, grad_buffers: tuple[Tensor, Tensor], *, adds: bool
    ) -> None:
        """Backward pass of a linear layer: dW = dyᵀ x and db = Σ dy over rows.

        Args:
            grad_out: dy (..., O), bf16.
            x: The input (..., I), bf16.
            grad_buffers: dW (O, I) and db (O), fp32, which are written.
            adds: Add to the buffers instead.
        """
        out_dim, in_dim = grad_buffers[0].shape
        self._call(
            "linear_backward",
            x.dtype,
            grad_out=grad_out,
            inp=x,
            grad_weight=grad_buffers[0],
            grad_bias=grad_buffers[1],
            rows=grad_out.numel() // out_dim,
            out_dim=out_dim,
            in_dim=in_dim,
            accumulate=adds,
        )

    def norm_linear(
        self, x: Tensor, norm: Norm, linear: Linear, *, keeps: bool
    ) -> tuple[Tensor, SavedNorm]:
        """Linear(LN x).

        Args:
            x: (B, N, D) fp32.
            norm: The LayerNorm.
            linear: The linear layer, D -> F.
            keeps: Save what the backward pass needs.

        Returns:
            (B, N, F) in the dtype of the packed weight, and what was saved.
        """
        width, out_dim, dtype = x.shape[-1], len(linear.bias), linear.packed.dtype
        saved = _saved_norm(x, dtype) if keeps else SavedNorm(None, None)
        out = x.new_empty(*x.shape[:-1], out_dim, dtype=dtype)
        self._call(
            "norm_linear",
            dtype,
            inp=x,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            packed=linear.packed,
            bias=linear.bias,
            normalized=saved.normalized,
            statistics=saved.statistics,
            out=out,
            rows=x.numel() // width,
            in_dim=width,
            out_dim=out_dim,
            eps=norm.eps,
        )
        return out, saved

    def linear_residual(
        self,
        inp: Tensor,
        linear: Linear,
        x: Tensor,
        drop_path_scale: Tensor | None,
        *,
        in_place: bool = False,
    ) -> Tensor:
        """x + m · Linear(inp).

        Args:
            inp: (B, N, F), in the dtype of the packed weight.
            linear: The linear layer, F -> D.
            x: The residual (B, N, D) fp32.
            drop_path_scale: m, (B, 1, 1) fp32 or None for 1.
            in_place: Write into x.

        Returns:
            (B, N, D) fp32.
        """
        out = x if in_place else torch.empty_like(x)
        self._call(
            "linear_residual",
            inp.dtype,
            inp=inp,
            packed=linear.packed,
            bias=linear.bias,
            residual=x,
            drop_path_scale=drop_path_scale,
            out=out,
            rows=x.numel() // x.shape[-1],
            tokens=x.shape[-2],
            in_dim=inp.shape[-1],
            out_dim=x.shape[-1],
        )
        return out

    def mlp(
        self,
        x: Tensor,
        layers: tuple[Norm, Linear, Linear],
        drop_path_scale: Tensor | None,
        *,
        keeps: bool,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor | None, SavedNorm]:
        """x + m · Down(GELU(Up(LN x))).

        Args:
            x: (B, N, D) fp32.
            layers: The LayerNorm, Up (D -> F) and Down (F -> D).
            drop_path_scale: m, (B, 1, 1) fp32 or None for 1.
            keeps: Save what the backward pass needs.
            in_place: Write into x.

        Returns:
            (B, N, D) fp32; the input of GELU (B, N, F) if `keeps`; what was saved of the norm.
        """
        norm, up, down = layers
        dtype, hidden_dim = up.packed.dtype, len(up.bias)
        out = x if in_place else torch.empty_like(x)
        saved = _saved_norm(x, dtype) if keeps else SavedNorm(None, None)
        hidden = x.new_empty(*x.shape[:-1], hidden_dim, dtype=dtype) if keeps else None
        self._call(
            "mlp",
            dtype,
            inp=x,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            up_packed=up.packed,
            up_bias=up.bias,
            down_packed=down.packed,
            down_bias=down.bias,
            drop_path_scale=drop_path_scale,
            normalized=saved.normalized,
            statistics=saved.statistics,
            hidden=hidden,
            out=out,
            rows=x.numel() // x.shape[-1],
            tokens=x.shape[-2],
            width=x.shape[-1],
            hidden_dim=hidden_dim,
            eps=norm.eps,
        )
        return out, hidden, saved

    def linear_residual_backward(
        self, grad_out: Tensor, drop_path_scale: Tensor | None, packed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Backward pass of `linear_residual` in bf16.

        Args:
            grad_out: (B, N, D) fp32.
            drop_path_scale: m, (B, 1, 1) fp32 or None for 1.
            packed: The layer's weight, packed without transposing.

        Returns:
            m · grad_out, and the gradient of `inp` (B, N, F), in the dtype of `packed`.
        """
        width, in_dim = grad_out.shape[-1], packed.numel() // grad_out.shape[-1]
        grad_update = torch.empty_like(grad_out, dtype=packed.dtype)
        grad_inp = grad_update.new_empty(*grad_update.shape[:-1], in_dim)
        self._call(
            "linear_residual_backward",
            packed.dtype,
            grad_out=grad_out,
            drop_path_scale=drop_path_scale,
            packed=packed,
            grad_update=grad_update,
            grad_inp=grad_inp,
            rows=grad_out.numel() // width,
            tokens=grad_out.shape[-2],
            out_dim=width,
            in_dim=in_dim,
        )
        return grad_update, grad_inp

    def norm_linear_backward(
        self,
        grad_out: Tensor,
        packed: Tensor,
        residual_grad: Tensor,
        x: Tensor,
        *,
        norm: NormSaved,
        grad_buffers: tuple[Tensor, ...],
    ) -> None:
        """Backward pass of `norm_linear` in bf16.

        Args:
            grad_out: (B, N, F) bf16.
            packed: The layer's weight, packed without transposing.
            residual_grad: The gradient of x through the skip connection (B, N, D), fp32.
            x: The input (B, N, D), fp32.
            norm: The LayerNorm's weight and statistics.
            grad_buffers: The gradients of x, which is written, and of the norm's weight and bias, which
                are added to.
        """
        grad_inp, grad_norm_weight, grad_norm_bias = grad_buffers
        self._call(
            "norm_linear_backward",
            packed.dtype,
            grad_out=grad_out,
            packed=packed,
            residual_grad=residual_grad,
            inp=x,
            norm_weight=norm[0],
            statistics=norm[1],
            grad_inp=grad_inp,
            grad_norm_weight=grad_norm_weight,
            grad_norm_bias=grad_norm_bias,
            rows=x.numel() // x.shape[-1],
            in_dim=x.shape[-1],
            out_dim=grad_out.shape[-1],
        )

    def mlp_backward(
        self,
        grad_out: Tensor,
        drop_path_scale: Tensor | None,
        packed: tuple[Tensor, Tensor],
        hidden: Tensor,
        x: Tensor,
        *,
        norm: NormSaved,
        grad_buffers: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Backward pass of `mlp` in bf16.

        Args:
            grad_out: (B, N, D) fp32.
            drop_path_scale: m, (B, 1, 1) fp32 or None for 1.
            packed: The weights of Down and Up, packed without transposing.
            hidden: The input of GELU (B, N, F).
            x: The input (B, N, D), fp32.
            norm: The LayerNorm's weight and statistics.
            grad_buffers: As of `norm_linear_backward`.

        Returns:
            m · grad_out, the output of GELU, and the gradient of its input.
        """
        grad_update = torch.empty_like(x, dtype=hidden.dtype)
        activated, grad_hidden = torch.empty_like(hidden), torch.empty_like(hidden)
        grad_inp, grad_norm_weight, grad_norm_bias = grad_buffers
        self._call(
            "mlp_backward",
            hidden.dtype,
            grad_out=grad_out,
            drop_path_scale=drop_path_scale,
            down_packed=packed[0],
            hidden=hidden,
            up_packed=packed[1],
            inp=x,
            norm_weight=norm[0],
            statistics=norm[1],
            grad_update=grad_update,
            activated=activated,
            grad_hidden=grad_hidden,
            grad_inp=grad_inp,
            grad_norm_weight=grad_norm_weight,
            grad_norm_bias=grad_norm_bias,
            rows=x.numel() // x.shape[-1],
            tokens=x.shape[-2],
            width=x.shape[-1],
            hidden_dim=hidden.shape[-1],
        )
        return grad_update, activated, grad_hidden

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
        """Stem(patches) + positions.

        Args:
            images: (B, C, H, W) fp32.
            stem: The convolution as a linear layer, C P P -> D.
            patch: P, side of a patch in pixels.
            positions: (1, N, D) fp32, N = first + n patches.
            first: Number of tokens before the patches, which are left uninitialised.
            keeps: Return the patches too.

        Returns:
            Tokens (B, N, D) fp32, and the patches (B n, C P P) if `keeps`.
        """
        batch, channels, height, width = images.shape
        tokens = images.new_empty(batch, *positions.shape[1:])
        shape = (batch * (positions.shape[1] - first), channels * patch**2)
        patches = images.new_empty(shape, dtype=stem.packed.dtype) if keeps else None
        self._call(
            "patch_tokens",
            stem.packed.dtype,
            images=images,
            packed=stem.packed,
            bias=stem.bias,
            positions=positions,
            patches=patches,
            tokens=tokens,
            batch=batch,
            channels=channels,
            height=height,
            width=width,
            patch=patch,
            first=first,
            dim=tokens.shape[-1],
        )
        return tokens, patches

    def cross_read(
        self, x: Tensor, probes: Tensor, norm: FusedNorm | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Σ_j softmax_j(probe · z_j) z_j of each probe; z is x, or `norm` of it.

        Args:
            x: (B, N, D) fp32 or bf16.
            probes: (B, H, D) fp32.
            norm: The LayerNorm of x and the first token, or None.

        Returns:
            (B, H, D) fp32, and what the backward pass needs: weights, dots (B, H, N), statistics
            (B, N, 2), moments (B, H, D).
        """
        (batch, tokens, width), heads = x.shape, probes.shape[1]
        context, moments = torch.empty_like(probes), torch.empty_like(probes)
        weights, dots = (probes.new_empty(batch, heads, tokens) for _ in range(2))
        statistics = probes.new_empty(batch, tokens, 2)
        self._call(
            "cross_read",
            x.dtype,
            inp=x,
            first=norm and norm.first,
            norm_weight=norm and norm.weight,
            norm_bias=norm and norm.bias,
            probes=probes,
            context=context,
            weights=weights,
            dots=dots,
            statistics=statistics,
            moments=moments,
            batch=batch,
            heads=heads,
            tokens=tokens,
            width=width,
            eps=norm.eps if norm else 0.0,
        )
        return context, (weights, dots, statistics, moments)

    def cross_read_backward(
        self,
        x: Tensor,
        probes: Tensor,
        norm: FusedNorm | None,
        saved: tuple[Tensor, ...],
        grad_context: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Backward pass of `cross_read` in fp32.

        Args:
            x: (B, N, D) fp32.
            probes: (B, H, D) fp32.
            norm: As given to `cross_read`.
            saved: What `cross_read` saved.
            grad_context: (B, H, D) fp32.

        Returns:
            The gradients of x, the probes, and the norm's first token, weight and bias, fp32.
        """
        (batch, tokens, width), heads = x.shape, probes.shape[1]
        weights, dots, statistics, moments = saved
        grad_x, grad_probes = torch.empty_like(x), torch.empty_like(probes)
        grad_first, grad_norm_weight, grad_norm_bias = (
            x.new_empty(batch, width) if norm else None for _ in range(3)
        )
        self._call(
            "cross_read_backward",
            x.dtype,
            inp=x,
            first=norm and norm.first,
            norm_weight=norm and norm.weight,
            norm_bias=norm and norm.bias,
            probes=probes,
            weights=weights,
            dots=dots,
            statistics=statistics,
            moments=moments,
            grad_context=grad_context,
            grad_inp=grad_x,
            grad_first=grad_first,
            grad_probes=grad_probes,
            grad_norm_weight=grad_norm_weight,
            grad_norm_bias=grad_norm_bias,
            batch=batch,
            heads=heads,
            tokens=tokens,
            width=width,
        )
        if grad_norm_weight is None or grad_norm_bias is None:
            return grad_x, grad_probes, None, None, None
        return grad_x, grad_probes, grad_first, grad_norm_weight.sum(0), grad_norm_bias.sum(0)

    def resize(self, planes: Tensor, size: tuple[int, int], rows: Taps, columns: Taps) -> Tensor:
        """(..., H, W) fp32 -> (..., *size): each output the sum of TAPS inputs along each side."""
        height, width = planes.shape[-2:]
        out = planes.new_empty(*planes.shape[:-2], *size)
        self._call(
            "resize",
            planes.dtype,
            planes=planes,
            out=out,
            row_starts=rows.starts,
            row_weights=rows.weights,
            column_starts=columns.starts,
            column_weights=columns.by_tap,
            count=planes.numel() // (height * width),
            height=height,
            width=width,
            out_height=size[0],
            out_width=size[1],
        )
        return out


def _saved_norm(x: Tensor, dtype: torch.dtype) -> SavedNorm:
    return SavedNorm(torch.empty_like(x, dtype=dtype), x.new_empty(*x.shape[:-1], 2))
