"""The names of parameters: ours, timm's and the authors', as one explicit and strict map.

timm and the authors differ in the class tokens and position embeddings only (`cls_token_0` against `cls_token.0`). `k` is
the encoder, `b` the branch that is written (0 is S), `j` the block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from crossvit.errors import WeightsError

# ours -> timm; {k}, {b}, {j} are numbers and the rest of a name (weight, bias, an index in the stem) stays as it is.
TIMM_NAMES = {
    "tokens.{b}.class_token": "cls_token_{b}",
    "tokens.{b}.positions": "pos_embed_{b}",
    "tokens.{b}.patches": "patch_embed.{b}.proj",
    "encoders.{k}.blocks.{b}.{j}.attention_norm": "blocks.{k}.blocks.{b}.{j}.norm1",
    "encoders.{k}.blocks.{b}.{j}.attention.qkv": "blocks.{k}.blocks.{b}.{j}.attn.qkv",
    "encoders.{k}.blocks.{b}.{j}.attention.out": "blocks.{k}.blocks.{b}.{j}.attn.proj",
    "encoders.{k}.blocks.{b}.{j}.mlp_norm": "blocks.{k}.blocks.{b}.{j}.norm2",
    "encoders.{k}.blocks.{b}.{j}.mlp.0": "blocks.{k}.blocks.{b}.{j}.mlp.fc1",
    "encoders.{k}.blocks.{b}.{j}.mlp.3": "blocks.{k}.blocks.{b}.{j}.mlp.fc2",
    "encoders.{k}.fusion.reads.{b}.project.0": "blocks.{k}.projs.{b}.0",
    "encoders.{k}.fusion.reads.{b}.project.2": "blocks.{k}.projs.{b}.2",
    "encoders.{k}.fusion.reads.{b}.blocks.0.norm": "blocks.{k}.fusion.{b}.norm1",
    "encoders.{k}.fusion.reads.{b}.blocks.0.attention.query": "blocks.{k}.fusion.{b}.attn.wq",
    "encoders.{k}.fusion.reads.{b}.blocks.0.attention.key": "blocks.{k}.fusion.{b}.attn.wk",
    "encoders.{k}.fusion.reads.{b}.blocks.0.attention.value": "blocks.{k}.fusion.{b}.attn.wv",
    "encoders.{k}.fusion.reads.{b}.blocks.0.attention.out": "blocks.{k}.fusion.{b}.attn.proj",
    "encoders.{k}.fusion.reads.{b}.restore.0": "blocks.{k}.revert_projs.{b}.0",
    "encoders.{k}.fusion.reads.{b}.restore.2": "blocks.{k}.revert_projs.{b}.2",
    "norms.{b}": "norm.{b}",
    "heads.{b}": "head.{b}",
}

_PATTERNS = [
    (re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(ours)) + r"(?P<rest>(\.\w+)*)"), timm + "{rest}")
    for ours, timm in TIMM_NAMES.items()
]

V = TypeVar("V")


def timm_name(name: str) -> str:
    """timm's name for our parameter `name`."""
    for pattern, timm in _PATTERNS:
        if match := pattern.fullmatch(name):
            return timm.format(**match.groupdict())
    raise AssertionError(f"no timm name for {name}")


def authors_name(name: str) -> str:
    """The authors' name for our parameter `name`."""
    return re.sub(r"^(cls_token|pos_embed)_(\d+)$", r"\1.\2", timm_name(name))


def layout_of(names: Iterable[str]) -> str:
    """Whose keys these are: `ours`, `timm` or `authors`, told by the class token of branch 0."""
    marks = {"tokens.0.class_token": "ours", "cls_token_0": "timm", "cls_token.0": "authors"}
    for name in names:
        if name in marks:
            return marks[name]
    raise WeightsError(f"not the weights of a CrossViT: none of {', '.join(marks)} is among the keys")


def to_ours(state: Mapping[str, V], names: Iterable[str]) -> dict[str, V]:
    """`state`, in any of the three layouts, under our names. `names` are all of the model's own.

    A key that is missing or not used is a WeightsError that lists every one.
    """
    layout = layout_of(state)
    renames: dict[str, Callable[[str], str]] = {"ours": str, "timm": timm_name, "authors": authors_name}
    rename = renames[layout]
    theirs = {rename(name): name for name in names}
    missing, unused = sorted(set(theirs) - set(state)), sorted(set(state) - set(theirs))
    if missing or unused:
        parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"not used {', '.join(unused)}"] * bool(unused)
        raise WeightsError(f"the weights ({layout} keys) are of another model: {'; '.join(parts)}")
    return {theirs[key]: value for key, value in state.items()}
