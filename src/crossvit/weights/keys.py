"""The names of parameters: ours, timm's and the authors', as one explicit and strict map.

timm and the authors differ in the class tokens and position embeddings only (`cls_token_0` against `cls_token.0`). `k` is
the encoder, `b` the branch that is written (0 is S), `j` the block. With one block in a fusion they leave its number out
(timm, when built with a fusion depth of 1 in place of 0, does not: both are read).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from crossvit.errors import WeightsError

LAYOUTS = ("ours", "timm", "authors")

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
    "encoders.{k}.fusion.reads.{b}.blocks.{j}.norm": "blocks.{k}.fusion.{b}.{j}.norm1",
    "encoders.{k}.fusion.reads.{b}.blocks.{j}.attention.query": "blocks.{k}.fusion.{b}.{j}.attn.wq",
    "encoders.{k}.fusion.reads.{b}.blocks.{j}.attention.key": "blocks.{k}.fusion.{b}.{j}.attn.wk",
    "encoders.{k}.fusion.reads.{b}.blocks.{j}.attention.value": "blocks.{k}.fusion.{b}.{j}.attn.wv",
    "encoders.{k}.fusion.reads.{b}.blocks.{j}.attention.out": "blocks.{k}.fusion.{b}.{j}.attn.proj",
    "encoders.{k}.fusion.reads.{b}.restore.0": "blocks.{k}.revert_projs.{b}.0",
    "encoders.{k}.fusion.reads.{b}.restore.2": "blocks.{k}.revert_projs.{b}.2",
    "norms.{b}": "norm.{b}",
    "heads.{b}": "head.{b}",
}

_PATTERNS = [
    (
        re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(ours)) + r"(?P<rest>(\.\w+)*)"),
        timm + "{rest}",
    )
    for ours, timm in TIMM_NAMES.items()
]
_FIRST_OF_FUSION = re.compile(r"(blocks\.\d+\.fusion\.\d+)\.0\.(?=norm1|attn)")

V = TypeVar("V")


def layout_of(names: Iterable[str]) -> str:
    """Whose keys these are: `ours`, `timm` or `authors`, told by the position embeddings of branch 0."""
    marks = {"tokens.0.positions": "ours", "pos_embed_0": "timm", "pos_embed.0": "authors"}
    for name in names:
        if name in marks:
            return marks[name]
    raise WeightsError(
        f"not the weights of a CrossViT: none of {', '.join(marks)} is among the keys"
    )


def renamed(names: Iterable[str], layout: str) -> dict[str, str]:
    """Our name -> its name in `layout`, for all parameters `names` of one model; those without one are left out."""
    own = list(names)
    if layout == "ours":
        return {name: name for name in own}
    several = any(re.search(r"\.fusion\.reads\.\d+\.blocks\.1\.", name) for name in own)
    theirs = {}
    for name in own:
        timm = _timm_name(name)
        if timm is not None:
            short = timm if several else _FIRST_OF_FUSION.sub(r"\1.", timm)
            theirs[name] = (
                re.sub(r"^(cls_token|pos_embed)_(\d+)$", r"\1.\2", short)
                if layout == "authors"
                else short
            )
    return theirs


def to_ours(state: Mapping[str, V], names: Iterable[str]) -> dict[str, V]:
    """`state`, in any of the three layouts, under our names. `names` are all of the model's own.

    A key that is missing or not used is a WeightsError that lists every one.
    """
    own = list(names)
    layout = layout_of(state)
    rename = renamed(own, layout)
    theirs = {rename.get(name, name): name for name in own}
    state = {_as_mapped(key, theirs): value for key, value in state.items()}
    missing, unused = sorted(set(theirs) - set(state)), sorted(set(state) - set(theirs))
    if missing or unused:
        parts = [f"missing {', '.join(missing)}"] * bool(missing) + [
            f"not used {', '.join(unused)}"
        ] * bool(unused)
        raise WeightsError(f"the weights ({layout} keys) are of another model: {'; '.join(parts)}")
    return {theirs[key]: value for key, value in state.items()}


def _timm_name(name: str) -> str | None:
    for pattern, timm in _PATTERNS:
        if match := pattern.fullmatch(name):
            return timm.format(**match.groupdict())
    return None


def _as_mapped(key: str, theirs: Mapping[str, str]) -> str:
    """timm's name for the only block of a fusion, with or without its number."""
    return key if key in theirs else _FIRST_OF_FUSION.sub(r"\1.", key)
