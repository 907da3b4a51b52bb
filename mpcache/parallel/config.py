"""Who does the work on a store. Nothing of it changes what the store holds."""

import os
import re
from dataclasses import dataclass

from mpcache.errors import UsageError

_MOST_THREADS = 8  # by default: more parts in memory help no disk


@dataclass(frozen=True)
class Share:
    """The parts of one job of an array: every `count`-th, from part `number - 1` on."""

    number: int
    count: int

    def has(self, part: int) -> bool:
        return part % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True, kw_only=True)
class DaskConfig:
    """Processes that share the work; without either of these, it is done by the calling one."""

    workers: int | None = None
    "share the work among so many processes on this machine"
    scheduler: str | None = None
    "share the work among the workers of the Dask cluster whose scheduler has this address"

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers must be at least 1, got {self.workers}")
        if self.workers is not None and self.scheduler is not None:
            raise UsageError("workers and scheduler exclude each other; give one of them")
        if self.scheduler is not None and not re.fullmatch(r"(\w+://)?[^/\s]+:\d+", self.scheduler):
            raise UsageError(
                f"scheduler must be an address such as tcp://host:8786, got {self.scheduler!r}"
            )

    @property
    def is_wanted(self) -> bool:
        """Whether any process but the calling one is to work."""
        return bool(self.workers or self.scheduler)


@dataclass(frozen=True, kw_only=True)
class CollectParallelConfig(DaskConfig):
    """Where the model of a collection runs."""

    workers: int | None = None
    "collect with so many processes on this machine: one a GPU, or dividing the cores among them"
    scheduler: str | None = None
    "collect with the workers of the Dask cluster whose scheduler has this address"
    share: str | None = None
    "collect the i-th of n disjoint shares alone, written i/n from 1/n to n/n; for array jobs"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.parts

    @property
    def parts(self) -> Share:
        """The share; without one, all parts."""
        if self.share is None:
            return Share(1, 1)
        number, slash, count = self.share.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal()) or not (
            1 <= int(number) <= int(count)
        ):
            raise UsageError(
                f"share must be i/n from 1/n to n/n, got {self.share!r}; number the jobs of an "
                "array from 1"
            )
        return Share(int(number), int(count))


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(DaskConfig):
    """What goes over the parts of a store that is there."""

    threads: int | None = None
    "parts worked on at a time in each process: by default its cores, up to 8; memory is times this"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, got {self.threads}")
        if self.threads is not None and self.scheduler is not None:
            raise UsageError(
                "threads and scheduler exclude each other; start its workers with --nthreads"
            )

    @property
    def at_a_time(self) -> int:
        """Parts in work in one process of this machine."""
        if self.threads is not None:
            return self.threads
        return 1 if self.workers else min(_MOST_THREADS, os.cpu_count() or 1)
