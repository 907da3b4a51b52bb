"""Windows: which chunks are read together, in which order their rows go out, and the reading.

Letters: N rows in a window. A side is (hookpoint, "input" or "output").
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from mptrain.config.sides import Side
from mptrain.data.shuffle import Chunk, Window, epoch_order

RowField = str
Order = NDArray[np.int64]
Rows = Mapping[Side | RowField, Shaped[Tensor, "_ ..."]]
"each side's values, and facts of each row by name, for the same rows"

# handing over a task takes as long as reading half a chunk; and threads should end together
_MOST_CHUNKS = 8  # of a task
_LEAST_TASKS = 16  # of a window
_INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}
POSITION: RowField = "position"
SEQUENCE: RowField = "sequence"
TOKEN: RowField = "token"
ASSISTANT: RowField = "assistant"


def norm_of(side: Side) -> RowField:
    """Name of the fact that is the Euclidean norm of a row on one side."""
    return f"norm of {':'.join(side)}"


# --- plans ---


@dataclass(frozen=True)
class StreamShare:
    """One of several readers of a stream: each reads chunks of its own."""

    rank: int = 0
    size: int = 1


WHOLE_STREAM = StreamShare()


@dataclass(frozen=True)
class WindowPlan:
    """A window before it is read: chunks to lay end to end, and which of their rows comes when."""

    chunks: tuple[Chunk, ...]
    rows: int
    "rows that all readers hand over; fewer than their chunks have where a stream starts or ends"
    order_N: Order
    "rows to hand over, as places in these chunks"
    turns_N: Order
    "when each comes: rows that all readers hand over before it; ascending"


def _plan(window: Window, order: Order, share: StreamShare) -> WindowPlan:
    """What one of several readers does of a window whose rows go out in this order."""
    if share.size == 1:  # what follows takes as long as drawing the order
        return WindowPlan(window.chunks, len(order), order, np.arange(len(order)))
    chunks = np.arange(len(window.chunks))
    owner = np.repeat(chunks % share.size, [chunk.rows for chunk in window.chunks])
    place = np.cumsum(owner == share.rank) - 1  # of its own rows
    (turns_N,) = np.nonzero(owner[order] == share.rank)
    own = window.chunks[share.rank :: share.size]
    return WindowPlan(own, len(order), place[order[turns_N]], turns_N)


def endless_plans(
    part_sizes: Sequence[int],
    chunk_rows: int,
    *,
    seed: int,
    window: int,
    offset: int,
    share: StreamShare = WHOLE_STREAM,
) -> Iterator[WindowPlan]:
    """Epoch after epoch from row `offset` of the stream; each epoch is shuffled differently."""
    epoch, within = divmod(offset, sum(part_sizes))
    while True:
        order = epoch_order(part_sizes, chunk_rows, seed=seed, epoch=epoch, window=window)
        first, skip = order.locate(within)
        for number in range(first, order.windows):
            coming = order.window(number)
            yield _plan(coming, coming.permutation()[skip:], share)
            skip = 0
        epoch, within = epoch + 1, 0


def one_pass_plans(
    part_sizes: Sequence[int], chunk_rows: int, *, window: int, rows: int
) -> Iterator[WindowPlan]:
    """The first `rows` rows of one order of chunks, the same for all windows."""
    order = epoch_order(part_sizes, chunk_rows, seed=0, epoch=0, window=window)
    for number in range(order.windows):
        rest = rows - order.start(number)
        if rest <= 0:
            return
        coming = order.window(number)
        yield _plan(coming, np.arange(min(rest, coming.rows)), WHOLE_STREAM)


# --- reading ---


@dataclass(frozen=True)
class Column:
    """A side, or a fact of each row: what it looks like, and what reads a chunk of it."""

    dtype: torch.dtype
    width: int | None
    "None: one number a row"
    read: Callable[[Chunk, Shaped[Tensor, "_ ..."]], object]
    "puts a chunk's rows into memory for them"

    def shaped(self, memory: Shaped[Tensor, " bytes"]) -> Shaped[Tensor, "_ ..."]:
        """Bytes as rows of this kind."""
        return memory.view(self.dtype).view((-1,) if self.width is None else (-1, self.width))

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * (self.width or 1)


Columns = Mapping[Side | RowField, Column]


class Piece(NamedTuple):
    """Some columns of a chunk, and its place in a window."""

    columns: Columns
    chunk: Chunk
    place: slice


class Memory:
    """Memory for rows that come and go, used again once no tensor looks at it.

    Fresh pages would cost as much time as filling them. For a GPU it is page-locked, so that copies
    are asynchronous, and PyTorch's own cache uses it again.
    """

    def __init__(self, columns: Columns, *, pinned: bool = False) -> None:
        self.columns, self.pinned = columns, pinned
        self._used: dict[Side | RowField, deque[np.ndarray]] = {key: deque() for key in columns}
        # how many references Python counts in an array that nobody else has: its versions differ
        self._alone = _oldest(deque([np.empty(0, np.uint8)]))[1]

    def take(self, rows: int) -> Rows:
        """So many rows of every column that nobody else has."""
        return {
            key: column.shaped(self._bytes(rows * column.row_bytes, self._used[key]))
            for key, column in self.columns.items()
        }

    def _bytes(self, size: int, used: deque[np.ndarray]) -> Shaped[Tensor, " bytes"]:
        if self.pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for _ in range(len(used)):
            found, references = _oldest(used)
            is_free = references <= self._alone  # a tensor made of it holds one more
            if is_free and len(found) >= size:
                break
            if not is_free:
                used.append(found)
        else:
            found = np.empty(max(1, size), np.uint8)  # PyTorch views nothing as nothing else
        used.append(found)
        return torch.from_numpy(found)[:size]


def _oldest(arrays: deque[np.ndarray]) -> tuple[np.ndarray, int]:
    """Take the first of these arrays, and the references to it."""
    found = arrays.popleft()
    return found, sys.getrefcount(found)


@dataclass(frozen=True)
class ReadWindow:
    """The rows of a plan's chunks laid end to end."""

    rows: Rows
    plan: WindowPlan

    def __len__(self) -> int:
        return self.plan.rows

    def take_(self, out: Rows, at: int, first: int, last: int) -> int:
        """Copy its own of rows `first` to `last` of the stream into `out` from row `at` on.

        Gives the row of `out` after them.
        """
        low, high = np.searchsorted(self.plan.turns_N, (first, last))
        order, end = self.plan.order_N[low:high], at + int(high - low)
        for key, rows in self.rows.items():
            # clip: else NumPy copies once more, to leave `out` alone where an index is wrong
            np.take(as_array(rows), order, axis=0, out=as_array(out[key][at:end]), mode="clip")
        return end


def read_windows(
    plans: Iterator[WindowPlan], columns: Columns, readers: Executor
) -> Iterator[ReadWindow]:
    """Each window is read while the one before is consumed.

    An error of a column surfaces as itself, when its window comes.
    """
    memory = Memory(columns)
    plan = next(plans, None)
    coming = _start(plan, columns, readers, memory) if plan else None
    try:
        while coming is not None:
            plan = next(plans, None)  # its order is drawn while the one before is read
            window, reads = coming
            for read in reads:
                read.result()
            coming = _start(plan, columns, readers, memory) if plan else None
            yield window
            del window  # its memory is for the one after the next
    finally:
        for read in coming[1] if coming else ():
            read.cancel()


def _start(
    plan: WindowPlan, columns: Columns, readers: Executor, memory: Memory
) -> tuple[ReadWindow, list[Future[None]]]:
    """Take memory for a window and have it filled by the reading threads."""
    ends = list(accumulate((chunk.rows for chunk in plan.chunks), initial=0))
    window = ReadWindow(memory.take(ends[-1]), plan)
    pieces = [
        Piece(some, chunk, slice(*span))
        for chunk, span in zip(plan.chunks, pairwise(ends), strict=True)
        for some in _apart(columns)
    ]
    step = min(_MOST_CHUNKS, max(1, len(pieces) // _LEAST_TASKS))
    return window, [
        readers.submit(_fill_, window.rows, pieces[at : at + step])
        for at in range(0, len(pieces), step)
    ]


def _apart(columns: Columns) -> list[Columns]:
    """What a thread reads of a chunk at a time: one side; facts, which take no time, with one."""
    apart: list[dict[Side | RowField, Column]] = [
        {key: column} for key, column in columns.items() if isinstance(key, tuple)
    ]
    apart[0] |= {key: column for key, column in columns.items() if isinstance(key, str)}
    return [*apart]


def _fill_(window: Rows, pieces: Sequence[Piece]) -> None:
    """Read chunks into their places in a window."""
    for piece in pieces:
        for key, column in piece.columns.items():
            column.read(piece.chunk, window[key][piece.place])


def as_array(rows: Shaped[Tensor, "_ ..."]) -> np.ndarray:
    """The same memory for NumPy, as integers: it has no bfloat16.

    Not as single items of a row's size: such are copied under Python's lock.
    """
    return rows.view(torch.uint8).numpy().view(_INTEGERS[rows.element_size()])
