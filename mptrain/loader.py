"""Read a store's rows in shuffled order, ahead of the trainer, and hand them over in batches.

Letters: B rows in a batch, N rows in a window. A side is (hookpoint, "input" or "output").
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mpcache.reader import Store, open_store
from mptrain.order import EpochOrder, Group, epoch_order

# the rest of mptrain opens stores through this module: the one edge between the packages
__all__ = ["Batch", "Loader", "Side", "Store", "kept_rows", "open_store", "window_chunks"]

__all__ = ["Batch", "Loader", "Side", "Store", "kept_rows", "open_store"]

Side = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Consecutive rows of the stream, unfiltered, on the loader's device."""

    offset: int
    "rows of the stream before this batch"
    positions_B: Int[Tensor, " B"]
    "position of each row in its sequence"
    values: Mapping[Side, Float[Tensor, "B _"]]
    "float32 rows of each side"

    @property
    def rows(self) -> int:
        return len(self.positions_B)


def kept_rows(
    batch: Batch, *, skip_positions: int, finite: Sequence[Side] = ()
) -> Bool[Tensor, " B"]:
    """Which rows a coder takes: not of the first positions, and finite on the named sides."""
    kept_B = batch.positions_B >= skip_positions
    for side in finite:
        kept_B &= batch.values[side].isfinite().all(dim=1)
    return kept_B


def window_chunks(store: Store, sides: Sequence[Side], window_bytes: int) -> int:
    """Chunks in half a window of `window_bytes`: one half is handed over, one is being read."""
    row = sum(store.width(*side) for side in sides) * _dtype(store).itemsize
    chunk = store.chunk_rows * (row + 16)  # each row has a position and a place in the order
    if window_bytes < 2 * chunk:
        raise ValueError(
            f"window_bytes must hold two chunks of {_spelled(sides)}, got {window_bytes}; "
            f"use at least {2 * chunk}"
        )
    return window_bytes // 2 // chunk


@dataclass(frozen=True)
class _Plan:
    """Chunks to lay end to end, and which of their rows to hand over, in order."""

    group: Group
    order_N: Int[Tensor, " N"]


@dataclass(frozen=True)
class _Rows:
    """Rows in host memory, in the storage dtype, on their way to a batch."""

    positions_N: Int[Tensor, " N"]
    values: Mapping[Side, Shaped[Tensor, "N _"]]

    def gather_(self, source: "_Rows", rows: Int[Tensor, " taken"], at: int) -> None:
        """Copy the named rows of `source` to the places from `at` on."""
        here = slice(at, at + len(rows))
        torch.index_select(source.positions_N, 0, rows, out=self.positions_N[here])
        for side, values in self.values.items():
            torch.index_select(source.values[side], 0, rows, out=values[here])

    def batch(self, rows: int, offset: int, device: torch.device) -> Batch:
        """The first `rows` of them on the device; the cast to float32 is made there.

        On CUDA copy and cast are queued on the default stream, where the trainer works too.
        """
        return Batch(
            offset=offset,
            positions_B=self.positions_N[:rows].to(device, non_blocking=True),
            values={
                side: values[:rows].to(device, non_blocking=True).float()
                for side, values in self.values.items()
            },
        )


class Loader:
    """Batches of one split, the same rows on every side. Close it, or use it in a `with`.

    Host memory: `window_bytes`, a decoded chunk for each thread, and three batches. The order
    depends on `window_bytes` and on the sides, unless half a window holds the whole split.

    An error of the store surfaces as itself, at the first batch that needs the damaged window.
    """

    def __init__(
        self,
        store: Store,
        sides: Sequence[Side],
        split: Literal["train", "validation"],
        *,
        batch_rows: int,
        seed: int,
        window_bytes: int,
        device: torch.device,
        threads: int = 4,
    ) -> None:
        self.sides = tuple(dict.fromkeys(sides))
        self.batch_rows, self.seed, self.device = batch_rows, seed, device
        self.parts = store.parts(self.sides, split)
        self.rows = sum(part.rows for part in self.parts)
        "rows in an epoch"
        if not self.rows:
            raise ValueError(
                f"{store.path} has no {split} rows of {_spelled(self.sides)}; "
                "collect more rows, or let the collection finish"
            )
        self.window = window_chunks(store, self.sides, window_bytes)
        "chunks whose rows are mixed"
        self.wait_seconds = 0.0
        "time that consumers spent waiting for batches"
        self._store = store
        self._pinned = device.type == "cuda"  # page-locked memory lets copies run asynchronously
        self._readers = ThreadPoolExecutor(threads, "read")
        # runs one batch ahead: gathers its rows and moves them to the device
        self._assembler = ThreadPoolExecutor(1, "assemble")

    @property
    def order_digest(self) -> str:
        """Loaders with equal digests over one store give equal batches for equal offsets."""
        parts = [(part.number, part.rows) for part in self.parts]
        plan = (self.seed, self.window, self._store.chunk_rows, parts)
        return hashlib.sha256(repr(plan).encode()).hexdigest()

    def batches(self, offset: int = 0) -> Iterator[Batch]:
        """Endless batches from row `offset` of the stream; each epoch is shuffled differently."""
        return self._ahead(self._assembled(self._endless(offset), offset))

    def one_pass(self, max_rows: int | None = None) -> Iterator[Batch]:
        """Each row once, or the first `max_rows` of them; the last batch may be shorter.

        Chunks are shuffled, so that the first rows come from many parts, and alike for all seeds,
        windows and batch sizes, so that runs are compared on the same rows.
        """
        rows = self.rows if max_rows is None else min(max_rows, self.rows)
        return self._ahead(self._assembled(self._once(rows), 0))

    def close(self) -> None:
        """Stop reading and end all threads; a chunk that is being read is read to its end."""
        self._readers.shutdown(wait=False, cancel_futures=True)  # wakes the assembler
        self._assembler.shutdown(cancel_futures=True)
        self._readers.shutdown()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _order(self, *, seed: int, epoch: int, window: int) -> EpochOrder:
        sizes = [part.rows for part in self.parts]
        return epoch_order(sizes, self._store.chunk_rows, seed=seed, epoch=epoch, window=window)

    def _endless(self, offset: int) -> Iterator[_Plan]:
        epoch, within = divmod(offset, self.rows)
        while True:
            order = self._order(seed=self.seed, epoch=epoch, window=self.window)
            first, skip = order.locate(within)
            for number in range(first, order.groups):
                group = order.group(number)
                yield _Plan(group, torch.from_numpy(group.permutation())[skip:])
                skip = 0
            epoch, within = epoch + 1, 0

    def _once(self, rows: int) -> Iterator[_Plan]:
        # windows no larger than a batch: little is read beyond the rows that are asked for
        window = min(self.window, -(-self.batch_rows // self._store.chunk_rows))
        order = self._order(seed=0, epoch=0, window=window)
        for number in range(order.groups):
            rest = rows - order.start(number)
            if rest <= 0:
                return
            group = order.group(number)
            yield _Plan(group, torch.arange(min(rest, group.rows)))

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, each made while the consumer works on the one before."""
        pending = self._assembler.submit(next, batches, None)
        while True:
            began = time.perf_counter()
            batch = pending.result()
            self.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            pending = self._assembler.submit(next, batches, None)
            yield batch

    def _assembled(self, plans: Iterator[_Plan], offset: int) -> Iterator[Batch]:
        rows, filled = self._empty(self.batch_rows, pinned=self._pinned), 0
        for window, order_N in self._windows(plans):
            cuts = range(self.batch_rows - filled, len(order_N), self.batch_rows)
            for taken in order_N.tensor_split(list(cuts)):
                rows.gather_(window, taken, filled)
                filled += len(taken)
                if filled == self.batch_rows:
                    yield rows.batch(filled, offset, self.device)
                    rows, filled = self._empty(self.batch_rows, pinned=self._pinned), 0
                    offset += self.batch_rows
            del window  # else three windows are alive once the next one has come
        if filled:
            yield rows.batch(filled, offset, self.device)

    def _windows(self, plans: Iterator[_Plan]) -> Iterator[tuple[_Rows, Int[Tensor, " N"]]]:
        """Windows as they come, each read while the one before is consumed."""
        started = (self._start(plan) for plan in plans)
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

    def _start(self, plan: _Plan) -> tuple[_Rows, Int[Tensor, " N"], list[Future[None]]]:
        """Allocate a window and have it filled by the reading threads."""
        window, at = self._empty(plan.group.rows, pinned=False), 0
        jobs: list[tuple[Tensor, Callable[[], Tensor]]] = []
        for chunk in plan.group.chunks:
            here, place = slice(at, at + chunk.rows), (self.parts[chunk.part].number, chunk.chunk)
            jobs.append((window.positions_N[here], partial(self._store.read_positions, *place)))
            for side, values in window.values.items():
                jobs.append((values[here], partial(self._store.read_chunk, *side, *place)))
            at += chunk.rows
        reads = [self._readers.submit(_fill_, rows, read) for rows, read in jobs]
        return window, plan.order_N, reads

    def _empty(self, rows: int, *, pinned: bool) -> _Rows:
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, pin_memory=pinned)

        widths = {side: self._store.width(*side) for side in self.sides}
        return _Rows(
            empty(rows, dtype=torch.int64),
            {side: empty(rows, w, dtype=_dtype(self._store)) for side, w in widths.items()},
        )


def _fill_(rows: Shaped[Tensor, "..."], read: Callable[[], Tensor]) -> None:
    found = read()
    assert found.shape == rows.shape, f"{read} gave {found.shape}, not {rows.shape}"
    rows.copy_(found)


def _dtype(store: Store) -> torch.dtype:
    found = getattr(torch, store.layout.dtype)
    assert isinstance(found, torch.dtype)
    return found


def _spelled(sides: Sequence[Side]) -> str:
    return ", ".join(":".join(side) for side in sides)
