"""Every bit of training and inference is what it was: golden_bits.py against this machine's file.

A change that is meant to alter bits writes the file anew (`python tests/golden/golden_bits.py
--write`) and says so in its commit.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("golden_bits.py")
SAME, DIFFERENT, NO_FILE = 0, 1, 3  # exit statuses


@pytest.mark.alone
@pytest.mark.parametrize("cases", ["run-*", "model-* use-*"])
def test_every_bit_is_what_it_was(cases: str) -> None:
    """Computed in processes of their own, whose number of threads is fixed."""
    command = [sys.executable, str(SCRIPT)]
    for case in cases.split():
        command += ["--case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == NO_FILE:
        pytest.skip(done.stdout.strip())
    assert done.returncode in (SAME, DIFFERENT), done.stderr
    assert done.returncode == SAME, f"bits have changed:\n{done.stdout}"
