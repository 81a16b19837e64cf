"""Checkpoints that are whole or noticed, and writes that keep the old file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from crossvit.errors import CheckpointError, RunError
from crossvit.run import write_atomically
from crossvit.train.checkpoint import checkpoint_path, load_checkpoint, load_newest, save_checkpoint


def test_checkpoints_come_back_to_the_bit_and_the_newest_two_are_kept(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        save_checkpoint(tmp_path, {"epoch": epoch, "x": torch.arange(5.0) * epoch}, step=epoch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002.ckpt", "step-000000003.ckpt"]
    state, passed_over = load_newest(tmp_path)
    assert state is not None
    assert (state["epoch"], passed_over) == (3, [])
    assert torch.equal(state["x"], torch.arange(5.0) * 3)


def test_a_torn_checkpoint_is_noticed_and_the_one_before_is_used(tmp_path: Path) -> None:
    for epoch in (1, 2):
        save_checkpoint(tmp_path, {"epoch": epoch, "x": torch.zeros(100)}, step=epoch)
    newest = checkpoint_path(tmp_path, 2)
    whole = newest.read_bytes()
    for torn in (whole[: len(whole) // 2], b"", whole[:-1], whole[:200] + b"?" + whole[201:]):
        newest.write_bytes(torn)
        state, passed_over = load_newest(tmp_path)
        assert state is not None
        assert state["epoch"] == 1
        assert "step-000000002.ckpt is torn" in passed_over[0]
    checkpoint_path(tmp_path, 1).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no whole checkpoint in .*; start again with --overwrite"):
        load_newest(tmp_path)
    with pytest.raises(CheckpointError, match="is torn"):
        load_checkpoint(newest)


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failing_write_keeps_the_old_file_and_leaves_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x"
    write_atomically(target, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if call == "write":
        real = open

        def opening(path: object, mode: str = "r", **options: object) -> object:
            file = real(path, mode, **options)  # type: ignore[call-overload]
            if mode == "wb":
                file.close()
                fail()
            return file

        monkeypatch.setattr("builtins.open", opening)
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(RunError, match="cannot write .*: No space left on device; what was there before is kept"):
        write_atomically(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert target.read_bytes() == b"old"
