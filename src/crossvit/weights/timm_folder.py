"""The folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` and Transformers' TimmWrapper load.

    FOLDER/model.safetensors   the weights under timm's names
    FOLDER/config.json         timm's name of the model, the arguments to build it with, its preprocessing and class names
    FOLDER/README.md           the model card

timm is not needed to write it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from crossvit.errors import UsageError, WeightsError
from crossvit.files import write_atomically
from crossvit.model.config import CrossViTConfig
from crossvit.model.cost import cost
from crossvit.model.presets import PRESETS
from crossvit.model.registry import BLOCKS
from crossvit.weights.files import WEIGHTS_NAME, header, write_weights
from crossvit.weights.identify import blank_state
from crossvit.weights.keys import renamed, to_ours

ANY_ARCHITECTURE = "crossvit_9_240"  # timm's entry whose arguments are replaced for a model that has no entry of its own
FILES = (WEIGHTS_NAME, "config.json", "README.md")
# Fields that change how a model is made or run, and not what it computes from its weights.
FREE_FIELDS = (
    "num_classes", "in_channels", "image_size", "drop", "attention_drop", "drop_path", "init", "dynamic_size", "keys_values"
)  # fmt: skip
CITATION = """@inproceedings{chen2021crossvit,
  title     = {{CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification}},
  author    = {Chen, Chun-Fu (Richard) and Fan, Quanfu and Panda, Rameswar},
  booktitle = {International Conference on Computer Vision (ICCV)},
  year      = {2021}
}"""


def timm_arguments(config: CrossViTConfig) -> tuple[str, dict[str, Any]]:
    """(timm's model name, arguments) that build a model which computes what one of `config` does, at its image size, channels
    and classes: timm takes those from the rest of config.json, and Transformers fails if they stand here too.

    Raises WeightsError with every reason why timm's CrossViT, and the authors', cannot.
    """
    reasons = _misfits(config)
    if reasons:
        raise WeightsError(
            f"this model exists only in crossvit, timm and Transformers cannot load it: "
            f"{'; '.join(reasons)}. Train --model crossvit_9_240 to share it through timm"
        )
    for preset in PRESETS.values():
        sized = dataclasses.replace(
            preset.config, **{field: getattr(config, field) for field in FREE_FIELDS}
        )
        if (
            preset.released
            and sized == config
            and _cut_off(config, [branch.image_scale for branch in config.branches])
        ):
            return preset.name, {}
    fusion_depth = (
        config.fusion_depth if config.fusion_depth > 1 else 0
    )  # timm's 0 is one block under its older names
    return ANY_ARCHITECTURE, {
        "img_scale": _scales(config),
        "patch_size": [branch.patch for branch in config.branches],
        "embed_dim": [branch.dim for branch in config.branches],
        "depth": [[*(branch.depth for branch in config.branches), fusion_depth]] * config.stages,
        "num_heads": [branch.heads for branch in config.branches],
        "mlp_ratio": [*(branch.mlp_ratio for branch in config.branches), 1],
        "multi_conv": config.branches[0].tokeniser == "dagger",
    }


def _misfits(config: CrossViTConfig) -> list[str]:
    branches = config.branches
    if len(branches) != 2:
        return [f"it has {len(branches)} branch{'es' * (len(branches) > 1)}, not two"]
    checks = {
        f"its blocks are {config.block}": config.block not in BLOCKS.built_in,
        f"its fusion is {config.fusion}": config.fusion != "cross-attention",
        "every fusion block sees the patches (as_released=False)": config.fusion_depth > 1
        and not config.as_released,
        "f and g have no LayerNorm or no GELU": not (
            config.projection_norm and config.projection_gelu
        ),
        "f and g are the identity": config.projection_identity
        and branches[0].dim == branches[1].dim,
        "it has no class tokens": not branches[0].class_token,
        f"its tokenisers are {' and '.join(branch.tokeniser for branch in branches)}": {
            branch.tokeniser for branch in branches
        }
        not in ({"linear"}, {"dagger"}),
        "a branch has no blocks": min(branch.depth for branch in branches) == 0,
        "its first branch is deeper than its second (timm runs out of drop-path rates)": branches[
            0
        ].depth
        > branches[1].depth,
        "a branch's image has another aspect than the input": _scales(config) is None,
    }
    return [reason for reason, holds in checks.items() if holds]


def _scales(config: CrossViTConfig) -> list[float] | None:
    """Factors that give each branch's image in timm, which cuts off to whole pixels; None if there are none."""
    scales = []
    for branch in config.branches:
        sizes = zip(branch.image_size(config.image_size), config.image_size, strict=True)
        scales.append(max((wanted + 0.25 * (wanted != side)) / side for wanted, side in sizes))
    return scales if _cut_off(config, scales) else None


def _cut_off(config: CrossViTConfig, scales: Sequence[float]) -> bool:
    """Whether each side times its branch's scale, cut off to whole pixels, is the side of the branch's image."""
    return all(
        tuple(int(side * scale) for side in config.image_size)
        == branch.image_size(config.image_size)
        for branch, scale in zip(config.branches, scales, strict=True)
    )


def save_timm(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: CrossViTConfig,
    *,
    model: str | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any],
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write the folder. tensors: the weights of a model of `config`, in any layout.  preprocessing: as in run.json.
    facts: lines for the model card, such as the data it was trained on and its accuracy.

    Raises WeightsError if timm's CrossViT cannot compute this model.
    """
    architecture, arguments = timm_arguments(config)
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be a folder ({error.strerror or error}): choose another name"
        ) from None
    state = to_ours(tensors, blank_state(config))
    theirs = renamed(state, "timm")
    first = "proj.0" if config.branches[0].tokeniser == "dagger" else "proj"
    crop = preprocessing["crop"]
    record: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": config.num_classes,
        "num_features": sum(branch.dim for branch in config.branches),
        "global_pool": "token",
        **({"label_names": list(classes)} if classes else {}),
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [config.in_channels, *config.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0 if crop is None else crop,
            "crop_mode": "squash" if crop is None else "center",
            "mean": list(preprocessing["mean"]),
            "std": list(preprocessing["std"]),
            "num_classes": config.num_classes,
            "pool_size": None,
            "first_conv": [f"patch_embed.{index}.{first}" for index in range(2)],
            "classifier": ["head.0", "head.1"],
        },
    }
    write_weights(
        path / WEIGHTS_NAME,
        {theirs[name]: tensor for name, tensor in state.items()},
        header(model=model, config=config, classes=classes, preprocessing=preprocessing),
    )
    write_atomically(path / "config.json", f"{json.dumps(record, indent=2)}\n".encode())
    card = model_card(
        path.resolve().name,
        config,
        model=model,
        architecture=architecture,
        classes=classes,
        facts=facts or {},
    )
    write_atomically(path / "README.md", card.encode())
    return path


def model_card(
    name: str,
    config: CrossViTConfig,
    *,
    model: str | None,
    architecture: str,
    classes: Sequence[str] | None,
    facts: Mapping[str, str],
) -> str:
    """The README.md of a model on the hub: what it is, what it was trained on, how to use it, whom to cite.

    model: the preset's name, None for a config of one's own.
    """
    total = cost(config, keys_values="materialised")["total"]  # as timm computes
    height, width = config.image_size
    labels = (
        f"{config.num_classes}: {', '.join(classes)}"
        if classes and len(classes) <= 20
        else str(config.num_classes)
    )
    details = {
        "Architecture": f"CrossViT, two branches with cross-attention (timm: `{architecture}`)",
        "Parameters": f"{total.parameters / 1e6:.2f} M",
        "Multiply-accumulates": f"{total.macs / 1e9:.3f} G an image",
        "Input": f"{height} x {width} pixels, {config.in_channels} channels",
        "Classes": labels,
        **facts,
    }
    own = (
        f"""With crossvit:

```python
import crossvit

model = crossvit.create_model(
    "{model}",
    num_classes={config.num_classes},
    in_channels={config.in_channels},
    image_size={config.image_size},
    weights="{name}",
).eval()
```

"""
        if model
        else ""
    )
    lines = "\n".join(f"- **{key}:** {value}" for key, value in details.items())
    return f"""---
tags:
- image-classification
- timm
- transformers
- crossvit
pipeline_tag: image-classification
library_name: timm
---
# {name}

{lines}

The licence is for whoever publishes this folder to add (`license:` above).

## Use

With timm:

```python
import timm

model = timm.create_model("local-dir:{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image).unsqueeze(0))
```

With Transformers:

```python
from transformers import pipeline

pipeline("image-classification", model="{name}")("photo.jpg")
```

{own}## Cite

```bibtex
{CITATION}
```
"""
