"""Parallelism settings. They never affect a store's contents."""

import os
import re
from dataclasses import dataclass
from typing import ClassVar

from mpcache.errors import UsageError

_DEFAULT_THREADS = 8  # at most, because more parts in memory do not make a disk faster


@dataclass(frozen=True)
class Share:
    """The parts of one job of an array job: every `count`-th part, starting at `number - 1`."""

    number: int
    count: int

    def includes(self, part: int) -> bool:
        return part % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


ALL_PARTS = Share(1, 1)


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """The processes that do the work. By default the calling process does all of it."""

    group: ClassVar[str] = "Parallel"

    workers: int | None = None
    "worker processes to start on this machine; default: none, the command does the work itself"
    scheduler: str | None = None
    "address of a running Dask scheduler, such as tcp://host:8786; its workers do the work"

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers must be at least 1, got {self.workers}; use 1 or more")
        if self.workers is not None and self.scheduler is not None:
            raise UsageError(
                "workers and scheduler cannot be used together; remove --workers or --scheduler"
            )
        if self.scheduler is not None and not re.fullmatch(r"(\w+://)?[^/\s]+:\d+", self.scheduler):
            raise UsageError(
                f"scheduler must be an address such as tcp://host:8786, got {self.scheduler!r}; "
                "give the address of a running Dask scheduler"
            )

    @property
    def uses_dask(self) -> bool:
        """Whether other processes than the calling one do the work."""
        return bool(self.workers or self.scheduler)


@dataclass(frozen=True, kw_only=True)
class CollectParallelConfig(WorkersConfig):
    """The processes that run the model during a collection.

    They change the speed, never what a store holds. The default is this process alone. Raises
    UsageError where two settings exclude each other.

    Example:
        >>> from mpcache import CollectParallelConfig
        >>> job = CollectParallelConfig(share="2/8")  # the second of an array of 8 jobs
    """

    group: ClassVar[str] = "Parallel"

    workers: int | None = None
    (
        "worker processes to start on this machine; each takes one GPU; without GPUs, or with "
        "--device cpu, they divide the CPU cores"
    )
    scheduler: str | None = None
    "address of a running Dask scheduler, such as tcp://host:8786; its workers run the model"
    share: str | None = None
    ("i/n: collect only the i-th of n disjoint sets of parts; for 8 array jobs, give 1/8 to 8/8")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.part_share

    @property
    def part_share(self) -> Share:
        """The parsed share. Without `share` it includes all parts."""
        if self.share is None:
            return ALL_PARTS
        number, slash, count = self.share.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal()) or not (
            1 <= int(number) <= int(count)
        ):
            raise UsageError(
                f"share must be i/n with i from 1 to n, got {self.share!r}; for job 2 of 8, give "
                "2/8"
            )
        return Share(int(number), int(count))


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(WorkersConfig):
    """The processes and threads that go over the parts of an existing store.

    They change the speed, never what a store holds. The default is this process, with a thread for
    each core, up to 8. Raises UsageError where two settings exclude each other.

    Example:
        >>> from mpcache import ParallelConfig
        >>> config = ParallelConfig(workers=2, threads=4)  # 8 parts at the same time
    """

    group: ClassVar[str] = "Parallel"

    threads: int | None = None
    (
        "parts processed at the same time in each process; a larger number needs more memory; "
        "default: number of cores, at most 8 (with --workers: 1)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, got {self.threads}; use 1 or more")
        if self.threads is not None and self.scheduler is not None:
            raise UsageError(
                "threads and scheduler cannot be used together; remove --threads, and start the "
                "Dask workers with --nthreads"
            )

    @property
    def threads_per_process(self) -> int:
        """Parts that each process of this machine has in work."""
        if self.threads is not None:
            return self.threads
        return 1 if self.workers else min(_DEFAULT_THREADS, os.cpu_count() or 1)
