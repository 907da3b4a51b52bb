"""Plans of windows: which chunks are read together, and in which order their rows are handed out.

N rows in a window.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mptrain.data.shuffle import Chunk, Window, epoch_order

Order = NDArray[np.int64]


@dataclass(frozen=True)
class StreamShare:
    """One of several readers of a stream; each reads chunks of its own."""

    rank: int = 0
    size: int = 1


WHOLE_STREAM = StreamShare()


@dataclass(frozen=True)
class WindowPlan:
    """A window before it is read: its chunks, and which of their rows comes when."""

    chunks: tuple[Chunk, ...]
    "to be laid end to end"
    rows: int
    "rows that all readers hand out; fewer than in their chunks at the ends of a stream"
    order_N: Order
    "rows to hand out, as indices into the chunks laid end to end"
    turns_N: Order
    "how many rows all readers hand out before each of these rows; ascending"


def endless_plans(
    part_sizes: Sequence[int],
    chunk_rows: int,
    *,
    seed: int,
    window: int,
    offset: int,
    share: StreamShare = WHOLE_STREAM,
) -> Iterator[WindowPlan]:
    """Yield the plans of one epoch after another, from row `offset` of the stream.

    `window` is in chunks. Each epoch has its own order.
    """
    epoch, within = divmod(offset, sum(part_sizes))
    while True:
        order = epoch_order(part_sizes, chunk_rows, seed=seed, epoch=epoch, window=window)
        first, skip = order.locate(within)
        for number in range(first, order.windows):
            chunks = order.window(number)
            yield _plan(chunks, chunks.permutation()[skip:], share)
            skip = 0
        epoch, within = epoch + 1, 0


def one_pass_plans(
    part_sizes: Sequence[int], chunk_rows: int, *, window: int, rows: int
) -> Iterator[WindowPlan]:
    """Yield the plans of the first `rows` rows of one order, which is the same for all windows."""
    order = epoch_order(part_sizes, chunk_rows, seed=0, epoch=0, window=window)
    for number in range(order.windows):
        rest = rows - order.start(number)
        if rest <= 0:
            return
        chunks = order.window(number)
        yield _plan(chunks, np.arange(min(rest, chunks.rows)), WHOLE_STREAM)


def _plan(window: Window, order: Order, share: StreamShare) -> WindowPlan:
    """Return the plan of one of several readers for a window with this order of rows."""
    if share.size == 1:  # the general case below takes as long as drawing the order
        return WindowPlan(window.chunks, len(order), order, np.arange(len(order)))
    chunks = np.arange(len(window.chunks))
    owner = np.repeat(chunks % share.size, [chunk.rows for chunk in window.chunks])
    own_index = np.cumsum(owner == share.rank) - 1
    (turns_N,) = np.nonzero(owner[order] == share.rank)
    own_chunks = window.chunks[share.rank :: share.size]
    return WindowPlan(own_chunks, len(order), own_index[order[turns_N]], turns_N)
