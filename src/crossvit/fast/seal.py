"""The seal: which text of the plain model's functions the fast forms were tested against.

A fast form computes what `crossvit.model` says without asking it. So each form names the functions
that it stands in for, and the hash of their source is kept in seal.json. A function that has been
edited, patched or replaced has another hash (or no source at all): its fast forms then leave the
work to it. `make seal` writes the file anew, once the forms equal the edited functions.

Comments, docstrings and spacing are no part of the hash.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import tokenize
from functools import lru_cache
from pathlib import Path
from types import CodeType

from crossvit.model import attention, crossvit, fusion, layers, t2t, tokens

FILE = Path(__file__).with_name("seal.json")
Function = tuple[object, str]  # the class or module that has it, its name there

FUNCTIONS: tuple[Function, ...] = (
    (attention, "attention"),
    (attention, "attention_weights"),
    (attention, "split_heads"),
    (attention.SelfAttention, "forward"),
    (attention.CrossAttention, "forward"),
    (layers.DropPath, "forward"),
    (layers.DropPath, "scale"),
    (layers.EncoderBlock, "forward"),
    (fusion, "summary"),
    (fusion, "patches_of"),
    (fusion, "with_summary"),
    (fusion, "next_around"),
    (fusion.CrossReadBlock, "forward"),
    (fusion.CrossRead, "forward"),
    (fusion.CrossAttentionFusion, "forward"),
    (tokens, "resize"),
    (tokens, "resample_positions"),
    (tokens.Tokens, "forward"),
    (t2t.TokenTransformer, "forward"),
    (crossvit.MultiScaleEncoder, "forward"),
    (crossvit.MultiScaleEncoder, "run"),
    (crossvit.MultiScaleEncoder, "contexts"),
    (crossvit.CrossViT, "intermediate_tokens"),
    (crossvit.CrossViT, "branch_logits"),
    (crossvit.CrossViT, "branch_logits_of"),
    (crossvit.CrossViT, "forward"),
)


def is_sealed(owner: object, name: str) -> bool:
    """Whether `owner` has under `name`, now, the function that the fast forms were tested against."""
    code = getattr(getattr(owner, name, None), "__code__", None)
    return code is not None and _has_hash(code, title(owner, name))


def title(owner: object, name: str) -> str:
    """The function's name in seal.json: `crossvit.model.layers.EncoderBlock.forward`."""
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}.{name}"
    return f"{owner.__name__}.{name}"  # type: ignore[attr-defined]  # a module


@lru_cache(maxsize=1024)
def _has_hash(code: CodeType, name: str) -> bool:
    try:
        return sealed_hashes().get(name) == source_hash(code)
    except (OSError, SyntaxError):  # its source cannot be read
        return False


@lru_cache(maxsize=1)
def sealed_hashes() -> dict[str, str]:
    """Name of a function -> hash of its source, as seal.json has them."""
    return json.loads(FILE.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def source_hash(code: CodeType) -> str:
    """The hash of a function's source: its tokens, without comments, docstrings and spacing.

    Raises:
        OSError: Where the source cannot be read.
    """
    text = "".join(inspect.getsourcelines(code)[0])
    indented = f"if 1:\n{text}" if text[:1].isspace() else text
    words: list[str] = []
    starts_statement = True
    pending = ""  # a string that stands at the start of a statement: a docstring if alone
    for token in tokenize.generate_tokens(io.StringIO(indented).readline):
        match token.type:
            case tokenize.COMMENT | tokenize.NL | tokenize.ENCODING | tokenize.ENDMARKER:
                continue
            case tokenize.NEWLINE:
                words.append("" if pending else "\n")
                starts_statement, pending = True, ""
            case tokenize.INDENT | tokenize.DEDENT:
                words.append(">" if token.type == tokenize.INDENT else "<")
            case tokenize.STRING if starts_statement:
                starts_statement, pending = False, token.string
            case _:
                words += [pending] * bool(pending) + [token.string]
                starts_statement, pending = False, ""
    return hashlib.sha256("\0".join(filter(None, words)).encode()).hexdigest()[:16]


def write() -> None:
    """Write seal.json for the functions as they are now."""
    hashes = {title(*function): source_hash(_code(*function)) for function in FUNCTIONS}
    FILE.write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


def _code(owner: object, name: str) -> CodeType:
    return getattr(owner, name).__code__  # type: ignore[no-any-return]


if __name__ == "__main__":
    write()
