"""The tests' own house: what they share is in support/, and none reaches into the package's caches."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(path for path in TESTS.rglob("*.py") if path != Path(__file__))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(TESTS)) for path in FILES])
def test_no_test_imports_another_or_clears_a_cache_of_the_package(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    imported = [
        name
        for node in ast.walk(ast.parse(text))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    ]
    parts = [part for name in imported for part in name.split(".")]
    assert not [part for part in parts if part.startswith("test_") or part == "conftest"]
    assert ".cache_clear()" not in text


def test_every_test_file_stands_in_the_room_of_what_it_tests() -> None:
    rooms = {path.name for path in (TESTS.parent / "src" / "crossvit").iterdir() if path.is_dir()}
    places = {
        path.parent.relative_to(TESTS).parts for path in FILES if path.name.startswith("test_")
    }
    assert places <= {(), ("golden",), *((room,) for room in rooms)}
