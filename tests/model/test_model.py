"""The model's mathematics: twins that must agree and properties that must hold."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from crossvit import BranchConfig, CrossViTConfig, create_model
from crossvit.errors import ConfigError
from crossvit.fast.accelerate import accelerate
from crossvit.model.attention import CrossAttention, attention, attention_kernel, record_attention
from crossvit.model.crossvit import CrossViT
from crossvit.model.layers import DropPath, drop_path_rates
from crossvit.model.tokens import resample_positions
from support.models import SMALL


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_lazy_cross_attention_equals_the_papers(tokens: int, dropout: float) -> None:
    torch.manual_seed(0)
    module = CrossAttention(24, 3, drop=dropout, attention_drop=dropout).double().train()
    accelerate(module)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, tokens, 24, dtype=torch.float64, requires_grad=True)
    results = []
    for form in ("lazy", "materialised"):
        module.keys_values = form
        torch.manual_seed(1)  # the same weights are dropped
        output = module(x)
        inputs = [x, *module.parameters()]
        results.append((output, torch.autograd.grad(output.square().sum(), inputs)))
    (lazy, lazy_gradients), (paper, paper_gradients) = results
    assert lazy.shape == (2, 1, 24)
    torch.testing.assert_close(lazy, paper, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(lazy_gradients, paper_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_attention_dropout_scales_the_value_bias_with_what_is_kept() -> None:
    torch.manual_seed(0)
    module = accelerate(CrossAttention(8, 2, attention_drop=0.5)).double().train()
    with torch.no_grad():
        module.value.weight.zero_()
        module.value.bias.fill_(1.0)
        module.out.weight.copy_(torch.eye(8))
        module.out.bias.zero_()
    outputs = torch.cat([module(torch.randn(64, 5, 8, dtype=torch.float64)) for _ in range(50)])
    assert outputs.std() > 0.1  # a constant 1 would mean that the dropped weights were forgotten
    assert abs(outputs.mean() - 1.0) < 0.05


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_attention_kernels_agree_in_reduced_precision(needs_gradient: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(3, 2, 4, 50, 16).bfloat16().requires_grad_(needs_gradient).unbind(0)
    )
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    torch.testing.assert_close(attention(query, key, value).double(), exact, rtol=0.03, atol=0.03)


def test_patches_in_another_order_change_nothing_without_positions() -> None:
    torch.manual_seed(0)
    model = CrossViT(SMALL).double().eval()
    tokens = [
        torch.randn(2, 1 + 6 * 9, 16, dtype=torch.float64),
        torch.randn(2, 1 + 4 * 5, 24, dtype=torch.float64),
    ]
    shuffled = [
        torch.cat((own[:, :1], own[:, 1:][:, torch.randperm(own.shape[1] - 1)]), dim=1)
        for own in tokens
    ]
    grids = [(6, 9), (4, 5)]
    for encoder in model.encoders:
        tokens, shuffled = encoder(tokens, grids), encoder(shuffled, grids)
    for own, other in zip(tokens, shuffled, strict=True):
        torch.testing.assert_close(own[:, 0], other[:, 0], rtol=1e-10, atol=1e-10)


def test_every_parameter_has_a_gradient_and_logits_are_the_branches_mean() -> None:
    torch.manual_seed(0)
    model = CrossViT(SMALL)
    images = torch.randn(3, 3, 24, 36)
    logits = model(images)
    logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert logits.shape == (3, 5)
    torch.testing.assert_close(model.branch_logits(images).mean(dim=0), logits)
    assert [tuple(own.shape) for own in model.forward_features(images)] == [
        (3, 1 + 6 * 9, 16),
        (3, 1 + 4 * 5, 24),
    ]


def test_each_direction_of_the_fusion_reads_the_other_branch() -> None:
    torch.manual_seed(0)
    fusion = CrossViT(SMALL).encoders[0].fusion
    tokens = [
        torch.randn(1, 55, 16, requires_grad=True),
        torch.randn(1, 21, 24, requires_grad=True),
    ]
    small, large = fusion(tokens, [(6, 9), (4, 5)])
    torch.testing.assert_close(small[:, 1:], tokens[0][:, 1:])  # patches are handed on as they are
    read_by_small = torch.autograd.grad(small[:, 0].sum(), tokens, retain_graph=True)
    assert read_by_small[0][:, 1:].abs().sum() == 0
    assert read_by_small[1][:, 0].abs().sum() == 0  # the other's patches, not its class token
    assert (read_by_small[1][:, 1:].abs().sum(dim=-1) > 0).all()
    assert torch.autograd.grad(large[:, 0].sum(), tokens)[0][:, 1:].abs().sum() > 0


def test_branches_see_the_image_at_the_papers_sizes() -> None:
    for name, sizes in {
        "crossvit_9_240": [(240, 240), (224, 224)],
        "crossvit_15_dagger_408": [(408, 408), (384, 384)],
        "crossvit_pico_32": [(32, 32), (32, 32)],
    }.items():
        config = create_model(name).config
        assert [branch.image_size(config.image_size) for branch in config.branches] == sizes
    small, large = create_model("crossvit_9_240", image_size=(256, 128)).config.branches
    assert small.image_size((256, 128)) == (252, 132)  # nearest multiples of 12 to 256 and 128
    assert large.image_size((256, 128)) == (240, 112)  # nearest multiples of 16 to 238.9 and 119.5


def test_a_wide_image_goes_through() -> None:
    model = create_model("crossvit_9_240", image_size=(96, 192), num_classes=3).eval()
    assert model(torch.randn(1, 3, 96, 192)).shape == (1, 3)


def test_an_image_of_another_size_is_refused_with_the_right_one() -> None:
    with pytest.raises(ValueError, match=r"this model takes \(B, 3, 24, 36\)"):
        CrossViT(SMALL)(torch.randn(1, 3, 36, 24))


def test_drop_path_rates_grow_over_all_blocks_and_fusion_takes_the_last() -> None:
    assert drop_path_rates(0.1, 3) == pytest.approx([0.0, 0.05, 0.1])
    model = create_model("crossvit_9_240", drop_path=0.8)
    step = 0.8 / 8  # K·M = 9 blocks
    for stage, encoder in enumerate(model.encoders):
        small, large = encoder.blocks
        assert [block.drop_path.rate for block in small] == pytest.approx([step * 3 * stage])
        assert [block.drop_path.rate for block in large] == pytest.approx(
            [step * (3 * stage + i) for i in range(3)]
        )
        assert [
            block.drop_path.rate for read in encoder.fusion.reads for block in read.blocks
        ] == pytest.approx([step * (3 * stage + 2)] * 2)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    dropped = drop(torch.ones(4000, 3, 2))
    kept = dropped[:, 0, 0] != 0
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (dropped == dropped[:, :1, :1]).all()
    assert abs(kept.float().mean() - 0.75) < 0.03
    assert drop.eval()(torch.ones(2, 2)).eq(1).all()


def test_the_papers_initialisation() -> None:
    torch.manual_seed(0)
    model = create_model("crossvit_9_240")
    block = model.encoders[0].blocks[1][0]
    for weight in (block.attention.qkv.weight, model.tokens[1].positions, model.heads[1].weight):
        assert abs(weight.std() - 0.02) < 0.001
    assert block.attention.qkv.bias.abs().max() == 0
    assert block.mlp_norm.weight.eq(1).all()


def test_same_seed_same_model() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(create_model("crossvit_pico_32"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )


# ---------------------------------------------------------------- sizes


def test_resampling_positions_to_the_same_grid_is_the_identity() -> None:
    positions = torch.randn(1, 1 + 12, 8)
    assert resample_positions(positions, (3, 4), (3, 4)) is positions
    other = resample_positions(positions, (3, 4), (6, 5))
    assert other.shape == (1, 31, 8)
    assert torch.equal(other[:, 0], positions[:, 0])
    flat = resample_positions(torch.ones(1, 12, 8), (3, 4), (7, 2))
    torch.testing.assert_close(flat, torch.ones(1, 14, 8))


@pytest.mark.parametrize("size", [(24, 36), (36, 24), (25, 61), (6, 6)])
def test_any_size_and_aspect(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = CrossViT(CrossViTConfig(**{**vars(SMALL), "dynamic_size": True})).eval()
    images = torch.randn(2, 3, *size)
    assert model(images).shape == (2, 5)
    grids = [branch.grid(size) for branch in SMALL.branches]
    assert [own.shape[1] for own in model.forward_features(images)] == [
        1 + rows * columns for rows, columns in grids
    ]


def test_dynamic_size_changes_nothing_at_the_models_own_size_and_refuses_less_than_a_patch() -> (
    None
):
    torch.manual_seed(0)
    fixed = CrossViT(SMALL).eval()
    dynamic = CrossViT(CrossViTConfig(**{**vars(SMALL), "dynamic_size": True})).eval()
    dynamic.load_state_dict(fixed.state_dict())
    images = torch.randn(2, 3, 24, 36)
    assert torch.equal(fixed(images), dynamic(images))
    with pytest.raises(ValueError, match="with sides of 6 or more"):
        dynamic(torch.randn(1, 3, 5, 36))


# ---------------------------------------------------------------- inside


def test_recorded_attention_sums_to_one_and_changes_nothing() -> None:
    torch.manual_seed(0)
    model = CrossViT(SMALL).double().eval()
    images = torch.randn(2, 3, 24, 36, dtype=torch.float64)
    plain = model(images)
    with record_attention(model) as maps:
        recorded = model(images)
    torch.testing.assert_close(recorded, plain, rtol=1e-12, atol=1e-12)
    assert [(found.kind, found.stage, found.branch, found.block) for found in maps] == [
        (kind, stage, branch, block)
        for stage in (0, 1)
        for kind, branch, block in [
            ("self", 0, 0),
            ("self", 1, 0),
            ("self", 1, 1),
            ("cross", 0, 0),
            ("cross", 1, 0),
        ]
    ]
    for found in maps:
        torch.testing.assert_close(
            found.weights.sum(dim=-1), torch.ones(found.weights.shape[:-1], dtype=torch.float64)
        )
        assert (found.weights >= 0).all()
    assert maps[0].weights.shape == (2, 2, 55, 55)
    assert maps[3].weights.shape == (2, 3, 1, 21)  # S reads L: L's heads, [itself ‖ L's 20 patches]
    model(images)
    assert len(maps) == 10  # nothing is recorded outside


def test_recorded_weights_are_those_of_both_forms() -> None:
    torch.manual_seed(0)
    lazy = accelerate(CrossViT(SMALL)).double().eval()
    built = (
        CrossViT(CrossViTConfig(**{**vars(SMALL), "keys_values": "materialised"})).double().eval()
    )
    built.load_state_dict(lazy.state_dict())
    images = torch.randn(1, 3, 24, 36, dtype=torch.float64)
    with record_attention(lazy) as ours, record_attention(built) as papers:
        torch.testing.assert_close(lazy(images), built(images), rtol=1e-10, atol=1e-10)
    for own, paper in zip(ours, papers, strict=True):
        torch.testing.assert_close(own.weights, paper.weights, rtol=1e-10, atol=1e-10)


def test_intermediate_tokens_end_in_the_features() -> None:
    torch.manual_seed(0)
    model = CrossViT(SMALL).eval()
    images = torch.randn(1, 3, 24, 36)
    stages = model.intermediate_tokens(images)
    assert [len(stage) for stage in stages] == [2, 2]
    for norm, last, feature in zip(
        model.norms, stages[-1], model.forward_features(images), strict=True
    ):
        assert torch.equal(norm(last), feature)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = CrossViT(CrossViTConfig(**{**vars(SMALL), "drop_path": 0.5, "drop": 0.1})).train()
    images = torch.randn(4, 3, 24, 36)
    gradients = []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(7)
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for once, again in zip(*gradients, strict=True):
        torch.testing.assert_close(once, again)


def test_kernels_agree_and_an_unknown_one_is_refused() -> None:
    torch.manual_seed(0)
    model = CrossViT(SMALL).double().eval()
    images = torch.randn(1, 3, 24, 36, dtype=torch.float64)
    logits = []
    for kernel in ("fused", "plain"):
        with attention_kernel(kernel):
            logits.append(model(images))
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)
    with (
        pytest.raises(ConfigError, match="kernel = 'flash': should be one of auto, fused, plain"),
        attention_kernel("flash"),
    ):
        pass


def test_one_branch_equals_timms_plain_vit_with_the_same_weights() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    branch = BranchConfig(patch=8, dim=24, heads=3, depth=2, mlp_ratio=2)
    config = CrossViTConfig(
        branches=(branch,), image_size=32, stages=2, num_classes=5, fusion="none"
    )
    ours = CrossViT(config).double().eval()
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, mlp_ratio=2, num_classes=5
    ).double()
    names = {
        "attention_norm": "norm1",
        "attention.qkv": "attn.qkv",
        "attention.out": "attn.proj",
        "mlp_norm": "norm2",
    }
    names |= {"mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
    state = {
        "cls_token": ours.tokens[0].class_token,
        "pos_embed": ours.tokens[0].positions,
        "patch_embed.proj.weight": ours.tokens[0].patches.weight,
        "patch_embed.proj.bias": ours.tokens[0].patches.bias,
        "norm.weight": ours.norms[0].weight,
        "norm.bias": ours.norms[0].bias,
        "head.weight": ours.heads[0].weight,
        "head.bias": ours.heads[0].bias,
    }
    for index in range(4):
        block = ours.encoders[index // 2].blocks[0][index % 2].state_dict()
        for own, their in names.items():
            state |= {
                f"blocks.{index}.{their}.{end}": block[f"{own}.{end}"] for end in ("weight", "bias")
            }
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs.eval()(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pure_bf16_and_autocast_stay_near_full_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = CrossViT(SMALL).eval()
    images = torch.randn(4, 3, 24, 36)
    exact = model(images)
    if dtype is torch.bfloat16:
        logits = CrossViT(SMALL).to(dtype)
        logits.load_state_dict(model.state_dict())
        rough = logits.eval()(images.to(dtype)).float()
    else:
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images).float()
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    "scheme", ["none", "all-attention", "class-token", "pairwise", "cross-attention"]
)
def test_compile_has_no_graph_break_and_export_gives_the_same(scheme: str) -> None:
    torch.manual_seed(0)
    model = CrossViT(CrossViTConfig(**{**vars(SMALL), "fusion": scheme})).eval()
    images = torch.randn(2, 3, 24, 36)
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), expected)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    more = torch.randn(5, 3, 24, 36)
    torch.testing.assert_close(exported.module()(more), model(more))


def test_maps_are_recorded_once_under_gradient_checkpointing_and_can_be_differentiated() -> None:
    model = CrossViT(SMALL).train()
    images = torch.randn(2, 3, *SMALL.image_size)
    with record_attention(model) as plain:
        model(images)
    model.set_gradient_checkpointing()
    with record_attention(model) as maps:
        model(images).sum().backward()
    assert len(maps) == len(plain)
    with record_attention(model) as maps:
        logits = model(images)
    (gradient,) = torch.autograd.grad(logits.sum(), maps[0].weights)
    assert gradient.abs().sum() > 0


def test_maps_of_a_model_within_another_and_of_one_recording_within_another() -> None:
    model = CrossViT(SMALL).eval()
    whole = torch.nn.Sequential(torch.nn.Identity(), model)
    images = torch.randn(1, 3, *SMALL.image_size)
    with record_attention(whole) as outer:
        with record_attention(model) as inner:
            whole(images)
        whole(images)
    assert len(outer) == 2 * len(inner) > 0
    assert [(one.kind, one.stage, one.branch, one.block) for one in outer[: len(inner)]] == [
        (one.kind, one.stage, one.branch, one.block) for one in inner
    ]
    assert all(module.listener is None for module in model.modules() if hasattr(module, "listener"))


def test_maps_of_a_compiled_model() -> None:
    model = CrossViT(SMALL).eval()
    compiled = torch.compile(model, backend="eager")
    images = torch.randn(1, 3, *SMALL.image_size)
    with torch.no_grad(), record_attention(model) as plain:
        model(images)
    with torch.no_grad(), record_attention(compiled) as maps:
        compiled(images)
    assert len(maps) == len(plain)
    for one, other in zip(maps, plain, strict=True):
        torch.testing.assert_close(one.weights, other.weights)


def test_the_key_bias_has_its_gradient_of_zero_without_being_in_the_scores() -> None:
    module = accelerate(CrossAttention(24, 3)).double()
    torch.nn.init.normal_(module.key.bias)
    module(torch.randn(2, 9, 24, dtype=torch.float64)).square().sum().backward()
    assert module.key.bias.grad is not None
    assert torch.equal(module.key.bias.grad, torch.zeros(24, dtype=torch.float64))
