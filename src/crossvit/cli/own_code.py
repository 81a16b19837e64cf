"""`--import FILE.py`: code of the user's own that a command runs first, to register parts of models.

Only what the command names is run. A run folder records names of blocks, fusions and tokenisers,
never where their code is.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from crossvit.errors import UsageError

OPTION = "--import"


def without_imports(words: list[str]) -> tuple[list[str], list[str]]:
    """Part a command line into (words without the option, files that it names), in their order.

    Raises:
        UsageError: Where the option ends the line.
    """
    rest, files = [], []
    remaining = iter(words)
    for word in remaining:
        if word == OPTION:
            file = next(remaining, None)
            if file is None:
                raise UsageError(f"{OPTION} names no file: give {OPTION} FILE.py")
            files.append(file)
        elif word.startswith(f"{OPTION}="):
            files.append(word.partition("=")[2])
        else:
            rest.append(word)
    return rest, files


def import_file(name: str) -> None:
    """Run a Python file as a module of its own.

    Raises:
        UsageError: In one line, for a file that is not there or fails.
    """
    path = Path(name).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"{OPTION} {name}: no such Python file")
    module_name = f"crossvit_import_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # classes find their file by it
    try:
        spec.loader.exec_module(module)
    except UsageError:
        raise
    except Exception as error:
        what = (str(error).splitlines() or [""])[0]
        raise UsageError(f"{OPTION} {name} fails: {type(error).__name__}: {what}") from error
