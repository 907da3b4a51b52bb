"""The processes of one run, as torchrun starts them: what each does, what they tell each other.

Spread rows: all ranks train all coders alike, each on its share of every batch; their gradients are
added up. Spread coders: each rank trains its share of the coders, as it would alone. The first rank
alone writes what is of the whole run.

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
from mptrain.data.windows import WHOLE_STREAM, StreamShare

T = TypeVar("T")

# ranks wait for the slowest: torchrun ends them all where one has died
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """This process among those of its run. Alone it does everything, and sends nothing."""

    rank: int = 0
    size: int = 1
    spread: Spread | None = None

    @property
    def is_first(self) -> bool:
        """Whether it writes what is of the whole run."""
        return self.rank == 0

    @property
    def writes_coders(self) -> bool:
        """Whether the coders that it trains are for it to save."""
        return self.is_first or self.spread == "coders"

    @property
    def shares_rows(self) -> bool:
        return self.spread == "rows" and self.size > 1

    def coders(self, coders: Sequence[T]) -> Sequence[T]:
        """Which of the coders it trains."""
        return self.all_coders(coders)[self.rank]

    def all_coders(self, coders: Sequence[T]) -> list[Sequence[T]]:
        """Which of the coders each rank trains."""
        if self.spread != "coders":
            return [coders] * self.size
        return [coders[rank :: self.size] for rank in range(self.size)]

    @property
    def share(self) -> StreamShare:
        """What it reads of the train rows."""
        return StreamShare(self.rank, self.size) if self.shares_rows else WHOLE_STREAM

    def add_(self, tensor: Tensor) -> Tensor:
        """Where rows are shared, the sum over ranks, in place and the same bits on all of them."""
        if self.shares_rows:
            dist.all_reduce(tensor)
        return tensor

    def total(self, number: int) -> int:
        """Where rows are shared, the sum over ranks."""
        return int(self.add_(torch.tensor(number)))

    def any(self, is_so: bool) -> bool:
        """Whether it is so on any rank."""
        if self.size == 1:
            return is_so
        found = torch.tensor(int(is_so))
        dist.all_reduce(found)
        return bool(found)

    def gathered(self, found: Sequence[Any]) -> list[Any]:
        """On the first rank: what all coders' ranks found, by rank. Waits for all of them.

        It goes as JSON: nothing is ever unpickled, not even between the ranks of one run.
        """
        if self.spread != "coders" or self.size == 1:
            return list(found)
        if not self.is_first:
            data = bytearray(json.dumps(list(found)).encode())
            dist.send(torch.tensor(len(data)), dst=0)
            dist.send(torch.frombuffer(data, dtype=torch.uint8), dst=0)
            return []
        everything = list(found)
        for rank in range(1, self.size):
            size = torch.tensor(0)
            dist.recv(size, src=rank)
            received = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(received, src=rank)
            everything += json.loads(received.numpy().tobytes())
        return everything

    def gathered_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the first rank: the tensors of all coders' ranks, by their names, on the CPU."""
        if self.spread != "coders" or self.size == 1:
            return dict(tensors)
        outlines = [
            (name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."), self.rank)
            for name, tensor in tensors.items()
        ]
        if not self.is_first:
            self.gathered(outlines)
            for tensor in tensors.values():
                dist.send(tensor.detach().cpu().contiguous(), dst=0)
            return {}
        found = dict(tensors)
        for name, shape, dtype, rank in self.gathered(outlines):
            if rank:
                found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                dist.recv(found[name], src=rank)
        return found

    def meet(self) -> None:
        """Wait for all ranks."""
        self.any(False)


SINGLE_PROCESS = ProcessGroup()


def is_distributed() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def is_first_process() -> bool:
    """Whether this process is the one to tell the user something."""
    return not is_distributed() or os.environ["RANK"] == "0"


@contextmanager
def joined(config: RunConfig) -> Iterator[ProcessGroup]:
    """This process among those that torchrun started, on its own GPU; alone without torchrun.

    Raises:
        ValueError: the config does not go with how many processes there are.
    """
    if not is_distributed():
        if config.spread is not None:
            raise UsageError(
                f"spread {config.spread} needs several processes, got one; start them by "
                "torchrun --nproc-per-node 2 --no-python -- mptrain fit ..., or leave out spread"
            )
        yield SINGLE_PROCESS
        return
    size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    _refuse_unfit(config, size)
    # two back ends at once: gradients go by the GPUs' own, numbers and states by the CPUs'
    backend = "cpu:gloo,cuda:nccl" if _takes_gpu_(config, local) else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield ProcessGroup(rank=int(os.environ["RANK"]), size=size, spread=config.spread)
    finally:
        dist.destroy_process_group()


def _refuse_unfit(config: RunConfig, size: int) -> None:
    if config.spread is None:
        raise UsageError(
            f"torchrun started processes, {size} of them, and nothing says what they share; "
            "give --spread rows or --spread coders"
        )
    coders = len(config.coders())
    if config.spread == "coders" and coders < size:
        raise UsageError(
            f"spread coders needs a coder for each process, got {coders} coders for {size} "
            f"processes; start {coders}, or use spread rows"
        )
    if config.device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"device must be auto, cpu or cuda for several processes, got {config.device}; "
            "each takes a GPU of its own"
        )


def _takes_gpu_(config: RunConfig, local: int) -> bool:
    """Make the GPU of this rank the one that `cuda` means; whether there is one."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return False
    gpus = torch.cuda.device_count()
    if local >= gpus:
        raise UsageError(
            f"each process needs a GPU of its own, got {gpus} GPUs; start {gpus} processes on "
            "this machine, or use device cpu"
        )
    torch.cuda.set_device(local)
    return True
