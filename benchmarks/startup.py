"""How long `crossvit --help` takes beyond a bare interpreter: the median of paired runs, and the modules it must not load."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 15


def seconds(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    seconds("-m", "crossvit", "--help")  # byte-compiled and in the disk cache from here on
    pairs = [(seconds("-c", "pass"), seconds("-m", "crossvit", "--help")) for _ in range(RUNS)]
    bare, with_help = (statistics.median(column) for column in zip(*pairs, strict=True))
    beyond = statistics.median(help_ - bare_ for bare_, help_ in pairs)
    print(
        f"bare interpreter {bare:.3f} s, crossvit --help {with_help:.3f} s, beyond it {beyond:.3f} s (median of {RUNS} pairs)"
    )


if __name__ == "__main__":
    main()
