"""Whether a form made from a model's parameters computes what the model itself computes.

A form that reads weights out of modules (`optimize` on a CPU, the graph for engines) knows nothing
of what somebody has changed in them. So the model is held against one built anew from its config:
every module must be of the same class, with the same parameters, buffers, children and settings,
without hooks, and every class must have the `forward` that its own file has.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from crossvit.fast.self_attention import is_unpatched
from crossvit.model.crossvit import CrossViT

# What may differ from the model as it was built without another result: modes of training.
_MODES = ("training", "checkpointing", "listener")
_SIMPLE = (int, float, str, bool, tuple)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not(model: CrossViT) -> str | None:
    """Why a form may not stand in for `model`.

    Returns:
        The first difference in a few words, naming the module, or None where there is none.
    """
    if _has_any_global_hook():
        return "a hook on all modules is registered"
    if type(model) is not CrossViT:
        return f"the model is a {type(model).__name__}"
    with torch.device("meta"):
        reference = CrossViT(model.config)
    modules, expected = dict(model.named_modules()), dict(reference.named_modules())
    for name in [*expected, *(name for name in modules if name not in expected)]:
        place = name or "the model"
        if name not in modules:
            return f"{place} is missing"
        if name not in expected:
            return f"{place} has been added"
        if difference := _difference(modules[name], expected[name]):
            return f"{place} {difference}"
    return None


def is_changed_at_the_root(model: CrossViT) -> bool:
    """Whether `model(images)` may be something else than the mean of `model.branch_logits`."""
    return type(model) is not CrossViT or _difference(model, model) is not None


def _difference(module: nn.Module, built: nn.Module) -> str | None:
    """How a module differs from the same one as it is built, without its children."""
    kind = type(built)
    if not kind.__module__.startswith(("crossvit.model.", "torch.nn.")):
        return f"is a {kind.__name__}, which is not built in"
    if type(module) is not kind:
        return f"is a {type(module).__name__} in place of a {kind.__name__}"
    if "forward" in module.__dict__ or not (is_unpatched(kind) or kind is nn.ModuleList):
        return "has another forward"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has a hook"
    return _other_tensors(module, built) or _other_settings(module, built)


def _other_tensors(module: nn.Module, built: nn.Module) -> str | None:
    for kind in ("_parameters", "_buffers"):
        tensors, expected = getattr(module, kind), getattr(built, kind)
        if _shapes(tensors) != _shapes(expected):
            names = ", ".join(sorted(tensors)) or "none"
            return f"has other {kind[1:]} or shapes of them ({names})"
    return None


def _shapes(tensors: Mapping[str, Tensor | None]) -> dict[str, tuple[int, ...] | None]:
    return {
        name: None if tensor is None else tuple(tensor.shape) for name, tensor in tensors.items()
    }


def _other_settings(module: nn.Module, built: nn.Module) -> str | None:
    for name, expected in vars(built).items():
        if name not in _MODES and not name.startswith("_") and isinstance(expected, _SIMPLE):
            value = getattr(module, name, None)
            if value != expected:
                return f"has {name} = {value!r} in place of {expected!r}"
    return None
