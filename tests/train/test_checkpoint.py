"""Checkpoints that are whole or noticed, and writes that keep the old file."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from crossvit.errors import CheckpointError, RunError
from crossvit.files import write_atomically
from crossvit.train.checkpoint import (
    WAITING_AT_MOST,
    Writer,
    best_path,
    checkpoint_path,
    copied,
    drop_later,
    load_best,
    load_checkpoint,
    load_newest,
    save_best,
    save_checkpoint,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_come_back_to_the_bit_and_the_newest_two_are_kept(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        save_checkpoint(tmp_path, {"epoch": epoch, "x": torch.arange(5.0) * epoch}, step=epoch)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000002.ckpt",
        "step-000000003.ckpt",
    ]
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
    with pytest.raises(
        CheckpointError, match="no whole checkpoint in .*; start again with --overwrite"
    ):
        load_newest(tmp_path)
    with pytest.raises(CheckpointError, match="is torn"):
        load_checkpoint(newest)


def test_torn_files_do_not_count_among_those_kept(tmp_path: Path) -> None:
    """A run that has gone back behind two torn files keeps what it writes next, and the one before."""
    for step in (4, 6, 8):
        save_checkpoint(tmp_path, {"step": step}, step=step, keep=3)
    for step in (6, 8):
        checkpoint_path(tmp_path, step).write_bytes(b"")
    save_checkpoint(tmp_path, {"step": 5}, step=5, keep=2)
    state, passed_over = load_newest(tmp_path)
    assert state == {"step": 5}
    assert len(passed_over) == 2
    assert load_newest(tmp_path, before=5)[0] == {"step": 4}
    drop_later(tmp_path, 5)
    assert names(tmp_path) == ["step-000000004.ckpt", "step-000000005.ckpt"]


def test_an_old_one_that_cannot_be_dropped_or_read_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step}, step=step)

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", fail)
        save_checkpoint(tmp_path, {"step": 3}, step=3)
    assert len(names(tmp_path)) == 3
    checkpoint_path(tmp_path, 3).unlink()
    checkpoint_path(tmp_path, 3).mkdir()  # reading it fails with an OSError, as a bad sector does
    state, passed_over = load_newest(tmp_path)
    assert state == {"step": 2}
    assert "step-000000003.ckpt cannot be read: Is a directory" in passed_over[0]


def test_best_weights_stay_as_long_as_a_kept_state_names_them(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 5)):
        if best == step:
            save_best(tmp_path, {"x": torch.full((100,), float(step))}, step=step)
        save_checkpoint(tmp_path, {"best_step": best}, step=step)
        newest, passed_over = load_newest(tmp_path)
        before, _ = load_newest(tmp_path, before=step)
        assert newest == {"best_step": best}
        assert passed_over == []
        assert (
            before is None
            or load_best(tmp_path, before["best_step"])["x"][0] == before["best_step"]
        )
    assert names(tmp_path) == [
        "best-000000002.ckpt",
        "best-000000005.ckpt",
        "step-000000004.ckpt",
        "step-000000005.ckpt",
    ]
    drop_later(tmp_path, 4)
    assert names(tmp_path) == ["best-000000002.ckpt", "step-000000004.ckpt"]


def test_torn_best_weights_are_noticed_and_those_before_are_used(tmp_path: Path) -> None:
    for step in (1, 2):
        save_best(tmp_path, {"x": torch.ones(1000)}, step=step)
        save_checkpoint(tmp_path, {"step": step, "best_step": step}, step=step)
    torn = best_path(tmp_path, 2)
    torn.write_bytes(torn.read_bytes()[:-1000] + bytes(1000))
    with pytest.raises(CheckpointError, match=r"best-000000002\.ckpt is torn"):
        load_best(tmp_path, 2)
    state, passed_over = load_newest(tmp_path)
    assert state == {"step": 1, "best_step": 1}
    assert "step-000000002.ckpt names best weights that are lost" in passed_over[0]
    best_path(tmp_path, 1).unlink()  # none is left: the newest state goes on without
    assert load_newest(tmp_path) == ({"step": 2, "best_step": None}, [])


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
    with pytest.raises(
        RunError, match="cannot write .*: No space left on device; what was there before is kept"
    ):
        write_atomically(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert target.read_bytes() == b"old"


def test_what_is_written_beside_training_is_the_state_when_it_was_given(tmp_path: Path) -> None:
    go = threading.Event()
    weight = torch.zeros(3)
    state = {"step": 1, "nested": [{"weight": weight}], "rest": (1.5, None)}
    with Writer() as writer:
        writer.submit(go.wait)
        writer.submit(save_checkpoint, tmp_path, copied(state), step=1)
        weight += 1  # the next step of training
        state["step"] = 2
        assert not list(tmp_path.iterdir())
        go.set()
        writer.flush()
        assert load_checkpoint(checkpoint_path(tmp_path, 1))["nested"][0]["weight"].tolist() == [
            0,
            0,
            0,
        ]
        assert load_checkpoint(checkpoint_path(tmp_path, 1))["step"] == 1


def test_writes_keep_their_order_and_no_more_than_some_wait() -> None:
    go = threading.Event()
    written: list[int] = []
    done = threading.Event()

    def give(writer: Writer) -> None:
        for number in range(WAITING_AT_MOST + 1):
            writer.submit(lambda number=number: (go.wait(), written.append(number)))
        done.set()

    with Writer() as writer:
        giving = threading.Thread(target=give, args=(writer,))
        giving.start()
        assert not done.wait(0.2)  # the last one waits for the first
        go.set()
        giving.join()
    assert written == [*range(WAITING_AT_MOST + 1)]


def test_a_write_that_failed_is_raised_where_training_is() -> None:
    def fail() -> None:
        raise RunError("cannot write")

    writer = Writer()
    with pytest.raises(RunError, match="cannot write"), writer:  # on leaving
        writer.submit(fail)
    with Writer() as writer:
        writer.submit(fail)
        with pytest.raises(RunError, match="cannot write"):
            writer.flush()
        writer.flush()  # and once only
    written: list[int] = []

    def interrupted() -> None:
        with Writer() as writer:
            writer.submit(written.append, 1)
            writer.submit(fail)
            raise KeyboardInterrupt

    with pytest.raises(
        KeyboardInterrupt
    ):  # is not hidden by the write, and what waits is written first
        interrupted()
    assert written == [1]
