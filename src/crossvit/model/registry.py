"""What a config may name: blocks, fusions and tokenisers, one registry each. Standard library only.

A config records names, never code, so whoever adds a name makes it known in every process that
opens such a model: in Python by importing the file that registers it, on the command line by
`--import FILE.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from crossvit.errors import ConfigError, UnknownPartError, nearest_names


class Registry:
    """Names and what they stand for. Built-in ones are imported when they are first looked up."""

    def __init__(self, kind: str, built_in: dict[str, str]) -> None:
        """
        Args:
            kind: What the names are names of, also the config's field: `block`, `fusion`, ...
            built_in: Name -> `module:attribute`; the module is imported at the first look.
        """
        self.kind = kind
        self.built_in = tuple(built_in)
        self._entries: dict[str, Any] = dict(built_in)

    def register(self, name: str, it: type[Any]) -> None:
        """Make `it` known as `name`; again under the same name replaces it.

        Raises:
            ConfigError: For a name that is built in, is no plain text, or stands for no class.
        """
        if not isinstance(name, str) or not name or name != name.strip():
            raise ConfigError(f"{self.kind} name {name!r}: give a text without spaces around it")
        if name in self.built_in:
            raise ConfigError(f"{self.kind} {name!r} is built in: choose another name")
        if not isinstance(it, type):
            raise ConfigError(
                f"{self.kind} {name!r} = {it!r}: should be a class of torch.nn.Module"
            )
        self._entries[name] = it

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> Any:
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return entry

    def check(self, name: object) -> None:
        """UnknownPartError that says how to make `name` known, where it is not."""
        if name in self._entries:
            return
        near = nearest_names(str(name), list(self._entries))
        guess = f"did you mean {' or '.join(near)}? " if near else ""
        raise UnknownPartError(
            f"{self.kind} = {name!r}: should be one of {', '.join(self._entries)}; {guess}"
            f"one of your own is made known by register_{self.kind}, in a file given by --import"
        )


BLOCKS = Registry("block", {"pre-norm": "crossvit.model.layers:EncoderBlock"})
FUSIONS = Registry(
    "fusion",
    {
        "none": "crossvit.model.fusion:NoFusion",
        "all-attention": "crossvit.model.fusion:AllAttentionFusion",
        "class-token": "crossvit.model.fusion:ClassTokenFusion",
        "pairwise": "crossvit.model.fusion:PairwiseFusion",
        "cross-attention": "crossvit.model.fusion:CrossAttentionFusion",
    },
)
TOKENISERS = Registry(
    "tokeniser",
    {
        "linear": "crossvit.model.tokens:convolutions",
        "dagger": "crossvit.model.tokens:convolutions",
        "t2t": "crossvit.model.t2t:TokensToToken",
        "halving": "crossvit.model.tokens:convolutions",
    },
)


def register_block(name: str, block: type[Any]) -> None:
    """Let `config.block = name` build the encoder blocks of every branch from `block`.

    Args:
        name: What configs, `--block` and run.json say.
        block: A `torch.nn.Module`, called as `block(branch, drop=, attention_drop=, drop_path=)` with a
            `BranchConfig` and three rates; its forward maps tokens (B, N, D) to (B, N, D).

    Raises:
        ConfigError: For a name that is built in or a value that is no class.
    """
    BLOCKS.register(name, block)


def register_fusion(name: str, fusion: type[Any]) -> None:
    """Let `config.fusion = name` end every multi-scale encoder with `fusion`.

    Args:
        name: What configs, `--fusion` and run.json say.
        fusion: A `torch.nn.Module`, called as `fusion(config, drop_path=)`; its forward maps the branches' tokens
            [(B, N_b, D_b), ...] and their grids [(rows, columns), ...] to the branches' tokens.

    Raises:
        ConfigError: For a name that is built in or a value that is no class.
    """
    FUSIONS.register(name, fusion)


def register_tokeniser(name: str, tokeniser: type[Any]) -> None:
    """Let `branch.tokeniser = name` turn a branch's image into patches by `tokeniser`.

    Args:
        name: What configs, `--tokeniser` and run.json say.
        tokeniser: A `torch.nn.Module`, called as `tokeniser(branch, in_channels)`; its forward maps (B, C, H, W) to
            (B, D, rows, columns) on the branch's grid.

    Raises:
        ConfigError: For a name that is built in or a value that is no class.
    """
    TOKENISERS.register(name, tokeniser)
