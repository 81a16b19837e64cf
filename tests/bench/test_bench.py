"""The bench: what it measures is of the contestants it names, and its table, file and picture hold the same figures."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from crossvit.bench import contestants, measure, training
from crossvit.bench.contestants import CONTESTANTS, REFERENCE, make_pair
from crossvit.bench.plot import plot
from crossvit.bench.training import stepper
from crossvit.errors import UsageError
from crossvit.model.crossvit import CrossViT
from crossvit.results import Bench, to_json
from crossvit.train.setup import suitable_parts


@pytest.fixture(scope="module")
def found() -> Bench:
    """Both models in torch, on the smallest released model, as short as it goes, at 120 pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "FEWEST_ROUNDS", 2)
        patch.setattr(measure, "GROWTH_BATCHES", (1, 2))
        patch.setattr(measure, "GROWTH_BATCH", 1)
        patch.setattr(measure, "GROWTH_ROUNDS", 1)
        patch.setattr("crossvit.bench.training.ROUNDS", 1)
        patch.setattr(measure, "GROWTH_SIZES", (120, 240))
        patch.setattr(measure, "LIMIT_SHAPE", (256, 256, 256))
        return measure.bench(
            ["crossvit_tiny_224"], engines=["ours-torch"], batches=[2], precisions=["fp32", "bf16"], image_size=120,
            device="cpu", train=True, seconds=0.01,
        )  # fmt: skip


def test_ours_agrees_with_timm_and_ratios_are_of_the_times(found: Bench) -> None:
    rows = {(row.contestant, row.precision): row for row in found.rows}
    assert [key for key in rows if "training" not in key[0]] == [
        (REFERENCE, "fp32"), (REFERENCE, "bf16"), ("ours-torch", "fp32"), ("ours-torch", "bf16")
    ]  # fmt: skip
    assert rows[REFERENCE, "fp32"].ratio == 1.0
    assert rows[REFERENCE, "fp32"].difference == 0.0
    ours = rows["ours-torch", "fp32"]
    assert ours.difference is not None
    assert ours.difference < 1e-4
    assert ours.same_top1 == 1.0
    assert ours.images_per_second == pytest.approx(2000 / ours.milliseconds)
    assert ours.fastest <= ours.milliseconds <= ours.slowest
    assert ours.ratio_low <= ours.ratio <= ours.ratio_high
    assert rows["ours-torch", "bf16"].difference < 0.1
    assert rows["timm-training", "fp32"].ratio == 1.0
    assert rows["ours-training", "bf16"].ratio > 0
    assert {row.model for row in found.rows} == {
        "crossvit_tiny_240"
    }  # timm's name of what was asked for by the authors'


def test_a_step_in_parts_is_the_step_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    whole = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    parted = copy.deepcopy(whole)
    images, labels = torch.randn(6, 3, 2, 2), torch.randint(0, 5, (6,))
    stepper(whole, "fp32", images, labels)()
    stepper(parted, "fp32", images, labels, parts=2)()
    for one, other in zip(whole.parameters(), parted.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_ours_is_timed_in_the_parts_that_training_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken: dict[str, int] = {}

    def counted(
        model: torch.nn.Module,
        precision: str,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        parts: int = 1,
    ) -> object:
        taken["ours" if isinstance(model, CrossViT) else "timm"] = parts
        return lambda: None

    monkeypatch.setattr(training, "stepper", counted)
    pair = make_pair(
        "crossvit_tiny_240", image_size=None, device=torch.device("cpu"), folder=tmp_path
    )
    training.training_rows("crossvit_tiny_240", pair, ["bf16"], 32)
    assert taken == {"timm": 1, "ours": suitable_parts(pair.ours.config, images=32, device="cpu")}
    assert taken["ours"] == 2


def test_compiled_models_are_more_than_torch_keeps_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two models of two batches in two precisions for two backends are sixteen, and torch would compile eight of them."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> object:
        compiled.append(len(example))
        return graph.forward

    compile_with_inductor = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda model, **options: compile_with_inductor(model, backend=backend, **options),
    )
    call = contestants._compiled(torch.nn.Linear(4, 4), "fp32", torch.device("cpu"), zentorch=False)
    for batch in range(2, 12):
        call(torch.zeros(batch, 4))
    torch.compiler.reset()
    assert len(compiled) == 10


def test_torch_has_the_threads_that_the_engines_have(found: Bench) -> None:
    assert found.threads == found.cores


def test_how_cost_grows_counts_tokens(found: Bench) -> None:
    sizes = [
        point
        for point in found.growth
        if point.by == "image size" and point.contestant == "ours-torch"
    ]
    # 120 px: S has 10x10 patches, L sees 112 px, 7x7; 240 px: 20x20 and 14x14; a class token each.
    assert [point.tokens for point in sizes] == [100 + 1 + 49 + 1, 400 + 1 + 196 + 1]


def test_the_picture_and_the_record_are_written(found: Bench, tmp_path: Path) -> None:
    plot(found, tmp_path / "bench.svg")
    drawn = (
        tmp_path / "bench.svg"
    ).read_text()  # matplotlib draws letters, and writes beside them what they say
    for text in (
        "crossvit_tiny_240, batch 2",
        "ours-torch bf16",
        "a training step, batch 2",
        "240 \n(598)".replace(" ", ""),
    ):
        assert all(f"<!-- {line} -->" in drawn for line in text.splitlines())
    record = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert record["rows"][0]["contestant"] == REFERENCE
    assert set(record["limits"]) == {"fp32", "bf16"}


def test_contestants_are_chosen_by_name_or_a_word_of_it() -> None:
    assert measure.choose([]) == list(CONTESTANTS)
    assert measure.choose(["ours-torch"]) == [REFERENCE, "ours-torch"]
    assert measure.choose(["openvino"]) == [
        REFERENCE,
        "timm-openvino",
        "timm-openvino-parts",
        "ours-openvino",
    ]
    with pytest.raises(UsageError, match="no contestant 'tvm'"):
        measure.choose(["tvm"])
    with pytest.raises(UsageError, match="image size 100: timm's model sees it otherwise"):
        measure.bench(["crossvit_tiny_240"], engines=["ours-torch"], image_size=100, device="cpu")
    with pytest.raises(UsageError, match="crossvit_nano_64 is not among timm's models"):
        measure.bench(["crossvit_nano_64"], device="cpu")


def test_what_does_not_come_up_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossvit.bench.contestants.version_of", lambda package: None)
    said: list[str] = []
    found = measure.bench(
        ["crossvit_tiny_240"], engines=["timm-openvino"], batches=[1], precisions=["fp32"], image_size=120,
        device="cpu", growth=False, seconds=0.01, say=said.append,
    )  # fmt: skip
    assert found.skipped == {"timm-openvino fp32": "openvino is not installed"}
    assert "  timm-openvino fp32 left out: openvino is not installed" in said


def test_the_verb_prints_the_table_of_its_record(
    found: Bench,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(measure, "bench", lambda models, **options: found)
    status, out, _ = command("bench", "--out", tmp_path)
    assert status == 0
    assert "crossvit_tiny_240, batch 2" in out
    assert "ours-torch" in out
    assert "crossvit_tiny_240, ms an image in fp32 by image size" in out
    row = next(line.split() for line in out.splitlines() if line.split()[1:3] == ["240x240", "598"])
    one, two = (
        point.milliseconds
        for point in found.growth
        if point.by == "image size" and point.contestant == REFERENCE
    )
    assert row[:5] == ["1", "240x240", "598", f"{two:.1f}", f"{two / one:.2f}x"]
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][0]["ratio"] == 1.0
    assert command("bench", "--json")[1].startswith("{")
    assert command("bench", "--precision", "int3")[0] == 2
    assert command("bench", "--batch", "0")[0] == 2
    assert command("bench", "--batch")[0] == 2
    assert command("bench", "--models")[0] == 2
    (tmp_path / "file").write_text("")
    assert command("bench", "--out", tmp_path / "file") == (
        2,
        "",
        f"crossvit: --out {tmp_path}/file cannot be made: File exists\n",
    )


def test_the_limit_is_what_this_machine_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LIMIT_SHAPE", (512, 512, 512))
    assert 1 < measure.matrix_limit("fp32", torch.device("cpu")) < 1e6
