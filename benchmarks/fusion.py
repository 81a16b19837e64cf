"""Cross-attention with lazy keys and values against the paper's form: time and peak memory, by number of tokens.

Prints for each precision and number of tokens the milliseconds of both forms, their ratio, and what each holds at its peak
beyond its input (activations and gradients, as torch's profiler counts allocations): of the attention alone, inference and
forward with backward; and of the block around it in inference, with the LayerNorm and the class token's row, beside two lazy
blocks that were tried and are slower: `joined` (concatenation first) and `folded` (no LayerNorm is made).
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from crossvit import BranchConfig, CrossViTConfig
from crossvit.fast.accelerate import accelerate
from crossvit.fast.cross_attention import LazyCrossAttention, cross_read
from crossvit.model.attention import CrossAttention
from crossvit.model.fusion import CrossRead
from crossvit.model.layers import NORM_EPS

DIM, HEADS, BATCH = 256, 4, 4  # crossvit_9's L branch
TOKENS = (197, 401, 577, 1157, 4096)
FORMS = ("materialised", "lazy")
TRIED = ("joined", "folded")  # lazy blocks that are slower: dev/LOG.md
ROUNDS = 25


class PaperBlock(nn.Module):
    """t + CrossAttention(LN[t ‖ P]) as it is written: joined, normalised, keys and values for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM, eps=NORM_EPS)
        self.attention = CrossAttention(DIM, HEADS, keys_values="materialised")

    def forward(self, query: Tensor, other: Tensor) -> Tensor:
        joined = torch.cat((query, other[:, 1:]), dim=1)
        return query + self.attention(self.norm(joined))  # type: ignore[no-any-return]


class JoinedBlock(PaperBlock):
    """The lazy form with class token and patches joined first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention.__class__ = LazyCrossAttention


class FoldedBlock(JoinedBlock):
    """The lazy form with the LayerNorm folded in: a mean μ and a scale r for each token, and nothing of size N x D is made.

    Scores r (p∘γ)·(x − μ) + p·β, mixture Σ w r (x − μ)∘γ + β, the class token's own row apart.
    """

    def forward(self, query: Tensor, other: Tensor) -> Tensor:
        attention, norm = self.attention, self.norm
        heads = attention.num_heads
        own = norm(query)[:, 0]
        asked = attention.query(own).unflatten(-1, (heads, -1)).transpose(0, 1)  # (H, B, K)
        probe = (asked @ attention.key.weight.unflatten(0, (heads, -1))).transpose(
            0, 1
        ) * asked.shape[-1] ** -0.5
        variance, mean = torch.var_mean(other, dim=-1, correction=0)  # (B, N)
        scale = (variance + norm.eps).rsqrt()
        scaled = probe * norm.weight
        scores = (
            scaled @ other.transpose(1, 2) - scaled.sum(dim=-1, keepdim=True) * mean[:, None]
        ) * scale[:, None]
        scores[:, :, 0] = (probe * (own - norm.bias)[:, None]).sum(dim=-1)
        weights = scores.softmax(dim=-1)
        first = weights[:, :, :1].clone()
        rest = weights * scale[:, None]
        rest[:, :, 0] = 0
        mixed = (rest @ other - (rest * mean[:, None]).sum(dim=-1, keepdim=True)) * norm.weight
        mixed = mixed + (1 - first) * norm.bias + first * own[:, None]  # (B, H, D)
        value = mixed.transpose(0, 1) @ attention.value.weight.unflatten(0, (heads, -1)).transpose(
            1, 2
        )
        read = attention.out((value.transpose(0, 1).flatten(1) + attention.value.bias)[:, None])
        return query + read  # type: ignore[no-any-return]


def make_block(form: str) -> nn.Module:
    own = {"materialised": PaperBlock, "joined": JoinedBlock, "folded": FoldedBlock}
    if form in own:
        return own[form]()
    branch = BranchConfig(patch=16, dim=DIM, heads=HEADS, depth=1)
    config = CrossViTConfig(branches=(branch, branch), projection_identity=True)
    return _Read(accelerate(CrossRead(branch, branch, config, drop_path=0.0)))


class _Read(nn.Module):
    """The read of an accelerated fusion, f and g the identity: (B, 1, D), (B, N, D) -> (B, 1, D)."""

    def __init__(self, read: CrossRead) -> None:
        super().__init__()
        self.read = read

    def forward(self, query: Tensor, source: Tensor) -> Tensor:
        return cross_read(self.read, query, source)


def milliseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def peak_megabytes(work: Callable[[], object]) -> float:
    """The highest sum of live allocations while `work` runs, in 10^6 bytes."""
    with (
        quiet_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        work()
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():  # in the order they happened
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak / 1e6


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """torch's profiler reports its own start and stop there, whatever it is told."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def main() -> None:
    print(
        f"dim {DIM}, {HEADS} heads, batch {BATCH}, {torch.get_num_threads()} threads; median of {ROUNDS} interleaved rounds"
    )
    print(
        "precision  tokens  what                  the paper's form / lazy   ratio     peak memory of each"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            attentions = {
                form: accelerate(CrossAttention(DIM, HEADS, keys_values=form)).to(dtype)
                for form in FORMS
            }
            blocks = {form: make_block(form).to(dtype) for form in (*FORMS, *TRIED)}
            weights = blocks["lazy"].get_submodule("read.blocks.0").state_dict()
            for name in ("materialised", *TRIED):
                blocks[name].load_state_dict(weights)
            x, query = (
                torch.randn(BATCH, tokens, DIM).to(dtype),
                torch.randn(BATCH, 1, DIM).to(dtype),
            )

            def infer(
                form: str, forms: dict[str, CrossAttention] = attentions, x: Tensor = x
            ) -> None:
                with torch.inference_mode():
                    forms[form](x)

            def learn(
                form: str, forms: dict[str, CrossAttention] = attentions, x: Tensor = x
            ) -> None:
                forms[form](x.detach().requires_grad_()).sum().backward()

            def block(
                form: str,
                forms: dict[str, nn.Module] = blocks,
                x: Tensor = x,
                query: Tensor = query,
            ) -> None:
                with torch.inference_mode():
                    forms[form](query, x)

            with torch.inference_mode():
                for form in TRIED if dtype == torch.float32 else ():
                    torch.testing.assert_close(
                        blocks[form](query, x), blocks["lazy"](query, x), atol=1e-4, rtol=1e-4
                    )
            for what, work in (
                ("inference", infer),
                ("forward + backward", learn),
                ("block, inference", block),
            ):
                compared = (*FORMS, *TRIED) if work is block else FORMS
                rounds = [
                    [milliseconds(functools.partial(work, form)) for form in compared]
                    for _ in range(ROUNDS + 5)
                ][5:]
                paper, lazy, *others = (
                    statistics.median(column) for column in zip(*rounds, strict=True)
                )
                tried = "   ".join(
                    f"{form} {other:.2f} ms" for form, other in zip(TRIED, others, strict=False)
                )
                memory = [peak_megabytes(functools.partial(work, form)) for form in FORMS]
                print(
                    f"{str(dtype)[6:]:9}  {tokens:6}  {what:20}  {paper:9.2f} / {lazy:6.2f} ms  {paper / lazy:8.1f}x   "
                    f"{memory[0]:8.2f} / {memory[1]:5.2f} MB   {tried}"
                )


if __name__ == "__main__":
    main()
