"""Who does the work of a collection. Nothing of it changes what a store holds."""

import re
from dataclasses import dataclass


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
class Workforce:
    """Where the model runs; without any of these, in the calling process."""

    workers: int | None = None
    "collect with so many processes on this machine: one a GPU, or dividing the cores among them"
    scheduler: str | None = None
    "collect with the workers of the Dask cluster whose scheduler has this address"
    share: str | None = None
    "collect the i-th of n disjoint shares alone, written i/n from 1/n to n/n; for array jobs"

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.workers is not None and self.scheduler is not None:
            raise ValueError("workers and scheduler exclude each other; give one of them")
        if self.scheduler is not None and not re.fullmatch(r"(\w+://)?[^/\s]+:\d+", self.scheduler):
            raise ValueError(
                f"scheduler must be an address such as tcp://host:8786, got {self.scheduler!r}"
            )
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
            raise ValueError(
                f"share must be i/n from 1/n to n/n, got {self.share!r}; number the jobs of an "
                "array from 1"
            )
        return Share(int(number), int(count))
