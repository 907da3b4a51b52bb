"""Windows: which chunks are read together, in which order their rows go out, and the reading.

Letters: N rows in a window. A side is (hookpoint, "input" or "output").
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from mptrain.order import Chunk, Window, epoch_order

Side = tuple[str, str]
Fact = str
Places = NDArray[np.int64]
Rows = Mapping[Side | Fact, Shaped[Tensor, "_ ..."]]
"each side's values, and facts of each row by name, for the same rows"

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
POSITION: Fact = "position"
SEQUENCE: Fact = "sequence"
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

    def shaped(self, memory: Shaped[Tensor, " bytes"]) -> Shaped[Tensor, "_ ..."]:
        """Bytes as rows of this kind."""
        return memory.view(self.dtype).view((-1,) if self.width is None else (-1, self.width))

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * (self.width or 1)


Columns = Mapping[Side | Fact, Column]


class Memory:
    """Memory for the rows of windows, used again once no tensor looks at it.

    Fresh pages would cost as much time as filling them. For a GPU it is page-locked, so that copies
    are asynchronous, and PyTorch's own cache uses it again.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._used: deque[np.ndarray] = deque()
        # how many references Python counts in an array that nobody else has: its versions differ
        self._alone = _oldest(deque([np.empty(0, np.uint8)]))[1]

    def take(self, size: int) -> Shaped[Tensor, " bytes"]:
        """So many bytes that nobody else has."""
        if self.pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for _ in range(len(self._used)):
            found, references = _oldest(self._used)
            is_free = references <= self._alone  # a tensor made of it holds one more
            if is_free and len(found) >= size:
                break
            if not is_free:
                self._used.append(found)
        else:
            found = np.empty(size, np.uint8)
        self._used.append(found)
        return torch.from_numpy(found)[:size]


def _oldest(arrays: deque[np.ndarray]) -> tuple[np.ndarray, int]:
    """Take the first of these arrays, and the references to it."""
    found = arrays.popleft()
    return found, sys.getrefcount(found)


def read_windows(
    plans: Iterator[Plan], columns: Columns, readers: Executor, *, pinned: bool = False
) -> Iterator[Rows]:
    """Windows, their rows in order, each read while the one before is consumed.

    An error of a column surfaces as itself, when its window comes.
    """
    memory = {key: Memory(pinned=pinned) for key in columns}
    started = (_start(plan, columns, readers, memory) for plan in plans)
    coming = next(started, None)
    try:
        while coming is not None:
            window, reads = coming
            for read in reads:
                read.result()
            coming = next(started, None)
            yield window
            del window  # its memory is for the one after the next
    finally:
        for read in coming[1] if coming else ():
            read.cancel()


def _start(
    plan: Plan, columns: Columns, readers: Executor, memory: Mapping[Side | Fact, Memory]
) -> tuple[Rows, list[Future[None]]]:
    """Take memory for a window and have it filled by the reading threads."""
    rows, order_N = plan.window.rows, plan.order_N.numpy()
    window = {
        key: column.shaped(memory[key].take(len(order_N) * column.row_bytes))
        for key, column in columns.items()
    }
    place = np.full(rows, -1)  # of each row read: where it goes, or nowhere
    place[order_N] = np.arange(len(order_N))
    ends = np.cumsum([chunk.rows for chunk in plan.window.chunks])
    reads = [
        readers.submit(_fill_, window[key], here, partial(column.read, chunk))
        for chunk, here in zip(plan.window.chunks, np.split(place, ends[:-1]), strict=True)
        for key, column in columns.items()
    ]
    return window, reads


def _fill_(window: Shaped[Tensor, "..."], place: Places, read: Callable[[], Tensor]) -> None:
    """Read a chunk and put its rows where they go, while they are in the processor's cache."""
    found = read()
    same = (len(place), *window.shape[1:]) == found.shape and found.dtype == window.dtype
    assert same, f"{read} gave {found.dtype} {found.shape}"
    wanted = place >= 0
    if wanted.all():
        _array(window)[place] = _array(found)
    else:
        _array(window)[place[wanted]] = _array(found)[wanted]


def _array(rows: Shaped[Tensor, "_ ..."]) -> np.ndarray:
    """The same memory for NumPy, whose copies by row are faster, as integers: it has no bfloat16.

    Not as single items of a row's size: such are copied under Python's lock.
    """
    return rows.view(_INTEGERS[rows.element_size()]).numpy()
