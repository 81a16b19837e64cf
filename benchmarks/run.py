"""Runs a benchmark by name, or lists them: `make bench NAME=attention ARGS="..."`."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
NOT_BENCHMARKS = ("run", "packs", "tables")
ENGINES = "Both models against timm through every engine installed: a table, bench/bench.json, bench/bench.svg."


def purposes() -> dict[str, str]:
    """Name of each benchmark -> the first sentence of its docstring."""
    found = {"engines": ENGINES}
    for path in sorted(FOLDER.glob("*.py")):
        if path.stem not in NOT_BENCHMARKS:
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = text.partition("\n")[0]
    return found


def main() -> int:
    names = purposes()
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else "list"), sys.argv[2:]
    if name == "list":
        print('make bench NAME=name [ARGS="..."]')
        for benchmark, purpose in names.items():
            print(f"  {benchmark:12} {purpose}")
        return 0
    if name not in names:
        print(f"unknown benchmark {name!r}: take one of {', '.join(names)}", file=sys.stderr)
        return 2
    if name == "engines":
        from crossvit.cli import run

        return run(["bench", *(arguments or ["--out", "bench"])])
    sys.argv = [str(FOLDER / f"{name}.py"), *arguments]
    sys.path.insert(0, str(FOLDER))
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
