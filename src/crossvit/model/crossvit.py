"""CrossViT (Chen, Fan, Panda, ICCV 2021, arXiv 2103.14899), to be read beside the paper's Figure 2, from the bottom up.

    image ─► Tokens per branch ─► K x MultiScaleEncoder (blocks, fusion) ─► LayerNorm and head per branch ─► mean of the logits

Shapes: B batch, C channels, H x W pixels, n patches, D width; one entry a branch, S (small patches) first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from crossvit.fast.self_attention import is_as_written, is_eager
from crossvit.fast.sublayers import Half, attention_half, mlp_half, takes
from crossvit.model.attention import SelfAttention, kernel_is_free
from crossvit.model.config import BranchConfig, CrossViTConfig
from crossvit.model.drop_path import DropPath, drop_path_rates
from crossvit.model.fusion import NORM_EPS, Grid, summary
from crossvit.model.registry import BLOCKS, FUSIONS
from crossvit.model.tokens import Tokens


class MLP(nn.Sequential):
    """Linear → GELU → Linear, dropout after each. (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden: int, *, drop: float) -> None:
        super().__init__(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(drop),
            nn.Linear(hidden, dim),
            nn.Dropout(drop),
        )


class EncoderBlock(nn.Module):
    """Equation 1, pre-norm: y = x + MSA(LN(x)); z = y + MLP(LN(y)). (B, 1 + n, D) -> (B, 1 + n, D)."""

    def __init__(
        self, branch: BranchConfig, *, drop: float, attention_drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(branch.dim, eps=NORM_EPS)
        self.attention = SelfAttention(
            branch.dim, branch.heads, drop=drop, attention_drop=attention_drop
        )
        self.mlp_norm = nn.LayerNorm(branch.dim, eps=NORM_EPS)
        self.mlp = MLP(branch.dim, branch.mlp_dim, drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if (halves := self._halves_for_kernels(x)) is not None:  # the same, in bf16 on a CPU
            x = attention_half(x, halves[0], self.attention.num_heads, self.drop_path.factor(x))
            return mlp_half(x, halves[1], self.drop_path.factor(x))
        x = x + self.drop_path(self.attention(self.attention_norm(x)))
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]

    def _halves_for_kernels(self, x: Tensor) -> tuple[Half, Half] | None:
        """The parameters of both lines of the equation where our kernels compute them, else None."""
        attention = self.attention
        if type(attention) is not SelfAttention or type(self.mlp) is not MLP or len(self.mlp) != 5:
            return None
        up, down = self.mlp[0], self.mlp[3]
        if (
            not is_eager(x)
            or attention.listener is not None
            or not kernel_is_free()
            or not self._is_as_built()
        ):
            return None
        assert isinstance(up, nn.Linear)  # as built, which is asked just above
        assert isinstance(down, nn.Linear)
        halves = (
            Half.of(self.attention_norm, attention.qkv, attention.out),
            Half.of(self.mlp_norm, up, down),
        )
        head_width = x.shape[-1] // attention.num_heads
        return halves if all(takes(x, half, head_width=head_width) for half in halves) else None

    def _is_as_built(self) -> bool:
        """Whether the equation is all there is to compute: no dropout, no module in another's place, none with a hook."""
        attention, (up, gelu, middle_drop, down, last_drop) = self.attention, self.mlp
        drops = (attention.drop, middle_drop, last_drop)
        kinds: dict[type[nn.Module], tuple[nn.Module, ...]] = {
            nn.LayerNorm: (self.attention_norm, self.mlp_norm),
            nn.Linear: (attention.qkv, attention.out, up, down),
            nn.GELU: (gelu,),
            nn.Dropout: drops,
            SelfAttention: (attention,),
            MLP: (self.mlp,),
            DropPath: (self.drop_path,),
        }
        if _has_any_global_hook() or not all(
            is_as_written(module, kind) for kind, own in kinds.items() for module in own
        ):
            return False
        if (attention.training and attention.attention_drop > 0) or gelu.approximate != "none":
            return False
        return not any(
            isinstance(drop, nn.Dropout) and drop.training and drop.p > 0 for drop in drops
        )


class MultiScaleEncoder(nn.Module):
    """One of the K encoders: each branch's own blocks (N for S, M for L), then the fusion.

    Tokens and grids of every branch in, tokens out. With `checkpointing` a block keeps its input only and computes the
    rest again in the backward pass.
    """

    def __init__(self, config: CrossViTConfig, *, drop_path: Sequence[float]) -> None:
        super().__init__()
        drops = {"drop": config.drop, "attention_drop": config.attention_drop}
        block = BLOCKS[config.block]
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                block(branch, drop_path=drop_path[index], **drops) for index in range(branch.depth)
            )
            for branch in config.branches
        )
        self.fusion = FUSIONS[config.fusion](config, drop_path=drop_path[-1])
        self.checkpointing = False

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        encoded = []
        for blocks, own in zip(self.blocks, tokens, strict=True):
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                own = self._run(block, own)  # noqa: PLW2901  # one stream of tokens, block after block
            encoded.append(own)
        return self.fusion(encoded, grids)  # type: ignore[no-any-return]

    def _run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        # once is enough for who listens
        recorded = any(getattr(module, "listener", None) for module in block.modules())
        if self.checkpointing and torch.is_grad_enabled() and not recorded:
            return checkpoint(block, tokens, use_reentrant=False)  # type: ignore[no-any-return]
        return block(tokens)  # type: ignore[no-any-return]


class CrossViT(nn.Module):
    """The multi-scale vision transformer. `model(images)` gives logits (B, num_classes).

    images: (B, C, H, W) float, normalised as the weights expect, at `config.image_size`, or of any size whose sides are
    no shorter than a patch with `config.dynamic_size`.
    """

    def __init__(self, config: CrossViTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.ModuleList(
            Tokens(
                branch,
                in_channels=config.in_channels,
                image_size=config.image_size,
                drop=config.drop,
            )
            for branch in config.branches
        )
        steps = max(
            1, *(branch.depth for branch in config.branches)
        )  # blocks of the deepest branch in one encoder
        rates = drop_path_rates(config.drop_path, config.stages * steps)
        self.encoders = nn.ModuleList(
            MultiScaleEncoder(config, drop_path=rates[stage * steps : (stage + 1) * steps])
            for stage in range(config.stages)
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(branch.dim, eps=NORM_EPS) for branch in config.branches
        )
        self.heads = nn.ModuleList(
            nn.Linear(branch.dim, config.num_classes) for branch in config.branches
        )
        initialise(self, config.init)

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Whether each encoder block trades its activations for a second forward pass."""
        for encoder in self.encoders:
            assert isinstance(encoder, MultiScaleEncoder)
            encoder.checkpointing = enabled

    def intermediate_tokens(self, images: Tensor) -> list[list[Tensor]]:
        """The tokens after each encoder, before any final LayerNorm: [stage][branch] of (B, 1 + n, D)."""
        check_images(images, self.config)
        grids = [
            branch.grid((images.shape[-2], images.shape[-1])) for branch in self.config.branches
        ]
        tokens = [embed(images) for embed in self.tokens]
        stages = []
        for encoder in self.encoders:
            tokens = encoder(tokens, grids)
            stages.append(tokens)
        return stages

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The last encoder's tokens after each branch's LayerNorm: one (B, 1 + n, D) a branch, class token first."""
        return [
            norm(own)
            for norm, own in zip(self.norms, self.intermediate_tokens(images)[-1], strict=True)
        ]

    def branch_logits(self, images: Tensor) -> Tensor:
        """Each branch's own logits, (branches, B, num_classes): the paper's "L only" and "S only" (Table 6).

        The last LayerNorm is taken of what is read alone: it treats every token by itself."""
        tokens = self.intermediate_tokens(images)[-1]
        if self.config.branches[0].class_token:
            tokens = [own[:, :1] for own in tokens]
        return self.branch_logits_of(
            [norm(own) for norm, own in zip(self.norms, tokens, strict=True)]
        )

    def branch_logits_of(self, tokens: Sequence[Tensor]) -> Tensor:
        """The heads alone: `forward_features`'s tokens -> (branches, B, num_classes).

        A head reads the class token, or the mean of the patches where there is none."""
        has_class_token = self.config.branches[0].class_token
        return torch.stack(
            [
                head(summary(own, has_class_token)[:, 0])
                for head, own in zip(self.heads, tokens, strict=True)
            ]
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes): the mean of the branches' logits, as released."""
        return self.branch_logits(images).mean(dim=0)


def check_images(images: Tensor, config: CrossViTConfig) -> None:
    """ValueError for images that a model of `config` does not take."""
    height, width = config.image_size
    channels = config.in_channels
    shape = tuple(images.shape)
    if config.dynamic_size:
        patch = max(branch.patch for branch in config.branches)
        if len(shape) != 4 or shape[1] != channels or min(shape[2:]) < patch:
            raise ValueError(
                f"images are {shape}: this model takes (B, {channels}, H, W) with sides of {patch} or more"
            )
    elif len(shape) != 4 or shape[1:] != (channels, height, width):
        raise ValueError(
            f"images are {shape}: this model takes (B, {channels}, {height}, {width}); "
            f"resize them, or build the model with image_size=(height, width) or dynamic_size=True"
        )


def initialise(model: nn.Module, scheme: str) -> None:
    """Fill every parameter. `paper`: truncated normal 0.02 for linear weights, class tokens and positions, zero biases,
    torch's own default for convolutions (as released). `xavier`: Xavier-uniform linear weights and He-normal
    convolutions, zero biases, so that small data trains from scratch (SPEED, small data). A model on the meta device has
    nothing to fill."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # drawing nothing, torch would import its compiler: seconds
    for module in model.modules():
        match module:
            case nn.Linear():
                if scheme == "paper":
                    nn.init.trunc_normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            case nn.Conv2d() if scheme == "xavier":
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            case Tokens():
                nn.init.trunc_normal_(module.positions, std=0.02)
                if module.class_token is not None:
                    nn.init.trunc_normal_(module.class_token, std=0.02)
