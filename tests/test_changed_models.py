"""What somebody changes in a model is never ignored: by no form, engine or file, nor in training.

Every row of CHANGES is a change, every cell compares with the model's own equations, which are
written out here once more in plain torch (`plain_block`), or with the changed model called without
native kernels. Only a file for an engine may refuse a change, in one line.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import crossvit
from conftest import lively
from crossvit import CrossViTConfig
from crossvit.engines.onnxruntime import fingerprint
from crossvit.engines.torch import TorchEngine
from crossvit.errors import ConfigError, EngineError
from crossvit.explanation.relevance import read
from crossvit.fast.eligibility import why_not
from crossvit.fast.export_form import GraphForm
from crossvit.fast.native.build import without_kernels
from crossvit.model.cost import cost
from crossvit.model.crossvit import CrossViT, EncoderBlock
from crossvit.model.registry import BLOCKS
from crossvit.results import TrainingResult
from crossvit.trained import open_trained

Change = Callable[[CrossViT], object]

# Widths that the native kernels take, where there are any.
CONFIG = CrossViTConfig(
    image_size=(24, 36),
    num_classes=5,
    stages=2,
    branches=(
        crossvit.BranchConfig(patch=4, dim=32, heads=2, depth=1, mlp_ratio=2.0),
        crossvit.BranchConfig(patch=6, dim=48, heads=3, depth=2, mlp_ratio=2.0, image_scale=0.9),
    ),
)


class LayerScaleBlock(EncoderBlock):
    """An encoder block whose residual branches are scaled (Touvron et al., 2021)."""

    def __init__(self, branch: crossvit.BranchConfig, **rates: float) -> None:
        super().__init__(branch, **rates)
        self.scale = nn.Parameter(torch.full((branch.dim,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.attention(self.attention_norm(x))
        return x + self.scale * self.mlp(self.mlp_norm(x))


def ramp(width: int) -> Tensor:
    """Something that no LayerNorm takes away."""
    return torch.linspace(-1, 1, width)


class LowRank(nn.Linear):
    """A linear layer with an update of rank one beside its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.down = nn.Parameter(ramp(linear.in_features)[None] / 4)
        self.up = nn.Parameter(ramp(linear.out_features)[:, None] / 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class Doubled(CrossViT):
    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def block(model: CrossViT) -> EncoderBlock:
    found = model.encoders[0].blocks[1][0]
    assert isinstance(found, EncoderBlock)
    return found


def _subclassed_block(model: CrossViT) -> None:
    branch = model.config.branches[1]
    new = LayerScaleBlock(branch, drop=0.0, attention_drop=0.0, drop_path=0.0)
    new.load_state_dict(block(model).state_dict(), strict=False)
    model.encoders[0].blocks[1][0] = new


def _patched_instance(model: CrossViT) -> None:
    target = block(model)
    target.forward = lambda x: EncoderBlock.forward(target, x) + ramp(48)  # type: ignore[method-assign]


def _set(target: str, value: object) -> Change:
    """`value` at the place `target` of a block, a dotted path."""

    def change(model: CrossViT) -> None:
        *path, name = target.split(".")
        module: nn.Module = block(model)
        for part in path:
            module = getattr(module, part)
        setattr(module, name, value)

    return change


def _low_rank(model: CrossViT) -> None:
    block(model).attention.qkv = LowRank(block(model).attention.qkv)


def _halved(model: CrossViT) -> None:
    parametrize.register_parametrization(block(model).mlp[0], "weight", Half())


CHANGES: dict[str, Change] = {
    "nothing": lambda model: None,
    "a block with LayerScale": _subclassed_block,
    "a low-rank update in place of a linear layer": _low_rank,
    "another MLP": lambda model: setattr(block(model), "mlp", nn.Linear(48, 48)),
    "another attention": lambda model: setattr(block(model), "attention", nn.Linear(48, 48)),
    "ReLU": _set("mlp.1", nn.ReLU()),
    "GELU's tanh form": _set("mlp.1", nn.GELU(approximate="tanh")),
    "forward of one block": _patched_instance,
    "a forward hook": lambda model: block(model).register_forward_hook(
        lambda m, i, out: out + ramp(48)
    ),
    "a forward hook deep inside": lambda model: (
        block(model).mlp[0].register_forward_hook(lambda m, i, out: out * 2)
    ),
    "a pre-hook": lambda model: block(model).mlp.register_forward_pre_hook(
        lambda m, i: (i[0] * 2,)
    ),
    "a parametrisation": _halved,
    "weight norm": lambda model: parametrizations.weight_norm(block(model).mlp[0]),
    "another eps": _set("mlp_norm.eps", 0.5),
    "another final LayerNorm": lambda model: setattr(model.norms[0], "eps", 0.5),
    "a head without bias": lambda model: model.heads.__setitem__(0, nn.Linear(32, 5, bias=False)),
    "a backward hook": lambda model: block(model).mlp.register_full_backward_hook(
        lambda m, inputs, outputs: tuple(2 * grad for grad in inputs)
    ),
    "an extra parameter": lambda model: (
        block(model).mlp[0].register_parameter("extra", nn.Parameter(torch.ones(3)))
    ),
    "an extra buffer": lambda model: block(model).mlp_norm.register_buffer("extra", torch.ones(3)),
    "a hook on the fusion": lambda model: model.encoders[0].fusion.register_forward_hook(
        lambda m, i, out: [x + ramp(x.shape[-1]) for x in out]
    ),
}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, *CONFIG.image_size, generator=torch.Generator().manual_seed(0))


def changed(name: str) -> CrossViT:
    model = lively(CONFIG)
    CHANGES[name](model)
    return model.eval()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_computed_by_every_torch_form(name: str, images: Tensor) -> None:
    model = changed(name)
    with torch.no_grad(), without_kernels():
        expected, branches = model(images), model.branch_logits(images)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-4)
    form = crossvit.optimize(model)
    torch.testing.assert_close(form(images), expected, rtol=0, atol=1e-4)
    engine = TorchEngine(form, device=torch.device("cpu"))
    np.testing.assert_allclose(engine(images.numpy()), branches.numpy(), rtol=0, atol=1e-4)
    assert (why_not(model) is None) == (name == "nothing")


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "nothing"])
def test_a_change_shows_in_the_logits(name: str, images: Tensor) -> None:
    """Otherwise the comparisons above and below would hold for any form."""
    hardly = {"GELU's tanh form": 1e-6}
    not_yet = ("weight norm", "a backward hook", "an extra parameter", "an extra buffer")
    near = -1.0 if name in not_yet else hardly.get(name, 1e-3)
    with torch.no_grad():
        assert (changed(name)(images) - changed("nothing")(images)).abs().max() > near


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_change_is_trained(name: str, precision: torch.dtype, images: Tensor) -> None:
    """The loss and every gradient of one step, with and without native kernels."""
    model = changed(name).train()
    gradients = []
    for context in (without_kernels, torch.enable_grad):
        twin = copy.deepcopy(model)
        if name == "forward of one block":  # a copy's forward would still be the first one's
            twin = changed(name).train()
        with context(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
            twin(images).square().mean().backward()
        gradients.append({key: p.grad for key, p in twin.named_parameters()})
    near = 1e-4 if precision == torch.float32 else 0.15  # of a gradient's norm; bf16 has 8 bits
    for key, expected in gradients[0].items():
        if expected is not None:
            size = float(expected.norm()) + 1e-3
            assert float((gradients[1][key] - expected).norm()) <= near * size, key


@pytest.mark.parametrize("name", ["a block with LayerScale", "ReLU", "another eps", "nothing"])
def test_a_change_is_in_an_exported_file(name: str, images: Tensor, tmp_path: Path) -> None:
    from crossvit.engines.onnxruntime import OnnxRuntimeEngine, export_module

    pytest.importorskip("onnxruntime")
    model = changed(name)
    file = tmp_path / "model.onnx"
    export_module(GraphForm(model), file, in_channels=3, image_size=CONFIG.image_size)
    with torch.no_grad():
        expected = model.branch_logits(images).numpy()
    found = OnnxRuntimeEngine(file)(images.numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_model_that_is_changed_as_a_whole_is_called_or_refused(images: Tensor) -> None:
    model = Doubled(CONFIG).eval()
    with torch.no_grad():
        torch.testing.assert_close(crossvit.optimize(model)(images), model(images))
    with pytest.raises(EngineError, match="cannot be exported as it is changed: the model is a D"):
        GraphForm(model)


def test_a_hook_on_all_modules_is_heard(images: Tensor) -> None:
    model = lively(CONFIG)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, out: 2 * out if isinstance(module, nn.GELU) else None
    )
    try:
        assert why_not(model) == "a hook on all modules is registered"
        with torch.no_grad():
            expected = model(images)
            torch.testing.assert_close(
                crossvit.optimize(model)(images), expected, rtol=0, atol=1e-4
            )
    finally:
        hook.remove()
    with torch.no_grad():
        assert (model(images) - expected).abs().max() > 1e-3


def test_forward_of_a_class_is_called(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(CONFIG)
    plain = EncoderBlock.forward
    monkeypatch.setattr(EncoderBlock, "forward", lambda self, x: plain(self, x) * ramp(x.shape[-1]))
    assert why_not(model) == "encoders.0.blocks.0.0 has another forward"
    with torch.no_grad():
        torch.testing.assert_close(crossvit.optimize(model)(images), model(images))


# ---------------------------------------------------------------- names of one's own


@pytest.fixture
def layerscale(monkeypatch: pytest.MonkeyPatch) -> CrossViTConfig:
    monkeypatch.setattr(BLOCKS, "_entries", dict(BLOCKS._entries))
    crossvit.register_block("layerscale", LayerScaleBlock)
    return CrossViTConfig(**{**vars(CONFIG), "block": "layerscale"})


def test_a_registered_block_goes_through_a_config(
    layerscale: CrossViTConfig, images: Tensor
) -> None:
    assert CrossViTConfig.from_dict(layerscale.to_dict()) == layerscale
    model = crossvit.create_model(layerscale).eval()
    assert isinstance(block(model), LayerScaleBlock)
    with torch.no_grad():
        torch.testing.assert_close(
            crossvit.optimize(model)(images), model(images), rtol=0, atol=1e-4
        )
    assert why_not(model) == "encoders.0.blocks.0.0 is a LayerScaleBlock, which is not built in"
    assert read(model, images).rollout.shape[1] == len(images)  # it is an EncoderBlock


def test_a_kept_graph_goes_by_the_code_of_a_registered_block(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_run: TrainingResult
) -> None:
    """The same weights and names, another forward: another graph."""
    monkeypatch.setattr(BLOCKS, "_entries", dict(BLOCKS._entries))
    trained = open_trained(tiny_run.run)
    digests = []
    for body in ("return x", "return 2 * x", "return x"):
        file = tmp_path / "somebody.py"
        file.write_text(f"class Block:\n    def forward(self, x):\n        {body}\n")
        spec = importlib.util.spec_from_file_location("somebody", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "somebody", module)
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        spec.loader.exec_module(module)
        sys.dont_write_bytecode = before
        crossvit.register_block("somebody's", module.Block)
        config = dataclasses.replace(trained.config, block="somebody's")
        digests.append(fingerprint(dataclasses.replace(trained, config=config)))
    assert digests[0] == digests[2] != digests[1]
    assert fingerprint(trained) not in digests


def test_a_block_that_is_no_encoder_block_has_no_relevance(images: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"blocks\.1\.0\.attention is a Linear: relevance is"):
        read(changed("another attention"), images)


def test_what_is_not_built_in_has_no_known_cost(layerscale: CrossViTConfig) -> None:
    with pytest.raises(ConfigError, match="block 'layerscale' is not built in: its cost"):
        cost(layerscale)


def test_an_unknown_name_says_how_to_make_it_known() -> None:
    with pytest.raises(ConfigError, match=r"block = 'layerscal': .* by register_block"):
        CrossViTConfig(**{**vars(CONFIG), "block": "layerscal"})
    with pytest.raises(ConfigError, match="block 'pre-norm' is built in"):
        crossvit.register_block("pre-norm", LayerScaleBlock)
    with pytest.raises(ConfigError, match="should be a class"):
        crossvit.register_fusion("mine", lambda: None)  # type: ignore[arg-type]
    assert "block" not in CONFIG.to_dict()  # so that earlier releases read it
