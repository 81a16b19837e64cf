"""What every inference form is made of: a copy of the model with what is eligible replaced."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from crossvit.errors import UsageError
from crossvit.fast.accelerate import accelerate
from crossvit.fast.cross_attention import LazyCrossAttention
from crossvit.fast.eligibility import is_in_function_mode, why_not_exact
from crossvit.model.attention import CrossAttention

log = logging.getLogger("crossvit")


class InferenceForm(nn.Module):
    """A form of a model as it was when the form was made. It is called, and nothing else."""

    def check_call(self) -> None:
        """UsageError within a torch function mode, whose functions a form may not call."""
        if is_in_function_mode():
            raise UsageError(
                "a torch function mode is active, which this form would pass over: call the "
                "model itself, or make the form by optimize(model) within the mode"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:  # noqa: ARG002  # torch's name
        raise UsageError(
            "an inference form stays on its device and in its precision: move the model and "
            "make the form anew by optimize(model, precision=...)"
        )

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(
            "an inference form has no weights to load: load them into the model and make the "
            "form anew by optimize(model)"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "an inference form cannot be copied or pickled: save the model, and make the form "
            "anew by optimize(model)"
        )


class OwnCode(nn.Module):
    """A part of a model that no form knows, by its own code: in fp32, products by autocast.

    What it gives is a copy, so that later parts may compute in place.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, token_dtype: torch.dtype, reason: str
    ) -> None:
        """
        Args:
            module: Is copied.
            reason: Why no form stands in for it.
            dtype: Of what goes into products.
            token_dtype: Of the tokens that it gives.
        """
        super().__init__()
        self.module = own_copy(module).float()
        self.dtype, self.token_dtype, self.reason = dtype, token_dtype, reason

    def forward(self, x: Tensor | Sequence[Tensor], *args: Any) -> Any:
        inputs = x.float() if isinstance(x, Tensor) else [tokens.float() for tokens in x]
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            out = self.module(inputs, *args)
        if isinstance(out, Tensor):
            return out.to(self.token_dtype, copy=True)
        return [tokens.to(self.token_dtype, copy=True) for tokens in out]


def own_copy(module: nn.Module, replacements: Mapping[nn.Module, nn.Module] | None = None) -> Any:
    """A copy of `module` for inference, accelerated, with `replacements` in their modules' place."""
    # deepcopy takes from its memo what it has copied already: here, the replacements
    memo: dict[int, Any] = {id(old): new for old, new in (replacements or {}).items()}
    copied: Any = accelerate(copy.deepcopy(module, memo))
    for part in copied.modules():
        if isinstance(part, CrossAttention) and why_not_lazy(part) is None:
            part.__class__ = LazyCrossAttention
    return copied.eval().requires_grad_(False)


def why_not_lazy(module: CrossAttention) -> str | None:
    """Why a form builds keys and values in `module`."""
    if module.keys_values != "lazy":
        return "keys_values is materialised"
    biases: tuple[Tensor | None, ...] = (module.key.bias, module.value.bias)
    if any(bias is None for bias in biases):
        return "keys or values have no bias"
    return why_not_exact(module, CrossAttention)


def why_not_form(module: nn.Module, kind: type[nn.Module], name: str) -> str | None:
    """Why no form may take the place of `module`, a `kind`; the reason is in the log too."""
    reason = why_not_exact(module, kind)
    if reason is not None:
        log.info("%s computes by its own code, not by a faster form: %s", name, reason)
    return reason
