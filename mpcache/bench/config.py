"""Settings of `mpcache bench-store`."""

from dataclasses import dataclass
from typing import ClassVar

from mpcache.config import Codec, Dtype, check_at_least
from mpcache.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class StoreBenchConfig:
    """The random rows to write and read, in every combination of parts, chunks and codec.

    Raises:
        UsageError: a count is below 1, or a list is empty.
    """

    group: ClassVar[str] = "Storage"

    rows: int = 262_144
    "rows of random values in each measured store, rounded up to whole parts"
    width: int = 384
    "values per row"
    dtype: Dtype = "bfloat16"
    "dtype of the stored values"
    part_rows: tuple[int, ...] = (65_536,)
    "rows per part; give several numbers, separated by commas, to measure each of them"
    chunk_rows: tuple[int, ...] = (1024,)
    "rows per chunk; give several numbers, separated by commas, to measure each of them"
    codec: tuple[Codec, ...] = ("none",)
    "compression of chunks; give several codecs, separated by commas, to measure each of them"
    threads: int = 4
    "threads that write parts and read chunks"
    repeats: int = 3
    "measured rounds; one more round before them is a warm-up"

    def __post_init__(self) -> None:
        check_at_least(self, 1, "rows", "width", "threads", "repeats")
        for name in ("part_rows", "chunk_rows", "codec"):
            if not getattr(self, name):
                raise UsageError(f"{name} is empty; give at least one value")
