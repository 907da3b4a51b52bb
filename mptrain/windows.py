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
Fact = str
Rows = Mapping[Side | Fact, Shaped[Tensor, "_ ..."]]
"each side's values, and facts of each row by name, for the same rows"

POSITION: Fact = "position"
TOKEN: Fact = "token"


def norm_of(side: Side) -> Fact:
    """Name of the fact that is the Euclidean norm of a row on one side."""
    return f"norm of {':'.join(side)}"


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
class Column:
    """A side, or a fact of each row: what it looks like, and what reads a chunk of it."""

    dtype: torch.dtype
    width: int | None
    "None: one number a row"
    read: Callable[[Chunk], Shaped[Tensor, "_ ..."]]

    def empty(self, rows: int, **options: object) -> Tensor:
        """Space for rows; `options` are those of `torch.empty`."""
        shape = (rows,) if self.width is None else (rows, self.width)
        return torch.empty(shape, **{"dtype": self.dtype, **options})  # type: ignore[call-overload, no-any-return]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * (self.width or 1)


Columns = Mapping[Side | Fact, Column]


def read_windows(
    plans: Iterator[Plan], columns: Columns, readers: Executor
) -> Iterator[tuple[Rows, Int[Tensor, " N"]]]:
    """Windows and the order of their rows, each read while the one before is consumed.

    A window is overwritten once the next is asked for: there are two, and fresh memory would cost
    as much time as the copy into it. An error of a column surfaces when its window comes.
    """
    spaces: list[Rows] = []
    started = (_start(plan, columns, readers, spaces) for plan in plans)
    coming = next(started, None)
    try:
        while coming is not None:
            window, order_N, reads = coming
            for read in reads:
                read.result()
            coming = next(started, None)
            yield window, order_N
            spaces.append(window)
    finally:
        for read in coming[2] if coming else ():
            read.cancel()


def _start(
    plan: Plan, columns: Columns, readers: Executor, spaces: list[Rows]
) -> tuple[Rows, Int[Tensor, " N"], list[Future[None]]]:
    """Find space for a window and have it filled by the reading threads."""
    window, at = _space(plan.window.rows, columns, spaces), 0
    reads = []
    for chunk in plan.window.chunks:
        for key, column in columns.items():
            rows = window[key][at : at + chunk.rows]
            reads.append(readers.submit(_fill_, rows, partial(column.read, chunk)))
        at += chunk.rows
    return window, plan.order_N, reads


def _space(rows: int, columns: Columns, spaces: list[Rows]) -> Rows:
    """Space that is done with, where it is large enough, as all but a stream's first are."""
    space = spaces.pop() if spaces else {}
    if any(len(space.get(key, ())) < rows for key in columns):
        space = {}  # freed before there is another in its place
        space = {key: column.empty(rows) for key, column in columns.items()}
    return space


def _fill_(rows: Shaped[Tensor, "..."], read: Callable[[], Tensor]) -> None:
    found = read()
    assert found.shape == rows.shape, f"{read} gave {found.shape}, not {rows.shape}"
    rows.copy_(found)
