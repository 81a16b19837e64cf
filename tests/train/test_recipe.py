"""Recipes, the schedule at its analytic values, and the optimiser's parameter groups."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import crossvit
from crossvit.errors import ConfigError, UnknownNameError
from crossvit.results import TrainingResult
from crossvit.text import duration
from crossvit.train.durations import STEP_UNITS, parse_duration
from crossvit.train.loop import fit
from crossvit.train.optim import freeze, learning_rate, make_optimiser, parameter_groups, place_of
from crossvit.train.recipe import (
    OptimiserRecipe,
    Recipe,
    fields,
    load_recipe,
    recipe_text,
    shipped_recipes,
)
from crossvit.train.reproducibility import step_seed


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_come_back_equal(name: str) -> None:
    loaded = load_recipe(name)
    assert Recipe.from_dict(json.loads(json.dumps(loaded.to_dict()))) == loaded


def test_bad_recipes_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for text, error, says in (
        (
            "epoch = 3",
            UnknownNameError,
            r"unknown recipe key 'epoch': did you mean epochs at the top, before the tables\?$",
        ),
        ("[optimiser]\nlearning = 1", UnknownNameError, "unknown recipe key 'learning'"),
        ("epochs = 'ten'", ConfigError, "recipe key epochs = 'ten': should be a whole number"),
        ("epochs = 2.5", ConfigError, "recipe key epochs = 2.5: should be a whole number"),
        (
            "optimiser = 3",
            ConfigError,
            r"recipe key optimiser = 3: should be a table \[optimiser\]",
        ),
        (
            "image_size = 'big'",
            ConfigError,
            "recipe key image_size = 'big': should be a whole number",
        ),
        ("model = 3", ConfigError, "recipe key model = 3: should be a text"),
        (
            "seed = 5000000000",
            ConfigError,
            "seed = 5000000000: should be a whole number of 0 or more, below 2",
        ),
        (
            "[augmentation]\nrotate = -5",
            ConfigError,
            "rotate = -5.0: should be degrees from 0 to 180",
        ),
        ("[augmentation]\nshift = 2.0", ConfigError, "shift = 2.0: should be a number from 0"),
        (
            "[optimiser]\nweight_decay = -1",
            ConfigError,
            "weight_decay = -1.0: should be a number of 0 or more",
        ),
        ("epochs = -1", ConfigError, "epochs = -1: should be a whole number, 0 to have it chosen"),
        ("epochs = ", ConfigError, "is not TOML"),
        (
            "[optimiser]\nwarmup = 30.0",
            ConfigError,
            r"warmup = '30\.0': should be a number with a unit \(steps, epochs, %\)",
        ),
        (
            "[optimiser]\nwarmup = 10",
            ConfigError,
            r"warmup = '10': should be a number with a unit \(steps, epochs, %\)",
        ),
        (
            "[optimiser]\nwarmup = '500 %'",
            ConfigError,
            "warmup = '500 %': should be at most 100 % of the run",
        ),
        ("[checkpoints]\nevery = 10", ConfigError, "every = '10': should be a number with a unit"),
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
    assert again.to_dict() == {**tiny_run.record.recipe, "out": str(tmp_path / "again")}


def test_changes_are_laid_over_a_recipe() -> None:
    changed = load_recipe("small", epochs=3, lr=0.5, model=None)
    assert (changed.epochs, changed.optimiser.lr, changed.model) == (3, 0.5, None)
    assert changed.optimiser.weight_decay == load_recipe("small").optimiser.weight_decay


def test_the_schedule_at_its_analytic_values() -> None:
    recipe = OptimiserRecipe(lr=1.0, warmup="10 %", final_lr=0.2)
    rates = [learning_rate(step, steps=101, per_epoch=5, recipe=recipe) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(
        0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 2))
    )  # half way down
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
        parameter_groups(model, model.config, OptimiserRecipe()),
        key=lambda group: -group["weight_decay"],
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {names[id(parameter)] for parameter in group["params"]} for group in (decayed, undecayed)
    ]
    assert groups[0] | groups[1] == set(names.values())
    assert not groups[0] & groups[1]
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.05, 0.0)
    assert {
        "tokens.0.class_token",
        "tokens.1.positions",
        "norms.0.weight",
        "heads.1.bias",
    } <= groups[1]
    assert all(name.endswith(".weight") for name in groups[0])


def test_step_seeds_differ() -> None:
    assert len({step_seed(seed, step) for seed in range(3) for step in range(100)}) == 300
    assert [duration(seconds) for seconds in (0.2, 45, 200, 8000)] == [
        "1 s",
        "45 s",
        "3 min",
        "2 h 13 min",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "crossvit_9_dagger_240",
        "crossvit_small_240_all_attention",
        "crossvit_small_240_pairwise",
        "vit_9_224",
    ],
)
@pytest.mark.parametrize(
    "changes", [{}, {"layer_decay": 0.7, "fusion_lr": 0.5}, {"decay_like_authors": True}]
)
def test_every_trained_parameter_is_in_exactly_one_group(
    name: str, changes: dict[str, Any]
) -> None:
    with torch.device("meta"):
        model = crossvit.create_model(name)
    groups = parameter_groups(model, model.config, OptimiserRecipe(**changes))
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_layer_decay_counts_blocks_along_each_branch() -> None:
    with torch.device("meta"):
        model = crossvit.create_model("crossvit_9_240")  # N = 1 on S, M = 3 on L, K = 3
    above = {name: place_of(name, model.config).above for name, _ in model.named_parameters()}
    assert above["heads.0.weight"] == above["norms.1.bias"] == 0
    assert (
        above["encoders.2.blocks.0.0.mlp.0.weight"]
        == above["encoders.2.blocks.1.2.mlp.0.weight"]
        == 1
    )
    assert above["encoders.0.blocks.0.0.mlp.0.weight"] == 3
    assert above["encoders.0.blocks.1.0.mlp.0.weight"] == 9
    assert above["tokens.0.positions"] == 4
    assert above["tokens.1.patches.weight"] == 10
    assert (
        above["encoders.0.fusion.reads.0.project.2.weight"] == 3
    )  # with the last block of its encoder, on the branch it writes
    assert above["encoders.0.fusion.reads.1.project.2.weight"] == 7
    groups = parameter_groups(
        model, model.config, OptimiserRecipe(layer_decay=0.5, fusion_lr=0.1, branch_lr=(2.0, 1.0))
    )
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    found = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    assert found["heads.0.weight"] == 2.0
    assert found["heads.1.weight"] == 1.0
    assert found["encoders.0.blocks.1.0.mlp.0.weight"] == 0.5**9
    assert found["encoders.0.fusion.reads.1.project.2.weight"] == pytest.approx(0.1 * 0.5**7)


def test_the_authors_decay_class_tokens_and_positions() -> None:
    with torch.device("meta"):
        model = crossvit.create_model("crossvit_9_240")
    for like_authors in (False, True):
        groups = parameter_groups(
            model, model.config, OptimiserRecipe(decay_like_authors=like_authors)
        )
        decayed = {
            id(parameter)
            for group in groups
            if group["weight_decay"]
            for parameter in group["params"]
        }
        names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
        assert ({"tokens.0.class_token", "tokens.1.positions"} <= names) == like_authors
        assert not any(name.endswith("bias") or "norm" in name for name in names)


@pytest.mark.parametrize(
    ("parts", "trained"),
    [
        (("backbone",), {"heads"}),
        (("tokens", "fusion"), {"encoders.blocks", "norms", "heads"}),
        (("branch0", "heads"), {"tokens.1", "encoders.blocks.1", "norms.1", "encoders.fusion"}),
    ],
)
def test_frozen_parts_are_not_trained(parts: tuple[str, ...], trained: set[str]) -> None:
    with torch.device("meta"):
        model = crossvit.create_model("crossvit_9_240")
    freeze(model, model.config, parts)
    left = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def described(name: str) -> set[str]:
        place = place_of(name, model.config)
        kind = {"blocks": "encoders.blocks", "fusion": "encoders.fusion"}.get(
            place.part, place.part
        )
        return {kind, f"{kind}.{place.branch}"}

    assert left == {name for name, _ in model.named_parameters() if described(name) & trained}
    held = [
        parameter
        for group in parameter_groups(model, model.config, OptimiserRecipe())
        for parameter in group["params"]
    ]
    assert len(held) == len(left)


def test_what_cannot_be_trained_so_is_said() -> None:
    with torch.device("meta"):
        model = crossvit.create_model("crossvit_9_240")
    for parts, says in (
        (("backbone", "heads"), "nothing would be left to train"),
        (("branch2",), "the model has 2 branches, counted from branch0"),
    ):
        with pytest.raises(ConfigError, match=says):
            freeze(model, model.config, parts)
    model.requires_grad_(True)
    with pytest.raises(
        ConfigError, match=r"branch_lr = \(1\.0,\): should have one factor for each of 2 branches"
    ):
        parameter_groups(model, model.config, OptimiserRecipe(branch_lr=(1.0,)))
    with pytest.raises(ConfigError, match="timm has none of that name; did you mean adamw"):
        make_optimiser(model, model.config, OptimiserRecipe(optimiser="adamww"))
    with pytest.raises(
        ConfigError,
        match=r"branch_lr = \(0\.0, 0\.0\), fusion_lr = 0: nothing would be left to train",
    ):
        parameter_groups(model, model.config, OptimiserRecipe(branch_lr=(0.0, 0.0), fusion_lr=0.0))
    assert parameter_groups(
        model, model.config, OptimiserRecipe(branch_lr=(0.0, 0.0))
    )  # the fusion is trained


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "adahessian",
            "optimiser = 'adahessian': needs second derivatives, which are not computed: take adamw",
        ),
        ("bnbadam", r"optimiser = 'bnbadam': cannot be used here \(.+\): take adamw"),
        ("FusedSGD", r"optimiser = 'FusedSGD': cannot be used here \(.+\): take adamw"),
    ],
)
def test_an_optimiser_that_cannot_work_is_a_wrong_call(
    name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # what these two need
    model = crossvit.create_model("crossvit_pico_32", num_classes=3)
    with pytest.raises(ConfigError, match=says):
        make_optimiser(model, model.config, OptimiserRecipe(optimiser=name))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion"])
def test_optimisers_by_name_step_every_parameter(name: str) -> None:
    model = crossvit.create_model("crossvit_pico_32", num_classes=3)
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimiser = make_optimiser(
        model, model.config, OptimiserRecipe(optimiser=name, lr=0.1, layer_decay=0.9)
    )
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all("lr_scale" in group for group in optimiser.param_groups)
    optimiser.step()
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert {key for key in before if "key.bias" not in key} <= moved


@pytest.mark.parametrize(
    ("text", "canonical", "steps"),
    [
        ("30 epochs", "30 epochs", 150),
        ("1epoch", "1 epochs", 5),
        ("7 steps", "7 steps", 7),
        ("2.5 %", "2.5 %", 25),
        ("0", "0 steps", 0),
        ("1000000 steps", "1000000 steps", 1_000_000),
        ("1234567.25 steps", "1234567.25 steps", 1_234_567),
        ("0.00001 %", "0.00001 %", 0),
        ("100 %", "100 %", 1000),
    ],
)
def test_durations_have_units(text: str, canonical: str, steps: int) -> None:
    found = parse_duration(text, name="warmup", units=STEP_UNITS)
    assert (str(found), found.steps(per_epoch=5, total=1000)) == (canonical, steps)
    assert parse_duration(str(found), name="warmup", units=STEP_UNITS) == found


def test_durations_in_time_and_wrong_ones() -> None:
    assert [
        parse_duration(text, name="every").seconds for text in ("90 s", "15min", "1.5 h", "3 steps")
    ] == [90, 900, 5400, None]
    for text in ("10", "ten epochs", "5 parsecs", "-1 epochs", ""):
        with pytest.raises(
            ConfigError,
            match=r"every = .*: should be a number with a unit \(steps, epochs, %, s, min, h\)",
        ):
            parse_duration(text, name="every")


OTHER_TEXTS = {
    "model": "crossvit_pico_32", "weights": "w.safetensors", "class_weights": "balanced", "sampling": "balanced",
    "precision": "fp16", "device": "cpu", "optimiser": "lamb", "warmup": "3 epochs", "randaugment": "rand-m9-mstd0.5-inc1",
    "teacher": "timm:x", "distil": "hard", "every": "15 min", "patience": "3 epochs", "select": "best",
    "block": "pre-norm", "fusion": "pairwise", "tokeniser": "linear",
}  # fmt: skip
OTHER_LISTS = {"freeze": ("heads", "fusion"), "branch_lr": (0.5, 2.0)}


def other_value(name: str, value: Any) -> Any:
    """Another value for the field than it has in the recipe `small`, as it is in the recipe."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int) or name == "image_size":
        return (value or 0) + 3
    if isinstance(value, float):
        return value / 2 or 0.25
    return OTHER_LISTS[name] if isinstance(value, tuple) else OTHER_TEXTS[name]


@pytest.mark.parametrize(
    ("table", "name"), [(table, name) for table, name, _ in fields() if name not in ("data", "out")]
)
def test_every_field_is_an_option_and_changes_it_alone(
    table: str,
    name: str,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """`--name value` on the command line arrives in the recipe that is trained, and nothing else does."""
    trained: list[Recipe] = []

    def note(recipe: Recipe, **_: object) -> TrainingResult:
        trained.append(recipe)
        raise ConfigError("seen")

    monkeypatch.setattr("crossvit.train.loop.fit", note)
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("w.safetensors").touch()  # what other_value gives for --weights
    before = load_recipe("small", data="photos", out="run").to_dict()
    owner = load_recipe("small") if not table else getattr(load_recipe("small"), table)
    value = other_value(name, getattr(owner, name))
    words = () if value is True else value if isinstance(value, tuple) else (value,)
    assert command("train", "photos", "--out", "run", f"--{name.replace('_', '-')}", *words) == (
        2,
        "",
        "crossvit: seen\n",
    )
    (before[table] if table else before)[name] = list(value) if isinstance(value, tuple) else value
    assert [recipe.to_dict() for recipe in trained] == [before]


def test_no_two_fields_have_one_name() -> None:
    names = [name for _, name, _ in fields()]
    assert len(names) == len(set(names))


def test_a_key_in_the_wrong_table_is_pointed_to_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"recipe key lr: belongs under \[optimiser\]"):
        Recipe.from_dict({"lr": 0.1})
    with pytest.raises(ConfigError, match=r"recipe key lr: belongs under \[optimiser\]"):
        Recipe.from_dict({"mixing": {"lr": 0.1}})
    with pytest.raises(
        ConfigError, match="recipe key epochs: belongs at the top, before the tables"
    ):
        Recipe.from_dict({"mixing": {"epochs": 3}})
    with pytest.raises(UnknownNameError, match="unknown recipe key 'mixupp': did you mean mixup"):
        Recipe.from_dict({"mixing": {"mixupp": 0.1}})


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lrr", "lr under [optimiser]"),
        ("learning_rate", "lr under [optimiser]"),
        ("lerning_rate", "lr under [optimiser]"),
        ("ema_decay", "ema at the top, before the tables"),
        (
            "batch",
            "batch_size at the top, before the tables or overfit_one_batch at the top, before the tables",
        ),
        ("warm_up", "warmup under [optimiser] or warmup_lr under [optimiser]"),
        ("optimizer", "optimiser under [optimiser]"),
        ("batchsize", "batch_size at the top, before the tables"),
    ],
)
def test_the_nearest_names_are_those_of_every_table_and_near(key: str, meant: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_recipe("small", **{key: 1})
    assert str(caught.value) == f"unknown recipe key {key!r}: did you mean {meant}?"


def test_a_key_that_is_like_none_is_sent_to_the_list() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown recipe key 'xyzzy': see `crossvit train --help`$"
    ):
        load_recipe("small", xyzzy=1)


def test_a_run_of_the_first_version_is_still_a_recipe() -> None:
    """Its warm-up was a share of the run."""
    for share, warmup in ((0.1, "10 %"), (0.07, "7 %"), (0.0, "0 %"), (1.0, "100 %")):
        assert Recipe.from_dict({"optimiser": {"warmup": share}}).optimiser.warmup == warmup


def test_patience_takes_the_best_and_without_it_what_is_selected() -> None:
    """`--patience 0` over a recipe that has some leaves nothing of it behind."""
    assert load_recipe("finetune").checkpoints.takes_best
    assert not load_recipe("finetune", patience="0").checkpoints.takes_best
    assert load_recipe("finetune", patience="0", select="best").checkpoints.takes_best
    assert not load_recipe("small").checkpoints.takes_best


def test_any_patience_is_an_epoch_at_least() -> None:
    waits = {
        text: load_recipe("small", patience=text).checkpoints.waits(epochs=40)
        for text in ("0", "1 %", "20 %", "3 epochs")
    }
    assert waits == {"0": 0, "1 %": 1, "20 %": 8, "3 epochs": 3}


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_trains_one_step(name: str, scans: Path, tmp_path: Path) -> None:
    """With what it says of the optimiser, augmentation and mixing; a small model and a batch that fits."""
    changes = {
        "model": "crossvit_pico_32",
        "epochs": 1,
        "batch_size": 24,
        "workers": 0,
        "device": "cpu",
        "precision": "fp32",
    }
    plan = load_recipe(name, data=str(scans), out=str(tmp_path / "run"), **changes)
    result = fit(plan)
    assert math.isfinite(result.epochs[0].loss)
    assert result.epochs[0].skipped == 0


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_says_its_command_hardware_time_and_result(name: str) -> None:
    header = [line for line in recipe_text(name).splitlines() if line.startswith("#")]
    for word in ("command", "hardware", "time", "result"):
        assert any(line.startswith(f"#   {word}") for line in header), word
    assert f"--recipe {name}" in "".join(header) or name == "small"


def test_the_papers_recipes_are_the_papers() -> None:
    """docs/paper.md, Training recipes."""
    imagenet, transfer = load_recipe("imagenet"), load_recipe("transfer")
    own, optimiser = imagenet, imagenet.optimiser
    assert (own.epochs, own.batch_size, optimiser.optimiser, optimiser.weight_decay) == (
        300,
        4096,
        "adamw",
        0.05,
    )
    assert (optimiser.lr, optimiser.warmup, optimiser.warmup_lr, optimiser.final_lr) == (
        0.004,
        "30 epochs",
        1e-6,
        1e-5,
    )
    assert (own.augmentation.randaugment, own.augmentation.erasing) == (
        "rand-m9-mstd0.5-inc1",
        0.25,
    )
    assert (own.mixing.mixup, own.mixing.cutmix, own.mixing.cutmix_share) == (0.8, 1.0, 0.5)
    assert (own.label_smoothing, own.drop_path, own.ema, optimiser.clip) == (0.1, 0.1, 0.0, 0.0)
    own, optimiser = transfer, transfer.optimiser
    assert (own.epochs, own.batch_size, optimiser.optimiser, optimiser.weight_decay) == (
        1000,
        768,
        "sgd",
        1e-4,
    )
    assert (optimiser.lr, optimiser.warmup, optimiser.momentum) == (0.01, "5 epochs", 0.9)
    assert (own.augmentation.erasing, own.drop_path, own.mixing.mixup) == (0.0, 0.0, 0.8)
    assert load_recipe("imagenet-384").epochs == 30
    for name in (
        "imagenet",
        "imagenet-384",
        "transfer",
    ):  # docs/paper.md, Faults of the released code: weight decay
        assert load_recipe(name).optimiser.decay_like_authors
