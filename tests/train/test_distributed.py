"""Two processes against one: the same weights, the same samples in the same order, and a worker that is killed in the middle."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from crossvit.cli import FIRST_SAYS_WITHIN, run
from crossvit.errors import TrainingError
from crossvit.run import Run
from crossvit.train import distributed as parallel
from crossvit.train.distributed import Team, init_distributed
from support.runs import EVERYTHING, ONE_THREAD, same_bits, weights_of, words

PLAIN = {
    "epochs": 5,
    "batch_size": 47,
    "drop_path": 0.0,
}  # of 48 images: 47, then one, which leaves a process without a share


def start(
    processes: int, scans: Path, out: Path, changes: dict[str, object], *more: str
) -> subprocess.Popen[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        *more,
    ]
    command = [*launcher, *words(scans, out, changes)]
    return subprocess.Popen(
        command, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def train(
    processes: int, scans: Path, out: Path, changes: dict[str, object], *more: str
) -> tuple[int, str, str]:
    process = start(processes, scans, out, changes, *more)
    printed, said = process.communicate(timeout=240)
    return process.returncode, printed, said


def apart(one: Path, other: Path) -> dict[str, float]:
    """The parameters of two runs that are more than 1e-5 apart, but for the key biases: a key bias adds the same to every score
    of a query, so its gradient is nothing but rounding, of which AdamW makes steps."""
    found = {}
    before, after = weights_of(one), weights_of(other)
    for name in before:
        difference = (before[name] - after[name]).abs()
        if name.endswith(".qkv.bias"):
            difference = difference.reshape(3, -1)[[0, 2]]
        if difference.max() > 1e-5 and not name.endswith(".key.bias"):
            found[name] = float(difference.max())
    return found


def test_shares_are_in_order_and_whole() -> None:
    for size in (1, 2, 3, 7):
        for count in (0, 1, 2, 5, 47, 48):
            items = list(range(count))
            shares = [Team(rank=rank, size=size).shard(items) for rank in range(size)]
            assert [item for share in shares for item in share] == items
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_processes_train_as_one_does(scans: Path, tmp_path: Path) -> None:
    """Ten steps with AdamW."""
    subprocess.run(
        [sys.executable, *words(scans, tmp_path / "one", PLAIN)],
        env=ONE_THREAD,
        check=True,
        capture_output=True,
    )
    status, printed, said = train(2, scans, tmp_path / "two", PLAIN)
    assert status == 0, said
    assert printed.count("top-1") == 1  # one process speaks
    assert "fp32 on cpu with 2 processes of 1 thread" in said
    assert apart(tmp_path / "one", tmp_path / "two") == {}
    one, two = (Run(tmp_path / name).record() for name in ("one", "two"))
    assert (one.processes, two.processes) == (1, 2)
    assert (one.result.top1, one.result.n) == (two.result.top1, two.result.n)
    assert two.result.loss == pytest.approx(one.result.loss, abs=1e-5)
    for before, after in zip(
        Run(tmp_path / "one").entries(), Run(tmp_path / "two").entries(), strict=True
    ):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
        assert after["train_top1"] == before["train_top1"]


def test_a_killed_worker_is_started_again_and_ends_at_the_same_bits(
    scans: Path, tmp_path: Path
) -> None:
    changes = EVERYTHING | {"precision": "fp32"}
    assert train(2, scans, tmp_path / "whole", changes)[0] == 0
    process = start(2, scans, tmp_path / "killed", changes, "--max-restarts", "2")
    deadline = time.monotonic() + 120
    checkpoints = tmp_path / "killed" / "checkpoints"
    while (
        not (checkpoints / "step-000000002.ckpt").exists()
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    workers = [pid for pid in children(process.pid) if "crossvit" in command_of(pid)]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "resuming after epoch" in said
    assert same_bits(weights_of(tmp_path / "killed"), weights_of(tmp_path / "whole"))


def children(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(folder.name))
    return sorted(found)


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def test_another_number_of_processes_goes_on_with_the_same_samples(
    scans: Path, tmp_path: Path
) -> None:
    changes = PLAIN | {"epochs": 4}
    process = start(2, scans, tmp_path / "run", changes)
    deadline = time.monotonic() + 120
    while (
        len(Run(tmp_path / "run").entries()) < 2
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    done = subprocess.run(
        [sys.executable, *words(scans, tmp_path / "run", changes), "--resume"],
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    subprocess.run(
        [sys.executable, *words(scans, tmp_path / "one", changes)],
        env=ONE_THREAD,
        check=True,
        capture_output=True,
    )
    assert apart(tmp_path / "run", tmp_path / "one") == {}


def test_wrong_calls_are_said_once(scans: Path, tmp_path: Path) -> None:
    status, _, said = train(2, scans, tmp_path / "run", {"batch_size": 1, "epochs": 1})
    assert status == 1  # torchrun's own
    assert said.count("crossvit: --batch-size 1 for 2 processes: give each at least one image") == 1
    assert not (tmp_path / "run" / "run.json").exists()
    status, _, said = train(2, tmp_path / "nowhere", tmp_path / "run", {"epochs": 1})
    assert said.count("crossvit: no folder") == 1


def test_an_error_that_one_process_alone_finds_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the time in which torchrun would have ended it, had the first process found the same."""
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("crossvit.cli.time.sleep", waited.append)
    assert run(["train", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]) == 2
    assert waited == [FIRST_SAYS_WITHIN]
    assert capsys.readouterr().err.count("crossvit: no folder") == 1


def test_a_port_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first of two processes without torchrun's own store, which would have taken the port before."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1]),
            "TORCHELASTIC_RUN_ID": "none",
        }
        for name, value in (place | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}).items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(
                TrainingError,
                match=r"the processes of this run cannot meet \(.*\): try another --master-port",
            ) as raised,
            init_distributed(torch.device("cpu")),
        ):
            pass
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
        ),
        torch.distributed.DistBackendError("NCCL communicator was aborted"),
    ],
)
def test_a_process_that_has_gone_is_one_line(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(parallel.dist, "all_reduce", gone)
    monkeypatch.setattr(parallel.dist, "get_backend", lambda: "gloo")
    with pytest.raises(TrainingError, match="another process of this run has ended"):
        Team(size=2).all_reduce(1.0)
    with (
        pytest.raises(TrainingError, match="another process of this run has ended"),
        Team(size=2).exchanging(),
    ):
        gone()


def test_other_errors_between_processes_keep_their_words() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        Team(size=2).exchanging(),
    ):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
