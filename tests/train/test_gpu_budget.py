"""`crossvit plan`: the paper's ImageNet run on 8 and 32 GPUs, and the same without a GPU as with all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from crossvit.train.gpu_budget import IMAGENET, scaled
from crossvit.train.recipe import load_recipe

Command = Callable[..., tuple[int, str, str]]


def test_the_papers_run_at_literal_values() -> None:
    images, held_out = IMAGENET
    eight, thirty_two = (
        scaled(
            load_recipe("imagenet"),
            gpus=gpus,
            rate=1000,
            images=images,
            held_out=held_out,
            at_once=256,
        )
        for gpus in (8, 32)
    )
    assert (eight.batch_size, eight.batch_on_each, eight.accumulate) == (4096, 512, 2)
    assert (thirty_two.batch_on_each, thirty_two.accumulate) == (128, 1)
    assert (eight.lr, eight.steps_an_epoch, eight.steps, eight.warmup_steps) == (
        0.004,
        313,
        93_900,
        9_390,
    )
    assert (eight.images_per_second, eight.images_per_second_on_each) == (8000, 1000)
    assert eight.hours == pytest.approx(300 * (1_281_167 + 50_000 / 3) / 8000 / 3600)
    assert eight.hours == pytest.approx(4 * thirty_two.hours)
    other = scaled(
        load_recipe("imagenet"),
        gpus=8,
        rate=1000,
        images=images,
        held_out=held_out,
        batch_size=1024,
    )
    assert (other.lr, other.steps_an_epoch) == (pytest.approx(0.001), 1252)


def test_the_command_prints_both(command: Command, tmp_path: Path) -> None:
    status, out, _ = command("plan", "crossvit_15_dagger_240", "--rate", "1000")
    assert status == 0
    lines = {line[:32].strip(): line[32:].split() for line in out.splitlines()}
    assert lines["GPUs"] == ["8", "32"]
    assert lines["steps in all"] == ["93,900", "93,900"]
    assert lines["images/s to load, in all"] == ["8,000", "32,000"]
    bench = tmp_path / "bench.json"
    bench.write_text(
        json.dumps(
            {
                "rows": [
                    {"model": name, "images_per_second": 500}
                    for name in ("crossvit_9_240", "vit_9_224")
                ]
            }
        )
    )
    status, out, _ = command("plan", "crossvit_9_240", "--rate", bench, "--gpus", "4", "--json")
    assert status == 0
    assert json.loads(out)["plans"][0]["images_per_second"] == 2000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["crossvit_9_240", "--rate", "nowhere.json"],
            "no such file, and not a number of images a second",
        ),
        (["crossvit_9_240", "--rate", "0"], "should be a positive number"),
        (["crossvit_9_241", "--rate", "1000"], "did you mean crossvit_9_240"),
        (["crossvit_9_240", "--rate", "1000", "--gpus", "0"], "should be 1 or more"),
        (["crossvit_9_240", "--rate", "1000", "--gpus", "9000"], "a batch of 4096 for 9000 GPUs"),
    ],
)
def test_a_wrong_call_is_one_line(words: list[str], message: str, command: Command) -> None:
    status, _, err = command("plan", *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_file_without_one_rate_is_refused(command: Command, tmp_path: Path) -> None:
    bench = tmp_path / "bench.json"
    for content, says in (
        ("{}", "has none"),
        ("[{", "not a JSON file"),
        ('[{"images_per_second": 1}, {"images_per_second": 2}]', "has 2"),
    ):
        bench.write_text(content)
        status, _, err = command("plan", "crossvit_9_240", "--rate", bench)
        assert status == 2
        assert says in err
