"""Several processes that train one model together: the only user of torch.distributed.

`torchrun --nproc-per-node 2 -m crossvit train ...` starts them. Each computes its share of every batch; gradients, losses and
counts are added up, so the result is that of one process with the whole batch. The first process alone writes and speaks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from crossvit.errors import TrainingError, UsageError

T = TypeVar("T")
ANSWER = timedelta(seconds=1)
GONE = (
    "gloo",
    "nccl",
    "connection",
)  # words in what a lost process is reported with; gloo's error is a bare RuntimeError


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes of one run, seen from one of them. `rank` counts from 0; `local_rank` among those on this machine.
    restarts: how often torchrun has started them anew."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """This process's own device of that type."""
        return (
            torch.device("cuda", self.local_rank)
            if device.type == "cuda" and self.size > 1
            else device
        )

    def bounds(self, count: int) -> tuple[int, int]:
        """This process's share of `count` things: from, to. The shares are in order and differ by one at most."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of `items`."""
        start, end = self.bounds(len(items))
        return items[start:end]

    def all_reduce(self, *numbers: float) -> list[float]:
        """Each number added up over the processes, in float64."""
        if self.size == 1:
            return list(numbers)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
        with _peer_failures():
            dist.all_reduce(tensor)
        return [float(number) for number in tensor.tolist()]

    def gather(self, own: T) -> list[T]:
        """Every process's `own`, by rank."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        with _peer_failures():
            dist.all_gather_object(found, own)
        return found

    def broadcast_object(self, value: T) -> T:
        """The first process's `value`."""
        if self.size == 1:
            return value
        told: list[Any] = [value]
        with _peer_failures():
            dist.broadcast_object_list(told, src=0)
        return told[0]  # type: ignore[no-any-return]

    def exchanging(self) -> contextlib.AbstractContextManager[None]:
        """Around the backward pass, in which gradients are exchanged: TrainingError where another process has gone."""
        return _peer_failures() if self.size > 1 else contextlib.nullcontext()

    def wrap_ddp(self, module: nn.Module) -> nn.Module:
        """`module` whose gradients are the mean over the processes. They start from the first one's parameters."""
        if self.size == 1:
            return module
        parameter = next(module.parameters())
        devices = [parameter.device.index] if parameter.is_cuda else None
        return DistributedDataParallel(
            module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )


SINGLE_PROCESS = Team()


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and "WORLD_SIZE" in os.environ


def leading() -> bool:
    """Whether this process is the first of its run, or the only one: the one that prints and writes."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def init_distributed(device: torch.device) -> Iterator[Team]:
    """The team that torchrun started, gloo on a CPU and nccl on CUDA; SINGLE_PROCESS without torchrun."""
    if not started_by_torchrun():
        yield SINGLE_PROCESS
        return
    team = Team(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )
    if device.type == "cuda":
        if team.local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"{team.local_rank + 1} processes here and {torch.cuda.device_count()} GPUs: lower --nproc-per-node"
            )
        torch.cuda.set_device(team.local_rank)
    try:
        store, rank, size = next(rendezvous("env://"))
        round_ = PrefixStore(_round(store, rank, size), store)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=round_, rank=rank, world_size=size
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the processes of this run cannot meet ({str(error).splitlines()[0]}): try another --master-port"
        ) from error
    try:
        yield team
    finally:
        dist.destroy_process_group()


def _round(store: Store, rank: int, size: int) -> str:
    """A name that exactly the processes that are alive now agree on. torchrun keeps its store over a restart, with the
    addresses of processes that have died in it: under this name there are none.

    The first process gives the name; each other one greets it under that name and waits to be answered by one that lives.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("crossvit/leader", own)
        for other in range(1, size):
            greeting = store.get(f"crossvit/{own}/hello/{other}").decode()
            store.set(f"crossvit/{own}/welcome/{greeting}", "")
        return own
    while True:  # as long as torchrun keeps this process: it ends all when one does not come
        name: str = store.get("crossvit/leader").decode()
        store.set(f"crossvit/{name}/hello/{rank}", own)
        with contextlib.suppress(
            dist.DistStoreError
        ):  # nobody there: the name was an earlier round's
            store.wait([f"crossvit/{name}/welcome/{own}"], ANSWER)
            return name


@contextlib.contextmanager
def _peer_failures() -> Iterator[None]:
    """TrainingError in one line where another process has gone; any other error is left as it is."""
    try:
        yield
    except RuntimeError as error:
        if not (
            isinstance(error, dist.DistError) or any(word in str(error).lower() for word in GONE)
        ):
            raise
        raise TrainingError(
            f"another process of this run has ended ({str(error).splitlines()[0]}); look at what it said"
        ) from error


class BranchLogits(nn.Module):
    """A model whose forward pass is `branch_logits`, which is what is trained."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model.branch_logits(images)
        return logits
