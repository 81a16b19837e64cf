"""Every error this package raises for people, and the exit status each one ends the command with.

```
CrossViTError              base: one plain line that names the thing and the fix
├── UsageError             exit 2: the call was wrong
│   ├── ConfigError        a model or recipe field cannot work (also a ValueError)
│   │   └── UnknownPartError   a block, fusion or tokeniser that nobody has registered
│   └── UnknownNameError   no such model, recipe or split (also a LookupError)
└── WorkError              exit 1: the work failed
    ├── DataError          images or labels that cannot be used
    ├── WeightsError       a weight file that does not fit or cannot be read
    ├── TrainingError      training that cannot go on, such as a loss that is not finite
    ├── CheckpointError    a training checkpoint that cannot be used
    ├── EngineError        an engine that is not installed, or fails to load or to agree
    └── RunError           a run folder that is locked, damaged or written by a newer version
```

Invariants of the code itself are `assert`s, not errors of this tree.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

VERY_LIKE = 0.75  # difflib's ratio of two names, from which the one is likely meant by the other: a letter or two apart


class CrossViTError(Exception):
    """Base of every error meant for people. `exit_status` is what the command ends with."""

    exit_status = 1


class UsageError(CrossViTError):
    """The call was wrong: nothing was started."""

    exit_status = 2


class ConfigError(UsageError, ValueError):
    """A field of a model or recipe cannot work; the message has the field, the value and what would be right."""


class UnknownPartError(ConfigError):
    """A block, fusion or tokeniser that nobody has registered; the message says how that is done."""


class UnknownNameError(UsageError, LookupError):
    """A name that is not in a table; the message has the nearest names."""


class WorkError(CrossViTError):
    """The call was right and the work failed."""


class DataError(WorkError):
    """Images or labels that cannot be used."""


class WeightsError(WorkError):
    """A weight file that cannot be read or does not fit the model."""


class TrainingError(WorkError):
    """Training that cannot go on."""


class CheckpointError(WorkError):
    """A training checkpoint that cannot be used."""


class EngineError(WorkError):
    """An engine that is not installed here, or cannot compute this model."""


class RunError(WorkError):
    """A run folder that is locked, damaged or made by a newer version."""


def nearest_names(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> list[str]:
    """The one of `known` that is most like `name`, and up to two more that are very like it; none where none is, by difflib's
    ratio of at least `cutoff`."""
    first, *others = difflib.get_close_matches(name.lower(), known, n=3, cutoff=cutoff) or [""]
    close = difflib.get_close_matches(name.lower(), others, n=2, cutoff=VERY_LIKE)
    return [first, *close] if first else []


def unknown_name(
    kind: str, name: str, known: Iterable[str], *, listing: str = ""
) -> UnknownNameError:
    """The error for `name` not being one of `known`: it suggests the nearest names, or points to `listing`."""
    known = list(known)
    nearest = nearest_names(name, known)
    if nearest:
        fix = f"did you mean {' or '.join(nearest)}?"
    elif listing:
        fix = f"see {listing}"
    else:
        fix = f"known: {', '.join(sorted(known))}"
    return UnknownNameError(f"unknown {kind} {name!r}: {fix}")
