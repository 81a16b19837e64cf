"""The command `crossvit`: parsing and printing. What it does is in the library; heavy imports are inside the verbs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

INTERRUPTED = 130  # what a shell reports after Ctrl-C


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command and exit with its status: 0, 1 the work failed, 2 the call was wrong, 130 after Ctrl-C.

    An error is one plain line on stderr; `--debug` lets the traceback through.
    """
    words = list(sys.argv[1:] if tokens is None else tokens)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    sys.exit(run(words, debug=debug))


def run(words: list[str], *, debug: bool = False) -> int:
    """The exit status of `crossvit WORDS`."""
    from cyclopts import CycloptsError

    from crossvit.cli.verbs import app
    from crossvit.errors import CrossViTError

    try:
        status = app(words or ["--help"], exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return int(status or 0)
    except CycloptsError as error:
        if debug:
            raise
        return _fail(f"{_one_line(error)} (see `crossvit --help`)", 2)
    except CrossViTError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _fail("stopped", INTERRUPTED)
    except BrokenPipeError:  # standard output was closed early, as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, OSError) as error:
        if debug:
            raise
        return _fail(f"{type(error).__name__}: {error}", 1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _fail(line: str, status: int) -> int:
    print(f"crossvit: {' '.join(line.split())}", file=sys.stderr)
    return status
