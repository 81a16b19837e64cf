"""Which form computes each kind of module on this machine, and why not a faster one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crossvit.fast.cpu_form import FastBlock, FastEncoder, FastTokens
from crossvit.fast.eligibility import record_answers
from crossvit.fast.form import OwnCode
from crossvit.fast.inference import DeviceForm, optimize
from crossvit.fast.native.build import native, why_none
from crossvit.fast.native_form import KernelBlock, KernelTokens
from crossvit.model.crossvit import CrossViT

# Name of a question (crossvit.fast.eligibility) -> (kind of module, form, what computes otherwise)
QUESTIONS = {
    "Tokens": ("tokens", "kernels where they hold", "plain module"),
    "resize kernel": ("resize", "native kernel", "torch"),
    "patch kernel": ("patch embedding", "native kernel", "torch"),
    "TokenTransformer": ("T2T attention", "faster of two ways", "plain module"),
    "EncoderBlock": ("encoder block", "native kernels", "layer by layer"),
    "SelfAttention": ("self-attention", "fastest attention", "plain module"),
    "attention kernel": ("attention", "native kernel", "torch"),
    "CrossRead": ("fusion", "tokens not joined", "plain module"),
    "CrossAttention": ("cross-attention", "no keys and values", "plain module"),
    "cross-attention kernel": ("cross-attention read", "native kernel", "torch"),
}
FORMS: dict[type[nn.Module], tuple[str, str]] = {
    KernelTokens: ("tokens", "native kernels"),
    FastTokens: ("tokens", "convolution, channels last"),
    KernelBlock: ("encoder block", "native kernels"),
    FastBlock: ("encoder block", "packed linear layers"),
    FastEncoder: ("encoder", "blocks, fusion in place"),
}


class FormUsed(NamedTuple):
    """What computes a kind of module in one situation.

    Attributes:
        situation: `training fp32`, `inference bf16`, ...
        module: The kind of module.
        n: How many of them; None for an operation within them.
        form: What computes them.
        reason: Why not a faster form; empty where there is none or it is the fastest.
    """

    situation: str
    module: str
    n: int | None
    form: str
    reason: str


def forms_used(model: CrossViT) -> list[FormUsed]:
    """The forms of an accelerated model on the CPU, in training and by `optimize`, fp32 and bf16.

    Args:
        model: On the CPU; its mode stays as it was.
    """
    rows = []
    for precision in ("fp32", "bf16"):
        rows += list(_in_training(model, precision))
    for precision in ("fp32", "bf16"):
        rows += list(_in_inference(model, precision))
    return rows


def _in_training(model: CrossViT, precision: str) -> Iterator[FormUsed]:
    training = model.training
    model.train()
    try:
        with (
            record_answers() as answers,
            torch.enable_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            model(_image(model))
    finally:
        model.train(training)
    order = list(QUESTIONS)
    counts = Counter(answers)
    for (question, reason), count in sorted(
        counts.items(), key=lambda item: order.index(item[0][0])
    ):
        module, form, otherwise = QUESTIONS[question]
        computes = form if reason is None else otherwise
        n = count if question[0].isupper() else None
        yield FormUsed(f"training {precision}", module, n, computes, reason or "")


def _in_inference(model: CrossViT, precision: str) -> Iterator[FormUsed]:
    situation, form = f"inference {precision}", optimize(model, precision=precision)
    if isinstance(form, DeviceForm):
        yield FormUsed(situation, "model", 1, "its own code", "changed as a whole")
        return
    no_kernels = "" if native() is not None else f"no native kernels: {why_none()}"
    rows: Counter[tuple[str, str, str]] = Counter()
    for path, module in form.named_modules():
        if type(module) in FORMS:
            kind, name = FORMS[type(module)]
            slower = isinstance(module, FastTokens | FastBlock)
            rows[kind, name, no_kernels if slower else ""] += 1
        elif isinstance(module, OwnCode):
            rows[path, "its own code", module.reason] += 1
    for (kind, name, reason), count in rows.items():
        yield FormUsed(situation, kind, count, name, reason)


def _image(model: CrossViT) -> Tensor:
    height, width = model.config.image_size
    return torch.zeros(1, model.config.in_channels, height, width)
