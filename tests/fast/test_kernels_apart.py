"""Our kernels where something is out of the ordinary: odd inputs, modules that are not as built, torch's settings, several
threads, the cache of what was compiled."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossvit.fast import sublayers
from crossvit.fast.eligibility import why_no_attention_kernel, why_not
from crossvit.fast.native import build as module
from crossvit.fast.native.build import native, why_none, without_kernels
from crossvit.fast.resize import bicubic
from crossvit.fast.self_attention import native_attention
from crossvit.model.crossvit import CrossViT
from crossvit.model.layers import EncoderBlock
from support.kernels import (
    CONFIG,
    NEAR,
    counted,
    error,
    exact_attention,
    needs_kernels,
    needs_layers,
)
from support.models import lively

Change = Callable[[EncoderBlock], object]
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def mixed(model: nn.Module, images: Tensor = IMAGES, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with torch.autocast("cpu", dtype):
        return model(images)  # type: ignore[no-any-return]


def block_of(model: CrossViT) -> EncoderBlock:
    found = model.get_submodule("encoders.0.blocks.0.0")
    assert isinstance(found, EncoderBlock)
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with a word for every sublayer of a block that our kernels compute."""
    return counted(monkeypatch, sublayers, "attention_sublayer", "mlp_sublayer")


# ---- what comes in


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thousands_of_tokens_and_a_second_backward_pass(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 4097, 48, generator=generator).to(dtype).requires_grad_()
    given = torch.randn(1, 4097, 16, generator=generator).to(dtype)
    if why_no_attention_kernel(qkv, 1):
        pytest.skip(f"no {dtype} in this processor")
    wide = qkv.detach().double().requires_grad_()
    ours, exact = native_attention(qkv, 1), exact_attention(wide, 1)
    (gradient,) = torch.autograd.grad(ours, qkv, given, retain_graph=True)
    (again,) = torch.autograd.grad(ours, qkv, given)
    assert error(ours, exact) < NEAR[dtype]
    assert error(gradient, torch.autograd.grad(exact, wide, given.double())[0]) < NEAR[dtype]
    assert torch.equal(gradient, again)


@needs_kernels
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5, 16, 32])
def test_what_is_not_finite_in_a_token_is_so_in_the_gradient(place: int, bad: float) -> None:
    """Whichever of queries, keys and values has it, and in every place of the softmax's registers."""
    for third in range(3):
        qkv = torch.randn(1, 33, 48, generator=torch.Generator().manual_seed(place))
        qkv[0, place, 16 * third] = bad
        qkv.requires_grad_()
        ours = native_attention(qkv, 1)
        (gradient,) = torch.autograd.grad(ours.sum(), qkv)
        assert not (ours.isfinite().all() and gradient.isfinite().all())


@needs_layers
def test_a_model_shows_what_is_not_finite_in_its_input_or_in_any_weight() -> None:
    model = lively(CONFIG)
    images = IMAGES.clone()
    images[1, 0, 5, 5] = math.nan
    assert mixed(model, images).isfinite().all(dim=1).tolist() == [True, False, True]
    for name, parameter in block_of(model).named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] = math.nan
        assert not mixed(model).isfinite().any(), name
        with torch.no_grad():
            parameter.copy_(before)


@needs_layers
def test_no_images_give_no_logits_and_gradients_of_zero() -> None:
    model = lively(CONFIG)
    logits = mixed(model, IMAGES[:0])
    logits.float().sum().backward()
    assert logits.shape == (0, 7)
    assert all(
        parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters()
    )


@needs_layers
@pytest.mark.parametrize("frozen", ["tokens", "encoders.0", "attention_norm", "qkv", "mlp"])
def test_what_is_frozen_changes_no_other_gradient(frozen: str) -> None:
    model, whole = lively(CONFIG), lively(CONFIG)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    for one in (model, whole):
        mixed(one).float().square().sum().backward()
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (frozen in name)
        assert parameter.grad is None or torch.equal(parameter.grad, expected[name].grad)  # type: ignore[arg-type]


@needs_layers
def test_a_gradient_can_be_added_to_taken_twice_and_taken_of_a_copy() -> None:
    model = lively(CONFIG)
    parameters = list(model.parameters())
    loss = mixed(model).float().square().sum()
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(map(torch.equal, once, torch.autograd.grad(loss, parameters)))
    twin = copy.deepcopy(model)
    for _ in range(2):
        mixed(twin).float().square().sum().backward()
    assert all(
        torch.equal(2 * one, parameter.grad)
        for one, parameter in zip(once, twin.parameters(), strict=True)
    )  # type: ignore[arg-type]


@needs_layers
def test_tokens_that_are_not_dense_are_read_as_they_are() -> None:
    """As they come from a convolution, every other image of them, and with a gradient that is one number for all."""
    block = block_of(lively(CONFIG))
    tokens = torch.randn(4, 32, 9, generator=torch.Generator().manual_seed(0)).transpose(1, 2)[::2]
    found = []
    assert not tokens.is_contiguous()
    for own in (tokens.detach().requires_grad_(), tokens.contiguous().requires_grad_()):
        with torch.autocast("cpu", torch.bfloat16):
            after = block(own)
        found.append((after, *torch.autograd.grad(after.sum(), [own, *block.parameters()])))
    assert all(map(torch.equal, *found))


@needs_kernels
def test_attention_that_does_not_fit_is_left_to_torch() -> None:
    qkv = torch.zeros(2, 5, 96, requires_grad=True)
    assert why_no_attention_kernel(qkv, 2) is None
    assert why_no_attention_kernel(qkv.transpose(0, 1), 2)
    assert why_no_attention_kernel(qkv[0], 2)
    assert why_no_attention_kernel(torch.zeros(2, 5, 100, requires_grad=True), 2)
    assert why_no_attention_kernel(qkv, 4)
    assert why_no_attention_kernel(qkv.double(), 2)


# ---- modules that are not as built


SHAPES: dict[str, Change] = {
    "a norm of another width": lambda block: setattr(block, "mlp_norm", nn.LayerNorm(16)),
    "a norm without weights": lambda block: setattr(
        block, "mlp_norm", nn.LayerNorm(32, elementwise_affine=False)
    ),
    "no bias": lambda block: block.mlp.__setitem__(0, nn.Linear(32, 64, bias=False)),
    "on another device": lambda block: block.mlp.__setitem__(3, nn.Linear(64, 32, device="meta")),
    "in doubles": lambda block: block.mlp[0].double(),
    "a width of no whole registers": lambda block: (
        block.mlp.__setitem__(0, nn.Linear(32, 40)),
        block.mlp.__setitem__(3, nn.Linear(40, 32)),
    ),
    "one head too many": lambda block: setattr(block.attention, "num_heads", 4),
}


@needs_layers
def test_a_block_takes_what_fits_it() -> None:
    block, x = block_of(lively(CONFIG)), torch.zeros(2, 5, 32)
    assert why_not(block, x) == "not under bf16 autocast"
    with torch.autocast("cpu", torch.bfloat16):
        assert why_not(block, x) is None
        for wrong in (x[..., :16], x[0], x[:0], x.double(), x.bfloat16()):
            assert why_not(block, wrong), wrong.shape


@needs_layers
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_of_other_shapes_is_left_to_torch(shape: str) -> None:
    block = block_of(lively(CONFIG))
    SHAPES[shape](block)
    with torch.autocast("cpu", torch.bfloat16):
        assert why_not(block, torch.zeros(2, 5, 32)) is not None


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES: dict[str, Change] = {
    "hook": lambda block: block.mlp[0].register_forward_hook(
        lambda module, given, found: 2 * found
    ),
    "backward hook": lambda block: block.attention.register_full_backward_hook(
        lambda module, given, found: None
    ),
    "other class": lambda block: block.mlp.__setitem__(0, Doubled(32, 64)),
    "other activation": lambda block: block.mlp.__setitem__(1, nn.GELU(approximate="tanh")),
    "other forward": lambda block: setattr(
        block.attention.qkv, "forward", lambda x: F.linear(x, block.attention.qkv.weight)
    ),
    "dropout": lambda block: (setattr(block.mlp[2], "p", 0.5), block.mlp[2].train()),
    "attention dropout": lambda block: (
        setattr(block.attention, "attention_drop", 0.5),
        block.attention.train(),
    ),
}


@needs_layers
@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_is_not_as_built_is_computed_as_it_is(change: str, calls: list[str]) -> None:
    """One block of several is changed: torch computes that one, and nothing of the change is lost."""
    model = lively(CONFIG).requires_grad_()
    mixed(model)
    before = len(calls)
    CHANGES[change](block_of(model))
    found = mixed(model)
    assert len(calls) == 2 * before - 2
    with without_kernels():
        expected = mixed(model)
    if "dropout" not in change:
        assert error(found, expected) < 0.05


@needs_layers
def test_a_hook_on_every_module_is_called() -> None:
    model, seen = lively(CONFIG), set()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, found: seen.add(module)
    )
    try:
        mixed(model)
    finally:
        handle.remove()
    assert block_of(model).mlp[0] in seen


# ---- torch's settings and other ways to call


@needs_layers
def test_a_compiled_model_has_no_kernels_inside(calls: list[str]) -> None:
    model = lively(CONFIG)
    expected = mixed(model)
    seen = len(calls)
    found = mixed(torch.compile(model, backend="eager", fullgraph=True))  # type: ignore[arg-type]
    found.float().sum().backward()
    assert len(calls) == seen > 0
    assert error(found, expected) < 0.05


@needs_layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions_are_torchs(dtype: torch.dtype, calls: list[str]) -> None:
    """A whole model in half precision, and fp16 by autocast."""
    mixed(lively(CONFIG), dtype=torch.float16).float().sum().backward()
    model = lively(CONFIG).to(dtype)
    logits = model(IMAGES.to(dtype))
    logits.float().sum().backward()
    assert logits.dtype == dtype
    assert not calls
    assert error(logits, lively(CONFIG)(IMAGES)) < 0.1


@pytest.fixture
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@needs_kernels
@pytest.mark.usefixtures("doubles", "forgotten")
def test_torchs_default_dtype_changes_nothing() -> None:
    """With numbers of eight bytes by default the kernels are found and given those of four."""
    assert native() is not None
    images = torch.randn(1, 1, 37, 41, dtype=torch.float32)  # of sizes that no other test resizes
    exact = F.interpolate(images, size=(23, 29), mode="bicubic", align_corners=False)
    torch.testing.assert_close(bicubic(images, (23, 29)), exact)
    model = lively(CONFIG).float().train()
    expected = model.double()(IMAGES.double())
    found = model.float()(IMAGES)
    assert error(found, expected) < 1e-4
    mixed(model).float().sum().backward()


@needs_layers
def test_kernels_that_go_between_the_passes_end_what_they_began() -> None:
    model = lively(CONFIG)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(mixed(model).float().sum(), parameters)
    loss = mixed(model).float().sum()
    with without_kernels():
        assert all(map(torch.equal, expected, torch.autograd.grad(loss, parameters)))


@needs_layers
def test_several_threads_at_once_find_the_same_bits() -> None:
    model = lively(CONFIG)
    parameters = list(model.parameters())

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(mixed(model).float().square().sum(), parameters)

    expected, found = gradients(), []
    threads = [
        threading.Thread(target=lambda: found.extend(gradients() for _ in range(3)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(
        torch.equal(one, other) for own in found for one, other in zip(own, expected, strict=True)
    )


# ---- the library


def test_the_environment_switches_them_off(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    had = native() is not None
    for value, there in (("off", False), ("OFF", False), ("on", had), ("", had), ("of", had)):
        monkeypatch.setenv("CROSSVIT_KERNELS", value)
        module.look_again()
        assert (native() is not None) == there
        assert there == (why_none() == "")
        assert value.lower() != "off" or why_none() == "CROSSVIT_KERNELS=off"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "CROSSVIT_KERNELS=of means nothing: use off, or on"
    ]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler in a folder with a space, whose work is quickly done, and a cache of its own. Where it has worked is a file."""
    path = tmp_path / "my compilers" / "fast c++"
    path.parent.mkdir()
    path.write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ]; do echo "$1" >> "$0.words"; shift; done\necho "a library of $$" > "$2"\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("CROSSVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(path))
    return path


def test_a_library_that_a_crash_cut_short_is_made_again(compiler: Path) -> None:
    path = module._library()
    content = path.read_bytes()
    assert module._library() == path
    assert path.read_bytes() == content
    for torn in (b"", content[:10], content[:-1], b"\0" * len(content), content + b"\0"):
        path.write_bytes(torn)
        assert module._library() == path
        assert path.read_bytes().startswith(b"a library of ")
        assert module._is_whole(path)
    assert list(path.parent.iterdir()) == [path]


def test_a_compiler_may_have_arguments(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linked = compiler.with_name("cached")
    compiler.rename(linked)
    monkeypatch.setenv("PATH", str(linked.parent), prepend=":")
    monkeypatch.setenv("CXX", "cached --first -O1")
    module._library()
    assert linked.with_name("cached.words").read_text().split()[:2] == ["--first", "-O1"]


def test_a_machine_with_other_instructions_has_a_library_of_its_own(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = module._library()
    monkeypatch.setattr(module, "instruction_sets", lambda: "fpu avx512f")
    assert module._library() != here


def test_several_that_compile_at_once_leave_one_library(compiler: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(module._library())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert module._is_whole(found[0])
    assert list(found[0].parent.iterdir()) == [found[0]]


def test_a_cache_that_cannot_be_written_leaves_torch_to_compute(
    forgotten: None, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    assert native() is None
    assert why_none()
