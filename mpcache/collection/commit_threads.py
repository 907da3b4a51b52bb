"""Threads that commit the arrays of one part while the model reads the next part.

Shapes: R rows of a part, W width.
"""

import concurrent.futures
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from mpcache.collection.wanted_parts import side_array
from mpcache.config import CollectConfig
from mpcache.model.hookpoint_patterns import Side
from mpcache.storage.base import Storage
from mpcache.store.writer import Writer

Result = TypeVar("Result")


def write_threads(config: CollectConfig, storage: Storage) -> int:
    """Number of threads that write: as configured, else a quarter of torch's threads, from 2 to 8.

    With two threads, one computes while the other waits for the disk. A server needs more.
    """
    computing = min(8, max(2, torch.get_num_threads() // 4))
    return config.write_threads or max(computing, storage.concurrency)


def commit_side(writer: Writer, part: int, side: Side, x_RW: Tensor) -> int:
    """Commit the rows of a part on one side. Returns their bytes."""
    writer.commit_acts(part, side_array(side), x_RW)
    return x_RW.numel() * x_RW.element_size()


def wait_for_all(futures: Sequence[Future[Result]]) -> list[Result]:
    """All results, once all futures are done. Raises the error of the first that failed."""
    concurrent.futures.wait(futures)
    return [future.result() for future in futures]


class PartCommitter:
    """Runs the commits of one part at a time beside the caller, which bounds memory.

    Leaving the context waits for the commits that run, also after an error or Ctrl-C: what was
    computed is not thrown away.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "commit", initializer=lower_priority)
        self._pending: list[Future[None]] = []

    def submit(self, commits: Iterable[Callable[[], None]]) -> None:
        """Start the commits of a part, once those of the part before are done; raises theirs."""
        self.wait()
        self._pending = [self._pool.submit(commit) for commit in commits]

    def wait(self) -> None:
        """Wait for all commits. Raises the error of the first that failed."""
        pending, self._pending = self._pending, []
        wait_for_all(pending)

    def __enter__(self) -> "PartCommitter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.wait()


def lower_priority() -> None:
    """Give the calling thread, and threads it starts, only processor time that others leave.

    A forward pass that shares its cores with a writer waits for the slower of its threads at every
    operation. When the model waits for the writer, the writer has all cores.
    """
    torch.set_num_threads(1)  # of this thread, whose tensors are small
    if sys.platform == "linux":  # on other systems a priority is that of the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
