"""The processes of one run, which torchrun starts: the work of each, and how they communicate.

`spread="rows"`: all processes train all coders, each on its share of every batch; gradients are
summed. `spread="coders"`: each process trains its share of the coders, as it would alone. Only the
first process writes the files of the whole run.

B rows in a batch.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mpcache.errors import UsageError
from mptrain.config.run import RunConfig, Spread
from mptrain.data.window_plans import WHOLE_STREAM, StreamShare

T = TypeVar("T")

# processes wait for the slowest; torchrun ends all of them where one has died
_TIMEOUT = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """This process among the processes of its run. A single process does not communicate."""

    rank: int = 0
    size: int = 1
    spread: Spread | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files of the whole run."""
        return self.rank == 0

    @property
    def saves_coders(self) -> bool:
        """Whether this process saves the coders that it trains."""
        return self.is_first or self.spread == "coders"

    @property
    def divides_rows(self) -> bool:
        """Whether each process trains on a share of every batch."""
        return self.spread == "rows" and self.size > 1

    def own_coders(self, coders: Sequence[T]) -> Sequence[T]:
        """Return the coders that this process trains."""
        return self.coders_per_process(coders)[self.rank]

    def coders_per_process(self, coders: Sequence[T]) -> list[Sequence[T]]:
        """Return the coders that each process trains."""
        if self.spread != "coders":
            return [coders] * self.size
        return [coders[rank :: self.size] for rank in range(self.size)]

    @property
    def share(self) -> StreamShare:
        """The share of the train rows that this process reads."""
        return StreamShare(self.rank, self.size) if self.divides_rows else WHOLE_STREAM

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum over the processes that divide rows, in place; all get the same bits."""
        if self.divides_rows:
            dist.all_reduce(tensor)
        return tensor

    def sum(self, number: int) -> int:
        """Return the sum over processes where they divide rows, else the number."""
        return int(self.all_reduce_(torch.tensor(number)))

    def any(self, condition: bool) -> bool:
        """Return whether the condition holds in any process."""
        if self.size == 1:
            return condition
        count = torch.tensor(int(condition))
        dist.all_reduce(count)
        return bool(count)

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """Return the items of all processes that train other coders, by rank, on the first process.

        Waits for all processes; the others get an empty list. Items travel as JSON, because nothing
        is ever unpickled, not even between the processes of one run.
        """
        if self.spread != "coders" or self.size == 1:
            return list(items)
        if not self.is_first:
            data = bytearray(json.dumps(list(items)).encode())
            dist.send(torch.tensor(len(data)), dst=0)
            dist.send(torch.frombuffer(data, dtype=torch.uint8), dst=0)
            return []
        gathered = list(items)
        for rank in range(1, self.size):
            size = torch.tensor(0)
            dist.recv(size, src=rank)
            received = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(received, src=rank)
            gathered += json.loads(received.numpy().tobytes())
        return gathered

    def gather_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the named tensors of all processes, on the first process; the others get none.

        The tensors of other processes are on the CPU.
        """
        if self.spread != "coders" or self.size == 1:
            return dict(tensors)
        outlines = [
            (name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."), self.rank)
            for name, tensor in tensors.items()
        ]
        if not self.is_first:
            self.gather(outlines)
            for tensor in tensors.values():
                dist.send(tensor.detach().cpu().contiguous(), dst=0)
            return {}
        gathered = dict(tensors)
        for name, shape, dtype, rank in self.gather(outlines):
            if rank:
                gathered[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                dist.recv(gathered[name], src=rank)
        return gathered

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)


SINGLE_PROCESS = ProcessGroup()


def is_distributed() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def is_first_process() -> bool:
    """Whether this process is the one that talks to the user."""
    return not is_distributed() or os.environ["RANK"] == "0"


@contextmanager
def join_process_group(config: RunConfig) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started, each on its own GPU; without torchrun, run alone.

    Raises:
        UsageError: the config does not fit the number of processes.
    """
    if not is_distributed():
        if config.spread is not None:
            raise UsageError(
                f"--spread {config.spread} needs several processes, got one; start them with "
                "torchrun --nproc-per-node 2 --no-python -- mptrain fit ..., or remove --spread"
            )
        yield SINGLE_PROCESS
        return
    size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    _check_spread(config, size)
    # two back ends at once: gradients travel between GPUs, numbers and states between CPUs
    backend = "cpu:gloo,cuda:nccl" if _select_gpu_(config, local) else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield ProcessGroup(rank=int(os.environ["RANK"]), size=size, spread=config.spread)
    finally:
        dist.destroy_process_group()


def _check_spread(config: RunConfig, size: int) -> None:
    if config.spread is None:
        raise UsageError(
            f"torchrun started {size} processes, but --spread is missing; give --spread rows or "
            "--spread coders to divide the work"
        )
    coders = len(config.coders())
    if config.spread == "coders" and coders < size:
        raise UsageError(
            f"--spread coders needs at least one coder per process, got {coders} coders for {size} "
            f"processes; start {coders} processes, or use --spread rows"
        )
    if config.device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"--device must be auto, cpu or cuda for several processes, got {config.device}; "
            "use auto, so that each process takes its own GPU"
        )


def _select_gpu_(config: RunConfig, local: int) -> bool:
    """Make `cuda` mean the GPU of this process; return whether there is one."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return False
    gpus = torch.cuda.device_count()
    if local >= gpus:
        raise UsageError(
            f"each process needs its own GPU, got {gpus} GPUs; start at most {gpus} processes on "
            "this machine, or use --device cpu"
        )
    torch.cuda.set_device(local)
    return True
