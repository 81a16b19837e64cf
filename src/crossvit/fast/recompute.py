"""Gradients of gradients: a backward pass by hand, done again in torch's own operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients_with_graph(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad_out: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of `function` at `inputs`, which can be differentiated again.

    A backward pass written by hand gives numbers without a graph. Where one is asked for
    (`create_graph=True`), the function is computed once more in its plain form.

    Args:
        function: The plain form, of the inputs in their order.
        inputs: Tensors as the forward pass saved them, or None.
        grad_out: The gradient of the function's output.

    Returns:
        A gradient for each input, None where it takes none.
    """
    with torch.enable_grad(), torch.autocast(grad_out.device.type, enabled=False):
        out = function(*inputs)
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        grads = torch.autograd.grad(
            out, wanted, grad_out.to(out.dtype), create_graph=True, allow_unused=True
        )
    remaining = iter(grads)
    return tuple(next(remaining) if x is not None and x.requires_grad else None for x in inputs)
