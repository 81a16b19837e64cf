"""Gradient checkpointing whose second forward pass computes as the first did."""

from __future__ import annotations

import contextlib

from crossvit.fast.eligibility import fused_form
from crossvit.fast.native.build import are_wanted, kernels_wanted
from crossvit.model.crossvit import Context, MultiScaleEncoder


@fused_form(MultiScaleEncoder)
class FusedMultiScaleEncoder(MultiScaleEncoder):
    """`MultiScaleEncoder` that remembers for a checkpointed block whether kernels were wanted."""

    def contexts(self) -> tuple[Context, Context]:
        first, second = super().contexts()
        return first, _Within(second, kernels=are_wanted())


class _Within(contextlib.AbstractContextManager[None]):
    """A context with the kernels' switch around it; may be entered again, as the context may."""

    def __init__(self, context: Context, *, kernels: bool) -> None:
        self.context, self.kernels = context, kernels
        self._entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(kernels_wanted(self.kernels))
        stack.enter_context(self.context)
        self._entered.append(stack)

    def __exit__(self, *_: object) -> None:
        self._entered.pop().close()
