"""The committed rows of one side of a hookpoint, as a lazily read array of tensors.

Shapes: R rows, W width.
"""

import bisect
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mpcache.config import Split
from mpcache.store.acts_reader import ActsReader


@dataclass(frozen=True)
class Part:
    """A committed part: its number, its true rows, and its split."""

    number: int
    rows: int
    split: Split


class ActsArray:
    """Committed rows `[R, W]` of one side of a hookpoint, in stored order, read on demand.

    The order is that of part numbers, over both splits; rows of a part were permuted when they were
    collected. Indexing with an integer or a slice gives tensors in the dtype of the store: bfloat16
    arrives as `torch.bfloat16`, which NumPy and Zarr do not have. Slices are read whole, so their
    size is the memory they take; `Store.rows` reads any number of rows in bounded memory.

    Every read raises DamagedStoreError where bytes are not those that were committed.

        >>> acts = open_store("store")["layers.0:output"]
        >>> rows, width = acts.shape
        >>> acts[:2].shape == (2, width)
        True
    """

    def __init__(self, acts: ActsReader, hookpoint: str, side: str, parts: Sequence[Part]) -> None:
        self.hookpoint = hookpoint
        self.side = side
        self.parts = tuple(parts)
        self.dtype: torch.dtype = getattr(torch, acts.layout.dtype)
        self._acts = acts
        self._ends = list(itertools.accumulate(part.rows for part in parts))

    @property
    def shape(self) -> tuple[int, int]:
        """Committed rows and width."""
        return len(self), self._acts.width(self.hookpoint, self.side)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __repr__(self) -> str:
        rows, width = self.shape
        return f"ActsArray({self.hookpoint}:{self.side}, [{rows}, {width}], {self.dtype})"

    def __getitem__(self, key: int | slice) -> Tensor:
        """Row `[W]` for an integer, rows `[R, W]` for a slice; IndexError beyond the last row."""
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step < 0:
                rows = range(start, stop, step)
                return self[rows[-1] : start + 1].flip(0)[::-step] if rows else self._read(0, 0)
            return self._read(start, stop)[::step]
        try:
            row = operator.index(key)
        except TypeError:
            raise TypeError(
                f"rows are indexed by an integer or a slice, got {type(key).__name__}"
            ) from None
        row = row + len(self) if row < 0 else row
        if not 0 <= row < len(self):
            raise IndexError(f"row {key} is out of range, {self!r} has {len(self)} rows")
        return self._read(row, row + 1)[0]

    def chunks(self, split: Split | None = None) -> Iterator[Float[Tensor, "R W"]]:
        """The true rows of chunk after chunk, of one split or of both; one chunk in memory."""
        size = self._acts.layout.chunk_rows
        for part in self.parts:
            if split in (None, part.split):
                for chunk in range(-(-part.rows // size)):
                    yield self._acts.read_chunk(self.hookpoint, self.side, part.number, chunk)

    def _read(self, start: int, stop: int) -> Float[Tensor, "R W"]:
        """Rows from `start` to before `stop`; reads the chunks that hold them."""
        out = torch.empty(max(0, stop - start), self.shape[1], dtype=self.dtype)
        row = start
        while row < stop:
            rows = self._chunk_from(row)[: stop - row]
            out[row - start : row - start + len(rows)] = rows
            row += len(rows)
        return out

    def _chunk_from(self, row: int) -> Float[Tensor, "R W"]:
        """The rest of the chunk that holds a row, from that row on."""
        index = bisect.bisect_right(self._ends, row)
        part = self.parts[index]
        chunk, skip = divmod(row - (self._ends[index] - part.rows), self._acts.layout.chunk_rows)
        return self._acts.read_chunk(self.hookpoint, self.side, part.number, chunk)[skip:]
