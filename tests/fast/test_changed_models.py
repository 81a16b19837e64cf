"""What somebody changes in a model is never ignored: by no form, engine or file, nor in training.

Every row of CHANGES is a change, every column a way to compute. A cell compares with the plain
paper's modules (`CrossViT(config)`, without kernels) changed in the same way. Only files for ONNX
Runtime and OpenVINO may refuse a row, in one line that names the module. The table of all cells is
printed at the end of the file's tests (`pytest -s` shows it).

Changes of this process (a patched class, a hook on all modules, a function mode) are in force
while a form is made and while it is called: a form is of the model as it was when it was made.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode

import crossvit
from crossvit import CrossViTConfig
from crossvit.engines.onnx_graph import fingerprint
from crossvit.engines.onnxruntime import OnnxRuntimeEngine
from crossvit.engines.openvino import OpenVINOEngine
from crossvit.engines.torch import TorchEngine
from crossvit.errors import ConfigError, EngineError, UsageError
from crossvit.explanation.relevance import read
from crossvit.fast.accelerate import accelerate, decelerate
from crossvit.fast.eligibility import AS_BUILT, plain_class, why_not, why_not_exact
from crossvit.fast.export_form import GraphForm
from crossvit.fast.native.build import are_wanted, without_kernels
from crossvit.fast.seal import FUNCTIONS, is_sealed, sealed_hashes, source_hash, title
from crossvit.model import attention as attention_module
from crossvit.model.attention import SelfAttention, attention_kernel, chosen_kernel
from crossvit.model.cost import cost
from crossvit.model.crossvit import CrossViT
from crossvit.model.layers import EncoderBlock
from crossvit.model.registry import BLOCKS, FUSIONS
from crossvit.prediction.predictor import Predictor
from crossvit.results import TrainingResult
from crossvit.trained import Trained, open_trained
from support.models import lively

Context = contextlib.AbstractContextManager[object]
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


class HalfWeight(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class ReluForGelu(TorchFunctionMode):
    """Every GELU is a ReLU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return F.relu(*args) if func is F.gelu else func(*args, **(kwargs or {}))


def block(model: CrossViT) -> EncoderBlock:
    changed_block = model.encoders[0].blocks[1][0]
    assert isinstance(changed_block, EncoderBlock)
    return changed_block


def _subclassed_block(model: CrossViT) -> None:
    branch = model.config.branches[1]
    new = LayerScaleBlock(branch, drop=0.0, attention_drop=0.0, drop_path=0.0)
    new.load_state_dict(block(model).state_dict(), strict=False)
    model.encoders[0].blocks[1][0] = new


def _patched_instance(model: CrossViT) -> None:
    target = block(model)
    target.forward = lambda x: EncoderBlock.forward(target, x) + ramp(48)  # type: ignore[method-assign]


def _set(target: str, value: Callable[[], object]) -> Change:
    """A new `value()` at the place `target` of a block, a dotted path."""

    def change(model: CrossViT) -> None:
        *path, name = target.split(".")
        module: nn.Module = block(model)
        for part in path:
            module = getattr(module, part)
        setattr(module, name, value())

    return change


def _tanh_gelu(model: CrossViT) -> None:
    with torch.no_grad():
        block(model).mlp[0].weight.mul_(8)  # GELU's two forms differ most at 2
        block(model).mlp[3].weight.mul_(8)
    block(model).mlp[1] = nn.GELU(approximate="tanh")


def _low_rank(model: CrossViT) -> None:
    block(model).attention.qkv = LowRank(block(model).attention.qkv)


def _half_weight(model: CrossViT) -> None:
    parametrize.register_parametrization(block(model).mlp[0], "weight", HalfWeight())


def _moved_weight_norm(model: CrossViT) -> None:
    parametrizations.weight_norm(block(model).mlp[0])
    with torch.no_grad():
        block(model).mlp[0].parametrizations.weight.original0.mul_(3)  # type: ignore[union-attr]


def _forward_hook(place: Callable[[CrossViT], nn.Module]) -> Change:
    return lambda model: place(model).register_forward_hook(lambda m, i, out: 2 * out)


def _subclassed_model(model: CrossViT) -> None:
    model.__class__ = Doubled


CHANGES: dict[str, Change] = {
    "nothing": lambda model: None,
    "a block with LayerScale": _subclassed_block,
    "a low-rank update in place of a linear layer": _low_rank,
    "another MLP": _set("mlp", lambda: nn.Linear(48, 48)),
    "another attention": _set("attention", lambda: nn.Linear(48, 48)),
    "ReLU": _set("mlp.1", nn.ReLU),
    "GELU's tanh form": _tanh_gelu,
    "forward of one block": _patched_instance,
    "a subclass of CrossViT": _subclassed_model,
    "a forward hook": _forward_hook(block),
    "a forward hook deep inside": _forward_hook(lambda model: block(model).mlp[0]),
    "a pre-hook": lambda model: block(model).mlp.register_forward_pre_hook(
        lambda m, i: (i[0] * 2,)
    ),
    "a hook on the model": _forward_hook(lambda model: model),
    "a hook on the tokens": _forward_hook(lambda model: model.tokens[0]),
    "a hook on the tokens' dropout": _forward_hook(lambda model: model.tokens[1].drop),
    "a hook on the stem": _forward_hook(lambda model: model.tokens[0].patches),
    "a hook on the fusion": lambda model: model.encoders[0].fusion.register_forward_hook(
        lambda m, i, out: [x + ramp(x.shape[-1]) for x in out]
    ),
    "a hook on the keys": _forward_hook(
        lambda model: model.encoders[0].fusion.reads[0].blocks[0].attention.key
    ),
    "a hook on a head": _forward_hook(lambda model: model.heads[1]),
    "a backward hook": lambda model: block(model).mlp.register_full_backward_hook(
        lambda m, inputs, outputs: tuple(2 * grad for grad in inputs)
    ),
    "a backward hook deep inside": lambda model: (
        block(model).mlp[0].register_full_backward_hook(lambda m, i, o: tuple(2 * g for g in i))
    ),
    "a parametrisation": _half_weight,
    "weight norm": _moved_weight_norm,
    "another eps": _set("mlp_norm.eps", lambda: 0.5),
    "another eps in the fusion": lambda model: setattr(
        model.encoders[0].fusion.reads[0].blocks[0].norm, "eps", 0.5
    ),
    "another final LayerNorm": lambda model: setattr(model.norms[0], "eps", 0.5),
    "a final norm of another kind": lambda model: model.norms.__setitem__(0, nn.RMSNorm(32)),
    "a head without bias": lambda model: model.heads.__setitem__(0, nn.Linear(32, 5, bias=False)),
    "an extra parameter": lambda model: (
        block(model).mlp[0].register_parameter("extra", nn.Parameter(torch.ones(3)))
    ),
    "an extra buffer": lambda model: block(model).mlp_norm.register_buffer("extra", torch.ones(3)),
}
SAME_LOGITS = ("a backward hook", "a backward hook deep inside", "an extra parameter",
               "an extra buffer", "nothing")  # fmt: skip


@contextlib.contextmanager
def _forward_of_a_class() -> Iterator[None]:
    plain = EncoderBlock.forward
    EncoderBlock.forward = lambda self, x: plain(self, x) * ramp(x.shape[-1])  # type: ignore[method-assign]
    try:
        yield
    finally:
        EncoderBlock.forward = plain  # type: ignore[method-assign]


@contextlib.contextmanager
def _attention_of_a_module() -> Iterator[None]:
    plain = attention_module.attention
    attention_module.attention = lambda q, k, v, **named: 2 * plain(q, k, v, **named)
    try:
        yield
    finally:
        attention_module.attention = plain


@contextlib.contextmanager
def _attention_of_torch() -> Iterator[None]:
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda *args, **named: 2 * plain(*args, **named)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


@contextlib.contextmanager
def _hook_on_all(register: Callable[[Any], Any], hook: Callable[..., object]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def _double_gelu(module: nn.Module, inputs: object, out: Tensor) -> Tensor | None:
    return 2 * out if isinstance(module, nn.GELU) else None


def _double_grad(module: nn.Module, inputs: Any, outputs: object) -> Any:
    return tuple(2 * grad for grad in inputs) if isinstance(module, nn.GELU) else None


# What is changed in the process, not in one model.
CONTEXTS: dict[str, Callable[[], Context]] = {
    "forward of a class": _forward_of_a_class,
    "a function of the model's": _attention_of_a_module,
    "a function of torch's": _attention_of_torch,
    "a forward hook on all modules": lambda: _hook_on_all(
        nn.modules.module.register_module_forward_hook, _double_gelu
    ),
    "a backward hook on all modules": lambda: _hook_on_all(
        nn.modules.module.register_module_full_backward_hook, _double_grad
    ),
    "a function mode": ReluForGelu,
}
ROWS = [*CHANGES, *CONTEXTS]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, *CONFIG.image_size, generator=torch.Generator().manual_seed(0))


def plain_model(row: str) -> CrossViT:
    """The paper's modules, changed."""
    model = decelerate(lively(CONFIG))
    torch.manual_seed(1)
    CHANGES.get(row, CHANGES["nothing"])(model)
    return model.eval()


def changed(row: str) -> CrossViT:
    """An accelerated model, changed by somebody afterwards."""
    model = lively(CONFIG)
    torch.manual_seed(1)
    CHANGES.get(row, CHANGES["nothing"])(model)
    return model.eval()


def context(row: str) -> Context:
    return CONTEXTS[row]() if row in CONTEXTS else contextlib.nullcontext()


def logits_of_plain(row: str, images: Tensor) -> Tensor:
    model = plain_model(row)
    with context(row), without_kernels(), torch.no_grad():
        return model(images)  # type: ignore[no-any-return]


# -------------------------------------------------------------------------- the table

CELLS: dict[tuple[str, str], str] = {}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Prints what every cell was, once all have been computed."""
    yield
    columns = list(dict.fromkeys(column for _, column in CELLS))
    width = max((len(row) for row, _ in CELLS), default=0)
    for row in dict.fromkeys(row for row, _ in CELLS):
        cells = (f"{column}: {CELLS[row, column]}" for column in columns if (row, column) in CELLS)
        print(f"{row:{width}}  {', '.join(cells)}")


Column = Callable[[CrossViT, Tensor, Trained], Tensor]


def _of_engine(load: Callable[[Trained], Any]) -> Column:
    def compute(model: CrossViT, images: Tensor, trained: Trained) -> Tensor:
        return torch.from_numpy(load(trained)(images.numpy()).logits)

    return compute


def _of_predictor(model: CrossViT, images: Tensor, trained: Trained) -> Tensor:
    """Logits of the predictor's own batches, of images that are these ones already."""
    predictor = Predictor(trained.source, engine="torch")
    return torch.from_numpy(predictor.engine(images.numpy()).logits)


COLUMNS: dict[str, Column] = {
    "call": lambda model, images, trained: model(images),
    "call after accelerate": lambda model, images, trained: accelerate(decelerate(model))(images),
    "optimize": lambda model, images, trained: crossvit.optimize(model)(images),
    "torch engine": _of_engine(lambda trained: TorchEngine.load(trained, device="cpu")),
    "Predictor": _of_predictor,
    "ONNX": _of_engine(OnnxRuntimeEngine.load),
    "OpenVINO": _of_engine(OpenVINOEngine.load),
}
MAY_REFUSE = ("ONNX", "OpenVINO")
NEEDS = {"ONNX": ("onnxruntime", "onnxscript"), "OpenVINO": ("openvino", "onnxscript")}
# Making a file takes seconds: of these rows in every run of the tests, of the others in the long one.
FILE_ROWS = ("nothing", "a block with LayerScale", "ReLU", "a hook on the model", "a function mode")


@pytest.mark.filterwarnings("ignore:For backward hooks to be called, module output")
@pytest.mark.parametrize(
    ("row", "column"),
    [
        pytest.param(
            row,
            column,
            marks=[pytest.mark.slow] if column in NEEDS and row not in FILE_ROWS else [],
        )
        for row in ROWS
        for column in COLUMNS
    ],
)
def test_a_change_is_computed(
    row: str,
    column: str,
    images: Tensor,
    tiny_run: TrainingResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in NEEDS.get(column, ()):
        pytest.importorskip(package)
    monkeypatch.setenv("CROSSVIT_CACHE", str(tmp_path))
    model = changed(row)
    monkeypatch.setattr(Trained, "build", lambda self: model)
    trained = dataclasses.replace(open_trained(tiny_run.run), config=CONFIG)
    expected = logits_of_plain(row, images)
    with context(row), torch.no_grad():
        refusal = ""
        try:
            logits = COLUMNS[column](model, images, trained)
        except EngineError as error:
            refusal = str(error)
    if refusal:
        assert column in MAY_REFUSE
        assert len(refusal.splitlines()) == 1
        CELLS[row, column] = "refused"
        return
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    CELLS[row, column] = "same"


@pytest.mark.parametrize("row", [row for row in ROWS if row not in SAME_LOGITS])
def test_a_change_shows_in_the_logits(row: str, images: Tensor) -> None:
    """By more than is let through: otherwise the comparisons would hold for any form."""
    if row == "a backward hook on all modules":
        pytest.skip("shows in gradients")
    plain = plain_model("nothing")
    if row == "GELU's tanh form":
        with torch.no_grad():
            block(plain).mlp[0].weight.mul_(8)
            block(plain).mlp[3].weight.mul_(8)
    least = 5e-5 if row == "GELU's tanh form" else 2e-4
    with torch.no_grad():
        assert (logits_of_plain(row, images) - plain(images)).abs().max() > least


def gradients(model: CrossViT, images: Tensor, precision: torch.dtype) -> dict[str, Tensor]:
    """Of one step's loss: every parameter's gradient, and the loss."""
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        loss = model.train()(images).square().mean()
    loss.backward()
    of = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **of}


def assert_near(
    ours: dict[str, Tensor], expected: dict[str, Tensor], precision: torch.dtype
) -> None:
    near = 1e-4 if precision == torch.float32 else 0.15  # of a gradient's norm; bf16 has 8 bits
    assert set(ours) == set(expected)
    for name, grad in expected.items():
        if ".key.bias" in name:  # zero but for rounding
            continue
        assert float((ours[name] - grad).norm()) <= near * (float(grad.norm()) + 1e-3), name


@pytest.mark.filterwarnings("ignore:For backward hooks to be called, module output")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_change_is_trained(row: str, precision: torch.dtype, images: Tensor) -> None:
    """The loss and every gradient of one step, with kernels and without, plain and accelerated."""
    with context(row):
        with without_kernels():
            expected = gradients(plain_model(row), images, precision)
            without = gradients(changed(row), images, precision)
        assert_near(without, expected, precision)
        assert_near(gradients(changed(row), images, precision), expected, precision)
    CELLS[row, f"step in {str(precision).removeprefix('torch.')}"] = "same"


@pytest.mark.parametrize("row", [row for row in CHANGES if row not in ("nothing",)])
def test_the_reason_is_known(row: str) -> None:
    """Eligibility is the gate: some module of a changed model says why no form stands in for it."""
    model = changed(row)
    if "eps" in row or "head" in row or row == "another final LayerNorm":
        pytest.skip("a setting that forms read, or a part that is always its own code")
    named = [(name, part, _plain_kind(part)) for name, part in model.named_modules()]
    reasons = [why_not_exact(part, kind) for _, part, kind in named if kind is not None]
    assert any(reasons) or any(
        isinstance(part, LayerScaleBlock | LowRank | Doubled | nn.RMSNorm) for _, part, _ in named
    )
    assert not any(
        why_not_exact(part, kind)
        for part in changed("nothing").modules()
        if (kind := _plain_kind(part)) is not None
    )


# As they are built.
BUILT: dict[str, dict[str, Any]] = {
    **{fusion: {"fusion": fusion} for fusion in FUSIONS},
    "no class token": {
        "branches": tuple(
            dataclasses.replace(branch, class_token=False) for branch in CONFIG.branches
        )
    },
    "dagger": {
        "branches": (
            CONFIG.branches[0],
            dataclasses.replace(CONFIG.branches[1], patch=12, tokeniser="dagger"),
        )
    },
    "t2t": {
        "image_size": (48, 48),
        "branches": (
            dataclasses.replace(CONFIG.branches[0], patch=16, tokeniser="t2t"),
            dataclasses.replace(CONFIG.branches[1], patch=12, image_scale=1.0),
        ),
    },
    "dropout": {"drop": 0.1, "attention_drop": 0.1, "drop_path": 0.1},
    "bare projections": {"projection_norm": False, "projection_gelu": False},
    "as released": {"fusion_depth": 2, "as_released": True},
}


@pytest.mark.parametrize("name", BUILT)
def test_no_model_as_it_is_built_is_left_to_its_own_code(name: str) -> None:
    """Otherwise the forms would never be used, and every comparison would hold."""
    model = crossvit.create_model(CONFIG, **BUILT[name]).eval()
    reasons = {
        path: reason
        for path, module in model.named_modules()
        if (kind := _plain_kind(module)) is not None
        and (reason := why_not(module) or why_not_exact(module, kind)) is not None
    }
    assert reasons == {}


def _plain_kind(module: nn.Module) -> type[nn.Module] | None:
    kinds = [kind for kind in AS_BUILT if isinstance(module, kind)]
    return plain_class(module) if plain_class(module) in AS_BUILT else next(iter(kinds), None)


# ------------------------------------------------ what holds at a call or in training alone


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_functional_call_takes_other_weights(precision: torch.dtype, images: Tensor) -> None:
    results = []
    for model in (plain_model("nothing").train(), changed("nothing").train()):
        generator = torch.Generator().manual_seed(3)
        weights = {
            name: (parameter + 0.1 * torch.randn(parameter.shape, generator=generator))
            .detach()
            .requires_grad_()
            for name, parameter in model.named_parameters()
        }
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = torch.func.functional_call(model, weights, (images,))
        grads = torch.autograd.grad(logits.square().mean(), list(weights.values()))
        results.append({"loss": logits.detach(), **dict(zip(weights, grads, strict=True))})
        assert (logits - model(images)).abs().max() > 1e-2
    assert_near(results[1], results[0], precision)


@pytest.mark.parametrize("fusion", ["cross-attention", "all-attention"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_of_gradients(precision: torch.dtype, fusion: str, images: Tensor) -> None:
    """The gradient of a gradient's norm, which torch's fused attention itself does not have."""
    config = dataclasses.replace(CONFIG, fusion=fusion)
    results = []
    for make in (decelerate, accelerate):
        model = make(lively(config)).train()
        parameters = dict(model.named_parameters())
        with (
            attention_kernel("plain"),
            torch.autocast("cpu", precision, enabled=precision != torch.float32),
        ):
            loss = model(images).square().mean()
            first = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            norm = torch.stack([grad.float().square().sum() for grad in first]).sum()
            second = torch.autograd.grad(norm, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters, second, strict=True)
        results.append({name: grad for name, grad in pairs if grad is not None})
    assert_near(results[1], results[0], precision)


def test_recomputation_of_a_checkpoint_is_under_the_forward_passs_switches(images: Tensor) -> None:
    """The backward pass comes after the switches have gone, and computes by the same kernel."""
    model = changed("nothing").train()
    model.set_gradient_checkpointing()
    states: list[tuple[bool, str]] = []
    block(model).register_forward_pre_hook(
        lambda *_: states.append((are_wanted(), chosen_kernel()))
    )
    with without_kernels(), attention_kernel("plain"):
        loss = model(images).square().mean()
    loss.backward()
    assert states == [(False, "plain")] * 2
    assert (are_wanted(), chosen_kernel()) == (True, "auto")


def test_a_form_made_without_a_function_mode_is_not_called_within_one(images: Tensor) -> None:
    form = crossvit.optimize(changed("nothing"))
    with ReluForGelu(), pytest.raises(UsageError, match="call the model itself, or make the form"):
        form(images)
    with torch.device("cpu"):  # is one too, and changes no function of a form
        assert form(images).shape == (3, 5)


def test_a_form_is_not_moved_loaded_or_copied() -> None:
    form = crossvit.optimize(changed("nothing"))
    for spoil in (
        lambda: form.to(torch.bfloat16),
        lambda: form.load_state_dict({}),
        lambda: copy.deepcopy(form),
    ):
        with pytest.raises(UsageError, match=r"form anew by optimize\(model"):
            spoil()


def test_tokens_that_a_hook_keeps_are_not_written_over(images: Tensor) -> None:
    """Forms compute in place; what somebody's code has seen of them stays as it was."""
    model, seen = changed("nothing"), []
    block(model).register_forward_hook(
        lambda m, inputs, out: seen.append((inputs[0], inputs[0].clone(), out, out.clone()))
    )
    crossvit.optimize(model)(images)
    assert len(seen) == 1
    for tensor, before in (seen[0][:2], seen[0][2:]):
        assert torch.equal(tensor, before)


EDITED = """
import json, sys, torch, crossvit
from crossvit.model.crossvit import CrossViT
config = crossvit.CrossViTConfig.from_dict(json.loads(sys.argv[1]))
torch.manual_seed(0)
model = CrossViT(config).eval()
fast = crossvit.create_model(config).eval()
fast.load_state_dict(model.state_dict())
images = torch.randn(3, 3, *config.image_size)
with torch.no_grad():
    plain = model(images)
    answers = [fast(images), crossvit.optimize(fast)(images)]
with torch.autocast("cpu", torch.bfloat16):
    answers += [fast(images).float()]
print(json.dumps([plain.tolist(), *(float((a - plain).abs().max()) for a in answers)]))
"""


def test_an_edited_source_is_computed(tmp_path: Path) -> None:
    """The package's own file, edited as a researcher does, in a process of its own."""
    shutil.copytree(Path(crossvit.__file__).parent, tmp_path / "crossvit")
    file = tmp_path / "crossvit" / "model" / "layers.py"
    before = file.read_text()
    answers = []
    for text in (
        before,
        before.replace("return x + self.drop_path(", "return x - self.drop_path("),
    ):
        file.write_text(text)
        done = subprocess.run(  # this interpreter on a copy of this package
            [sys.executable, "-c", EDITED, json.dumps(CONFIG.to_dict())],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        answers.append(json.loads(done.stdout))
    for _, call, form, reduced in answers:
        assert max(call, form) < 2e-5
        assert reduced < 0.05
    difference = np.abs(np.subtract(answers[0][0], answers[1][0])).max()
    assert difference > 0.01
    CELLS["an edited source", "call, optimize, bf16"] = "same"


# -------------------------------------------------------------------------------- the seal


def test_the_seal_is_of_the_plain_functions() -> None:
    """After an edit of model/ that the fast forms follow: `make seal`."""
    assert set(sealed_hashes()) == {title(*function) for function in FUNCTIONS}
    assert [title(*function) for function in FUNCTIONS if not is_sealed(*function)] == []


def test_the_seal_is_of_the_code_and_not_of_its_text(tmp_path: Path) -> None:
    """Comments, docstrings and spacing may change; a number may not."""
    base = "def f(x):\n    return x + 1\n"
    same = 'def f(x):\n    """Words."""\n    # a comment\n    return (  # here\n        x+1)\n'
    same = same.replace("(  # here\n        x+1)", "x  +  1  # here")
    hashes = []
    for index, text in enumerate((base, same, base.replace("1", "2"), base.replace("+", "-"))):
        file = tmp_path / f"text{index}.py"
        file.write_text(text)
        space: dict[str, Any] = {}
        exec(compile(text, str(file), "exec"), space)  # the texts above
        hashes.append(source_hash(space["f"].__code__))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_accelerate_changes_the_class_alone() -> None:
    model = decelerate(lively(CONFIG))
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    assert accelerate(model) is model
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert all(dict(model.named_modules())[name] is m for name, m in modules.items())
    assert type(block(model)) is not EncoderBlock
    assert type(block(model)).__dict__.keys() & {"__init__", "__slots__"} == set()
    twin = copy.deepcopy(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert type(block(decelerate(model))) is EncoderBlock
    assert type(block(CrossViT(CONFIG))) is EncoderBlock
    assert type(block(crossvit.create_model(CONFIG, accelerated=False))) is EncoderBlock
    assert type(block(crossvit.create_model(CONFIG))) is not EncoderBlock


def test_why_not_names_the_first_reason() -> None:
    model, x = changed("nothing"), torch.zeros(2, 9, 48)
    assert why_not(block(model)) is None
    block(model).mlp[0].register_forward_hook(lambda *_: None)
    assert why_not(block(model), x) == "mlp.0 has a hook"
    block(model).mlp[1] = nn.ReLU()
    assert why_not(block(model), x) == "mlp.0 has a hook"
    assert why_not(nn.Linear(3, 3)) is None
    assert why_not(nn.ReLU()) == "is a ReLU, which has no fast form"
    with _forward_of_a_class():
        assert why_not(SelfAttention(32, 2)) is None
        assert why_not(block(model)) == (
            "EncoderBlock.forward is not the one that the fast form was tested against"
        )


def test_a_model_that_is_changed_as_a_whole_is_refused_as_a_file() -> None:
    with pytest.raises(EngineError, match="cannot be exported as it is changed: is a Doubled"):
        GraphForm(Doubled(CONFIG))


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
    assert why_not_exact(block(model), EncoderBlock) == (
        "is a LayerScaleBlock in place of a EncoderBlock"
    )
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
    monkeypatch.setattr(module.Block, "forward", lambda self, x: 3 * x)
    assert fingerprint(dataclasses.replace(trained, config=config)) not in digests


@pytest.mark.parametrize("patch", [_forward_of_a_class, _attention_of_a_module])
def test_a_kept_graph_goes_by_what_this_process_has_patched(
    patch: Callable[[], Context], tiny_run: TrainingResult
) -> None:
    trained = open_trained(tiny_run.run)
    before = fingerprint(trained)
    with patch():
        assert len({before, fingerprint(trained)}) == 2
        assert fingerprint(trained) == fingerprint(trained)
    assert fingerprint(trained) == before


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
