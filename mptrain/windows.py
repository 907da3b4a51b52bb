"""Windows: which chunks are read together, in which order their rows go out, and the reading.

Letters: N rows in a window. A side is (hookpoint, "input" or "output").
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from mptrain.order import Chunk, Window, epoch_order

Side = tuple[str, str]


# --- plans ---


@dataclass(frozen=True)
class Plan:
    """A window before it is read: chunks to lay end to end, and their rows in order."""

    window: Window
    order_N: Int[Tensor, " N"]
    "rows to hand over; all of the window's, or fewer where a stream starts or ends"


def endless_plans(
    part_sizes: Sequence[int], chunk_rows: int, *, seed: int, window: int, offset: int
) -> Iterator[Plan]:
    """Epoch after epoch from row `offset` of the stream; each epoch is shuffled differently."""
    epoch, within = divmod(offset, sum(part_sizes))
    while True:
        order = epoch_order(part_sizes, chunk_rows, seed=seed, epoch=epoch, window=window)
        first, skip = order.locate(within)
        for number in range(first, order.windows):
            coming = order.window(number)
            yield Plan(coming, torch.from_numpy(coming.permutation())[skip:])
            skip = 0
        epoch, within = epoch + 1, 0


def one_pass_plans(
    part_sizes: Sequence[int], chunk_rows: int, *, window: int, rows: int
) -> Iterator[Plan]:
    """The first `rows` rows of one order of chunks, the same for all windows."""
    order = epoch_order(part_sizes, chunk_rows, seed=0, epoch=0, window=window)
    for number in range(order.windows):
        rest = rows - order.start(number)
        if rest <= 0:
            return
        coming = order.window(number)
        yield Plan(coming, torch.arange(min(rest, coming.rows)))


# --- reading ---


@dataclass(frozen=True)
class Rows:
    """Rows in host memory, in the storage dtype."""

    positions_N: Int[Tensor, " N"]
    values: Mapping[Side, Shaped[Tensor, "N _"]]

    def gather_(self, source: "Rows", rows: Int[Tensor, " taken"], at: int) -> None:
        """Copy the named rows of `source` to the places from `at` on."""
        here = slice(at, at + len(rows))
        torch.index_select(source.positions_N, 0, rows, out=self.positions_N[here])
        for side, values in self.values.items():
            torch.index_select(source.values[side], 0, rows, out=values[here])


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows come from: how they look, and what reads a chunk of them."""

    dtype: torch.dtype
    "storage dtype"
    widths: Mapping[Side, int]
    read_positions: Callable[[Chunk], Int[Tensor, " rows"]]
    read_values: Callable[[Side, Chunk], Shaped[Tensor, "rows width"]]

    def empty(self, rows: int, *, pinned: bool) -> Rows:
        """Space for rows; in page-locked memory where they are copied to a GPU."""
        return Rows(
            torch.empty(rows, dtype=torch.int64, pin_memory=pinned),
            {
                side: torch.empty(rows, width, dtype=self.dtype, pin_memory=pinned)
                for side, width in self.widths.items()
            },
        )


def read_windows(
    plans: Iterator[Plan], source: Source, readers: Executor
) -> Iterator[tuple[Rows, Int[Tensor, " N"]]]:
    """Windows and the order of their rows, each read while the one before is consumed.

    An error of `source` surfaces as itself, when its window comes.
    """
    started = (_start(plan, source, readers) for plan in plans)
    coming = next(started, None)
    try:
        while coming is not None:
            window, order_N, reads = coming
            for read in reads:
                read.result()
            coming = next(started, None)
            yield window, order_N
    finally:
        for read in coming[2] if coming else ():
            read.cancel()


def _start(
    plan: Plan, source: Source, readers: Executor
) -> tuple[Rows, Int[Tensor, " N"], list[Future[None]]]:
    """Allocate a window and have it filled by the reading threads."""
    window, at = source.empty(plan.window.rows, pinned=False), 0
    jobs: list[tuple[Tensor, Callable[[], Tensor]]] = []
    for chunk in plan.window.chunks:
        here = slice(at, at + chunk.rows)
        jobs.append((window.positions_N[here], partial(source.read_positions, chunk)))
        for side, values in window.values.items():
            jobs.append((values[here], partial(source.read_values, side, chunk)))
        at += chunk.rows
    return window, plan.order_N, [readers.submit(_fill_, rows, read) for rows, read in jobs]


def _fill_(rows: Shaped[Tensor, "..."], read: Callable[[], Tensor]) -> None:
    found = read()
    assert found.shape == rows.shape, f"{read} gave {found.shape}, not {rows.shape}"
    rows.copy_(found)
