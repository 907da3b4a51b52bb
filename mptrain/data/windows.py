"""Read windows: the chunks of a window are read by threads while the window before is consumed.

N rows in a window.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from mptrain.config.sides import Side
from mptrain.data.buffers import BufferPool, Lease
from mptrain.data.columns import Column, Columns, RowField, Rows
from mptrain.data.shuffle import Chunk
from mptrain.data.window_plans import WindowPlan

# Handing over a task takes as long as reading half a chunk; and threads should end together.
_MAX_CHUNKS_PER_TASK = 8
_MIN_TASKS_PER_WINDOW = 16
_INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True)
class ReadWindow:
    """The rows of a plan's chunks laid end to end."""

    rows: Rows
    plan: WindowPlan

    def __len__(self) -> int:
        return self.plan.rows

    def copy_rows_(self, out: Rows, at: int, first: int, last: int) -> int:
        """Copy this reader's rows among rows `first` to `last` of the window to `out[at:]`.

        Returns the index in `out` after the copied rows.
        """
        low, high = np.searchsorted(self.plan.turns_N, (first, last))
        order, end = self.plan.order_N[low:high], at + int(high - low)
        for key, rows in self.rows.items():
            # clip: otherwise NumPy copies once more, to leave `out` alone if an index is wrong
            np.take(_as_integers(rows), order, axis=0, out=_as_integers(out[key][at:end]),
                    mode="clip")  # fmt: skip
        return end


def read_windows(
    plans: Iterator[WindowPlan], columns: Columns, readers: Executor
) -> Iterator[ReadWindow]:
    """Yield windows; each is read while the window before is consumed.

    A window's rows are valid until the next window is asked for: their memory is then used again.
    Two windows are in memory at most. An error of a column surfaces as itself with its window.
    """
    pool = BufferPool(columns)
    plan = next(plans, None)
    coming = _start(plan, columns, readers, pool) if plan else None
    try:
        while coming is not None:
            plan = next(plans, None)  # its order is drawn while the window before is read
            current = coming
            for read in current.reads:
                read.result()
            coming = _start(plan, columns, readers, pool) if plan else None
            yield current.window
            current.lease.release()
    finally:
        for read in coming.reads if coming else ():
            read.cancel()


class _StartedWindow(NamedTuple):
    window: ReadWindow
    lease: Lease
    reads: list[Future[None]]


class _Piece(NamedTuple):
    """Some columns of a chunk, and the chunk's rows in its window."""

    columns: Columns
    chunk: Chunk
    rows: slice


def _start(
    plan: WindowPlan, columns: Columns, readers: Executor, pool: BufferPool
) -> _StartedWindow:
    """Lease memory for a window and let the threads read it."""
    ends = list(accumulate((chunk.rows for chunk in plan.chunks), initial=0))
    lease = pool.lease(ends[-1])
    pieces = [
        _Piece(columns_of_piece, chunk, slice(*span))
        for chunk, span in zip(plan.chunks, pairwise(ends), strict=True)
        for columns_of_piece in _split_columns(columns)
    ]
    step = min(_MAX_CHUNKS_PER_TASK, max(1, len(pieces) // _MIN_TASKS_PER_WINDOW))
    reads = [
        readers.submit(_read_pieces_, lease.rows, pieces[at : at + step])
        for at in range(0, len(pieces), step)
    ]
    return _StartedWindow(ReadWindow(lease.rows, plan), lease, reads)


def _split_columns(columns: Columns) -> list[Columns]:
    """Split columns into what a task reads of a chunk: one side; the first also reads all fields.

    Row fields take almost no time.
    """
    split: list[dict[Side | RowField, Column]] = [
        {key: column} for key, column in columns.items() if isinstance(key, tuple)
    ]
    split[0] |= {key: column for key, column in columns.items() if isinstance(key, str)}
    return [*split]


def _read_pieces_(window: Rows, pieces: Sequence[_Piece]) -> None:
    for piece in pieces:
        for key, column in piece.columns.items():
            column.read(piece.chunk, window[key][piece.rows])


def _as_integers(rows: Shaped[Tensor, "_ ..."]) -> np.ndarray:
    """View a tensor as NumPy integers of the same size, because NumPy has no bfloat16.

    Not as one item per row: NumPy holds Python's lock while it copies such items.
    """
    return rows.view(torch.uint8).numpy().view(_INTEGERS[rows.element_size()])
