"""The command `crossvit`: parsing and printing. What it does is in the library; heavy imports are inside the verbs."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from crossvit.cli.gc_control import uncollected

if TYPE_CHECKING:
    from cyclopts import CycloptsError

INTERRUPTED = 130  # what a shell reports after Ctrl-C
FIRST_SAYS_WITHIN = 5.0  # seconds


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command and exit with its status: 0, 1 the work failed, 2 the call was wrong, 130 after Ctrl-C.

    An error is one plain line on stderr; `--debug` lets the traceback through.
    """
    words = list(sys.argv[1:] if tokens is None else tokens)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    status = run(words, debug=debug)
    gc.freeze()  # Python searches all there is for cycles as it ends, with torch for 0.4 s; what is due `atexit` is still done
    sys.exit(status)


def run(words: list[str], *, debug: bool = False) -> int:
    """The exit status of `crossvit WORDS`."""
    with uncollected():
        from cyclopts import CycloptsError

        from crossvit.cli.own_code import import_file, without_imports
        from crossvit.cli.verbs import app
        from crossvit.errors import CrossViTError, DataError, UsageError

    try:
        words, files = without_imports(words)
        for file in files:
            import_file(file)
        status = app(
            words or ["--help"],
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        sys.stdout.flush()
        return int(status or 0)
    except CycloptsError as error:
        _let_the_first_say_it()
        return _fail(f"{_wrong_call(error, words)} (see `{_help_for(words)}`)", 2, debug=debug)
    except CrossViTError as error:
        if isinstance(error, UsageError | DataError):
            _let_the_first_say_it()
        return _fail(str(error), error.exit_status, debug=debug)
    except KeyboardInterrupt:
        return _fail("stopped", INTERRUPTED)
    except (
        BrokenPipeError,
        SystemExit,
    ):  # standard output was closed early, as by `| head`; SystemExit is rich's word for it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001  # what nobody foresaw is still one line for people
        return _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1, debug=debug)


def _wrong_call(error: CycloptsError, words: list[str]) -> str:
    """What cyclopts says; of an option that `train` has not, with none a letter or two apart, which one has its meaning."""
    from cyclopts import UnknownOptionError

    from crossvit.errors import VERY_LIKE, nearest_names

    if isinstance(error, UnknownOptionError) and words[0] == "train":
        from crossvit.train.recipe import meant_by

        given = (error.token.keyword or error.token.value).partition("=")[0].lstrip("-")
        known = [
            name.lstrip("-") for argument in error.argument_collection for name in argument.names
        ]
        if not nearest_names(given, known, cutoff=VERY_LIKE) and (
            meant := meant_by(given.replace("-", "_"))
        ):
            return f"Unknown option: --{given}. Did you mean {' or '.join('--' + name.replace('_', '-') for name in meant)}?"
    return str(error).strip().rstrip(".")


def _help_for(words: list[str]) -> str:
    return f"crossvit {words[0]} --help" if words and words[0].isalpha() else "crossvit --help"


def _let_the_first_say_it() -> None:
    """Wait, in any but the first of the processes that torchrun started: most errors are found by all, and torchrun ends the
    others as soon as one has ended. One that is still there afterwards was alone in finding its error."""
    if os.environ.get("RANK", "0") != "0":
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(FIRST_SAYS_WITHIN)


def _fail(line: str, status: int, *, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    plain = "".join(
        letter if letter.isprintable() else "?" for letter in " ".join(line.split())
    )  # names come from files
    print(f"crossvit: {plain}", file=sys.stderr)
    return status
