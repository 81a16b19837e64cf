"""Recipes, the schedule at its analytic values, and the optimiser's parameter groups."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest

import crossvit
from crossvit.errors import ConfigError, UnknownNameError
from crossvit.results import TrainingResult
from crossvit.train.durations import spoken
from crossvit.train.optim import learning_rate, parameter_groups
from crossvit.train.recipe import OptimiserRecipe, Recipe, load_recipe, shipped_recipes
from crossvit.train.training import step_seed


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_come_back_equal(name: str) -> None:
    loaded = load_recipe(name)
    assert Recipe.from_dict(json.loads(json.dumps(loaded.to_dict()))) == loaded


def test_bad_recipes_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for text, error, says in (
        ("epoch = 3", UnknownNameError, "unknown recipe key 'epoch': did you mean epochs"),
        ("[optimiser]\nlearning = 1", UnknownNameError, "unknown recipe key 'learning'"),
        ("epochs = 'ten'", ConfigError, "recipe key epochs = 'ten': should be a whole number"),
        ("epochs = 2.5", ConfigError, "recipe key epochs = 2.5: should be a whole number"),
        ("optimiser = 3", ConfigError, r"recipe key optimiser = 3: should be a table \[optimiser\]"),
        ("image_size = 'big'", ConfigError, "recipe key image_size = 'big': should be a whole number"),
        ("model = 3", ConfigError, "recipe key model = 3: should be a text"),
        ("seed = 5000000000", ConfigError, "seed = 5000000000: should be a whole number of 0 or more, below 2"),
        ("[augmentation]\nrotate = -5", ConfigError, "rotate = -5.0: should be degrees from 0 to 180"),
        ("[augmentation]\nshift = 2.0", ConfigError, "shift = 2.0: should be a number from 0"),
        ("[optimiser]\nweight_decay = -1", ConfigError, "weight_decay = -1.0: should be a number of 0 or more"),
        ("epochs = -1", ConfigError, "epochs = -1: should be a whole number, 0 to have it chosen"),
        ("epochs = ", ConfigError, "is not TOML"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=says):
            load_recipe(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_recipe(str(path))
    with pytest.raises(UnknownNameError, match="unknown recipe 'smal': did you mean small"):
        load_recipe("smal")


def test_a_run_is_a_recipe(tiny_run: TrainingResult, tmp_path: Path) -> None:
    again = load_recipe(tiny_run.run, out=str(tmp_path / "again"))
    assert again.to_dict() == {**tiny_run.record["recipe"], "out": str(tmp_path / "again")}


def test_changes_are_laid_over_a_recipe() -> None:
    changed = load_recipe("small", epochs=3, lr=0.5, model=None)
    assert (changed.epochs, changed.optimiser.lr, changed.model) == (3, 0.5, None)
    assert changed.optimiser.weight_decay == load_recipe("small").optimiser.weight_decay


def test_the_schedule_at_its_analytic_values() -> None:
    recipe = OptimiserRecipe(lr=1.0, warmup="10 %", final_lr=0.2)
    rates = [learning_rate(step, steps=101, per_epoch=5, recipe=recipe) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 2)))  # half way down
    assert rates[100] == pytest.approx(0.2)
    assert learning_rate(0, steps=1, per_epoch=1, recipe=recipe) == 1.0


def test_the_papers_schedule_at_its_analytic_values() -> None:
    """30 of 300 epochs from 1e-6 to 0.004, then a cosine to 1e-5; 313 steps an epoch at batch 4096."""
    recipe = load_recipe("imagenet").optimiser
    rate = functools.partial(learning_rate, steps=300 * 313, per_epoch=313, recipe=recipe)
    warm = 30 * 313
    assert rate(0) == pytest.approx(1e-6 + (0.004 - 1e-6) / (warm + 1))
    assert rate(warm // 2) == pytest.approx(1e-6 + (0.004 - 1e-6) * (warm // 2 + 1) / (warm + 1))
    assert rate(warm) == pytest.approx(0.004)
    assert rate((300 * 313 - 1 + warm) // 2) == pytest.approx((0.004 + 1e-5) / 2, rel=1e-3)
    assert rate(300 * 313 - 1) == pytest.approx(1e-5)
    assert recipe.lr == pytest.approx(5e-4 * load_recipe("imagenet").batch_size / 512, rel=0.03)


def test_every_parameter_is_in_one_group_and_what_should_not_decay_does_not() -> None:
    model = crossvit.create_model("crossvit_pico_32")
    decayed, undecayed = sorted(
        parameter_groups(model, model.config, OptimiserRecipe()), key=lambda group: -group["weight_decay"]
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{names[id(parameter)] for parameter in group["params"]} for group in (decayed, undecayed)]
    assert groups[0] | groups[1] == set(names.values())
    assert not groups[0] & groups[1]
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.05, 0.0)
    assert {"tokens.0.class_token", "tokens.1.positions", "norms.0.weight", "heads.1.bias"} <= groups[1]
    assert all(name.endswith(".weight") for name in groups[0])


def test_step_seeds_differ() -> None:
    assert len({step_seed(seed, step) for seed in range(3) for step in range(100)}) == 300
    assert [spoken(seconds) for seconds in (0.2, 45, 200, 8000)] == ["1 s", "45 s", "3 min", "2 h 13 min"]
