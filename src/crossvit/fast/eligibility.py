"""Every condition under which a faster form stands in for a part of the model, in two tables.

`AS_BUILT`: what a form takes for granted in a module and does not ask: exact classes, parameters,
settings, no hook, and plain functions that are sealed (see seal.py). `AT_THIS_CALL`: what must hold
for the tensors and contexts of one call. `why_not` reads both. Nothing else decides, so whoever
changes a module gets the module's own code, and `crossvit models --explain` says why.

Shapes: B batch, N tokens, D width, H heads, K = D / H width of a head.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from crossvit.fast.native.bindings import LANES, NAMES, TAPS
from crossvit.fast.native.build import native, why_none
from crossvit.fast.seal import Function, is_sealed
from crossvit.model import attention as attention_module
from crossvit.model import fusion, tokens
from crossvit.model.attention import CrossAttention, SelfAttention, chosen_kernel
from crossvit.model.crossvit import CrossViT, MultiScaleEncoder
from crossvit.model.fusion import CrossAttentionFusion, CrossRead, CrossReadBlock
from crossvit.model.layers import MLP, DropPath, EncoderBlock
from crossvit.model.t2t import TokenTransformer
from crossvit.model.tokens import Tokens

P = ParamSpec("P")
FUSED: dict[type[nn.Module], type[nn.Module]] = {}  # plain class -> its fused subclass

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CPU = torch.cpu.get_capabilities()
HAS_AMX = bool(_CPU.get("amx_bf16"))
HAS_BF16 = HAS_AMX or bool(_CPU.get("avx512_bf16"))


def fused_form(plain: type[nn.Module]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Decorate the fused subclass of `plain`, so that `accelerate` knows it."""

    def register(fused: type[nn.Module]) -> type[nn.Module]:
        FUSED[plain] = fused
        return fused

    return register


def why_not(module: nn.Module, x: Tensor | None = None) -> str | None:
    """Why a fast form may not stand in for `module`.

    Args:
        module: An accelerated module or a plain one.
        x: What the module is called with; without it, whether it is as built is all that is asked.

    Returns:
        The first reason in a few words, None where there is none.
    """
    plain = plain_class(module)
    if plain not in AS_BUILT:
        return f"is a {type(module).__name__}, which has no fast form"
    reason = _difference_below(module, plain)
    if x is None:
        return reason
    if reason is None:
        reasons = (check(module, x) for check in AT_THIS_CALL.get(plain, ()))
        reason = next((reason for reason in reasons if reason is not None), None)
    return _answered(plain.__name__, reason)


# ------------------------------------------------------------- what has been asked

_answers: list[tuple[str, str | None]] | None = None


@contextlib.contextmanager
def record_answers() -> Iterator[list[tuple[str, str | None]]]:
    """Inside, every question of a call is appended to the list this gives.

    Each as (name of the form, why it was not taken or None): `crossvit models --explain`.
    """
    global _answers  # noqa: PLW0603  # one list for the process
    before, _answers = _answers, []
    try:
        yield _answers
    finally:
        _answers = before


def _answered(form: str, reason: str | None) -> str | None:
    if _answers is not None:
        _answers.append((form, reason))
    return reason


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module`, of an accelerated one the plain class below it."""
    kind = type(module)
    base = kind.__base__
    return base if base is not None and FUSED.get(base) is kind else kind


# ------------------------------------------------------------------- as built


class Built(NamedTuple):
    """What a form does not ask a module for, since it computes it.

    Attributes:
        parts: Path below the module -> exact class; these modules are not called. `*` is every
            module of a list.
        functions: Plain functions that are stood in for.
        torch_functions: Functions of torch that are stood in for.
    """

    parts: Mapping[str, type[nn.Module]]
    functions: tuple[Function, ...]
    torch_functions: tuple[str, ...] = ()


ATTENTION: tuple[Function, ...] = (
    (attention_module, "attention"),
    (attention_module, "attention_weights"),
    (attention_module, "split_heads"),
)
AS_BUILT: dict[type[nn.Module], Built] = {
    EncoderBlock: Built(
        {
            "attention_norm": nn.LayerNorm,
            "attention": SelfAttention,
            "attention.qkv": nn.Linear,
            "attention.out": nn.Linear,
            "attention.drop": nn.Dropout,
            "mlp_norm": nn.LayerNorm,
            "mlp": MLP,
            "mlp.0": nn.Linear,
            "mlp.1": nn.GELU,
            "mlp.2": nn.Dropout,
            "mlp.3": nn.Linear,
            "mlp.4": nn.Dropout,
            "drop_path": DropPath,
        },
        (
            (EncoderBlock, "forward"),
            (SelfAttention, "forward"),
            (DropPath, "forward"),
            (DropPath, "scale"),
            *ATTENTION,
        ),
        ("scaled_dot_product_attention", "gelu", "layer_norm", "linear"),
    ),
    SelfAttention: Built(
        {}, ((SelfAttention, "forward"), *ATTENTION), ("scaled_dot_product_attention",)
    ),
    CrossAttention: Built(
        {"key": nn.Linear, "value": nn.Linear, "attention_drop": nn.Dropout},
        ((CrossAttention, "forward"), (attention_module, "attention_weights")),
        ("linear", "scaled_dot_product_attention"),
    ),
    CrossRead: Built(
        {"blocks": nn.ModuleList, "blocks.*": CrossReadBlock, "blocks.*.norm": nn.LayerNorm},
        (
            (CrossRead, "forward"),
            (CrossReadBlock, "forward"),
            (fusion, "summary"),
            (fusion, "patches_of"),
            (fusion, "with_summary"),
        ),
        ("layer_norm",),
    ),
    Tokens: Built({}, ((Tokens, "forward"), (tokens, "resize"), (tokens, "resample_positions"))),
    TokenTransformer: Built(
        {}, ((TokenTransformer, "forward"), *ATTENTION), ("scaled_dot_product_attention",)
    ),
    MultiScaleEncoder: Built(
        {},
        (
            (MultiScaleEncoder, "forward"),
            (MultiScaleEncoder, "run"),
            (MultiScaleEncoder, "contexts"),
        ),
    ),
    CrossAttentionFusion: Built(
        {"reads": nn.ModuleList},
        ((CrossAttentionFusion, "forward"), (fusion, "next_around")),
    ),
    CrossViT: Built(
        {"tokens": nn.ModuleList, "encoders": nn.ModuleList, "norms": nn.ModuleList},
        tuple(
            (CrossViT, name)
            for name in ("forward", "branch_logits", "branch_logits_of", "intermediate_tokens")
        ),
    ),
    nn.Conv2d: Built({}, ()),
    nn.LayerNorm: Built({}, (), ("layer_norm",)),
    nn.Linear: Built({}, (), ("linear",)),
}
# Class -> names of the parameters that it has, where it has any; none has buffers.
PARAMETERS: dict[type[nn.Module], frozenset[str]] = {
    nn.Linear: frozenset({"weight", "bias"}),
    nn.LayerNorm: frozenset({"weight", "bias"}),
    nn.Conv2d: frozenset({"weight", "bias"}),
    Tokens: frozenset({"class_token", "positions"}),
}
SETTINGS: dict[type[nn.Module], dict[str, Any]] = {nn.GELU: {"approximate": "none"}}
# Class -> names of the modules in it, where a form relies on there being no other.
CHILDREN: dict[type[nn.Module], frozenset[str]] = {
    EncoderBlock: frozenset({"attention_norm", "attention", "mlp_norm", "mlp", "drop_path"}),
    SelfAttention: frozenset({"qkv", "out", "drop"}),
    MLP: frozenset("01234"),
}
_TORCH_FUNCTIONS = {
    name: getattr(F, name)
    for name in ("scaled_dot_product_attention", "gelu", "layer_norm", "linear")
}


def _difference_below(module: nn.Module, plain: type[nn.Module]) -> str | None:
    """How `module` or a part of it that a form computes differs from what the table says."""
    built = AS_BUILT[plain]
    for owner, name in built.functions:
        if not is_sealed(owner, name):
            return f"{_named(owner, name)} is not the one that the fast form was tested against"
    for name in built.torch_functions:
        if getattr(F, name) is not _TORCH_FUNCTIONS[name]:
            return f"torch.nn.functional.{name} has been replaced"
    if (reason := _difference(module, plain, is_called=True)) is not None:
        return reason
    for path, kind in built.parts.items():
        for name, part in _parts(module, path.split(".")):
            if part is None:
                return f"has no {path}"
            if (reason := _difference(part, kind)) is not None:
                return f"{name} {reason}"
    return None


def _parts(
    module: nn.Module, path: list[str], name: str = ""
) -> Iterator[tuple[str, nn.Module | None]]:
    """Every module at `path`, `*` being all of a list, with its name below `module`."""
    first, *rest = path
    children = module._modules
    for key in children if first == "*" else (first,):
        child, child_name = children.get(key), f"{name}.{key}" if name else key
        if child is None or not rest:
            yield child_name, child
        else:
            yield from _parts(child, rest, child_name)


def _difference(module: nn.Module, kind: type[nn.Module], *, is_called: bool = False) -> str | None:
    """How a module differs from a `kind` as it is built, its children's own differences left out.

    Args:
        module: The module.
        kind: The exact class, or the plain one of a fused class.
        is_called: Whether the form is reached by calling the module itself, so that its hooks
            and a `forward` of the instance are not passed over.
    """
    if type(module) is not kind and type(module) is not FUSED.get(kind):
        return f"is a {type(module).__name__} in place of a {kind.__name__}"
    if not is_called and any(getattr(module, hooks) for hooks in _HOOKS):
        return "has a hook"
    if not is_called and "forward" in module.__dict__:
        return "has a forward of its own"
    if not kind.__module__.startswith("crossvit.") and not _is_torchs_own(kind):
        return f"is a {kind.__name__}, whose forward has been replaced"
    return _difference_in_content(module, kind)


def _difference_in_content(module: nn.Module, kind: type[nn.Module]) -> str | None:
    parameters, expected = set(module._parameters), PARAMETERS.get(kind, frozenset())
    if parameters - expected or module._buffers:
        names = ", ".join(sorted([*(parameters - expected), *module._buffers]))
        return f"has parameters or buffers that no {kind.__name__} has ({names})"
    # one that a module is built without is an attribute that is None
    missing = {name for name in expected - parameters if module.__dict__.get(name, "") is not None}
    if missing:
        return f"has parameters that are computed from others ({', '.join(sorted(missing))})"
    if kind in CHILDREN and set(module._modules) != CHILDREN[kind]:
        return f"has other modules in it ({', '.join(sorted(module._modules))})"
    for name, value in SETTINGS.get(kind, {}).items():
        if getattr(module, name) != value:
            return f"has {name} = {getattr(module, name)!r} in place of {value!r}"
    return None


def _is_torchs_own(kind: type[nn.Module]) -> bool:
    """Whether the `forward` of a class of torch is the one that its own file has."""
    if kind is nn.ModuleList:  # has none
        return True
    code = getattr(kind.forward, "__code__", None)
    owner = next(base for base in kind.__mro__ if "forward" in base.__dict__)
    module = sys.modules.get(owner.__module__)
    if code is None or module is None:
        return False
    place: tuple[Any, str] = (code.co_filename, code.co_qualname)
    return place == (module.__file__, f"{owner.__qualname__}.forward")


def _named(owner: object, name: str) -> str:
    return f"{owner.__name__}.{name}" if isinstance(owner, type) else name


# --------------------------------------------------------------- at this call


def is_eager(x: Tensor) -> bool:
    """Whether x is a plain tensor on the CPU and what is done with it is done at once.

    Not so while a model is compiled, exported, traced, transformed or counted (as FLOPs are).
    """
    if (
        type(x) is not Tensor
        or x.device.type != "cpu"
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
    ):
        return False
    inner = torch._C
    return not (
        inner._is_tracing()
        or inner._are_functorch_transforms_active()
        or inner._len_torch_dispatch_stack()
    )


def is_bf16_autocast() -> bool:
    """Whether autocast to bf16 is at work on the CPU."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def is_plain_fp32(tensor: Tensor | None) -> bool:
    """Whether its numbers are fp32 in this machine's memory."""
    return (
        tensor is not None
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
    )


def products_beat_fused(x: Tensor) -> bool:
    """Whether two products and a softmax are faster than torch's fused attention.

    So in reduced precision on a CPU that computes in it, with a backward pass or without AMX
    (benchmarks/attention.py).
    """
    reduced = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    return reduced and HAS_BF16 and (x.requires_grad or not HAS_AMX)


def calls_are_watched() -> str | None:
    """Why no call of a module or of torch may be left out now: a hook on all, or a mode."""
    if _has_any_global_hook():
        return "a hook on all modules is registered"
    return "a torch function mode is active" if is_in_function_mode() else None


def is_in_function_mode() -> bool:
    """Whether a torch function mode is active, one of a default device aside."""
    return bool(torch._C._len_torch_function_stack()) and not all(
        type(mode) is DeviceContext for mode in _get_current_function_mode_stack()
    )


def _is_watched(module: nn.Module, x: Tensor) -> str | None:  # noqa: ARG001  # one signature
    return calls_are_watched()


def _is_heard(module: nn.Module, x: Tensor) -> str | None:  # noqa: ARG001
    return "attention is recorded" if getattr(module, "listener", None) is not None else None


def _kernel_is_set(module: nn.Module, x: Tensor) -> str | None:  # noqa: ARG001
    name = chosen_kernel()
    return None if name == "auto" else f"attention_kernel({name!r}) is in force"


def _is_not_eager(module: nn.Module, x: Tensor) -> str | None:  # noqa: ARG001
    if is_eager(x):
        return None
    if type(x) is not Tensor:
        return f"the input is a {type(x).__name__}"
    return f"on {x.device.type}" if x.device.type != "cpu" else "traced, transformed or counted"


def _is_transformed(module: nn.Module, x: Tensor) -> str | None:  # noqa: ARG001
    active = torch._C._are_functorch_transforms_active() or torch._C._is_tracing()
    return "traced or transformed" if active else None


def _no_kernels(module: nn.Module, x: Tensor) -> str | None:  # noqa: ARG001
    return None if native() is not None else f"no native kernels: {why_none()}"


def _no_bf16_kernels(module: nn.Module, x: Tensor) -> str | None:  # noqa: ARG001
    kernels = native()
    return None if kernels is not None and kernels.has_bf16 else "no bf16 kernels"


def _not_bf16_autocast(module: nn.Module, x: Tensor) -> str | None:  # noqa: ARG001
    return None if is_bf16_autocast() else "not under bf16 autocast"


def _block_has_dropout(block: EncoderBlock, x: Tensor) -> str | None:  # noqa: ARG001
    attention, drops = block.attention, (block.attention.drop, block.mlp[2], block.mlp[4])
    if attention.training and attention.attention_drop > 0:
        return "attention has dropout"
    active = (isinstance(drop, nn.Dropout) and drop.training and drop.p > 0 for drop in drops)
    return "has dropout" if any(active) else None


def _block_shapes(block: EncoderBlock, x: Tensor) -> str | None:
    """Tokens and parameters in fp32, all widths whole registers."""
    attention, up, down = block.attention, block.mlp[0], block.mlp[3]
    layers = (block.attention_norm, block.mlp_norm, attention.qkv, attention.out, up, down)
    tensors = [x, *(layer.weight for layer in layers), *(layer.bias for layer in layers)]
    if not all(is_plain_fp32(tensor) for tensor in tensors):  # type: ignore[arg-type]
        return "tokens or parameters are not fp32 tensors on the CPU"
    if x.ndim != 3 or not x.numel() or x.shape[-1] != len(attention.out.weight):
        return "the input is not (B, N, D)"  # torch says what is wrong
    return _other_shapes(block) or why_no_whole_registers(block)


def why_no_whole_registers(block: EncoderBlock) -> str | None:
    """Why the native kernels do not take a block's widths."""
    width, heads = len(block.attention.out.weight), block.attention.num_heads
    hidden = len(block.mlp[0].weight)  # type: ignore[arg-type]
    whole = all(size % LANES == 0 for size in (width, hidden, width // heads))
    return None if whole else f"a width is no multiple of {LANES}"


def _attention_is_heard(block: EncoderBlock, x: Tensor) -> str | None:
    return _is_heard(block.attention, x)


def _keys_are_built(attention: CrossAttention, x: Tensor) -> str | None:  # noqa: ARG001
    if attention.keys_values != "lazy":
        return "keys_values is materialised"
    has_biases = attention.key.bias is not None and attention.value.bias is not None
    return None if has_biases else "keys or values have no bias"


AT_THIS_CALL: dict[type[nn.Module], tuple[Callable[[Any, Tensor], str | None], ...]] = {
    EncoderBlock: (
        _is_not_eager, _not_bf16_autocast, _no_bf16_kernels, _is_watched, _kernel_is_set,
        _attention_is_heard, _block_has_dropout, _block_shapes,
    ),
    SelfAttention: (_is_watched, _kernel_is_set, _is_heard),
    CrossAttention: (_is_watched, _keys_are_built),
    CrossRead: (_is_watched, _is_transformed),
    Tokens: (_is_watched,),
    TokenTransformer: (_is_watched, _kernel_is_set),
    MultiScaleEncoder: (),
}  # fmt: skip


# ------------------------------------------- of one operation, asked by the fused forms


def _recorded(form: str) -> Callable[[Callable[P, str | None]], Callable[P, str | None]]:
    """Let `record_answers` hear a function's answers under the name `form`."""

    def decorate(function: Callable[P, str | None]) -> Callable[P, str | None]:
        @functools.wraps(function)
        def ask(*args: P.args, **kwargs: P.kwargs) -> str | None:
            return _answered(form, function(*args, **kwargs))

        return ask

    return decorate


@_recorded("attention kernel")
def why_no_attention_kernel(qkv: Tensor, num_heads: int) -> str | None:
    """Why the native attention does not take `qkv` (B, N, 3 D)."""
    if (kernels := native()) is None:
        return f"no native kernels: {why_none()}"
    if not is_eager(qkv):
        return "not eager on the CPU"
    has_backward = torch.is_grad_enabled() and qkv.requires_grad
    if qkv.dtype != torch.bfloat16 and not has_backward:
        return "torch's fused attention is as fast in fp32 without a backward pass"
    return None if kernels.takes(qkv, num_heads) else "a shape or dtype that the kernel lacks"


@_recorded("cross-attention kernel")
def why_no_cross_kernel(x: Tensor) -> str | None:
    """Why the native lazy cross-attention does not take tokens x (B, N, D)."""
    if (kernels := native()) is None:
        return f"no native kernels: {why_none()}"
    if chosen_kernel() != "auto":
        return f"attention_kernel({chosen_kernel()!r}) is in force"
    known = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not torch.is_grad_enabled())
    if not (known and f"cross_read_{NAMES[x.dtype]}" in kernels.functions):
        return f"{x.dtype} with or without a backward pass is not what the kernel takes"
    if not (is_eager(x) and x.ndim == 3 and x.is_contiguous() and x.numel()):
        return "not eager, dense tokens on the CPU"
    return None if x.shape[-1] % LANES == 0 else f"the width is no multiple of {LANES}"


def why_no_norm_fold(norm: nn.Module, query: Tensor, x: Tensor) -> str | None:
    """Why the LayerNorm of tokens x is not left to the cross-attention kernel.

    Args:
        norm: A LayerNorm as built.
        query: The normalised query (B, 1, D) that takes the first token's place.
        x: The tokens (B, N, D).
    """
    batch, _, width = x.shape
    affine = isinstance(norm.weight, Tensor) and isinstance(norm.bias, Tensor)
    fits = affine and norm.normalized_shape == (width,) and query.shape == (batch, 1, width)
    return None if fits else "the LayerNorm has no weights, or other shapes"


@_recorded("resize kernel")
def why_no_resize_kernel(images: Tensor) -> str | None:
    """Why the native bicubic resize does not take images (B, C, H, W)."""
    if native() is None:
        return f"no native kernels: {why_none()}"
    if images.dtype != torch.float32 or images.requires_grad or not is_eager(images):
        return "not fp32 images on the CPU without gradients"
    return None if min(images.shape[-2:]) >= TAPS else f"a side is shorter than {TAPS} pixels"


@_recorded("patch kernel")
def why_no_patch_kernel(
    images: Tensor, stem: nn.Module, class_token: Tensor | None, positions: Tensor
) -> str | None:
    """Why the native patch embedding does not take images (B, C, H, W) and the stem."""
    kernels = native()
    if kernels is None or not kernels.has_bf16:
        return "no bf16 kernels"
    if not (is_bf16_autocast() and is_eager(images)):
        return "not under bf16 autocast on the CPU"
    if (reason := why_no_patch_product(stem)) is not None:
        return reason
    assert isinstance(stem, nn.Conv2d)
    tensors = [images, stem.weight, stem.bias, positions]
    tensors += [] if class_token is None else [class_token]
    if not all(is_plain_fp32(tensor) for tensor in tensors):
        return "images or parameters are not fp32 tensors on the CPU"
    if images.requires_grad or not images.numel() or images.ndim != 4:
        return "the images take a gradient, or there are none"
    side, first = stem.kernel_size[0], int(class_token is not None)
    count = (images.shape[-2] // side) * (images.shape[-1] // side)
    fits = images.shape[1] == stem.in_channels and count > 0  # else torch says what is wrong
    fits = fits and positions.shape == (1, first + count, stem.out_channels)
    return None if fits else "images or positions have other shapes"


def why_no_patch_product(stem: nn.Module) -> str | None:
    """Why a stem is not one product with patches side by side, of whole registers."""
    if (reason := _difference(stem, nn.Conv2d)) is not None:
        return f"the stem {reason}"
    assert isinstance(stem, nn.Conv2d)
    side, other_side = stem.kernel_size
    if stem.kernel_size != stem.stride or side != other_side:
        return "the stem's patches overlap, or are no squares"
    if stem.padding != (0, 0) or stem.dilation != (1, 1) or stem.groups != 1 or stem.bias is None:
        return "the stem is no plain convolution"
    whole = all(size % LANES == 0 for size in (len(stem.weight), stem.weight[0].numel()))
    return None if whole else f"a width of the stem is no multiple of {LANES}"


# ------------------------------------------------------------------------ for forms

# Parts that a form in the module's place does not call, beside those of AS_BUILT.
FORM_PARTS: dict[type[nn.Module], Mapping[str, type[nn.Module]]] = {
    MultiScaleEncoder: {"blocks": nn.ModuleList, "blocks.*": nn.ModuleList},
    Tokens: {"drop": nn.Dropout},
}


def why_not_exact(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a form made of the weights of `module` may not stand in its place.

    As `why_not`, but a form also passes over hooks and a `forward` of the module itself.

    Args:
        module: The module.
        kind: The plain class that the form knows.

    Returns:
        The first reason in a few words, None where there is none.
    """
    if (reason := calls_are_watched() or _difference(module, kind)) is not None:
        return reason
    if (reason := _difference_below(module, kind)) is not None:
        return reason
    for path, part_kind in FORM_PARTS.get(kind, {}).items():
        for name, part in _parts(module, path.split(".")):
            if part is None:
                return f"has no {name}"
            if (reason := _difference(part, part_kind)) is not None:
                return f"{name} {reason}"
    return _other_shapes(module) if isinstance(module, EncoderBlock) else None


def _other_shapes(block: EncoderBlock) -> str | None:
    """Why a block's weights are not those of its equation at one width D."""
    attention, norms = block.attention, (block.attention_norm, block.mlp_norm)
    up, down = block.mlp[0], block.mlp[3]
    layers = (*norms, attention.qkv, attention.out, up, down)
    if any(layer.weight is None or layer.bias is None for layer in layers):
        return "a layer has no weight or no bias"
    width, hidden = attention.out.weight.shape[0], len(up.weight)  # type: ignore[arg-type]
    fits = (
        all(norm.normalized_shape == (width,) for norm in norms)
        and attention.qkv.weight.shape == (3 * width, width)
        and attention.out.weight.shape == (width, width)
        and up.weight.shape == (hidden, width)
        and down.weight.shape == (width, hidden)
    )
    return None if fits else "its layers have other widths"


def why_not_untouched(module: nn.Module) -> str | None:
    """Why the code of `module` and all in it may not be run in another dtype.

    Somebody's class, hook or `forward` in it may bring tensors of its own.
    """
    if (reason := calls_are_watched()) is not None:
        return reason
    for name, part in module.named_modules():
        if not plain_class(part).__module__.startswith(("crossvit.model.", "torch.nn.modules.")):
            return f"{name} is a {type(part).__name__}".strip()
        if any(getattr(part, hooks) for hooks in _HOOKS) or "forward" in part.__dict__:
            return f"{name} has a hook or a forward of its own".strip()
    return None


def is_changed_at_the_root(model: CrossViT) -> bool:
    """Whether `model(images)` may be something else than the mean of `model.branch_logits`."""
    return why_not_exact(model, CrossViT) is not None
