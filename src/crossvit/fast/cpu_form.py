"""The inference form of a model on a CPU: the same function, as processors compute it fastest.

docs/performance.md says what each change gave. Shapes: B batch, C channels, H x W pixels, N
tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.fast.cross_attention import cross_read
from crossvit.fast.eligibility import (
    why_no_whole_registers,
    why_not_exact,
    why_not_untouched,
)
from crossvit.fast.form import InferenceForm, OwnCode, own_copy, why_not_form
from crossvit.fast.native.bindings import NativeKernels
from crossvit.fast.native.build import native
from crossvit.fast.native_form import KernelBlock, KernelTokens, kernels_for, why_no_kernel_stem
from crossvit.fast.packed_linear import PackedLinear, Resize, attention_of, scaled_qkv
from crossvit.fast.patch_embed import fast_resize
from crossvit.model.crossvit import CrossViT, MultiScaleEncoder, check_images
from crossvit.model.fusion import CrossAttentionFusion, CrossRead, Grid, next_around, summary
from crossvit.model.layers import EncoderBlock
from crossvit.model.tokens import Tokens, resample_positions

log = logging.getLogger("crossvit")

# Tokens a pass takes at most: with native kernels 16 images a pass beat 6 and 8 of both models;
# see dev/LOG.md.
CACHE_TOKENS = 6500


class CpuForm(InferenceForm):
    """A model for inference. images: (B, C, H, W) float32, normalised.

    Batches are cut to what the caches hold. Parts that have been changed compute by their own
    code, in fp32 with products in `dtype` by autocast.
    """

    def __init__(self, model: CrossViT, *, dtype: torch.dtype) -> None:
        """
        Args:
            model: A CrossViT that is not changed at its root.
            dtype: Of what goes into products, float32 or bfloat16; LayerNorm, sums and softmax
                compute in float32 either way. Tokens are in float32 where native kernels compute
                the blocks, else in dtype.
        """
        super().__init__()
        self.config = model.config
        self.dtype = dtype
        self.has_class_token = self.config.branches[0].class_token
        grids = [branch.grid(self.config.image_size) for branch in self.config.branches]
        tokens = max(rows * columns for rows, columns in grids)
        self.images_a_pass = max(1, CACHE_TOKENS // tokens)
        rows = self.images_a_pass * tokens
        kernels = kernels_for(model, dtype)
        token_dtype = dtype if kernels is None else torch.float32
        make = _Parts(dtype, token_dtype, rows, kernels)
        self.tokens = nn.ModuleList(
            make.tokens(embed, self.config.image_size, f"tokens.{index}")
            for index, embed in enumerate(model.tokens)
        )
        self.encoders = nn.ModuleList(
            make.encoder(encoder, f"encoders.{index}")
            for index, encoder in enumerate(model.encoders)
        )
        self.norms = nn.ModuleList(
            make.norm(norm, f"norms.{index}") for index, norm in enumerate(model.norms)
        )
        # a head reads one token: precision costs nothing there
        self.heads = own_copy(model.heads).float()
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes): the mean of the branches'."""
        return self.branch_logits(images).mean(dim=0)

    @torch.inference_mode()
    def branch_logits(self, images: Tensor) -> Tensor:
        """(branches, B, num_classes), float32."""
        self.check_call()
        check_images(images, self.config)
        parts = images.float().split(self.images_a_pass)
        return torch.cat([self._pass(part) for part in parts], dim=1)

    def _pass(self, images: Tensor) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        grids = [branch.grid(size) for branch in self.config.branches]
        tokens = [embed(images) for embed in self.tokens]
        for encoder in self.encoders:
            tokens = encoder(tokens, grids)
        logits = []
        for norm, head, x in zip(self.norms, self.heads, tokens, strict=True):
            if self.has_class_token:
                read = norm(x[:, :1])
            else:
                read = summary(norm(x), has_class_token=False)
            logits.append(head(read[:, 0].float()))
        return torch.stack(logits)


class _Parts:
    """Makes a form of each part of a model, or leaves it to its own code."""

    def __init__(
        self, dtype: torch.dtype, token_dtype: torch.dtype, rows: int, kernels: NativeKernels | None
    ) -> None:
        self.dtype, self.token_dtype = dtype, token_dtype
        self.rows, self.kernels = rows, kernels

    def own_code(self, module: nn.Module, reason: str) -> OwnCode:
        return OwnCode(module, self.dtype, self.token_dtype, reason)

    def tokens(self, embed: nn.Module, image_size: tuple[int, int], name: str) -> nn.Module:
        if (reason := why_not_form(embed, Tokens, name)) is not None:
            return self.own_code(embed, reason)
        assert isinstance(embed, Tokens)
        if self.kernels and why_no_kernel_stem(embed, self.dtype, self.kernels) is None:
            return KernelTokens(embed, self.dtype, self.kernels)
        return FastTokens(embed, image_size, self.dtype, self.token_dtype)

    def norm(self, norm: nn.Module, name: str) -> nn.Module:
        if (reason := why_not_form(norm, nn.LayerNorm, name)) is not None:
            return self.own_code(norm, reason)
        assert isinstance(norm, nn.LayerNorm)
        return FastNorm(norm)

    def block(self, block: nn.Module, name: str) -> nn.Module:
        if (reason := why_not_form(block, EncoderBlock, name)) is not None:
            return self.own_code(block, reason)
        assert isinstance(block, EncoderBlock)
        if not self.kernels:
            return FastBlock(block, self.rows, self.dtype)
        if (reason := why_no_whole_registers(block)) is not None:
            return self.own_code(block, reason)
        return KernelBlock(block, self.dtype, self.kernels)

    def encoder(self, encoder: nn.Module, name: str) -> nn.Module:
        if (reason := why_not_form(encoder, MultiScaleEncoder, name)) is not None:
            return self.own_code(encoder, reason)
        assert isinstance(encoder, MultiScaleEncoder)
        blocks = [
            [
                self.block(block, f"{name}.blocks.{branch}.{index}")
                for index, block in enumerate(of_branch.children())
            ]
            for branch, of_branch in enumerate(encoder.blocks)
        ]
        if (reason := why_not_untouched(encoder.fusion)) is not None:
            log.info("%s.fusion computes by its own code: %s", name, reason)
            return FastEncoder(blocks, self.own_code(encoder.fusion, reason))
        fusion = own_copy(encoder.fusion)
        _pack_inside(fusion, self.rows, self.token_dtype)
        return FastEncoder(blocks, fusion.to(self.token_dtype))


class FastTokens(nn.Module):
    """`Tokens` with the stem in `dtype`, channels last: (B, C, H, W) -> (B, N, D)."""

    def __init__(
        self,
        embed: Tokens,
        image_size: tuple[int, int],
        dtype: torch.dtype,
        token_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.branch, self.grid, self.token_dtype = embed.branch, embed.grid, token_dtype
        self.image_size = image_size
        size = embed.branch.image_size(image_size)
        # Without kernels products are the faster way.
        has_products = size != image_size and native() is None
        self.resize_products = Resize(image_size, size) if has_products else None
        # T2T is attention over thousands of tokens, and not worth a form of its own.
        in_fp32 = embed.branch.tokeniser == "t2t" or why_not_untouched(embed.patches) is not None
        self.stem_dtype = torch.float32 if in_fp32 else dtype
        stem = own_copy(embed.patches).to(self.stem_dtype)
        self.stem = stem.to(memory_format=torch.channels_last)
        self.class_token = None if embed.class_token is None else embed.class_token.detach().clone()
        self.positions = embed.positions.detach().clone()

    def forward(self, images: Tensor) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        if self.resize_products is not None and size == self.image_size:
            view = self.resize_products(images)
        else:
            view = fast_resize(images, self.branch.image_size(size))
        view = view.to(self.stem_dtype, memory_format=torch.channels_last)
        patches = self.stem(view).flatten(2).transpose(1, 2)  # (B, n, D)
        positions = resample_positions(self.positions, self.grid, self.branch.grid(size))
        shape = (patches.shape[0], positions.shape[1], patches.shape[2])
        tokens = torch.empty(shape, dtype=self.token_dtype)
        if self.class_token is not None:
            tokens[:, :1] = self.class_token + positions[:, :1]
        first = positions.shape[1] - patches.shape[1]
        torch.add(patches, positions[:, first:], out=tokens[:, first:])
        return tokens


class FastNorm(nn.Module):
    """LayerNorm of tokens in any dtype, its weights and sums in fp32."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight = None if norm.weight is None else norm.weight.detach().float().clone()
        self.bias = None if norm.bias is None else norm.bias.detach().float().clone()
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class FastBlock(nn.Module):
    """`EncoderBlock` on packed weights, which also add the residuals: (B, N, D) -> (B, N, D)."""

    def __init__(self, block: EncoderBlock, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        attention = block.attention
        self.num_heads = attention.num_heads
        self.kernels = native()
        self.attention_norm = FastNorm(block.attention_norm)
        self.mlp_norm = FastNorm(block.mlp_norm)
        weight, bias = scaled_qkv(
            attention.qkv.weight.detach(), attention.qkv.bias.detach(), self.num_heads
        )
        self.qkv = PackedLinear(weight.to(dtype), bias.to(dtype), rows=rows)
        self.out = _packed(attention.out, rows, dtype)
        self.up, self.down = (_packed(block.mlp[index], rows, dtype) for index in (0, 3))

    def forward(self, x: Tensor) -> Tensor:
        context = attention_of(self.qkv(self.attention_norm(x)), self.num_heads, self.kernels)
        x = self.out.add(context, x)
        return self.down.add(self.up.gelu(self.mlp_norm(x)), x)


def _packed(linear: nn.Module, rows: int, dtype: torch.dtype) -> PackedLinear:
    assert isinstance(linear, nn.Linear)
    return PackedLinear(linear.weight.to(dtype), linear.bias.to(dtype), rows=rows)


def _pack_inside(module: nn.Module, rows: int, dtype: torch.dtype) -> None:
    """Put a packed layer in place of every exact linear one in `module`, but keys and values.

    Lazy cross-attention multiplies their weights.
    """
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            _pack_inside(child, rows, dtype)
        elif name not in ("key", "value") and child.bias is not None:
            setattr(module, name, _packed(child, rows, dtype))


class FastEncoder(nn.Module):
    """`MultiScaleEncoder`: every branch's blocks, then the fusion, in place where it may be."""

    def __init__(self, blocks: Sequence[Sequence[nn.Module]], fusion: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(*of_branch) for of_branch in blocks)
        self.fusion = fusion
        exact = why_not_exact(fusion, CrossAttentionFusion) is None
        reads = [*fusion.get_submodule("reads").children()] if exact else []
        self.in_place = bool(reads) and all(
            isinstance(read, CrossRead)
            and why_not_exact(read, CrossRead) is None
            and read.has_class_token
            for read in reads
        )

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        encoded = [blocks(x) for blocks, x in zip(self.blocks, tokens, strict=True)]
        if not self.in_place:
            return self.fusion(encoded, grids)  # type: ignore[no-any-return]
        # Each reads its own class token and the next one's patches: all, before any is written.
        reads = self.fusion.get_submodule("reads").children()
        triples = zip(reads, encoded, next_around(encoded), strict=True)
        class_tokens = [cross_read(read, x[:, :1], source) for read, x, source in triples]  # type: ignore[arg-type]
        for x, class_token in zip(encoded, class_tokens, strict=True):
            x[:, :1] = class_token
        return encoded
